"""The set of benchmarks and the comparison of two commits: what their tables say is what was measured."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
BENCHMARKS = ROOT / "benchmarks"
ENVIRONMENT = {"processor": "Abacus", "cores": 2, "packages": {"torch": "9.9"}, "commit": "abc"}


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("speed", monkeypatch)


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch, speed: ModuleType) -> ModuleType:
    return load("compare", monkeypatch)


def spread(median: float) -> dict[str, float]:
    return {"median": median, "low": 0.9 * median, "high": 1.1 * median}


def row(bench: str, device: str = "cpu", **measured: Any) -> dict[str, Any]:
    return {"bench": bench, "date": "2026-01-02", "device": device, "environment": ENVIRONMENT, **measured}


TRAIN = row(
    "train", recipe="digits-teacher", bare_ms=20.0, fewstep_ms=20.4, overhead=spread(9.0), cpu_overhead=spread(2.0)
)
OBJECTIVES = row(
    "objectives",
    size="flot-mini",
    objectives=[
        {"name": "flow_matching", "ratio": spread(1.0), "cpu_ratio": spread(1.0), "textbook_cpu_ratio": spread(0.5)},
        {"name": "meanflow", "ratio": spread(9.0), "cpu_ratio": spread(1.2), "textbook_cpu_ratio": spread(0.6)},
        {
            "name": "meanflow-textbook",
            "ratio": spread(9.0),
            "cpu_ratio": spread(2.0),
            "textbook_cpu_ratio": spread(1.0),
        },
    ],
)
SAMPLE = row(
    "sample",
    network="flot-tiny",
    batches=[
        {
            "batch_size": 37,
            "call_ms": spread(5.0),
            "ways": [
                {"name": "by hand", "of": "torch", "calls": 4, "cpu_overhead": spread(0.5), "own_us": 10.0},
                {"name": "jumps", "of": "fewstep", "calls": 4, "cpu_overhead": spread(1.0), "own_us": 20.0},
                {"name": "odeint", "of": "torchdiffeq 0.2", "calls": 4, "cpu_overhead": spread(4.0), "own_us": 90.0},
            ],
        }
    ],
)
METRICS = row(
    "metrics",
    compared=[
        {"metric": "frechet", "what": "10 x 4", "peer": "clean-fid", "version": "0.1", "faster": spread(8.0)},
    ],
)


@pytest.mark.parametrize(
    ("measured", "told"),
    [
        (TRAIN, ["training loop, digits-teacher | bare PyTorch | +2.00 % [+1.80, +2.20]"]),
        (
            OBJECTIVES,
            [
                "meanflow step, flot-mini | flow matching | 1.20 x the time [1.08, 1.32]",
                "meanflow step, flot-mini | meanflow-textbook | 0.60 x the time [0.54, 0.66]",
                "meanflow-textbook step, flot-mini | flow matching | 2.00 x the time [1.80, 2.20]",
            ],
        ),
        (
            SAMPLE,
            [
                "jumps, a batch | 4 bare calls of flot-tiny | +1.00 % [+0.90, +1.10]",
                "torchdiffeq: odeint, a batch | 4 bare calls of flot-tiny | +4.00 % [+3.60, +4.40]",
            ],
        ),
        (METRICS, ["frechet, 10 x 4 | clean-fid 0.1 | 8.00 x as fast [7.20, 8.80]"]),
        (row("something else"), []),
    ],
    ids=["train", "objectives", "sample", "metrics", "unknown"],
)
def test_a_row_as_lines(measured: dict[str, Any], told: list[str], speed: ModuleType) -> None:
    """By processor time on a CPU; quartiles beside medians."""
    assert [f"{each.name} | {each.beside} | {each.told()}" for each in speed.figures(measured)] == told


def test_on_a_gpu_the_clock_counts(speed: ModuleType) -> None:
    found = speed.figures({**TRAIN, "device": "H100"})
    assert found[0].told() == "+9.00 % [+8.10, +9.90]"


def test_the_machine_is_named(speed: ModuleType) -> None:
    said = speed.table([TRAIN, METRICS]).splitlines()
    assert said[0].count("|") == said[2].count("|")
    assert said[-1] == "Measured on cpu (Abacus, 2 cores); torch 9.9; commit abc; 2026-01-02."


def test_costs_are_such_that_less_is_better(compare: ModuleType, tmp_path: Path) -> None:
    """Times faster are turned round, overheads are ratios, and others' figures are left out."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, (TRAIN, SAMPLE, METRICS))))
    assert compare.costs(path) == pytest.approx(
        {
            ("training loop, digits-teacher", "bare PyTorch"): 1.02,
            ("jumps, a batch", "4 bare calls of flot-tiny"): 1.01,
            ("frechet, 10 x 4", "clean-fid 0.1"): 1 / 8,
        }
    )
    assert compare.costs(tmp_path / "none.jsonl") == {}


