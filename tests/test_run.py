"""Training runs: stages, status, and that a run which was stopped anywhere ends with the bits of one that was not."""

import json
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, cli, contents, refuse, student, succeed
from forked import started

from fewstep.checkpoint import RunDirectory, checkpoints, read_checkpoint
from fewstep.config import RunConfig, load_config
from fewstep.data.config import DigitsConfig
from fewstep.data.dataset import Batch, BatchSource
from fewstep.data.load import load_data
from fewstep.distill.flow_matching import FlowMatching
from fewstep.distill.objective import LossOutput
from fewstep.distill.progressive.objective import ProgressiveStage
from fewstep.distill.run import Interrupted, check_training, run_training
from fewstep.interrupts import stop_requested
from fewstep.keys import Key

METHODS = {
    "teacher": ("digits-teacher", ("train.steps=12", "train.checkpoint_every=5")),
    "meanflow": ("digits-meanflow", ("train.steps=12", "train.checkpoint_every=5")),
    # Stages of 4, 4, 8 and 8 steps.
    "progressive": (
        "digits-progressive",
        ("train.steps=4", "objective.start_steps=16", "objective.last_stages_factor=2", "train.checkpoint_every=3"),
    ),
    "consistency": (
        "digits-consistency",
        ("train.steps=12", "train.checkpoint_every=5", "objective.target_decay=0.9", "train.ema=[0.5, 0.99]"),
    ),
}


def config_of(method: str, teacher: Path) -> RunConfig:
    recipe, own = METHODS[method]
    return load_config(recipe, [*(SMALL if method == "teacher" else student(teacher)), *own])


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def outcome(run: Path) -> dict[str, Any]:
    """The status without what differs from process to process."""
    return {name: value for name, value in status(run).items() if name not in ("pid", "host", "updated")}


def logged_steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, bytes]:
    """The exported weights, for every step count a student serves."""
    files = {path.name: path.read_bytes() for path in (run / "model").glob("*.safetensors")}
    assert files
    return files


def train(config: RunConfig, run: Path, *, stop_at: int | None = None, resume: bool = False) -> int:
    """Train to the end, or until the step after which a stop is asked for; gives the last step."""
    finished = 0

    def stopped() -> bool:
        return stop_at is not None and finished + 1 >= stop_at

    for progress in run_training(config, RunDirectory(run), resume=resume, overwrite=False, stopped=stopped):
        finished = progress.step
    return finished


