"""TF32 where there is none: the factors of products are rounded as tensor cores take them, and nothing else is."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten

_FACTORS: dict[Any, slice] = {
    aten.mm: slice(0, 2),
    aten.bmm: slice(0, 2),
    aten.addmm: slice(1, 3),
    aten.baddbmm: slice(1, 3),
    aten.convolution: slice(0, 2),
    aten.convolution_backward: slice(0, 3),
    aten._scaled_dot_product_flash_attention_for_cpu: slice(0, 3),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: slice(0, 4),
}
"""Which arguments of an operation are factors. Of fused attention the inputs are rounded, its weights are not."""


class EmulatedTF32(TorchDispatchMode):
    """Products and convolutions of float32 tensors with factors of 10 bits, and sums in float32: within it, backward
    passes and forward derivatives too."""

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        factors = _FACTORS.get(func._overloadpacket)
        if factors is not None:
            rounded = tree_map(_rounded, args[factors])
            args = (*args[: factors.start], *rounded, *args[factors.stop :])
        return func(*args, **(kwargs or {}))


def to_tf32(x: Tensor) -> Tensor:
    """Float32 rounded to 10 bits of mantissa, to the nearest, ties to even; what is not finite stays so."""
    bits = x.contiguous().view(torch.int32)
    even = (bits >> 13) & 1
    found = ((bits + 0xFFF + even) & ~0x1FFF).view(torch.float32)
    return torch.where(x.isfinite(), found, x)


def _rounded(value: Any) -> Any:
    return to_tf32(value) if isinstance(value, Tensor) and value.dtype == torch.float32 else value
