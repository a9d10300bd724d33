"""Samples as a data set stores them: a tensor, or what is read like one. Shapes: N rows of shape D, B of them drawn."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

_BLOCK = 1024  # rows on their way to a device


class OnDisk(ABC):
    """Rows ``[N, *D]`` that stay on disk and are read when they are drawn."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.device = torch.device("cpu")

    @abstractmethod
    def take(self, rows_B: Tensor, out: Tensor) -> Tensor:
        """Read rows ``[B, *D]`` by their numbers into ``out``."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows_B: Tensor) -> Tensor:
        return self.take(rows_B, torch.empty((len(rows_B), *self.shape[1:]), dtype=self.dtype))

    def to(self, device: torch.device) -> "Tensor | OnDisk":
        """On the CPU they stay where they are; elsewhere they become a tensor."""
        if device.type == "cpu":
            return self
        whole = torch.empty(self.shape, dtype=self.dtype, device=device)
        for rows in torch.arange(len(self)).split(_BLOCK):
            whole[rows[0] : rows[-1] + 1] = self[rows].to(device)
        return whole


class Chunks(OnDisk):
    """Rows that lie in several tensors, which are memory maps of files."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._parts = tuple(parts)
        self._ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        super().__init__((int(self._ends[-1]), *parts[0].shape[1:]), parts[0].dtype)

    def take(self, rows_B: Tensor, out: Tensor) -> Tensor:
        part_B = torch.searchsorted(self._ends, rows_B, right=True)
        for number in part_B.unique().tolist():
            here = (part_B == number).nonzero().squeeze(1)
            first = int(self._ends[number - 1]) if number else 0
            out[here] = self._parts[number][rows_B[here] - first]
        return out


Rows = Tensor | OnDisk


def joined(parts: Sequence[Tensor], limit: int | None = None) -> Rows:
    """The first ``limit`` rows of several tensors as a whole."""
    kept, room = [], sum(map(len, parts)) if limit is None else limit
    for part in parts:
        if room > 0:
            kept.append(part[:room])
            room -= len(part)
    return kept[0] if len(kept) == 1 else Chunks(kept)


def size_bytes(rows: Rows) -> int:
    return rows.shape.numel() * rows.dtype.itemsize


def gathered(rows: Rows, rows_B: Tensor, *, pin: bool = False) -> Tensor:
    """Rows ``[B, *D]`` by their numbers, in page-locked memory if they are to be copied to a GPU (``pin``)."""
    if not pin:
        return rows[rows_B]
    out = torch.empty((len(rows_B), *rows.shape[1:]), dtype=rows.dtype, pin_memory=True)
    if isinstance(rows, OnDisk):
        return rows.take(rows_B, out)
    return torch.index_select(rows, 0, rows_B, out=out)
