"""A step's loss and gradient norm on their way from the device to the host, which does not wait for them.

Reading a number off a GPU stops the host until everything queued there is done, and then the GPU, until the host has
queued more. So numbers are copied as soon as there are any and looked at one step later, when they have long arrived.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


class Reading:
    """``numbers`` begins with loss and gradient norm and may hold one more; ``failure(loss)`` makes the error to raise
    if one of the two is not finite.

    On a GPU the copy to the host is queued at once, elsewhere there is nothing to copy.
    """

    def __init__(self, numbers: Tensor, failure: Callable[[float], Exception]) -> None:
        self._numbers = numbers
        self._failure: Callable[[float], Exception] | None = failure
        self._values: list[float] | None = None
        self._arrived: torch.cuda.Event | None = None
        if numbers.device.type == "cuda":
            self._host = torch.empty(len(numbers), dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._host = numbers

    def not_finite(self) -> Tensor:
        """1 where loss or norm is not finite, else 0: a float32 number that stays on the device."""
        return (~self._numbers[:2].isfinite().all()).to(torch.float32)

    def values(self) -> list[float]:
        """The numbers. Waits for them, and raises the failure if loss or norm is not finite."""
        if self._values is None:
            if self._arrived is not None:
                self._arrived.synchronize()
            values = self._host.tolist()
            if not all(math.isfinite(value) for value in values[:2]):
                assert self._failure is not None
                raise self._failure(values[0])
            self._values = values
            self._failure = None  # and with it the tensors it would have spoken of
        return self._values
