"""Derivatives along the path: two ways that agree, in full precision, with the attention kernel chosen there alone."""

import pytest
import tiny
import torch
from torch import Tensor, nn

from fewstep.distill.tangent import (
    Derivative,
    EndDerivative,
    central_difference,
    end_derivative,
    end_difference,
    forward_derivative,
    layer_norm,
    path_derivative,
    path_difference,
)
from fewstep.networks.build import build_network
from fewstep.networks.config import FloTConfig, MLPConfig, UNetConfig

B, D = 12, 6


class Cubic(nn.Module):
    """``u = t^2 x^3 + r t`` with the derivative ``2 t x^3 + 3 t^2 x^2 v + r`` along ``(v, 1)``."""

    def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        t, r = t_B[:, None], r_B[:, None]
        return t**2 * x**3 + r * t

    @staticmethod
    def derivative(x: Tensor, v: Tensor, t_B: Tensor, r_B: Tensor) -> Tensor:
        t, r = t_B[:, None], r_B[:, None]
        return 2 * t * x**3 + 3 * t**2 * x**2 * v + r


class Attention(nn.Module):
    """One head over the coordinates as tokens, with torch's own attention; notes which kernels it may choose from."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 24)
        self.outer = nn.Linear(8, 1)
        self.only_math: list[bool] = []

    def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        kernels = torch.backends.cuda
        self.only_math.append(not (kernels.flash_sdp_enabled() or kernels.mem_efficient_sdp_enabled()))
        q, k, v = self.inner((x * t_B[:, None])[:, None, :, None]).chunk(3, dim=-1)
        return self.outer(nn.functional.scaled_dot_product_attention(q, k, v))[:, 0, :, 0] + r_B[:, None]


def point(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, B, D, generator=generator, dtype=dtype)
    t = torch.rand(B, generator=generator, dtype=dtype)
    return x, v, t, t / 3


def test_forward_mode_by_hand() -> None:
    x, v, t, r = point()
    torch.testing.assert_close(
        forward_derivative(Cubic(), x, v, t, r, None), Cubic.derivative(x, v, t, r), rtol=1e-13, atol=1e-13
    )


def test_central_difference_is_of_second_order() -> None:
    """The third derivative of a polynomial of degree five along the line makes the error ``h^2`` times a constant."""
    x, v, t, r = point()
    exact = Cubic.derivative(x, v, t, r)
    errors = [float((central_difference(h)(Cubic(), x, v, t, r, None) - exact).norm()) for h in (0.04, 0.02, 0.01)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.02)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.01)


def test_they_agree_on_a_network() -> None:
    """In float32 at the default width. Measured: 4e-5 relative."""
    net = tiny.student()
    generator = torch.Generator().manual_seed(1)
    x, v = torch.randn(2, B, 1, 8, 8, generator=generator)
    t = torch.rand(B, generator=generator)
    label = torch.arange(B) % 10
    exact = forward_derivative(net, x, v, t, t / 2, label)
    found = central_difference(5e-3)(net, x, v, t, t / 2, label)
    assert float((found - exact).norm() / exact.norm()) < 2e-4


@pytest.mark.parametrize("derivative", [forward_derivative, central_difference(1e-2)])
def test_no_graph_is_left_and_autocast_is_off_inside(derivative: Derivative) -> None:
    """bfloat16 keeps three digits: under autocast the derivative has to be the one without it, to the bit."""
    net = tiny.student()
    generator = torch.Generator().manual_seed(1)
    x, v = torch.randn(2, B, 1, 8, 8, generator=generator)
    t = torch.rand(B, generator=generator)
    wanted, plain = derivative(net, x, v, t, t / 2, None), net(x, t, t / 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = derivative(net, x, v, t, t / 2, None)
        assert float((net(x, t, t / 2) - plain).detach().abs().max()) > 1e-3
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)
    assert not found.requires_grad


def test_the_attention_kernel_is_chosen_around_the_derivative_alone() -> None:
    """Torch's fast kernels have no forward derivative: without the choice this raises (checked here)."""
    net = Attention().double()
    x, v, t, r = point()
    net(x, t, r)
    found = forward_derivative(net, x, v, t, r, None)
    net(x, t, r)
    assert net.only_math == [False, True, False]
    h = 1e-5
    difference = (net(x + h * v, t + h, r) - net(x - h * v, t - h, r)) / (2 * h)
    torch.testing.assert_close(found, difference.detach(), rtol=1e-6, atol=1e-8)
    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(lambda x, t: net(x, t, r), (x, t), (v, torch.ones_like(t)))


