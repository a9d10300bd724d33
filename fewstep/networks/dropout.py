"""Dropout whose masks are addressed, not drawn in sequence.

Which activations of sample ``i`` a layer drops is a function of (seed, step, ``i``, layer) alone, as every random draw
is. Outside ``keyed_dropout``, and in eval mode, nothing is dropped: sampling and plain targets need not ask for it.

Shapes: B batch, W 64-bit words of four activations each.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fewstep.keys import Key


class Dropout(nn.Module):
    """Zeroes each activation with the given probability (in steps of 2^-16) and scales up what is left, so that the
    expectation is kept."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.of_65536 = round(probability * 2**16)
        # A plain attribute: compilers follow one, and neither a context variable nor a generator.
        self.seed_B: Tensor | None = None

    def forward(self, h: Tensor) -> Tensor:
        if not self.training or self.seed_B is None:
            return h
        dropped = lanes(self.seed_B, math.prod(h.shape[1:])) < self.of_65536 - 2**15
        return (h * (2**16 / (2**16 - self.of_65536))).masked_fill(dropped.reshape(h.shape), 0.0)


@contextlib.contextmanager
def keyed_dropout(net: nn.Module, key: Key, index_B: Tensor) -> Iterator[None]:
    """Within this, dropout layers of ``net`` in train mode drop what belongs to the samples ``index_B`` of its batch.

    Every call of ``net`` drops the same, and so does a copy under the same key: a target or a derivative can see the
    masks of the output it is for. Costs nothing for a network that has no dropout.
    """
    layers = [module for module in net.modules() if isinstance(module, Dropout) and module.of_65536]
    if not layers:
        yield
        return
    before = [layer.seed_B for layer in layers]
    # Exactly the generator's 32-bit words, two to a seed.
    words = (key.uniform("dropout", index_B, (len(layers), 2)) * 2**32).to(torch.int64)
    for layer, seed_B in zip(layers, (words[..., 0] << 32 | words[..., 1]).unbind(1), strict=True):
        layer.seed_B = seed_B
    try:
        yield
    finally:
        for layer, outer_B in zip(layers, before, strict=True):
            layer.seed_B = outer_B


def lanes(seed_B: Tensor, count: int) -> Tensor:
    """``count`` uniform 16-bit numbers per sample, int16 ``[B, count]``.

    SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators"), four numbers to a word:
    every activation needs one, and for so many Philox takes about as long as a convolution.
    """
    place_W = torch.arange(1, 1 - (-count // 4), device=seed_B.device)
    # int64 wraps as unsigned numbers do; only shifts to the right have to be told that there is no sign. The seed comes
    # first: compilers take multiples of an arange for indices, which do not wrap.
    word_BW = (place_W + seed_B[:, None]) * -0x61C8864680B583EB
    word_BW = (word_BW ^ (word_BW >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    word_BW = (word_BW ^ (word_BW >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    word_BW = word_BW ^ (word_BW >> 31 & 0x1FFFFFFFF)
    return word_BW.view(torch.int16)[:, :count]
