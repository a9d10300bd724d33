"""Progressive distillation (Salimans and Ho 2202.00512) for flows: one stage of halving."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from fewstep.condition import Condition
from fewstep.data.dataset import Batch
from fewstep.distill.couplings import Noise, gaussian_noise
from fewstep.distill.flow_maps.guidance import GuidanceRange
from fewstep.distill.flow_maps.rows import Guided
from fewstep.distill.jumps import jump_target, solve
from fewstep.distill.objective import LossOutput, Objective, mean_square
from fewstep.distill.tangent import Net
from fewstep.distill.time_weights import TimeWeight, velocity_weight
from fewstep.flow import ANY_JUMP, LINEAR, FlowMap, TimeDomain, VelocityField, unchecked
from fewstep.grids import Grid, check_grid, thinned, uniform_nodes
from fewstep.keys import Key
from fewstep.networks.dropout import keyed_dropout
from fewstep.sampling import Solver
from fewstep.uploads import numbers


@dataclass(frozen=True)
class SolverMap:
    """``substeps`` equal solver steps over a velocity field, as a flow map: the teacher of the first stage. Any jump is
    legal."""

    field: VelocityField
    solver: Solver = "euler"
    substeps: int = 1
    domain: TimeDomain = ANY_JUMP

    @property
    def nfe(self) -> int:
        return self.field.nfe * self.substeps * (1 if self.solver == "euler" else 2)

    def __call__(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Condition | None = None) -> Tensor:
        return solve(self.field, self.solver, x, t_B, r_B, label_B, substeps=self.substeps)


@dataclass(frozen=True)
class Told:
    """Guidance that a student is told: ``draws`` for each row, and ``teacher(guidance [B, 3])``, the teacher under it.

    The student hears of the same scale and window as its teacher, in both of the teacher's steps.
    """

    draws: GuidanceRange
    teacher: Callable[[Tensor], FlowMap]


class ProgressiveStage(Objective):
    """A student learns two steps of its teacher at once::

        x_m = teacher(x_t, t -> m),  x_s = teacher(x_m, m -> s),   t, m, s consecutive nodes of the teacher's grid
        v*  = (x_s - x_t) / (s - t),   L = E w(t) || u(x_t, t, s) - v* ||^2 / D

    with ``x_t`` from real data and noise and ``t`` uniform on the student's own nodes, each second one of the
    ``teacher_grid``; ``m`` is the middle of ``[s, t]`` on a uniform grid and elsewhere not. A teacher that does not
    serve the jumps of its grid is refused here, not in training.

    Guidance is folded into the student: the teacher's own, or, with ``told``, what is drawn for each row. The grid is
    part of the state: a student of one grid is no student of another.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        teacher: FlowMap,
        teacher_grid: Grid,
        weight: TimeWeight = velocity_weight,
        told: Told | None = None,
        noise: Noise = gaussian_noise,
    ) -> None:
        super().__init__()
        check_grid(teacher_grid)
        self.student = student
        self.teacher = teacher
        self.teacher_grid = teacher_grid
        self.grid = thinned(teacher_grid, (len(teacher_grid) - 1) // 2)
        self.weight = weight
        self.told = told
        self.noise = noise
        for t, m in pairwise(teacher_grid):
            teacher.domain.check(t, m)

    @property
    def steps(self) -> int:
        """Of the student."""
        return len(self.grid) - 1

    def forward(self, batch: Batch, key: Key) -> LossOutput:
        x = batch.x
        e = self.noise(batch, key)
        node = (key.uniform("time", batch.index) * self.steps).floor().to(torch.int64)
        nodes = numbers(self.teacher_grid, x.device)
        t, m, s = nodes[2 * node], nodes[2 * node + 1], nodes[2 * node + 2]

        x_t = LINEAR.sample(x, e, t).x_t
        teacher: FlowMap = self.teacher
        net: Net = self.student
        if self.told is not None:
            guidance_B3 = self.told.draws.draw(key, batch.index)
            teacher, net = self.told.teacher(guidance_B3), Guided(self.student, guidance_B3)
        target = two_steps(unchecked(teacher), x_t, t, m, s, batch.label)
        with keyed_dropout(self.student, key, batch.index):
            residual = mean_square(net(x_t, t, s, batch.label) - target)
        return LossOutput(self.weight(t) * residual, residual.detach(), t, {})

    def extra_state(self) -> dict[str, Tensor]:
        return super().extra_state() | {GRID: torch.tensor(self.grid, dtype=torch.float64)}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Take back what ``extra_state`` gave; ``ValueError`` for the state of another grid."""
        super().load_extra_state({name: value for name, value in state.items() if name != GRID})
        check_same_grid(state, self.grid)


GRID = "grid"
"""The student's nodes among the extra state."""


def check_same_grid(state: dict[str, Tensor], grid: Grid) -> None:
    """``ValueError`` unless a state, as of ``ProgressiveStage.extra_state``, is of this grid."""
    before_there_were_others = torch.tensor(uniform_nodes(len(grid) - 1), dtype=torch.float64)
    saved = state.get(GRID, before_there_were_others).tolist()
    if saved != list(grid):
        raise ValueError(
            f"the checkpoint is of a student on the nodes {', '.join(f'{node:g}' for node in saved)}, "
            f"and this stage has {', '.join(f'{node:g}' for node in grid)}"
        )


@torch.no_grad()
def two_steps(
    teacher: Callable[..., Tensor], x_t: Tensor, t_B: Tensor, m_B: Tensor, s_B: Tensor, label_B: Condition | None = None
) -> Tensor:
    """``v*``: the average velocity over ``[s, t]`` of the teacher's two steps by way of ``m``, in full precision: of
    two close points, and every stage inherits the errors of the one before.

    For Euler steps it is ``[(t - m) v(x_t, t) + (m - s) v(x_m, m)] / (t - s)``.
    """
    with torch.autocast(x_t.device.type, enabled=False):
        x_m = teacher(x_t, t_B, m_B, label_B)
        x_s = teacher(x_m, m_B, s_B, label_B)
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
