"""The time embedding's formula and bandwidth, and the null label."""

import math

import torch

from fewstep.networks.build import build_network
from fewstep.networks.config import MLPConfig
from fewstep.networks.embeddings import sinusoidal


def test_sinusoids_by_hand() -> None:
    """Angular frequencies 1, 2, 4 for max_frequency 4: cosines first, then sines."""
    t = torch.tensor([0.0, 0.25], dtype=torch.float64)
    expected = [[math.cos(w * s) for w in (1, 2, 4)] + [math.sin(w * s) for w in (1, 2, 4)] for s in (0.0, 0.25)]
    torch.testing.assert_close(sinusoidal(t, 6, 4.0), torch.tensor(expected, dtype=torch.float64))


def test_no_feature_moves_faster_than_the_bandwidth() -> None:
    """d/dt of cos(w t) and sin(w t) has maximum w, so the fastest feature's slope reaches max_frequency, not more."""
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    slope = torch.func.jvp(lambda s: sinusoidal(s, 8, 30.0), (t,), (torch.ones_like(t),))[1].abs().max()
    assert 29.99 < float(slope) <= 30.0


def test_no_label_is_the_null_label() -> None:
    torch.manual_seed(0)
    net = build_network(MLPConfig(width=16, depth=1), (2,), num_classes=3, two_times=True)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, t = torch.randn(4, 2), torch.rand(4)
    null = net(x, t, t, torch.full((4,), 3))
    assert torch.equal(net(x, t, t, None), null)
    assert not torch.allclose(net(x, t, t, torch.zeros(4, dtype=torch.int64)), null)


def test_two_times_enter_as_t_and_their_difference() -> None:
    """With the embedding of t silenced, moving t and r together changes nothing; moving r alone does."""
    torch.manual_seed(0)
    net = build_network(MLPConfig(width=16, depth=1), (2,), num_classes=0, two_times=True)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.zeros_(net.embed_t.outer.weight)
    x = torch.randn(4, 2)
    a = net(x, torch.full((4,), 0.75), torch.full((4,), 0.5))
    b = net(x, torch.full((4,), 0.5), torch.full((4,), 0.25))
    c = net(x, torch.full((4,), 0.5), torch.full((4,), 0.5))
    assert torch.equal(a, b)
    assert not torch.allclose(b, c)
