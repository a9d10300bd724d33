"""``fewstep demo`` from beginning to end, small: the same seed gives the same bits and the same numbers."""

import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, cli, refuse, succeed

DEMO_TEACHER = "digits-teacher"
DEMO_STUDENTS = ("digits-progressive", "digits-meanflow", "digits-consistency")

pytestmark = pytest.mark.slow

NAMES = (DEMO_TEACHER, *DEMO_STUDENTS)
SETTINGS = [word for override in (*SMALL, "train.steps=20") for word in ("--set", override)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "first run"
    result = succeed("demo", "--seed", 0, "--n", 200, *SETTINGS, "--out", out, "--json")
    assert json.loads(result.stdout) == json.loads((out / "results.json").read_text())
    for name in NAMES:
        assert f"{name}: " in result.stderr
    assert f"report -> {out / 'report' / 'index.html'}" in result.stderr
    return out


def models(out: Path) -> dict[str, bytes]:
    return {name: (out / name / "model" / "model.safetensors").read_bytes() for name in NAMES}


def numbers(out: Path) -> dict[str, Any]:
    """Everything in ``results.json`` but what a clock measured."""
    results = json.loads((out / "results.json").read_text())
    for row in results["rows"]:
        del row["latency_ms"], row["latency_p95_ms"], row["images_per_s"], row["batch"]
    for model in results["models"]:
        del model["train_s"]
    return results


def test_its_results(demo: Path) -> None:
    results = json.loads((demo / "results.json").read_text())
    assert results["schema"] == 1
    rows = [(row["model"], row["role"], row["steps"]) for row in results["rows"]]
    assert rows == [
        *((DEMO_TEACHER, "teacher", steps) for steps in (1, 2, 4, 8, 16, 32, 64)),
        *((name, "student", steps) for name in DEMO_STUDENTS for steps in (1, 2, 4, 8)),
    ]
    for row in results["rows"]:
        assert (row["n"], row["seed"]) == (200, 0)
        assert row["nfe"] == row["steps"]
        assert row["latency_ms"] > 0
        assert row["images_per_s"] > 0
        assert row["params"] > 0
        assert {"objective", "guidance"} <= set(row)
        metrics = row["metrics"]
        assert {f"{kind}_{features}" for kind in ("fd", "recall") for features in ("pixels", "digits")} <= set(metrics)
        assert ("teacher_gap" in metrics) == (row["role"] == "student")
    assert results["reference"]["dataset"] == "digits"
    assert {model["name"] for model in results["models"]} == set(NAMES)
    teacher = next(row["digest"] for row in results["rows"] if row["role"] == "teacher")
    assert {model["teacher_digest"] for model in results["models"]} == {None, teacher}


def test_its_report(demo: Path) -> None:
    page = (demo / "report" / "index.html").read_text()
    for name in NAMES:
        assert name in page


def test_another_seed_gives_other_models(demo: Path, tmp_path: Path) -> None:
    for name in NAMES:
        own = () if name == DEMO_TEACHER else (f"teacher.path={demo / DEMO_TEACHER}",)
        command = "teach" if name == DEMO_TEACHER else "distill"
        succeed(command, name, *SMALL, *own, "train.steps=20", "--seed", 1, "--out", tmp_path / name)
    first, other = models(demo), models(tmp_path)
    assert all(first[name] != other[name] for name in NAMES)


def test_the_same_seed_gives_the_same_bits_and_numbers_interrupted_or_not(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second demo, stopped in its second training, goes on with the line it prints; the first is left alone."""
    import fewstep.interrupts

    asked = iter([*[False] * 25, True])

    @contextmanager
    def later() -> Iterator[Callable[[], bool]]:
        yield lambda: next(asked)

    out = tmp_path / "a demo"
    with monkeypatch.context() as patch:
        patch.setattr(fewstep.interrupts, "stop_requested", later)
        result = cli("demo", "--seed", 0, "--n", 200, *SETTINGS, "--out", out)
    assert (result.exit_code, result.stdout) == (130, "")
    line = result.stderr.splitlines()[-1].partition(": fewstep ")[2]
    before = (out / DEMO_TEACHER / "model" / "config.json").stat().st_mtime_ns
    succeed(*shlex.split(line))
    assert (out / DEMO_TEACHER / "model" / "config.json").stat().st_mtime_ns == before
    assert models(out) == models(demo)
    assert numbers(out) == numbers(demo)


def test_a_demo_resumed_with_other_settings_is_refused(demo: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(demo, tmp_path / "copy"))
    refuse("demo", "--seed", 1, "--out", out, "--resume", *SETTINGS, says=(str(out), "seed was 0 and is 1"))
