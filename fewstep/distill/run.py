"""A whole training run: load, train through the stages, checkpoint, export. Only this writes run directories."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

import fewstep
from fewstep.checkpoint import (
    Checkpoint,
    RunDirectory,
    Tensors,
    checkpoints,
    damage_in,
    read_checkpoint,
    read_tensors,
    write_checkpoint,
    write_model,
    write_tensors,
)
from fewstep.config import RunConfig, config_changes, config_yaml, read_config
from fewstep.data.dataset import BatchSource, Dataset
from fewstep.data.load import load_data
from fewstep.distill.plan import Stage, first_steps, plan
from fewstep.distill.train import NonFiniteError, TrainState, make_accelerator, train
from fewstep.environment import commit, describe_environment
from fewstep.errors import FewstepError, UsageError
from fewstep.files import digest, write_atomic, write_json
from fewstep.networks.build import build_network, parameter_count
from fewstep.students.initialise import copy_teacher
from fewstep.students.model_card import model_readme
from fewstep.teachers.config import RunTeacher
from fewstep.teachers.load import Teacher, load_teacher
from fewstep.teachers.network import freeze


@dataclass(frozen=True)
class Progress:
    """One finished optimiser step of ``total``, and the metrics of the last logged step (plain numbers)."""

    step: int
    total: int
    stage: str
    metrics: dict[str, float]


class Interrupted(FewstepError):
    """The run was asked to stop and has saved a checkpoint of ``step``. Exit code 130."""

    exit_code = 130

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class _Position:
    """Where training stands: finished steps of a stage, time spent, previous stage's student (None in the first).

    ``finished`` holds the digests of the averaged students of earlier stages, by the step count they serve.
    """

    stage: int = 0
    done: int = 0
    seconds: float = 0.0
    start: dict[str, Tensors] | None = None
    previous: nn.Module | None = None
    finished: dict[str, str] = field(default_factory=dict)


def run_training(
    config: RunConfig, run: RunDirectory, *, resume: bool, overwrite: bool, stopped: Callable[[], bool] = lambda: False
) -> Iterator[Progress]:
    """Train as ``config`` says into ``run``, yielding after every optimiser step.

    When ``stopped()`` turns true, a checkpoint is saved and ``Interrupted`` raised. A non-finite gradient ends the
    run with the last good checkpoint named. Every fault is also recorded in ``status.json``.
    """
    accelerator = make_accelerator(config.train)
    request = check_training(
        config, run, accelerator.device, processes=accelerator.num_processes, resume=resume, overwrite=overwrite
    )
    data, teacher, student, stages = request.data, request.teacher, request.student, request.stages
    accelerator.wait_for_everyone()  # all have looked at the run directory
    if accelerator.is_main_process:
        run.prepare(resume=resume, overwrite=overwrite)
        if not resume:
            _status(accelerator, run, "running", 0)  # first: what has a status.json is a run
            write_atomic(run.path / "config.yaml", config_yaml(config))
            write_json(run.path / "environment.json", describe_environment())
    position = _resume(config, run, teacher, student, accelerator.device) if resume else _Position()
    accelerator.wait_for_everyone()  # all have read the checkpoint
    if resume and accelerator.is_main_process:
        run.forget_metrics_after(first_steps(stages)[position.stage] + position.done)
    starts = first_steps(stages)
    step = starts[position.stage] + position.done
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(config.train.threads or threads)
        for progress in _train_stages(config, run, accelerator, data, teacher, student, stages, position, stopped):
            step = progress.step
            yield progress
    except FewstepError as error:
        if isinstance(error, Interrupted):
            _status(accelerator, run, "interrupted", error.step, str(error), error.exit_code)
        else:
            _status(accelerator, run, "failed", step, str(error), error.exit_code)
        raise
    except (GeneratorExit, KeyboardInterrupt):
        _status(accelerator, run, "interrupted", step, "stopped without a checkpoint of this step", 130)
        raise
    except BaseException as error:
        _status(accelerator, run, "failed", step, repr(error), 1)
        raise
    finally:
        torch.set_num_threads(threads)
    _status(accelerator, run, "done", step, "", 0)


@dataclass(frozen=True)
class Request:
    """What a training needs, found to be in order."""

    data: Dataset
    teacher: Teacher | None
    student: nn.Module
    stages: tuple[Stage, ...]


def check_training(
    config: RunConfig, run: RunDirectory, device: torch.device, *, processes: int, resume: bool, overwrite: bool
) -> Request:
    """Find everything that can be wrong with a request before the run directory is touched: else ``UsageError``."""
    run.check(resume=resume, overwrite=overwrite)
    path = config.teacher.path if isinstance(config.teacher, RunTeacher) else None
    if path is not None and Path(path).resolve().is_relative_to(run.path.resolve()):
        raise UsageError(f"{run.path} is where the teacher {path} lies: give another --out")
    if config.train.batch_size % processes:
        raise UsageError(f"train.batch_size {config.train.batch_size} does not divide among {processes} processes")
    data = load_data(config.data)
    teacher = None if config.teacher is None else load_teacher(config.teacher, config.data, data, device)
    student = _build_student(config, teacher, data)
    stages = plan(config, teacher, data)
    empty = next((stage for stage in stages if stage.steps < 1), None)
    if empty is not None:
        raise UsageError(f"the stage {empty.name} has no optimiser steps: raise train.steps")
    if first_steps(stages)[-1] >= 2**32:
        raise UsageError(f"{first_steps(stages)[-1]} optimiser steps are too many: the random keys end at 2^32")
    return Request(data, teacher, student, stages)


def _train_stages(
    config: RunConfig,
    run: RunDirectory,
    accelerator: Accelerator,
    data: Dataset,
    teacher: Teacher | None,
    student: nn.Module,
    stages: tuple[Stage, ...],
    position: _Position,
    stopped: Callable[[], bool],
) -> Iterator[Progress]:
    settings = config.train
    starts = first_steps(stages)
    source = BatchSource(
        data,
        settings.batch_size,
        config.seed,
        device=accelerator.device,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    _status(accelerator, run, "running", starts[position.stage] + position.done)
    seconds, metrics = position.seconds, {}
    previous, finished = position.previous, position.finished
    exported: dict[int, Tensors] = {}
    for number in range(position.stage, len(stages)):
        stage = stages[number]
        here = number == position.stage
        done, start = (position.done, position.start) if here else (0, None)
        objective = stage.build(student, previous)
        before = seconds
        state: TrainState | None = None
        steps = train(
            objective,
            source,
            settings,
            accelerator,
            seed=config.seed,
            steps=stage.steps,
            first_step=starts[number],
            start=start,
            done=done,
        )
        try:
            for state in steps:
                seconds = before + state.seconds
                step = starts[number] + state.step
                last = state.step == stage.steps
                if step % settings.log_every == 0 or last:
                    metrics = {name: float(value) for name, value in state.metrics.items()}
                    line = {"step": step, "stage": stage.name, "lr": state.lr, "seconds": round(seconds, 3), **metrics}
                    if accelerator.is_main_process:
                        run.append_metrics(line)
                stop = _agreed(accelerator, stopped())
                if accelerator.is_main_process and (step % settings.checkpoint_every == 0 or last or stop):
                    groups = state.snapshot()
                    if previous is not None:
                        groups["previous"] = dict(previous.state_dict())
                    facts: dict[str, Any] = {
                        "stage": number,
                        "done": state.step,
                        "seconds": seconds,
                        "teacher_digest": None if teacher is None else teacher.digest,
                    }
                    if last:  # before the checkpoint that says the stage is over
                        sha = write_tensors(_stage_file(run, stage), state.emas[0].state())
                        finished = {**finished, str(stage.serves): sha}
                    facts["finished"] = finished
                    write_checkpoint(run.checkpoints, step, Checkpoint(groups, facts), keep=settings.keep_checkpoints)
                if stop:
                    raise Interrupted(f"stopped at step {step} of {starts[-1]}; go on with --resume", step)
                yield Progress(step, starts[-1], stage.name, metrics)
        except NonFiniteError as error:
            good = checkpoints(run.checkpoints)
            raise NonFiniteError(
                f"{error}; last good checkpoint: {good[-1].name if good else 'none'}. "
                "Try a lower train.lr, a longer train.warmup_steps or train.precision=fp32"
            ) from error
        if state is not None:
            exported[stage.serves] = {name: value.clone() for name, value in state.emas[0].state().items()}
        previous = freeze(copy.deepcopy(student))
        student.requires_grad_(True).train()
    if accelerator.is_main_process:
        for stage in stages:
            if stage.serves not in exported:
                exported[stage.serves] = read_tensors(_stage_file(run, stage), finished[str(stage.serves)])
        _export(config, run, data, teacher, student, exported, starts[-1], seconds)
    accelerator.wait_for_everyone()


def _build_student(config: RunConfig, teacher: Teacher | None, data: Dataset) -> nn.Module:
    """The network to be trained, initialised from the seed or from the teacher."""
    network = config.student.network
    if config.student.init == "teacher":
        assert teacher is not None
        if teacher.network is None or teacher.net is None:
            raise UsageError(f"student.init: the teacher {teacher.name} has no weights to start from")
        if network is not None and network != teacher.network:
            raise UsageError("student.network differs from the teacher's: leave it out, or set student.init to scratch")
        network = teacher.network
    assert network is not None
    torch.manual_seed(config.seed)
    student = build_network(network, data.shape, data.num_classes, two_times=config.student.kind != "velocity")
    if config.student.init == "teacher" and teacher is not None and teacher.net is not None:
        copy_teacher(student, teacher.net)
    return student


def _resume(
    config: RunConfig, run: RunDirectory, teacher: Teacher | None, student: nn.Module, device: torch.device
) -> _Position:
    """Read the newest checkpoint; a changed config or teacher is a ``UsageError``."""
    changes = config_changes(read_config(run.path), config)
    if changes:
        raise UsageError(
            f"the config differs from {run.path}/config.yaml: {'; '.join(changes[:3])}"
            f"{' and more' if len(changes) > 3 else ''}. Resume with the same config, or start again with --overwrite"
        )
    path = checkpoints(run.checkpoints)[-1]
    checkpoint = read_checkpoint(path)
    state, groups = checkpoint.state, dict(checkpoint.groups)
    with damage_in(path):
        if teacher is not None and state["teacher_digest"] != teacher.digest:
            raise UsageError("the teacher is not the one this run started with: its weights have changed")
        student.load_state_dict(groups["student"])
        previous = None
        if "previous" in groups:
            previous = copy.deepcopy(student)
            previous.load_state_dict(groups.pop("previous"))
            freeze(previous.to(device))
        return _Position(state["stage"], state["done"], state["seconds"], groups, previous, dict(state["finished"]))


def _export(
    config: RunConfig,
    run: RunDirectory,
    data: Dataset,
    teacher: Teacher | None,
    student: nn.Module,
    exported: dict[int, Tensors],
    steps: int,
    seconds: float,
) -> None:
    """Write ``model/``: the averaged weights of every stage that is worth keeping, ready to load."""
    is_teacher = config.objective.kind == "flow_matching"
    files = {serves: f"model-steps-{serves}.safetensors" for serves in exported}
    files[min(exported)] = "model.safetensors"
    entries: dict[str, dict[str, Any]] = {}
    for serves, file in sorted(files.items()):
        entries[str(serves)] = {"weights": file}
        if serves:
            entries[str(serves)]["times"] = [1 - k / serves for k in range(serves + 1)]
    sampler: dict[str, Any] = {"sampler": _RULES[config.student.kind], "steps": entries}
    if is_teacher:
        sampler["solver"] = "euler"
    network = config.student.network or (teacher.network if teacher is not None else None)
    assert network is not None
    card = {
        "fewstep": fewstep.__version__,
        "commit": commit(),
        "name": config.name,
        "role": "teacher" if is_teacher else "student",
        "objective": config.objective.kind,
        "student": config.student.kind,
        "network": network.model_dump(mode="json"),
        "two_times": config.student.kind != "velocity",
        "params": parameter_count(student),
        "data": {"name": data.name, "shape": list(data.shape), "num_classes": data.num_classes, "kind": data.kind},
        "convention": "t=0 data, t=1 noise, v=e-x",
        "guidance": 1.0 if teacher is None else teacher.guidance,
        "teacher": None if teacher is None else teacher.name,
        "teacher_digest": None if teacher is None else teacher.digest,
        "ema": config.train.ema[0],
        "config_digest": digest(config_yaml(config).encode()),
        "train": {"steps": steps, "samples": steps * config.train.batch_size, "seconds": round(seconds, 3)},
    }
    weights = {file: exported[serves] for serves, file in files.items()}
    write_model(run.model, card, sampler, weights, model_readme(card, sampler))


_RULES = {"velocity": "ode", "average_velocity": "jumps", "consistency": "renoise"}


def _stage_file(run: RunDirectory, stage: Stage) -> Path:
    return run.path / "stages" / f"steps-{stage.serves:04d}.safetensors"


def _agreed(accelerator: Accelerator, stop: bool) -> bool:
    """Whether any process was asked to stop: all leave after the same step, or the others would wait for ever."""
    if accelerator.num_processes == 1:
        return stop
    asked = torch.tensor(float(stop), device=accelerator.device)
    return bool(accelerator.reduce(asked, "sum") > 0)


def _status(
    accelerator: Accelerator, run: RunDirectory, state: str, step: int, message: str = "", code: int | None = None
) -> None:
    if accelerator.is_main_process:
        run.write_status(state, step=step, message=message, exit_code=code)
