"""TF32 emulated, and what it costs what networks are asked for: an eighth of what bfloat16 does, and a bit less."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.bench.tf32 import EmulatedTF32, to_tf32
from fewstep.distill.jumps import jump_target, solve
from fewstep.distill.tangent import central_difference, forward_derivative
from fewstep.networks.build import build_network
from fewstep.networks.config import FloTConfig, NetworkConfig, UNetConfig
from fewstep.precision import PreciseNetwork
from fewstep.sampling import sample_ode, uniform_times
from fewstep.teachers.network import NetworkField, freeze

NETS: dict[str, NetworkConfig] = {
    "flot": FloTConfig(width=32, depth=2, heads=2),
    "unet": UNetConfig(channels=32, multipliers=(1, 1), blocks=1, attention=(4,), head_channels=32),
}
ROWS = 8


def test_rounding_to_ten_bits() -> None:
    """To the nearest of 1, 1 + 2^-10, 1 + 2^-9, ..., ties to the even one; signs and sizes do not matter."""
    ulp = 2.0**-10
    given = torch.tensor([1, 1 + ulp, 1 + ulp / 2, 1 + 1.5 * ulp, 1 + 0.6 * ulp, 1 + 0.4 * ulp, 2 - ulp / 4, 0])
    wanted = torch.tensor([1, 1 + ulp, 1, 1 + 2 * ulp, 1 + ulp, 1, 2, 0])
    for factor in (1.0, -1.0, 2.0**-40, 2.0**40):
        assert torch.equal(to_tf32(given * factor), wanted * factor)
    extremes = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert torch.equal(to_tf32(extremes)[:2], extremes[:2])
    assert bool(to_tf32(extremes)[2].isnan())


def test_factors_are_rounded_and_nothing_else() -> None:
    """A product is that of rounded factors, summed in float32; what is added to it, and other operations, are exact.
    So in backward passes and forward derivatives."""
    torch.manual_seed(0)
    x, w, bias = torch.randn(4, 6), torch.randn(5, 6), torch.randn(5)
    image, kernel = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)

    def close(found: Tensor, wanted: Tensor, full: Tensor) -> None:
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
        assert float((found - full).abs().max()) > 1e-4

    exact = to_tf32(x).double() @ to_tf32(w).double().T
    with EmulatedTF32():
        plain, added, other = x @ w.T, F.linear(x, w, bias), x[:, :5] * bias
        convolved = F.conv2d(image, kernel)
        tangent = torch.func.jvp(lambda z: z @ w.T, (x,), (x,))[1]
        leaf = w.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((x @ leaf.T).sum(), leaf)
    assert torch.equal(other, x[:, :5] * bias)
    close(plain, exact, x @ w.T)
    close(added, exact + bias.double(), F.linear(x, w, bias))
    close(tangent, exact, x @ w.T)
    close(convolved, F.conv2d(to_tf32(image).double(), to_tf32(kernel).double()), F.conv2d(image, kernel))
    close(gradient, to_tf32(x).double().sum(0).expand(5, 6), x.sum(0).expand(5, 6))


def network(kind: str) -> nn.Module:
    """All of its weights drawn: those that start at zero would leave most of it out."""
    torch.manual_seed(0)
    net = build_network(NETS[kind], (1, 8, 8), 4, two_times=True)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return freeze(net)


def quantities() -> dict[str, Callable[[Callable[..., Tensor]], Tensor]]:
    """What training and sampling compute with a network, as functions of the network."""
    torch.manual_seed(1)
    e, x, label = torch.randn(ROWS, 1, 8, 8), torch.randn(ROWS, 1, 8, 8), torch.arange(ROWS) % 4
    t = torch.linspace(0.1, 1, ROWS)
    v, at = e - x, (torch.lerp(x, e, t.reshape(-1, 1, 1, 1)), e - x, t, t / 3, label)
    gap, half, before = (t - t / 3).reshape(-1, 1, 1, 1), torch.full_like(t, 0.5), torch.full_like(t, 0.5 - 1 / 32)

    def two_euler_steps(net: Callable[..., Tensor]) -> Tensor:
        x_s = solve(NetworkField(net), "euler", at[0], half, before, label, substeps=2)
        return jump_target(at[0], x_s, half, before)

    return {
        "meanflow": lambda net: v - gap * forward_derivative(net, *at),
        "progressive": two_euler_steps,
        "euler": lambda net: sample_ode(NetworkField(net), e, uniform_times(16), label).x,
        "central difference": lambda net: central_difference(5e-3)(net, *at),
        "derivative": lambda net: forward_derivative(net, *at),
    }


def errors(kind: str, name: str) -> tuple[float, float]:
    """Relative errors in TF32 and in bfloat16, of the value in float32."""
    net, quantity = network(kind), quantities()[name]
    with torch.no_grad():
        wanted = quantity(net)
        with EmulatedTF32():
            in_tf32 = quantity(net)
        in_bf16 = quantity(PreciseNetwork(net, "bf16"))
    tf32, bf16 = (float((found - wanted).norm() / wanted.norm()) for found in (in_tf32, in_bf16))
    return tf32, bf16


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("name", ["meanflow", "progressive", "euler"])
def test_tf32_costs_less_than_a_quarter_of_bfloat16(name: str, kind: str) -> None:
    """Which is what lets the float32 that is left in a run of `bf16` be multiplied in TF32."""
    tf32, bf16 = errors(kind, name)
    assert 1e-6 < tf32 < bf16 / 4
    assert bf16 < 0.05


@pytest.mark.parametrize("kind", NETS)
def test_differences_of_outputs_lose_what_derivatives_keep(kind: str) -> None:
    """Which is why `jvp: finite_difference` keeps its float32 true."""
    (difference, _), (derivative, _) = errors(kind, "central difference"), errors(kind, "derivative")
    assert difference > 5 * derivative
    assert derivative < 5e-3
