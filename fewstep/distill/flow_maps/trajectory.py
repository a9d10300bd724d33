"""Trajectory regression (consistency mid-training, Hu et al. 2509.24526): jumps of the teacher, solved and copied."""

import torch
from torch import Tensor, nn

from fewstep.condition import Condition
from fewstep.data.dataset import Batch
from fewstep.distill.couplings import Noise, gaussian_noise
from fewstep.distill.flow_maps.weights import Weight, plain
from fewstep.distill.jumps import jump_target
from fewstep.distill.objective import LossOutput, Objective, mean_square
from fewstep.flow import VelocityField
from fewstep.keys import Key
from fewstep.networks.dropout import keyed_dropout
from fewstep.sampling import SOLVERS, Solver


class TrajectoryRegression(Objective):
    """Solve the teacher's flow from noise and regress the average velocity between its nodes::

        x_0 = e at t_0 = 1,   x_{k+1} = one solver step of the teacher from x_k to t_{k+1},   ...,   t_N = 0
        L = E weight( u(x_i, t_i, t_j) - (x_i - x_j) / (t_i - t_j) ),   i < j

    The target is a number, not the student's own opinion, and needs no data: it cannot run away, and its error is the
    solver's. ``N = nodes`` consecutive samples of a batch share a trajectory, the ``i``-th of them starting at its
    ``i``-th node with the end ``j`` drawn evenly from the later ones: ``N`` steps of the teacher serve ``N`` rows. The
    inner nodes of each trajectory are evenly spaced with an offset of its own, so that no time is left out. Batches
    have to hold whole trajectories, or what a sample sees depends on the batch it is in.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        teacher: VelocityField,
        solver: Solver,
        nodes: int,
        weight: Weight = plain,
        noise: Noise = gaussian_noise,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.solver = solver
        self.nodes = nodes
        self.weight = weight
        self.noise = noise

    def forward(self, batch: Batch, key: Key) -> LossOutput:
        first = slice(None, None, self.nodes)
        e = self.noise(batch, key)[first]
        label = None if batch.label is None else batch.label[first]
        times_GN = self.times(key, batch.index[first])
        states_GN = self.solve(e, times_GN, label)

        group = torch.arange(len(batch.index), device=e.device) // self.nodes
        i = batch.index % self.nodes
        u_B = key.uniform("end", batch.index)
        j = i + 1 + (u_B * (self.nodes - i)).long()
        t, r, x_t, x_r = times_GN[group, i], times_GN[group, j], states_GN[group, i], states_GN[group, j]
        target = jump_target(x_t, x_r, t, r)
        with keyed_dropout(self.student, key, batch.index):
            delta = self.student(x_t, t, r, None if label is None else label[group]) - target
        return LossOutput(self.weight(delta, t, r), mean_square(delta.detach()), t, {})

    def times(self, key: Key, index_G: Tensor) -> Tensor:
        """Nodes ``[G, N + 1]`` from 1 to 0, float32: the ``k``-th inner one at ``1 - (k - 1 + a) / (N - 1)``."""
        offset = key.uniform("offset", index_G)
        inner = torch.arange(self.nodes - 1, device=index_G.device)
        t = 1 - (inner + offset[:, None]) / max(self.nodes - 1, 1)
        one = torch.ones_like(offset)[:, None]
        return torch.cat((one, t, torch.zeros_like(one)), dim=1).float()

    @torch.no_grad()
    def solve(self, e: Tensor, times_GN: Tensor, label: Condition | None) -> Tensor:
        """The teacher's states at all nodes, ``[G, N + 1, *D]``, in full precision: differences of close ones count."""
        states = [e]
        with torch.autocast(e.device.type, enabled=False):
            for t, r in zip(times_GN[:, :-1].unbind(1), times_GN[:, 1:].unbind(1), strict=True):
                states.append(SOLVERS[self.solver](self.teacher, states[-1], t, r, label).x)
        return torch.stack(states, dim=1)
