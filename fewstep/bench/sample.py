"""What samplers cost beside bare calls of the network: fewstep's own, those of other packages, and loops by hand."""

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

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
from fewstep.bench.sample_peers import peer_ways
from fewstep.bench.sample_variants import variant_ways
from fewstep.bench.sample_ways import Inputs, Net, Sampling, Way, bare_calls, own_ways, returning_at_once
from fewstep.bench.train import fitting_batch_size
from fewstep.errors import FewstepError, UsageError, nearest
from fewstep.networks.build import build_network, parameter_count
from fewstep.networks.config import SIZES

FIRST_TRIES = 3
ALONE = 10
"""Samplings around a network that returns at once, per round: they are short."""
GATED_PAIRS = 4
"""Pairs of a gated way per round, where others have one: a gate needs the smaller error."""


@dataclass(frozen=True)
class WayCost:
    """One way of sampling. ``ms`` is a whole sampling by the clock; overheads are percent of bare calls of the network,
    as many and on as many samples, pair by pair, by the clock and by processor time.

    ``own_us`` is what the way takes per call around a network that returns at once, in microseconds of processor time
    (on a GPU: by the clock). ``difference`` is how far its samples lie from those of the way ``like``, relative to
    their largest coordinate; more than ``tolerance`` would have been an error.
    """

    name: str
    of: str
    calls: int
    gated: bool
    pairs: int
    ms: Spread
    overhead: Spread
    cpu_overhead: Spread
    own_us: float | None
    like: str | None
    difference: float | None
    tolerance: float | None


@dataclass(frozen=True)
class BatchCost:
    """All ways at one batch size. ``call_ms`` is a bare call of the network by the clock, ``call_cpu_ms`` by processor
    time, of all threads together."""

    batch_size: int
    call_ms: Spread
    call_cpu_ms: Spread
    ways: tuple[WayCost, ...]


@dataclass(frozen=True)
class SampleBench:
    """One network, at the batch size that makes a call take about what was asked for, and at batch 1."""

    network: str
    params: int
    shape: tuple[int, ...]
    classes: int
    steps: int
    repeats: int
    device: str
    threads: int
    missing: tuple[str, ...]
    batches: tuple[BatchCost, ...]

    def to_json(self) -> dict[str, Any]:
        """With where and when it was measured: a row of the ledger."""
        return ledger_row("sample", self)

    def compared(self, cost: WayCost) -> Spread:
        """What a gate compares: processor time, or time by the clock where the processor only waits for a GPU."""
        return cost.cpu_overhead if self.device == "cpu" else cost.overhead


def bench_sampling(
    size: str = "flot-tiny",
    shape: tuple[int, ...] = (1, 8, 8),
    *,
    classes: int = 10,
    steps: int = 4,
    call_ms: float = 5.0,
    repeats: int = 30,
    device: torch.device,
    threads: int = 0,
    compile: bool = False,
    precision: str = "fp32",
    channels_last: bool = False,
    report: Reported = unreported,
) -> SampleBench:
    """Measure every way of sampling with the network of that name, at two batch sizes.

    ``repeats`` times every way has its turn, each time beside bare calls of the network, first one ahead and then the
    other; gated ways ``GATED_PAIRS`` times in each turn. Before that every way has to draw the samples it should: a
    ``FewstepError`` if it does not. ``compile``, ``precision="bf16"`` and ``channels_last`` add jumps with such a
    network, beside bare calls of the plain one.
    """
    if size not in SIZES:
        raise UsageError(f"no network of size '{size}'; {nearest(size, SIZES)}")
    net = counting_network(size, shape, classes).to(device)
    with torch_threads(threads):

        def bare_ms(batch_size: int) -> float:
            work = bare_calls(net, _inputs(shape, classes, steps, batch_size, device), 1)
            taken = [timed(work, device) for _ in range(3 * FIRST_TRIES)][FIRST_TRIES:]
            if device.type == "cpu":  # where others may keep the clock busy
                return statistics.median(time.cpu for time in taken) / torch.get_num_threads()
            return statistics.median(time.wall for time in taken)

        sizes = list(dict.fromkeys((fitting_batch_size(bare_ms, call_ms, 16), 1)))
        batches = []
        for place, batch_size in enumerate(sizes):
            inputs = _inputs(shape, classes, steps, batch_size, device)
            peers, missing = peer_ways(inputs)
            faster, notes = variant_ways(net, inputs, compile=compile, precision=precision, channels_last=channels_last)
            seen = functools.partial(_report_from, report, place * repeats, len(sizes) * repeats)
            batches.append(_measured(net, inputs, [*own_ways(inputs), *faster, *peers], repeats, device, seen))
        return SampleBench(
            network=size,
            params=parameter_count(net),
            shape=shape,
            classes=classes,
            steps=steps,
            repeats=repeats,
            device=device_name(device),
            threads=torch.get_num_threads(),
            missing=(*missing, *notes),
            batches=tuple(batches),
        )


def counting_network(size: str, shape: tuple[int, ...], classes: int) -> nn.Module:
    """The two-time network of that name, with no layer left at zero to hide a way that computes something else."""
    torch.manual_seed(0)
    net = build_network(SIZES[size], shape, classes, two_times=True).eval().requires_grad_(False)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return net


