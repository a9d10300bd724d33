"""The benchmark of samplers: every way calls the network as often as it says and draws what it should; what is printed
adds up. Times are not tested."""

import dataclasses
import functools
import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import cli, refuse, succeed
from torch import Tensor, nn

from fewstep.bench import sample, sample_peers, sample_variants
from fewstep.bench.measure import Spread, Time
from fewstep.bench.sample import bench_sampling, check_samples, counting_network
from fewstep.bench.sample_peers import peer_ways
from fewstep.bench.sample_variants import variant_ways
from fewstep.bench.sample_ways import EULER, JUMPS, Inputs, Way, bare_calls, own_ways, returning_at_once
from fewstep.errors import FewstepError, UsageError

CPU = torch.device("cpu")
GATED = {"jumps", "Euler"}
QUICK = ("--network", "mlp-tiny", "--shape", "1,4,4", "--call-ms", "0.01", "--repeats", 1, "--threads", 1)
"""Nothing but behaviour can be seen at this size."""


def inputs(classes: int = 3, steps: int = 4) -> Inputs:
    noise = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return Inputs(noise, torch.arange(5) % classes if classes else None, classes, steps)


@functools.cache
def net(classes: int = 3) -> nn.Module:
    return counting_network("mlp-tiny", (1, 4, 4), classes)


def all_ways(given: Inputs) -> list[Way]:
    return [*own_ways(given), *peer_ways(given)[0]]


NAMES = [way.name for way in all_ways(inputs())]


def test_every_peer_is_here() -> None:
    """Else less is compared. Not asked where the tests are collected: a machine without them may want some others."""
    assert peer_ways(inputs())[1] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_way_calls_the_network_as_often_as_it_says(name: str) -> None:
    """On a batch twice as large where it says so, as the bare calls beside it do."""
    given = inputs()
    way = next(way for way in all_ways(given) if way.name == name)
    rows: list[int] = []

    def counted(x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None) -> Tensor:
        assert x.shape[0] == t_B.shape[0] == r_B.shape[0] == len(label_B if label_B is not None else x)
        rows.append(len(x))
        return net()(x, t_B, r_B, label_B)

    drawn = way.build(counted)()
    assert rows == [10 if way.doubled else 5] * way.calls
    rows.clear()
    bare_calls(counted, given, way.calls, doubled=way.doubled)()
    assert rows == [10 if way.doubled else 5] * way.calls
    assert torch.equal(way.build(net())(), drawn)
    alone = way.build(returning_at_once(given))()
    assert alone.shape == drawn.shape == given.noise.shape
    assert float((alone - drawn).abs().max()) > 0.1


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("classes", [0, 3])
def test_ways_draw_the_samples_they_should(classes: int, steps: int) -> None:
    """The packages too, whatever the number of steps; without classes nothing is guided."""
    given = inputs(classes, steps)
    ways = all_ways(given)
    assert len(ways) == len(NAMES) - (classes == 0)
    found = check_samples(ways, net(classes))
    assert set(found) == {way.name for way in ways if way.like}
    assert {"jumps", "Euler", "FlowMatchEuler scheduler", "FlowMatchLCM scheduler", "odeint, midpoint"} <= set(found)
    assert max(found.values()) < 1e-5


def test_a_way_that_draws_something_else_is_an_error() -> None:
    """Before anything is timed."""
    given = inputs()
    ways = own_ways(given)
    wrong = dataclasses.replace(next(way for way in ways if way.name == EULER), like="jumps by hand")
    with pytest.raises(FewstepError, match=r"Euler \(fewstep\) draws other samples than jumps by hand"):
        check_samples([*ways, wrong], net())


