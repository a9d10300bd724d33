"""FreeFlow (Tong et al. 2511.19428): a flow map from noise alone, without data."""

import copy

import torch
from torch import Tensor, nn

from fewstep.condition import Condition
from fewstep.data.dataset import Batch
from fewstep.distill.couplings import Noise, gaussian_noise
from fewstep.distill.flow_maps.weights import Weight, plain
from fewstep.distill.objective import LossOutput, Objective, mean_square, root_mean_square
from fewstep.distill.tangent import EndDerivative
from fewstep.flow import LINEAR, VelocityField, expand
from fewstep.keys import Key
from fewstep.networks.dropout import keyed_dropout
from fewstep.times import Times, jumps_last, sample_times


class FreeFlow(Objective):
    """Jumps that start from noise ``z`` at ``t = 1``, predicted, and corrected where they land::

        predict   X = z - (1 - r) u(z, 1, r),    target = v_T(X, r) + (1 - r) d_r u(z, 1, r)
        correct   xhat = z - u(z, 1, 0),         target = u(z, 1, 0) - weight q (g(x_q, q) - v_T(x_q, q)) / scale
        L = E || u(z, 1, r) - sg(target) ||^2 + E || g(x_q, q) - (e' - sg(xhat)) ||^2,    x_q = (1 - q) xhat + q e'

    The prediction is the Lagrangian identity at ``t = 1`` with its derivative moved into the target. Its errors pile up
    along the way, and the student never sees where it should have been; the correction looks at where samples land.
    ``g`` (``fake``) is a copy of the student that learns the velocity of the student's own samples, and where it
    differs from the teacher's, the samples are moved by the difference, as distribution matching does; ``scale`` is the
    mean size of ``xhat`` less the teacher's data prediction. ``correction`` is the share of rows that correct; at 0
    nothing of this happens. The student knows jumps from ``t = 1`` only: it samples in one step.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        teacher: VelocityField,
        ends: Times,
        derivative: EndDerivative,
        correction: float,
        correction_weight: float = 1.0,
        renoise: Times,
        weight: Weight = plain,
        noise: Noise = gaussian_noise,
    ) -> None:
        super().__init__()
        self.student = student
        self.fake = copy.deepcopy(student) if correction else None
        self.teacher = teacher
        self.ends = ends
        self.end_derivative = derivative
        self.correction = correction
        self.correction_weight = correction_weight
        self.renoise = renoise
        self.weight = weight
        self.noise = noise

    def forward(self, batch: Batch, key: Key) -> LossOutput:
        # Of the batch only the labels and the places count: the noise replaces the data.
        order, predicts = jumps_last(batch.index, self.correction, batch.first)
        index, z = batch.index[order], self.noise(batch, key)[order]
        label = None if batch.label is None else batch.label[order]
        r = sample_times(self.ends, key, "time", index)
        r[predicts:] = 0

        ones = torch.ones_like(r)
        with keyed_dropout(self.student, key, index[:predicts]):
            head = None if label is None else label[:predicts]
            target, du_dr = self.predicted(z[:predicts], r[:predicts], head)
        with keyed_dropout(self.student, key, index):
            u = self.student(z, ones, r, label)
        fake_loss = torch.zeros_like(r)
        if self.fake is not None:
            tail = None if label is None else label[predicts:]
            move, fake_loss[predicts:] = self.corrected(
                z[predicts:] - u[predicts:].detach(), key, index[predicts:], tail
            )
            target = torch.cat((target, u[predicts:].detach() - self.correction_weight * move))
        delta = u - target
        residual = mean_square(delta.detach())
        jvp_norm = torch.full_like(residual, torch.nan)
        jvp_norm[:predicts] = root_mean_square(du_dr)
        diagnostics = {"jvp_norm": jvp_norm}
        if self.fake is not None:
            fake_residual = torch.full_like(residual, torch.nan)
            fake_residual[predicts:] = fake_loss[predicts:].detach()
            diagnostics["fake_residual"] = fake_residual
        return LossOutput(self.weight(delta, ones, r) + fake_loss, residual, 1 - r, diagnostics)

    @torch.no_grad()
    def predicted(self, z: Tensor, r_B: Tensor, label_B: Condition | None) -> tuple[Tensor, Tensor]:
        """``v_T(X, r) + (1 - r) d_r u`` and ``d_r u``, at ``(z, 1, r)``."""
        u, du_dr = self.end_derivative(self.student, z, torch.ones_like(r_B), r_B, label_B)
        gap = expand(1 - r_B, z)
        return self.teacher(z - gap * u, r_B, label_B) + gap * du_dr, du_dr

    def corrected(self, xhat: Tensor, key: Key, index_B: Tensor, label_B: Condition | None) -> tuple[Tensor, Tensor]:
        """Where samples ``xhat`` are to be moved, ``[B, *D]``, and the flow-matching loss ``[B]`` of the fake velocity
        on them."""
        assert self.fake is not None
        q = sample_times(self.renoise, key, "renoise_time", index_B)
        fresh = key.normal("renoise", index_B, tuple(xhat.shape[1:])).to(xhat)
        point = LINEAR.sample(xhat, fresh, q)
        v_fake = self.fake(point.x_t, q, q, label_B)
        with torch.no_grad():
            v = self.teacher(point.x_t, q, label_B)
            q_B = expand(q, xhat)
            scale = (xhat - (point.x_t - q_B * v)).flatten(1).abs().mean(dim=1).clamp_min(1e-6)
            move = q_B * (v_fake - v) / expand(scale, xhat)
        return move, mean_square(v_fake - point.v)