def test_each_tree_has_its_turn(compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one first in every second round; ratios are those of a round."""
    turns: list[str] = []

    def run(names: list[str], out: Path, *, tree: Path) -> list[str]:
        turns.append(tree.name)
        load_ = 1 + (len(turns) - 1) // 2  # of the machine, another in every round
        cost = {"a": 1.0, "b": 1.5}[tree.name] * load_
        out.write_text(json.dumps({**METRICS, "compared": [{**METRICS["compared"][0], "faster": spread(1 / cost)}]}))
        return []

    monkeypatch.setattr(compare, "run", run)
    found = compare.measure([tmp_path / "a", tmp_path / "b"], ["metrics"], 3, tmp_path)
    assert "".join(turns) == "abbaab"
    assert found == {("frechet, 10 x 4", "clean-fid 0.1"): pytest.approx([1.5, 1.5, 1.5])}


def test_a_regression_is_one_whichever_quartile_is_asked(
    compare: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    steady, noisy = ("steady", "x"), ("noisy", "x")
    ratios = {steady: [1.10, 1.11, 1.12, 1.13, 1.14], noisy: [0.8, 0.9, 1.2, 1.3, 1.4]}
    worse = compare.regressions(ratios, 1.05)
    assert len(worse) == 1
    assert worse[0].startswith("steady beside x: 1.120 [1.110, 1.130], above 1.05")
    assert "| noisy | x | 1.200 [0.900, 1.300] |" in capsys.readouterr().out
    assert compare.regressions(ratios, 1.2) == []


def test_what_fails_is_told_and_the_rest_goes_on(
    speed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = ("train", "digits-teacher", "--step-ms", "0.5", "--repeats", "2", "--segment", "2", "train.batch_size=16")
    monkeypatch.setattr(speed, "SET", {"broken": ("train", "digits-techer"), "train": quick})
    failed = speed.run(["broken", "train"], tmp_path / "rows.jsonl")
    assert len(failed) == 1
    assert "bench broken: error:" in failed[0]
    assert "did you mean 'digits-teacher'?" in failed[0]
    rows = speed.rows_of(tmp_path / "rows.jsonl")
    assert [each["bench"] for each in rows] == ["train"]


def test_the_table_in_the_readme_is_that_of_its_ledger(speed: ModuleType) -> None:
    text = (BENCHMARKS / "README.md").read_text()
    shown = re.findall(r"<!-- (ledger/[\w./-]+) -->\n(.*?)<!-- end -->", text, flags=re.DOTALL)
    assert shown
    for name, table in shown:
        assert table.strip() == speed.table(speed.rows_of(BENCHMARKS / name)).strip(), name


@pytest.mark.thorough
def test_two_commits(tmp_path: Path) -> None:
    """A commit beside itself, with the one benchmark that is quickest."""
    script = BENCHMARKS / "compare.py"
    command = [sys.executable, str(script), "HEAD", "HEAD", "loader", "--rounds", "1", "--max-ratio", "100"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| batches, digits-teacher | its training step |" in done.stdout
    left = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "tree-0" not in left.stdout
