"""Embeddings that were computed once and kept beside a data set: one row of several tensors for each sample."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.condition import Embeddings
from fewstep.data.rows import Rows, gathered, size_bytes


@dataclass(frozen=True)
class EmbeddingRows:
    """``values`` by name, each of N rows; ``none`` by name, each of one. Row ``i`` is row ``i`` modulo N, so that any
    number of samples can be generated from them."""

    values: Mapping[str, Rows]
    none: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    @property
    def bytes(self) -> int:
        return sum(size_bytes(rows) for rows in self.values.values())

    def take(self, index_B: Tensor, *, pin: bool = False) -> Embeddings:
        """The embeddings of rows ``index [B]``, on the device of the index."""
        first = next(iter(self.values.values()))
        rows_B = index_B.remainder(len(self)).to(first.device)
        values = {name: gathered(rows, rows_B, pin=pin) for name, rows in self.values.items()}
        lost_B = torch.zeros(len(rows_B), dtype=torch.bool, device=rows_B.device)
        found = Embeddings(values, self.none, lost_B)
        return found if pin else found.to(index_B.device)

    def to(self, device: torch.device) -> "EmbeddingRows":
        """The same on another device. Memory maps stay files on the CPU."""
        values = {name: rows.to(device) for name, rows in self.values.items()}
        return EmbeddingRows(values, {name: tensor.to(device) for name, tensor in self.none.items()})
