"""Sampling in less than float32: what is lowered and what is not, and rows that say so."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refuse, succeed
from safetensors.torch import load_file
from test_products import FLAGS, flags
from torch import Tensor, nn

from fewstep.config import config_yaml, read_config
from fewstep.conventions import ConventionConfig
from fewstep.errors import UsageError
from fewstep.evaluation.report import write_report
from fewstep.evaluation.results import Measured, Model, Report, Row, merge, over_seeds, row_from_json, row_json
from fewstep.flow import VelocityField
from fewstep.keys import Key
from fewstep.precision import in_precision
from fewstep.sampling import FieldSampler, MapSampler, OdeSampler, Sampler, ServedField
from fewstep.students.maps import AverageVelocityMap, ConsistencyMap
from fewstep.teachers.analytic import GaussianTeacher
from fewstep.teachers.contrastive import CorrectedField
from fewstep.teachers.convention import ConvertedField
from fewstep.teachers.guided import ClassContrast, GuidedField, WeakContrast
from fewstep.teachers.network import NetworkField

Copy = Callable[[str], Path]
PIXELS = ("--features", "pixels")


class Watched(nn.Module):
    """A linear network of any signature that remembers in what it was asked, and under which flags."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8).requires_grad_(False)
        self.seen: list[tuple[Any, ...]] = []

    def forward(self, x: Tensor, t_B: Tensor, *rest: object) -> Tensor:
        y = self.layer(x)
        self.seen.append((x.dtype, t_B.dtype, y.dtype, flags()))
        return y * t_B[:, None]


def fields(net: nn.Module) -> dict[str, VelocityField]:
    plain = NetworkField(net)
    return {
        "network": plain,
        "guided": GuidedField(ClassContrast(plain, 4), 2.0),
        "autoguided": GuidedField(WeakContrast(plain, NetworkField(net)), 2.0),
        "corrected": CorrectedField(plain, 0.1, torch.zeros(8)),
        "somebody's": ConvertedField(lambda x, t, label: net(x, t), ConventionConfig()),
    }


def samplers(net: nn.Module) -> dict[str, Sampler]:
    found: dict[str, Sampler] = {name: OdeSampler(field, "heun") for name, field in fields(net).items()}
    return found | {
        "jumps": MapSampler({0: AverageVelocityMap(net)}, "jumps"),
        "stages": MapSampler({1: AverageVelocityMap(net), 2: AverageVelocityMap(net)}, "jumps"),
        "renoise": MapSampler({0: ConsistencyMap(net)}, "renoise"),
        "straightened": FieldSampler(
            (ServedField(NetworkField(net)), ServedField(NetworkField(net), 2)), "fixed_noise"
        ),
    }


def drawn(sampler: Sampler) -> Tensor:
    index = torch.arange(16)
    return sampler(2, Key(0).normal("noise", index, (8,)), index % 4, Key(0), index).x


@pytest.mark.parametrize("name", samplers(Watched()))
def test_every_network_is_lowered_and_nothing_else(name: str) -> None:
    net = Watched()
    sampler = samplers(net)[name]
    outside, plain = flags(), drawn(sampler)
    for precision, kind in (("fp32", "fp32"), ("tf32", "tf32"), ("bf16", "tf32")):
        net.seen.clear()
        x = drawn(in_precision(sampler, precision))
        layer = torch.bfloat16 if precision == "bf16" else torch.float32
        assert set(net.seen) == {(torch.float32, torch.float32, layer, FLAGS[kind])}
        assert x.dtype == torch.float32
        error = float((x - plain).norm() / plain.norm())
        assert error == 0 if precision != "bf16" else 1e-5 < error < 2e-2
    assert flags() == outside


def test_the_last_precision_counts() -> None:
    sampler = samplers(Watched())["guided"]
    again = in_precision(in_precision(sampler, "bf16"), "fp32")
    assert torch.equal(drawn(again), drawn(sampler))


def test_an_exact_teacher_has_no_network_to_be_lowered() -> None:
    sampler = OdeSampler(GaussianTeacher(torch.zeros(8), torch.ones(8)))
    assert in_precision(sampler, "bf16") is sampler


