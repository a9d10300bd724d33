"""`fewstep bench objectives`: what is timed is the same step, every objective has its turn. Times are not tested."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import cli, refuse, succeed
from torch import Tensor, nn

from fewstep.bench import measure, objectives
from fewstep.bench import variants as lines
from fewstep.bench.measure import Spread, Time
from fewstep.bench.memory import peak_bytes
from fewstep.bench.objectives import bench_objectives
from fewstep.bench.textbook import Textbook, step_difference
from fewstep.bench.variants import REFERENCE, TEXTBOOK, chosen_variants, variants
from fewstep.bench.workshop import Workshop
from fewstep.config import TRAINS, check_config
from fewstep.data.dataset import Batch, Dataset
from fewstep.distill.flow_maps.config import AdaptivePowerConfig, MeanFlowConfig
from fewstep.distill.objective import LossOutput, Objective
from fewstep.distill.plan import plan
from fewstep.errors import FewstepError
from fewstep.keys import Key
from fewstep.networks.build import build_network, parameter_count
from fewstep.networks.config import SIZES, FloTConfig

CPU = torch.device("cpu")
TINY = ("--size", "mlp-tiny", "--batch-size", 8, "--repeats", 1)
MEANFLOW = [
    "meanflow",
    "meanflow-finite-difference",
    "meanflow-one-sided",
    "meanflow-teacher",
    "meanflow-textbook",
]


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path, "mlp-tiny", (1, 8, 8), 10, 8, CPU)


# ------------------------------------------------------------------------------------------------- the textbook's step


def student(dtype: torch.dtype) -> nn.Module:
    net = build_network(FloTConfig(width=16, depth=2, heads=2), (1, 4, 4), 3, two_times=True).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return net


def batch(dtype: torch.dtype, count: int = 12) -> Batch:
    x = torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Batch(x.to(dtype), torch.arange(count) % 3, torch.arange(count))


def by_hand(net: nn.Module, config: MeanFlowConfig, data: Batch) -> Tensor:
    """Equations 6, 10 and 22 of the paper row by row, its derivative by a central difference in float64."""
    textbook = Textbook(net, config)
    seen: list[tuple[Tensor, ...]] = []
    hook = net.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    t = textbook(data, Key(0)).t_B.double()
    hook.remove()
    r = seen[0][2].double()
    e = Key(0).normal("noise", data.index, (1, 4, 4)).double()
    x, label = data.x, data.label
    v = e - x
    times = t.reshape(-1, 1, 1, 1)
    x_t, h = (1 - times) * x + times * e, 1e-5
    with torch.no_grad():
        du = (net(x_t + h * v, t + h, r, label) - net(x_t - h * v, t - h, r, label)) / (2 * h)
    square = (net(x_t, t, r, label) - v + (t - r).reshape(-1, 1, 1, 1) * du).square().sum(dim=(1, 2, 3))
    assert isinstance(config.weight, AdaptivePowerConfig)
    return square / (square.detach() + config.weight.offset) ** config.weight.power


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_the_textbooks_step_is_the_papers(power: float) -> None:
    """Every row's loss, and three quarters of the rows on the diagonal. Measured: 3e-9, by the difference and the
    rounding of times to float32."""
    config = MeanFlowConfig(velocity="data", weight=AdaptivePowerConfig(power=power, offset=0.1))
    net, data = student(torch.float64), batch(torch.float64)
    output = Textbook(net, config)(data, Key(0))
    torch.testing.assert_close(output.per_sample_B, by_hand(net, config, data), rtol=1e-5, atol=1e-7)


POWER = {"weight": {"kind": "power", "power": 1.0}}


@pytest.mark.parametrize("settings", [{}, POWER, {"jump_fraction": 0.0}, {"jump_fraction": 1.0}])
def test_ours_is_the_textbooks(settings: dict[str, Any]) -> None:
    """Loss and gradient of one product over all rows, and of the tail alone beside a plain forward pass. 5e-16."""
    config = check_config(
        {
            "name": "x",
            "data": {"kind": "digits"},
            "student": {"kind": "average_velocity", "init": "scratch", "network": {"kind": "mlp"}},
            "objective": {"kind": "meanflow", "velocity": "data", **settings},
        },
        "x",
    )
    assert isinstance(config.objective, MeanFlowConfig)
    (stage,) = plan(config, None, Dataset("x", torch.zeros(1, 1, 4, 4), None, 3, kind="image"))
    net = student(torch.float64)
    difference = step_difference(Textbook(net, config.objective), stage.build(net, None), batch(torch.float64))
    assert difference < 1e-13


class _Scaled(Objective):
    """Another objective's loss, or its gradient alone, ``factor`` times."""

    def __init__(self, inner: Objective, factor: float, gradient_alone: bool) -> None:
        super().__init__()
        self.inner, self.student, self.factor, self.gradient_alone = inner, inner.student, factor, gradient_alone

    def forward(self, batch: Batch, key: Key) -> LossOutput:
        output = self.inner(batch, key)
        loss = self.factor * output.per_sample_B
        if self.gradient_alone:
            loss = loss - (self.factor - 1) * output.per_sample_B.detach()
        return LossOutput(loss, output.residual_B, output.t_B, {})


