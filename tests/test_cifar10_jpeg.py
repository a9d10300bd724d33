"""The evidence on cifar10-jpeg: every stage at the smallest size, its time limit, and what its recipes promise."""

import io
import json
import runpy
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from forked import Forked, started
from PIL import Image

from fewstep.checkpoint import checkpoints
from fewstep.config import command_of, load_config
from fewstep.evaluation.classifier import ImageClassifier, write_classifier
from fewstep.evaluation.results import read_results
from fewstep.networks.build import build_network

FOLDER = Path(__file__).parent.parent / "benchmarks" / "cifar10_jpeg"
ANIMALS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(scope="module")
def modules() -> Iterator[tuple[ModuleType, ModuleType]]:
    """``run_stage`` and ``stages``."""
    sys.path.insert(0, str(FOLDER))
    before = set(sys.modules)
    try:
        import run_stage
        import stages

        yield run_stage, stages
    finally:
        sys.path.remove(str(FOLDER))
        for name in set(sys.modules) - before:
            if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as FEWSTEP_DATA names one, with a few images in the layout of the real files."""
    root = tmp_path_factory.mktemp("data")
    (root / "cifar10-jpeg").mkdir()
    generator = torch.Generator().manual_seed(0)
    names = {"names": list(ANIMALS), "_type": "ClassLabel"}
    features = {"img": {"_type": "Image"}, "label": names}
    for split, count in (("train", 40), ("test", 20)):
        rows = []
        for i in range(count):
            coarse = torch.rand(1, 3, 4, 4, generator=generator)
            image = torch.nn.functional.interpolate(coarse, size=32, mode="bilinear")[0].permute(1, 2, 0)
            file = io.BytesIO()
            Image.fromarray((image * 255).byte().numpy()).save(file, "JPEG", quality=75)
            rows.append({"bytes": file.getvalue(), "path": f"{i}.jpg"})
        table = pa.table({"img": rows, "label": pa.array([i % 10 for i in range(count)], pa.int64())})
        about = {"huggingface": json.dumps({"info": {"features": features}})}
        pq.write_table(table.replace_schema_metadata(about), root / "cifar10-jpeg" / f"{split}.parquet")
    return root


def measured(*words: str) -> None:
    """What ``python measure.py`` does."""
    sys.argv = ["measure.py", *words]
    runpy.run_path(str(FOLDER / "measure.py"), run_name="__main__")


@pytest.fixture
def run(modules, data, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``run.sh WORDS`` with its processes forked instead of started; its exit code."""
    from conftest import process_environment

    def start(words: Sequence[str]) -> Forked:
        program, *arguments = words
        if program == "fewstep":
            return started(*arguments, FEWSTEP_DATA=str(data))
        return Forked(measured, *arguments, environment=process_environment(FEWSTEP_DATA=str(data)))

    run_stage, _ = modules
    monkeypatch.setattr(run_stage.limits, "start", start)
    monkeypatch.setenv("FEWSTEP_DATA", str(data))
    return lambda *words: run_stage.main([str(word) for word in words])


