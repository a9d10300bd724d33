"""`fewstep bench network`: what it counts in closed form, and what it refuses."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refuse, succeed
from torch import nn

from fewstep.bench import ceiling, network
from fewstep.bench.measure import Spread, Time
from fewstep.bench.network import _works, bench_networks, forward_flops
from fewstep.errors import EnvironmentFault
from fewstep.networks.build import build_network, parameter_count
from fewstep.networks.config import SIZES, FloTConfig, MLPConfig

IMAGES = ("--shape", "1,8,8", "--batch-size", 2, "--repeats", 2)


def test_operations_of_a_linear_layer() -> None:
    """Two for each of its weights, of one sample; biases and activations are not counted."""

    class Line(nn.Linear):
        def forward(self, x: torch.Tensor, *_: object) -> torch.Tensor:
            return super().forward(x.relu())

    assert forward_flops(Line(5, 7), (5,)) == 2 * 5 * 7


def test_operations_of_an_mlp() -> None:
    """Every weight of a linear layer multiplies once."""
    net = build_network(MLPConfig(width=16, depth=2), (1, 8, 8), 10, two_times=True)
    weights = sum(layer.weight.numel() for layer in net.modules() if isinstance(layer, nn.Linear))
    assert forward_flops(net, (1, 8, 8)) == 2 * weights


@pytest.mark.parametrize("heads", [2, 4])
def test_operations_of_a_transformer(heads: int) -> None:
    """Linear layers of patches once per patch, those of the condition once, and two products among all patches."""
    width, depth, patches = 32, 3, 16
    net = build_network(FloTConfig(width=width, depth=depth, heads=heads), (1, 8, 8), 10, two_times=True)
    once = ("embed", "modulation")
    linear = sum(
        layer.weight.numel() * (1 if any(word in name for word in once) else patches)
        for name, layer in net.named_modules()
        if isinstance(layer, nn.Linear)
    )
    assert forward_flops(net, (1, 8, 8)) == 2 * (linear + depth * 2 * patches**2 * width)


def test_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every network once a round, another one first in every round; what comes before is not counted, and each time
    lands where it belongs."""
    milliseconds = {"forward": 1.0, "step": 20.0, "jvp": 300.0}
    turns: list[str] = []

    def works(net: nn.Module, *_: object) -> dict[str, Callable[[], float]]:
        number = next(counted)
        return {name: lambda name=name: turn(number, name) for name in milliseconds}  # type: ignore[misc]

    def turn(number: int, name: str) -> float:
        turns.append("ab"[number])
        return (number + 1) * milliseconds[name] + (1e6 if len(turns) <= 6 else 0.0)

    counted = itertools.count()
    monkeypatch.setattr(network, "_works", works)
    monkeypatch.setattr(network, "timed", lambda work, device: Time(work(), 0.0))
    found = bench_networks(
        ["mlp-tiny", "flot-tiny"], (1, 8, 8), classes=0, batch_size=1, repeats=3, device=torch.device("cpu")
    )
    assert "".join(turns[::3]) == "ab" + "abbaab"
    for number, cost in enumerate(found.networks, start=1):
        assert cost.forward_ms == Spread(number, number, number)
        assert cost.step_ms == Spread(20 * number, 20 * number, 20 * number)
        assert cost.jvp_ms == Spread(300 * number, 300 * number, 300 * number)


def test_what_is_reported() -> None:
    """Networks in the order of their size, whatever order they were asked for in, and every round."""
    seen = []
    found = bench_networks(
        ["flot-tiny", "mlp-tiny"],
        (1, 8, 8),
        classes=10,
        batch_size=2,
        repeats=3,
        device=torch.device("cpu"),
        report=lambda done, total: seen.append((done, total)),
    )
    assert [cost.size for cost in found.networks] == ["mlp-tiny", "flot-tiny"]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for cost in found.networks:
        net = build_network(SIZES[cost.size], (1, 8, 8), 10, two_times=True)
        assert (cost.params, cost.flops) == (parameter_count(net), forward_flops(net, (1, 8, 8)))
        for spread in (cost.forward_ms, cost.step_ms, cost.jvp_ms):
            assert 0 < spread.low <= spread.median <= spread.high


def test_only_a_step_changes_the_weights() -> None:
    """Every one of them that a mean square reaches; the others leave neither changes nor gradients."""
    torch.manual_seed(0)
    net = build_network(FloTConfig(width=16, depth=1, heads=2), (1, 8, 8), 10, two_times=True)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    works = _works(net, (1, 8, 8), 10, 4, torch.device("cpu"), "fp32", False)
    assert list(works) == ["forward", "step", "jvp"]
    before = [parameter.detach().clone() for parameter in net.parameters()]
    for name in ("forward", "jvp"):
        result = works[name]()
        assert isinstance(result, torch.Tensor)
        assert (result.shape, result.requires_grad) == ((4, 1, 8, 8), False)
        assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert not torch.equal(works["forward"](), works["jvp"]())  # type: ignore[arg-type]
    works["step"]()
    assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in net.parameters())