@pytest.mark.parametrize("gradient_alone", [False, True])
def test_another_step_is_not_timed_as_the_same(gradient_alone: bool) -> None:
    inner = Textbook(student(torch.float64), MeanFlowConfig(velocity="data"))
    data = batch(torch.float64)
    assert step_difference(inner, _Scaled(inner, 1 + 1e-8, gradient_alone), data) == pytest.approx(1e-8, rel=1e-3)
    with pytest.raises(FewstepError, match="differs from ours by 1e-05"):
        step_difference(inner, _Scaled(inner, 1 + 1e-5, gradient_alone), data)


# ---------------------------------------------------------------------------------------------------- what is measured


def test_every_kind_has_its_line() -> None:
    """From the config tree itself, flow matching first."""
    known = variants()
    assert next(iter(known)) == REFERENCE
    assert {variant.kind for variant in known.values()} == set(TRAINS)
    assert set(TRAINS) <= set(known)
    assert [name for name, variant in known.items() if variant.kind == "meanflow"] == MEANFLOW
    assert known["meanflow"].settings == {"velocity": "data"}
    assert known["meanflow-finite-difference"].settings == {"velocity": "data", "jvp": "finite_difference"}


def test_kinds_and_lines_are_chosen_by_name() -> None:
    assert [each.name for each in chosen_variants(["meanflow"])] == [REFERENCE, *MEANFLOW]
    assert [each.name for each in chosen_variants([TEXTBOOK])] == [REFERENCE, TEXTBOOK]
    assert [each.name for each in chosen_variants([])] == list(variants())


@pytest.mark.parametrize("name", variants())
def test_every_objective_is_built_as_training_builds_it(name: str, workshop: Workshop) -> None:
    """With its settings, on the same network, and with no weight that is all zeros to hide part of the work."""
    variant = variants()[name]
    config = workshop.config(variant)
    assert config.objective.kind == variant.kind
    assert variant.settings.items() <= config.objective.model_dump().items()
    objective = workshop.objective(variant)
    one_time = parameter_count(build_network(SIZES["mlp-tiny"], (1, 8, 8), 10, two_times=False))
    assert one_time <= parameter_count(objective.student) < 1.3 * one_time
    assert all(parameter.any() for parameter in objective.student.parameters())
    output = objective(workshop.source(pairs=variant.kind == "reflow").batch(0), Key(0))
    assert output.per_sample_B.shape == (8,)
    assert output.per_sample_B.isfinite().all()