def ledger_of(runs: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (runs / "ledger.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    write_classifier(folder, ImageClassifier(3, 10, (8,), 8), {"shape": [3, 8, 8], "num_classes": 10})
    return folder


@pytest.mark.slow
def test_every_stage_at_the_smallest_size(run, modules, tmp_path, capsys) -> None:
    """From data to ledger and reports, in one command; a second one leaves everything as it is."""
    _, stages = modules
    words = ("all", "--size", "smallest", "--runs", tmp_path)
    assert run(*words) == 0, capsys.readouterr().err
    rows = ledger_of(tmp_path)
    trained = {row["stage"]: row for row in rows if row.get("kind") == "training"}
    assert set(trained) == {*stages.TEACHERS, *stages.STUDENTS}
    assert {row["state"] for row in trained.values()} == {"done"}
    assert trained["progressive"]["steps"] == 3 * trained["meanflow"]["steps"]  # three stages
    assert {row["kind"] for row in rows} == {"training", "quality", "classifier"}

    found = read_results(tmp_path / "students" / "results.json")
    assert {row.model for row in found.rows} == {"unet", *stages.STUDENTS}
    assert {row.steps for row in found.rows if row.role == "teacher"} == {1, 4}
    assert {"fd_classifier", "recall_classifier", "density_classifier", "coverage_classifier"} <= set(
        found.rows[0].metrics
    )
    quality = [row for row in rows if row.get("kind") == "quality" and row["stage"] == "students"]
    assert [(row["model"], row["steps"]) for row in quality] == [(row.model, row.steps) for row in found.rows]
    assert quality[0]["metrics"]["fd_pixels"][0] == found.rows[0].metrics["fd_pixels"].value
    page = (tmp_path / "report-students" / "report.md").read_text()
    assert all(name in page for name in ("unet", *stages.STUDENTS))
    assert (tmp_path / "report-teachers" / "index.html").is_file()

    before = (tmp_path / "ledger.jsonl").read_bytes()
    weights = (tmp_path / "meanflow" / "model" / "model.safetensors").stat().st_mtime_ns
    assert run("meanflow", *words[1:]) == 0
    assert run("students", *words[1:]) == 0
    assert (tmp_path / "ledger.jsonl").read_bytes() == before
    assert (tmp_path / "meanflow" / "model" / "model.safetensors").stat().st_mtime_ns == weights


def test_a_limit_ends_a_training_with_a_checkpoint_and_the_next_call_goes_on(run, modules, tmp_path, monkeypatch):
    """The time is over when there is a checkpoint that was not there before, on a machine of any speed."""
    run_stage, _ = modules

    class Over:
        limit = 1e6

        def __init__(self, limit: float) -> None:
            self.before = set(checkpoints(tmp_path / "unet" / "checkpoints"))

        def left(self) -> float:
            new = set(checkpoints(tmp_path / "unet" / "checkpoints")) - self.before
            return run_stage.limits.GRACE - 1 if new else run_stage.limits.GRACE + 1

    monkeypatch.setattr(run_stage, "Clock", Over)
    words = ("unet", "train.steps=100000", "--size", "smallest", "--runs", tmp_path, "--limit", "1e6")
    assert run(*words) == 130
    assert run(*words) == 130
    first, second = ledger_of(tmp_path)
    assert first["state"] == second["state"] == "interrupted"
    assert 0 < first["steps"] < second["steps"]
    assert second["train_s"] > first["train_s"]
    assert not (tmp_path / "unet" / "model").exists()


def test_runs_go_from_machine_to_machine(run, modules, classifier, tmp_path, monkeypatch) -> None:
    """A teacher that ended and a student that was stopped are carried in small files; where nothing else is, the
    student goes on with that teacher, and both are measured."""
    run_stage, _ = modules
    runs = tmp_path / "runs"
    small = ("--size", "smallest", "--runs", runs, "--carry", tmp_path / "carry", "--classifier", classifier)

    class Over:
        limit = 1e6

        def __init__(self, limit: float) -> None: ...

        def left(self) -> float:
            stopped = checkpoints(runs / "soflow" / "checkpoints")
            return run_stage.limits.GRACE + (-1 if stopped else 1)

    assert run("unet", *small) == 0
    with monkeypatch.context() as patch:
        patch.setattr(run_stage, "Clock", Over)
        assert run("soflow", "train.steps=60", *small) == 130
    assert 0 < ledger_of(runs)[-1]["steps"] < 60
    runs.rename(tmp_path / "before")  # the machine is gone, and all that lies on it

    assert run("soflow", *small) == 0  # with the steps that it began with
    (row,) = ledger_of(runs)
    assert (row["state"], row["steps"]) == ("done", 60)
    lines = (runs / "soflow" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 61))  # of both machines
    assert run("students", *small) == 0
    unet, soflow = (json.loads((runs / name / "model" / "config.json").read_text()) for name in ("unet", "soflow"))
    assert unet["carried"] == soflow["carried"] == "bfloat16"
    digests = {row.digest for row in read_results(runs / "students" / "results.json").rows}
    assert soflow["teacher_digest"] in digests


def test_no_process_outlives_the_limit(modules, tmp_path, monkeypatch, capsys) -> None:
    """What does not stop when it is asked to is killed; without a limit nothing is asked."""
    run_stage, _ = modules
    deaf = tmp_path / "deaf"

    class Over:
        asked = 0

        def left(self) -> float:
            self.asked += deaf.exists()
            return (
                run_stage.limits.GRACE + 1 if not self.asked else run_stage.limits.GRACE - 1 if self.asked < 20 else -1
            )

    stubborn = "import pathlib, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    stubborn += f"pathlib.Path({str(deaf)!r}).touch(); time.sleep(600)"
    monkeypatch.setattr(
        run_stage.limits, "start", lambda words: subprocess.Popen([sys.executable, "-S", "-c", *words[1:]])
    )
    assert run_stage.finish(["python", stubborn], Over()) == 130
    assert "killed" in capsys.readouterr().err
    assert run_stage.finish(["python", "raise SystemExit(4)"], run_stage.Clock(None)) == 4
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert run_stage.finish(["python", killed], run_stage.Clock(None)) == 9  # by another: no reason to go on
    assert run_stage.finish(["python", "raise SystemExit(4)"], run_stage.Clock(0.2)) == 130  # not even begun


def test_as_many_steps_as_fit(run, modules, tmp_path, monkeypatch) -> None:
    """The steps are chosen before the training, and what goes on later keeps to them."""
    run_stage, _ = modules
    monkeypatch.setattr(run_stage.limits, "GRACE", 1.0)
    monkeypatch.setattr(run_stage, "PROBE", 4)
    monkeypatch.setattr(run_stage, "fitting_steps", lambda lines, whole, left: 5 if len(lines) == 2 else -1)
    assert run("unet", "--size", "smallest", "--runs", tmp_path, "--fit", "--limit", "60") == 0
    (row,) = ledger_of(tmp_path)
    assert (row["state"], row["steps"]) == ("done", 5)
    assert "train.steps=5" in row["overrides"]
    assert "train.warmup_steps=1" in row["overrides"]
    assert not (tmp_path / "probe").exists()


def test_the_steps_that_fit_by_hand(modules) -> None:
    """Two stages whose steps take .1 and .3 s, 7 s of everything else (of which compilation, within the first line of a
    stage): n steps of each take 7 + .4 n seconds, of a time of which a twentieth stays unused."""
    run_stage, _ = modules
    logged = [("a", 12, 4.2), ("a", 24, 5.4), ("b", 36, 11.0), ("b", 48, 14.6)]
    lines = [{"stage": stage, "step": step, "seconds": seconds} for stage, step, seconds in logged]
    whole = 7 + 24 * 0.4
    for left in (60.0, 600.0):
        assert run_stage.fitting_steps(lines, whole, left) == int((left * 0.95 - 7) / 0.4)


def test_what_cannot_be_run_is_one_sentence(run, modules, tmp_path, monkeypatch, capsys) -> None:
    small = ("--size", "smallest", "--runs", tmp_path)
    for words, said in (
        (("students", *small), "run the stage unet first"),
        (("students", "--teacher", "flot", *small), "run the stage flot first"),
        (("teachers", *small), "nothing to measure"),
        (("report", *small), "nothing is measured"),
        (("unet", "--fit", *small), "needs the --limit"),
        (("reflow", "--fit", "--limit", "60", *small), "pairs"),
    ):
        assert run(*words) == 2
        assert said in capsys.readouterr().err
    for words in (("nothing",), ("unet", "--limit", "3"), ("unet", "steps")):
        with pytest.raises(SystemExit):
            run(*words)
    monkeypatch.delenv("FEWSTEP_DATA")
    assert run("unet", *small) == 2
    assert "FEWSTEP_DATA" in capsys.readouterr().err


def test_the_recipes(modules, data, monkeypatch) -> None:
    """Each stage has its recipe; FloT and U-Net have as many parameters; students start from a teacher's network; a
    model in bfloat16 fits into four files of 16 MB with room for its average."""
    _, stages = modules
    monkeypatch.setenv("FEWSTEP_DATA", str(data))
    recipes = {path.stem for path in stages.RECIPES.glob("*.yaml")}
    assert recipes == {*stages.TEACHERS, *stages.STUDENTS}
    assert set(stages.STAGES) - recipes == {"classifier", "teachers", "students", "report", "all"}
    sizes = {}
    for name in recipes:
        config = load_config(str(stages.RECIPES / f"{name}.yaml"))
        assert config.name == name
        assert command_of(config) == ("teach" if name in stages.TEACHERS else "distill")
        assert (config.teacher is None) == (name not in stages.TAUGHT)
        if config.student.network is not None:
            with torch.device("meta"):
                network = build_network(config.student.network, (3, 32, 32), 10, two_times=config.student.two_times)
            sizes[name] = sum(parameter.numel() for parameter in network.parameters())
    assert abs(sizes["flot"] / sizes["unet"] - 1) < 0.01
    assert sizes["flot-afm"] == sizes["flot"]
    assert sizes["unet-afm"] == sizes["unet"]
    assert max(sizes.values()) * 2 * 2 < 64e6
    plain, weighted = (load_config(str(stages.RECIPES / f"{name}.yaml")) for name in ("flot", "flot-afm"))
    assert weighted.objective.weighting.kind == "curvature"
    assert weighted.objective.model_copy(update={"weighting": plain.objective.weighting}) == plain.objective
    assert weighted.train == plain.train
