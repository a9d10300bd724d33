"""A whole training run: load, train through the stages, checkpoint, export. Only this writes run directories."""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from fewstep.checkpoint import (
    Checkpoint,
    RunDirectory,
    Tensors,
    checkpoints,
    damage_in,
    read_checkpoint,
    read_tensors,
    write_checkpoint,
    write_tensors,
)
from fewstep.config import RunConfig, config_changes, config_yaml, read_config
from fewstep.console import say
from fewstep.data.dataset import BatchSource, Dataset
from fewstep.data.load import load_data
from fewstep.distill.averages import keep_snapshot
from fewstep.distill.compiled import compile_teacher
from fewstep.distill.export import export, noise_config
from fewstep.distill.flow_maps.config import FlowMapBlock, TrajectoryConfig
from fewstep.distill.legs import Leg, read_legs, up_to
from fewstep.distill.log import MetricsLog
from fewstep.distill.plan import plan
from fewstep.distill.progressive.objective import check_same_grid
from fewstep.distill.reflow.pairs import Share
from fewstep.distill.shards import gathered
from fewstep.distill.stage import Stage, first_steps
from fewstep.distill.trackers import Trackers, check_trackers, open_trackers
from fewstep.distill.train import NonFiniteError, make_accelerator, over_processes, train
from fewstep.environment import describe_environment, device_name
from fewstep.errors import FewstepError, UsageError, is_out_of_memory
from fewstep.files import read_json, write_atomic, write_json
from fewstep.networks.build import build_network
from fewstep.networks.foreign.config import ForeignBlock, knows_none
from fewstep.precision import products
from fewstep.students.initialise import copy_teacher, network_of
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
    """Where training stands: finished steps of a stage, time spent, the stage's tensors by group, weights of the stage
    before (None in the first), metrics not yet logged.

    ``finished`` holds the digests of the averaged students of finished stages, by the step count they serve; ``legs``
    say on what the time was spent.
    """

    stage: int = 0
    done: int = 0
    seconds: float = 0.0
    start: dict[str, Tensors] | None = None
    previous: Tensors | None = None
    finished: dict[str, str] = field(default_factory=dict)
    window: Any = None
    legs: tuple[Leg, ...] = ()


