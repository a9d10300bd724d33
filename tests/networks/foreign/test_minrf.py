"""minRF's transformer: what its own code says, its rotations, derivatives, the room for a second time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from filled import fill, numbers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.errors import UsageError
from fewstep.networks.foreign.config import MinRFConfig
from fewstep.networks.foreign.minrf import MinRF, rotate, turns

GOLDEN: dict[str, dict[str, Any]] = {
    name: case
    for name, case in json.loads((Path(__file__).parent / "golden_dit.json").read_text()).items()
    if name.startswith("minrf")
}
"""Made by the project's own code at its commit 4fc10e0 with the weights and inputs of ``filled``, in float64: its casts
to single precision made casts to double."""

WIDE = torch.float64
CONFIG = MinRFConfig(patch=2, width=64, depth=2, heads=4, hidden=48)
SHAPE, CLASSES = (3, 4, 6), 5


def network(config: MinRFConfig = CONFIG, shape: tuple[int, ...] = SHAPE, classes: int = CLASSES) -> MinRF:
    net = MinRF(shape, config, classes).to(WIDE)
    fill(net)
    return net


def batch(size: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return numbers("x", (size, *SHAPE)), numbers("tau", (size,)).abs(), torch.arange(size) % (CLASSES + 1)


@pytest.mark.parametrize("name", GOLDEN)
def test_it_says_what_its_project_says(name: str) -> None:
    case = GOLDEN[name]
    shape, tau = tuple(case["shape"]), torch.tensor(case["tau"], dtype=WIDE)
    net = network(MinRFConfig(**case["config"]), shape, case["num_classes"])
    x, label = 1.7 * numbers(f"{name} x", (len(tau), *shape)), torch.tensor(case["label"])
    wanted = torch.tensor(case["output"], dtype=WIDE).reshape(x.shape)
    assert wanted.std() > 1
    torch.testing.assert_close(net(x, tau, label), wanted, rtol=0, atol=1e-10)
    single = net.float()(x.float(), tau.float(), label)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.to(WIDE), wanted, rtol=0, atol=2e-5)


def test_rotations_are_products_of_complex_numbers() -> None:
    h = numbers("h", (2, 7, 3, 8))
    found = rotate(h, turns(7, 8, h))
    frequencies = torch.tensor([1, 0.1, 0.01, 0.001], dtype=WIDE)
    phase = torch.exp(1j * torch.arange(7)[:, None, None] * frequencies)
    wanted = torch.complex(h[..., ::2], h[..., 1::2]) * phase
    torch.testing.assert_close(found[..., ::2], wanted.real, rtol=0, atol=1e-13)
    torch.testing.assert_close(found[..., 1::2], wanted.imag, rtol=0, atol=1e-13)


def test_the_forward_derivative_is_that_of_differences() -> None:
    net = network()
    x, tau, label = batch()
    toward = (numbers("dx", x.shape), numbers("dtau", tau.shape))
    with sdpa_kernel(SDPBackend.MATH):
        value, exact = torch.func.jvp(lambda x, tau: net(x, tau, label), (x, tau), toward)
    h = 1e-5
    ahead, behind = (net(x + s * toward[0], tau + s * toward[1], label) for s in (h, -h))
    torch.testing.assert_close(value, net(x, tau, label), rtol=0, atol=1e-12)
    assert exact.norm() > 0.1
    assert ((ahead - behind) / (2 * h) - exact).norm() < 1e-7 * exact.norm()


def test_the_forward_derivative_of_channels_last() -> None:
    net = network().to(memory_format=torch.channels_last)
    x, tau, label = batch()
    x = x.to(memory_format=torch.channels_last)
    with sdpa_kernel(SDPBackend.MATH):
        value, _ = torch.func.jvp(lambda x: net(x, tau, label), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(value, network()(x.contiguous(), tau, label), rtol=0, atol=1e-12)


def test_gradients_reach_every_weight() -> None:
    net = network()
    x, tau, label = batch(6)
    net(x, tau, label).square().mean().backward()
    for name, weight in net.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.any(), name


def test_a_fresh_network_says_zero_and_learns() -> None:
    torch.manual_seed(0)
    net = MinRF(SHAPE, CONFIG, CLASSES)
    x, tau, label = (part.float() if part.is_floating_point() else part for part in batch())
    assert not net(x, tau, label).any()
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        loss = (net(x, tau, label) - x).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_what_is_added_to_the_time() -> None:
    """Nothing changes nothing, to the bit; something is what the time's embedding would have had in its last bias."""
    net = network()
    x, tau, label = batch()
    plain = net(x, tau, label)
    assert torch.equal(net(x, tau, label, torch.zeros(3, net.condition, dtype=WIDE)), plain)
    added = numbers("added", (net.condition,))
    moved = net(x, tau, label, added.expand(3, -1))
    assert (moved - plain).abs().max() > 0.1
    with torch.no_grad():
        net.t_embedder.mlp[2].bias += added
    torch.testing.assert_close(net(x, tau, label), moved, rtol=0, atol=1e-12)


def test_no_label_is_the_null_row() -> None:
    net = network()
    x, tau, label = batch()
    null = net(x, tau, torch.full_like(label, CLASSES))
    assert torch.equal(net(x, tau), null)
    assert not torch.allclose(net(x, tau, label), null)
    unconditional = network(classes=0)
    assert torch.equal(unconditional(x, tau), unconditional(x, tau, torch.zeros_like(label)))
    with pytest.raises(ValueError, match="trained with a class always"):
        network(CONFIG.model_copy(update={"null_row": False}))(x, tau)


def test_one_sample_and_none() -> None:
    net = network()
    x, tau, label = batch()
    torch.testing.assert_close(net(x[:1], tau[:1], label[:1]), net(x, tau, label)[:1], rtol=0, atol=1e-12)
    assert net(x[:0], tau[:0], label[:0]).shape == (0, *SHAPE)


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_in_bfloat16(how: str) -> None:
    """Near full precision and not equal to it, in the precision of its input."""
    net = network().float()
    x, tau, label = (part.float() if part.is_floating_point() else part for part in batch())
    wanted = net(x, tau, label)
    if how == "weights":
        net.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = net(x, tau, label)
        time = net.t_embedder(torch.tensor([0.75, 0.7501]))
    assert found.dtype == torch.float32
    if how == "autocast":
        assert time.dtype == torch.float32
        assert (time[0] != time[1]).any()
    assert 1e-4 < (found - wanted).norm() / wanted.norm() < 5e-2


def test_no_condition_is_wider_than_1024() -> None:
    with torch.device("meta"):
        net = MinRF((3, 32, 32), MinRFConfig(patch=2, width=3072, depth=1, heads=32, hidden=8192), 1000)
    shapes = {name: tuple(weight.shape) for name, weight in net.state_dict().items()}
    assert net.condition == 1024
    assert shapes["y_embedder.embedding_table.weight"] == (1001, 1024)
    assert shapes["layers.0.adaLN_modulation.1.weight"] == (6 * 3072, 1024)
    assert shapes["final_layer.adaLN_modulation.1.weight"] == (2 * 3072, 1024)


@pytest.mark.parametrize(
    ("shape", "says"), [((2,), r"takes images, not samples of shape \[2\]"), ((3, 4, 5), "divide images of 4 x 5")]
)
def test_shapes_it_does_not_take(shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        MinRF(shape, CONFIG, CLASSES)
