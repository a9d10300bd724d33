"""What an objective is: a module that holds the student and turns a batch into a loss per sample.

The objective, not the student, is what gets prepared for distributed training, so that a Jacobian-vector product inside
``forward`` goes through the wrapped module and its gradients are synchronised. An objective never steps, logs or
reads config. Teachers and targets it holds are plain velocity fields, outside its parameters.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from fewstep.data.dataset import Batch
from fewstep.distill.tangent import Derivative
from fewstep.keys import Key


@dataclass(frozen=True)
class LossOutput:
    """What one batch gave, every number in float32 or better.

    ``per_sample_B`` is what is minimised (its mean). ``residual_B`` is the plain squared residual per coordinate,
    before any weight, detached: it falls where a weighted loss hovers. ``t_B`` is the time each sample was taken at.
    ``diagnostics`` are further numbers per sample ``[B]``, detached, NaN where one does not apply to a sample; the
    same names every time.
    """

    per_sample_B: Tensor
    residual_B: Tensor
    t_B: Tensor
    diagnostics: dict[str, Tensor]


class Objective(nn.Module, ABC):
    """Abstract; every subclass is final. ``student`` is the network being trained, ``derivative`` how its derivative
    along the path is taken by an objective that needs one."""

    student: nn.Module
    derivative: Derivative | None = None

    @abstractmethod
    def forward(self, batch: Batch, key: Key) -> LossOutput: ...

    def targets(self) -> tuple[nn.Module, ...]:
        """Networks beside the student that are moved by hand and not trained, each of the student's own shape."""
        return ()

    def after_step(self) -> None:
        """Called after every optimiser step: the place of target networks."""

    def extra_state(self) -> dict[str, Tensor]:
        """Tensors beyond the student that a resumed run needs, such as a target network's, sharded or not."""
        return {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Take back what ``extra_state`` gave."""
        if state:
            raise ValueError(f"{type(self).__name__} has no extra state, got {sorted(state)}")


def mean_square(difference: Tensor) -> Tensor:
    """Mean over all but the first dimension: ``[B, *D] -> [B]``."""
    return difference.flatten(1).square().mean(dim=1)


def root_mean_square(field: Tensor) -> Tensor:
    """Size per sample, ``[B, *D] -> [B]``, detached: a diagnostic."""
    return mean_square(field.detach()).sqrt()


def drop_labels(
    label_B: Tensor | None, key: Key, index_B: Tensor, probability: float, null_label: int
) -> Tensor | None:
    """Replace each label by the null label with the given probability (classifier-free guidance training)."""
    if label_B is None or probability == 0:
        return label_B
    return label_B.masked_fill(key.uniform("label_dropout", index_B) < probability, null_label)