def test_a_package_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is said, and the others are measured."""
    known = sample_peers.version

    def version(package: str) -> str:
        if package == "diffusers":
            raise PackageNotFoundError
        return known(package)

    monkeypatch.setattr(sample_peers, "version", version)
    ways, missing = peer_ways(inputs())
    assert missing == ["diffusers"]
    assert {way.of.split()[0] for way in ways} == {"torchdiffeq"}


def test_every_weight_counts() -> None:
    assert all(parameter.any() for parameter in net().parameters())
    given = inputs()
    x, half_B = given.noise, torch.full((5,), 0.5)
    one, other = (net()(x, half_B, r_B, given.label) for r_B in (half_B, 0 * half_B))
    assert not torch.equal(one, other)


def test_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way beside its own bare calls, first one ahead and then the other; another way first in every round."""
    given = inputs()
    turns: list[str] = []

    def work(name: str, net: object) -> Any:
        return lambda: turns.append(name) or given.noise

    ways = [
        Way(name, "us", functools.partial(work, name), calls=2, gated=name == "b", alone=name != "c") for name in "abc"
    ]
    monkeypatch.setattr(sample, "bare_calls", lambda *_, **__: lambda: turns.append("-"))
    monkeypatch.setattr(sample, "check_samples", lambda *_: {})
    took = {"-": Time(4.0, 2.0), "a": Time(4.4, 2.1), "b": Time(8.0, 2.0), "c": Time(3.0, 1.0)}

    def timed(work: Any, device: torch.device) -> Time:
        before = len(turns)
        work()
        several = len(turns) - before
        return Time(*(several * each for each in dataclasses.astuple(took[turns[-1]])))

    monkeypatch.setattr(sample, "timed", timed)
    monkeypatch.setattr(sample, "ALONE", 3)
    monkeypatch.setattr(sample, "GATED_PAIRS", 2)
    found = sample._measured(net(), given, ways, 3, CPU, lambda done: None)
    assert "".join(turns) == "-aaaa-bb-bbb-c" + "b--bbbbc-a-aaa" + "-c-aaaa-bb-bbb"
    assert [cost.pairs for cost in found.ways] == [3, 6, 3]
    costs = {cost.name: cost for cost in found.ways}
    assert (found.batch_size, found.call_ms, found.call_cpu_ms) == (5, Spread(2, 2, 2), Spread(1, 1, 1))
    assert [round(costs[name].overhead.median, 9) for name in "abc"] == [10, 100, -25]
    assert [round(costs[name].cpu_overhead.median, 9) for name in "abc"] == [5, 0, -50]
    assert [costs[name].own_us and round(costs[name].own_us, 6) for name in "abc"] == [1050, 1000, None]
    assert costs["b"].ms == Spread(8, 8, 8)


# ----------------------------------------------------------------------------------------------------- faster networks


def test_variants_draw_nearly_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a network of their own, which leaves the plain one as it is."""
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: None)  # half a minute, and not ours
    unet = counting_network("unet-tiny", (1, 8, 8), 3)
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    given = Inputs(noise, torch.arange(2), 3, 2)
    ways, notes = variant_ways(unet, given, compile=True, precision="bf16", channels_last=True)
    assert not notes
    assert [way.name for way in ways] == ["jumps, compiled", "jumps, bf16", "jumps, channels last"]
    found = check_samples([*own_ways(given), *ways], unet)
    assert found["jumps, compiled"] == 0
    assert 1e-5 < found["jumps, bf16"] < 0.1
    assert found["jumps, channels last"] < 1e-4
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float32}
    assert variant_ways(unet, given, compile=False, precision="fp32", channels_last=False) == ([], [])


def test_a_network_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: nn.Module, **_: object) -> None:
        self.forward = None  # type: ignore[assignment]

    monkeypatch.setattr(nn.Module, "compile", broken)
    ways, notes = variant_ways(net(), inputs(), compile=True, precision="fp32", channels_last=False)
    assert not ways
    assert notes[0].startswith("torch.compile fails here (TypeError: ")


def test_a_layout_of_convolutions() -> None:
    with pytest.raises(UsageError, match="networks of convolutions, such as unet-tiny"):
        variant_ways(net(), inputs(), compile=False, precision="fp32", channels_last=True)


def test_a_graph_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its samples are compared to the bit; one that cannot be had is a note."""

    class Graph:
        def __init__(self, sampler: Any, report: Any) -> None:
            self.sampler = sampler
            if broken:
                report("no CUDA graph (RuntimeError: it failed)")

        def __call__(self, *given: Any) -> Any:
            return self.sampler(*given)

    monkeypatch.setattr(sample_variants, "GraphSampler", Graph)
    given = inputs()
    monkeypatch.setattr(sample_variants, "device_type", lambda inputs: "cuda")
    for broken in (False, True):
        ways, notes = variant_ways(net(), given, compile=False, precision="fp32", channels_last=False)
        assert [(way.name, way.tolerance, way.like) for way in ways] == [("jumps, CUDA graph", 0.0, JUMPS)][broken:]
        assert notes == ["no CUDA graph (RuntimeError: it failed)"][: int(broken)]
        check_samples([*own_ways(given), *ways], net())


# ---------------------------------------------------------------------------------------------------- the command line


