"""The stages of the consistency family: one, or two for methods that begin as another one."""

from dataclasses import replace

from torch import nn

from fewstep.config import RunConfig
from fewstep.data.dataset import Dataset
from fewstep.distill.consistency.config import (
    ConsistencyFamilyConfig,
    ConsistencyFlowMatchingConfig,
    PhasedConsistencyConfig,
    TruncatedConsistencyConfig,
)
from fewstep.distill.consistency.methods import Given, consistency_objective, straight_stage, truncated_stage
from fewstep.distill.ingredients import teachers_noise
from fewstep.distill.objective import Objective
from fewstep.distill.stage import Stage
from fewstep.errors import UsageError
from fewstep.teachers.load import Teacher


def consistency_stages(config: RunConfig, teacher: Teacher | None, data: Dataset) -> tuple[Stage, ...]:
    objective, total = config.objective, config.train.steps
    assert isinstance(objective, ConsistencyFamilyConfig)

    def build(student: nn.Module, previous: nn.Module | None) -> Objective:
        return consistency_objective(objective, Given(student, teacher, teachers_noise(teacher), total))

    name = objective.kind.replace("_", " ")
    if objective.kind == "consistency":
        name = "consistency distillation" if objective.velocity == "teacher" else "consistency training"
    return (Stage(name, total, 0, build),)


def phased_consistency_stages(config: RunConfig, teacher: Teacher | None, data: Dataset) -> tuple[Stage, ...]:
    assert isinstance(config.objective, PhasedConsistencyConfig)
    first, *others = config.objective.segments
    (stage,) = consistency_stages(config, teacher, data)
    return (replace(stage, serves=first, also=tuple(others)),)


def consistency_flow_matching_stages(config: RunConfig, teacher: Teacher | None, data: Dataset) -> tuple[Stage, ...]:
    objective, total = config.objective, config.train.steps
    assert isinstance(objective, ConsistencyFlowMatchingConfig)
    straight = objective.straight_steps
    if straight >= total:
        raise UsageError(f"objective.straight_steps {straight} leaves none of train.steps {total} to consistency")

    def build(student: nn.Module, previous: nn.Module | None) -> Objective:
        return straight_stage(objective, Given(student, teacher, teachers_noise(teacher), straight))

    (last,) = consistency_stages(config, teacher, data)
    last = replace(last, steps=total - straight, serves=objective.segments)
    return (Stage("flow matching on segments", straight, objective.segments, build), last) if straight else (last,)


def truncated_consistency_stages(config: RunConfig, teacher: Teacher | None, data: Dataset) -> tuple[Stage, ...]:
    objective, total = config.objective, config.train.steps
    assert isinstance(objective, TruncatedConsistencyConfig)

    def build(student: nn.Module, previous: nn.Module | None) -> Objective:
        assert previous is not None
        return truncated_stage(objective, Given(student, teacher, teachers_noise(teacher), total), previous)

    (first,) = consistency_stages(config, teacher, data)
    # The uniform grid of two steps has its second node at the boundary, those of more steps have one below it.
    return (
        replace(first, name="easy consistency", serves=1),
        Stage("truncated consistency", round(total * objective.second_stage_factor), 1, build, also=(2,)),
    )
