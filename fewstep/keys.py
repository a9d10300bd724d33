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
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_M0, _M1 = (np.uint64(each) for each in _MULTIPLIERS)
_HALF, _LOW = np.uint64(32), np.uint64(_MASK)


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
        key = _philox_key(self.seed, purpose)
        index_B = index_B.to(torch.int64)
        blocks = -(-count // 4)
        step = self.step if step_B is None else step_B[:, None]
        size, device = (4, len(index_B), blocks), index_B.device
        if device.type == "cpu":
            # Numpy's overhead per operation is a quarter of torch's, and it can work in place.
            array = np.empty(size, np.int64)
            _count(array, np.arange(blocks), index_B.numpy(), step)
            words = torch.from_numpy(np.stack(_philox_in_place(array, key), axis=-1))
        else:
            tensor = torch.empty(size, dtype=torch.int64, device=device)
            _count(tensor, torch.arange(blocks, device=device), index_B, step)
            words = torch.stack(philox(tensor.unbind(0), key), dim=-1)
        return words.reshape(len(index_B), 4 * blocks)[:, :count]


@dataclass(frozen=True, eq=False)
class StepsKey(Key):
    """A key under which every row has a step of its own, ``step_B [B]`` int64: numbers of several steps in one draw,
    each those that it would have alone."""

    step_B: Tensor = field(kw_only=True)

    def _words(self, purpose: str, index_B: Tensor, count: int, step_B: Tensor | None = None) -> Tensor:
        return super()._words(purpose, index_B, count, self.step_B)


def _count(counter: Any, block: Any, index_B: Any, step: int | Tensor) -> None:
    """Fill the counters ``[4, B, blocks]`` of every block and sample: tensors, or numpy arrays."""
    counter[0] = block
    counter[1] = (index_B & _MASK)[:, None]
    counter[2] = (index_B >> 32)[:, None]
    counter[3] = step


def _philox_in_place(counter: np.ndarray, key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """``philox`` of numpy arrays, which it writes over. As unsigned numbers, words need no mask after a shift; without
    new arrays in every round, images of 32 x 32 take a quarter of the time."""
    c0, c1, c2, c3 = (word.view(np.uint64) for word in counter)
    p0, p1 = np.empty_like(c0), np.empty_like(c0)
    for k0, k1 in _schedule(key):
        np.multiply(c0, _M0, out=p0)
        np.multiply(c2, _M1, out=p1)
        c1 ^= k0
        c3 ^= k1
        np.right_shift(p1, _HALF, out=c0)
        np.right_shift(p0, _HALF, out=c2)
        c0 ^= c1
        c2 ^= c3
        np.bitwise_and(p1, _LOW, out=c1)
        np.bitwise_and(p0, _LOW, out=c3)
    return tuple(word.view(np.int64) for word in (c0, c1, c2, c3))


@lru_cache(maxsize=256)
def _philox_key(seed: int, purpose: str) -> tuple[int, int]:
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


@lru_cache(maxsize=256)
def _schedule(key: tuple[int, int]) -> tuple[tuple[np.uint64, np.uint64], ...]:
    """The key of every round."""
    return tuple(
        (np.uint64((key[0] + round_ * _WEYL[0]) & _MASK), np.uint64((key[1] + round_ * _WEYL[1]) & _MASK))
        for round_ in range(_ROUNDS)
    )


A = TypeVar("A", Tensor, np.ndarray)


def philox(counter: Sequence[A], key: tuple[int, int]) -> tuple[A, A, A, A]:
    """Philox4x32-10 of a counter of four 32-bit words (int64 arrays of one shape) under a key of two 32-bit words.

    Works on tensors and on numpy arrays alike. Returns four new arrays of 32-bit words.
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