@pytest.fixture(scope="module")
def whole(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Runs that were never interrupted, trained once each."""
    folder = tmp_path_factory.mktemp("whole")

    def of(method: str) -> Path:
        if not (folder / method).exists():
            train(config_of(method, trained / "teacher"), folder / method)
        return folder / method

    return of


STOPS = [
    *(("teacher", step) for step in (1, 7)),
    *(("meanflow", step) for step in (1, 5, 7, 12)),
    *(("consistency", step) for step in (5, 7, 12)),
    # Inside the first stage, at its end, one step into the second, at its end, inside the last, at its end.
    *(("progressive", step) for step in (2, 4, 5, 8, 19, 24)),
]


@pytest.mark.parametrize(("method", "stop"), STOPS)
def test_stopped_and_resumed_gives_the_same_bits(
    method: str, stop: int, whole: Callable[[str], Path], trained: Path, tmp_path: Path
) -> None:
    config, run = config_of(method, trained / "teacher"), tmp_path / "run"
    total = status(whole(method))["step"]
    with pytest.raises(Interrupted, match=f"stopped at step {stop} of {total}"):
        train(config, run, stop_at=stop)
    assert (status(run)["state"], status(run)["step"], status(run)["exit_code"]) == ("interrupted", stop, 130)
    assert not (run / "model").exists()
    train(config, run, resume=True)
    assert weights(run) == weights(whole(method))
    assert logged_steps(run) == list(range(1, total + 1))
    assert outcome(run) == {"state": "done", "step": total, "message": "", "exit_code": 0}


def test_stopped_at_every_opportunity(whole: Callable[[str], Path], trained: Path, tmp_path: Path) -> None:
    config, run = config_of("progressive", trained / "teacher"), tmp_path / "run"
    with pytest.raises(Interrupted):
        train(config, run, stop_at=1)
    for _ in range(1, 24):
        with pytest.raises(Interrupted):
            train(config, run, stop_at=1, resume=True)
    train(config, run, resume=True)
    assert weights(run) == weights(whole("progressive"))
    assert logged_steps(run) == list(range(1, 25))


@pytest.mark.parametrize("step", [6, 10])
def test_killed_without_warning(step: int, whole: Callable[[str], Path], trained: Path, tmp_path: Path) -> None:
    """A copy of the folder taken while the run goes on is what a power cut leaves: the newest checkpoint counts."""
    config, run = config_of("progressive", trained / "teacher"), tmp_path / "run"
    training = run_training(config, RunDirectory(tmp_path / "living"), resume=False, overwrite=False)
    for progress in training:
        if progress.step == step:
            shutil.copytree(tmp_path / "living", run)
            break
    training.close()
    # Checkpoints are of every third step and of the last of a stage (4, 8): the status speaks of the newest.
    assert (status(run)["state"], status(run)["step"]) == ("running", step // 3 * 3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    train(config, run, resume=True)
    assert weights(run) == weights(whole("progressive"))
    assert logged_steps(run) == list(range(1, 25))


def test_resuming_a_finished_run_writes_the_same_model(
    whole: Callable[[str], Path], trained: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(whole("progressive"), tmp_path / "run"))
    shutil.rmtree(run / "model")
    train(config_of("progressive", trained / "teacher"), run, resume=True)
    assert weights(run) == weights(whole("progressive"))


def test_a_damaged_stage_is_noticed(whole: Callable[[str], Path], trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole("progressive"), tmp_path / "run"))
    file = run / "stages" / "steps-0004.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    overrides = (*student(trained / "teacher"), *METHODS["progressive"][1])
    before = contents(run)
    refuse("distill", "digits-progressive", *overrides, "--out", run, "--resume", says=(str(file), "damaged"))
    assert contents(run) == before  # at once, and not after the last stage


def test_the_seed_and_nothing_else_decides(trained: Path, tmp_path: Path, whole: Callable[[str], Path]) -> None:
    recipe, own = METHODS["meanflow"]
    command = ("distill", recipe, *student(trained / "teacher"), *own)
    succeed(*command, "--seed", 0, "--out", tmp_path / "same")
    succeed(*command, "--seed", 1, "--out", tmp_path / "other")
    assert weights(tmp_path / "same") == weights(whole("meanflow"))
    assert weights(tmp_path / "other") != weights(whole("meanflow"))


def test_a_stage_draws_where_the_one_before_ended(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step of every stage has its own random numbers and its own batch: keys 0 to 23 over four stages."""
    forward, seen = ProgressiveStage.forward, []

    def noted(self: ProgressiveStage, batch: Batch, key: Key) -> LossOutput:
        seen.append((key.step, batch.row.tolist()))
        return forward(self, batch, key)

    monkeypatch.setattr(ProgressiveStage, "forward", noted)
    config = config_of("progressive", trained / "teacher")
    train(config, tmp_path / "run")
    batches = BatchSource(load_data(config.data), 16, config.seed, device=torch.device("cpu"))
    assert seen == [(step, batches.batch(step).row.tolist()) for step in range(24)]


def test_a_student_from_scratch_is_drawn_from_the_seed(tmp_path: Path) -> None:
    """Whatever the global generator has been used for before."""

    def first_layer(seed: int) -> torch.Tensor:
        config = load_config("digits-teacher", [*SMALL, f"seed={seed}"])
        run, device = RunDirectory(tmp_path / "run"), torch.device("cpu")
        request = check_training(config, run, device, processes=1, resume=False, overwrite=False)
        return request.student.get_parameter("enter.weight")

    wanted = first_layer(0)
    torch.rand(3)
    assert torch.equal(first_layer(0), wanted)
    assert not torch.equal(first_layer(1), wanted)


def test_a_resumed_run_logs_what_one_run_would_have(
    whole: Callable[[str], Path], trained: Path, tmp_path: Path
) -> None:
    """Means over windows of four steps, of which the checkpoint cuts one in two."""
    lines = []
    for name in ("whole", "resumed"):
        recipe, own = METHODS["meanflow"]
        config = load_config(recipe, [*student(trained / "teacher"), *own, "train.log_every=4"])
        run = tmp_path / name
        if name == "resumed":
            with pytest.raises(Interrupted):
                train(config, run, stop_at=6)
        train(config, run, resume=name == "resumed")
        found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        clock = ("seconds", "samples_per_s", "peak_memory_mib")
        lines.append([{name: value for name, value in line.items() if name not in clock} for line in found])
    assert [line["step"] for line in lines[0]] == [4, 8, 12]
    for one, other in zip(*lines, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            values, others = (found if isinstance(found, list) else [found] for found in (value, other[name]))
            for here, there in zip(values, others, strict=True):
                assert here == there or here == pytest.approx(there, rel=1e-14), name


def test_the_clock_goes_on_over_stages_and_restarts(trained: Path, tmp_path: Path) -> None:
    """From step to step of stages of 4, 4, 8 and 8 steps, stopped inside the second and at its end; and the rate after
    a restart is that of the steps since (16 samples each; seconds are rounded to thousandths)."""
    config, run = config_of("progressive", trained / "teacher"), tmp_path / "run"
    for stop in (6, 8):
        with pytest.raises(Interrupted):
            train(config, run, stop_at=stop, resume=stop > 6)
    train(config, run, resume=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in lines]
    assert len(seconds) == 24
    assert seconds == sorted(seconds)
    assert json.loads((run / "model" / "config.json").read_text())["train"]["seconds"] == seconds[-1]
    for step in (7, 9):
        took = seconds[step - 1] - seconds[step - 2]
        assert lines[step - 1]["samples_per_s"] * took == pytest.approx(16, rel=0.9)


def test_the_card_says_on_what_it_was_trained(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one machine its name; on two, one after the other, those of both."""
    import fewstep.distill.run as module
    from fewstep.environment import device_name

    config, here = config_of("meanflow", trained / "teacher"), device_name(torch.device("cpu"))

    def card(run: Path) -> dict[str, Any]:
        return json.loads((run / "model" / "config.json").read_text())["train"]

    for stop in (4, 6):
        with pytest.raises(Interrupted):
            train(config, tmp_path / "moved", stop_at=stop, resume=stop > 4)
    monkeypatch.setattr(module, "device_name", lambda device: "another")
    train(config, tmp_path / "moved", resume=True)
    moved = card(tmp_path / "moved")
    assert (moved["device"], moved["device_type"], moved["processes"]) == (f"{here}, another", "cpu", 1)
    lines = (tmp_path / "moved" / "metrics.jsonl").read_text().splitlines()
    assert moved["seconds"] == json.loads(lines[-1])["seconds"]
    assert "device_seconds" not in moved
    assert card(trained / "meanflow") | {"device": here, "device_type": "cpu", "processes": 1} == card(
        trained / "meanflow"
    )


def test_threads_are_those_asked_for_while_it_trains(trained: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    recipe, own = METHODS["meanflow"]
    config = load_config(recipe, [*student(trained / "teacher"), *own, f"train.threads={before + 1}"])
    during = [
        torch.get_num_threads()
        for _ in run_training(config, RunDirectory(tmp_path / "run"), resume=False, overwrite=False)
    ]
    assert during == 12 * [before + 1]
    assert torch.get_num_threads() == before


def test_metrics_are_logged_as_often_as_asked(trained: Path, tmp_path: Path) -> None:
    overrides = (*student(trained / "teacher"), "train.steps=10", "train.log_every=4")
    succeed("distill", "digits-meanflow", *overrides, "--out", tmp_path / "run")
    assert logged_steps(tmp_path / "run") == [4, 8, 10]
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert set(line) == {
        *("step", "stage", "lr", "seconds", "samples_per_s", "peak_memory_mib"),
        *("loss", "residual", "grad_norm", "jvp_norm", "diagonal_residual", "residual_by_time"),
    }


# When something goes wrong -------------------------------------------------------------------------------------------


def test_a_diverging_run_stops_with_a_remedy(tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = ("train.lr=1e30", "train.warmup_steps=0", "train.steps=30", "train.checkpoint_every=1")
    result = cli("teach", "digits-teacher", *SMALL, *overrides, "--out", run)
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: the loss is not finite at step ")
    good = max(path.name for path in (run / "checkpoints").iterdir())
    assert f"last good checkpoint: {good}" in last
    assert "lower train.lr" in last
    assert (status(run)["state"], status(run)["exit_code"]) == ("failed", 1)
    assert status(run)["message"] in last
    assert not (run / "model").exists()


def test_a_poisoned_image_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One NaN in one image: training stops at the batch that has it, before any weight has seen it."""
    import fewstep.distill.run

    clean = load_data(DigitsConfig())
    x = clean.x.clone()
    x[700, 0, 3, 4] = float("nan")
    monkeypatch.setattr(fewstep.distill.run, "load_data", lambda config: replace(clean, x=x))
    source = BatchSource(clean, 16, 0, device=torch.device("cpu"))
    step = next(step for step in range(200) if 700 in source.batch(step).row)
    assert step > 2
    run = tmp_path / "run"
    result = cli("teach", "digits-teacher", *SMALL, "train.steps=200", "train.checkpoint_every=1", "--out", run)
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last == (
        f"error: the loss is not finite at step {step + 1}, for 1 of 16 samples: rows 700 of the data (draws and batch "
        f"keyed by seed 0, step {step}); last good checkpoint: step-{step:08d}; look at those rows: the others are fine"
    )
    assert (status(run)["state"], status(run)["step"], status(run)["exit_code"]) == ("failed", step, 1)
    assert status(run)["message"] in last
    found = checkpoints(run / "checkpoints")
    assert [path.name for path in found] == [f"step-{k:08d}" for k in (step - 1, step)]
    for path in found:
        groups = read_checkpoint(path).groups
        assert all(value.isfinite().all() for tensors in groups.values() for value in tensors.values())


@pytest.mark.parametrize(
    ("error", "overrides", "says", "silent"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), (), ("train.precision=bf16",), ("fsdp2",)),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ("train.precision=bf16",), (), ("bf16", "fsdp2")),
        (MemoryError(), ("train.gradient_accumulation_steps=4",), ("train.precision=bf16",), ("fsdp2",)),
    ],
)
def test_out_of_memory_says_what_to_lower(
    error: Exception,
    overrides: tuple[str, ...],
    says: tuple[str, ...],
    silent: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward = FlowMatching.forward

    def hungry(self: FlowMatching, batch: Batch, key: Key) -> LossOutput:
        if key.step == 3:
            raise error
        return forward(self, batch, key)

    monkeypatch.setattr(FlowMatching, "forward", hungry)
    run = tmp_path / "run"
    result = cli("teach", "digits-teacher", *SMALL, "train.steps=9", *overrides, "--out", run)
    assert (result.exit_code, result.stdout) == (1, "")
    last = result.stderr.splitlines()[-1]
    parts = 4 if "train.gradient_accumulation_steps=4" in overrides else 1
    assert last.startswith(f"error: out of memory at step 4: raise train.gradient_accumulation_steps above {parts} ")
    for word in says:
        assert word in last
    for word in silent:
        assert word not in last
    assert (status(run)["state"], status(run)["step"], status(run)["exit_code"]) == ("failed", 3, 1)
    assert status(run)["message"] in last


def test_a_defect_is_recorded_and_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fewstep.distill.run

    def broken(*arguments: object) -> None:
        raise AssertionError("a defect")

    monkeypatch.setattr(fewstep.distill.run, "export", broken)
    with pytest.raises(AssertionError, match="a defect"):
        cli("teach", "digits-teacher", *SMALL, "train.steps=2", "--out", tmp_path / "run")
    assert outcome(tmp_path / "run") == {
        "state": "failed",
        "step": 2,
        "message": "AssertionError('a defect')",
        "exit_code": 1,
    }


def test_a_second_interrupt_is_recorded_as_one(trained: Path, tmp_path: Path) -> None:
    def impatient() -> bool:
        raise KeyboardInterrupt

    config = config_of("meanflow", trained / "teacher")
    with pytest.raises(KeyboardInterrupt):
        list(run_training(config, RunDirectory(tmp_path / "run"), resume=False, overwrite=False, stopped=impatient))
    assert (status(tmp_path / "run")["state"], status(tmp_path / "run")["exit_code"]) == ("interrupted", 130)


def test_a_run_that_dies_at_once_can_be_overwritten(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither resumable nor a run yet: without its status it would be in everybody's way for ever."""
    import fewstep.distill.run

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    config, run = config_of("meanflow", trained / "teacher"), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(fewstep.distill.run, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config, run)
    list(run_training(config, RunDirectory(run), resume=False, overwrite=True))
    assert status(run)["state"] == "done"


# Signals -------------------------------------------------------------------------------------------------------------


def test_a_signal_asks_and_the_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number in (signal.SIGTERM, signal.SIGINT):
        with stop_requested() as stopped:
            assert not stopped()
            os.kill(os.getpid(), number)
            assert stopped()
    with stop_requested():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_printed_line_goes_on(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names with spaces, brackets and quotes included."""
    import fewstep.interrupts

    @contextmanager
    def soon() -> Iterator[Callable[[], bool]]:
        asked = iter([False, False, True])
        yield lambda: next(asked)

    run = tmp_path / "it's a [run]"
    teacher = Path(shutil.copytree(trained / "teacher", tmp_path / "my teacher"))
    overrides = (*student(teacher), "train.ema=[0.9, 0.99]", "train.steps=5")
    with monkeypatch.context() as patch:
        patch.setattr(fewstep.interrupts, "stop_requested", soon)
        result = cli("distill", "digits-meanflow", *overrides, "--seed", 7, "--out", run, "--json")
    assert (result.exit_code, result.stdout) == (130, "")
    message, _, line = result.stderr.splitlines()[-1].partition(": fewstep ")
    assert message == "error: stopped at step 3 of 5; go on with --resume"
    succeed(*shlex.split(line))
    assert logged_steps(run) == [1, 2, 3, 4, 5]
    assert json.loads((run / "model" / "config.json").read_text())["train"]["steps"] == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "number", "after", "overrides"),
    [
        pytest.param("meanflow", signal.SIGTERM, 20, ("train.steps=200",), marks=pytest.mark.thorough),
        # Stages of 60, 180 and 180 steps: inside the second.
        (
            "progressive",
            signal.SIGINT,
            70,
            ("train.steps=60", "objective.start_steps=8", "objective.last_stages_factor=3"),
        ),
    ],
)
def test_a_signal_to_the_process(
    method: str, number: int, after: int, overrides: tuple[str, ...], trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = ("distill", METHODS[method][0], *student(trained / "teacher"), *overrides)
    process = started(*command, "--out", run)
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 90
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < after:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert (status(run)["state"], status(run)["exit_code"]) == ("interrupted", 130)
    stopped_at = status(run)["step"]
    total = 200 if method == "meanflow" else 420
    assert after <= stopped_at < total
    if method == "progressive":
        assert json.loads(metrics.read_text().splitlines()[-1])["stage"] == "4 -> 2 steps"
    line = err.splitlines()[-1].partition(": fewstep ")[2]
    assert line.endswith("--resume")
    succeed(*shlex.split(line))
    succeed(*command, "--out", tmp_path / "whole")
    assert weights(run) == weights(tmp_path / "whole")
    assert logged_steps(run) == list(range(1, total + 1))
