"""What metrics cost beside the packages that compute them too: the same features, taking turns, values compared first.

Features are synthetic: non-negative and correlated with a decaying spectrum, as Inception's are.
"""

import multiprocessing
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from fewstep.bench.measure import (
    Reported,
    Spread,
    Time,
    device_name,
    in_turns,
    ledger_row,
    ratios,
    spread,
    unreported,
    where,
)
from fewstep.bench.metric_peers import CONTESTS, Contest, Values, differ, package_version, threads_of_all
from fewstep.errors import FewstepError, UsageError, nearest

SWEEP = "sweep"
METRICS = (*CONTESTS, SWEEP)
OWN = "fewstep"


@dataclass(frozen=True)
class Compared:
    """One computation by fewstep and by a package (``peer``), in seconds; ``faster`` is the peer's time over ours, pair
    by pair, by processor time (of all threads) and by the clock.

    ``error`` is the largest difference of what has to agree and ``tolerance`` what it may be, relative or below 1
    absolute. Memory (MiB) is the peak of one call beyond what its process held; None where it was not measured.
    """

    metric: str
    peer: str
    version: str
    what: str
    cpu_s: Spread
    peer_cpu_s: Spread
    wall_s: Spread
    peer_wall_s: Spread
    faster: Spread
    faster_by_the_clock: Spread
    values: dict[str, float]
    peer_values: dict[str, float]
    error: float
    tolerance: float
    peak_mib: float | None = None
    peer_peak_mib: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    peer_parts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class MetricsBench:
    """All that was compared, and in words what was left out and why."""

    pairs: int
    device: str
    threads: int
    compared: tuple[Compared, ...]
    left_out: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """With where and when it was measured: a row of the ledger."""
        return ledger_row("metrics", self)

    def ratio(self, compared: Compared) -> float:
        """What a gate compares: processor time, or time by the clock where the processor only waits for a GPU."""
        return (compared.faster if self.device == "cpu" else compared.faster_by_the_clock).median


def joined(benches: Sequence[MetricsBench]) -> MetricsBench:
    """Several in one, of one machine and one setting."""
    lines = tuple(line for bench in benches for line in bench.compared)
    left_out = {name: reason for bench in benches for name, reason in bench.left_out.items()}
    return replace(benches[0], compared=lines, left_out=left_out)


def check_metrics(names: Sequence[str]) -> list[str]:
    """The metrics to compare, all but the sweep where none is named; an unknown one is a ``UsageError``."""
    for name in names:
        if name not in METRICS:
            raise UsageError(f"no metric '{name}' to compare; {nearest(name, METRICS)}")
    return list(dict.fromkeys(names)) or list(CONTESTS)


def bench_metrics(
    names: Sequence[str],
    *,
    n: int,
    dim: int,
    images: int,
    pairs: int,
    device: torch.device,
    threads: int,
    memory: bool = True,
    report: Reported = unreported,
) -> MetricsBench:
    """Compare what ``names`` of ``CONTESTS`` name with every package that is there: on ``n`` features of ``dim``
    dimensions on either side, of ``inception`` on ``images`` images of 32 x 32."""
    found: list[Compared] = []
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, threads_of_all(threads):
        for name in names:
            sides = _images(images) if name == "inception" else (features(n, dim, 1), features(n, dim, 2))
            files = Path(folder) / f"{name}-ref.npy", Path(folder) / f"{name}-gen.npy"
            for path, side in zip(files, sides, strict=True):
                np.save(path, side.numpy())
            ref, gen = (side.to(device) for side in sides)
            contests: dict[str, Contest] = {}
            for package, make in CONTESTS[name].items():
                try:
                    contests[package] = make(ref, gen)
                except ImportError as error:  # and what its own imports lack
                    left_out[f"{name}: {package}"] = str(error).splitlines()[0]
            what = f"{images} images of 32 x 32" if name == "inception" else f"{n:,} x {dim}"
            found += _compared(name, what, contests, pairs, device, report)
            if memory and device.type == "cpu":
                found = [_with_peaks(each, files, threads) if each.metric == name else each for each in found]
        return MetricsBench(pairs, device_name(device), torch.get_num_threads(), tuple(found), left_out)


def _compared(
    name: str, what: str, contests: dict[str, Contest], pairs: int, device: torch.device, report: Reported
) -> list[Compared]:
    if not contests:
        return []
    values = {package: (contest.own(), contest.peer()) for package, contest in contests.items()}  # which warms up
    errors = {}
    for package, contest in contests.items():
        agreeing = values[package] if contest.agree is None else contest.agree()
        errors[package] = check_agreement(name, package, *agreeing, contest.tolerance)
    first = next(iter(contests.values()))
    own = first.own if name != "inception" else None
    works = {package: contest.peer for package, contest in contests.items()}
    # Inception is resized as each package resizes it, so that ours has as many ways too.
    owns = {OWN: own} if own else {f"{OWN} as {package}": contest.own for package, contest in contests.items()}
    taken = in_turns({**owns, **works}, pairs, device, lambda done, total: report(done, total))
    return [
        compared(
            name,
            package,
            "; ".join(filter(None, (what, contest.said))),
            taken[OWN if own else f"{OWN} as {package}"],
            taken[package],
            values[package],
            errors[package],
            contest.tolerance,
        )
        for package, contest in contests.items()
    ]


