"""Time grids: nodes from 1 (noise) down to 0 (data), as tuples of floats, so that one can be a subset of another to
the bit. ``N`` steps have ``N + 1`` nodes."""

import math
from itertools import pairwise

import torch

from fewstep.flow import uniform_grid

Grid = tuple[float, ...]

CLOSEST = 1e-5
"""Nodes have to be that far apart: times travel as float32, and jumps are told apart to 1e-6."""


def uniform_nodes(steps: int) -> Grid:
    """Equal steps in ``t``: ``t_i = i / N``."""
    return tuple(uniform_grid(steps, dtype=torch.float64).tolist())


def shifted_nodes(steps: int, shift: float) -> Grid:
    """``t -> a t / (1 + (a - 1) t)`` of the uniform grid, ``a = shift`` (Esser et al. 2403.03206, equation 23): above 1
    short steps near noise and long ones near data."""
    return tuple(t / (t + (1 - t) / shift) for t in uniform_nodes(steps))  # both ends exactly


def cosine_nodes(steps: int) -> Grid:
    """Equal steps in the angle of the cosine schedule: ``t_i = sin(phi_i) / (sin(phi_i) + cos(phi_i))``, ``phi_i = (i /
    N) pi / 2`` (the grid of Salimans and Ho 2202.00512, in flow time)."""
    angles = [math.pi / 2 * t for t in uniform_nodes(steps)]
    return tuple(math.sin(phi) / (math.sin(phi) + math.cos(phi)) for phi in angles)


def thinned(grid: Grid, steps: int) -> Grid:
    """The grid of ``steps`` steps that takes every ``k``-th node. ``ValueError`` unless ``steps`` divides the grid."""
    count = len(grid) - 1
    if steps < 1 or count % steps:
        raise ValueError(f"a grid of {count} steps does not thin to {steps}")
    return grid[:: count // steps]


def check_grid(grid: Grid) -> None:
    """``ValueError`` unless the nodes fall from 1 to 0 and lie ``CLOSEST`` apart."""
    if len(grid) < 2 or grid[0] != 1 or grid[-1] != 0:
        raise ValueError(f"a grid goes from t = 1 to t = 0, got {_listed(grid)}")
    for t, r in pairwise(grid):
        if not t - r >= CLOSEST:
            raise ValueError(f"the nodes of a grid fall by {CLOSEST:g} or more, got {t:.9g} and then {r:.9g}")


def _listed(grid: Grid) -> str:
    shown = [f"{node:g}" for node in grid]
    return ", ".join(shown if len(shown) <= 6 else [*shown[:3], "...", *shown[-2:]]) or "no nodes"