def document(*arguments: object) -> dict[str, Any]:
    return dict(json.loads(succeed("bench", "sample", *arguments, *QUICK, "--json").stdout))


def test_the_document_and_its_row(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    found = document("--ledger", ledger, "--classes", 0, "--precision", "bf16", "--steps", 2)
    assert (found["bench"], found["network"], found["shape"], found["classes"]) == ("sample", "mlp-tiny", [1, 4, 4], 0)
    assert (found["device"], found["threads"], found["repeats"], found["steps"]) == ("cpu", 1, 1, 2)
    assert {"commit", "processor", "packages", "cores"} <= set(found["environment"])
    assert found["missing"] == []
    assert [batch["batch_size"] for batch in found["batches"]] == [1]  # the smallest there is, once
    ways = {way["name"]: way for way in found["batches"][0]["ways"]}
    assert set(ways) == {*NAMES, "jumps, bf16"} - {"Euler, guided"}
    assert {name for name, way in ways.items() if way["gated"]} == GATED
    assert all((way["own_us"] is None) == (name == "jumps, bf16") for name, way in ways.items())
    assert all(way["difference"] <= way["tolerance"] for way in ways.values() if way["like"])
    document("--ledger", ledger)
    rows = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert len(rows) == 2
    assert rows[0] == found


def test_two_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that fits, and one sample alone; rounds of both are counted."""
    monkeypatch.setattr(sample, "fitting_batch_size", lambda measure, call_ms, first: 3)
    seen: list[tuple[int, int]] = []
    found = bench_sampling(
        "mlp-tiny",
        (1, 4, 4),
        classes=3,
        repeats=2,
        device=CPU,
        report=lambda done, total: seen.append((done, total)),
    )
    assert [batch.batch_size for batch in found.batches] == [3, 1]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [[way.name for way in batch.ways] for batch in found.batches] == [NAMES, NAMES]


def test_the_table_is_for_people() -> None:
    said = succeed("bench", "sample", *QUICK)
    assert said.stdout == ""
    for word in ("1 x 4 x 4", "batch 1", "jumps", "FlowMatchLCM", "odeint", "beyond bare calls", "processor time"):
        assert word in said.stderr


def test_a_gate_on_the_overhead() -> None:
    """Of the samplers of few steps, by processor time here; the table is printed first."""
    assert cli("bench", "sample", *QUICK, "--max-overhead", "1e9").exit_code == 0
    failed = cli("bench", "sample", *QUICK, "--max-overhead", "-1e9")
    assert failed.exit_code == 4
    assert failed.stderr.splitlines()[-1].startswith("error: jumps costs ")
    assert "odeint" in failed.stderr


def test_what_a_gate_compares() -> None:
    times = [Spread(each, 0, 9) for each in (1.0, 2.0, 3.0)]
    cost = sample.WayCost("jumps", "us", 4, True, 1, *times, 1.0, None, None, None)
    bench = sample.SampleBench("mlp-tiny", 1, (2,), 0, 4, 1, "cpu", 1, (), ())
    assert bench.compared(cost).median == 3.0
    assert dataclasses.replace(bench, device="some GPU").compared(cost).median == 2.0


def test_threads_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """And are as many as were asked for while the ways are timed."""
    seen: list[int] = []
    monkeypatch.setattr(sample, "_measured", lambda *_: seen.append(torch.get_num_threads()))
    monkeypatch.setattr(sample, "fitting_batch_size", lambda measure, call_ms, first: 1)
    assert torch.get_num_threads() == 1
    assert bench_sampling("mlp-tiny", (2,), classes=0, call_ms=1e-3, repeats=1, device=CPU, threads=2).threads == 2
    assert torch.get_num_threads() == 1
    assert seen == [2]


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    refuse("bench", "sample", "--network", "flot-tinny", says=("'flot-tinny'", "did you mean 'flot-tiny'?"))
    refuse("bench", "sample", "--shape", "1,7,8", says=("patch 2", "7 x 8"))
    refuse("bench", "sample", "--shape", "1,x", says=("--shape takes sizes", "'1,x'"))
    refuse("bench", "sample", "--max-overhead", "nan", says=("--max-overhead", "finite"))
    refuse("bench", "sample", *QUICK, "--channels-last", says=("--channels-last is for networks of convolutions",))
    (tmp_path / "file").write_text("")
    refuse("bench", "sample", "--ledger", tmp_path / "file" / "x", says=("is not a folder",))
