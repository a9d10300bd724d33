"""How fast a sampler is: latency, throughput, memory, floating-point operations."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from fewstep.data.dataset import Dataset
from fewstep.errors import is_out_of_memory
from fewstep.keys import Key
from fewstep.sampling import Sampler

REPEATS = 15
WARMUP = 3
WORTH = 1.05
"""A larger batch has to be this much faster per image to be tried further."""


@dataclass(frozen=True)
class Speed:
    """Latency of one sample at batch size 1 (median and 95th percentile), the best rate of all batch sizes measured and
    that batch size, the most memory that a GPU held meanwhile (MiB; None on a CPU), and the floating-point operations
    of one sample over all its network evaluations (None where they cannot be counted)."""

    latency_ms: float
    latency_p95_ms: float
    images_per_s: float
    batch: int
    peak_memory_mb: float | None
    flops: float | None


def measure_speed(
    sampler: Sampler,
    steps: int,
    data: Dataset,
    *,
    seed: int,
    device: torch.device,
    known: Mapping[int, float] | None = None,
    seconds: tuple[float, float] | None = None,
) -> Speed:
    """Time a sampler, synchronised and after a warm-up.

    ``seconds`` bounds what is spent on latency (two calls at the least) and on throughput: 1 and 0.2 on a CPU, 5 and 5
    elsewhere. Batch sizes are powers of two until the rate rises no more, memory ends or the next size would not be
    done in time. ``known`` are rates (images per second) by batch size that are known already. One more call counts
    the operations.
    """
    for_latency, for_rate = seconds or ((1.0, 0.2) if device.type == "cpu" else (5.0, 5.0))
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    call = partial(_timed, sampler, steps, data, seed, device)
    taken = latencies(call, for_latency)
    rates = {**_rates(call, 1 / statistics.median(taken), for_rate), **(known or {})}
    batch = max(rates, key=lambda size: rates[size])
    return Speed(
        latency_ms=1e3 * statistics.median(taken),
        latency_p95_ms=1e3 * percentile(taken, 0.95),
        images_per_s=rates[batch],
        batch=batch,
        peak_memory_mb=torch.cuda.max_memory_allocated(device) / 2**20 if cuda else None,
        flops=flops_per_image(sampler, steps, data, seed=seed, device=device),
    )


def latencies(call: partial[float], seconds: float) -> list[float]:
    """Wall times (s) of a few calls at batch size 1 after some that do not count; fewer where calls are slow."""
    first = call(1)
    once = call(1)
    fitting = int(seconds / max(once, 1e-9))
    for _ in range(min(WARMUP - 2, fitting)):
        call(1)
    if fitting < 2:
        return [min(first, once)]
    return [call(1) for _ in range(min(REPEATS, fitting))]


def percentile(values: list[float], share: float) -> float:
    """Linear between the two nearest order statistics."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _rates(call: partial[float], alone: float, seconds: float) -> dict[int, float]:
    """Images per second by batch size: powers of two, each twice (the first warms up)."""
    rates, batch, left = {1: alone}, 1, seconds
    while left > 0:
        batch *= 2
        expected = batch / rates[batch // 2]  # at the latest
        if 2 * expected > left:
            break
        try:
            taken = [call(batch), call(batch)]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            break
        left -= sum(taken)
        rates[batch] = batch / taken[-1]
        if rates[batch] < WORTH * rates[batch // 2]:
            break
    return rates


def flops_per_image(
    sampler: Sampler, steps: int, data: Dataset, *, seed: int, device: torch.device, batch: int = 1
) -> float | None:
    """Floating-point operations of one sample, all network evaluations together, as torch's counter has them: a
    multiplication and an addition are two, elementwise operations none. None where it counts nothing or fails."""
    counter = FlopCounterMode(display=False)
    try:
        with counter:
            _timed(sampler, steps, data, seed, device, batch)
    except Exception as error:  # an operation that it cannot trace is no reason not to measure the rest
        if is_out_of_memory(error):
            raise
        return None
    return counter.get_total_flops() / batch or None


def _timed(sampler: Sampler, steps: int, data: Dataset, seed: int, device: torch.device, batch: int) -> float:
    """Wall time (s) of one call of the sampler, from the noise on."""
    index = torch.arange(batch, device=device)
    noise = sampler.source(Key(seed), "noise", index, data.shape)
    label = data.drawn_condition(index)
    synchronise(device)
    began = time.perf_counter()
    sampler(steps, noise, label, Key(seed), index)
    synchronise(device)
    return time.perf_counter() - began


Moment = float | torch.cuda.Event
"""A time: of the clock, or of a GPU's stream."""


def moment(device: torch.device) -> Moment:
    """Now; on a GPU when the stream has come so far, which nothing waits for."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(began: Moment, ended: Moment) -> float:
    """From one moment to a later one of the same device; waits for that."""
    if isinstance(began, float) or isinstance(ended, float):
        assert isinstance(began, float)
        assert isinstance(ended, float)
        return ended - began
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3


def synchronise(device: torch.device) -> None:
    """Wait for what a GPU was given; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
