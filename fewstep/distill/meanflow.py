"""MeanFlow (Geng et al. 2505.13447), from a teacher's velocity or from data."""

import math

import torch
from torch import Tensor, nn

from fewstep.data.dataset import Batch
from fewstep.distill.couplings import Noise, gaussian_noise
from fewstep.distill.objective import LossOutput, Objective, root_mean_square
from fewstep.distill.tangent import Derivative, forward_derivative
from fewstep.flow import LINEAR, VelocityField, expand
from fewstep.keys import Key
from fewstep.networks.dropout import keyed_dropout
from fewstep.times import Times, jump_rows, sample_pairs


class MeanFlow(Objective):
    """Regress the average velocity on the MeanFlow identity (equations 6 and 10)::

        u(x_t, t, r) = v(x_t, t) - (t - r) du/dt,      du/dt = JVP of u at (x_t, t, r) with tangents (v, 1, 0)
        L = E ||Delta||^2 / sg(||Delta||^2 + c)^p,     Delta = u - sg(v - (t - r) du/dt)

    ``velocity`` is the teacher's marginal velocity, or None for the conditional ``e - x``: both have the same
    minimiser, and with a teacher the loss is zero there. ``jump_fraction`` is the share of rows with ``r < t``; on the
    others the loss is plain flow matching. The norm is summed over coordinates, which fixes the scale of ``c``;
    ``p = 0`` is the plain square (divided by the dimension, to compare with flow matching).
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        velocity: VelocityField | None,
        times: Times,
        jump_fraction: float,
        weight_power: float,
        weight_offset: float,
        derivative: Derivative = forward_derivative,
        noise: Noise = gaussian_noise,
    ) -> None:
        super().__init__()
        self.student = student
        self.velocity = velocity
        self.times = times
        self.jump_fraction = jump_fraction
        self.weight_power = weight_power
        self.weight_offset = weight_offset
        self.derivative: Derivative = derivative
        self.noise = noise

    def forward(self, batch: Batch, key: Key) -> LossOutput:
        jump = jump_rows(batch.index, self.jump_fraction)
        # Diagonal rows first: the Jacobian-vector product then runs on the tail alone.
        order = torch.argsort(jump.to(torch.int8), stable=True)
        diagonal = len(order) - int(jump.sum())
        index, x = batch.index[order], batch.x[order]
        label = None if batch.label is None else batch.label[order]

        e = self.noise(batch, key)[order]
        pairs = sample_pairs(self.times, key, index, jump[order])
        t, r = pairs.t, pairs.r

        point = LINEAR.sample(x, e, t)
        v = point.v
        if self.velocity is not None:
            with torch.no_grad():
                v = self.velocity(point.x_t, t, label)

        tail = slice(diagonal, None)
        with keyed_dropout(self.student, key, index[tail]):
            du_dt = self.total_derivative(
                point.x_t[tail], v[tail], t[tail], r[tail], None if label is None else label[tail]
            )
        target = v.clone()
        target[tail] -= expand(t[tail] - r[tail], x) * du_dt

        with keyed_dropout(self.student, key, index):
            u = self.student(point.x_t, t, r, label)
        residual = (u - target).flatten(1).square().sum(dim=1)
        dim = x[0].numel()
        if self.weight_power == 0:
            loss = residual / dim
        else:
            loss = residual / (residual.detach() + self.weight_offset) ** self.weight_power
        residual = residual.detach() / dim
        on_diagonal = residual.where(~jump[order], math.nan)
        jvp_norm = torch.full_like(residual, math.nan)
        jvp_norm[tail] = root_mean_square(du_dt)
        return LossOutput(loss, residual, t, {"diagonal_residual": on_diagonal, "jvp_norm": jvp_norm})

    def total_derivative(self, x_t: Tensor, v: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None) -> Tensor:
        """``du/dt = (v . grad_x) u + d_t u`` of the student at ``(x_t, t, r)``."""
        return self.derivative(self.student, x_t, v, t_B, r_B, label_B)
