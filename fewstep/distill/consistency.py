"""Consistency distillation (Song et al. 2303.01469, Algorithm 2) in flow time."""

import copy

import torch
from torch import Tensor, nn

from fewstep.data.dataset import Batch
from fewstep.distill.objective import LossOutput, Objective
from fewstep.flow import LINEAR, VelocityField, expand
from fewstep.keys import Key
from fewstep.sampling import SOLVERS, Solver
from fewstep.students.maps import consistency_velocity


class ConsistencyDistillation(Objective):
    """Make the data prediction agree along the teacher's trajectory::

        f(x, t) = x - t F(x, t),   x_r = one teacher step from x_t,   t, r consecutive nodes of a grid
        L = E d( f(x_t, t), sg f'(x_r, r) ) / (t - r)

    ``f'`` is an exponential moving average of the student with decay ``target_decay`` (0: the student itself). ``d`` is
    the pseudo-Huber distance ``sqrt(||.||^2 + c^2) - c`` with ``c = 0.00054 sqrt(D) huber`` (2310.14189), or the mean
    square for ``huber = 0``. Nodes are uniform in ``t``; a jump that ends at ``r = 0`` has the teacher's own point
    as its target. The factor ``1 / (t - r)`` keeps the gradient's size when the grid is refined.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        teacher: VelocityField,
        solver: Solver,
        nodes: int,
        target_decay: float,
        huber: float,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.solver = solver
        self.nodes = nodes
        self.target_decay = target_decay
        self.huber = huber
        # In a tuple, so that it is not a submodule: the target is neither trained nor prepared.
        self._target = (copy.deepcopy(student).requires_grad_(False),) if target_decay else ()

    def forward(self, batch: Batch, key: Key) -> LossOutput:
        x = batch.x
        e = key.normal("noise", batch.index, tuple(x.shape[1:]))
        node = (key.uniform("time", batch.index) * self.nodes).floor().to(x)
        t, r = 1 - node / self.nodes, 1 - (node + 1) / self.nodes

        x_t = LINEAR.sample(x, e, t).x_t
        with torch.no_grad():
            x_r = SOLVERS[self.solver](self.teacher, x_t, t, r, batch.label).x
            target = self.predict(self.target_network, x_r, r, batch.label)
        difference = (self.predict(self.student, x_t, t, batch.label) - target).flatten(1)

        square = difference.square().sum(dim=1)
        dim = difference.shape[1]
        if self.huber:
            c = 0.00054 * dim**0.5 * self.huber
            distance = (square + c**2).sqrt() - c
        else:
            distance = square / dim
        return LossOutput(distance / (t - r), {"residual": square.detach().mean() / dim})

    @property
    def target_network(self) -> nn.Module:
        return self._target[0] if self._target else self.student

    @staticmethod
    def predict(net: nn.Module, x: Tensor, t_B: Tensor, label_B: Tensor | None) -> Tensor:
        """``f(x, t) = x - t F(x, t)``."""
        return x - expand(t_B, x) * consistency_velocity(net, x, t_B, label_B)

    @torch.no_grad()
    def after_step(self) -> None:
        if self._target:
            target: list[Tensor] = [*self._target[0].parameters()]
            online: list[Tensor] = [*self.student.parameters()]
            torch._foreach_lerp_(target, online, 1 - self.target_decay)

    def extra_state(self) -> dict[str, Tensor]:
        return {f"target.{name}": value for name, value in self._target[0].state_dict().items()} if self._target else {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        if self._target:
            self._target[0].load_state_dict({name.removeprefix("target."): value for name, value in state.items()})
        else:
            super().load_extra_state(state)
