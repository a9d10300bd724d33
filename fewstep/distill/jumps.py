"""Jumps of a solver as regression targets: what every method that copies a teacher's path has in common."""

import torch
from torch import Tensor

from fewstep.condition import Condition
from fewstep.flow import VelocityField, expand
from fewstep.sampling import SOLVERS, Solver


def jump_target(x_t: Tensor, x_s: Tensor, t_B: Tensor, s_B: Tensor) -> Tensor:
    """``(x_t - x_s) / (t - s)``, ``[B, *D]``: the average velocity of a jump from ``x_t`` at ``t`` to ``x_s`` at ``s``.

    What progressive distillation (2202.00512), windowed reflow (2405.07510), trajectory regression (2509.24526) and
    the distillation of straightened flows (2209.03003) regress on. They differ in who jumps, from where, and how far.
    """
    return (x_t - x_s) / expand(t_B - s_B, x_t)


@torch.no_grad()
def solve(
    field: VelocityField,
    solver: Solver,
    x_t: Tensor,
    t_B: Tensor,
    s_B: Tensor,
    label_B: Condition | None = None,
    *,
    substeps: int = 1,
) -> Tensor:
    """The state at ``s [B]`` after ``substeps`` equal solver steps from ``x_t [B, *D]`` at ``t [B]``.

    In full precision: targets are differences of close points, and a student inherits their errors.
    """
    x = x_t
    with torch.autocast(x_t.device.type, enabled=False):
        for k in range(substeps):
            a, b = (torch.lerp(t_B, s_B, share / substeps) for share in (k, k + 1))
            x = SOLVERS[solver](field, x, a, b, label_B).x
    return x
