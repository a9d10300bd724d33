"""Pairs of noise and where a teacher's flow takes it: on disk, with their provenance.

A folder holds ``shard-00000.safetensors`` and so on, each with ``noise`` and ``x`` float32 ``[n, *D]`` and ``labels``
int64 where there are classes; ``request.json`` says what was asked for, and ``meta.json``, which comes last, the same
with the digest of every shard.

Row ``i`` is a function of the request and of ``i``: its noise is keyed by (seed, round, i), its label is ``i mod
classes``. The purpose of that key is its own, so that no pair begins where an evaluation of the same seed does.
"""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.block import SolverName
from fewstep.data.dataset import Dataset
from fewstep.data.paths import existing
from fewstep.data.rows import Rows, joined
from fewstep.data.shards import META, damage, map_tensors, verify_shards
from fewstep.errors import UsageError
from fewstep.files import check_folder, digest, disk_errors, is_temporary, make_folder, read_json, write_json
from fewstep.keys import Key
from fewstep.sources import SOURCES

FORMAT = "fewstep-pairs"
SCHEMA = 1
REQUEST = "request.json"
PURPOSE = "pairs"
LOOKED_AT = 64
COUNTED = 4096
"""Rows whose noise is drawn again, and rows whose mean and variance are looked at."""


@dataclass(frozen=True)
class PairsRequest:
    """All that determines pairs: the teacher, guided by ``guidance`` at times in ``window``, and its solver; the noise;
    how many, cut into shards of how many; and what the samples are."""

    teacher: str
    teacher_digest: str
    solver: SolverName
    steps: int
    guidance: float
    window: tuple[float, float]
    source: str
    seed: int
    round: int
    count: int
    shard_size: int
    data: str
    shape: tuple[int, ...]
    num_classes: int
    kind: Literal["image", "points", "latents"]

    def noise(self, index_B: Tensor) -> Tensor:
        """The noise of rows ``index [B]``, ``[B, *shape]`` float32."""
        return SOURCES[self.source](Key(self.seed, self.round), PURPOSE, index_B, self.shape)

    def label(self, index_B: Tensor) -> Tensor | None:
        """Their labels ``[B]``, balanced as those of an evaluation."""
        return index_B % self.num_classes if self.num_classes else None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "window": list(self.window), "shape": list(self.shape)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "PairsRequest":
        """What ``to_json`` gave; anything else is a ``LookupError``, ``TypeError`` or ``ValueError``."""
        values = {field.name: document[field.name] for field in fields(cls)}
        low, high = values["window"]
        request = cls(**{**values, "window": (low, high), "shape": tuple(map(int, values["shape"]))})
        if request.source not in SOURCES or min(request.count, request.shard_size) < 1:
            raise ValueError(f"source {request.source!r}, {request.count} pairs in shards of {request.shard_size}")
        return request


@dataclass(frozen=True)
class PairsShard:
    """A file with the ``count`` rows from ``first`` on."""

    file: str
    first: int
    count: int


def shards_of(request: PairsRequest) -> list[PairsShard]:
    starts = range(0, request.count, request.shard_size)
    return [
        PairsShard(f"shard-{number:05d}.safetensors", first, min(request.shard_size, request.count - first))
        for number, first in enumerate(starts)
    ]


# Writing -------------------------------------------------------------------------------------------------------------


def check_pairs_folder(folder: Path, request: PairsRequest, *, resume: bool, overwrite: bool) -> None:
    """Before any work: a ``UsageError`` unless pairs may be made there. Changes nothing."""
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    check_folder(folder)
    known = any((folder / name).is_file() for name in (REQUEST, META))
    if not folder.exists() or all(map(is_temporary, folder.iterdir())):
        if resume:
            raise UsageError(f"nothing to resume: no pairs in {folder}")
    elif not known:
        raise UsageError(f"{folder} is no folder of pairs (no {REQUEST}): give another --out")
    elif resume:
        _same_request(folder, request)
    elif not overwrite:
        raise UsageError(f"{folder} exists: --resume goes on with its pairs, --overwrite makes them again")


def _same_request(folder: Path, request: PairsRequest) -> None:
    before, now = read_json(folder / REQUEST), request.to_json()
    changes = [
        f"{name} was {before.get(name)} and is {value}" for name, value in now.items() if before.get(name) != value
    ]
    if changes:
        raise UsageError(f"the pairs in {folder} are others: {'; '.join(changes[:3])}: --overwrite makes them again")


def begin_pairs(folder: Path, request: PairsRequest, *, resume: bool) -> None:
    """Make the folder ready, after ``check_pairs_folder``: without ``resume`` what lies there goes."""
    with disk_errors(folder):
        make_folder(folder)
        for child in folder.iterdir():
            if not resume or is_temporary(child):
                shutil.rmtree(child) if child.is_dir() else child.unlink()
    write_json(folder / REQUEST, request.to_json())


def is_whole(folder: Path, shard: PairsShard, request: PairsRequest) -> bool:
    """Whether an earlier process finished a shard of this request: its shapes, and the noise of its ends."""
    try:
        tensors = _tensors(folder / shard.file, shard.count, request)
    except UsageError:
        return False
    ends = torch.tensor([0, shard.count - 1])
    return _close(tensors["noise"][ends], request.noise(shard.first + ends))