# The commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["teacher", "progressive"])
def test_samples_in_bfloat16_are_near(run: str, trained: Path, tmp_path: Path) -> None:
    names = {"fp32": "steps-04-seed-0", "tf32": "tf32-steps-04-seed-0", "bf16": "bf16-steps-04-seed-0"}
    x = {}
    for precision, name in names.items():
        more = () if precision == "fp32" else ("--precision", precision)
        succeed("sample", trained / run, "--steps", 4, "--n", 16, *more, "--out", tmp_path)
        x[precision] = load_file(tmp_path / f"{name}.safetensors")["x"].float()
    assert torch.equal(x["tf32"], x["fp32"])  # on a CPU
    difference = (x["bf16"] - x["fp32"]).abs()  # of 256 grey values
    assert 0 < float(difference.mean()) < 2


def printed(*arguments: object) -> dict[str, Any]:
    return json.loads(succeed("evaluate", *arguments, "--json").stdout)


def values(document: dict[str, Any]) -> list[float]:
    return [row["metrics"]["fd_pixels"]["value"] for row in document["rows"]]


def test_rows_say_their_precision_and_do_not_mix(copied: Copy) -> None:
    """Teacher and student alike; a call that goes on takes the rows of its own precision, and only those."""
    run = copied("meanflow")
    full = printed(run, *PIXELS, "--steps", 1)
    assert all("precision" not in row for row in full["rows"])
    assert full == printed(run, *PIXELS, "--steps", 1, "--precision", "fp32")
    low = printed(run, *PIXELS, "--steps", 1, "--precision", "bf16")
    assert [(row["role"], row["precision"]) for row in low["rows"]] == [("teacher", "bf16"), ("student", "bf16")]
    assert low["reference"] == full["reference"]
    for a, b in zip(values(low), values(full), strict=True):
        assert 0 < abs(a / b - 1) < 1e-2
    assert len(list((run / "evaluation").iterdir())) == 4
    assert printed(run, *PIXELS, "--steps", 1, "--precision", "bf16") == low  # kept, to the clock
    assert printed(run, *PIXELS, "--steps", 1) == full


def test_the_config_says_it_too(copied: Copy) -> None:
    run = copied("meanflow")
    config = read_config(run)
    low = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"precision": "bf16"})})
    (run / "config.yaml").write_text(config_yaml(low))
    found = printed(run, *PIXELS, "--steps", 1)
    assert {row["precision"] for row in found["rows"]} == {"bf16"}
    assert all("precision" not in row for row in printed(run, *PIXELS, "--steps", 1, "--precision", "fp32")["rows"])


def test_images_have_no_precision(tmp_path: Path) -> None:
    refuse("evaluate", "--images", tmp_path, "--data", "digits-teacher", "--precision", "bf16", says=("--precision",))


# Tables --------------------------------------------------------------------------------------------------------------

ROW = Row(
    model="a",
    role="student",
    objective="meanflow",
    steps=1,
    nfe=1,
    sampler="jumps",
    guidance=1.0,
    n=10,
    seed=0,
    metrics={"fd_pixels": Measured(0.5)},
    latency_ms=1.0,
    images_per_s=10.0,
    params=3,
    digest="aa",
)
LOW = replace(ROW, precision="bf16")


def report(row: Row) -> Report:
    facts = Model(row.model, row.role, row.objective, 3, 1, 1, 1.0)
    return Report((row,), (facts,), {"dataset": "digits", "n": 1797, "protocol": {}})


def test_older_rows_are_of_float32() -> None:
    assert "precision" not in row_json(ROW)
    assert row_from_json(row_json(ROW)) == ROW
    assert row_json(LOW)["precision"] == "bf16"
    assert row_from_json(row_json(LOW)) == LOW


def test_one_table_has_one_precision() -> None:
    with pytest.raises(UsageError, match="precision of the networks is 'fp32' in one and 'bf16' in another"):
        merge([report(ROW), report(replace(LOW, model="b"))])
    with pytest.raises(UsageError, match="precision of the networks"):
        over_seeds({0: report(ROW), 1: report(LOW)})
    both = merge([report(LOW), report(replace(LOW, model="b")), report(replace(ROW, model="c", sampler="files"))])
    assert [row.precision for row in both.rows] == ["bf16", "bf16", "fp32"]  # images say nothing of a network


def test_the_report_says_it(tmp_path: Path) -> None:
    for row, says in ((LOW, True), (ROW, False)):
        folder = write_report(report(row), tmp_path / row.precision).parent
        for name in ("index.html", "report.md", "table.tex", "card.md"):
            assert ("networks in bfloat16" in (folder / name).read_text()) == says, name
        assert f"jumps, guidance 1, {row.precision}" in (folder / "report.md").read_text()
        with (folder / "results.csv").open() as file:
            assert {line["precision"] for line in csv.DictReader(file)} == {row.precision}
