"""What a training step of each objective costs beside one of flow matching: same network, same batches, same optimiser.

Objectives are made as training makes them, from configs: a kind that is new in the config tree is measured without
further ado. Shapes: B batch, D dimensions of a sample.
"""

import functools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from fewstep.bench.measure import (
    Precision,
    Reported,
    Spread,
    Time,
    device_name,
    in_turns,
    ledger_row,
    ratios,
    spread,
    torch_threads,
    unreported,
    where,
)
from fewstep.bench.memory import peak_bytes
from fewstep.bench.textbook import step_difference
from fewstep.bench.train import bare_training
from fewstep.bench.variants import REFERENCE, TEXTBOOK, Variant, chosen_variants, variants
from fewstep.bench.workshop import Workshop
from fewstep.config import RunConfig
from fewstep.data.dataset import Batch
from fewstep.distill.compiled import compile_objective
from fewstep.errors import UsageError, nearest
from fewstep.networks.build import parameter_count
from fewstep.networks.config import SIZES
from fewstep.precision import products

WARM_UP_STEPS = 2
CHECKED_ROWS = 16
REFUSED: dict[Precision, tuple[str, ...]] = {
    "fp32": (),
    "tf32": ("one_sided", "finite_difference"),
    "bf16": ("one_sided",),
}
"""Derivatives that a config does not allow in a precision."""


@dataclass(frozen=True)
class ObjectiveCost:
    """One objective. Times are milliseconds of a step: forward and backward pass of the objective, and AdamW.

    Ratios are to flow matching's step of the same round, by the clock and by processor time, which other work on the
    machine hardly moves; ``textbook_ratio`` and its like are to the textbook's MeanFlow step (None: not measured).
    ``memory_mb`` is the most that a step holds beyond what is there between steps (weights, the
    optimiser's state, teachers, targets): as torch's allocator counts, without what libraries take for themselves.
    """

    name: str
    kind: str
    step_ms: Spread
    cpu_ms: Spread
    ratio: Spread
    cpu_ratio: Spread
    textbook_ratio: Spread | None
    textbook_cpu_ratio: Spread | None
    memory_mb: float
    memory_ratio: float


@dataclass(frozen=True)
class ObjectivesBench:
    """Objectives on one network and one batch size, in order of their names but for flow matching, which is first.

    ``textbook_error`` is how far loss and gradient of the textbook's MeanFlow step lie from ours, relative and in
    float64: None where it was not asked for.
    """

    size: str
    params: int
    shape: tuple[int, ...]
    classes: int
    batch_size: int
    repeats: int
    device: str
    threads: int
    precision: Precision
    textbook_error: float | None
    objectives: tuple[ObjectiveCost, ...]

    def to_json(self) -> dict[str, Any]:
        """With where and when it was measured: a row of the ledger."""
        return ledger_row("objectives", self)

    def ratio(self, cost: ObjectiveCost) -> float:
        """What a gate compares: processor time, or time by the clock where the processor only waits for a GPU."""
        return (cost.cpu_ratio if self.device == "cpu" else cost.ratio).median

    def textbook(self, name: str) -> Spread | None:
        """The same of the named objective, to the textbook's step; None where either was not measured."""
        for cost in self.objectives:
            if cost.name == name:
                return cost.textbook_cpu_ratio if self.device == "cpu" else cost.textbook_ratio
        return None


