"""MeanFlow as it is printed, for ours to be compared with."""

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.data.dataset import Batch
from fewstep.distill.flow_maps.config import MeanFlowConfig
from fewstep.distill.flow_maps.methods import weight_of
from fewstep.distill.ingredients import pairs_of
from fewstep.distill.objective import LossOutput, Objective, mean_square
from fewstep.errors import FewstepError
from fewstep.flow import LINEAR, expand
from fewstep.keys import Key
from fewstep.times import jump_rows

TOLERANCE = 1e-6
"""Relative, of a loss and its gradient in float64."""


class Textbook(Objective):
    """MeanFlow as algorithm 1 of the paper (Geng et al. 2505.13447) prints it: one Jacobian-vector product over all
    rows, whose first output carries the gradient.

    Nobody trains with it: it is what ours is compared with, equal in loss and gradient. From data, with Gaussian noise.
    """

    def __init__(self, student: nn.Module, config: MeanFlowConfig) -> None:
        super().__init__()
        self.student = student
        self.jump_fraction = config.jump_fraction
        self.pairs = pairs_of(config.times)
        self.weight = weight_of(config.weight)

    def forward(self, batch: Batch, key: Key) -> LossOutput:
        e = key.normal("noise", batch.index, tuple(batch.x.shape[1:]))
        pairs = self.pairs(key, batch.index, jump_rows(batch.index, self.jump_fraction))
        point = LINEAR.sample(batch.x, e, pairs.t)

        def u_theta(x_t: Tensor, t_B: Tensor) -> Tensor:
            return self.student(x_t, t_B, pairs.r, batch.label)

        with sdpa_kernel(SDPBackend.MATH):
            both = torch.func.jvp(u_theta, (point.x_t, pairs.t), (point.v, torch.ones_like(pairs.t)))
        u, du_dt = both[0], both[1]
        target = (point.v - expand(pairs.t - pairs.r, u) * du_dt).detach()
        delta = u - target
        loss = self.weight(delta, pairs.t, pairs.r)
        return LossOutput(loss, mean_square(delta.detach()), pairs.t, {})


def step_difference(reference: Objective, other: Objective, batch: Batch) -> float:
    """Relative difference of two objectives' losses and of their gradients, whichever is larger.

    ``FewstepError`` where it exceeds ``TOLERANCE``: then it is not the same step that is timed.
    """
    found = []
    for objective in (reference, other):
        loss = objective(batch, Key(0)).per_sample_B.mean()
        gradients = torch.autograd.grad(loss, list(objective.student.parameters()), allow_unused=True)
        found.append((loss.detach(), torch.cat([g.flatten() for g in gradients if g is not None])))
    difference = max(float((a - b).norm() / a.norm()) for a, b in zip(*found, strict=True))
    if not difference <= TOLERANCE:
        raise FewstepError(f"the textbook's MeanFlow step differs from ours by {difference:.2g} (relative)")
    return difference
