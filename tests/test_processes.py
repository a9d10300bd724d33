"""Several processes: really several, one of them speaks and writes, and the model is that of one process."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL, process_environment, shell, student, succeed
from forked import fewstep, together
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

WITNESS = """
import atexit, os, pathlib, sys

@atexit.register
def testify():
    state = sys.modules.get("accelerate.state")
    if state is not None and "RANK" in os.environ:
        shared = state.PartialState._shared_state
        folder = pathlib.Path(os.environ["WITNESS"])
        (folder / f"{shared['process_index']}-of-{shared['num_processes']}").touch()
"""
"""Runs in every process and notes, at its end, which one of how many accelerate took it for."""


@pytest.fixture
def witnessed(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WITNESS)
    (tmp_path / "seen").mkdir()
    path = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "WITNESS": str(tmp_path / "seen")}


def seen(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "seen").iterdir()}


def weights(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    files = {path.name: load_file(path) for path in sorted((run / "model").glob("*.safetensors"))}
    assert files
    return files


def launch(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A launcher's command line, as typed."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=cwd,
        env=process_environment(**environment),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_two_processes_train_the_model_of_one(trained: Path, tmp_path: Path, witnessed: dict[str, str]) -> None:
    command = ("distill", "digits-meanflow", *student(trained / "teacher"), "train.steps=12")
    two = shell(*command, "--processes", 2, "--out", "two", "--json", cwd=tmp_path, **witnessed)
    assert two.returncode == 0, two.stderr
    assert seen(tmp_path) == {"0-of-2", "1-of-2"}
    assert json.loads(two.stdout)["run"] == "two"
    assert len(two.stderr.splitlines()) == 2, two.stderr  # the last step, and the end
    succeed(*command, "--out", tmp_path / "one")
    logged = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    }
    assert [line["step"] for line in logged["two"]] == list(range(1, 13))
    for name in ("loss", "residual", "diagonal_residual", "jvp_norm", "grad_norm"):  # of the samples of both
        found, wanted = ([line[name] for line in logged[run]] for run in ("two", "one"))
        assert found == pytest.approx(wanted, rel=1e-4), name
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-5, atol=1e-5)


@pytest.mark.thorough
def test_torchrun_as_typed(trained: Path, tmp_path: Path, witnessed: dict[str, str]) -> None:
    """Progressive distillation: several stages, each prepared anew."""
    overrides = (*student(trained / "teacher"), "train.steps=4", "objective.start_steps=8")
    command = ("distill", "digits-progressive", *overrides)
    torchrun = ("torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "fewstep.cli")
    two = launch(*torchrun, *command, "--out", "two", cwd=tmp_path, **witnessed)
    assert two.returncode == 0, two.stderr
    assert seen(tmp_path) == {"0-of-2", "1-of-2"}
    succeed(*command, "--out", tmp_path / "one")
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-5, atol=1e-5)


def test_accelerate_launch_as_typed(trained: Path, tmp_path: Path) -> None:
    command = ("distill", "digits-meanflow", *student(trained / "teacher"), "train.steps=6")
    accelerate = ("accelerate.commands.launch", "--cpu", "--num_processes", 1, "-m", "fewstep.cli")
    done = launch(*accelerate, *command, "--out", "run", "--json", cwd=tmp_path, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"] == "run"
    torch.testing.assert_close(weights(tmp_path / "run"), weights(trained / "meanflow"), rtol=0, atol=0)


@pytest.mark.thorough
def test_a_failure_in_the_processes_has_its_exit_code_and_no_traceback(trained: Path, tmp_path: Path) -> None:
    overrides = (*student(trained / "teacher"), "train.lr=1e30", "train.warmup_steps=0", "train.steps=50")
    failed = shell("distill", "digits-meanflow", *overrides, "--processes", 2, "--out", "run", cwd=tmp_path)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert " is not finite at step " in failed.stderr
    assert "Traceback" not in failed.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["exit_code"] == 1


@pytest.mark.thorough
def test_interrupted_processes_stop_together_and_go_on(trained: Path, tmp_path: Path) -> None:
    overrides = (*student(trained / "teacher"), "train.steps=40")
    process = subprocess.Popen(
        [sys.executable, "-m", "fewstep.cli", "distill", "digits-meanflow", *overrides, "--processes", "2"],
        cwd=tmp_path,
        env=process_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    run = tmp_path / "runs" / "digits-meanflow"
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 90
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 5:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=90)
    assert (process.returncode, out) == (130, ""), err
    assert "Traceback" not in err
    found = json.loads((run / "status.json").read_text())
    assert (found["state"], found["exit_code"]) == ("interrupted", 130)
    line = err.strip().splitlines()[-1].partition(": fewstep ")[2]
    assert line.endswith("--processes 2 --resume")
    again = shell(*shlex.split(line), cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 41))
    succeed("distill", "digits-meanflow", *overrides, "--out", tmp_path / "whole")
    torch.testing.assert_close(weights(run), weights(tmp_path / "whole"), rtol=1e-5, atol=1e-5)


def test_a_process_that_fails_alone_is_named(tmp_path: Path) -> None:
    """The first process only sees a broken connection: what is recorded and said is why."""
    script = Path(__file__).parent / "failing_rank.py"
    torchrun = ("fewstep.launch", "--standalone", "--nproc_per_node", 2, script)
    failed = launch(*torchrun, "teach", "digits-teacher", *SMALL, "train.steps=20", "--out", "run", cwd=tmp_path)
    assert failed.returncode == 1
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("failed", 2, 1)
    assert status["message"].startswith("process 1: out of memory at step 3: ")
    assert "train.parallel=fsdp2" in status["message"]
    assert f"error: {status['message']}" in failed.stderr
    assert "Traceback (most" not in failed.stderr


def test_shards_train_the_model_of_one_process_and_go_on_with_any_number(trained: Path, tmp_path: Path) -> None:
    """FSDP2 through the command line: interrupted on two processes, finished on one, from whole tensors on disk."""
    overrides = (*student(trained / "teacher"), "train.steps=12", "train.parallel=fsdp2", "objective.target_decay=0.9")
    command = ("distill", "digits-consistency", *overrides, "train.checkpoint_every=5")
    together(2, fewstep, *command, "--out", "two", cwd=tmp_path)
    succeed(*command, "--out", tmp_path / "one")
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-5, atol=1e-5)
    for part in ("student", "optimizer", "ema-0.999", "objective"):
        sharded, plain = (
            load_file(tmp_path / name / "checkpoints" / "step-00000012" / f"{part}.safetensors")
            for name in ("two", "one")
        )
        torch.testing.assert_close(sharded, plain, rtol=1e-4, atol=1e-5)
    # From the middle on: the sharded run's checkpoint, a single process.
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-00000012")
    shutil.rmtree(tmp_path / "two" / "model")
    succeed(*command, "--out", tmp_path / "two", "--resume")
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-5, atol=1e-5)