def bench_objectives(
    names: Sequence[str],
    size: str,
    shape: tuple[int, ...],
    *,
    classes: int,
    batch_size: int,
    repeats: int,
    device: torch.device,
    threads: int = 0,
    precision: Precision = "fp32",
    compiled: bool = False,
    report: Reported = unreported,
) -> ObjectivesBench:
    """Measure a training step of the named objectives, or of all.

    In every round each takes one step on the same batch, and every round starts with another one, so that whatever else
    the machine does meets all of them. The teacher is one of the same size that has taken one step: what it says does
    not matter here. With ``compiled`` every objective but the textbook's has a second line, as ``train.compile`` trains
    it. Lines that refuse the precision are left out. ``FewstepError`` if the textbook's MeanFlow step is not ours, or a
    compiled one not the eager one.
    """
    chosen = [each for each in chosen_variants(names) if each.settings.get("jvp") not in REFUSED[precision]]
    if size not in SIZES:
        raise UsageError(f"no network of size '{size}'; {nearest(size, SIZES)}")
    if len(shape) != 3:
        raise UsageError(f"objectives are measured on images: a shape of C,H,W, not {list(shape)}")
    with torch_threads(threads):
        with tempfile.TemporaryDirectory() as folder:
            workshop = Workshop(Path(folder), size, shape, classes, batch_size, device, precision)
            error = _textbook_error(workshop) if any(each.name == TEXTBOOK for each in chosen) else None
            source, pairs = (workshop.source(pairs=pairs) for pairs in (False, True))
            lines = [replace(each, compiled=two) for each in chosen for two in each.ways(compiled)]
            objectives, steps = {}, {}
            for line in lines:
                batches = pairs if line.kind == "reflow" else source
                objectives[line.label] = objective = workshop.objective(line).to(device)
                config = workshop.config(line)
                if line.compiled:
                    with products(config.products):
                        compile_objective(objective, batches.batch(0))
                steps[line.label] = _under(config, bare_training(objective, batches.batch, config.train, seed=0))
            for each in steps.values():
                for _ in range(WARM_UP_STEPS):
                    next(each)
            memory = {name: peak_bytes(each, device) for name, each in steps.items()}
            works = {name: functools.partial(next, each) for name, each in steps.items()}
            taken = in_turns(works, repeats, device, report)
        costs = [_cost(line, taken, memory) for line in lines]
        return ObjectivesBench(
            size=size,
            params=parameter_count(objectives[REFERENCE].student),
            shape=shape,
            classes=classes,
            batch_size=batch_size,
            repeats=repeats,
            device=device_name(device),
            threads=torch.get_num_threads(),
            precision=precision,
            textbook_error=error,
            objectives=tuple(costs),
        )


def objectives_title(bench: ObjectivesBench) -> str:
    """For people: what was measured."""
    what = f"{bench.size}, {bench.params:,} parameters, samples of {' x '.join(map(str, bench.shape))}"
    how = f"batch {bench.batch_size}, {bench.precision}"
    return f"{what}, {how}; {where(bench.device, bench.threads)}; {bench.repeats} rounds"


def objectives_table(bench: ObjectivesBench) -> Table:
    """For people: one line per objective, medians with quartiles."""
    caption = None
    if bench.textbook_error is not None:
        caption = f"{TEXTBOOK}: loss and gradient are ours within {bench.textbook_error:.0e} (relative, float64)"
    table = Table(caption=caption)
    textbook = bench.textbook(TEXTBOOK) is not None
    heads = ["", "processor time", "quartiles", "wall time", "quartiles", "step ms", "peak MB", "memory"]
    for head in [*heads, *(["of the textbook's", "quartiles"] if textbook else [])]:
        table.add_column(head, justify="left" if head == "" else "right")
    for cost in bench.objectives:
        cells = []
        for found in (cost.cpu_ratio, cost.ratio):
            cells += [f"{found.median:.3f}", f"{found.low:.3f} to {found.high:.3f}"]
        cells += [f"{cost.step_ms.median:.1f}", f"{cost.memory_mb:.1f}", f"{cost.memory_ratio:.3f}"]
        if printed := bench.textbook(cost.name):
            cells += [f"{printed.median:.3f}", f"{printed.low:.3f} to {printed.high:.3f}"]
        table.add_row(cost.name, *cells)
    return table


def _under(config: RunConfig, steps: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same steps, each with float32 products as the config has them."""
    while True:
        with products(config.products):
            loss = next(steps)
        yield loss


def _textbook_error(workshop: Workshop) -> float:
    """The larger of the relative differences of loss and gradient between the textbook's MeanFlow step and ours."""
    batch = workshop.source().batch(0)
    rows = slice(0, CHECKED_ROWS)
    label = None if batch.label is None else batch.label[rows].to(torch.device("cpu"))
    few = Batch(batch.x[rows].double().cpu(), label, batch.index[rows].cpu())
    known = variants()
    return step_difference(
        workshop.objective(known[TEXTBOOK], torch.float64), workshop.objective(known["meanflow"], torch.float64), few
    )


def _cost(line: Variant, taken: dict[str, list[Time]], memory: dict[str, int]) -> ObjectiveCost:
    own = taken[line.label]
    ratio, cpu_ratio = ratios(own, taken[REFERENCE])
    textbook, cpu_textbook = ratios(own, taken[TEXTBOOK]) if TEXTBOOK in taken else (None, None)
    return ObjectiveCost(
        name=line.label,
        kind=line.kind,
        step_ms=spread([each.wall for each in own]),
        cpu_ms=spread([each.cpu for each in own]),
        ratio=ratio,
        cpu_ratio=cpu_ratio,
        textbook_ratio=textbook,
        textbook_cpu_ratio=cpu_textbook,
        memory_mb=memory[line.label] / 2**20,
        memory_ratio=memory[line.label] / memory[REFERENCE],
    )
