"""Self-corrected flow distillation (SCFlow, Dao et al. 2412.16906), the consistency part: without its adversary."""

import torch
from torch import Tensor, nn

from fewstep.condition import Condition
from fewstep.data.dataset import Batch
from fewstep.distill.consistency.measures import CoordinateHuber
from fewstep.distill.couplings import Noise, gaussian_noise
from fewstep.distill.flow_maps.weights import Weight, plain
from fewstep.distill.jumps import solve
from fewstep.distill.objective import LossOutput, TargetedObjective, mean_square
from fewstep.flow import LINEAR, VelocityField, expand
from fewstep.keys import Key
from fewstep.networks.dropout import keyed_dropout


class SelfCorrected(TargetedObjective):
    """The jump to data agrees with the one from nearer to data, the one from farther away, and the one from noise::

        d ~ U(0, min(t, reach)),  d' ~ U(0, min(1 - t, reach)),   x_{t-d}, x_{t+d'} one Euler step of the teacher off
        y = sg f(e, 1),   y_t = (1 - t) y + t e
        L = E H( f(x_t, t) - sg f'(x_{t-d}, t - d) )                   (the data point itself where t - d < data_below)
          + outward_weight  E H( f(x_t, t) - sg f'(x_{t+d'}, t + d') )
          + straight_weight E || f(y_t, t) - y ||^2 / D

    ``H`` is a Huber distance per coordinate, ``f'`` an average of the student with ``target_decay``. The last term asks
    that the line from noise to its own sample be its trajectory, which holds for straight flows alone.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        teacher: VelocityField,
        reach: float = 0.1,
        data_below: float = 0.4,
        outward_weight: float = 0.1,
        straight_weight: float = 0.1,
        distance: Weight | None = None,
        target_decay: float = 0.9,
        noise: Noise = gaussian_noise,
    ) -> None:
        super().__init__(student, target_decay)
        self.teacher = teacher
        self.reach = reach
        self.data_below = data_below
        self.outward_weight = outward_weight
        self.straight_weight = straight_weight
        self.distance = distance or CoordinateHuber(0.01)
        self.noise = noise

    def forward(self, batch: Batch, key: Key) -> LossOutput:
        x, e = batch.x, self.noise(batch, key)
        t, inner, outer = (time.to(x) for time in self.times(key, batch.index))
        one = torch.ones_like(t)
        x_t = LINEAR.sample(x, e, t).x_t

        with torch.no_grad(), keyed_dropout(self.target_network, key, batch.index):
            nearer = solve(self.teacher, "euler", x_t, t, inner, batch.label)
            farther = solve(self.teacher, "euler", x_t, t, outer, batch.label)
            inward = self.jump(self.target_network, nearer, inner, batch.label)
            outward = self.jump(self.target_network, farther, outer, batch.label)
        inward = torch.where(expand(inner < self.data_below, x), x, inward)
        with keyed_dropout(self.student, key, batch.index):
            with torch.no_grad():
                own = self.jump(self.student, e, one, batch.label)
            jumped = self.jump(self.student, x_t, t, batch.label)
            straight = self.jump(self.student, LINEAR.sample(own, e, t).x_t, t, batch.label) - own

        zero, line = torch.zeros_like(t), plain(straight, t, one)
        loss = self.distance(jumped - inward, t, zero) + self.straight_weight * line
        loss = loss + self.outward_weight * self.distance(jumped - outward, t, zero)
        return LossOutput(loss, mean_square((jumped - inward).detach()), t, {"straight_residual": line.detach()})

    def times(self, key: Key, index_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``t``, ``t - d`` and ``t + d'``, each ``[B]``."""
        t = key.uniform("time", index_B)
        inner = t - key.uniform("inward", index_B) * t.clamp(max=self.reach)
        outer = t + key.uniform("outward", index_B) * (1 - t).clamp(max=self.reach)
        return t, inner, outer

    @staticmethod
    def jump(net: nn.Module, x: Tensor, t_B: Tensor, label_B: Condition | None) -> Tensor:
        """``f(x, t) = x - t F(x, t)``."""
        return x - expand(t_B, x) * net(x, t_B, torch.zeros_like(t_B), label_B)
