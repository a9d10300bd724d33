"""From a config to the stages of training: which objective, for how long, and which step counts its student serves.

Most methods are one stage. Progressive distillation is one stage per halving, each with the previous stage's student as
its teacher and with a fresh optimiser.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from torch import nn

from fewstep.config import RunConfig
from fewstep.data.dataset import Dataset
from fewstep.distill.config import (
    ConsistencyConfig,
    FlowMatchingConfig,
    LogitNormalTimes,
    MeanFlowConfig,
    ProgressiveConfig,
    TimesConfig,
)
from fewstep.distill.consistency import ConsistencyDistillation
from fewstep.distill.flow_matching import FlowMatching
from fewstep.distill.meanflow import MeanFlow
from fewstep.distill.objective import Objective
from fewstep.distill.progressive import ProgressiveStage, SolverMap, stage_domain, stage_steps
from fewstep.distill.tangent import central_difference, forward_derivative
from fewstep.errors import UsageError
from fewstep.students.maps import AverageVelocityMap
from fewstep.teachers.load import Teacher
from fewstep.times import Times, logit_normal, uniform


@dataclass(frozen=True)
class Stage:
    """``build(student, previous)`` makes the objective; ``previous`` is the frozen student of the stage before.

    ``serves`` is the number of sampling steps the stage's student is for, 0 for any.
    """

    name: str
    steps: int
    serves: int
    build: Callable[[nn.Module, nn.Module | None], Objective]


def plan(config: RunConfig, teacher: Teacher | None, data: Dataset) -> tuple[Stage, ...]:
    """The stages of a run, in order."""
    return PLANS[config.objective.kind](config, teacher, data)


def first_steps(stages: tuple[Stage, ...]) -> list[int]:
    """The global optimiser step at which each stage begins, and the total as last entry."""
    return [0, *accumulate(stage.steps for stage in stages)]


def times_of(config: TimesConfig) -> Times:
    return logit_normal(config.mean, config.std) if isinstance(config, LogitNormalTimes) else uniform


def _flow_matching(config: RunConfig, teacher: Teacher | None, data: Dataset) -> tuple[Stage, ...]:
    objective = config.objective
    assert isinstance(objective, FlowMatchingConfig)

    def build(student: nn.Module, previous: nn.Module | None) -> Objective:
        return FlowMatching(
            student,
            times=times_of(objective.times),
            label_dropout=objective.label_dropout,
            null_label=data.num_classes,
        )

    return (Stage("flow matching", config.train.steps, 0, build),)


def _meanflow(config: RunConfig, teacher: Teacher | None, data: Dataset) -> tuple[Stage, ...]:
    objective = config.objective
    assert isinstance(objective, MeanFlowConfig)

    def build(student: nn.Module, previous: nn.Module | None) -> Objective:
        return MeanFlow(
            student,
            velocity=teacher.field if teacher is not None and objective.velocity == "teacher" else None,
            times=times_of(objective.times),
            jump_fraction=objective.jump_fraction,
            weight_power=objective.weight_power,
            weight_offset=objective.weight_offset,
            derivative=forward_derivative if objective.jvp == "forward" else central_difference(objective.jvp_step),
        )

    return (Stage("MeanFlow", config.train.steps, 0, build),)


def _progressive(config: RunConfig, teacher: Teacher | None, data: Dataset) -> tuple[Stage, ...]:
    objective = config.objective
    assert isinstance(objective, ProgressiveConfig)
    assert teacher is not None
    field = teacher.field
    try:
        counts = stage_steps(objective.start_steps, objective.end_steps)
    except ValueError as error:
        raise UsageError(f"objective.start_steps: {error}") from error

    def stage(steps: int) -> Stage:
        def build(student: nn.Module, previous: nn.Module | None) -> Objective:
            if previous is None:
                return ProgressiveStage(student, teacher=SolverMap(field, objective.solver), steps=steps)
            return ProgressiveStage(student, teacher=AverageVelocityMap(previous, stage_domain(2 * steps)), steps=steps)

        factor = objective.last_stages_factor if steps <= 2 else 1.0
        return Stage(f"{2 * steps} -> {steps} steps", round(config.train.steps * factor), steps, build)

    return tuple(stage(steps) for steps in counts)


def _consistency(config: RunConfig, teacher: Teacher | None, data: Dataset) -> tuple[Stage, ...]:
    objective = config.objective
    assert isinstance(objective, ConsistencyConfig)
    assert teacher is not None
    field = teacher.field

    def build(student: nn.Module, previous: nn.Module | None) -> Objective:
        return ConsistencyDistillation(
            student,
            teacher=field,
            solver=objective.solver,
            nodes=objective.nodes,
            start_nodes=objective.start_nodes,
            total_steps=config.train.steps,
            target_decay=objective.target_decay,
            huber=objective.huber,
        )

    return (Stage("consistency distillation", config.train.steps, 0, build),)


PLANS = {
    "flow_matching": _flow_matching,
    "meanflow": _meanflow,
    "progressive": _progressive,
    "consistency": _consistency,
}
