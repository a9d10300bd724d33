"""What fewstep's training loop costs beside the loop one would write by hand: same network, objective and batches."""

import copy
import functools
import itertools
import statistics
import tempfile
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from fewstep.bench.measure import (
    Reported,
    Spread,
    Time,
    device_name,
    ledger_row,
    spread,
    timed,
    torch_threads,
    unreported,
    where,
)
from fewstep.checkpoint import RunDirectory
from fewstep.config import RunConfig
from fewstep.data.dataset import Batch, BatchSource, Dataset
from fewstep.distill.config import TrainConfig
from fewstep.distill.log import MetricsLog
from fewstep.distill.objective import LossOutput, Objective
from fewstep.distill.run import check_training
from fewstep.distill.train import TrainState, gradient_norm, make_accelerator, train
from fewstep.errors import UsageError
from fewstep.keys import Key
from fewstep.networks.build import parameter_count
from fewstep.precision import products

WARM_UP_STEPS = 10
MAX_BATCH = 2**20


@dataclass(frozen=True)
class Cost:
    """What one thing costs per step, in milliseconds and in percent of a bare step."""

    name: str
    ms: float
    percent: float


@dataclass(frozen=True)
class TrainBench:
    """Both loops side by side. Overheads are percent of the bare loop, over ``pairs`` of segments of ``segment`` steps.

    Lines of ``metrics.jsonl`` are part of it. ``cpu_overhead`` compares processor time instead of wall time: other work
    on the machine hardly moves it. ``costs``
    add up to the overhead: each was measured apart, except for the last, the rest. That one is negative where things
    help each other, as the gradient norm does by leaving the gradients in the processor's cache. ``keyed_noise`` is
    what addressed random numbers cost beyond ``torch.randn``: a part of the objective, so of both loops and of no
    overhead.
    """

    recipe: str
    device: str
    threads: int
    params: int
    batch_size: int
    pairs: int
    segment: int
    bare_ms: float
    fewstep_ms: float
    bare_samples_per_s: float
    samples_per_s: float
    overhead: Spread
    cpu_overhead: Spread
    costs: tuple[Cost, ...]
    keyed_noise: Cost

    def to_json(self) -> dict[str, Any]:
        """With where and when it was measured: a row of the ledger."""
        return ledger_row("train", self)


