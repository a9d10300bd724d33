"""One of several processes that measure together. Sample ``i`` belongs to process ``i mod world``.

Whoever starts the processes initialises ``torch.distributed``; here it is only used.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True)
class Share:
    """Process ``rank`` of ``world``. A world of one needs no process group."""

    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether this process computes what is computed once, and writes."""
        return self.rank == 0

    def own(self, n: int, *, tile: int = 1, device: torch.device | str = "cpu") -> tuple[Tensor, int]:
        """The indices below ``n`` that belong to this process, and how many they are.

        They are followed by further indices, which belong to nobody, up to a multiple of ``tile``.
        """
        count = len(range(self.rank, n, self.world))
        padded = -(-max(count, 1) // tile) * tile
        return self.rank + self.world * torch.arange(padded, device=device), count

    def gather(self, own: Tensor, n: int) -> Tensor:
        """Rows ``[n, ...]`` in the order of their index, on every process, from the rows of this one."""
        if self.world == 1:
            return own
        if own.dtype == torch.bool:
            return self.gather(own.to(torch.uint8), n).bool()
        most = -(-n // self.world)  # sizes are known: all but the last few processes have so many
        padded = own.new_zeros(most, *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return torch.stack(parts, dim=1).flatten(0, 1)[:n]

    def everyone(self, value: Any) -> list[Any]:
        """What every process gave, in the order of their ranks. For small things."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """What the main process gave."""
        if self.world == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]


ALONE = Share()
