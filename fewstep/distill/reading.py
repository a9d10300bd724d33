"""A step's loss and gradient norm on their way from the device to the host, which does not wait for them.

Reading a number off a GPU stops the host until everything queued there is done, and then the GPU, until the host has
queued more. So numbers are copied as soon as there are any and looked at one step later, when they have long arrived.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class Reading:
    """``both`` holds loss and gradient norm, ``[2]``; ``failure(loss)`` makes the error to raise if one is not finite.

    On a GPU the copy to the host is queued at once, elsewhere there is nothing to copy.
    """

    def __init__(self, both: Tensor, failure: Callable[[float], Exception]) -> None:
        self._both = both
        self._failure: Callable[[float], Exception] | None = failure
        self._values: tuple[float, float] | None = None
        self._arrived: torch.cuda.Event | None = None
        if both.device.type == "cuda":
            self._host = torch.empty(2, dtype=both.dtype, pin_memory=True)
            self._host.copy_(both, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._host = both

    def not_finite(self) -> Tensor:
        """1 where loss or norm is not finite, else 0: a float32 number that stays on the device."""
        return (~self._both.isfinite().all()).to(torch.float32)

    def values(self) -> tuple[float, float]:
        """Loss and gradient norm. Waits for them, and raises the failure if one of them is not finite."""
        if self._values is None:
            if self._arrived is not None:
                self._arrived.synchronize()
            loss, norm = self._host.tolist()
            if not (abs(loss) < float("inf") and abs(norm) < float("inf")):
                assert self._failure is not None
                raise self._failure(loss)
            self._values = (loss, norm)
            self._failure = None  # and with it the tensors it would have spoken of
        return self._values