def bench_training(
    config: RunConfig,
    *,
    step_ms: float,
    pairs: int,
    segment: int = 10,
    threads: int = 0,
    report: Reported = unreported,
) -> TrainBench:
    """Measure ``train`` against a bare loop at the batch size that makes a bare step take ``step_ms``.

    Short segments of the two take turns, first one ahead and then the other, so that whatever else the machine does
    meets both. Of a method with several stages the first is measured.
    """
    _check_comparable(config.train)
    accelerator = make_accelerator()
    device = accelerator.device
    with tempfile.TemporaryDirectory() as folder:  # nothing is written there
        run = RunDirectory(Path(folder) / config.name)
        request = check_training(config, run, device, processes=1, resume=False, overwrite=False)
    data, stage = request.data, request.stages[0]
    if data.flip:
        raise UsageError("the loop to compare with has data.flip=false: leave out data.flip=true")

    def objective() -> Objective:
        return stage.build(copy.deepcopy(request.student), None).to(device)

    # The loop by hand is told the same of float32, once and for all.
    with torch_threads(threads or config.train.threads), products(config.products):

        def bare_step_ms(batch_size: int) -> float:
            by_hand = BatchesByHand(data, batch_size, config.seed, device)
            by_hand.draw(0, WARM_UP_STEPS)
            steps = bare_training(objective(), by_hand.batch, config.train, seed=config.seed)
            taken = [_segment(steps, 1, device).wall for _ in range(WARM_UP_STEPS)]
            return statistics.median(taken[WARM_UP_STEPS // 2 :])

        batch_size = fitting_batch_size(bare_step_ms, step_ms, config.train.batch_size)
        settings = config.train.model_copy(update={"batch_size": batch_size})
        source = BatchSource(data, batch_size, config.seed, device=device)
        by_hand = BatchesByHand(data, batch_size, config.seed, device)
        steps = WARM_UP_STEPS + pairs * segment
        bare_objective, own_objective = objective(), objective()
        bare = bare_training(bare_objective, by_hand.batch, settings, seed=config.seed)
        # One step more than are taken: the generator stays alive, and its averages with it.
        own = train(
            own_objective,
            source,
            settings,
            accelerator,
            seed=config.seed,
            steps=steps + 1,
            float32=config.products,
        )
        by_hand.draw(0, WARM_UP_STEPS)
        _segment(bare, WARM_UP_STEPS, device)
        _segment(own, WARM_UP_STEPS, device)
        times: list[tuple[Time, Time]] = []
        for pair in range(pairs):
            by_hand.draw(WARM_UP_STEPS + pair * segment, segment)
            if pair % 2 == 0:
                a = _segment(bare, segment, device)
                b = _segment(own, segment, device)
            else:
                b = _segment(own, segment, device)
                a = _segment(bare, segment, device)
            times.append((a, b))
            report(pair + 1, pairs)
        bare_ms = statistics.median(a.wall for a, _ in times) / segment
        last = next(own)
        parts, keyed_ms = _parts(own_objective, last, source, by_hand, settings, config.seed, device)
        line = 100 * parts["a metrics line"] / bare_ms
        overhead = spread([100 * (b.wall / a.wall - 1) + line for a, b in times])
        parts["the rest"] = bare_ms * overhead.median / 100 - sum(parts.values())
        return TrainBench(
            recipe=config.name,
            device=device_name(device),
            threads=torch.get_num_threads(),
            params=parameter_count(request.student),
            batch_size=batch_size,
            pairs=pairs,
            segment=segment,
            bare_ms=bare_ms,
            fewstep_ms=statistics.median(b.wall for _, b in times) / segment + parts["a metrics line"],
            bare_samples_per_s=statistics.median(1e3 * batch_size * segment / a.wall for a, _ in times),
            samples_per_s=statistics.median(1e3 * batch_size * segment / b.wall for _, b in times),
            overhead=overhead,
            cpu_overhead=spread([100 * (b.cpu / a.cpu - 1) + line for a, b in times]),
            costs=tuple(Cost(name, ms, 100 * ms / bare_ms) for name, ms in parts.items()),
            keyed_noise=Cost("keyed noise, beyond torch.randn", keyed_ms, 100 * keyed_ms / bare_ms),
        )


def bare_training(
    objective: Objective, batch: Callable[[int], Batch], config: TrainConfig, *, seed: int
) -> Iterator[Tensor]:
    """The loop one would write by hand, at a constant rate, for ever; yields the loss after each step."""
    optimizer = torch.optim.AdamW(
        objective.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    device = next(objective.parameters()).device.type
    for step in itertools.count():
        data = batch(step)
        with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bf16"):
            output = objective(data, Key(seed, step))
        loss = output.per_sample_B.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step()
        yield loss


class BatchesByHand:
    """The batches of a ``BatchSource`` by plain indexing, with rows that were drawn beforehand."""

    def __init__(self, data: Dataset, batch_size: int, seed: int, device: torch.device) -> None:
        self._data, self._seed = data.to(device), seed
        self._label = self._data.label
        self._index = torch.arange(batch_size, device=device)
        self._source = BatchSource(data, batch_size, seed, device=device)
        self._rows: dict[int, Tensor] = {}

    def draw(self, first: int, count: int) -> None:
        """Draw the rows of ``count`` steps and forget all others."""
        self._rows = {}
        for step in range(first, first + count):
            row = self._source.batch(step).row
            assert row is not None
            self._rows[step] = row

    def batch(self, step: int) -> Batch:
        row = self._rows[step]
        x = self._data.decode(self._data.x[row], Key(self._seed, step), self._index)
        return Batch(x, None if self._label is None else self._label[row], self._index, row, first=0)


def fitting_batch_size(measure: Callable[[int], float], step_ms: float, batch_size: int) -> int:
    """The batch size, searched from ``batch_size`` on, whose ``measure`` in milliseconds is about ``step_ms``.

    Within three percent, or as near as a few tries come.
    """
    for _ in range(6):
        ms = measure(batch_size)
        if abs(ms / step_ms - 1) < 0.03:
            break
        # Times grow more slowly than batches: from above this overshoots, hence the bound on one try.
        wanted = batch_size * min(8.0, max(1 / 8, step_ms / ms))
        following = min(MAX_BATCH, 8 * round(wanted / 8) if wanted >= 64 else max(1, round(wanted)))
        if following == batch_size:
            break
        batch_size = following
    return batch_size


def bench_title(bench: TrainBench) -> str:
    """For people: what was measured."""
    size = f"{bench.params:,} parameters, batch {bench.batch_size}"
    return f"{bench.recipe}: {size}, {where(bench.device, bench.threads)}; {bench.pairs} pairs of {bench.segment} steps"


def bench_table(bench: TrainBench) -> Table:
    """For people: the two loops, what lies between them, and where it goes."""
    table = Table()
    for head in ("", "ms/step", "% of bare", "quartiles", "samples/s"):
        table.add_column(head, justify="left" if head == "" else "right")
    wall, cpu = bench.overhead, bench.cpu_overhead
    table.add_row("bare PyTorch", f"{bench.bare_ms:.3f}", "", "", f"{bench.bare_samples_per_s:,.0f}")
    table.add_row("fewstep", f"{bench.fewstep_ms:.3f}", "", "", f"{bench.samples_per_s:,.0f}", end_section=True)
    for name, found in (("overhead", wall), ("overhead, processor time", cpu)):
        table.add_row(name, "", f"{found.median:+.2f}", f"{found.low:+.2f} to {found.high:+.2f}", "")
    table.add_section()
    for cost in bench.costs:
        table.add_row(cost.name, f"{cost.ms:.3f}", f"{cost.percent:+.2f}", "", "")
    table.add_section()
    keyed = bench.keyed_noise
    table.add_row(f"(in both: {keyed.name})", f"{keyed.ms:.3f}", f"{keyed.percent:+.2f}", "", "")
    return table


def _segment(steps: Iterator[object], count: int, device: torch.device) -> Time:
    """``count`` steps."""
    return timed(lambda: deque(itertools.islice(steps, count), maxlen=0), device)


def _parts(
    objective: Objective,
    state: TrainState,
    source: BatchSource,
    by_hand: BatchesByHand,
    config: TrainConfig,
    seed: int,
    device: torch.device,
    repeats: int = 30,
) -> tuple[dict[str, float], float]:
    """Milliseconds of what ``train`` does in a step and the bare loop does not, thing by thing; and of keyed noise.

    Between them lies a forward and a backward pass, as in training: in a tight loop the weights would be at hand in the
    processor's cache and everything would look cheaper than it is.
    """
    parameters = list(objective.student.parameters())
    taken: dict[str, list[float]] = defaultdict(list)

    def noted(name: str, work: Callable[[], Any]) -> Any:
        result: list[Any] = []
        taken[name].append(timed(lambda: result.append(work()), device).wall)
        return result[0]

    def average() -> None:
        for ema in state.emas:
            ema.update()

    by_hand.draw(state.step, repeats)
    for step in range(state.step, state.step + repeats):
        ways = {"own": source.batch, "hand": by_hand.batch}
        for name in sorted(ways, reverse=step % 2 == 0):  # the second one finds the data in the cache
            batch = noted(name, functools.partial(ways[name], step))
        key, shape = Key(seed, step), batch.x.shape
        noted("keyed", functools.partial(key.normal, "noise", batch.index, tuple(shape[1:])))
        noted("randn", functools.partial(torch.randn, shape, device=device))
        output = objective(batch, key)
        output.per_sample_B.mean().backward()
        norm = noted("norm", functools.partial(gradient_norm, parameters))
        noted("finite", functools.partial(_read, output, norm))
        noted("line", functools.partial(_metrics_line, output, float(norm), config))
        objective.zero_grad()
        noted("average", average)
    parts = {
        # Written every log_every steps, so by hardly any segment: it is added to all of them.
        "a metrics line": statistics.median(taken["line"]) / config.log_every,
        "gradient norm": statistics.median(taken["norm"]),
        "finite check": statistics.median(taken["finite"]),
        "weight averages": statistics.median(taken["average"]),
        # Means: a new permutation falls into some of the steps alone.
        "batch, beyond indexing": statistics.fmean(taken["own"]) - statistics.fmean(taken["hand"]),
    }
    return parts, statistics.median(taken["keyed"]) - statistics.median(taken["randn"])


def _metrics_line(output: LossOutput, grad_norm: float, config: TrainConfig) -> None:
    """Reduce and write what ``log_every`` steps have collected."""
    with tempfile.TemporaryDirectory() as folder:
        log = MetricsLog(RunDirectory(Path(folder)), config.batch_size, step=0, seconds=0.0)
        for _ in range(config.log_every):
            log.add([replace(output, per_sample_B=output.per_sample_B.detach())], grad_norm)
        log.write(config.log_every, "bench", config.lr, 1.0)


def _read(output: LossOutput, norm: Tensor) -> list[float]:
    return torch.stack((output.per_sample_B.mean(), norm)).tolist()


def _check_comparable(config: TrainConfig) -> None:
    """The bare loop is plain AdamW: what it does not do would count as overhead."""
    plain = TrainConfig()
    for name in ("compile", "parallel", "gradient_accumulation_steps", "optimizer"):
        asked, usual = config.model_dump()[name], plain.model_dump()[name]
        if asked != usual:
            raise UsageError(f"the loop to compare with has train.{name}={usual}: leave out train.{name}={asked}")
