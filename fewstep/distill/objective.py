"""What an objective is: a module that holds the student and turns a batch into a loss per sample.

The objective, not the student, is what gets prepared for distributed training, so that a Jacobian-vector product inside
``forward`` goes through the wrapped module and its gradients are synchronised. An objective never steps, logs or
reads config. Teachers and targets it holds are plain velocity fields, outside its parameters.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from fewstep.condition import Condition, lose
from fewstep.data.dataset import Batch
from fewstep.distill.shards import local
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


# FSDP2 gathers the parameters again before the backward pass if it finds the tensors that this begins with. Until torch
# 2.12 it looks for them in what is registered alone.
_pytree.register_dataclass(LossOutput)


class Objective(nn.Module, ABC):
    """Abstract. ``student`` is the network being trained, ``derivative`` how its derivative along the path is taken by
    an objective that needs one. Other submodules are trained with it and not exported: what an objective learns for
    itself, such as a weight."""

    student: nn.Module
    derivative: Derivative | None = None

    @abstractmethod
    def forward(self, batch: Batch, key: Key) -> LossOutput: ...

    def targets(self) -> tuple[nn.Module, ...]:
        """Networks beside the student that are moved by hand and not trained, each of the student's own shape."""
        return ()

    def after_step(self) -> None:
        """Called after every optimiser step: the place of target networks."""

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters beyond the student's, by name."""
        return {name: value for name, value in self.named_parameters() if not name.startswith("student.")}

    def extra_state(self) -> dict[str, Tensor]:
        """Tensors beyond the student that a resumed run needs, sharded or not."""
        return {name: value.detach() for name, value in self.own_parameters().items()}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Take back what ``extra_state`` gave."""
        own = self.own_parameters()
        if own.keys() != state.keys():
            held = f"the extra state {sorted(own)}" if own else "no extra state"
            raise ValueError(f"{type(self).__name__} has {held}, got {sorted(state)}")
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)


class TargetedObjective(Objective, ABC):
    """An objective whose targets come from an exponential moving average of the student with ``target_decay`` per step,
    or from the student itself where that is zero."""

    def __init__(self, student: nn.Module, target_decay: float) -> None:
        super().__init__()
        self.student = student
        self.target_decay = target_decay
        # In a tuple, so that it is not a submodule: the target is neither trained nor prepared.
        self._target = (copy.deepcopy(student).requires_grad_(False),) if target_decay else ()

    @property
    def target_network(self) -> nn.Module:
        return self._target[0] if self._target else self.student

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TargetedObjective":
        """What ``.to()`` calls: the target goes where the student goes."""
        for target in self._target:
            target._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def targets(self) -> tuple[nn.Module, ...]:
        return self._target

    @torch.no_grad()
    def after_step(self) -> None:
        if self._target:
            target = [local(parameter) for parameter in self._target[0].parameters()]
            online = [local(parameter) for parameter in self.student.parameters()]
            torch._foreach_lerp_(target, online, 1 - self.target_decay)

    def extra_state(self) -> dict[str, Tensor]:
        targets = {f"target.{name}": value for net in self._target for name, value in net.state_dict().items()}
        return super().extra_state() | targets

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        target = {name: value for name, value in state.items() if self._target and name.startswith("target.")}
        super().load_extra_state({name: value for name, value in state.items() if name not in target})
        for net in self._target:
            net.load_state_dict({name.removeprefix("target."): value for name, value in target.items()})


def mean_square(difference: Tensor) -> Tensor:
    """Mean over all but the first dimension: ``[B, *D] -> [B]``."""
    return difference.flatten(1).square().mean(dim=1)


def root_mean_square(field: Tensor) -> Tensor:
    """Size per sample, ``[B, *D] -> [B]``, detached: a diagnostic."""
    return mean_square(field.detach()).sqrt()


def drop_labels(
    label_B: Condition | None, key: Key, index_B: Tensor, probability: float, null_label: int
) -> Condition | None:
    """Take each sample's condition away, a class becoming the null label, with the given probability (classifier-free
    guidance training)."""
    if label_B is None or probability == 0:
        return label_B
    return lose(label_B, key.uniform("label_dropout", index_B) < probability, null_label)
