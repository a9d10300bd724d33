"""Progressive distillation (Salimans and Ho 2202.00512) for flows: one stage of halving."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from fewstep.data.dataset import Batch
from fewstep.distill.couplings import Noise, gaussian_noise
from fewstep.distill.jumps import jump_target
from fewstep.distill.objective import LossOutput, Objective, mean_square
from fewstep.flow import ANY_JUMP, LINEAR, FlowMap, TimeDomain, VelocityField, uniform_grid
from fewstep.keys import Key
from fewstep.networks.dropout import keyed_dropout
from fewstep.sampling import SOLVERS, Solver


@dataclass(frozen=True)
class SolverMap:
    """One solver step over a velocity field, as a flow map: the teacher of the first stage. Any jump is legal."""

    field: VelocityField
    solver: Solver = "euler"
    domain: TimeDomain = ANY_JUMP

    @property
    def nfe(self) -> int:
        return self.field.nfe * (1 if self.solver == "euler" else 2)

    def __call__(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        return SOLVERS[self.solver](self.field, x, t_B, r_B, label_B).x


class ProgressiveStage(Objective):
    """A student of ``steps`` steps learns two steps of its teacher at once::

        x_m = teacher(x_t, t -> m),  x_s = teacher(x_m, m -> s),   m the middle of [s, t]
        v*  = (x_s - x_t) / (s - t),   L = E || u(x_t, t, s) - v* ||^2 / D

    with ``x_t`` from real data and noise and ``t`` uniform on the student's own nodes. The teacher's grid is the
    student's with its midpoints inserted: a teacher that does not serve those jumps is refused here, not in training.
    Guidance belongs to the teacher, and is thereby folded into the student.
    """

    def __init__(self, student: nn.Module, *, teacher: FlowMap, steps: int, noise: Noise = gaussian_noise) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.steps = steps
        self.noise = noise
        fine = uniform_grid(2 * steps).tolist()
        for t, m in pairwise(fine):
            teacher.domain.check(t, m)

    def forward(self, batch: Batch, key: Key) -> LossOutput:
        x = batch.x
        e = self.noise(batch, key)
        node = (key.uniform("time", batch.index) * self.steps).floor().to(torch.int64)
        fine = uniform_grid(2 * self.steps).to(x.device)
        t, m, s = fine[2 * node], fine[2 * node + 1], fine[2 * node + 2]

        x_t = LINEAR.sample(x, e, t).x_t
        target = self.target(x_t, t, m, s, batch.label)
        with keyed_dropout(self.student, key, batch.index):
            loss = mean_square(self.student(x_t, t, s, batch.label) - target)
        return LossOutput(loss, loss.detach(), t, {})

    @torch.no_grad()
    def target(self, x_t: Tensor, t_B: Tensor, m_B: Tensor, s_B: Tensor, label_B: Tensor | None) -> Tensor:
        """``v*``: the average velocity over ``[s, t]`` of the teacher's two steps, in full precision: of two close
        points, and every stage inherits the errors of the one before."""
        with torch.autocast(x_t.device.type, enabled=False):
            x_m = self.teacher(x_t, t_B, m_B, label_B)
            x_s = self.teacher(x_m, m_B, s_B, label_B)
        return jump_target(x_t, x_s, t_B, s_B)


def stage_steps(start: int, end: int) -> tuple[int, ...]:
    """Student step counts ``start / 2, start / 4, ..., end``. ``ValueError`` unless their ratio is a power of two."""
    counts, steps = [], start
    while steps > end:
        if steps % 2:
            raise ValueError(f"{start} steps cannot be halved down to {end}: {steps} is odd")
        steps //= 2
        counts.append(steps)
    if not counts or steps != end:
        raise ValueError(f"{start} steps cannot be halved down to {end}")
    return tuple(counts)


def stage_domain(steps: int) -> TimeDomain:
    """The jumps between consecutive nodes of a stage's uniform grid."""
    return TimeDomain("grid", tuple(uniform_grid(steps).tolist()))
