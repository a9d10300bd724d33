"""Rectified flow (Liu et al. 2209.03003): flow matching on pairs of noise and where a flow takes it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fewstep.condition import Condition
from fewstep.data.dataset import Batch
from fewstep.distill.jumps import jump_target
from fewstep.distill.objective import LossOutput, Objective, mean_square, root_mean_square
from fewstep.flow import LINEAR, Interpolant, VelocityField, expand
from fewstep.keys import Key
from fewstep.networks.dropout import keyed_dropout
from fewstep.times import Times, uniform

Prediction = Literal["velocity", "data", "noise"]
Distance = Callable[[Tensor], Tensor]
"""Deviation ``[B, *D]`` -> loss ``[B]``."""


@dataclass(frozen=True)
class PseudoHuber:
    """``(sqrt(||d||^2 + c^2) - c) / D``, ``c = scale D`` (Lee et al. 2405.20320): the constant grows with
    the number of coordinates, and not with its root as in improved consistency training."""

    scale: float

    def __call__(self, deviation: Tensor) -> Tensor:
        square, dim = deviation.flatten(1).square().sum(dim=1), deviation[0].numel()
        c = self.scale * dim
        return square / ((square + c**2).sqrt() + c) / dim  # without the cancellation of a difference


class Reflow(Objective):
    """``L = E w(t) loss( a(t) [v(x_t, t) - (e - x)] )``, ``x_t = (1 - t) x + t e``, over stored pairs ``(e, x)``.

    On pairs of a flow the lines from ``e`` to ``x`` cross less than those between any noise and any data, and what is
    learned from them is straighter: ``residual`` is its straightness ``S``, zero where one Euler step is exact.

    - ``times`` are of ``path``. The network works on the linear path all the same; there the loss of another path's
      velocity, of the data or of the noise (``prediction``; Rectified Diffusion, Wang et al. 2410.07303) is that of the
      linear velocity with a factor ``a(t)``: first-order paths are straight lines here, whatever they are elsewhere.
    - ``falling`` multiplies by ``w(t) = 1 - t`` of the linear time (Lee et al. 2405.20320).

    With ``times`` on the nodes ``1/N .. 1`` this is distillation to N steps (2209.03003): all of a line
    goes to its end. A batch without noise of its own is a ``ValueError``: any other noise would unlearn the flow.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        times: Times = uniform,
        path: Interpolant = LINEAR,
        prediction: Prediction = "velocity",
        loss: Distance = mean_square,
        falling: bool = False,
    ) -> None:
        super().__init__()
        self.student = student
        self.times = times
        self.path = path
        self.prediction = prediction
        self.loss = loss
        self.falling = falling

    def forward(self, batch: Batch, key: Key) -> LossOutput:
        x, e = batch.x, batch.noise
        if e is None:
            raise ValueError("reflow trains on pairs: these batches have no noise of their own")
        time = self.times(key.uniform("time", batch.index))
        t = (time if self.path is LINEAR else self.path.linear_time(time)).to(torch.float32)
        target = jump_target(e, x, torch.ones_like(t), torch.zeros_like(t))

        with keyed_dropout(self.student, key, batch.index):
            v = self.student(LINEAR.sample(x, e, t).x_t, t, t, batch.label)
        deviation = v - target
        loss = self.loss(expand(self.factor(time, t), deviation) * deviation)
        if self.falling:
            loss = loss * (1 - t)
        return LossOutput(loss, mean_square(deviation.detach()), t, {"v_norm": root_mean_square(v)})

    def factor(self, time_B: Tensor, t_B: Tensor) -> Tensor:
        """``a [B]`` float32, up to its sign: what an error ``dv`` of the linear velocity is in what is predicted."""
        if self.prediction == "data":
            return t_B
        if self.prediction == "noise":
            return 1 - t_B
        return torch.ones_like(t_B) if self.path is LINEAR else self.path.velocity_scale(time_B).float()


def nodes(steps: int) -> Times:
    """Times on the nodes ``1/N, 2/N, .., 1`` at which ``N`` Euler steps begin, equally often."""

    def times(u: Tensor) -> Tensor:
        return ((u * steps).floor() + 1) / steps

    return times


@torch.no_grad()
def pair_straightness(
    field: VelocityField, x: Tensor, e: Tensor, label_B: Condition | None = None, *, times: int = 32
) -> float:
    """``S = E || (e - x) - v(x_t, t) ||^2 / D`` over pairs ``[B, *D]`` and the middles of ``times`` equal parts of
    [0, 1] (2209.03003): zero for a flow along whose straight lines the pairs lie.

    On the pairs of the field itself it is what ``fewstep.evaluation.transport.straightness`` measures, but for the
    points: there on the paths, here on their chords.
    """
    total = 0.0
    for k in range(times):
        t_B = torch.full((len(x),), (k + 0.5) / times, dtype=torch.promote_types(torch.float32, x.dtype)).to(x.device)
        point = LINEAR.sample(x, e, t_B)
        total += float((point.v - field(point.x_t, t_B, label_B)).double().square().mean())
    return total / times