def check_agreement(name: str, package: str, own: Values, peer: Values, tolerance: float) -> float:
    """The largest difference; more than tolerated, or none that can be told, is a ``FewstepError``."""
    error = differ(own, peer)
    if not error <= tolerance:
        raise FewstepError(f"{name}: fewstep says {dict(own)}, {package} {dict(peer)}: more than {tolerance:g} apart")
    return error


def compared(
    metric: str,
    peer: str,
    what: str,
    own: Sequence[Time],
    theirs: Sequence[Time],
    values: tuple[Values, Values],
    error: float,
    tolerance: float,
) -> Compared:
    """The line of a pair of computations from the times of both, round by round."""
    by_clock, by_processor = ratios(theirs, own)
    return Compared(
        metric=metric,
        peer=peer,
        version=" + ".join(package_version(each) for each in peer.split(" + ")),
        what=what,
        cpu_s=spread([each.cpu / 1e3 for each in own]),
        peer_cpu_s=spread([each.cpu / 1e3 for each in theirs]),
        wall_s=spread([each.wall / 1e3 for each in own]),
        peer_wall_s=spread([each.wall / 1e3 for each in theirs]),
        faster=by_processor,
        faster_by_the_clock=by_clock,
        values=dict(values[0]),
        peer_values=dict(values[1]),
        error=error,
        tolerance=tolerance,
    )


def features(n: int, dim: int, seed: int) -> Tensor:
    """Synthetic features ``[n, dim]``: two seeds give two samples of one distribution."""
    spectrum = torch.arange(1, dim + 1) ** -0.7
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0)) * (spectrum[:, None] * 3 / dim**0.5)
    return (torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) @ mixing + 0.02).relu()


def _images(count: int) -> tuple[Tensor, Tensor]:
    made = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return made, made[:1]


# The peak memory of one call, in a process of its own -----------------------------------------------------------------


def _with_peaks(line: Compared, files: tuple[Path, Path], threads: int) -> Compared:
    peaks = [_peak_in_a_process(line.metric, line.peer, own, files, threads) for own in (True, False)]
    return replace(line, peak_mib=peaks[0], peer_peak_mib=peaks[1])


def _peak_in_a_process(metric: str, package: str, own: bool, files: tuple[Path, Path], threads: int) -> float | None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_of_call, metric, package, own, files, threads).result()


def peak_of_call(metric: str, package: str, own: bool, files: tuple[Path, Path], threads: int) -> float | None:
    """MiB that one call holds at most beyond what this process holds before it: its features, and what a sweep keeps.
    None where the system does not say."""
    before = anonymous_kib()
    if before is None:
        return None
    with threads_of_all(threads):
        ref, gen = (torch.from_numpy(np.load(path)) for path in files)
        make = CONTESTS[metric][package]
        small = (ref[:2], gen) if metric == "inception" else (ref[:80, :16].contiguous(), gen[:80, :16].contiguous())
        first, contest = make(*small), make(ref, gen)
        (first.own if own else first.peer)()  # what the first call loads stays out of it
        work = contest.own if own else contest.peer
        del first
        before = peak = anonymous_kib() or 0
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.002):
                peak = max(peak, anonymous_kib() or 0)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            work()
        finally:
            done.set()
            watcher.join()
    return (peak - before) / 1024


def anonymous_kib() -> int | None:
    """What this process holds beside files: the pages of libraries come and go as the kernel likes. Linux alone."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), None)


# For people -----------------------------------------------------------------------------------------------------------


def metrics_title(bench: MetricsBench) -> str:
    return f"{bench.pairs} pairs in turns, {where(bench.device, bench.threads)}; processor seconds, medians"


def metrics_table(bench: MetricsBench) -> Table:
    """One line per metric and package."""
    table = Table()
    for head in ("", "of", "fewstep s", "peer", "peer s", "times faster", "by the clock", "peak MiB", "difference"):
        table.add_column(head, justify="left" if head in ("", "of", "peer") else "right")
    for each in bench.compared:
        faster, clock = each.faster, each.faster_by_the_clock
        peaks = [each.peak_mib, each.peer_peak_mib]
        table.add_row(
            each.metric,
            each.what,
            f"{each.cpu_s.median:.2f}",
            f"{each.peer} {each.version}",
            f"{each.peer_cpu_s.median:.2f}",
            f"{faster.median:.2f} ({faster.low:.2f} to {faster.high:.2f})",
            f"{clock.median:.2f} ({clock.low:.2f} to {clock.high:.2f})",
            ", ".join("" if peak is None else f"{peak:,.0f}" for peak in peaks),
            f"{each.error:.1e}",
        )
    return table
