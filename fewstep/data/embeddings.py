"""Embeddings that were computed once and kept beside a data set: one row of several tensors for each sample.

A safetensors file, or a folder of them in the order of their names, has tensors ``NAME [N, ...]``, whose rows belong to
the samples in their order, and ``none.NAME [1, ...]``, what stands for no condition (an empty text, say). The names are
those that the network which reads them wants, such as ``encoder_hidden_states``. They stay in the memory map of their
files until they are drawn.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.condition import Embeddings
from fewstep.data.rows import Rows, gathered, joined, size_bytes
from fewstep.data.shards import map_tensors, tensor_names
from fewstep.errors import UsageError

NONE = "none."
"""What the name of a tensor that stands for no condition begins with."""


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


def load_embeddings(path: Path, count: int | None = None, *, first: bool = False) -> EmbeddingRows:
    """The embeddings at ``path``, for ``count`` samples unless that is None, or for the ``first`` of more. What does
    not fit is a ``UsageError``."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if not files:
        raise UsageError(f"data.embeddings: {path} is no safetensors file, and no folder of them")
    parts: dict[str, list[Tensor]] = {}
    none: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in map_tensors(file, sorted(tensor_names(file))).items():
            if name.startswith(NONE):
                none[name.removeprefix(NONE)] = tensor.clone()
            else:
                parts.setdefault(name, []).append(tensor)
    if not parts:
        raise UsageError(f"data.embeddings: {path} holds no tensors of samples")
    lengths = {name: sum(map(len, tensors)) for name, tensors in parts.items()}
    wanted = count if count is not None else next(iter(lengths.values()))
    for name, tensors in parts.items():
        if lengths[name] < wanted or (lengths[name] > wanted and not first):
            raise UsageError(f"data.embeddings: {path} has {lengths[name]} rows of {name} for {wanted} samples")
        if name not in none or none[name].shape != (1, *tensors[0].shape[1:]):
            raise UsageError(
                f"data.embeddings: {path} has to say what stands for no condition: a tensor {NONE}{name} of shape "
                f"{[1, *tensors[0].shape[1:]]}"
            )
    surplus = sorted(none.keys() - parts.keys())
    if surplus:
        raise UsageError(f"data.embeddings: {path} has {NONE}{surplus[0]} and no {surplus[0]}")
    return EmbeddingRows({name: joined(tensors, wanted) for name, tensors in parts.items()}, none)
