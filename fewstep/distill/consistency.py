"""Consistency distillation (Song et al. 2303.01469, Algorithm 2) in flow time."""

import torch
from torch import Tensor, nn

from fewstep.data.dataset import Batch
from fewstep.distill.couplings import Noise, gaussian_noise
from fewstep.distill.objective import LossOutput, TargetedObjective
from fewstep.flow import LINEAR, VelocityField, expand
from fewstep.keys import Key
from fewstep.networks.dropout import keyed_dropout
from fewstep.sampling import SOLVERS, Solver
from fewstep.students.maps import consistency_velocity


class ConsistencyDistillation(TargetedObjective):
    """Make the data prediction agree along the teacher's trajectory::

        f(x, t) = x - t F(x, t),   x_r = one teacher step from x_t,   t, r consecutive nodes of a grid
        L = E d( f(x_t, t), sg f'(x_r, r) ) / (t - r)

    ``f'`` is an exponential moving average of the student with decay ``target_decay`` (0: the student itself). ``d`` is
    the pseudo-Huber distance ``sqrt(||.||^2 + c^2) - c`` with ``c = 0.00054 sqrt(D) huber`` (2310.14189), or the mean
    square for ``huber = 0``. A jump that ends at ``r = 0`` has the teacher's own point as its target. The factor
    ``1 / (t - r)`` keeps the gradient's size when the grid is refined.

    Nodes are uniform in ``t``. With ``start_nodes`` their number doubles from there to ``nodes`` in equal parts of
    ``total_steps`` (the discretisation curriculum of 2310.14189, section 3.4): what is known at ``t = 0`` reaches
    ``t = 1`` in ``N`` hops, so a coarse grid carries it there fast and a fine one removes the bias.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        teacher: VelocityField,
        solver: Solver,
        nodes: int,
        start_nodes: int | None = None,
        total_steps: int = 1,
        target_decay: float,
        huber: float,
        noise: Noise = gaussian_noise,
    ) -> None:
        super().__init__(student, target_decay)
        self.teacher = teacher
        self.solver = solver
        self.nodes = nodes
        self.start_nodes = start_nodes or nodes
        self.total_steps = total_steps
        self.huber = huber
        self.noise = noise

    def forward(self, batch: Batch, key: Key) -> LossOutput:
        x = batch.x
        e = self.noise(batch, key)
        nodes = self.nodes_at(key.step)
        node = (key.uniform("time", batch.index) * nodes).floor().to(x)
        t, r = 1 - node / nodes, 1 - (node + 1) / nodes

        x_t = LINEAR.sample(x, e, t).x_t
        with torch.no_grad():
            x_r = SOLVERS[self.solver](self.teacher, x_t, t, r, batch.label).x
            with keyed_dropout(self.target_network, key, batch.index):
                target = self.predict(self.target_network, x_r, r, batch.label)
        with keyed_dropout(self.student, key, batch.index):
            difference = (self.predict(self.student, x_t, t, batch.label) - target).flatten(1)

        square = difference.square().sum(dim=1)
        dim = difference.shape[1]
        if self.huber:
            c = 0.00054 * dim**0.5 * self.huber
            distance = (square + c**2).sqrt() - c
        else:
            distance = square / dim
        return LossOutput(distance / (t - r), square.detach() / dim, t, {})

    def nodes_at(self, step: int) -> int:
        """``N(k) = start_nodes 2^j`` with ``j`` growing by one in equal parts of the training, up to ``nodes``."""
        parts = (self.nodes // self.start_nodes).bit_length()
        return self.start_nodes * 2 ** min(parts - 1, step * parts // self.total_steps)

    @staticmethod
    def predict(net: nn.Module, x: Tensor, t_B: Tensor, label_B: Tensor | None) -> Tensor:
        """``f(x, t) = x - t F(x, t)``."""
        return x - expand(t_B, x) * consistency_velocity(net, x, t_B, label_B)
