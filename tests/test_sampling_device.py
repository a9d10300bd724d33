"""Samplers leave the device of their samples alone: nothing is read back from it and nothing is sent there.

On the meta device tensors have shapes and no numbers: any host read of one raises. What comes from the host would not,
so that is watched for.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fewstep.flow import TimeDomain, uniform_grid
from fewstep.keys import Key
from fewstep.networks.build import build_network
from fewstep.networks.config import FloTConfig, MLPConfig, NetworkConfig, UNetConfig
from fewstep.sampling import (
    FieldSampler,
    MapSampler,
    OdeSampler,
    Sampler,
    ServedField,
    sample_fixed_noise,
    sample_map,
    sample_ode,
    sample_renoise,
)
from fewstep.students.maps import AverageVelocityMap, ConsistencyMap, GuidanceInput
from fewstep.teachers.guided import guided
from fewstep.teachers.network import NetworkField

META = torch.device("meta")
NETWORKS: dict[str, NetworkConfig] = {
    "mlp": MLPConfig(width=16, depth=2),
    "flot": FloTConfig(width=16, depth=2, heads=2),
    "unet": UNetConfig(channels=32, multipliers=(1, 1), blocks=1, attention=(4,), head_channels=32),
}


class Sent(TorchFunctionMode):
    """Every function whose result lies on the meta device and whose numbers come from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.device == META:
            given = [each for each in args if isinstance(each, Tensor)]
            made = func in (torch.tensor, torch.as_tensor, Tensor.new_tensor)
            if made or any(each.device.type == "cpu" and each.ndim for each in given):
                self.names.append(func.__name__)
        return result


def samplers(net: torch.nn.Module) -> dict[str, Sampler]:
    field, times = NetworkField(net), (1.0, 0.7, 0.3, 0.1, 0.0)
    guidance = GuidanceInput(1.5, 0.1, 0.9)
    return {
        "jumps": MapSampler({0: AverageVelocityMap(net)}, "jumps"),
        "jumps on nodes": MapSampler({4: AverageVelocityMap(net, TimeDomain("grid", times))}, "jumps"),
        "jumps, guided": MapSampler({0: AverageVelocityMap(net, guidance=guidance)}, "jumps"),
        "renoise": MapSampler({0: ConsistencyMap(net)}, "renoise"),
        "renoise, guided": MapSampler({0: ConsistencyMap(net, guidance=guidance)}, "renoise"),
        "euler": OdeSampler(field),
        "heun": OdeSampler(field, "heun"),
        "midpoint": OdeSampler(field, "midpoint"),
        "guided": OdeSampler(guided(field, 2.0, 3, 0.2, 0.8)),
        "fixed noise": FieldSampler((ServedField(field),), "fixed_noise"),
    }


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("mlp", name) for name in samplers(torch.nn.Identity())), ("flot", "jumps, guided"), ("unet", "jumps, guided")],
)
def test_nothing_crosses_between_host_and_device(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a network with every input there is, class labels or none."""
    # Autocasting knows no such device.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)
    net = build_network(NETWORKS[kind], (1, 8, 8), 3, two_times=True, guidance=True).eval().to(META)
    noise, index = torch.empty(2, 1, 8, 8, device=META), torch.arange(2, device=META)
    labels = [index % 3] if name == "guided" else [index % 3, None]
    for label in labels:
        with Sent() as sent:
            samples = samplers(net)[name](4, noise, label, Key(0), index)
        assert samples.x.shape == noise.shape
        assert samples.x.device == META
        assert not sent.names


def test_what_would_be_seen() -> None:
    """A read raises, and a number that is sent is found."""
    there = torch.empty(2, device=META)
    for read in (Tensor.tolist, Tensor.item, bool, float):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read(there[:1])
    with Sent() as sent:
        _ = torch.tensor([1.0, 2.0], device=META) + torch.ones(2).to(META)
        _ = there + 1
    assert sent.names == ["tensor", "to"]
    with pytest.raises((RuntimeError, NotImplementedError)):  # the map's own check of a call that no sampler makes
        AverageVelocityMap(torch.nn.Identity())(there, there, there)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_grid_may_be_numbers(dtype: torch.dtype) -> None:
    """The same bits as from a tensor, in every sampler."""
    net = build_network(NETWORKS["mlp"], (2,), 0, two_times=True).to(dtype)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    noise, index = torch.randn(3, 2, dtype=dtype), torch.arange(3)
    for grid in (uniform_grid(3), torch.tensor([1.0, 0.4, 0.0])):
        for times in (grid, tuple(grid.tolist())):
            found = [
                sample_ode(NetworkField(net), noise, times).x,
                sample_map(AverageVelocityMap(net), noise, times).x,
                sample_renoise(ConsistencyMap(net), noise, times, None, Key(1), index).x,
                sample_fixed_noise(NetworkField(net), noise, times).x,
            ]
            if times is grid:
                wanted = found
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    for wrong in ((1.0,), (1.0, 0.5, 0.5), (1.0, float("nan"), 0.0)):
        with pytest.raises(ValueError, match="strictly decreasing"):
            sample_ode(NetworkField(net), noise, wrong)


def test_jumps_of_a_sampler_are_those_of_the_map() -> None:
    """Which checks its domain in every call, where a sampler does it once for its grid."""
    net = build_network(NETWORKS["mlp"], (2,), 0, two_times=True)
    torch.nn.init.normal_(net.leave.weight, std=0.3)  # type: ignore[union-attr, arg-type]
    x, one_B, half_B, zero_B = torch.randn(3, 2), torch.ones(3), torch.full((3,), 0.5), torch.zeros(3)
    average, consistency = AverageVelocityMap(net), ConsistencyMap(net)
    with torch.no_grad():
        assert torch.equal(sample_map(average, x, (1.0, 0.5)).x, average(x, one_B, half_B))
        assert torch.equal(sample_map(consistency, x, (1.0, 0.0)).x, consistency(x, one_B, zero_B))
    with pytest.raises(ValueError, match="only jumps to data"):
        consistency(x, one_B, half_B)
    with pytest.raises(ValueError, match="only jumps to data"):
        sample_map(consistency, x, (1.0, 0.5))
