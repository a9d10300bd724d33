"""Dropout by address: the generator, the statistics of its masks, and what they depend on."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from fewstep.keys import Key
from fewstep.networks.dropout import Dropout, keyed_dropout, lanes

GOLDEN = 0x9E3779B97F4A7C15
"""The increment of SplitMix64."""


def splitmix64(state: int) -> int:
    """The published mixing of a state, in Python's integers."""
    z = state
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_words_are_those_of_splitmix64() -> None:
    """The reference gives a published first number of seed 1234567; ours are its numbers, low lane first."""
    assert splitmix64(1234567 + GOLDEN) == 6457827717110365317
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF]
    found = lanes(torch.tensor(seeds), 10)
    for seed, row in zip(seeds, found.tolist(), strict=True):
        words = [splitmix64((seed + place) * GOLDEN % 2**64) for place in (1, 2, 3)]
        wanted = [word >> 16 * lane & 0xFFFF for word in words for lane in range(4)]
        assert [number % 2**16 for number in row] == wanted[:10]


def test_lanes_are_uniform() -> None:
    """Both bytes of each of the four lanes: chi-square of 256 cells, within 5 standard deviations of its mean."""
    numbers = lanes(torch.arange(16) * 0x1234567, 2**16).reshape(-1, 4).to(torch.int64) % 2**16
    for lane in numbers.unbind(1):
        for byte in (lane >> 8, lane % 256):
            counts = torch.bincount(byte, minlength=256).double()
            expected = len(lane) / 256
            chi_square = float((counts - expected).square().sum() / expected)
            assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)


def test_seeds_fill_their_64_bits() -> None:
    """Each bit is set in half of 4000 seeds, within 5 standard errors."""
    layer, index = Dropout(0.1), torch.arange(4000)
    with keyed_dropout(layer, Key(0), index):
        assert layer.seed_B is not None
        bits = layer.seed_B[:, None] >> torch.arange(64) & 1
    assert (bits.double().mean(dim=0) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(len(index))


def two_layers(probability: float = 0.1) -> nn.Module:
    return nn.ModuleList([Dropout(probability), Dropout(probability)])


def masks(net: nn.Module, key: Key, index: Tensor, size: int) -> Tensor:
    """What each of the layers drops, bool ``[layers, B, size]``."""
    ones = torch.ones(len(index), size)
    with keyed_dropout(net, key, index):
        return torch.stack([layer(ones) == 0 for layer in net])


def test_share_of_zeros_and_expectation() -> None:
    """Four million numbers: bounds of 5 standard errors tell 0.1 from 0.1007. Those kept are all scaled alike."""
    h, index = torch.ones(64, 4, 128, 128), torch.arange(64)
    for probability in (0.1, 0.5):
        layer = Dropout(probability)
        with keyed_dropout(layer, Key(3), index):
            out = layer(h)
        share = float((out == 0).double().mean())
        assert abs(share - probability) < 5 * math.sqrt(probability * (1 - probability) / h.numel())
        assert out.max() == pytest.approx(1 / (1 - probability), rel=1e-4)
        assert set(out.unique().tolist()) == {0.0, float(out.max())}
        by_place = (out == 0).double().mean(dim=0)
        spread = float(by_place.var() / (probability * (1 - probability) / len(h)))
        assert spread == pytest.approx(1, abs=5 * math.sqrt(2 / by_place.numel()))
        assert out.double().mean() == pytest.approx(1, abs=2e-3)


def test_masks_differ_as_independent_ones_do() -> None:
    """Between samples, layers, steps, seeds, and neighbours up to a word apart: two masks agree on ``p^2 + (1 - p)^2``
    of the places, within 5 standard errors."""
    net, index, p = two_layers(), torch.arange(8), 0.1
    size = 2**16
    first = masks(net, Key(0, 5), index, size)
    pairs = {
        "samples": (first[:, :-1], first[:, 1:]),
        "layers": (first[0], first[1]),
        "steps": (first, masks(net, Key(0, 6), index, size)),
        "seeds": (first, masks(net, Key(1, 5), index, size)),
        **{f"neighbours {k}": (first[..., :-k], first[..., k:]) for k in (1, 2, 3, 4, 5, 8)},
    }
    agreement = p**2 + (1 - p) ** 2
    for name, (a, b) in pairs.items():
        error = math.sqrt(agreement * (1 - agreement) / a.numel())
        assert abs(float((a == b).double().mean()) - agreement) < 5 * error, name


def test_a_mask_depends_on_its_own_sample_alone() -> None:
    """To the bit, whatever else is in the batch and in whichever order; sizes need not divide by four."""
    net, key = two_layers(), Key(0, 5)
    whole = masks(net, key, torch.arange(8), 77)
    part = torch.tensor([6, 2])
    assert torch.equal(masks(net, key, part, 77), whole[:, part])
    assert torch.equal(masks(copy.deepcopy(net), key, torch.arange(8), 77), whole)
    assert torch.equal(masks(net, key, torch.arange(8), 53), whole[..., :53])


def test_nothing_is_dropped_in_eval_mode_or_without_a_key() -> None:
    layer, h, index = Dropout(0.5), torch.randn(4, 10), torch.arange(4)
    assert layer(h) is h
    with keyed_dropout(layer, Key(0), index):
        assert not torch.equal(layer(h), h)
        assert layer.eval()(h) is h
        layer.train()
    assert layer(h) is h
    with pytest.raises(ZeroDivisionError), keyed_dropout(layer, Key(0), index):
        1 / 0  # noqa: B018
    assert layer(h) is h


def test_a_key_within_a_key() -> None:
    """The inner one holds for its rows, and then the outer one again."""
    layer, h, index = Dropout(0.5), torch.randn(4, 10), torch.arange(4)
    with keyed_dropout(layer, Key(0), index):
        whole = layer(h)
        with keyed_dropout(layer, Key(0), index[2:]):
            assert torch.equal(layer(h[2:]), whole[2:])
        assert torch.equal(layer(h), whole)


def test_a_network_without_dropout_costs_no_draw() -> None:
    """A step below zero would be refused by the first draw."""
    net = nn.Sequential(nn.Linear(2, 2), Dropout(0.0))
    with keyed_dropout(net, Key(0, -1), torch.arange(4)):
        assert net(torch.ones(4, 2)).all()
    with pytest.raises(ValueError, match="step -1"), keyed_dropout(Dropout(0.1), Key(0, -1), torch.arange(4)):
        pass


def test_a_batch_of_another_size_is_refused() -> None:
    """One sample's mask is not spread over many."""
    layer = Dropout(0.5)
    for index in (torch.arange(1), torch.arange(3)):
        with pytest.raises(RuntimeError), keyed_dropout(layer, Key(0), index):
            layer(torch.ones(4, 10))


def test_gradient_and_precision() -> None:
    """The gradient passes where the activation did, with the same factor; bfloat16 stays so."""
    layer, h = Dropout(0.25), torch.ones(4, 100, requires_grad=True)
    with keyed_dropout(layer, Key(0), torch.arange(4)):
        out = layer(h)
        assert layer(h.to(torch.bfloat16)).dtype == torch.bfloat16
    out.sum().backward()
    assert torch.equal(h.grad, out.detach())
