"""How fine the steps of a consistency training are: functions of the optimiser step ``k`` of ``K``, so that a resumed
run cannot lose them. Grids are counted in intervals, one less than the papers' ``N(k)`` of nodes."""

import math
from collections.abc import Callable
from dataclasses import dataclass

Intervals = Callable[[int], int]
"""Optimiser step -> intervals of the grid."""


@dataclass(frozen=True)
class Constant:
    """``nodes`` intervals throughout."""

    nodes: int

    def __call__(self, step: int) -> int:
        return self.nodes


@dataclass(frozen=True)
class Doubling:
    """``start_nodes 2^j`` up to ``nodes``, ``j`` growing by one in equal parts of the training."""

    start_nodes: int
    nodes: int
    total_steps: int

    def __call__(self, step: int) -> int:
        parts = (self.nodes // self.start_nodes).bit_length()
        return self.start_nodes * 2 ** min(parts - 1, step * parts // self.total_steps)


@dataclass(frozen=True)
class WholeDoubling:
    """``N(k) = min(s0 2^floor(k / K'), s1) + 1`` with ``K' = floor(K / (log2(s1 / s0) + 1))`` (Song and Dhariwal
    2310.14189, section 3.4): as ``Doubling``, in parts of a whole number of steps; what is left over goes to the
    last."""

    start_nodes: int
    nodes: int
    total_steps: int

    def __call__(self, step: int) -> int:
        part = max(1, math.floor(self.total_steps / (math.log2(self.nodes / self.start_nodes) + 1)))
        # Beyond this many doublings the bound has long been reached.
        return min(self.start_nodes * 2 ** min(step // part, 64), self.nodes)


@dataclass(frozen=True)
class SquareRoot:
    """``N(k) = ceil(sqrt(k / K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1`` (Song et al. 2303.01469, appendix C)."""

    start_nodes: int
    nodes: int
    total_steps: int

    def __call__(self, step: int) -> int:
        s0, s1 = self.start_nodes, self.nodes
        # The small offset keeps roots that are whole numbers from being rounded up.
        root = math.sqrt(step / self.total_steps * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1
        return min(max(1, math.ceil(root - 1e-9)), s1)


@dataclass(frozen=True)
class FollowingDecay:
    """``mu(k) = exp(s0 ln(mu0) / (N(k) - 1))``: a finer grid is followed more slowly (the same appendix)."""

    first: float
    start_nodes: int
    intervals: Intervals

    def __call__(self, step: int) -> float:
        return math.exp(self.start_nodes * math.log(self.first) / self.intervals(step))


@dataclass(frozen=True)
class Stages:
    """Which of ``count`` equal parts of the training a step belongs to, from 0; the last one for ever after."""

    count: int
    total_steps: int

    def __call__(self, step: int) -> int:
        return min(self.count - 1, step * self.count // self.total_steps)