def run_training(
    config: RunConfig, run: RunDirectory, *, resume: bool, overwrite: bool, stopped: Callable[[], bool] = lambda: False
) -> Iterator[Progress]:
    """Train as ``config`` says into ``run``, yielding after every optimiser step, and while pairs are made.

    When ``stopped()`` turns true, a checkpoint is saved and ``Interrupted`` raised. A loss or gradient that is not
    finite ends the run with the last good checkpoint named, a lack of memory with what to lower. Every fault is also
    recorded in ``status.json``.
    """
    accelerator = make_accelerator()
    request = check_training(
        config, run, accelerator.device, processes=accelerator.num_processes, resume=resume, overwrite=overwrite
    )
    stages = request.stages
    accelerator.wait_for_everyone()  # all have looked at the run directory
    if accelerator.is_main_process:
        run.prepare(resume=resume, overwrite=overwrite)
    accelerator.wait_for_everyone()  # what a killed run left half-done is in order
    position = _resume(config, run, request) if resume else _Position()
    accelerator.wait_for_everyone()  # all have read the checkpoint
    step = first_steps(stages)[position.stage] + position.done
    threads = torch.get_num_threads()
    trackers = Trackers()
    try:
        if accelerator.is_main_process:
            run.write_status("running", step=step)  # first: what has a status.json is a run
            if resume:
                run.forget_metrics_after(step)
            else:
                write_atomic(run.path / "config.yaml", config_yaml(config))
                write_json(run.path / "environment.json", describe_environment())
            trackers = open_trackers(config, run.path / "trackers", step)
        accelerator.wait_for_everyone()  # the status is of this run now: who fails from here on will read it
        torch.set_num_threads(config.train.threads or threads)
        for progress in _train_stages(config, run, accelerator, request, position, trackers, stopped):
            step = progress.step
            yield progress
    except Interrupted as error:
        _fault(accelerator, run, "interrupted", error.step, str(error), error.exit_code)
        raise
    except (GeneratorExit, KeyboardInterrupt):
        _fault(accelerator, run, "interrupted", step, "stopped without a checkpoint of this step", 130)
        raise
    except FewstepError as error:
        _fault(accelerator, run, "failed", step, str(error), error.exit_code)
        raise
    except BaseException as error:
        explained = _out_of_memory(error, step, config, accelerator.num_processes)
        told = _fault(accelerator, run, "failed", step, str(explained) if explained else repr(error), 1)
        if told:
            raise FewstepError(told) from error
        if explained:
            raise explained from error
        if accelerator.num_processes > 1 and _lost_another(error):
            # What is to be told, the one that is gone has told, or the launcher will.
            raise FewstepError(f"process {accelerator.process_index} has lost another one") from error
        raise
    finally:
        torch.set_num_threads(threads)
        trackers.close()
    if accelerator.is_main_process:
        run.write_status("done", step=step, exit_code=0)


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
    check_trackers(config.train.report_to)
    path = config.teacher.path if isinstance(config.teacher, RunTeacher) else None
    if path is not None and Path(path).resolve().is_relative_to(run.path.resolve()):
        raise UsageError(f"{run.path} is where the teacher {path} lies: give another --out")
    shares = processes * config.train.gradient_accumulation_steps
    if config.train.batch_size % shares:
        among = f"{processes} processes" if shares == processes else f"{shares} microbatches on {processes} processes"
        raise UsageError(f"train.batch_size {config.train.batch_size} does not divide among {among}")
    data = load_data(config.data)
    teacher = None if config.teacher is None else load_teacher(config.teacher, config.data, data, device)
    _check_groups(config, teacher, shares)
    student = _build_student(config, teacher, data)
    with products("fp32"):  # a grid may be found along a teacher's trajectories
        stages = plan(config, teacher, data)
    empty = next((stage for stage in stages if stage.steps < 1), None)
    if empty is not None:
        raise UsageError(f"the stage {empty.name} has no optimiser steps: raise train.steps")
    if first_steps(stages)[-1] >= 2**32:
        raise UsageError(f"{first_steps(stages)[-1]} optimiser steps are too many: the random keys end at 2^32")
    return Request(data, teacher, student, stages)


def _check_groups(config: RunConfig, teacher: Teacher | None, shares: int) -> None:
    """Pairs are made within groups of samples, and trajectories are shared by groups: every microbatch has to hold
    whole ones."""
    noise = noise_config(config, teacher)
    contrast = config.objective.contrast if config.objective.kind == "flow_matching" else 0.0
    size = config.train.batch_size // shares
    if (noise.coupling.kind != "independent" or contrast) and size % noise.group_size:
        raise UsageError(
            f"a microbatch of {size} samples does not hold whole groups of {noise.group_size}: change train.batch_size"
            + (" or objective.noise.group_size" if config.objective.kind == "flow_matching" else "")
        )
    for place, nodes in _trajectories(config).items():
        if size % nodes:
            raise UsageError(
                f"a microbatch of {size} samples does not hold whole trajectories of {place} {nodes}: change that or "
                "train.batch_size"
            )
    if (
        teacher is not None
        and teacher.straightened
        and config.objective.kind not in ("reflow", "trajectory", "free_flow")
    ):
        say("warning: the teacher's flow was straightened on pairs: mixtures of data with other noise are not on it")
    if noise.coupling.kind != "independent" and config.student.kind == "consistency":
        say("warning: the teacher pairs noise with data, so re-noising (more than 1 step) leaves its flow")


