"""Piecewise rectified flow (PeRFlow, Yan et al. 2405.07510): a flow that is straight within windows of time."""

import torch
from torch import Tensor, nn

from fewstep.data.dataset import Batch
from fewstep.distill.couplings import Noise, gaussian_noise
from fewstep.distill.jumps import jump_target, solve
from fewstep.distill.objective import LossOutput, Objective, mean_square
from fewstep.flow import LINEAR, VelocityField, expand, uniform_grid
from fewstep.keys import Key
from fewstep.networks.dropout import keyed_dropout
from fewstep.sampling import Solver
from fewstep.uploads import on_device


class PiecewiseReflow(Objective):
    """Solve the teacher's flow through one window and regress its chord::

        x_S = (1 - S) x + S e at the start S of a window [E, S],   x_E = the teacher's solution at its end
        v*  = (x_S - x_E) / (S - E),   x_t = x_E + (t - E) v*,   t uniform in the window
        L   = E || v(x_t, t) - v* ||^2 / D + direction (1 - cos(v, v*))

    The ``windows`` are equal parts of [0, 1], drawn equally often. Nothing is saved: data are noised to the start of a
    window, where only a part of the teacher's flow is left to be solved, by ``substeps`` steps. Guidance belongs to the
    teacher. ``direction`` is ProReflow's (Ke et al. 2503.04824): where the student has the right speed in a wrong
    direction. With one substep per window the student is taught the Euler teacher on the windows' nodes.

    ``start_share`` of the rows are at ``t = S`` exactly. The student's velocity has to jump there, from one window's
    chord to the next, and where its steps begin is where it counts: a network whose time embedding is smooth gives a
    mean of both chords instead, unless that point weighs more than those just above it.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        teacher: VelocityField,
        windows: int,
        solver: Solver,
        substeps: int,
        direction: float = 0.0,
        start_share: float = 0.0,
        noise: Noise = gaussian_noise,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.windows = windows
        self.solver = solver
        self.substeps = substeps
        self.direction = direction
        self.start_share = start_share
        self.noise = noise

    def forward(self, batch: Batch, key: Key) -> LossOutput:
        window = (key.uniform("window", batch.index) * self.windows).long()
        grid = on_device(uniform_grid, (self.windows,), batch.x.device)
        start, end = grid[window], grid[window + 1]
        x_start = LINEAR.sample(batch.x, self.noise(batch, key), start).x_t
        x_end = solve(self.teacher, self.solver, x_start, start, end, batch.label, substeps=self.substeps)
        target = jump_target(x_start, x_end, start, end)

        u, at_start = key.uniform("time", batch.index), self.start_share
        share = torch.where(u < at_start, 1.0, (u - at_start) / (1 - at_start)) if at_start else u
        t = torch.lerp(end, start, share.to(torch.float32))
        x_t = x_end + expand(t.to(x_end.dtype) - end.to(x_end.dtype), x_end) * target
        with keyed_dropout(self.student, key, batch.index):
            v = self.student(x_t, t, t, batch.label)
        residual = mean_square(v - target)
        away = 1 - cosine(v, target)
        loss = residual + self.direction * away if self.direction else residual
        return LossOutput(loss, residual.detach(), t, {"misalignment": away.detach()})


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """``<a, b> / (||a|| ||b||)`` per sample, ``[B, *D] -> [B]``."""
    return nn.functional.cosine_similarity(one.flatten(1), other.flatten(1), dim=1)
