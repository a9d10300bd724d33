"""The grid of ``N`` steps on which a teacher's Euler steps err least, by dynamic programming (BOSS, Nguyen et al.
2312.16414).

A fine Euler trajectory ``x_0, ..., x_K`` of the teacher with velocities ``v_i`` is solved once; a long step from node
``i`` to node ``j`` of it costs ``C_ij = E || x_i + (t_j - t_i) v_i - x_j ||^2 / D``, and the grid is the cheapest path
of ``N`` steps from ``0`` to ``K``. The cost is a sum of local errors, each from a point on the fine trajectory: what
errors do to each other is not in it.
"""

import torch
from torch import Tensor

from fewstep.condition import Condition
from fewstep.flow import VelocityField, expand
from fewstep.grids import Grid, uniform_nodes


@torch.no_grad()
def step_costs(field: VelocityField, noise: Tensor, label_B: Condition | None, fine: int) -> Tensor:
    """``C``, ``[K + 1, K + 1]`` float64 on the CPU, of ``K = fine`` uniform Euler steps from ``noise [B, *D]``;
    infinite where ``j <= i``."""
    times = torch.tensor(uniform_nodes(fine), dtype=torch.promote_types(torch.float32, noise.dtype))
    x, states, velocities = noise, [noise], []
    for k in range(fine):
        t_B = times[k].to(x.device).expand(len(x))
        v = field(x, t_B, label_B)
        x = x + expand((times[k + 1] - times[k]).to(x.device).expand(len(x)), x) * v
        states.append(x)
        velocities.append(v)
    path = torch.stack(states).flatten(1).double()
    costs = torch.full((fine + 1, fine + 1), torch.inf, dtype=torch.float64)
    for i, v in enumerate(velocities):
        gaps = (times[i + 1 :] - times[i]).double().to(path.device)
        landed = path[i] + gaps[:, None] * v.flatten().double()
        costs[i, i + 1 :] = (landed - path[i + 1 :]).square().mean(dim=1).cpu()
    return costs


def cheapest_path(costs: Tensor, steps: int) -> tuple[int, ...]:
    """Indices ``0 = i_0 < i_1 < ... < i_N = K`` of least total cost: ``J[i, 1] = C[i, K]``, ``J[i, n] = min_j C[i, j] +
    J[j, n - 1]``. Of equal paths the one whose first node is nearest. ``ValueError`` unless ``1 <= N <= K``."""
    last = len(costs) - 1
    if not 1 <= steps <= last:
        raise ValueError(f"a path over {last} steps has between 1 and {last} of them, got {steps}")
    left = costs[:, last]  # from each node to the end, in as many steps as looked at so far
    choices = []
    for _ in range(steps - 1):
        left, choice = (costs + left).min(dim=1)
        choices.append(choice)
    path = [0]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return (*path, last)


def optimised_nodes(costs: Tensor, steps: int) -> Grid:
    """The cheapest grid of ``steps`` steps among the nodes that the costs are of."""
    fine = uniform_nodes(len(costs) - 1)
    return tuple(fine[k] for k in cheapest_path(costs, steps))
