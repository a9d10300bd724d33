"""Derivatives of a student in its times, each in two ways: forward-mode differentiation and finite differences.

A ``Derivative`` is a function ``(net, x, v, t, r, label) -> du/dt`` of a network ``net(x, t, r, label)``: the one along
the path, ``(v . grad_x) u + d_t u``, with ``x``, ``v`` and the result ``[B, *D]`` and times ``[B]``. It leaves no graph
behind: what it gives is a target. A ``PathDerivative`` gives ``(u, du/dt)``, and an ``EndDerivative`` ``(net, x, t, r,
label) -> (u, d_r u)`` of the end of the jump, both with a graph, for the rules whose gradient passes the derivative.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fewstep.condition import Condition
from fewstep.distill.duals import cheap_duals

Net = nn.Module | Callable[[Tensor, Tensor, Tensor, Condition | None], Tensor]
Derivative = Callable[[Net, Tensor, Tensor, Tensor, Tensor, Condition | None], Tensor]
PathDerivative = Callable[[Net, Tensor, Tensor, Tensor, Tensor, Condition | None], tuple[Tensor, Tensor]]
EndDerivative = Callable[[Net, Tensor, Tensor, Tensor, Condition | None], tuple[Tensor, Tensor]]


@torch.no_grad()
def forward_derivative(net: Net, x: Tensor, v: Tensor, t_B: Tensor, r_B: Tensor, label_B: Condition | None) -> Tensor:
    """One forward-mode product of ``net`` at ``(x, t)`` with the tangents ``(v, 1)``, in full precision.

    The attention kernel is fixed here and nowhere else: of torch's, only the plain one has a forward derivative.
    """

    def u(x: Tensor, t: Tensor) -> Tensor:
        with cheap_duals():
            return net(x, t, r_B, label_B)

    with torch.autocast(x.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(u, (x, t_B), (v, torch.ones_like(t_B)))[1]


def central_difference(step: float) -> Derivative:
    """``(u(x + h v, t + h) - u(x - h v, t - h)) / 2h`` with ``h = step``, in full precision: two plain evaluations.

    The truncation error falls as ``h^2`` and the rounding error, of TF32 where products may run in it, grows as
    ``1 / h``; times leave [0, 1] by up to ``h``.
    """

    @torch.no_grad()
    def derivative(net: Net, x: Tensor, v: Tensor, t_B: Tensor, r_B: Tensor, label_B: Condition | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            ahead = net(x + step * v, t_B + step, r_B, label_B)
            behind = net(x - step * v, t_B - step, r_B, label_B)
        return (ahead - behind) / (2 * step)

    return derivative


@dataclass(frozen=True)
class OneSidedDifference:
    """``(u(x + h v, t + h) - u(x, t)) / h`` with ``h = step``, in full precision: of first order, but one evaluation
    only where ``u(x, t)`` is known anyway, as it is where the student is trained on these very rows."""

    step: float

    @torch.no_grad()
    def __call__(self, net: Net, x: Tensor, v: Tensor, t_B: Tensor, r_B: Tensor, label_B: Condition | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.between(net(x, t_B, r_B, label_B), self.ahead(net, x, v, t_B, r_B, label_B))

    @torch.no_grad()
    def ahead(self, net: Net, x: Tensor, v: Tensor, t_B: Tensor, r_B: Tensor, label_B: Condition | None) -> Tensor:
        """``u(x + h v, t + h)``."""
        return net(x + self.step * v, t_B + self.step, r_B, label_B)

    def between(self, here: Tensor, ahead: Tensor) -> Tensor:
        """The derivative from the outputs at both points."""
        return (ahead - here) / self.step


def path_derivative(
    net: Net, x: Tensor, v: Tensor, t_B: Tensor, r_B: Tensor, label_B: Condition | None
) -> tuple[Tensor, Tensor]:
    """``(u, du/dt)`` from one forward-mode product with the tangents ``(v, 1)``, differentiable."""

    def u(x: Tensor, t: Tensor) -> Tensor:
        with cheap_duals():
            return net(x, t, r_B, label_B)

    with _twice_differentiable(x):
        both = torch.func.jvp(u, (x, t_B), (v, torch.ones_like(t_B)))
    return both[0], both[1]


def path_difference(step: float) -> PathDerivative:
    """``(u, du/dt)`` with the central difference of ``central_difference``, differentiable: three evaluations."""

    def derivative(
        net: Net, x: Tensor, v: Tensor, t_B: Tensor, r_B: Tensor, label_B: Condition | None
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            ahead = net(x + step * v, t_B + step, r_B, label_B)
            behind = net(x - step * v, t_B - step, r_B, label_B)
            return net(x, t_B, r_B, label_B), (ahead - behind) / (2 * step)

    return derivative


def end_derivative(net: Net, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Condition | None) -> tuple[Tensor, Tensor]:
    """``(u, d_r u)`` from one forward-mode product with the tangent 1 of ``r``, differentiable."""

    def u(r: Tensor) -> Tensor:
        with cheap_duals():
            return net(x, t_B, r, label_B)

    with _twice_differentiable(x):
        both = torch.func.jvp(u, (r_B,), (torch.ones_like(r_B),))
    return both[0], both[1]


def end_difference(step: float) -> EndDerivative:
    """``(u, d_r u)`` with a central difference in ``r``, differentiable: three evaluations."""

    def derivative(net: Net, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Condition | None) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            ahead, behind = (net(x, t_B, r_B + h, label_B) for h in (step, -step))
            return net(x, t_B, r_B, label_B), (ahead - behind) / (2 * step)

    return derivative


@contextlib.contextmanager
def _twice_differentiable(x: Tensor) -> Iterator[None]:
    """In full precision, with operations whose forward derivative has a derivative itself, and the right one; and
    uncompiled, because a compiled network has no forward derivative."""
    eager = torch.compiler.set_stance("force_eager")
    with eager, torch.autocast(x.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH), _PlainLayerNorm():
        yield


class _PlainLayerNorm(TorchFunctionMode):
    """Layer normalisation from plain operations, whatever layer asks for it.

    Torch's own gives the right forward derivative, and silently a wrong gradient of it: backward takes the mean and the
    deviation that it had saved for constants. Its group and RMS normalisations are right.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.layer_norm or func is torch.layer_norm:
            return layer_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """``torch.layer_norm``, its arguments included, from operations that can be differentiated again and again."""
    dims = tuple(range(-len(normalized_shape), 0))
    offset = input - input.mean(dim=dims, keepdim=True)
    normal = offset * torch.rsqrt(offset.square().mean(dim=dims, keepdim=True) + eps)
    normal = normal if weight is None else normal * weight
    return normal if bias is None else normal + bias
