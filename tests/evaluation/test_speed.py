"""Latency, throughput and operations of samplers whose cost is known, by a clock that only they move."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.dataset import Dataset
from fewstep.evaluation.speed import flops_per_image, measure_speed, moment, percentile, seconds_between
from fewstep.keys import Key
from fewstep.sampling import Samples
from fewstep.sources import Source, gaussian

CPU = torch.device("cpu")
CLOUD = Dataset("cloud", torch.zeros(10, 2), None, 0, kind="points")


class Clock:
    """In the place of the module ``time``."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("fewstep.evaluation.speed.time", found)
    return found


@dataclass(frozen=True)
class Slow:
    """Takes ``fixed`` seconds a call and ``each`` more per sample."""

    clock: Clock
    fixed: float
    each: float
    most: int = 10**9
    name: str = "slow"
    source: Source = gaussian

    def check(self, steps: int) -> None: ...

    def __call__(self, steps: int, noise: Tensor, label_B: Tensor | None, key: Key, index_B: Tensor) -> Samples:
        if len(noise) > self.most:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        self.clock.now += self.fixed + self.each * len(noise)
        return Samples(noise, steps)


def test_latency_and_the_best_batch_of_a_sampler_with_a_fixed_cost(clock: Clock) -> None:
    """With a fixed cost larger batches are better, without end; here memory ends at 8."""
    speed = measure_speed(Slow(clock, 0.004, 1e-5, most=8), 1, CLOUD, seed=0, device=CPU, seconds=(0.2, 1.0))  # type: ignore[arg-type]
    assert (speed.latency_ms, speed.latency_p95_ms) == (pytest.approx(4.01), pytest.approx(4.01))
    assert (speed.batch, speed.peak_memory_mb, speed.flops) == (8, None, None)
    assert speed.images_per_s == pytest.approx(8 / 0.00408)


def test_a_sampler_that_gains_nothing_stays_at_one_and_known_rates_count(clock: Clock) -> None:
    speed = measure_speed(Slow(clock, 0.0, 0.003), 1, CLOUD, seed=0, device=CPU, seconds=(0.1, 0.5))  # type: ignore[arg-type]
    assert speed.batch <= 2
    known = measure_speed(Slow(clock, 0.0, 0.003), 1, CLOUD, seed=0, device=CPU, seconds=(0.1, 0.1), known={64: 1e6})  # type: ignore[arg-type]
    assert (known.batch, known.images_per_s) == (64, 1e6)


def test_the_time_spent_is_bounded(clock: Clock) -> None:
    measure_speed(Slow(clock, 0.1, 0.0), 1, CLOUD, seed=0, device=CPU, seconds=(0.1, 0.1))  # type: ignore[arg-type]
    assert clock.now < 0.6  # two calls of latency, one that counts operations, no larger batch


@pytest.mark.parametrize("steps", [1, 3])
def test_operations_of_a_linear_layer(steps: int) -> None:
    """``2 in out`` per sample and evaluation."""

    @dataclass(frozen=True)
    class Linear(Slow):
        layer: nn.Linear = nn.Linear(2, 2, bias=False)  # noqa: RUF009

        def __call__(self, steps: int, noise: Tensor, label_B: Tensor | None, key: Key, index_B: Tensor) -> Samples:
            with torch.no_grad():
                for _ in range(steps):
                    noise = self.layer(noise)
            return Samples(noise, steps)

    assert flops_per_image(Linear(Clock(), 0, 0), steps, CLOUD, seed=0, device=CPU) == 2 * 2 * 2 * steps  # type: ignore[arg-type]


def test_percentiles_by_hand() -> None:
    assert percentile([4.0, 1.0, 2.0, 3.0], 0.5) == 2.5
    assert percentile([4.0, 1.0, 2.0, 3.0], 1.0) == 4.0
    assert percentile([5.0], 0.95) == 5.0


def test_moments_of_a_stream_are_waited_for_once_and_are_milliseconds(clock: Clock) -> None:
    """A GPU's events as torch has them; of the clock a moment is what it shows."""

    class Event:
        waited = False

        def synchronize(self) -> None:
            self.waited = True

        def elapsed_time(self, later: "Event") -> float:
            assert later.waited
            return 1500.0

    began, ended = Event(), Event()
    assert seconds_between(began, ended) == 1.5  # type: ignore[arg-type]
    assert not began.waited
    first = moment(CPU)
    clock.now += 0.25
    assert seconds_between(first, moment(CPU)) == 0.25