def test_bfloat16_is_autocast() -> None:
    """Products are rounded and weights are not."""
    torch.manual_seed(0)
    net = build_network(FloTConfig(width=16, depth=1, heads=2), (1, 8, 8), 10, two_times=True)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    cpu = torch.device("cpu")
    whole, half = (_works(net, (1, 8, 8), 10, 4, cpu, precision, False)["forward"]() for precision in ("fp32", "bf16"))
    assert isinstance(whole, torch.Tensor)
    assert isinstance(half, torch.Tensor)
    assert 1e-4 < float((whole - half).norm() / whole.norm()) < 0.1
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}


def test_what_is_compiled_is_told_where_it_fails() -> None:
    """As a sentence with the network's name; anything else that fails stays what it is."""

    def uncompiled() -> None:
        raise torch._dynamo.exc.Unsupported("graph break")

    with pytest.raises(EnvironmentFault, match=r"the step of flot-tiny does not compile here .*graph break"):
        network._warm_up("flot-tiny", {"step": uncompiled})
    with pytest.raises(ZeroDivisionError):
        network._warm_up("flot-tiny", {"step": lambda: 1 / 0})


def test_the_rate_of_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two operations a multiply-add: one of side n in 4 milliseconds is 2 n^3 / 0.004 a second."""
    monkeypatch.setattr(ceiling, "timed", lambda work, device: Time(4.0, 4.0))
    assert ceiling.product_tflops(torch.float32, torch.device("cpu")) == pytest.approx(1e-12 * 2 * 1024**3 / 0.004)
    monkeypatch.undo()
    found = bench_networks(["mlp-tiny"], (1, 8, 8), classes=0, batch_size=32, repeats=2, device=torch.device("cpu"))
    cost = found.networks[0]
    seconds = cost.step_ms.median / 1e3
    assert cost.achieved == pytest.approx(3 * 32 * cost.flops / seconds / found.matmul_flops)


def test_sizes_of_one_last_word_are_of_one_size() -> None:
    """Within 5 %, on the images they are meant for: what makes a comparison of two kinds fair."""
    counts: dict[str, dict[str, int]] = {}
    for size, config in SIZES.items():
        kind, word = size.split("-")
        assert kind == config.kind
        with torch.device("meta"):
            net = build_network(config, (1, 8, 8) if word == "tiny" else (3, 32, 32), 10, two_times=True)
        counts.setdefault(word, {})[kind] = parameter_count(net)
    assert set(counts["tiny"]) == {"mlp", "flot", "unet"}
    for word in ("mini", "small", "base"):
        assert set(counts[word]) == {"flot", "unet"}
    for word, found in counts.items():
        assert max(found.values()) <= 1.05 * min(found.values()), (word, found)


def document(*arguments: object) -> dict[str, Any]:
    return dict(json.loads(succeed("bench", "network", *arguments, "--json").stdout))


def test_the_document_and_its_row(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    found = document("flot-tiny", *IMAGES, "--ledger", ledger)
    assert (found["bench"], found["shape"], found["classes"], found["batch_size"]) == ("network", [1, 8, 8], 10, 2)
    assert (found["device"], found["threads"], found["repeats"]) == ("cpu", 1, 2)
    assert {"commit", "processor", "packages", "cores"} <= set(found["environment"])
    document("flot-tiny", *IMAGES, "--ledger", ledger)
    rows = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert len(rows) == 2
    assert rows[0] == found


def test_all_that_take_the_shape() -> None:
    """Of points, no network of images."""
    found = document("--shape", 2, "--classes", 0, "--batch-size", 2, "--repeats", 1)
    assert [cost["size"] for cost in found["networks"]] == [size for size in SIZES if size.startswith("mlp-")]


def test_the_table_is_for_people() -> None:
    said = succeed("bench", "network", "flot-tiny", *IMAGES)
    assert said.stdout == ""
    for word in ("1 x 8 x 8", "batch 2", "flot-tiny", "parameters", "jvp"):
        assert word in said.stderr


def test_threads_are_put_back() -> None:
    assert torch.get_num_threads() == 1
    assert document("mlp-tiny", "--shape", 2, "--repeats", 1, "--threads", 2)["threads"] == 2
    assert torch.get_num_threads() == 1


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    refuse("bench", "network", "flot-tinny", says=("'flot-tinny'", "did you mean 'flot-tiny'?"))
    refuse("bench", "network", "flot-tiny", "--shape", "2", says=("kind flot takes images", "[2]"))
    refuse("bench", "network", "flot-tiny", "--shape", "1,7,8", says=("patch 2", "7 x 8"))
    for shape in ("3,x", "", "3,,2", "3,0,2", "-1"):
        refuse("bench", "network", "--shape", shape, says=("--shape takes sizes such as 3,32,32", f"'{shape}'"))
    (tmp_path / "file").write_text("")
    refuse("bench", "network", "--ledger", tmp_path / "file" / "x", says=("is not a folder",))
