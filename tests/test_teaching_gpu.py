"""What the training of teachers must give on an accelerator; skipped where there is none (``pytest -m gpu``)."""

from dataclasses import replace

import pytest
import torch

from fewstep.data.dataset import Batch, BatchSource, Dataset
from fewstep.data.load import digits
from fewstep.distill.couplings import assignment, sinkhorn
from fewstep.distill.curvature import CurvatureWeighting
from fewstep.distill.flow_matching import FlowMatching
from fewstep.distill.tangent import central_difference, forward_derivative
from fewstep.keys import Key
from fewstep.networks.build import build_network
from fewstep.networks.config import FloTConfig, UNetConfig
from fewstep.networks.dropout import keyed_dropout
from fewstep.times import uniform

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GPU = torch.device("cuda")
NETWORKS = pytest.mark.parametrize(
    "config",
    [
        FloTConfig(width=48, depth=2, heads=3),
        UNetConfig(channels=32, multipliers=(1, 2), blocks=1, attention=(4,), head_channels=32, dropout=0.2),
    ],
    ids=["flot", "unet"],
)


def network(config: FloTConfig | UNetConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    net = build_network(config, (1, 8, 8), 10, two_times=True)
    for parameter in net.parameters():  # nothing stays at zero
        torch.nn.init.normal_(parameter, std=0.1)
    return net.to(GPU)


def on_gpu(count: int = 8) -> Batch:
    return BatchSource(digits(), count, 0, device=GPU).batch(0)


@NETWORKS
def test_forward_derivative_is_the_central_difference(config: FloTConfig | UNetConfig) -> None:
    """In float64, where both have digits to spare."""
    net, batch = network(config).double(), on_gpu()
    x, t = batch.x.double(), torch.linspace(0.3, 0.9, 8, device=GPU, dtype=torch.float64)
    v = Key(0).normal("v", batch.index, (1, 8, 8)).double()
    exact = forward_derivative(net, x, v, t, t / 2, batch.label)
    difference = central_difference(1e-4)(net, x, v, t, t / 2, batch.label)
    assert (exact - difference).norm() < 1e-6 * exact.norm()


@NETWORKS
def test_the_fast_kernels_give_what_plain_attention_gives(config: FloTConfig | UNetConfig) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    net, batch = network(config), on_gpu()
    t = torch.full((8,), 0.5, device=GPU)
    fast = net(batch.x, t, t, batch.label)
    with sdpa_kernel(SDPBackend.MATH):
        plain = net(batch.x, t, t, batch.label)
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("coupling", [assignment(8), sinkhorn(8, 0.1)], ids=["assignment", "sinkhorn"])
def test_pairs_are_those_of_the_cpu(coupling: object) -> None:
    key, index = Key(1, 2), torch.arange(64)
    x, e = key.normal("x", index, (3,)), key.normal("e", index, (3,))
    here = coupling(x, e, None, key, index)  # type: ignore[operator]
    there = coupling(x.to(GPU), e.to(GPU), None, key, index.to(GPU))  # type: ignore[operator]
    assert torch.equal(there.cpu(), here)


def test_masks_are_those_of_the_cpu() -> None:
    dropped = []
    for device in (torch.device("cpu"), GPU):
        net = torch.nn.Sequential(
            *(
                module
                for module in network(
                    UNetConfig(dropout=0.2, channels=32, multipliers=(1,), attention=(), head_channels=32)
                ).modules()
                if type(module).__name__ == "Dropout"
            )
        )
        h = torch.ones(4, 32, 8, 8, device=device)
        with keyed_dropout(net, Key(0, 1), torch.arange(4, device=device)):
            dropped.append(net[0](h).cpu())
    assert 0 < (dropped[0] == 0).float().mean() < 0.5
    assert torch.equal(dropped[0], dropped[1])


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_batches_fetched_ahead_are_those_kept_on_the_device(kind: str) -> None:
    """By way of page-locked memory and copies that run beside the computation."""
    x = torch.randint(0, 256, (500, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = Dataset("noise", x if kind == "uint8" else x.float() / 255, torch.arange(500) % 5, 5, "image", flip=True)
    there, ahead = (BatchSource(replace(data, resident=where), 64, 0, device=GPU) for where in ("device", "host"))
    for step in (0, 1, 2, 3, 20, 4):
        one, other = there.batch(step), ahead.batch(step)
        assert one.x.device.type == other.x.device.type == "cuda"
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.label, other.label)
        assert torch.equal(one.row, other.row)
    ahead.close()


def test_curvature_is_estimated_where_the_training_is() -> None:
    net = network(FloTConfig(width=48, depth=1, heads=3))
    weighting = CurvatureWeighting(net, power=1.0, warmup_steps=0, probed=1.0, derivative=forward_derivative)
    objective = FlowMatching(net, times=uniform, label_dropout=0.1, null_label=10, weighting=weighting).to(GPU)
    for step in range(3):
        output = objective(on_gpu(64), Key(0, step))
        output.per_sample_B.mean().backward()
        objective.after_step()
    assert weighting.square.device.type == "cuda"
    assert 1 < float(weighting.weights(3).max()) <= 25
