"""Random numbers that are addressed, not drawn in sequence.

Every draw is a pure function of (seed, purpose, step, sample index). Sample ``i`` therefore never depends on the batch
size, the rank or the number of processes, and a resumed run draws what an uninterrupted one would have drawn.

The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): a bijection of a
128-bit counter under a 64-bit key. Key = hash of (seed, purpose); counter = (block of four numbers, sample index low
and high, step). It runs in int64 arithmetic and gives the same bits on every device.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


@dataclass(frozen=True)
class Key:
    """Names a family of random streams: the run's seed and the step (of the optimiser, or of a sampler)."""

    seed: int
    step: int = 0

    def normal(self, purpose: str, index_B: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
        """Standard normal numbers ``[B, *shape]``, float32, row ``b`` belonging to sample ``index_B[b]`` alone."""
        count = math.prod(shape)
        even = count + count % 2
        words = self._words(purpose, index_B, even)
        u1, u2 = words.reshape(len(index_B), even // 2, 2).to(torch.float64).add_(0.5).mul_(2.0**-32).unbind(-1)
        # Box-Muller in float64: u1 is never 0, and the tails reach 6.8 standard deviations.
        radius = u1.log_().mul_(-2.0).sqrt_()
        angle = u2.mul_(2 * math.pi)
        pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
        return pairs.reshape(len(index_B), even)[:, :count].reshape(-1, *shape).to(torch.float32)

    def uniform(self, purpose: str, index_B: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
        """Uniform numbers on the open interval (0, 1), ``[B, *shape]``, float64."""
        count = math.prod(shape)
        words = self._words(purpose, index_B, count).to(torch.float64)
        return words.add_(0.5).mul_(2.0**-32).reshape(-1, *shape)

    def permutations(self, purpose: str, size: int, number: int, device: torch.device) -> Tensor:
        """Permutations of ``size`` things, int64 ``[number, size]``: row ``k`` sorts them by the uniform numbers of
        step ``self.step + k``. Several at once cost little more than one."""
        index = torch.arange(size, device=device).repeat(number)
        step = torch.arange(self.step, self.step + number, device=device).repeat_interleave(size)
        # Words above indices: numbers that are all different, so that a plain sort is stable, and much faster.
        words = self._words(purpose, index, 1, step).reshape(number, size)
        sortable = ((words - 2**31) << 32) | index.reshape(number, size)
        if device.type == "cpu":
            sortable.numpy().sort(axis=1)
        else:
            sortable = sortable.sort(dim=1).values
        return sortable & _MASK

    def _words(self, purpose: str, index_B: Tensor, count: int, step_B: Tensor | None = None) -> Tensor:
        """``count`` 32-bit words per sample as int64 ``[B, count]``, of this step or of one of each sample's own."""
        if not 0 <= self.step <= _MASK:
            raise ValueError(f"step {self.step} is outside [0, 2^32)")
        digest = hashlib.blake2b(f"{self.seed}/{purpose}".encode(), digest_size=8).digest()
        key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))
        index_B = index_B.to(torch.int64)
        blocks = -(-count // 4)
        counter = torch.empty((4, len(index_B), blocks), dtype=torch.int64, device=index_B.device)
        counter[0] = torch.arange(blocks, device=index_B.device)
        counter[1] = (index_B & _MASK)[:, None]
        counter[2] = (index_B >> 32)[:, None]
        counter[3] = self.step if step_B is None else step_B[:, None]
        if counter.device.type == "cpu":
            # The same arithmetic on numpy arrays: a quarter of torch's overhead per operation at training batch sizes.
            words = torch.from_numpy(np.stack(philox(tuple(counter.numpy()), key), axis=-1))
        else:
            words = torch.stack(philox(counter.unbind(0), key), dim=-1)
        return words.reshape(len(index_B), 4 * blocks)[:, :count]


A = TypeVar("A", Tensor, np.ndarray)


def philox(counter: Sequence[A], key: tuple[int, int]) -> tuple[A, A, A, A]:
    """Philox4x32-10 of a counter of four 32-bit words (int64 arrays of one shape) under a key of two 32-bit words.

    Works on tensors and on numpy arrays alike. Returns four arrays of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A 32x32-bit product fills 64 bits; int64 wraps, and its bits are those of the unsigned product. What lies
        # above the 32 bits of a word is only taken off before the word is multiplied.
        p0 = c0 * _MULTIPLIERS[0]
        p1 = c2 * _MULTIPLIERS[1]
        c0 = p1 >> 32
        c0 ^= c1
        c0 ^= k0
        c0 &= _MASK
        c2 = p0 >> 32
        c2 ^= c3
        c2 ^= k1
        c2 &= _MASK
        c1, c3 = p1, p0
        k0 = (k0 + _WEYL[0]) & _MASK
        k1 = (k1 + _WEYL[1]) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK
