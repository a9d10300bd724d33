"""A data set in memory, and the one source of training batches.

Batches are a function of (seed, step): epoch ``k`` runs through a permutation keyed by (seed, k), and the global batch
of step ``s`` is the ``s``-th slice of that endless sequence. Any rank of any number of processes, and any resumed run,
finds the same samples in the same places.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.keys import Key


@dataclass(frozen=True)
class Dataset:
    """All samples ``x [N, *D]`` float32 (images in [-1, 1]) with labels ``[N]`` int64 or None."""

    name: str
    x: Tensor
    label: Tensor | None
    num_classes: int
    kind: Literal["image", "points"]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])


@dataclass(frozen=True)
class Batch:
    """Samples ``x [B, *D]``, labels ``[B]`` or None, each sample's place ``index [B]`` in the global batch and its row
    ``row [B]`` in the data set (None for a batch that comes from none)."""

    x: Tensor
    label: Tensor | None
    index: Tensor
    row: Tensor | None = None

    def split(self, parts: int) -> "list[Batch]":
        """Consecutive microbatches of equal size. ``ValueError`` where they cannot be equal."""
        if parts == 1:
            return [self]
        if len(self.x) % parts:
            raise ValueError(f"{len(self.x)} samples do not divide into {parts} equal parts")
        size = len(self.x) // parts
        return [
            Batch(
                self.x[slice(k, k + size)],
                None if self.label is None else self.label[slice(k, k + size)],
                self.index[slice(k, k + size)],
                None if self.row is None else self.row[slice(k, k + size)],
            )
            for k in range(0, len(self.x), size)
        ]


class BatchSource:
    """Batches of a data set resident on the device, for one rank of several.

    ``batch_size`` is the global batch; rank ``k`` of ``world`` gets its ``k``-th contiguous share.
    """

    def __init__(
        self,
        data: Dataset,
        batch_size: int,
        seed: int,
        *,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size % world:
            raise ValueError(f"a batch of {batch_size} does not divide among {world} processes")
        self.batch_size = batch_size
        self.seed = seed
        self._x = data.x.to(device)
        self._label = None if data.label is None else data.label.to(device)
        share = batch_size // world
        self._first, self._share = rank * share, share
        self._index = torch.arange(rank * share, (rank + 1) * share, device=device)
        # Small data sets begin an epoch every few steps: their orders are drawn a number at a time.
        self._at_once = max(1, 2**14 // len(data.x))
        self._from = -1
        self._orders = torch.empty(0, dtype=torch.int64)

    def batch(self, step: int) -> Batch:
        """This rank's share of the batch of optimiser step ``step`` (counted from 0)."""
        place = step * self.batch_size + self._first
        end = place + self._share
        pieces = []
        while place < end:  # from one epoch to the next
            epoch, offset = divmod(place, len(self._x))
            piece = self._permutation(epoch)[offset : offset + end - place]
            pieces.append(piece)
            place += len(piece)
        rows = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        return Batch(
            x=self._x[rows],
            label=None if self._label is None else self._label[rows],
            index=self._index,
            row=rows,
        )

    def _permutation(self, epoch: int) -> Tensor:
        first = epoch - epoch % self._at_once
        if first != self._from:
            key = Key(self.seed, first)
            self._orders = key.permutations("shuffle", len(self._x), self._at_once, self._x.device)
            self._from = first
        return self._orders[epoch - first]
