"""How fast this machine multiplies matrices: the rate that no network exceeds."""

import statistics

import torch

from fewstep.bench.measure import timed

SIDES = {"cpu": 1024, "cuda": 8192}
"""Large enough for the rate to rise no further, small enough for a product to take milliseconds."""


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.float32, *, side: int = 0, repeats: int = 9) -> float:
    """Operations per second of square matrix products of ``side`` (0: what suits the device) in ``dtype``, with the
    threads that torch has now: the median of a few after two that do not count. A multiply-add is two."""
    side = side or SIDES["cuda" if device.type == "cuda" else "cpu"]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    taken = [timed(lambda: torch.mm(a, b, out=out), device).wall for _ in range(repeats + 2)][2:]
    return 2e3 * side**3 / statistics.median(taken)