def test_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every objective once a round, another one first in every round; ratios are those of a round, times land where
    they belong."""
    turns: list[str] = []
    rounds = itertools.count()

    def timed(work: Any, device: torch.device) -> Time:
        turns.append("fmc"[order.setdefault(id(work), len(order))])
        load = 1 + next(rounds) // 3  # of the machine, another in every round
        return {"f": Time(10 * load, load), "m": Time(30 * load, 5 * load), "c": Time(20 * load, 2 * load)}[turns[-1]]

    order: dict[int, int] = {}
    monkeypatch.setattr(measure, "timed", timed)
    names = ["meanflow", "consistency"]
    kept = {name: variants()[name] for name in [REFERENCE, *names]}
    monkeypatch.setattr(lines, "variants", lambda: kept)
    found = bench_objectives(names, "mlp-tiny", (1, 8, 8), classes=0, batch_size=8, repeats=4, device=CPU)
    assert "".join(turns) == "fmcmcfcfmfmc"
    costs = {cost.name: cost for cost in found.objectives}
    assert list(costs) == [REFERENCE, *names]
    assert costs["meanflow"].ratio == Spread(3, 3, 3)
    assert costs["meanflow"].cpu_ratio == Spread(5, 5, 5)
    assert costs["consistency"].ratio == costs["consistency"].cpu_ratio == Spread(2, 2, 2)
    assert costs["meanflow"].cpu_ms.median == 12.5
    assert costs[REFERENCE].step_ms.median == 25
    assert found.textbook_error is None
    assert costs["meanflow"].textbook_ratio is found.textbook("meanflow") is None


def test_ratios_to_the_textbooks_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round by round: on a CPU by processor time, on a GPU by the clock."""
    rounds = itertools.count()

    def timed(work: Any, device: torch.device) -> Time:
        number = next(rounds)
        line = (number + number // 3) % 3  # every round begins with the next one
        load = 1 + number // 3
        return (Time(10 * load, load), Time(12 * load, 2 * load), Time(16 * load, 8 * load))[line]

    monkeypatch.setattr(measure, "timed", timed)
    kept = {name: variants()[name] for name in (REFERENCE, "meanflow", TEXTBOOK)}
    monkeypatch.setattr(lines, "variants", lambda: kept)
    found = bench_objectives([], "mlp-tiny", (1, 8, 8), classes=0, batch_size=8, repeats=4, device=CPU)
    assert found.textbook("meanflow") == Spread(0.25, 0.25, 0.25)
    assert found.textbook(TEXTBOOK) == Spread(1, 1, 1)
    assert replace(found, device="some GPU").textbook("meanflow") == Spread(0.75, 0.75, 0.75)
    assert found.textbook("progressive") is None


def test_compiled_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside every eager one, as ``train.compile`` makes it; the textbook's step has none."""
    compiled: list[Objective] = []
    monkeypatch.setattr(objectives, "compile_objective", lambda objective, data: compiled.append(objective))
    names = ["meanflow", TEXTBOOK]
    kept = {name: variants()[name] for name in [REFERENCE, *names]}
    monkeypatch.setattr(lines, "variants", lambda: kept)
    found = bench_objectives(
        names, "mlp-tiny", (1, 8, 8), classes=10, batch_size=8, repeats=1, device=CPU, compiled=True
    )
    wanted = [REFERENCE, f"{REFERENCE} (compiled)", "meanflow", "meanflow (compiled)", TEXTBOOK]
    assert [cost.name for cost in found.objectives] == wanted
    assert len({id(objective) for objective in compiled}) == 2


def test_the_peak_of_a_step() -> None:
    """Of what is held at the same time; what was there before, and what is freed in between, does not count."""
    before = torch.zeros(2**20)

    def steps() -> Iterator[None]:
        while True:
            one = before + 1  # 4 MiB
            del one
            two = [torch.zeros(2**18) for _ in range(6)]  # 6 MiB
            del two
            yield

    each = steps()
    next(each)
    assert peak_bytes(each, CPU) == pytest.approx(6 * 2**20, abs=1024)


def test_memory_of_the_textbooks_step() -> None:
    """It keeps the graph of the tangents too; ours holds what flow matching holds."""
    found = bench_objectives(
        [TEXTBOOK, "meanflow"], "flot-tiny", (1, 8, 8), classes=10, batch_size=32, repeats=1, device=CPU
    )
    memory = {cost.name: cost.memory_ratio for cost in found.objectives}
    assert memory[REFERENCE] == 1
    assert memory["meanflow"] < 1.1
    assert memory[TEXTBOOK] > 1.8
    assert found.textbook_error is not None
    assert found.textbook_error < 1e-12


# ---------------------------------------------------------------------------------------------------- the command line


def document(*arguments: object) -> dict[str, Any]:
    return dict(json.loads(succeed("bench", "objectives", *arguments, *TINY, "--json").stdout))


def test_the_document_and_its_row(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    found = document("meanflow", "--ledger", ledger)
    assert (found["bench"], found["size"], found["shape"], found["batch_size"]) == (
        "objectives",
        "mlp-tiny",
        [1, 8, 8],
        8,
    )
    assert (found["device"], found["threads"], found["repeats"], found["classes"]) == ("cpu", 1, 1, 10)
    assert {"commit", "processor", "packages", "cores"} <= set(found["environment"])
    assert [cost["name"] for cost in found["objectives"]] == [REFERENCE, *MEANFLOW]
    reference = found["objectives"][0]
    for key in ("ratio", "cpu_ratio"):
        assert reference[key] == {"median": 1, "low": 1, "high": 1}
    document("meanflow", "--ledger", ledger)
    rows = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert len(rows) == 2
    assert rows[0] == found


def test_all_objectives_without_classes() -> None:
    found = document("--classes", 0, "--shape", "3,4,6")
    assert [cost["name"] for cost in found["objectives"]] == list(variants())
    assert found["shape"] == [3, 4, 6]


def test_bfloat16() -> None:
    """The students' products are rounded, so there is no difference of outputs to take."""
    found = document("meanflow", "--precision", "bf16")
    assert found["precision"] == "bf16"
    assert {cost["name"] for cost in found["objectives"]} == {
        each.name for each in chosen_variants(["meanflow"]) if each.name != "meanflow-one-sided"
    }


def test_the_table_is_for_people(capfd: pytest.CaptureFixture[str]) -> None:
    said = succeed("bench", "objectives", TEXTBOOK, *TINY)
    assert said.stdout == ""
    for word in ("1 x 8 x 8", "batch 8", REFERENCE, TEXTBOOK, "memory", "are ours within", "of the textbook's"):
        assert word in said.stderr
    assert "profiler" not in capfd.readouterr().err  # which torch would say behind our back


def test_gates() -> None:
    """Every one of them, against what was measured; the table is printed first."""
    loose = ("--max-ratio", "meanflow=1e6", "--max-memory", "meanflow=1e6", "--max-memory", f"{REFERENCE}=1")
    succeed("bench", "objectives", "meanflow", *TINY, *loose, "--max-textbook", 1e6)
    for option, words in (("--max-ratio", "costs"), ("--max-memory", "holds")):
        tight = (option, "meanflow=1e6", option, "meanflow-teacher=0.001")
        failed = fail("bench", "objectives", "meanflow", *TINY, *tight)
        assert f"a step of meanflow-teacher {words} " in failed
        assert "above 0.001" in failed
    failed = fail("bench", "objectives", "meanflow", *TINY, "--max-textbook", 0.001)
    assert "a step of meanflow costs " in failed
    assert "of the textbook's, above 0.001" in failed


def fail(*arguments: object) -> str:
    """The last line of a command that has to miss its gate."""
    result = cli(*arguments)
    assert result.exit_code == 4, result.stderr
    lines = result.stderr.strip().splitlines()
    assert any(TEXTBOOK in line for line in lines[:-1])
    return str(lines[-1])


def test_threads_are_put_back() -> None:
    assert torch.get_num_threads() == 1
    assert document("progressive", "--threads", 2)["threads"] == 2
    assert torch.get_num_threads() == 1


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    refuse("bench", "objectives", "meanflw", says=("'meanflw'", "did you mean 'meanflow'?"))
    refuse("bench", "objectives", "--size", "flot-minni", says=("'flot-minni'", "did you mean 'flot-mini'?"))
    refuse("bench", "objectives", "--shape", "2", says=("images", "[2]"))
    refuse("bench", "objectives", "--shape", "1,7,8", says=("patch 2", "7 x 8"))
    refuse("bench", "objectives", "--shape", "1,x", says=("--shape takes sizes", "'1,x'"))
    refuse("bench", "objectives", "--max-ratio", "meanflw=2", says=("--max-ratio", "did you mean 'meanflow'?"))
    refuse("bench", "objectives", "progressive", "--max-memory", "meanflow=2", says=("'meanflow' is not measured",))
    for arguments in (("meanflow", "--max-textbook", "nan"), (TEXTBOOK, "--max-textbook", 0.7)):
        refuse("bench", "objectives", *arguments, says=("--max-textbook takes a finite number", TEXTBOOK))
    for text in ("meanflow", "meanflow=", "meanflow=x", "meanflow=nan", "meanflow=inf"):
        refuse("bench", "objectives", "--max-ratio", text, says=("NAME=RATIO", f"'{text}'"))
    (tmp_path / "file").write_text("")
    refuse("bench", "objectives", "--ledger", tmp_path / "file" / "x", says=("is not a folder",))
