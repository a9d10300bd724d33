"""The U-Net of score_sde against the outputs of RectifiedFlow's own code, and what a student needs of it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from filled import fill, numbers
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.errors import UsageError
from fewstep.networks.foreign.config import NCSNPPConfig
from fewstep.networks.foreign.ncsnpp import NCSNPP, Resample

GOLDEN = json.loads((Path(__file__).parent / "golden_ncsnpp.json").read_text())
"""Made by the project's own code (at its commit 5a1fd4d) with the weights and inputs of ``filled``, in float64: its
casts to single precision made casts to double."""

SHAPE = (1, 8, 8)
SMALL = NCSNPPConfig(nf=16, ch_mult=(1, 2), num_res_blocks=1, num_scales=10)
LARGE = SMALL.model_copy(
    update={
        "embedding_type": "fourier",
        "progressive": "output_skip",
        "progressive_input": "input_skip",
        "fir": True,
        "scale_by_sigma": True,
    }
)


def network(config: NCSNPPConfig = SMALL, shape: tuple[int, ...] = SHAPE) -> NCSNPP:
    net = NCSNPP(shape, config, 0).double()
    fill(net)
    return net


def batch(size: int = 3) -> tuple[Tensor, Tensor]:
    x = 1.7 * numbers("x", (size, *SHAPE))
    return x, torch.linspace(1.5, 990.0, size, dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])
def test_the_projects_own_outputs(case: dict[str, Any]) -> None:
    """Its own float32 is 1e-6 from these."""
    net = network(NCSNPPConfig.model_validate(case["config"]), tuple(case["shape"]))
    tau = torch.tensor(case["times"], dtype=torch.float64)
    x = 1.7 * numbers("x", (len(tau), *case["shape"]))
    wanted = torch.tensor(case["output"], dtype=torch.float64).reshape(x.shape)
    torch.testing.assert_close(net(x, tau), wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(net.float()(x.float(), tau.float()).double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [SMALL, LARGE], ids=["small", "large"])
def test_the_derivative_along_state_and_time(config: NCSNPPConfig) -> None:
    """``tau`` as a student's time moves it, 999 times as fast."""
    net = network(config)
    x, tau = batch()
    along = numbers("along", x.shape), torch.ones_like(tau)
    with sdpa_kernel(SDPBackend.MATH):
        _, found = torch.func.jvp(net, (x, tau), along)
        h = 1e-5
        ahead, behind = (net(x + s * along[0], tau + s * along[1]) for s in (h, -h))
    torch.testing.assert_close(found, (ahead - behind) / (2 * h), rtol=0, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("config", [SMALL, LARGE], ids=["small", "large"])
def test_what_is_added_to_time(config: NCSNPPConfig) -> None:
    """Nothing and zeros are the same to the bit; a vector is a change of the time embedding's last bias."""
    net = network(config)
    x, tau = batch()
    plain = net(x, tau)
    assert torch.equal(net(x, tau, None, torch.zeros(3, net.condition, dtype=torch.float64)), plain)
    added = numbers("added", (net.condition,))
    found = net(x, tau, None, added.expand(3, -1))
    assert float((found - plain).abs().amax(dim=(1, 2, 3)).min()) > 1e-4
    net.all_modules[2 if config is LARGE else 1].bias += added
    torch.testing.assert_close(net(x, tau), found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fir", [False, True])
def test_resampling_keeps_what_is_even(fir: bool) -> None:
    """A constant stays itself, at the edges of an image too where nothing is filtered; up and down have the mean."""
    down, up = Resample(up=False, fir=fir), Resample(up=True, fir=fir)
    flat = torch.ones(2, 3, 8, 6, dtype=torch.float64)
    assert down(flat).shape == (2, 3, 4, 3)
    assert up(flat).shape == (2, 3, 16, 12)
    inside = (..., slice(1, -1), slice(1, -1))
    for change in (down, up):
        torch.testing.assert_close(change(flat)[inside], torch.ones_like(change(flat)[inside]), rtol=0, atol=1e-15)
        assert torch.allclose(change(flat), torch.ones_like(change(flat))) != fir
    # A pixel spreads with weight 1 / 4 of the mean of 4 pixels, and 4 when each becomes 4.
    spot = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    spot[..., 4, 3] = 1
    assert math.isclose(float(down(spot).sum()), 1 / 4, abs_tol=1e-15)
    assert math.isclose(float(up(spot).sum()), 4, abs_tol=1e-15)


@torch.no_grad()
def test_images_that_are_not_centered() -> None:
    """The network stretches them itself."""
    net = network()
    wide = network(SMALL.model_copy(update={"centered": False}))
    x, tau = batch()
    torch.testing.assert_close(wide((x + 1) / 2, tau), net(x, tau), rtol=0, atol=1e-12)


@torch.no_grad()
def test_samples_do_not_see_each_other() -> None:
    """Nor does training mode change anything: there is no dropout. Nor do labels: there are no classes."""
    net = network()
    x, tau = batch()
    whole = net(x, tau)
    torch.testing.assert_close(net(x[1:2], tau[1:2]), whole[1:2], rtol=0, atol=1e-12)
    assert net.training
    assert torch.equal(net.eval()(x, tau, torch.tensor([1, 0, 2])), whole)


@torch.no_grad()
@pytest.mark.parametrize("config", [SMALL, LARGE], ids=["small", "large"])
def test_precision(config: NCSNPPConfig) -> None:
    """Weights of bfloat16 see times of float32, and the output has the precision of the image."""
    x, tau = batch()
    wanted = network(config)(x, tau).float()
    half = network(config)
    frequencies = {name: value for name, value in half.state_dict().items() if name == "all_modules.0.W"}
    half.to(torch.bfloat16)
    if frequencies:
        half.all_modules[0].W.data = frequencies["all_modules.0.W"]
    found = half(x.float(), tau.float())
    assert found.dtype == torch.float32
    assert 1e-4 < float((found - wanted).norm() / wanted.norm()) < 5e-2
    assert half(x.to(torch.bfloat16), tau.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("config", [SMALL, LARGE], ids=["small", "large"])
def test_gradients_reach_every_parameter(config: NCSNPPConfig) -> None:
    """But the frequencies of time, which are not trained."""
    net = network(config)
    net(*batch()).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.requires_grad == (name != "all_modules.0.W")
        assert not parameter.requires_grad or (parameter.grad is not None and parameter.grad.any()), name


def test_a_fresh_network_learns() -> None:
    torch.manual_seed(0)
    net = NCSNPP(SHAPE, SMALL, 0)
    x, tau = (each.float() for each in batch())
    assert net(x, tau).abs().max().item() < 1e-3
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(20):
        loss = (net(x, tau) - x).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.7 * x.square().mean().item()


def test_the_list_to_shard_is_flat() -> None:
    assert len([module for module in network().modules() if isinstance(module, nn.ModuleList)]) == 1


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match=r"a network of kind ncsnpp with 2 levels .* multiples of 2, not 8 x 7"):
        NCSNPP((1, 8, 7), SMALL, 0)
    with pytest.raises(ValidationError, match="scale_by_sigma belongs to embedding_type fourier"):
        NCSNPPConfig(scale_by_sigma=True)
    with pytest.raises(ValidationError, match=r"attention_levels \[4\]: the last is 3"):
        NCSNPPConfig(attention_levels=(4,))