def _trajectories(config: RunConfig) -> dict[str, int]:
    """Config keys that say how many consecutive samples share a trajectory, with their values."""
    objective = config.objective
    nodes = {"objective.nodes": objective.nodes} if isinstance(objective, TrajectoryConfig) else {}
    if isinstance(objective, FlowMapBlock) and objective.warm_start is not None:
        nodes["objective.warm_start.nodes"] = objective.warm_start.nodes
    return nodes


def _train_stages(
    config: RunConfig,
    run: RunDirectory,
    accelerator: Accelerator,
    request: Request,
    position: _Position,
    trackers: Trackers,
    stopped: Callable[[], bool],
) -> Iterator[Progress]:
    settings, stages = config.train, request.stages
    starts = first_steps(stages)

    def batches(data: Dataset) -> BatchSource:
        return BatchSource(
            data,
            settings.batch_size,
            config.seed,
            device=accelerator.device,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        )

    source = batches(request.data)
    device = accelerator.device
    here_on = Leg(device_name(device), device.type, accelerator.num_processes)
    share = Share(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)
    # Every process takes part in gathering shards; what is not sharded the first one has by itself.
    gathers = accelerator.is_main_process or (settings.parallel == "fsdp2" and accelerator.num_processes > 1)
    begun = starts[position.stage] + position.done
    log = MetricsLog(
        run,
        settings.batch_size,
        step=begun,
        seconds=position.seconds,
        window=position.window if accelerator.is_main_process else None,
        over_processes=lambda value: over_processes(value, accelerator),
        speaks=accelerator.is_main_process,
    )
    weights = position.start["student"] if position.start else request.student.state_dict()
    previous_weights, finished = position.previous, position.finished
    seconds, metrics = position.seconds, {}
    exported: dict[int, Tensors] = {}
    teacher = None if request.teacher is None else request.teacher.net
    # Not for pairs: their files are the same bytes whoever makes them.
    if settings.compile and teacher is not None and all(stage.pairs is None for stage in stages):
        with products(config.products):
            compile_teacher(teacher, source.batch(begun))
    for number in range(position.stage, len(stages)):
        stage = stages[number]
        here = number == position.stage
        done, start = (position.done, position.start) if here else (0, None)
        if done == stage.steps:  # the checkpoint was this stage's last
            if stage.hands_on_average and start is not None:
                weights = start[f"ema-{settings.ema[0].name}"]
            previous_weights = weights
            continue
        # Fresh modules: sharding and compilation change the ones they are given for good.
        student = _with_weights(request.student, weights)
        previous = None
        if previous_weights is not None:
            previous = freeze(_with_weights(request.student, previous_weights)).to(accelerator.device)
        if stage.pairs is not None:
            began = time.perf_counter()
            for made in stage.pairs.make(run.path, previous, accelerator.device, share):
                if stopped():
                    at = starts[number]
                    raise Interrupted(f"stopped at step {at} of {starts[-1]}; go on with --resume", at)
                yield Progress(starts[number], starts[-1], f"{stage.name}: {made} pairs", {})
            source = batches(stage.pairs.load(run.path, previous, accelerator.device))
            seconds += time.perf_counter() - began
        before = seconds
        steps = train(
            stage.build(student, previous),
            source,
            settings,
            accelerator,
            seed=config.seed,
            steps=stage.steps,
            first_step=starts[number],
            start=start,
            done=done,
            asked=stopped,
            float32=config.products,
        )
        try:
            for state in steps:
                seconds = before + state.seconds
                step = starts[number] + state.step
                last = state.step == stage.steps
                log.add(state.outputs, state.reading)
                if step % settings.log_every == 0 or last:
                    metrics = log.write(step, stage.name, state.lr, seconds)
                    trackers.log({**metrics, "lr": state.lr}, step)
                keeps = settings.ema_snapshot_every and step % settings.ema_snapshot_every == 0
                saves = step % settings.checkpoint_every == 0 or last or state.stop
                if keeps or saves:
                    state.reading.values()  # all processes: what a failed step has left is not kept
                if keeps and gathers:
                    keep_snapshot(run, step, state.emas, accelerator.is_main_process)
                if saves:
                    window = log.window_state()
                    groups = state.snapshot(accelerator.is_main_process) if gathers else {}
                    if accelerator.is_main_process:
                        replaced = stage.serves in {later.serves for later in stages[number + 1 :]}
                        if last and not replaced:  # before the checkpoint that says the stage is over
                            sha = write_tensors(_stage_file(run, stage), groups[f"ema-{settings.ema[0].name}"])
                            finished = {**finished, str(stage.serves): sha}
                        legs = up_to(position.legs, here_on, seconds)
                        reached = _Position(
                            number, state.step, seconds, groups, previous_weights, finished, window, legs
                        )
                        _save(run, step, reached, config, request.teacher)
                if state.stop:
                    raise Interrupted(f"stopped at step {step} of {starts[-1]}; go on with --resume", step)
                yield Progress(step, starts[-1], stage.name, metrics)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}; {_remedy(error, run)}", samples=error.samples) from error
        shipped = state.emas[0].state(accelerator.is_main_process)
        exported[stage.serves] = {name: value.clone() for name, value in shipped.items()}
        kept = state.emas[0].state() if stage.hands_on_average else gathered(student.state_dict())
        weights = {name: value.cpu() for name, value in kept.items()}
        previous_weights = weights
    if accelerator.is_main_process:
        for stage in stages:
            if stage.serves not in exported:
                exported[stage.serves] = read_tensors(_stage_file(run, stage), finished[str(stage.serves)])
        for stage in stages:
            exported |= dict.fromkeys(stage.also, exported[stage.serves])
        grids = {stage.serves: stage.grid for stage in stages}
        legs = up_to(position.legs, here_on, seconds)
        export(config, run, request.data, request.teacher, request.student, exported, starts[-1], legs, grids)
    accelerator.wait_for_everyone()


