"""Keyed random numbers: published answers of the generator, an addressing written a second time, and statistics.

The statistics are deterministic (fixed seeds). Their tolerances are four standard errors of what they bound, and a
Kolmogorov-Smirnov statistic is compared with its 1 % point, so a change of seed may fail them about once in a hundred.
"""

import hashlib
import math

import numpy as np
import pytest
import torch

from fewstep.keys import Key, philox

N = 200_000
WORD = 2**32


def reference_block(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's unbounded integers, as Salmon et al. write it."""
    counter, key = list(counter), list(key)
    for _ in range(10):
        product0, product1 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            product1 // WORD ^ counter[1] ^ key[0],
            product1 % WORD,
            product0 // WORD ^ counter[3] ^ key[1],
            product0 % WORD,
        ]
        key = [(key[0] + 0x9E3779B9) % WORD, (key[1] + 0xBB67AE85) % WORD]
    return counter


def reference_words(seed: int, purpose: str, step: int, index: int, count: int) -> list[int]:
    """The stream of one sample: blocks of four words, counter = (block, index low, index high, step)."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    key = [int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")]
    words: list[int] = []
    while len(words) < count:
        words += reference_block([len(words) // 4, index % WORD, index // WORD, step], key)
    return words[:count]


KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]) -> None:
    """The vectors published with the generator, on both kinds of array and in the reference of this file."""
    words = philox([np.array([c], dtype=np.int64) for c in counter], key)
    assert tuple(int(word[0]) for word in words) == answer
    tensors = philox([torch.tensor([c]) for c in counter], key)
    assert tuple(int(word[0]) for word in tensors) == answer
    assert tuple(reference_block(list(counter), list(key))) == answer


def test_philox_is_the_same_on_tensors_and_arrays() -> None:
    counter = np.random.default_rng(0).integers(0, WORD, size=(4, 1000), dtype=np.int64)
    key = (0xDEADBEEF, 0x12345678)
    arrays = philox(tuple(counter), key)
    tensors = philox(torch.from_numpy(counter).unbind(0), key)
    for array, tensor in zip(arrays, tensors, strict=True):
        assert np.array_equal(array, tensor.numpy())
        assert array.min() >= 0
        assert array.max() < WORD


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("index", [0, 7, WORD - 1, WORD, 5 * WORD + 3, 2**62])
def test_draws_are_the_addressed_words(index: int, count: int) -> None:
    """Uniforms are (word + 1/2) / 2^32; normals are Box-Muller of consecutive pairs. Bit for bit, odd counts too."""
    key, index_B = Key(seed=3, step=11), torch.tensor([index])
    u = (np.array(reference_words(3, "test", 11, index, count + count % 2)) + 0.5) / WORD
    assert key.uniform("test", index_B, (count,))[0].tolist() == u[:count].tolist()
    radius, angle = np.sqrt(-2 * np.log(u[0::2])), 2 * math.pi * u[1::2]
    pairs = np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=-1)
    normal = key.normal("test", index_B, (count,))
    assert normal.dtype == torch.float32
    np.testing.assert_allclose(normal[0].numpy(), pairs.reshape(-1)[:count], rtol=1e-6, atol=1e-7)


def test_shape_only_arranges_the_numbers() -> None:
    key, index_B = Key(0), torch.arange(5)
    flat = key.normal("test", index_B, (12,))
    assert torch.equal(key.normal("test", index_B, (3, 2, 2)), flat.reshape(5, 3, 2, 2))
    assert torch.equal(key.normal("test", index_B, (7,)), flat[:, :7])
    assert torch.equal(key.normal("test", index_B), flat[:, 0])
    assert torch.equal(key.uniform("test", index_B), key.uniform("test", index_B, (4,))[:, 0])


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_a_row_depends_on_its_index_alone(shape: tuple[int, ...]) -> None:
    key = Key(5, step=2)
    for draw in (key.normal, key.uniform):
        whole = draw("test", torch.arange(64), shape)
        order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
        assert torch.equal(draw("test", order, shape), whole[order])
        assert torch.equal(draw("test", torch.tensor([9, 50, 9]), shape), whole[[9, 50, 9]])
        split = torch.cat([draw("test", part, shape) for part in torch.arange(64).split(7)])
        assert torch.equal(split, whole)


def test_streams_of_different_names_are_independent() -> None:
    """Seed, purpose, step, neighbouring indices, and indices 2^32 apart: correlations below four standard errors."""
    index = torch.arange(N)
    streams = torch.stack(
        [
            Key(0).normal("a", index),
            Key(1).normal("a", index),
            Key(0).normal("b", index),
            Key(0, step=1).normal("a", index),
            Key(0).normal("a", index + N),
            Key(0).normal("a", index + WORD),
            Key(0).normal("a", index + 1),
            *Key(0).normal("a", index, (6,))[:, 1:].unbind(1),  # the sine of the pair, then the next pairs and block
        ]
    ).double()
    for values in (streams, streams.square()):  # squares: Box-Muller's two numbers share a radius
        correlation = torch.corrcoef(values) - torch.eye(len(values))
        assert correlation.abs().max() < 4 / math.sqrt(N)


def test_normal_moments() -> None:
    """Standard errors of the first four moments: sqrt of 1, 2, 15, 96 over N; nothing beyond 6.8 is possible."""
    z = Key(0).normal("moments", torch.arange(N // 4), (4,)).double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(z.pow(power).mean().item() - moment) < 4 * math.sqrt(variance / N), power
    for column in z.unbind(1):  # every position in a block by itself
        assert abs(column.mean().item()) < 4 / math.sqrt(N / 4)
        assert abs(column.square().mean().item() - 1) < 4 * math.sqrt(2 / (N / 4))
    assert z.abs().max() < 6.8


def kolmogorov_smirnov(uniform: torch.Tensor) -> float:
    """``sqrt(n) sup |F_n(u) - u|``, whose 1 % point is 1.63."""
    ordered, n = uniform.sort().values, len(uniform)
    rank = torch.arange(n, dtype=torch.float64)
    above = ((rank + 1) / n - ordered).max()
    below = (ordered - rank / n).max()
    return math.sqrt(n) * max(above.item(), below.item())


def test_uniform_and_normal_distributions() -> None:
    u = Key(0).uniform("uniform", torch.arange(N // 4), (4,))
    assert u.min() > 0
    assert u.max() < 1
    for column in u.unbind(1):
        assert kolmogorov_smirnov(column) < 1.63
    z = Key(0).normal("normal", torch.arange(N // 4), (4,)).double()
    assert kolmogorov_smirnov(torch.special.ndtr(z.reshape(-1))) < 1.63


@pytest.mark.parametrize(("word", "radius"), [(0, math.sqrt(66 * math.log(2))), (WORD - 1, 2**-16)])
def test_extreme_words_give_finite_normals(word: int, radius: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """u = 2^-33 and 1 - 2^-33: the radius is largest, sqrt(-2 log 2^-33), or smallest, sqrt(2 * 2^-33); angle 0."""
    monkeypatch.setattr(
        Key, "_words", lambda self, purpose, index_B, count: torch.full((len(index_B), count), word, dtype=torch.int64)
    )
    assert Key(0).normal("test", torch.arange(1), (2,))[0].tolist() == pytest.approx([radius, 0], abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("step", [-1, WORD])
def test_step_out_of_range(step: int) -> None:
    with pytest.raises(ValueError, match="step"):
        Key(0, step).normal("test", torch.arange(2))


def test_permutations_sort_by_the_uniform_numbers_of_their_steps() -> None:
    """Whether drawn together or one by one."""
    index = torch.arange(50)
    together = Key(3, 7).permutations("shuffle", 50, 4, torch.device("cpu"))
    assert together.shape == (4, 50)
    for k, order in enumerate(together):
        assert torch.equal(order, Key(3, 7 + k).uniform("shuffle", index).argsort(stable=True))
        assert torch.equal(order, Key(3, 7 + k).permutations("shuffle", 50, 1, torch.device("cpu"))[0])
    assert not torch.equal(together[0], Key(4, 7).permutations("shuffle", 50, 1, torch.device("cpu"))[0])


def test_no_samples_draw_nothing() -> None:
    """A microbatch may hold none of the rows that draw."""
    none = torch.arange(0)
    for shape in ((), (3,), (2, 5)):
        assert Key(1).normal("noise", none, shape).shape == (0, *shape)
        assert Key(1).uniform("time", none, shape).shape == (0, *shape)
