"""Forward derivatives at the least work, for the operations in which networks spend their time.

Torch's own forward mode multiplies by the derivative of every weight, a matrix of zeros, and takes norms, attention and
the tanh GELU apart into many passes over memory. Within ``cheap_duals`` the operations in ``RULES`` go by rules of
their own: the same derivatives up to rounding, for 0.6 of the time in a transformer. All others go torch's way.

A dual is a value ``p`` with a tangent ``dp``; a rule takes its operation's arguments and returns a dual, or None where
the general way has to do: without tangents, with one in a place the rule does not know, or with unusual options.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def cheap_duals() -> contextlib.AbstractContextManager[object]:
    """Within this, forward-mode differentiation goes by ``RULES``; gradients can be taken through it as ever.

    Does nothing under ``torch.compile``, which traces torch's own derivatives and fuses them itself.
    """
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _Mode()


class _Mode(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(func)
        dual = None if rule is None else rule(*args, **kwargs)
        return func(*args, **kwargs) if dual is None else dual


def _split(value: Any) -> tuple[Any, Tensor | None]:
    """A value and its tangent, None where it does not depend on what is differentiated by."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value, None
    return forward_ad.unpack_dual(value)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    p, dp = _split(input)
    if dp is None or _depends(weight, bias):
        return None
    return forward_ad.make_dual(F.linear(p, weight, bias), F.linear(dp, weight))


def _conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, *placed: Any, **options: Any) -> Tensor | None:
    p, dp = _split(input)
    if dp is None or _depends(weight, bias):
        return None
    y = torch.conv2d(p, weight, bias, *placed, **options)
    return forward_ad.make_dual(y, torch.conv2d(dp, weight, None, *placed, **options))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    """The Jacobian of a normalisation is symmetric: its product with a tangent is torch's kernel for gradients.

    Not where gradients go through it in turn: those of that kernel are wrong if mean and scale depend on ``x`` (torch
    2.13, in silence), and a group norm's kernel has none.
    """
    p, dp = _split(input)
    if dp is None or _depends(weight, bias) or torch.is_grad_enabled():
        return None
    shape = tuple(normalized_shape)
    y, mean, scale = torch.native_layer_norm(p, shape, None, None, eps)
    dy = torch.ops.aten.native_layer_norm_backward(dp, p, shape, mean, scale, None, None, [True, False, False])[0]
    return _affine(y, dy, weight, bias)


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor | None:
    p, dp = _split(input)
    if dp is None or _depends(weight, bias) or torch.is_grad_enabled():
        return None
    p, dp = p.contiguous(), dp.contiguous()
    sizes = (*p.shape[:2], math.prod(p.shape[2:]), num_groups)
    y, mean, scale = torch.ops.aten.native_group_norm(p, None, None, *sizes, eps)
    dy = torch.ops.aten.native_group_norm_backward(dp, p, mean, scale, None, *sizes, [True, False, False])[0]
    per_channel = (-1, *(1,) * (p.ndim - 2))
    weight, bias = (None if each is None else each.reshape(per_channel) for each in (weight, bias))
    return _affine(y, dy, weight, bias)


def _affine(y: Tensor, dy: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        y, dy = y * weight, dy * weight
    return forward_ad.make_dual(y if bias is None else y + bias, dy)


def _attention(query: Tensor, key: Tensor, value: Tensor, *placed: Any, **options: Any) -> Tensor | None:
    """``P V`` with ``P = softmax(Q K^T / sqrt(channels))``; the Jacobian of softmax is symmetric too."""
    (q, dq), (k, dk), (v, dv) = _split(query), _split(key), _split(value)
    if placed or options or dq is None or dk is None or dv is None:
        return None
    scale = q.shape[-1] ** -0.5
    q, dq = q * scale, dq * scale
    keys = k.transpose(-2, -1)
    weight = (q @ keys).softmax(dim=-1)
    d_score = dq @ keys + q @ dk.transpose(-2, -1)
    d_weight = torch._softmax_backward_data(d_score, weight, -1, weight.dtype)
    return forward_ad.make_dual(weight @ v, d_weight @ v + weight @ dv)


def _gelu(input: Tensor, approximate: str = "none") -> Tensor | None:
    """The tanh form is ``x s`` with ``s = sigmoid(a x + b x^3)``: value and slope share the one slow function."""
    p, dp = _split(input)
    if dp is None or approximate != "tanh":
        return None
    a = 2 * math.sqrt(2 / math.pi)
    b = 0.044715 * a
    square = p * p
    s = torch.sigmoid(p * (a + b * square))
    y = p * s
    slope = torch.addcmul(s, y * (1 - s), a + 3 * b * square)
    return forward_ad.make_dual(y, slope * dp)


def _square(value: Tensor) -> Tensor | None:
    p, dp = _split(value)
    return None if dp is None else forward_ad.make_dual(p * p, 2 * p * dp)


def _multiply(value: Any, other: Any, **options: Any) -> Tensor | None:
    (p, dp), (q, dq) = _split(value), _split(other)
    if options or (dp is None and dq is None):
        return None
    if dp is None:
        change = p * dq
    else:
        change = dp * q if dq is None else torch.addcmul(p * dq, dp, q)
    return forward_ad.make_dual(p * q, change)


def _add(value: Any, other: Any, **options: Any) -> Tensor | None:
    (p, dp), (q, dq) = _split(value), _split(other)
    if options or (dp is None and dq is None):
        return None
    y = p + q
    if dp is None or dq is None:
        change = (dq if dp is None else dp).to(y.dtype).expand(y.shape)  # type: ignore[union-attr]
    else:
        change = dp + dq
    return forward_ad.make_dual(y, change)


def _depends(*values: Tensor | None) -> bool:
    """Whether any of them has a tangent."""
    return any(_split(value)[1] is not None for value in values)


RULES: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: _linear,
    torch.conv2d: _conv2d,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.scaled_dot_product_attention: _attention,
    F.gelu: _gelu,
    Tensor.square: _square,
    Tensor.mul: _multiply,
    Tensor.add: _add,
}
"""By the function that torch tells its modes of: operators arrive as the methods of ``Tensor``. Rules name their
arguments as torch does, since callers may too."""
