"""Sampling as a CUDA graph: the samples of the sampler whatever is new in a call, and the sampler itself where there is
no graph. What a graph does is to repeat a work on fixed tensors, which can be done without one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import contents, succeed
from torch import Tensor, nn

from fewstep import graphs
from fewstep.condition import Embeddings
from fewstep.graphs import KEPT, Capture, GraphSampler, Work
from fewstep.keys import Key
from fewstep.networks.build import build_network
from fewstep.networks.config import FloTConfig
from fewstep.sampling import FieldSampler, MapSampler, OdeSampler, Samples, ServedField
from fewstep.sources import laplace
from fewstep.students.maps import AverageVelocityMap, ConsistencyMap, GuidanceInput
from fewstep.teachers.guided import guided
from fewstep.teachers.network import NetworkField

NAMES = ["jumps", "jumps, guided", "renoise", "Euler", "Heun", "guided", "fixed noise"]
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)


def repeated(work: Work) -> tuple[Samples, Callable[[], None]]:
    """Without a GPU: the same functions again, into the same tensors."""
    samples = work()

    def again() -> None:
        samples.x.copy_(work().x)

    return samples, again


def network(device: str) -> nn.Module:
    torch.manual_seed(0)
    net = build_network(FloTConfig(width=16, depth=2, heads=2), (1, 4, 4), 3, two_times=True, guidance=True)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net.eval().requires_grad_(False).to(device)


def sampler(name: str, net: nn.Module) -> OdeSampler | MapSampler | FieldSampler:
    field = NetworkField(net)
    return {
        "jumps": MapSampler({0: AverageVelocityMap(net)}, "jumps"),
        "jumps, guided": MapSampler({0: AverageVelocityMap(net, guidance=GuidanceInput(2.0, 0.2, 0.9))}, "jumps"),
        "renoise": MapSampler({0: ConsistencyMap(net)}, "renoise", source=laplace),
        "Euler": OdeSampler(field),
        "Heun": OdeSampler(field, "heun"),
        "guided": OdeSampler(guided(field, 1.5, 3)),
        "fixed noise": FieldSampler((ServedField(field),), "fixed_noise"),
    }[name]


def inputs(seed: int, device: str, batch: int = 2) -> tuple[Tensor, Tensor, Key, Tensor]:
    """Noise, labels, key and indices that all differ from those of other seeds."""
    index = seed + torch.arange(batch, device=device)
    return Key(seed).normal("noise", index, (1, 4, 4)), index % 3, Key(seed), index


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", NAMES)
def test_replays_are_the_sampler_to_the_bit(name: str, device: str) -> None:
    """With other noise, labels, seeds, fresh noise, numbers of steps and batches; what a call gave stays as it is."""
    heard: list[str] = []
    plain = sampler(name, network(device))
    graph = GraphSampler(plain, repeated if device == "cpu" else graphs.cuda_capture, heard.append)
    assert (graph.name, graph.source) == (plain.name, plain.source)
    kept: list[tuple[Tensor, Tensor]] = []
    for seed in (1, 2, 3):
        for steps, batch in ((4, 2), (1, 2), (4, 1)):
            given = inputs(seed, device, batch)
            found, wanted = graph(steps, *given), plain(steps, *given)
            assert found.nfe == wanted.nfe
            kept.append((found.x, wanted.x))
    assert not heard
    for found_x, wanted_x in kept:
        assert torch.equal(found_x, wanted_x)
    assert len({float(wanted_x.sum()) for _, wanted_x in kept}) == len(kept)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_without_labels(device: str) -> None:
    """Which is another graph than with them."""
    plain = sampler("jumps", network(device))
    graph = GraphSampler(plain, repeated if device == "cpu" else graphs.cuda_capture)
    for seed in (1, 2):
        noise, label, key, index = inputs(seed, device)
        for given in (None, label):
            assert torch.equal(graph(2, noise, given, key, index).x, plain(2, noise, given, key, index).x)


def counted(captures: list[Work]) -> Capture:
    def capture(work: Work) -> tuple[Samples, Callable[[], None]]:
        captures.append(work)
        return repeated(work)

    return capture


def test_one_capture_for_each_shape_and_number_of_steps() -> None:
    captures: list[Work] = []
    graph = GraphSampler(sampler("jumps", network("cpu")), counted(captures))
    for _ in range(2):
        for steps in (1, 2):
            graph(steps, *inputs(1, "cpu"))
    assert len(captures) == 2
    for steps in range(3, 3 + KEPT):  # which forgets those of 1 and 2 steps
        graph(steps, *inputs(1, "cpu"))
    graph(3, *inputs(1, "cpu"))
    assert len(captures) == 2 + KEPT
    graph(1, *inputs(1, "cpu"))
    assert len(captures) == 3 + KEPT


def test_where_capture_fails_the_sampler_goes_on() -> None:
    """One sentence, one try."""
    tries: list[Work] = []
    heard: list[str] = []

    def failing(work: Work) -> tuple[Samples, Callable[[], None]]:
        tries.append(work)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    plain = sampler("renoise", network("cpu"))
    graph = GraphSampler(plain, failing, heard.append)
    for seed in (1, 2):
        assert torch.equal(graph(4, *inputs(seed, "cpu")).x, plain(4, *inputs(seed, "cpu")).x)
    assert len(tries) == len(heard) == 1
    assert "operation not permitted when stream is capturing)" in heard[0]
    with pytest.raises(ValueError, match="at least one step"):
        graph(0, *inputs(1, "cpu"))


def test_on_a_cpu_there_is_no_graph() -> None:
    heard: list[str] = []
    plain = sampler("Euler", network("cpu"))
    graph = GraphSampler(plain, report=heard.append)
    assert torch.equal(graph(4, *inputs(1, "cpu")).x, plain(4, *inputs(1, "cpu")).x)
    assert "not on a CUDA device" in heard[0]


def test_embeddings_are_sampled_without() -> None:
    captures: list[Work] = []
    noise, _, key, index = inputs(1, "cpu")
    text = Embeddings({"text": torch.ones(2, 3)}, {"text": torch.zeros(1, 3)}, torch.zeros(2, dtype=torch.bool))

    def field(x: Tensor, t_B: Tensor, r_B: Tensor, label: Embeddings) -> Tensor:
        return x * label.told()["text"].sum(1)[:, None, None, None]

    plain = OdeSampler(NetworkField(field))
    graph = GraphSampler(plain, counted(captures))
    assert torch.equal(graph(2, noise, text, key, index).x, plain(2, noise, text, key, index).x)
    assert not captures


def test_the_command_line(trained: Path, tmp_path: Path) -> None:
    """``--graph`` changes no byte of what is written."""
    for name in ("consistency", "teacher"):
        common = ("sample", trained / name, "--steps", 2, "--n", 5, "--batch-size", 2, "--out")
        succeed(*common, tmp_path / "plain" / name)
        said = succeed(*common, tmp_path / "graph" / name, "--graph")
        assert ("no CUDA graph" in said.stderr) != torch.cuda.is_available()
    assert contents(tmp_path / "plain") == contents(tmp_path / "graph")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_sampling_waits_for_nothing(name: str) -> None:
    """No synchronisation in eager mode either, keyed noise included; CUDA itself would refuse one here."""
    plain, given = sampler(name, network("cuda")), inputs(1, "cuda")
    plain(4, *given)  # what is made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        plain(4, *given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