def check_samples(ways: Sequence[Way], net: Net) -> dict[str, float]:
    """How far the samples of every way are from those they should be (see ``Way``), by its name."""
    drawn: dict[str, Tensor] = {}
    found: dict[str, float] = {}
    for way in ways:
        drawn[way.name] = way.build(net)()
    for way in ways:
        if way.like is None:
            continue
        wanted = drawn[way.like]
        found[way.name] = float((drawn[way.name] - wanted).abs().max() / wanted.abs().max())
        if not found[way.name] <= way.tolerance:
            raise FewstepError(
                f"{way.name} ({way.of}) draws other samples than {way.like}: {found[way.name]:.2g} of the largest "
                f"coordinate, above {way.tolerance:g}"
            )
    return found


def _measured(
    net: Net, inputs: Inputs, ways: Sequence[Way], repeats: int, device: torch.device, report: Callable[[int], None]
) -> BatchCost:
    differences = check_samples(ways, net)
    nothing = returning_at_once(inputs)
    works = {way.name: way.build(net) for way in ways}
    bare = {way.name: bare_calls(net, inputs, way.calls, doubled=way.doubled) for way in ways}
    alone = {way.name: way.build(nothing) for way in ways if way.alone}
    pairs: dict[str, list[tuple[Time, Time]]] = {way.name: [] for way in ways}
    own: dict[str, list[float]] = {way.name: [] for way in ways}
    for round_ in range(repeats):
        first = round_ % len(ways)
        for way in [*ways[first:], *ways[:first]]:
            for turn in range(GATED_PAIRS if way.gated else 1):
                bare_first = (round_ + turn) % 2 == 0
                pairs[way.name].append(_pair(bare[way.name], works[way.name], bare_first, device))
            if way.alone:
                own[way.name].append(_alone(alone[way.name], device) / way.calls)
        report(round_ + 1)
    costs = [
        WayCost(
            name=way.name,
            of=way.of,
            calls=way.calls,
            gated=way.gated,
            pairs=len(pairs[way.name]),
            ms=spread([time.wall for _, time in pairs[way.name]]),
            overhead=spread([100 * (time.wall / beside.wall - 1) for beside, time in pairs[way.name]]),
            cpu_overhead=spread([100 * (time.cpu / beside.cpu - 1) for beside, time in pairs[way.name]]),
            own_us=statistics.median(own[way.name]) if way.alone else None,
            like=way.like,
            difference=differences.get(way.name),
            tolerance=way.tolerance if way.like else None,
        )
        for way in ways
    ]
    calls = [(beside, way.calls) for way in ways if not way.doubled for beside, _ in pairs[way.name]]
    return BatchCost(
        batch_size=len(inputs.noise),
        call_ms=spread([beside.wall / count for beside, count in calls]),
        call_cpu_ms=spread([beside.cpu / count for beside, count in calls]),
        ways=tuple(costs),
    )


def _pair(bare: Sampling, work: Sampling, bare_first: bool, device: torch.device) -> tuple[Time, Time]:
    if bare_first:
        beside = timed(bare, device)
        return beside, timed(work, device)
    found = timed(work, device)
    return timed(bare, device), found


def _alone(work: Sampling, device: torch.device) -> float:
    """Microseconds of one sampling."""

    def several() -> None:
        for _ in range(ALONE):
            work()

    taken = timed(several, device)
    return 1e3 * (taken.cpu if device.type == "cpu" else taken.wall) / ALONE


def _inputs(shape: tuple[int, ...], classes: int, steps: int, batch_size: int, device: torch.device) -> Inputs:
    noise = torch.randn(batch_size, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    label = torch.arange(batch_size, device=device) % classes if classes else None
    return Inputs(noise, label, classes, steps)


def _report_from(report: Reported, first: int, total: int, done: int) -> None:
    report(first + done, total)


def sample_title(bench: SampleBench) -> str:
    """For people: what was measured."""
    what = f"{bench.network}, {bench.params:,} parameters, samples of {' x '.join(map(str, bench.shape))}"
    return f"{what}, {bench.steps} steps; {where(bench.device, bench.threads)}; {bench.repeats} rounds"


def sample_tables(bench: SampleBench) -> list[Table]:
    """For people: one table for each batch size, one line for each way; percentages are beyond bare calls."""
    tables = []
    for batch in bench.batches:
        call = batch.call_ms
        taken = f"{call.median:.2f} ms ({call.low:.2f} to {call.high:.2f})"
        title = (
            f"batch {batch.batch_size}, beyond bare calls of {taken}, {batch.call_cpu_ms.median:.2f} of processor time"
        )
        caption = f"not here: {'; '.join(bench.missing)}" if bench.missing else None
        table = Table(title=title, caption=caption)
        words, numbers = ("", "of"), ("calls", "ms", "by the clock", "processor time", "quartiles", "own us/call")
        for head in (*words, *numbers, "samples"):
            table.add_column(head, justify="right" if head in numbers else "left")
        for way in batch.ways:
            wall, cpu, compared = way.overhead, way.cpu_overhead, bench.compared(way)
            table.add_row(
                way.name,
                way.of,
                str(way.calls),
                f"{way.ms.median:.2f}",
                f"{wall.median:+.2f} %",
                f"{cpu.median:+.2f} %",
                f"{compared.low:+.2f} to {compared.high:+.2f}",
                "" if way.own_us is None else f"{way.own_us:.1f}",
                "" if way.like is None else f"{way.like} within {way.difference:.0e}",
            )
        tables.append(table)
    return tables