def finish_pairs(folder: Path, request: PairsRequest) -> dict[str, Any]:
    """Write ``meta.json`` when all shards are there, and return it."""
    shards = [
        {"file": shard.file, "count": shard.count, "digest": digest((folder / shard.file).read_bytes())}
        for shard in shards_of(request)
    ]
    whole = digest("".join(str(shard["digest"]) for shard in shards).encode())
    meta = {"format": FORMAT, "schema": SCHEMA, **request.to_json(), "digest": whole, "shards": shards}
    write_json(folder / META, meta)
    return meta


def is_finished(folder: Path) -> bool:
    return (folder / META).is_file()


# Reading -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Pairs as a data set, whose rows come with their noise, and what they were asked to be."""

    folder: Path
    request: PairsRequest
    data: Dataset


def read_pairs(folder: Path) -> Pairs:
    """Pairs, mapped into memory. What is missing, cut short or altered is a ``UsageError``: every digest is checked."""
    file = existing(folder, "folder of pairs") / META
    if not file.is_file():
        begun = (folder / REQUEST).is_file()
        raise UsageError(
            f"the pairs in {folder} are not finished: go on with `fewstep data pairs ... --resume`"
            if begun
            else f"{folder} holds no pairs (`fewstep data pairs` makes them)"
        )
    meta = read_json(file)
    if meta.get("format") != FORMAT or meta.get("schema") != SCHEMA:
        raise UsageError(f"{file} is not of pairs that this version reads (`fewstep data pairs` makes them)")
    with damage(file):
        request = PairsRequest.from_json(meta)
        listed = [(str(shard["file"]), int(shard["count"])) for shard in meta["shards"]]
    if listed != [(shard.file, shard.count) for shard in shards_of(request)]:
        raise UsageError(f"{file} is damaged: its shards do not hold its {request.count} pairs")
    parts = [_tensors(folder / shard, count, request) for shard, count in listed]
    verify_shards(folder, meta)
    label = torch.cat([part["labels"] for part in parts]) if request.num_classes else None
    data = Dataset(
        request.data,
        joined([part["x"] for part in parts]),
        label,
        request.num_classes,
        request.kind,
        noise=joined([part["noise"] for part in parts]),
        facts={"pairs": str(folder), "digest": meta.get("digest")},
    )
    return Pairs(folder, request, data)


def _tensors(file: Path, count: int, request: PairsRequest) -> dict[str, Tensor]:
    keys = ["noise", "x", *(["labels"] if request.num_classes else [])]
    tensors = map_tensors(file, keys)
    for key, tensor in tensors.items():
        expected = ((count,), torch.int64) if key == "labels" else ((count, *request.shape), torch.float32)
        if (tuple(tensor.shape), tensor.dtype) != expected:
            raise UsageError(f"{file} is damaged: its {key} are {tensor.dtype} {list(tensor.shape)}")
    return tensors


def spread(count: int, number: int) -> Tensor:
    """Up to ``number`` of ``count`` rows, evenly spread, the first and the last among them."""
    return torch.linspace(0, count - 1, min(number, count), dtype=torch.float64).round().long().unique()


def check_noise(pairs: Pairs) -> None:
    """A ``UsageError`` unless the noise is that of the recorded seed, has its mean and variance, is not in the
    place of the solutions, and the labels are balanced."""
    request, data, where = pairs.request, pairs.data, pairs.folder
    assert data.noise is not None
    rows = spread(request.count, LOOKED_AT)
    keyed = request.noise(rows)
    in_place, swapped = (_close(values[rows], keyed) for values in (data.noise, data.x))
    (e_mean, e_variance, e_like), (_, _, x_like) = (_statistics(values, request) for values in (data.noise, data.x))
    if swapped and not in_place:
        raise UsageError(f"{where}: noise and solutions are swapped, x being the noise of seed {request.seed}")
    if not e_like:
        hint = "; its x has those: are noise and solutions swapped?" if x_like else ""
        raise UsageError(f"{where}: its noise has mean {e_mean:.3g} and variance {e_variance:.3g}, not 0 and 1{hint}")
    if not in_place:
        raise UsageError(f"{where}: its noise is not what seed {request.seed} draws: these are pairs of something else")
    label = request.label(torch.arange(request.count))
    if label is not None and data.label is not None and not torch.equal(label, data.label):
        raise UsageError(f"{where}: its labels are not those that the noise was solved with (row number mod classes)")


def _statistics(values: Rows, request: PairsRequest) -> tuple[float, float, bool]:
    """Mean and variance over rows and coordinates, and whether six deviations of theirs reach 0 and 1."""
    some = values[spread(request.count, COUNTED)].double()
    mean, variance = float(some.mean()), float(some.square().mean())
    deviation = some.numel() ** -0.5
    kurtosis = 6.0  # that of the heaviest source, Laplace's
    return mean, variance, abs(mean) < 6 * deviation and abs(variance - 1) < 6 * deviation * (kurtosis - 1) ** 0.5


def _close(one: Tensor, other: Tensor) -> bool:
    """Equal but for the last digits, which another device may round otherwise."""
    return torch.allclose(one.float(), other.float(), rtol=1e-5, atol=1e-5)


def row_pieces(first: int, count: int, size: int) -> Iterator[Tensor]:
    """The row numbers of a shard, ``size`` at a time."""
    yield from torch.arange(first, first + count).split(size)
