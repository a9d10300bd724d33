"""The U-Net of guided-diffusion against the outputs of the projects' own code, and what a student needs of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from filled import fill, numbers
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.errors import UsageError
from fewstep.networks.foreign.adm import ADM
from fewstep.networks.foreign.config import ADMConfig

GOLDEN = json.loads((Path(__file__).parent / "golden_adm.json").read_text())
"""Made by the projects' own code (torchcfm at its commit cacd4dc, flow_matching at 11568d3) with the weights and inputs
of ``filled``, in float64: their casts to single precision made casts to double."""

SHAPE = (1, 8, 8)
SMALL = ADMConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    num_head_channels=16,
    use_scale_shift_norm=True,
    resblock_updown=True,
)


def network(config: ADMConfig = SMALL, classes: int = 3, shape: tuple[int, ...] = SHAPE) -> ADM:
    net = ADM(shape, config, classes).double()
    fill(net)
    return net


def batch(size: int = 3, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor, Tensor]:
    x = 1.7 * numbers("x", (size, *shape))
    return x, torch.linspace(0.1, 0.9, size, dtype=torch.float64), torch.arange(size) % 4


@torch.no_grad()
@pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])
def test_the_projects_own_outputs(case: dict[str, Any]) -> None:
    """Their own float32 is 1e-6 from these."""
    net = network(ADMConfig.model_validate(case["config"]), case["num_classes"], tuple(case["shape"]))
    tau = torch.tensor(case["times"], dtype=torch.float64)
    x = 1.7 * numbers("x", (len(tau), *case["shape"]))
    label = None if case["labels"] is None else torch.tensor(case["labels"])
    wanted = torch.tensor(case["output"], dtype=torch.float64).reshape(x.shape)
    torch.testing.assert_close(net(x, tau, label), wanted, rtol=0, atol=1e-10)
    single = net.float()(x.float(), tau.float(), label)
    torch.testing.assert_close(single.double(), wanted, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    "changes", [{}, {"resblock_updown": False}, {"resblock_updown": False, "conv_resample": False}]
)
def test_the_derivative_along_state_and_time(changes: dict[str, bool]) -> None:
    net = network(SMALL.model_copy(update=changes))
    x, tau, label = batch()
    along = numbers("along", x.shape), torch.ones_like(tau)
    with sdpa_kernel(SDPBackend.MATH):
        _, found = torch.func.jvp(lambda z, s: net(z, s, label), (x, tau), along)
        h = 1e-5
        ahead, behind = (net(x + s * along[0], tau + s * along[1], label) for s in (h, -h))
    torch.testing.assert_close(found, (ahead - behind) / (2 * h), rtol=0, atol=1e-7)


@torch.no_grad()
def test_what_is_added_to_time() -> None:
    """Nothing and zeros are the same to the bit; a vector is a change of the time embedding's last bias."""
    net = network()
    x, tau, label = batch()
    plain = net(x, tau, label)
    assert torch.equal(net(x, tau, label, torch.zeros(3, net.condition, dtype=torch.float64)), plain)
    added = numbers("added", (net.condition,))
    found = net(x, tau, label, added.expand(3, -1))
    assert float((found - plain).abs().amax(dim=(1, 2, 3)).min()) > 1e-2
    net.time_embed[2].bias += added
    torch.testing.assert_close(net(x, tau, label), found, rtol=0, atol=1e-12)


@torch.no_grad()
def test_no_class() -> None:
    """None is the row for no class. Where there is none a class has to be said, and without classes none is heard."""
    x, tau, label = batch()
    net = network()
    assert torch.equal(net(x, tau), net(x, tau, torch.full((3,), 3)))
    assert not torch.allclose(net(x, tau), net(x, tau, label), rtol=0, atol=1e-3)
    always = network(SMALL.model_copy(update={"null_row": False}))
    assert always(x, tau, label % 3).shape == x.shape
    with pytest.raises(ValueError, match="this network was trained with a class always"):
        always(x, tau)
    unconditional = network(classes=0)
    assert torch.equal(unconditional(x, tau, label), unconditional(x, tau))


@torch.no_grad()
def test_one_head_has_no_order() -> None:
    """And two do."""
    x, tau, label = batch()
    for heads, same in ((1, True), (2, False)):
        changes = {"num_head_channels": -1, "num_heads": heads}
        old, new = (
            network(SMALL.model_copy(update={**changes, "use_new_attention_order": order}))(x, tau, label)
            for order in (False, True)
        )
        assert torch.allclose(old, new, rtol=0, atol=1e-12) == same


@torch.no_grad()
def test_samples_do_not_see_each_other() -> None:
    """Nor does training mode change anything: there is no dropout."""
    net = network()
    x, tau, label = batch()
    whole = net(x, tau, label)
    one = net(x[1:2], tau[1:2], label[1:2])
    torch.testing.assert_close(one, whole[1:2], rtol=0, atol=1e-12)
    assert net.training
    assert torch.equal(net.eval()(x, tau, label), whole)


@torch.no_grad()
def test_precision() -> None:
    """Weights of bfloat16 see times of float32, and the output has the precision of the image."""
    x, tau, label = batch()
    wanted = network()(x, tau, label).float()
    half = network().to(torch.bfloat16)
    found = half(x.float(), tau.float(), label)
    assert found.dtype == torch.float32
    assert 1e-4 < float((found - wanted).norm() / wanted.norm()) < 5e-2
    assert half(x.to(torch.bfloat16), tau.float(), label).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        near = network().float()(x.float(), tau.float(), label)
    assert float((near.float() - wanted).norm() / wanted.norm()) < 5e-2


def test_gradients_reach_every_parameter() -> None:
    net = network()
    net(*batch()).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in net.parameters())


def test_a_fresh_network_learns() -> None:
    torch.manual_seed(0)
    net = ADM(SHAPE, SMALL, 3)
    x, tau, label = (each.float() if each.is_floating_point() else each for each in batch())
    assert not net(x, tau, label).any()  # what ends it starts at zero
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(12):
        loss = (net(x, tau, label) - x).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.7 * x.square().mean().item()


def test_lists_to_shard_are_flat() -> None:
    lists = [module for module in network().modules() if isinstance(module, nn.ModuleList)]
    assert len(lists) == 2
    assert not [inner for outer in lists for inner in outer.modules() if inner is not outer and inner in lists]


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2,), "takes images, not samples of shape"), ((1, 8, 7), r"with 2 levels .* multiples of 2, not 8 x 7")],
)
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ADM(shape, SMALL, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel_mult": (1, 1.5)}, r"multiples of 32, not \[32, 48\]"),
        ({"num_head_channels": 48}, "64 channels are no multiple of 48 a head"),
        ({"num_head_channels": -1, "num_heads": 3}, "64 channels do not divide into 3"),
        ({"attention_levels": (2,)}, "the last level is 1"),
        ({"num_head_channels": 0}, "-1 or at least 1"),
    ],
)
def test_configs_that_make_no_network_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ADMConfig.model_validate({**SMALL.model_dump(), **changes})
