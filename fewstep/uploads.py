"""Small tensors that are made on the host: grids, tables, constants.

Copying one to a GPU makes the host wait until that has done everything it was told before. Within a training step the
host should never wait, so they are copied once and kept.
"""

from collections.abc import Callable, Hashable
from functools import lru_cache

import torch
from torch import Tensor
from torch._guards import active_fake_mode


def on_device(make: Callable[..., Tensor], arguments: tuple[Hashable, ...], device: torch.device) -> Tensor:
    """``make(*arguments)``, a pure function of hashable arguments, on a device: the same tensor at every call, not to
    be changed in place."""
    if active_fake_mode() is not None:  # tensors without numbers are of their mode alone
        return make(*arguments).to(device)
    return _kept(make, arguments, device)


@lru_cache(maxsize=128)
def _kept(make: Callable[..., Tensor], arguments: tuple[Hashable, ...], device: torch.device) -> Tensor:
    # What is made in inference could not be used in training later, and on the meta device not at all.
    with torch.inference_mode(False), torch.device("cpu"):
        made = make(*arguments)
    return made.to(device)


def numbers(values: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Some numbers as a tensor on a device, as ``on_device`` keeps it. Compilers make it a constant of their own."""
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=dtype, device=device)
    return on_device(_tensor, (values, dtype), device)


def _tensor(values: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype)
