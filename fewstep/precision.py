"""What float32 means for products on a GPU, and networks that are evaluated in less than that.

TF32 rounds the factors of a product to 10 bits. Torch leaves it to the kind of layer: unless told otherwise,
convolutions take it and matrix products do not. Here both are told the same, for as long as it takes, and a caller's
own choice comes back afterwards.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fewstep.block import PrecisionName, ProductsName, products_of

Model = TypeVar("Model")


@contextmanager
def products(kind: ProductsName) -> Iterator[None]:
    """Run with products and convolutions of float32 tensors in true float32 (``fp32``), or free to run in TF32.

    The flags are the process's: backward passes, whatever thread they run on, and compiled graphs, which look at them
    whenever they are called, see them too. A CPU multiplies in float32 either way.
    """
    matrices, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    on_cpu = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    _set_matrices(kind)
    torch.backends.cudnn.allow_tf32 = kind == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        if matrices == "high" and on_cpu != "tf32":
            _set_matrices("tf32")
        else:
            torch.set_float32_matmul_precision(matrices)


def _set_matrices(kind: ProductsName) -> None:
    torch.set_float32_matmul_precision("highest")
    if kind == "tf32":  # "high" would have some CPUs round, too
        torch.backends.cuda.matmul.allow_tf32 = True


@dataclass(frozen=True)
class PreciseNetwork:
    """``net(x, ...)`` in a precision: ``bf16`` is autocast, as in training. What comes out has the type of ``x``, so
    that states, times and a solver's arithmetic stay as they are."""

    net: Callable[..., Tensor]
    precision: PrecisionName

    def __call__(self, x: Tensor, *rest: Any) -> Tensor:
        with products(products_of(self.precision)):
            if self.precision != "bf16":
                return self.net(x, *rest)
            # Frozen weights are cast for every call: there is nothing to be kept.
            with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
                return self.net(x, *rest).to(x.dtype)


def in_precision(model: Model, precision: PrecisionName) -> Model:
    """The same sampler, flow map or velocity field with every network that it asks evaluated in a precision.

    Networks are what dataclasses call ``net`` or ``model``, however deep: under guidance, of several step counts, of
    others' making. What has none, such as an exact teacher, stays as it is.
    """
    changed: Model = _changed(model, precision)
    return changed


def _changed(value: Any, precision: PrecisionName) -> Any:
    if type(value) is tuple:
        several = tuple(_changed(each, precision) for each in value)
        return value if all(one is other for one, other in zip(several, value, strict=True)) else several
    if type(value) is dict:
        named = {key: _changed(each, precision) for key, each in value.items()}
        return value if all(named[key] is value[key] for key in value) else named
    if not is_dataclass(value) or isinstance(value, type):
        return value
    new: dict[str, Any] = {}
    for name in (field.name for field in fields(value) if field.init):
        held = getattr(value, name)
        if name in ("net", "model") and callable(held):
            new[name] = PreciseNetwork(held.net if isinstance(held, PreciseNetwork) else held, precision)
        elif (other := _changed(held, precision)) is not held:
            new[name] = other
    return replace(value, **new) if new else value
