"""How benchmarks measure: works that take turns, medians with quartiles, ratios pair by pair, rows of a ledger."""

import contextlib
import datetime
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fewstep.block import PrecisionName
from fewstep.environment import describe_environment

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Work = Callable[[], object]
Precision = PrecisionName
"""As ``train.precision``."""
Reported = Callable[[int, int], None]
"""Called with how many of how many are done."""


def unreported(done: int, total: int) -> None:
    """For callers that do not watch."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Time:
    """Milliseconds by the clock, and of the processor's, which other work on the machine hardly moves."""

    wall: float
    cpu: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of one value or more."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Work, device: torch.device) -> Time:
    """One call of ``work``."""
    synchronise(device)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    synchronise(device)
    return Time(1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu))


def in_turns(
    works: Mapping[str, Work], rounds: int, device: torch.device, report: Reported = unreported
) -> dict[str, list[Time]]:
    """``rounds`` times of every work. In each round every work has its turn, and every round starts with another one,
    so that whatever else the machine does, and whatever one leaves behind for the next, meets all of them."""
    taken: dict[str, list[Time]] = {name: [] for name in works}
    order = list(works)
    for round_ in range(rounds):
        first = round_ % len(order)
        for name in order[first:] + order[:first]:
            taken[name].append(timed(works[name], device))
        report(round_ + 1, rounds)
    return taken


def ratios(own: Sequence[Time], reference: Sequence[Time]) -> tuple[Spread, Spread]:
    """Of the times of two works round by round, by the clock and by processor time."""
    pairs = list(zip(own, reference, strict=True))
    return spread([a.wall / b.wall for a, b in pairs]), spread([a.cpu / b.cpu for a, b in pairs])


def device_name(device: torch.device) -> str:
    """The model of a GPU, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def where(device: str, threads: int) -> str:
    """For people: what measured."""
    return f"{device}, {threads} thread{'s' if threads > 1 else ''}"


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """``count`` threads of torch inside (0: as many as there are)."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count or before)
        yield
    finally:
        torch.set_num_threads(before)


def ledger_row(bench: str, measured: "DataclassInstance") -> dict[str, Any]:
    """What was measured, with where and when."""
    today = datetime.date.today().isoformat()
    return {"date": today, "bench": bench, **asdict(measured), "environment": describe_environment()}


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append to a ledger: one JSON object per line."""
    with path.open("a") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")
