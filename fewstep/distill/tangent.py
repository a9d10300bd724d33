"""The derivative of a student along the path, ``du/dt = (v . grad_x) u + d_t u``, in two ways.

A derivative is a function ``(net, x, v, t, r, label) -> du/dt`` of a network ``net(x, t, r, label)``, with ``x``, ``v``
and the result ``[B, *D]`` and times ``[B]``. Neither way leaves a graph behind: what they give is a target.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Derivative = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


@torch.no_grad()
def forward_derivative(
    net: nn.Module, x: Tensor, v: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None
) -> Tensor:
    """One forward-mode product of ``net`` at ``(x, t)`` with the tangents ``(v, 1)``, in full precision.

    The attention kernel is fixed here and nowhere else: of torch's, only the plain one has a forward derivative.
    """

    def u(x: Tensor, t: Tensor) -> Tensor:
        return net(x, t, r_B, label_B)

    with torch.autocast(x.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(u, (x, t_B), (v, torch.ones_like(t_B)))[1]


def central_difference(step: float) -> Derivative:
    """``(u(x + h v, t + h) - u(x - h v, t - h)) / 2h`` with ``h = step``, in full precision: two plain evaluations.

    The truncation error falls as ``h^2`` and the rounding error grows as ``1 / h``; times leave [0, 1] by up to ``h``.
    """

    @torch.no_grad()
    def derivative(net: nn.Module, x: Tensor, v: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            ahead = net(x + step * v, t_B + step, r_B, label_B)
            behind = net(x - step * v, t_B - step, r_B, label_B)
        return (ahead - behind) / (2 * step)

    return derivative