def _with_weights(net: nn.Module, weights: Tensors) -> nn.Module:
    """A copy of a network with other weights."""
    copied = copy.deepcopy(net)
    copied.load_state_dict(weights)
    return copied


def _remedy(error: NonFiniteError, run: RunDirectory) -> str:
    good = checkpoints(run.checkpoints)
    advice = (
        "look at those rows: the others are fine"
        if error.samples
        else "try a lower train.lr, a longer train.warmup_steps or train.precision=fp32"
    )
    return f"last good checkpoint: {good[-1].name if good else 'none'}; {advice}"


def _out_of_memory(error: BaseException, step: int, config: RunConfig, processes: int) -> FewstepError | None:
    """What to lower, if it was memory that ran out."""
    if not is_out_of_memory(error):
        return None
    settings = config.train
    remedies = [f"raise train.gradient_accumulation_steps above {settings.gradient_accumulation_steps}"]
    remedies[0] += " (the same training in smaller pieces) or lower train.batch_size"
    if settings.precision != "bf16":
        remedies.append("set train.precision=bf16")
    if processes > 1 and settings.parallel == "ddp":
        remedies.append("set train.parallel=fsdp2")
    first_line = str(error).strip().partition("\n")[0][:160]
    return FewstepError(f"out of memory at step {step + 1}: {'; '.join(remedies)} ({first_line})")


def _lost_another(error: BaseException) -> bool:
    """Whether it is another process that is gone, and with it the connection to it, that ended this one."""
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in said for words in _LOST)


_LOST = ("closed by peer", "reset by peer", "broken pipe", "remote process exited", "connection refused")
"""What gloo and NCCL say then."""


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
    network = network_of(config.student, network)
    said = config.objective.model_dump()
    drops = bool(said.get("guidance") or said.get("label_dropout"))
    if drops and isinstance(network, ForeignBlock) and data.conditional and not knows_none(network):
        raise UsageError(
            f"the student's network ({network.kind}) has nothing that stands for no class: it cannot be guided by "
            "itself, nor lose labels"
        )
    torch.manual_seed(config.seed)
    student = build_network(
        network,
        data.shape,
        data.num_classes,
        two_times=config.student.two_times,
        split=config.student.split,
        guidance=config.student.guidance_input,
    )
    if config.student.init == "teacher" and teacher is not None and teacher.net is not None:
        copy_teacher(student, teacher.net)
    return student


