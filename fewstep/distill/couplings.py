"""Which noise goes with which sample: minibatch transport (Pooladian et al. 2304.14772, Tong et al. 2302.00482).

A coupling re-pairs the noise of a batch. It keeps both marginals, so the flow still ends at the data; it makes paths
cross less, so the velocity is straighter and few steps cost less. It does not keep noise and data independent: scores,
re-noising and diffusion teachers do not go with it.

Pairs are made within groups of ``group`` consecutive samples of the global batch, not within whatever share of it a
process or a microbatch happens to hold: the number of processes changes nothing. Under labels they are made within a
class, since otherwise noise would tell the class, and sampling, which draws both independently, would not.

A group with a sample that is not a number is left as it is: the loss finds it, and the trainer names its row.

Shapes: G groups of g samples.
"""

from collections.abc import Callable
from functools import partial

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fewstep.data.dataset import Batch
from fewstep.errors import FewstepError
from fewstep.keys import Key
from fewstep.sources import Source, gaussian

Coupling = Callable[[Tensor, Tensor, Tensor | None, Key, Tensor], Tensor]
"""(data ``x [B, *D]``, noise ``e [B, *D]``, label [B] or None, key, index [B]) -> the noise of each sample, from among
``e``."""


Noise = Callable[[Batch, Key], Tensor]
"""A batch and the step's key -> its noise ``e [B, *D]``: what the objectives ask for."""


def paired_noise(source: Source, coupling: Coupling) -> Noise:
    """Draws of ``source`` (purpose "noise") under a coupling."""

    def noise(batch: Batch, key: Key) -> Tensor:
        e = source(key, "noise", batch.index, tuple(batch.x.shape[1:]))
        # Embeddings have no classes to pair within.
        label = batch.label if isinstance(batch.label, Tensor) else None
        return coupling(batch.x, e, label, key, batch.index)

    return noise


def independent(x: Tensor, e: Tensor, label_B: Tensor | None, key: Key, index_B: Tensor) -> Tensor:
    """Each sample keeps the noise that was drawn for it."""
    return e


def assignment(group: int) -> Coupling:
    """The permutation of least total ``||x - e||^2`` within each group and class: exact, by the Hungarian method."""
    return partial(_assignment, group=group)


def sinkhorn(group: int, epsilon: float, tolerance: float = 1e-3, max_iterations: int = 10_000) -> Coupling:
    """Noise drawn from the entropic plan within each group and class, ``epsilon`` relative to the mean cost.

    Each sample draws its noise from its own row of the plan, so the data's marginal is exact; a noise may serve several
    samples, and its expected share is right to ``tolerance``. ``FewstepError`` where that many iterations do not reach
    it.
    """
    return partial(_sinkhorn, group=group, epsilon=epsilon, tolerance=tolerance, max_iterations=max_iterations)


@torch.no_grad()
def _assignment(x: Tensor, e: Tensor, label_B: Tensor | None, key: Key, index_B: Tensor, *, group: int) -> Tensor:
    cost_Ggg = _costs(x, e, label_B, group)
    # Dearer than any sum of allowed pairs: no optimum holds one.
    forbidden = cost_Ggg.isinf()
    cost_Ggg = cost_Ggg.masked_fill(forbidden, 0)
    cost_Ggg = cost_Ggg.masked_fill(forbidden, 2 * group * float(cost_Ggg.max()) + 1)
    as_they_are = torch.arange(group)
    chosen = [
        as_they_are if bool(cost.isnan().any()) else torch.from_numpy(linear_sum_assignment(cost.numpy())[1])
        for cost in cost_Ggg.cpu()
    ]
    return _take(e, torch.stack(chosen).to(e.device))


@torch.no_grad()
def _sinkhorn(
    x: Tensor,
    e: Tensor,
    label_B: Tensor | None,
    key: Key,
    index_B: Tensor,
    *,
    group: int,
    epsilon: float,
    tolerance: float,
    max_iterations: int,
) -> Tensor:
    # One by one: each group has the iterations that it needs, and not those of whatever other groups come with it.
    as_they_are = torch.eye(group, dtype=torch.float64, device=x.device)[None]
    plan_Ggg = torch.cat(
        [
            as_they_are if bool(cost.isnan().any()) else entropic_plan(cost, epsilon, tolerance, max_iterations)
            for cost in _costs(x, e, label_B, group).split(1)
        ]
    )
    u_Gg1 = key.uniform("coupling", index_B).reshape(-1, group, 1)
    boundary_Ggg = plan_Ggg.cumsum(dim=-1)
    return _take(e, (u_Gg1 * boundary_Ggg[..., -1:] >= boundary_Ggg).sum(dim=-1))


def entropic_plan(cost_Ggg: Tensor, epsilon: float, tolerance: float, max_iterations: int) -> Tensor:
    """The plan ``P [G, g, g]`` float64 with all row and column sums 1 that minimises ``<P, cost> - eps H(P)`` (Cuturi
    1306.0895), ``eps`` being ``epsilon`` times the mean of the finite costs; where the cost is infinite it is zero.

    Scaling in the logarithm, rows last: these sums are exact, those of the columns are within ``tolerance``.
    """
    allowed = cost_Ggg.isfinite()
    mean_G11 = cost_Ggg.where(allowed, 0).sum(dim=(1, 2), keepdim=True) / allowed.sum(dim=(1, 2), keepdim=True)
    log_Ggg = -cost_Ggg.double() / (epsilon * mean_G11.double()).clamp_min(1e-300)
    for iteration in range(max_iterations):
        log_Ggg = log_Ggg - log_Ggg.logsumexp(dim=1, keepdim=True)
        log_Ggg = log_Ggg - log_Ggg.logsumexp(dim=2, keepdim=True)
        if iteration % 10 == 9 and bool((log_Ggg.exp().sum(dim=1) - 1).abs().max() < tolerance):
            return log_Ggg.exp()
    raise FewstepError(
        f"the entropic coupling has not converged to {tolerance:g} in {max_iterations} iterations: raise its epsilon "
        f"above {epsilon:g}"
    )


def _costs(x: Tensor, e: Tensor, label_B: Tensor | None, group: int) -> Tensor:
    """``||x_i - e_j||^2``, ``[G, g, g]`` float64; infinite between samples of different classes."""
    x_Ggd, e_Ggd = (value.flatten(1).double().reshape(-1, group, value[0].numel()) for value in (x, e))
    # The squares alone decide nothing between permutations, but they keep costs positive and the mean meaningful.
    cost = (x_Ggd.square().sum(-1)[:, :, None] + e_Ggd.square().sum(-1)[:, None, :] - 2 * x_Ggd @ e_Ggd.mT).clamp_min(0)
    if label_B is not None:
        label_Gg = label_B.reshape(-1, group)
        cost = cost.masked_fill(label_Gg[:, :, None] != label_Gg[:, None, :], torch.inf)
    return cost


def _take(e: Tensor, chosen_Gg: Tensor) -> Tensor:
    """Row ``chosen[G, g]`` of each group of ``e``."""
    first_G1 = torch.arange(len(chosen_Gg), device=e.device)[:, None] * chosen_Gg.shape[1]
    return e[(first_G1 + chosen_Gg).flatten()]


gaussian_noise = paired_noise(gaussian, independent)
"""What is meant unless something else is said."""
