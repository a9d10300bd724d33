"""What an objective is: a module that holds the student and turns a batch into a loss per sample.

The objective, not the student, is what gets prepared for distributed training, so that a Jacobian-vector product inside
``forward`` goes through the wrapped module and its gradients are synchronised. An objective never steps, logs or
reads config. Teachers and targets it holds are plain velocity fields, outside its parameters.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from fewstep.data.dataset import Batch
from fewstep.keys import Key


@dataclass(frozen=True)
class LossOutput:
    """Loss per sample ``[B]`` (what is minimised is its mean) and diagnostics as detached scalars."""

    per_sample_B: Tensor
    metrics: dict[str, Tensor]


class Objective(nn.Module, ABC):
    """Abstract; every subclass is final. ``student`` is the network being trained."""

    student: nn.Module

    @abstractmethod
    def forward(self, batch: Batch, key: Key) -> LossOutput: ...

    def after_step(self) -> None:
        """Called after every optimiser step: the place of target networks."""

    def extra_state(self) -> dict[str, Tensor]:
        """Tensors beyond the student that a resumed run needs, such as a target network's."""
        return {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Take back what ``extra_state`` gave."""
        if state:
            raise ValueError(f"{type(self).__name__} has no extra state, got {sorted(state)}")


def mean_square(difference: Tensor) -> Tensor:
    """Mean over all but the first dimension: ``[B, *D] -> [B]``."""
    return difference.flatten(1).square().mean(dim=1)


def drop_labels(
    label_B: Tensor | None, key: Key, index_B: Tensor, probability: float, null_label: int
) -> Tensor | None:
    """Replace each label by the null label with the given probability (classifier-free guidance training)."""
    if label_B is None or probability == 0:
        return label_B
    return label_B.masked_fill(key.uniform("label_dropout", index_B) < probability, null_label)
