"""Making pairs with a teacher, and finding out whether some were made with this one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from fewstep.checkpoint import Tensors, write_tensors
from fewstep.data.dataset import Dataset
from fewstep.data.embeddings import EmbeddingRows
from fewstep.data.pairs import (
    REQUEST,
    Pairs,
    PairsRequest,
    begin_pairs,
    check_noise,
    check_pairs_folder,
    finish_pairs,
    is_finished,
    is_whole,
    read_pairs,
    row_pieces,
    shards_of,
    spread,
)
from fewstep.distill.reflow.config import PairsSettings
from fewstep.errors import FewstepError, UsageError
from fewstep.files import digest
from fewstep.flow import VelocityField, uniform_grid
from fewstep.precision import products
from fewstep.sampling import sample_ode
from fewstep.teachers.guided import GuidedField
from fewstep.teachers.load import Teacher
from fewstep.teachers.network import NetworkField, freeze

TILE = 64
"""Networks are called on multiples of this many rows: below, and at the edge of some other sizes, matrix products take
kernels that round otherwise (measured on CPUs: sizes 1 to 3, 7, 31 and 33 differ from 64, and its multiples do not)."""

SOLVED_AGAIN = 8
NEAR = 1e-2
"""Pairs that are solved again when they are loaded, and how far they may lie from what is found, relative to how far
the flow has taken them: room for another device and for a teacher in bfloat16, none for another teacher."""


@dataclass(frozen=True)
class Share:
    """One of several processes that make pairs together; ``wait`` returns when all of them have called it."""

    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = lambda: None


def request_of(
    settings: PairsSettings,
    data: Dataset,
    *,
    teacher: str,
    teacher_digest: str,
    source: str,
    seed: int,
    round: int = 0,
    guidance: float = 1.0,
    window: tuple[float, float] = (0.0, 1.0),
) -> PairsRequest:
    """Pairs as a run or the command line asks for them."""
    return PairsRequest(
        teacher=teacher,
        teacher_digest=teacher_digest,
        solver=settings.solver,
        steps=settings.steps,
        guidance=guidance,
        window=window,
        source=source,
        seed=seed,
        round=round,
        count=settings.count,
        shard_size=settings.shard_size,
        data=data.name,
        shape=data.shape,
        num_classes=data.num_classes,
        kind=data.kind,
    )


def guided_by(teacher: Teacher, guidance: float, window: tuple[float, float]) -> VelocityField:
    """A teacher's field at some guidance; ``UsageError`` if it has nothing to be guided by."""
    if (guidance, window) == (teacher.guidance, (0.0, 1.0)):
        return teacher.field
    if teacher.contrast is None:
        raise UsageError(f"{teacher.name} has no classes to be guided by, or has its guidance built in: leave it at 1")
    return GuidedField(teacher.contrast, guidance, *window)


# Making --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def solved(
    field: VelocityField, request: PairsRequest, index_B: Tensor, embeddings: EmbeddingRows | None = None
) -> Tensors:
    """Rows ``index [B]`` as they are stored: ``noise``, ``x`` and, where there are classes, ``labels``. ``embeddings``
    are the condition of each row instead, and are not stored again.

    In true float32, for the files to be the same whoever asks for them. Every row by itself: further rows fill the last
    tile and are dropped. ``FewstepError`` if a row is not finite.
    """
    extra = torch.arange(-len(index_B) % TILE, device=index_B.device) + index_B[-1] + 1
    rows = torch.cat((index_B, extra))
    e, label = request.noise(rows), request.label(rows)
    with torch.autocast(e.device.type, enabled=False), products("fp32"):
        condition = label if embeddings is None else embeddings.take(rows)
        x = sample_ode(field, e, uniform_grid(request.steps), condition, request.solver).x
    kept = slice(0, len(index_B))
    wrong = index_B[~x[kept].flatten(1).isfinite().all(dim=1)]
    if len(wrong):
        raise FewstepError(f"the teacher's solution of pair {int(wrong[0])} is not finite")
    tensors = {"noise": e[kept], "x": x[kept].float()}
    return tensors if label is None else {**tensors, "labels": label[kept]}


def make_pairs(
    folder: Path,
    request: PairsRequest,
    field: VelocityField,
    *,
    batch_size: int,
    device: torch.device,
    resume: bool = False,
    overwrite: bool = False,
    share: Share | None = None,
    embeddings: EmbeddingRows | None = None,
) -> Iterator[int]:
    """Make pairs in a folder, yielding how many of this process's are done.

    Every process writes shards of its own, whole ones under their names; with ``resume`` those that are whole stay. The
    same request gives the same bytes for any number of processes and after any kill. On CPUs ``batch_size`` changes
    nothing either; other devices may round batches of another size otherwise.
    """
    share = share or Share()
    check_pairs_folder(folder, request, resume=resume, overwrite=overwrite)
    share.wait()  # all have looked
    if share.rank == 0:
        begin_pairs(folder, request, resume=resume)
    share.wait()
    done = 0
    for shard in shards_of(request)[share.rank :: share.world]:
        if is_whole(folder, shard, request):
            done += shard.count
            yield done
            continue
        parts = []
        for index in row_pieces(shard.first, shard.count, batch_size):
            part = solved(field, request, index.to(device), embeddings)
            parts.append({name: value.cpu() for name, value in part.items()})
            done += len(index)
            yield done
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        write_tensors(folder / shard.file, whole)
    share.wait()  # all shards are there
    if share.rank == 0:
        finish_pairs(folder, request)
    share.wait()


