"""Averages against their closed forms, through a restart, and in shards.

Also a script: ``torchrun tests/distill/test_ema.py FILE`` tracks averages of a network sharded among however many
processes it finds itself one of, and the first writes them to FILE.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as distributed
from forked import together
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fewstep.checkpoint import Tensors
from fewstep.distill.config import ConstantEMA, EMAConfig, HalfLifeEMA, PowerEMA, TrainConfig
from fewstep.distill.ema import EMA, decay_at, power_exponent, relative_std
from fewstep.distill.objective import Objective
from fewstep.distill.shards import shard

KINDS: tuple[EMAConfig, ...] = (
    ConstantEMA(decay=0.9),
    PowerEMA(relative_std=0.1),
    HalfLifeEMA(half_life_steps=4, ramp=0.5),
)


def cloned(tensors: Tensors) -> Tensors:
    return {name: value.clone() for name, value in tensors.items()}


def assert_same_bits(a: Tensors, b: Tensors) -> None:
    assert list(a) == list(b)
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


# ------------------------------------------------------------------------------------------------------------- decays


def test_average_by_hand() -> None:
    """``d_k = min(decay, (1 + k) / (10 + k))``: 2/11, 3/12, 4/13, then the cap; buffers are copied."""
    net = nn.BatchNorm1d(2).double()
    net.weight.data.fill_(3.0)
    ema = EMA(net, ConstantEMA(decay=0.3))
    expected = 3.0
    for decay, value in ((2 / 11, 5.0), (3 / 12, -1.0), (0.3, 2.0), (0.3, 7.0)):
        net.weight.data.fill_(value)
        net.running_mean.fill_(value)
        net.num_batches_tracked.fill_(int(value))
        ema.update()
        expected = decay * expected + (1 - decay) * value
        torch.testing.assert_close(ema.state()["weight"], torch.full((2,), expected, dtype=torch.float64))
        assert torch.equal(ema.state()["running_mean"], net.running_mean)
        assert torch.equal(ema.state()["num_batches_tracked"], net.num_batches_tracked)
    net.running_mean.fill_(100.0)
    assert torch.equal(ema.state()["running_mean"], torch.full((2,), 7.0, dtype=torch.float64))
    assert ema.updates == 4
    assert (ema.name, ema.config) == ("0.3", ConstantEMA(decay=0.3))
    assert not any(value.requires_grad for value in ema.state().values())


def geometric(d: float, steps: int) -> list[float]:
    """Of the initial weights, then of those of every step."""
    return [d**steps, *((1 - d) * d ** (steps - tau) for tau in range(1, steps + 1))]


def power(std: float, steps: int) -> list[float]:
    e = power_exponent(std) + 1
    return [0.0, *((tau**e - (tau - 1) ** e) / steps**e for tau in range(1, steps + 1))]


CLOSED = [
    # The ramp starts at 2/11 and never comes below this decay.
    (ConstantEMA(decay=0.18), geometric(0.18, 40)),
    (HalfLifeEMA(half_life_steps=3, ramp=0), geometric(0.5 ** (1 / 3), 40)),
    (PowerEMA(relative_std=0.05), power(0.05, 40)),
    (PowerEMA(relative_std=0.2), power(0.2, 40)),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize(("config", "shares"), CLOSED)
def test_average_is_the_weighted_sum_of_all_steps(
    config: EMAConfig, shares: list[float], dtype: torch.dtype, tolerance: float
) -> None:
    """Forty random steps, each with its share of the closed form; shares sum to one."""
    assert sum(shares) == pytest.approx(1, abs=1e-12)
    path = torch.randn(41, 6, dtype=dtype, generator=torch.Generator().manual_seed(1))
    net = nn.Linear(2, 3, bias=False).to(dtype)
    for step, weights in enumerate(path):
        net.weight.data.copy_(weights.reshape(3, 2))
        if step == 0:
            ema = EMA(net, config)
        else:
            ema.update()
    expected = (path.double() * torch.tensor(shares, dtype=torch.float64)[:, None]).sum(0)
    torch.testing.assert_close(ema.state()["weight"].flatten().double(), expected, rtol=0, atol=tolerance)


def test_a_jump_halves_every_half_life() -> None:
    net = nn.Linear(1, 1).double()
    net.weight.data.fill_(1.0)
    ema = EMA(net, HalfLifeEMA(half_life_steps=10, ramp=0))
    net.weight.data.zero_()
    for halvings in (1, 2, 3):
        for _ in range(10):
            ema.update()
        assert float(ema.state()["weight"]) == pytest.approx(0.5**halvings, abs=1e-14)


def test_half_life_ramps_up() -> None:
    """A twentieth of the steps so far, until that is longer than the half-life: at step 2000 for 100."""
    config = HalfLifeEMA(half_life_steps=100, ramp=0.05)
    assert [decay_at(config, k) for k in (1, 10, 40)] == pytest.approx([0.5**20, 0.25, 0.5**0.5], rel=1e-12)
    assert decay_at(config, 1999) < decay_at(config, 2000) == decay_at(config, 10**6) == 0.5**0.01
    # A ramp of zero is none, and one near zero forgets everything.
    assert decay_at(HalfLifeEMA(half_life_steps=100, ramp=0), 1) == 0.5**0.01
    assert decay_at(HalfLifeEMA(half_life_steps=100, ramp=1e-9), 1) == 0
    assert decay_at(HalfLifeEMA(half_life_steps=1e-9, ramp=0), 1) == 0


@pytest.mark.parametrize("config", [ConstantEMA(decay=0), PowerEMA(relative_std=0.05), PowerEMA(relative_std=0.279)])
def test_the_first_step_replaces_the_initial_weights(config: EMAConfig) -> None:
    """To the bit, however far it is; a decay of zero does so at every step."""
    net = nn.Linear(4, 4)
    with torch.no_grad():
        wanted = cloned(net.state_dict())
        net.weight.fill_(1e20)
        ema = EMA(net, config)
        net.load_state_dict(wanted)
    ema.update()
    assert_same_bits(ema.state(), net.state_dict())
    if config.kind == "constant":
        net.weight.data.normal_()
        ema.update()
        assert_same_bits(ema.state(), net.state_dict())


def test_widths_and_exponents() -> None:
    """The pairs that Karras et al. name (2312.02696, section 3.1), a uniform profile, and there and back again."""
    assert power_exponent(0.05) == pytest.approx(16.97, abs=5e-3)
    assert power_exponent(0.1) == pytest.approx(6.94, abs=5e-3)
    assert relative_std(0) == pytest.approx(1 / math.sqrt(12), rel=1e-15)
    assert power_exponent(12**-0.5) == pytest.approx(0, abs=1e-13)
    for std in (1e-4, 0.01, 0.05, 0.1, 0.2, 0.25, 0.28, 0.2886):
        assert relative_std(power_exponent(std)) == pytest.approx(std, rel=1e-12)
    for std in (0.0, -0.1, 0.289, 1.0):
        with pytest.raises(ValueError, match=r"lies above 0 and up to 0\.2887"):
            power_exponent(std)


@pytest.mark.parametrize("std", [0.05, 0.1, 0.25])
def test_width_of_a_long_run(std: float) -> None:
    """Shares of the steps, multiplied up from the decays: their standard deviation over the steps tends to ``std``."""

    def error(steps: int) -> float:
        decays = np.array([decay_at(PowerEMA(relative_std=std), k) for k in range(1, steps + 1)])
        later = np.append(np.cumprod(decays[:0:-1])[::-1], 1.0)
        shares = (1 - decays) * later
        tau = np.arange(1, steps + 1)
        mean = (shares * tau).sum()
        return abs(math.sqrt((shares * (tau - mean) ** 2).sum()) / steps / std - 1)

    assert error(10_000) < 1e-5
    assert error(10_000) < error(1_000) < error(100)


def test_rounding_stops_an_average_where_it_says() -> None:
    """In float32, from nothing towards weights that stand still: further off than rounding alone, and within
    ``6e-8 / (1 - d)``. Weights that move about are followed to rounding."""
    net = nn.Linear(1, 1000, bias=False)
    config = HalfLifeEMA(half_life_steps=500, ramp=0)
    random = torch.Generator().manual_seed(0)
    centre = 1 + torch.rand(1000, 1, generator=random)
    for noise, low, high in ((0.0, 1e-6, 6e-8 / (1 - decay_at(config, 1))), (1e-2, 0, 2e-6)):
        net.weight.data.copy_(centre * 0.9)
        exact = nn.Linear(1, 1000, bias=False).double()
        exact.load_state_dict({"weight": net.weight.data})
        ema, reference = EMA(net, config), EMA(exact, config)
        for _ in range(6000):
            net.weight.data.copy_(centre + noise * torch.randn(1000, 1, generator=random))
            exact.weight.data.copy_(net.weight.data)
            ema.update()
            reference.update()
        error = (ema.state()["weight"] - reference.state()["weight"]).norm() / centre.norm()
        assert low <= float(error) < high


# -------------------------------------------------------------------------------------------------------------- state


class Odd(nn.Module):
    """Everything a state can hold: blocks, a layer in two places, buffers of which one is not kept; sizes that two
    processes cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)
        self.blocks = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
        self.last = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1.0
        x = self.first(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.last(x)


def test_state_is_named_as_the_networks() -> None:
    """Names in the same order, persistent buffers alone, and the tensors are live."""
    net = nn.Sequential(Odd(), nn.BatchNorm1d(1))
    ema = EMA(net, PowerEMA())
    state = ema.state()
    assert_same_bits(state, net.state_dict())
    assert "0.seen" in state
    assert "0.scratch" not in state
    before = cloned(state)
    for parameter in net.parameters():
        parameter.data.add_(1.0)
    assert_same_bits(state, before)
    ema.update()
    assert_same_bits(state, net.state_dict())


def test_tied_weights_are_averaged_once() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    net[1].weight = net[0].weight
    net[0].weight.data.fill_(0.0)
    ema = EMA(net, HalfLifeEMA(half_life_steps=1, ramp=0))
    net[0].weight.data.fill_(1.0)
    ema.update()
    state = ema.state()
    assert list(state) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    for name in ("0.weight", "1.weight"):
        assert torch.equal(state[name], torch.full((3, 3), 0.5, dtype=torch.float64))


def tracked(net: nn.Module, steps: int = 6, restart: int = 4) -> Tensors:
    """Averages of every kind over some steps of AdamW. Others are made after ``restart`` steps from the states of the
    first and have to go on to the same bits."""
    emas = [EMA(net, config) for config in KINDS]
    again: list[EMA] = []
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    random = torch.Generator().manual_seed(5)
    for step in range(1, steps + 1):
        net(torch.randn(4, 3, generator=random)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for ema in (*emas, *again):
            ema.update()
        if step == restart:
            for ema in emas:
                other = EMA(net, ema.config)
                other.load(cloned(ema.state()), ema.updates)
                again.append(other)
    for ema, other in zip(emas, again, strict=True):
        assert other.updates == ema.updates == steps
        assert_same_bits(other.state(), ema.state())
    return {f"{ema.name}.{name}": value for ema in emas for name, value in ema.state().items()}


def odd() -> Odd:
    torch.manual_seed(3)
    return Odd()


def test_a_restart_goes_on_to_the_same_bits() -> None:
    net = odd()
    states = tracked(net)
    assert len(states) == 3 * len(net.state_dict())
    weights = net.state_dict()
    assert torch.equal(states["power-0.1.seen"], torch.full((2,), 6.0))
    assert not torch.equal(states["power-0.1.first.weight"], weights["first.weight"])
    assert not torch.equal(states["power-0.1.first.weight"], states["0.9.first.weight"])


def test_states_of_other_networks_are_refused() -> None:
    ema = EMA(nn.Linear(3, 3), PowerEMA())
    state = cloned(ema.state())
    with pytest.raises(ValueError, match=r"the average power-0\.1 and the network differ in bias, scale"):
        ema.load({"weight": state["weight"], "scale": state["bias"]}, 1)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\), its average power-0\.1 \(1,\)"):
        ema.load({"weight": state["weight"], "bias": torch.zeros(1)}, 1)


# ------------------------------------------------------------------------------------------------- trainer, processes


def test_every_average_is_updated_after_every_step() -> None:
    """Replayed from the weights of each step; the constant decay is on the ramp at first, then on its cap."""
    gamma = power_exponent(0.1)

    def decays(k: int) -> tuple[float, float, float]:
        return min(0.5, (1 + k) / (10 + k)), (1 - 1 / k) ** (gamma + 1), 0.5 ** (1 / min(4, k / 2))

    kinds = (0.5, {"kind": "power", "relative_std": 0.1}, {"kind": "half_life", "half_life_steps": 4, "ramp": 0.5})
    config = TrainConfig.model_validate({**tiny.CONFIG.model_dump(), "ema": kinds})
    objective = tiny.flow_matching()
    averages = [cloned(objective.student.state_dict()) for _ in kinds]
    for k, state in enumerate(tiny.run(objective, 15, config=config), start=1):
        assert len(state.emas) == 3
        for average, d, ema in zip(averages, decays(k), state.emas, strict=True):
            for name, value in objective.student.state_dict().items():
                average[name] = d * average[name] + (1 - d) * value
                torch.testing.assert_close(ema.state()[name], average[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_sharded_averages_are_the_unsharded(tmp_path: Path) -> None:
    """Two processes under FSDP2 and gloo, restart included."""
    file = tmp_path / "averages.safetensors"
    together(2, sharded, file)
    found, wanted = load_file(file), tracked(odd())
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)


def sharded(file: Path) -> None:
    distributed.init_process_group("gloo")
    assert distributed.get_world_size() == 2
    net = odd()
    shard(net, torch.device("cpu"))
    states = tracked(net)
    assert all(isinstance(parameter, DTensor) for parameter in net.parameters())
    if distributed.get_rank() == 0:
        save_file({name: value.contiguous() for name, value in states.items()}, file)
    distributed.destroy_process_group()


def test_what_is_not_trained_is_neither_averaged_nor_copied() -> None:
    net = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 3))
    ema = EMA(net, ConstantEMA(decay=0.5))
    state = ema.state()
    assert state["0.weight"].data_ptr() == net[0].weight.data_ptr()
    assert state["1.weight"].data_ptr() != net[1].weight.data_ptr()
    before = net[1].weight.detach().clone()
    with torch.no_grad():
        net[1].weight.add_(1)
    ema.update()
    assert torch.equal(ema.state()["0.weight"], net[0].weight)
    assert bool(((ema.state()["1.weight"] - before) > 0.1).all())


def test_a_student_of_which_little_is_trained_resumes_to_the_same_bits() -> None:
    def student() -> Objective:
        objective = tiny.meanflow()
        for name, parameter in objective.student.named_parameters():
            parameter.requires_grad_("embed" in name)
        return objective

    whole = [state.loss for state in tiny.run(student(), 6)]
    states = tiny.run(student(), 6)
    start = next(state.snapshot(True) for state in states if state.step == 3)
    start = {group: {name: value.clone() for name, value in tensors.items()} for group, tensors in start.items()}
    assert len(start["optimizer"]) < 3 * len(start["student"])
    assert [state.loss for state in tiny.run(student(), 6, start=start, done=3)] == whole[3:]