def _save(run: RunDirectory, step: int, position: _Position, config: RunConfig, teacher: Teacher | None) -> None:
    """Write the checkpoint of a step: what ``_resume`` reads."""
    groups = dict(position.start or {})
    if position.previous is not None:
        groups["previous"] = position.previous
    facts = {
        "stage": position.stage,
        "done": position.done,
        "seconds": position.seconds,
        "finished": position.finished,
        "window": position.window,
        "legs": [asdict(leg) for leg in position.legs],
        "teacher_digest": None if teacher is None else teacher.digest,
        "config": config.model_dump(mode="json"),
    }
    write_checkpoint(run.checkpoints, step, Checkpoint(groups, facts), keep=config.train.keep_checkpoints)
    run.write_status("running", step=step)


def _resume(config: RunConfig, run: RunDirectory, request: Request) -> _Position:
    """Read the newest checkpoint; a changed config or teacher is a ``UsageError``."""
    changes = config_changes(read_config(run.path), config)
    if changes:
        raise UsageError(
            f"the config differs from {run.path}/config.yaml: {'; '.join(changes[:3])}"
            f"{' and more' if len(changes) > 3 else ''}. Resume with the same config, or start again with --overwrite"
        )
    found = checkpoints(run.checkpoints)
    if not found:  # stopped while pairs were made for the first stage
        return _Position()
    path = found[-1]
    checkpoint = read_checkpoint(path)
    state, groups = checkpoint.state, dict(checkpoint.groups)
    with damage_in(path):
        if request.teacher is not None and state["teacher_digest"] != request.teacher.digest:
            raise UsageError("the teacher is not the one this run started with: its weights have changed")
        for weights in (groups["student"], groups.get("previous")):
            if weights is not None:
                _with_weights(request.student, weights)
        _check_grid(request.stages[state["stage"]], groups, path)
        for stage in request.stages:  # now, and not after hours of the last stage
            if str(stage.serves) in state["finished"]:
                read_tensors(_stage_file(run, stage), state["finished"][str(stage.serves)])
        return _Position(
            stage=state["stage"],
            done=state["done"],
            seconds=state["seconds"],
            start=groups,
            previous=groups.pop("previous", None),
            finished=dict(state["finished"]),
            window=state["window"],
            legs=read_legs(state),
        )


def _check_grid(stage: Stage, groups: dict[str, Tensors], path: Path) -> None:
    """The grid of a checkpoint's stage, which may depend on the machine that looked for it, has to be the one that its
    objective would now be built with: else a ``UsageError``."""
    if not stage.grid:
        return
    try:
        check_same_grid(groups.get("objective", {}), stage.grid)
    except ValueError as error:
        raise UsageError(f"{path}: {error}; start again with --overwrite") from error


def _stage_file(run: RunDirectory, stage: Stage) -> Path:
    return run.path / "stages" / f"steps-{stage.serves:04d}.safetensors"


def _fault(accelerator: Accelerator, run: RunDirectory, state: str, step: int, message: str, code: int) -> str | None:
    """Record how the run ended. Any process may fail alone, and the others then fail because of it: the first to record
    a failure is believed, and what it said is returned to the others."""
    if accelerator.num_processes > 1:
        status = read_json(run.path / "status.json")
        if status.get("state") == "failed":
            return str(status.get("message"))
        if not accelerator.is_main_process:
            if state == "interrupted":
                return None
            message = f"process {accelerator.process_index}: {message}"
    run.write_status(state, step=step, message=message, exit_code=code)
    return None
