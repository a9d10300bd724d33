"""What a sample is generated from: the one type of condition that teachers, objectives, students and samplers pass on.

A ``Condition`` is either class ids ``[B]`` int64, among which one id stands for "no class", or ``Embeddings``. Both are
indexed by rows as tensors are. None, where a condition may be left out, means that nothing is known.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Embeddings:
    """Several tensors per sample by name, such as the states of a text encoder, their mask and a pooled vector.

    ``values`` are ``[B, ...]``; ``none`` has what stands for no condition at all under the same names, each ``[1,
    ...]``; samples in ``lost_B`` (bool) have lost theirs to it. ``ValueError`` if these do not fit together.
    """

    values: Mapping[str, Tensor]
    none: Mapping[str, Tensor]
    lost_B: Tensor

    def __post_init__(self) -> None:
        if not self.values or self.values.keys() != self.none.keys():
            raise ValueError(f"embeddings {sorted(self.values)} with {sorted(self.none)} for no condition")
        for name, value in self.values.items():
            if len(value) != len(self.lost_B) or self.none[name].shape != (1, *value.shape[1:]):
                shapes = f"{list(value.shape)} and {list(self.none[name].shape)}"
                raise ValueError(f"{name}: shapes {shapes} for {len(self.lost_B)} samples and for no condition")

    def __len__(self) -> int:
        return len(self.lost_B)

    def __getitem__(self, rows: Tensor | slice) -> "Embeddings":
        return replace(
            self, values={name: value[rows] for name, value in self.values.items()}, lost_B=self.lost_B[rows]
        )

    def told(self) -> dict[str, Tensor]:
        """What a network is given, ``[B, ...]`` by name: the condition, or what stands for none."""

        def chosen(name: str, value: Tensor) -> Tensor:
            lost = self.lost_B.reshape(-1, *(1,) * (value.ndim - 1))
            return torch.where(lost, self.none[name].to(value), value)

        return {name: chosen(name, value) for name, value in self.values.items()}

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "Embeddings":
        def moved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in tensors.items()}

        return Embeddings(moved(self.values), moved(self.none), self.lost_B.to(device, non_blocking=non_blocking))


Condition = Tensor | Embeddings


def lose(condition: Condition, mask_B: Tensor, null_label: int) -> Condition:
    """The condition without that of the samples in ``mask [B]`` (bool)."""
    if isinstance(condition, Embeddings):
        return replace(condition, lost_B=condition.lost_B | mask_B)
    return condition.masked_fill(mask_B, null_label)


def lost(condition: Condition, null_label: int) -> Tensor:
    """Which samples have no condition, ``[B]`` bool."""
    return condition.lost_B if isinstance(condition, Embeddings) else condition == null_label


def without(condition: Condition, null_label: int) -> Condition:
    """As many samples, none of which has a condition."""
    if isinstance(condition, Embeddings):
        return replace(condition, lost_B=torch.ones_like(condition.lost_B))
    return torch.full_like(condition, null_label)


def joined(first: Condition, second: Condition) -> Condition:
    """One batch after the other. ``ValueError`` for conditions of two kinds."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.cat((first, second))
    if not isinstance(first, Embeddings) or not isinstance(second, Embeddings):
        raise ValueError("class ids and embeddings do not go into one batch")
    values = {name: torch.cat((value, second.values[name])) for name, value in first.values.items()}
    return Embeddings(values, first.none, torch.cat((first.lost_B, second.lost_B)))
