"""The networks of EDM and EDM2 against outputs of the projects' own code, and what a student needs of them.

``golden_edm.json`` has every 11th number of what the projects' classes put out for the cases of ``edm_cases``: as they
are (float32), and with each float32 in their source read as float64.
"""

import json
from pathlib import Path

import pytest
import torch
from edm_cases import CASES, Case, filled, inputs
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.conventions import ConventionConfig
from fewstep.errors import UsageError
from fewstep.networks.condition import Inputs
from fewstep.networks.foreign.config import EDMConfig
from fewstep.networks.foreign.converted import ForeignNetwork
from fewstep.networks.foreign.edm import EDM
from fewstep.networks.foreign.edm2 import EDM2
from fewstep.networks.foreign.edm_parts import scales
from fewstep.teachers.formats.edm import CONVENTION

GOLDEN = json.loads((Path(__file__).parent / "golden_edm.json").read_text())


def fresh(case: Case) -> nn.Module:
    if isinstance(case.config, EDMConfig):
        return EDM(case.shape, case.config, case.classes)
    return EDM2(case.shape, case.config, case.classes)


def network(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A network of the formula and what it is asked: states, noise levels, labels."""
    case = CASES[name]
    return filled(fresh(case).to(dtype)), *inputs(case, dtype)


# ---------------------------------------------------------------------------------------- the projects' own outputs


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", CASES)
def test_outputs_of_the_project(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Of the size of the output, which without EDM's own preconditioner grows with the noise."""
    net, x, sigma, label = network(name, dtype)
    found = net(x, sigma, label).detach().flatten()[::11]
    wanted = torch.tensor(GOLDEN[name][str(dtype).removeprefix("torch.")], dtype=dtype)
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("name", CASES)
def test_in_evaluation_as_in_training_and_nothing_is_altered(name: str) -> None:
    net, x, sigma, label = network(name)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    in_training = net.train()(x, sigma, label)
    assert torch.equal(in_training, net.eval()(x, sigma, label))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


# ------------------------------------------------------------------------------------------------ what is told to it


@pytest.mark.parametrize("name", ["ddpmpp", "adm", "edm2"])
def test_labels(name: str) -> None:
    """None is the label that is no class; each class differs; samples do not see each other."""
    net, x, sigma, _ = network(name)
    none = torch.full((3,), 5)
    assert torch.equal(net(x, sigma), net(x, sigma, none))
    outputs = [net(x, sigma, torch.full((3,), label)) for label in range(6)]
    for number, first in enumerate(outputs):
        for second in outputs[:number]:
            assert (first - second).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    one = net(x[1:2], sigma[1:2], torch.tensor([4]))
    torch.testing.assert_close(one, outputs[4][1:2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_the_seam(name: str) -> None:
    """Zeros leave every bit; anything else is heard; and it is where the layers of time end: told the change of their
    last bias, the output is as if the bias had changed."""
    net, x, sigma, label = network(name)
    width = net.condition
    assert isinstance(width, int)
    plain = net(x, sigma, label)
    assert torch.equal(net(x, sigma, label, torch.zeros(3, width)), plain)
    added = 0.3 * torch.randn(width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    told = net(x, sigma, label, added.expand(3, width))
    assert (told - plain).abs().max() > 1e-3
    if isinstance(net, EDM):
        bias = net.model.map_layer1.bias
        assert bias is not None
        bias.data += added
        torch.testing.assert_close(net(x, sigma, label), told, rtol=0, atol=1e-12)


def test_edm2_is_told_before_the_class() -> None:
    """The seam is before the sum with the class, in which time has half: telling ``a`` moves what the blocks see as
    telling the class's layer ``a`` would."""
    net, _, sigma, label = network("edm2")
    assert isinstance(net, EDM2)
    time = net.unet.emb_noise(net.unet.emb_fourier(sigma.log() / 4))
    one_hot = torch.eye(6, dtype=torch.float64)[label, :5]
    kind = net.unet.emb_label(5**0.5 * one_hot)  # type: ignore[misc]
    added = 0.1 * torch.ones_like(time)
    wanted = nn.functional.silu((time + added + kind) / 2**0.5) / 0.596
    torch.testing.assert_close(net.unet.condition(sigma.log() / 4, label, added), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("precond", "sigma_data", "variance"),
    [("edm", 0.5, 0.25), ("edm", 0.7, 0.49), ("vp", 0.5, 1.0)],
)
def test_preconditioners_keep_the_size(precond: str, sigma_data: float, variance: float) -> None:
    """What goes in has variance 1 for data of ``variance``. EDM's targets have variance 1 too (equations 117 and 131 of
    2206.00364)."""
    sigma = torch.logspace(-2, 2, 9, dtype=torch.float64)
    found = scales(precond, sigma, sigma_data)  # type: ignore[arg-type]
    ones = torch.ones_like(sigma)
    torch.testing.assert_close(found.into_B.square() * (variance + sigma.square()), ones, rtol=0, atol=1e-12)
    if precond == "edm":
        target = (1 - found.skip_B).square() * variance + (found.skip_B * sigma).square()
        torch.testing.assert_close(target / found.out_B.square(), ones, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.noise_B, sigma.log() / 4, rtol=0, atol=0)


def test_the_time_of_the_variance_preserving_diffusion() -> None:
    """The network's time is that at which the diffusion has this noise: ``sigma^2 = exp(b t^2 / 2 + a t) - 1``."""
    t = torch.linspace(0.01, 1, 12, dtype=torch.float64)
    sigma = (torch.exp(19.9 * t.square() / 2 + 0.1 * t) - 1).sqrt()
    torch.testing.assert_close(scales("vp", sigma, 0.5).noise_B, 999 * t, rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------------------ what students need


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp", "adm", "edm2"])
def test_the_derivative_along_a_path(name: str) -> None:
    """Forward-mode, against differences of second order."""
    net, x, sigma, label = network(name)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    with sdpa_kernel(SDPBackend.MATH):
        _, found = torch.func.jvp(lambda z, s: net(z, s, label), (x, sigma), (direction, sigma))
        step = 1e-6
        ahead = net(x + step * direction, sigma * (1 + step), label)
        behind = net(x - step * direction, sigma * (1 - step), label)
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp", "adm", "edm2"])
def test_a_fresh_network_learns(name: str) -> None:
    """Everything but what sampling has no use for has a gradient after a step or two, whatever starts at zero."""
    torch.manual_seed(0)
    case = CASES[name]
    net = fresh(case)
    data = 0.5 * torch.randn(3, *case.shape)
    x, sigma, label = data + torch.randn(data.shape), torch.ones(3), torch.tensor([0, 3, 5])
    lr = 3e-2 if name == "edm2" else 5e-3
    optimiser = torch.optim.Adam([each for each in net.parameters() if each.requires_grad], lr=lr)
    losses = []
    for _ in range(10):
        loss = (net(x, sigma, label) - data).square().mean()
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    # What EDM's network says at first is nothing, and its preconditioner alone is this far off.
    assert losses[0] < 0.4
    assert losses[-1] < 0.8 * losses[0]
    still = {key for key, value in net.named_parameters() if value.grad is None or not value.grad.any()}
    assert still == {key for key, value in net.named_parameters() if not value.requires_grad}
    assert still == ({"logvar_linear.weight"} if name == "edm2" else {"model.map_augment.weight"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp", "adm", "edm2"])
def test_lower_precisions(name: str, dtype: torch.dtype) -> None:
    """Weights in lower precision: the output has that of the state, and is near. So under autocast."""
    net, x, sigma, label = network(name, torch.float32)
    wanted = net(x, sigma, label)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = net(x, sigma, label)
    assert near.dtype == torch.float32
    assert (near - wanted).abs().max() < 0.1
    low = net.to(dtype)(x, sigma, label)
    assert low.dtype == torch.float32
    assert (low - wanted).abs().max() < (0.1 if dtype == torch.bfloat16 else 0.02)
    assert net(x.to(dtype), sigma, label).dtype == dtype


@pytest.mark.parametrize("name", ["ddpmpp", "edm2"])
def test_as_one_of_our_networks(name: str) -> None:
    """The velocity of a denoiser is ``(x - D(x / (1 - t); t / (1 - t))) / t``; at the end of the path it is asked at
    ``sigma = 80``. A second time changes nothing until it is learned."""
    net, x, _, label = network(name)
    ours = ForeignNetwork(net, CONVENTION, Inputs(5, two_times=True, guidance=True)).double()
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    state, share = x / x.std(), t[:, None, None, None]
    wanted = (state - net(state / (1 - share), t / (1 - t), label)) / share
    torch.testing.assert_close(ours(state, t, t, label), wanted, rtol=0, atol=1e-12)
    assert torch.equal(ours(state, t, 0.3 * t, label), ours(state, t, t, label))
    last = ours(state, torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64), label)
    end = net(80 * state, torch.full((3,), 80.0, dtype=torch.float64), label)
    torch.testing.assert_close(last, state - end, rtol=0, atol=1e-10)


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("shape", [(3, 8, 4), (3, 6, 6), (3, 8)])
def test_sides_that_do_not_halve(shape: tuple[int, ...]) -> None:
    config = EDMConfig(arch="ddpmpp", channels=16, multipliers=(1, 1, 1), blocks=1, convention=ConventionConfig())
    with pytest.raises(UsageError, match="of kind edm with 3 multipliers takes squares with sides that are multiples"):
        EDM(shape, config, 0)