# Loading -------------------------------------------------------------------------------------------------------------


def load_pairs(folder: Path, teacher: Teacher, data: Dataset) -> Dataset:
    """Pairs that were made with this teacher on data like these; anything else is a ``UsageError`` that says what."""
    pairs = read_pairs(folder)
    request = pairs.request
    if request.teacher_digest != teacher.digest:
        raise UsageError(
            f"the pairs in {folder} are of another teacher, {request.teacher} ({request.teacher_digest[:12]}): this "
            f"run's is {teacher.name} ({teacher.digest[:12]})"
        )
    if request.guidance != teacher.guidance:
        raise UsageError(
            f"the pairs in {folder} were solved at guidance {request.guidance:g}: set teacher.guidance to that, it is "
            f"{teacher.guidance:g}"
        )
    if (request.data, request.shape, request.num_classes) != (data.name, data.shape, data.num_classes):
        raise UsageError(
            f"the pairs in {folder} are of {request.data} (shape {list(request.shape)}, {request.num_classes} "
            f"classes); the data here are {data.name} (shape {list(data.shape)}, {data.num_classes} classes)"
        )
    if request.source != teacher.noise.source:
        raise UsageError(f"the pairs in {folder} start from {request.source} noise, the teacher from other")
    check_noise(pairs)
    field = guided_by(teacher, request.guidance, request.window)
    check_solutions(pairs, field, teacher.device, data.embeddings)
    return replace(pairs.data, embeddings=data.embeddings)


def check_solutions(
    pairs: Pairs, field: VelocityField, device: torch.device, embeddings: EmbeddingRows | None = None
) -> None:
    """Solve a few pairs again: a ``UsageError`` if the stored solutions are others."""
    rows = spread(pairs.request.count, SOLVED_AGAIN)
    found = torch.cat([solved(field, pairs.request, row[None].to(device), embeddings)["x"].cpu() for row in rows])
    assert pairs.data.noise is not None
    stored, way = pairs.data.x[rows], found - pairs.data.noise[rows]
    off = (stored - found).flatten(1).norm(dim=1) / way.flatten(1).norm(dim=1).clamp_min(1e-12)
    if not bool((off < NEAR).all()):
        worst = int(off.nan_to_num(torch.inf).argmax())
        raise UsageError(
            f"{pairs.folder}: pair {int(rows[worst])} does not end where {pairs.request.steps} {pairs.request.solver} "
            f"steps of {pairs.request.teacher} take it (off by {float(off[worst]):.2g} of the way)"
        )


# The pairs of a stage ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StagePairs:
    """What a stage of a run trains on: ``given`` pairs, or those of ``request``, which the run makes in ``folder``
    under its own. ``field`` is whose; None means the student of the stage before. ``embeddings`` are the condition of
    each pair, where it is no class."""

    folder: str
    given: Dataset | None
    request: PairsRequest
    batch_size: int
    field: VelocityField | None
    embeddings: EmbeddingRows | None = None

    def make(self, run: Path, previous: nn.Module | None, device: torch.device, share: Share) -> Iterator[int]:
        """Make them, or what is missing of them, yielding how many of this process's are done."""
        if self.given is not None:
            return
        field, request = self._made_with(previous)
        folder = run / "pairs" / self.folder
        begun = (folder / REQUEST).is_file()
        share.wait()  # all have looked
        if not is_finished(folder):
            yield from make_pairs(
                folder,
                request,
                field,
                batch_size=self.batch_size,
                device=device,
                resume=begun,
                share=share,
                embeddings=self.embeddings,
            )

    def load(self, run: Path, previous: nn.Module | None, device: torch.device) -> Dataset:
        """The finished pairs. Others than this stage asks for are a ``UsageError``."""
        if self.given is not None:
            return self.given
        field, request = self._made_with(previous)
        pairs = read_pairs(run / "pairs" / self.folder)
        if pairs.request != request:
            raise UsageError(f"the pairs in {pairs.folder} are not those of this run: start again with --overwrite")
        check_solutions(pairs, field, device, self.embeddings)
        return replace(pairs.data, embeddings=self.embeddings)

    def _made_with(self, previous: nn.Module | None) -> tuple[VelocityField, PairsRequest]:
        if self.field is not None:
            return self.field, self.request
        assert previous is not None
        identity = digest(save({name: value.cpu().contiguous() for name, value in previous.state_dict().items()}))
        return NetworkField(freeze(previous)), replace(self.request, teacher_digest=identity)
