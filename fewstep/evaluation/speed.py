"""Latency of a sampler."""

import statistics
import time

import torch

from fewstep.data.dataset import Dataset
from fewstep.keys import Key
from fewstep.sampling import Sampler


def latency_ms(
    sampler: Sampler,
    steps: int,
    data: Dataset,
    *,
    seed: int,
    device: torch.device,
    repeats: int = 15,
    warmup: int = 3,
) -> float:
    """Median wall time of one sample at batch size 1, in milliseconds, synchronised, after a warm-up."""
    index = torch.zeros(1, dtype=torch.int64, device=device)
    noise = sampler.source(Key(seed), "noise", index, data.shape)
    label = data.drawn_condition(index)
    taken = []
    for _ in range(warmup + repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        sampler(steps, noise, label, Key(seed), index)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return 1e3 * statistics.median(taken[warmup:])