# ----------------------------------------------------------------------------- derivatives with a gradient of their own


class Normed(nn.Module):
    """Layer normalisation with weights, over two dimensions at once."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)
        self.norm = nn.LayerNorm((8, 8))
        self.outer = nn.Linear(8, 8)

    def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        h = self.inner(x.flatten(1)).reshape(-1, 8, 8) + (t_B * r_B)[:, None, None] * torch.linspace(-1, 1, 8).double()
        return self.outer(self.norm(h)).reshape(x.shape)


NETWORKS = {
    "mlp": MLPConfig(width=16, depth=2),
    "flot": FloTConfig(width=16, depth=1, heads=2, patch=4),
    "unet": UNetConfig(channels=32, multipliers=(1,), blocks=1, attention=(8,), head_channels=32),
    "normed": None,
}


def any_network(name: str) -> nn.Module:
    """In float64, every weight of it counting."""
    torch.manual_seed(0)
    config = NETWORKS[name]
    net = (Normed() if config is None else build_network(config, (1, 8, 8), 0, two_times=True)).double()
    for parameter in net.parameters():
        parameter.data = parameter + 0.1 * torch.randn_like(parameter)
    return net


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("what", ["path", "end"])
def test_the_gradient_passes_the_derivative(name: str, what: str) -> None:
    """Against central differences of 1e-4, whose gradient is that of plain evaluations. Measured: below 1e-6 relative
    for values and gradients. Torch's layer normalisation alone would put the gradient off by a third to two thirds."""
    net = any_network(name)
    generator = torch.Generator().manual_seed(2)
    x, v, a, b = torch.randn(4, 3, 1, 8, 8, generator=generator, dtype=torch.float64)
    t = 0.2 + 0.7 * torch.rand(3, generator=generator, dtype=torch.float64)

    def found(forward: bool) -> tuple[Tensor, Tensor, Tensor]:
        if what == "path":
            derivative = path_derivative if forward else path_difference(1e-4)
            u, along = derivative(net, x, v, t, t / 2, None)
        else:
            derivative = end_derivative if forward else end_difference(1e-4)
            u, along = derivative(net, x, t, t / 2, None)
        parts = torch.autograd.grad(
            (a * u + b * along).sum(), list(net.parameters()), allow_unused=True, materialize_grads=True
        )
        return u.detach(), along.detach(), torch.cat([part.flatten() for part in parts])

    for ours, wanted in zip(found(True), found(False), strict=True):
        assert float(wanted.norm()) > 0.01
        assert float((ours - wanted).norm() / wanted.norm()) < 1e-5


def test_derivatives_with_a_gradient_are_those_without() -> None:
    net = any_network("mlp")
    x, v = torch.randn(2, B, 1, 8, 8, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, B, dtype=torch.float64)
    u, du_dt = path_derivative(net, x, v, t, t / 3, None)
    torch.testing.assert_close(u, net(x, t, t / 3), rtol=0, atol=1e-13)
    torch.testing.assert_close(du_dt, forward_derivative(net, x, v, t, t / 3, None), rtol=0, atol=1e-12)


@pytest.mark.parametrize("derivative", [end_derivative, end_difference(1e-2)])
def test_autocast_is_off_inside_those_too(derivative: EndDerivative) -> None:
    net = tiny.student()
    x, t = torch.randn(B, 1, 8, 8), torch.linspace(0.1, 0.9, B)
    wanted = derivative(net, x, t, t / 3, None)
    along = path_derivative(net, x, x, t, t / 3, None)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, without in zip(derivative(net, x, t, t / 3, None), wanted, strict=True):
            assert torch.equal(ours, without)
        for ours, without in zip(path_derivative(net, x, x, t, t / 3, None), along, strict=True):
            assert torch.equal(ours, without)


def test_plain_layer_normalisation() -> None:
    """Torch's, with every argument it takes."""
    x, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((5, 4, 6), (4, 6), (4, 6)))
    for arguments in (((4, 6),), ((4, 6), weight), ((4, 6), weight, bias), ((4, 6), None, None, 0.1), ((6,),)):
        wanted = torch.layer_norm(x, *arguments)
        torch.testing.assert_close(layer_norm(x, *arguments), wanted, rtol=0, atol=1e-13)
