"""Rows that an evaluation has finished, kept for one that goes on or adds to them.

A folder of ``KEY.safetensors``: a row as JSON in the metadata, and as tensors what further rows need of it, the
influence of each sample on each metric. A key is the digest of all that the numbers depend on. Beside them, until all
rows are there, lie the samples that students are compared with.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.checkpoint import write_tensors
from fewstep.evaluation.results import Row, row_from_json, row_json

SAMPLES_BYTES = 2**30
"""Samples of the teacher are kept up to this size per process, and else drawn again."""


@dataclass(frozen=True)
class Finished:
    """A row, and for each of its metrics the influence ``[n]`` of each sample (or reference sample) on it."""

    row: Row
    influences: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Bank:
    """Finished rows in a folder; without one nothing is kept. With ``fresh`` nothing that lies there is read.

    ``where`` is what the rows were measured in, versions and machine: those of another are not found.
    """

    folder: Path | None = None
    fresh: bool = False
    where: Mapping[str, Any] = field(default_factory=dict)

    def find(self, key: str) -> Finished | None:
        """A row that was kept under this key. What is damaged was not kept."""
        content = self._read(f"{key}.safetensors")
        if content is None:
            return None
        metadata, tensors = content
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            return Finished(row_from_json(json.loads(metadata["row"])), tensors)
        return None

    def keep(self, key: str, finished: Finished) -> None:
        if self.folder is not None:
            metadata = {"row": json.dumps(row_json(finished.row))}
            write_tensors(self.folder / f"{key}.safetensors", dict(finished.influences), metadata)

    def find_samples(self, key: str, rank: int, world: int) -> Tensor | None:
        content = self._read(_samples(key, rank, world))
        return None if content is None else content[1].get("x")

    def keep_samples(self, key: str, rank: int, world: int, x: Tensor) -> None:
        if self.folder is not None and x.nbytes <= SAMPLES_BYTES:
            write_tensors(self.folder / _samples(key, rank, world), {"x": x})

    def forget_samples(self) -> None:
        """All rows are there: what was needed to compare with is not needed any more."""
        if self.folder is not None:
            for path in self.folder.glob("*-samples-*.safetensors"):
                path.unlink(missing_ok=True)

    def _read(self, name: str) -> tuple[dict[str, str], dict[str, Tensor]] | None:
        if self.folder is None or self.fresh or not (self.folder / name).is_file():
            return None
        try:
            with safe_open(self.folder / name, framework="pt") as file:
                names = list(file.keys())
                return dict(file.metadata() or {}), {key: file.get_tensor(key) for key in names}
        except (SafetensorError, OSError):
            return None


def _samples(key: str, rank: int, world: int) -> str:
    return f"{key}-samples-{rank}-of-{world}.safetensors"
