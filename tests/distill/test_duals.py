"""The rules of forward derivatives: each gives what torch's own forward mode gives, where it applies and where not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.distill.duals import RULES, cheap_duals
from fewstep.distill.tangent import forward_derivative
from fewstep.networks.build import build_network
from fewstep.networks.config import FloTConfig, MLPConfig, NetworkConfig, UNetConfig

B = 3
GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


WEIGHT, BIAS, KERNEL, SCALE = normal(5, 8), normal(5), normal(6, 8, 3, 3), normal(8)
ROW, IMAGE = normal(8), normal(B, 8, 4, 4)

Function = Callable[[Tensor], Tensor]

CASES: dict[str, tuple[Function, tuple[int, ...]]] = {
    "linear": (lambda x: F.linear(x, WEIGHT, BIAS), (B, 4, 8)),
    "linear without bias": (lambda x: F.linear(x, WEIGHT), (B, 8)),
    "linear, the weight too": (lambda x: F.linear(x, x, x[:, 0]), (8, 8)),
    "linear, the weight alone": (lambda x: F.linear(ROW, x), (5, 8)),
    "conv2d": (lambda x: F.conv2d(x, KERNEL, BIAS.repeat(2)[:6], stride=2, padding=1), (B, 8, 4, 4)),
    "conv2d, the weight too": (lambda x: F.conv2d(x, x), (B, 8, 4, 4)),
    "layer norm": (lambda x: F.layer_norm(x, (8,)), (B, 4, 8)),
    "layer norm, affine": (lambda x: F.layer_norm(x, (8,), SCALE, ROW, eps=1e-2), (B, 4, 8)),
    "layer norm, the bias alone": (lambda x: F.layer_norm(IMAGE[..., 0, 0], (8,), SCALE, x), (8,)),
    "layer norm of two dimensions": (lambda x: F.layer_norm(x, (4, 8), eps=0.1), (B, 4, 8)),
    "group norm": (lambda x: F.group_norm(x, 2, eps=1e-3), (B, 8, 4, 4)),
    "group norm, affine": (lambda x: F.group_norm(x, 4, SCALE, ROW), (B, 8, 4, 4)),
    "group norm, scale alone": (lambda x: F.group_norm(x, 4, SCALE), (B, 8, 5)),
    "group norm, the scale has a tangent": (lambda x: F.group_norm(IMAGE, 2, x), (8,)),
    "group norm, transposed": (lambda x: F.group_norm(x.transpose(2, 3), 2), (B, 8, 4, 2)),
    "attention": (
        lambda x: F.scaled_dot_product_attention(x, 2 * x.flip(-1), x.square()),
        (B, 2, 5, 4),
    ),
    "attention among other keys": (
        lambda x: F.scaled_dot_product_attention(x[:, :2], x, x.roll(1, 1)[..., :3]),
        (B, 5, 4),
    ),
    "attention of a constant query": (lambda x: F.scaled_dot_product_attention(IMAGE[..., :4], x, x), (B, 8, 4, 4)),
    "causal attention": (lambda x: F.scaled_dot_product_attention(x, x.flip(-1), x, is_causal=True), (B, 2, 5, 4)),
    "scaled attention": (lambda x: F.scaled_dot_product_attention(x, x.flip(-1), x, scale=0.3), (B, 2, 5, 4)),
    "tanh gelu": (lambda x: F.gelu(3 * x, approximate="tanh"), (B, 50)),
    "gelu": (lambda x: F.gelu(3 * x), (B, 50)),
    "arguments by name": (
        lambda x: F.gelu(
            input=F.layer_norm(input=F.linear(input=x, weight=WEIGHT), normalized_shape=[5]), approximate="tanh"
        ),
        (B, 8),
    ),
    "square": (lambda x: x.square(), (B, 8)),
    "times itself": (lambda x: x * x.flip(0), (B, 8)),
    "times a constant": (lambda x: x * ROW, (B, 8)),
    "a constant times": (lambda x: IMAGE * x, (8, 1, 1)),
    "times a number": (lambda x: 2 * x * 3, (B, 8)),
    "times a row with a tangent": (lambda x: x * x[:1], (B, 8)),
    "times a mask": (lambda x: x * (x > 0), (B, 8)),
    "plus a larger constant": (lambda x: x + IMAGE, (4,)),
    "plus a row with a tangent": (lambda x: x + x[:1], (B, 8)),
    "plus a number": (lambda x: 1 + x, (B, 8)),
    "plus, scaled": (lambda x: torch.add(x, x.flip(0), alpha=3).add(x, alpha=-0.5), (B, 8)),
    "nothing to derive": (lambda x: x + (ROW * ROW).square() + F.linear(ROW, WEIGHT).sum(), (B, 8)),
}


def both(function: Function, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Value and derivative of ``function`` along ``v`` with the rules."""

    def ruled(x: Tensor) -> Tensor:
        with cheap_duals():
            return function(x)

    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(ruled, (x,), (v,))  # type: ignore[return-value]


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_the_derivative_is_torchs_own(name: str) -> None:
    """To rounding, value and derivative."""
    function, shape = CASES[name]
    x, v = normal(2, *shape)
    with sdpa_kernel(SDPBackend.MATH):
        wanted = torch.func.jvp(function, (x,), (v,))
    for ours, theirs in zip(both(function, x, v), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_gradients_go_through(name: str) -> None:
    """Reverse over forward mode, for a loss on value and derivative at once. Norms step aside here: torch's kernel for
    the gradient of a layer norm, which they use, has a wrong gradient itself (without that, this fails)."""
    function, shape = CASES[name]
    x, v = normal(2, *shape)
    gradients = []
    for derive in (both, lambda function, x, v: torch.func.jvp(function, (x,), (v,))):
        leaf = x.clone().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            value, change = derive(function, leaf, v)
        gradients.append(torch.autograd.grad((value.sin() + change.square()).sum(), leaf)[0])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_outside_of_a_derivative_nothing_changes(name: str) -> None:
    function, shape = CASES[name]
    x = normal(*shape)
    with cheap_duals():
        found = function(x)
    assert torch.equal(found, function(x))


NETWORKS: tuple[NetworkConfig, ...] = (
    MLPConfig(width=16, depth=1),
    FloTConfig(width=16, depth=1, heads=2),
    UNetConfig(channels=32, multipliers=(1, 1), blocks=1, attention=(4,), head_channels=32),
)


def network(config: NetworkConfig) -> nn.Module:
    """One of two times, every weight of which counts."""
    net = build_network(config, (1, 8, 8), 10, two_times=True).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return net


def test_every_rule_is_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the networks that ship: one that never applies would be a mistake of its key."""
    applied = set()

    def noted(rule: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        def call(*arguments: object, **options: object) -> Tensor | None:
            dual = rule(*arguments, **options)
            if dual is not None:
                applied.add(rule)
            return dual

        return call

    rules = set(RULES.values())
    for function, rule in list(RULES.items()):
        monkeypatch.setitem(RULES, function, noted(rule))
    for config in NETWORKS:
        forward_derivative(network(config), *normal(2, B, 1, 8, 8), *normal(2, B), None)
    assert applied == rules


@pytest.mark.parametrize("config", NETWORKS, ids=lambda config: config.kind)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_networks(config: NetworkConfig, dtype: torch.dtype, tolerance: float) -> None:
    """As torch's own derivative in float64; measured 1e-15, and 6e-7 in float32."""
    net, label = network(config), torch.arange(B)
    (x, v), (t, r) = normal(2, B, 1, 8, 8), torch.rand(2, B, generator=GENERATOR)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        _, wanted = torch.func.jvp(lambda x, t: net(x, t, r, label), (x, t), (v, torch.ones_like(t)))
    found = forward_derivative(net.to(dtype), x.to(dtype), v.to(dtype), t, r, label)
    assert found.dtype == dtype
    assert float((found - wanted).norm() / wanted.norm()) < tolerance
