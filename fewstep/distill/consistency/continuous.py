"""Continuous-time consistency models (Lu and Song 2410.11081): the step between the two points shrunk to nothing."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fewstep.data.dataset import Batch
from fewstep.distill.consistency.trigflow import Angle
from fewstep.distill.couplings import Noise, gaussian_noise
from fewstep.distill.flow_maps.weights import Likelihood, Weight
from fewstep.distill.objective import LossOutput, Objective, mean_square, root_mean_square
from fewstep.distill.tangent import Derivative
from fewstep.flow import LINEAR, VelocityField, expand
from fewstep.keys import Key
from fewstep.networks.dropout import keyed_dropout
from fewstep.times import Times, sample_times

Form = Literal["trigflow", "flow"]


@dataclass(frozen=True)
class Tangent:
    """The student's output in the coordinates of a form, with gradient, and how far it is from resting, without."""

    output: Tensor
    g: Tensor


class ContinuousConsistency(Objective):
    """Let the jump to data stay where it is while its start flows along ``v``::

        flow       g = v - F - k t dF/dt                                           f = x_t - t F
        trigflow   g = cos^2 (dz/dphi - G) - k cos sin (z + dG/dphi)               f = cos z - sin G
        L = E weight( N - sg(N + g / (||g|| + normalise)) ),    N the network of the form, F or G

    with ``k = min(1, step / warmup_steps)``. At ``k = 1`` both ``g`` are the derivative of ``f`` along the path,
    ``df/dt`` and ``cos df/dphi``, and differ by the factor ``s (1 - t) / c``: the forms agree on where the student
    rests and differ in what each time weighs. TrigFlow's losses are divided by ``sigma = t / (1 - t)`` besides, the
    paper's prior weight. Norms are per coordinate; ``normalise = 0`` leaves ``g`` as it is. ``v`` is the teacher's
    where there is one (``teacher``), else ``e - x``. The flow form is MeanFlow with every jump to data.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        form: Form,
        times: Times,
        derivative: Derivative,
        teacher: VelocityField | None = None,
        data_std: float = 0.5,
        normalise: float = 0.1,
        warmup_steps: int = 0,
        weight: Weight | None = None,
        noise: Noise = gaussian_noise,
    ) -> None:
        super().__init__()
        self.student = student
        self.form = form
        self.times = times
        self.derivative = derivative
        self.teacher = teacher
        self.data_std = data_std
        self.normalise = normalise
        self.warmup_steps = warmup_steps
        self.weight = Likelihood() if weight is None else weight
        self.noise = noise

    def forward(self, batch: Batch, key: Key) -> LossOutput:
        t = sample_times(self.times, key, "time", batch.index).to(batch.x)
        point = LINEAR.sample(batch.x, self.noise(batch, key), t)
        v = point.v
        if self.teacher is not None:
            with torch.no_grad():
                v = self.teacher(point.x_t, t, batch.label)

        zero = torch.zeros_like(t)
        assert self.derivative is not None
        with keyed_dropout(self.student, key, batch.index):
            slope = self.derivative(self.student, point.x_t, v, t, zero, batch.label)
            output = self.student(point.x_t, t, zero, batch.label).to(point.x_t)
        tangent = self.tangent(point.x_t, v, t, output, slope, self.warmed(key.step))

        g = tangent.g
        target = tangent.output.detach() + (self.normalised(g) if self.normalise else g)
        delta = tangent.output - target
        if self.form == "trigflow":
            delta = delta * expand(((1 - t) / t).sqrt(), delta)
        loss = self.weight(delta, t, zero)
        return LossOutput(loss, mean_square(g), t, {"jvp_norm": root_mean_square(slope)})

    def tangent(self, x_t: Tensor, v: Tensor, t_B: Tensor, net: Tensor, slope: Tensor, k: float) -> Tangent:
        """``g`` from the flow's network ``F`` and its derivative along ``v``."""
        still = net.detach()
        if self.form == "flow":
            return Tangent(net, v - still - k * expand(t_B, x_t) * slope)
        at = Angle.at(t_B, x_t, self.data_std)
        rest = at.velocity(x_t, v) - at.velocity(x_t, still)
        along = at.scale * x_t + at.derivative(x_t, v, still, slope)
        return Tangent(at.velocity(x_t, net), at.cos**2 * rest - k * at.cos * at.sin * along)

    def normalised(self, g: Tensor) -> Tensor:
        """About as long for every sample (section 4)."""
        return g / (expand(root_mean_square(g), g) + self.normalise)

    def warmed(self, step: int) -> float:
        """How much of the derivative is let in, by step: all of it at once without a warm-up."""
        return min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
