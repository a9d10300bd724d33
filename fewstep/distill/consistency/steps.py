"""Which times are compared: every sample's ``t``, the time ``q <= t`` of the state that is its target's, and the end
``b``.

A draw is a function ``(key, index [B]) -> Hop``, of (seed, step, sample index) alone. Noise levels are
``sigma = t / (1 - t)``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.distill.consistency.schedules import Intervals
from fewstep.keys import Key
from fewstep.times import Times, jump_rows
from fewstep.uploads import numbers, on_device


@dataclass(frozen=True)
class Hop:
    """One step towards data per sample, from ``t [B]`` to ``q [B]``, in a segment that ends at ``b [B]``:
    ``b <= q <= t``, and 0 for a map that goes to data. ``factor [B]`` is what its loss counts (None: one)."""

    t: Tensor
    q: Tensor
    b: Tensor
    factor: Tensor | None = None

    def like(self, x: Tensor) -> "Hop":
        """In the precision of the samples."""
        factor = None if self.factor is None else self.factor.to(x)
        return Hop(self.t.to(x), self.q.to(x), self.b.to(x), factor)


Draw = Callable[[Key, Tensor], Hop]

Nodes = Callable[[int], tuple[Tensor, Tensor]]
"""Intervals -> decreasing times from 1 to 0, one more than that, and their noise levels."""


def even_nodes(intervals: int) -> tuple[Tensor, Tensor]:
    """Equal steps in ``t``."""
    t = 1 - torch.arange(intervals + 1, dtype=torch.float32) / intervals
    return t, t.double() / (1 - t.double())


def karras_nodes(intervals: int, *, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> tuple[Tensor, Tensor]:
    """``sigma_i = (high^(1/rho) + i / n (low^(1/rho) - high^(1/rho)))^rho`` (Karras et al. 2206.00364, equation 5).

    The first time is 1 and not 80/81, because that is where sampling starts; the last is 0, where every state is its
    own data prediction.
    """
    i = torch.arange(intervals + 1, dtype=torch.float64) / intervals
    sigma = (high ** (1 / rho) + i * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    t = sigma / (1 + sigma)
    t[0], t[-1] = 1.0, 0.0
    return t, sigma


NODES: dict[str, Nodes] = {"uniform": even_nodes, "karras": karras_nodes}


@dataclass(frozen=True)
class GridSteps:
    """Neighbouring nodes of a grid, ``b = 0``: each interval alike, or with the probability that ``ln sigma ~ N(mean,
    std^2)`` gives it (Song and Dhariwal 2310.14189, section 3.5), for ``log_normal = (mean, std)``."""

    nodes: Nodes
    intervals: Intervals
    log_normal: tuple[float, float] | None = None

    def __call__(self, key: Key, index_B: Tensor) -> Hop:
        count = self.intervals(key.step)
        u = key.uniform("time", index_B)
        t = on_device(_times, (self.nodes, count), u.device)
        if self.log_normal is None:
            k = (u * count).floor().long()
        else:
            edges = on_device(_edges, (self.nodes, count, *self.log_normal), u.device)
            k = torch.searchsorted(edges, u * edges[-1]).clamp(max=count - 1)
        return Hop(t[k], t[k + 1], torch.zeros_like(t[k]))


def _times(nodes: Nodes, intervals: int) -> Tensor:
    return nodes(intervals)[0]


def _edges(nodes: Nodes, intervals: int, mean: float, std: float) -> Tensor:
    return interval_masses(nodes(intervals)[1], mean, std).cumsum(0)


def interval_masses(sigma: Tensor, mean: float, std: float) -> Tensor:
    """What ``ln sigma ~ N(mean, std^2)`` gives each interval of decreasing noise levels."""
    return -torch.special.ndtr((sigma.log() - mean) / std).diff()


@dataclass(frozen=True)
class SegmentSteps:
    """Neighbouring nodes of a grid whose every ``count``-th part is a segment (Wang et al. 2405.18407).

    Of several ``counts`` each sample draws one, and ``b`` is the end of its segment in that grid, lowered by up to the
    share ``shrink`` (Wang et al. 2409.01347). The grid is the coarsest that holds the ends, of at least
    ``intervals`` intervals. With the one count 1 it is consistency distillation.
    """

    counts: tuple[int, ...]
    intervals: int
    shrink: float = 0.0

    def __call__(self, key: Key, index_B: Tensor) -> Hop:
        u = key.uniform("time", index_B)
        counts = numbers(self.counts, u.device, torch.float64)
        count = counts[(key.uniform("count", index_B) * len(counts)).long()]
        total = count * (self.intervals / count).ceil()
        k = (u * total).floor()
        segment = (k * count / total + 1e-9).floor()  # the offset: three sixths of two are one
        b = 1 - (segment + 1) / count
        q = torch.maximum(1 - (k + 1) / total, b)  # by rounding alone it would end beyond
        return Hop(1 - k / total, q, b * (1 - self.shrink * key.uniform("shrink", index_B)))


@dataclass(frozen=True)
class LevelSteps:
    """``sigma`` to ``sigma max(0, 1 - n(sigma) a)`` with ``n = 1 + 8 sigmoid(-sigma)`` (Geng et al.
    2406.14548), ``b = 0``. ``share`` is ``a`` of an optimiser step. Where nothing is left, the target is the data point
    itself."""

    times: Times
    share: Callable[[int], float]

    def __call__(self, key: Key, index_B: Tensor) -> Hop:
        t = self.times(key.uniform("time", index_B))
        return Hop(t, self.nearer(t, key.step), torch.zeros_like(t))

    def nearer(self, t_B: Tensor, step: int) -> Tensor:
        """The time ``q`` of every ``t``, float64."""
        t = t_B.double()
        sigma = t / (1 - t)
        kept = (1 - (1 + 8 * torch.sigmoid(-sigma)) * self.share(step)).clamp(min=0)
        return t * kept / (1 - t + t * kept)  # of the noise level kept * sigma


@dataclass(frozen=True)
class StageShare:
    """``a = max(q^-(stage + 1), 1 - largest)``: the steps of a stage are ``q`` times as fine as those of the one before
    (Geng et al. 2406.14548), until a state keeps the share ``largest`` of its noise."""

    stage: Callable[[int], int]
    base: float
    largest: float

    def __call__(self, step: int) -> float:
        return max(self.base ** -(self.stage(step) + 1), 1 - self.largest)


@dataclass(frozen=True)
class TruncatedSteps:
    """The steps of ``levels``, whose times begin at ``boundary``, and on the share ``boundary_fraction`` of rows ``t =
    boundary`` itself (Lee et al. 2410.14895).

    The mean loss is that of the former plus ``boundary_weight`` times that of the latter, whatever their shares.
    """

    levels: LevelSteps
    boundary: float
    boundary_fraction: float
    boundary_weight: float

    def __call__(self, key: Key, index_B: Tensor) -> Hop:
        hop = self.levels(key, index_B)
        at_boundary = jump_rows(index_B, self.boundary_fraction)
        t = torch.where(at_boundary, torch.full_like(hop.t, self.boundary), hop.t)
        share = self.boundary_fraction
        factor = torch.where(at_boundary, self.boundary_weight / share, 1 / (1 - share))
        return Hop(t, self.levels.nearer(t, key.step), hop.b, factor)


@dataclass(frozen=True)
class ConstantSteps:
    """``t`` uniform and ``q = t - length``, in ``segments`` equal ones (Yang et al. 2407.02398); where
    ``q`` would lie beyond the segment or below ``near_data``, it is the segment's end, hence a point that is known."""

    segments: int
    length: float
    near_data: float

    def __call__(self, key: Key, index_B: Tensor) -> Hop:
        t = key.uniform("time", index_B)
        b = ((t * self.segments).ceil() - 1) / self.segments
        q = t - self.length
        return Hop(t, torch.where((q <= b) | (q < self.near_data), b, q), b)
