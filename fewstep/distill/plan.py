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
    CurvatureConfig,
    FlowMatchingConfig,
    ProgressiveConfig,
)
from fewstep.distill.consistency import ConsistencyDistillation
from fewstep.distill.curvature import CurvatureWeighting
from fewstep.distill.flow_maps.config import FlowMapConfig, TrajectoryConfig
from fewstep.distill.flow_maps.methods import Given, objective_of
from fewstep.distill.flow_matching import FlowMatching
from fewstep.distill.ingredients import derivative_of, noise_of, teachers_noise, times_of
from fewstep.distill.objective import Objective
from fewstep.distill.progressive import ProgressiveStage, SolverMap, stage_domain, stage_steps
from fewstep.errors import UsageError
from fewstep.flow import PATHS
from fewstep.students.maps import AverageVelocityMap
from fewstep.teachers.load import Teacher


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


def _flow_matching(config: RunConfig, teacher: Teacher | None, data: Dataset) -> tuple[Stage, ...]:
    objective = config.objective
    assert isinstance(objective, FlowMatchingConfig)
    weighting = objective.weighting

    def build(student: nn.Module, previous: nn.Module | None) -> Objective:
        return FlowMatching(
            student,
            times=times_of(objective.times),
            label_dropout=objective.label_dropout,
            null_label=data.num_classes,
            path=PATHS[objective.path],
            noise=noise_of(objective.noise),
            contrast=objective.contrast,
            group=objective.noise.group_size,
            weighting=CurvatureWeighting(
                student,
                power=weighting.power,
                warmup_steps=weighting.warmup_steps,
                probed=weighting.probed,
                derivative=derivative_of(weighting.jvp, weighting.jvp_step),
            )
            if isinstance(weighting, CurvatureConfig)
            else None,
        )

    return (Stage("flow matching", config.train.steps, 0, build),)


def _flow_map(config: RunConfig, teacher: Teacher | None, data: Dataset) -> tuple[Stage, ...]:
    objective, total = config.objective, config.train.steps
    assert isinstance(objective, FlowMapConfig)
    warm = objective.warm_start
    begin = 0 if warm is None else warm.steps
    if begin >= total:
        raise UsageError(f"objective.warm_start.steps {begin} leaves none of train.steps {total} to {objective.kind}")

    def given(student: nn.Module) -> Given:
        return Given(
            student,
            teacher,
            teachers_noise(teacher),
            data.num_classes,
            config.student.guidance_input,
            done=lambda step: (step - begin) / (total - begin),
        )

    def build(student: nn.Module, previous: nn.Module | None) -> Objective:
        return objective_of(objective, given(student))

    build(nn.Identity(), None)  # what does not fit the teacher or the data is told now, before anything is written
    serves = 1 if objective.kind == "free_flow" else 0
    stages = (Stage(objective.kind.replace("_", " "), total - begin, serves, build),)
    if warm is None:
        return stages

    def build_warm(student: nn.Module, previous: nn.Module | None) -> Objective:
        return objective_of(TrajectoryConfig(solver=warm.solver, nodes=warm.nodes), given(student))

    return (Stage("trajectory regression", begin, serves, build_warm), *stages)


def _progressive(config: RunConfig, teacher: Teacher | None, data: Dataset) -> tuple[Stage, ...]:
    objective = config.objective
    assert isinstance(objective, ProgressiveConfig)
    assert teacher is not None
    field, noise = teacher.field, teachers_noise(teacher)
    try:
        counts = stage_steps(objective.start_steps, objective.end_steps)
    except ValueError as error:
        raise UsageError(f"objective.start_steps: {error}") from error

    def stage(steps: int) -> Stage:
        def build(student: nn.Module, previous: nn.Module | None) -> Objective:
            if previous is None:
                return ProgressiveStage(student, teacher=SolverMap(field, objective.solver), steps=steps, noise=noise)
            served = AverageVelocityMap(previous, stage_domain(2 * steps))
            return ProgressiveStage(student, teacher=served, steps=steps, noise=noise)

        factor = objective.last_stages_factor if steps <= 2 else 1.0
        return Stage(f"{2 * steps} -> {steps} steps", round(config.train.steps * factor), steps, build)

    return tuple(stage(steps) for steps in counts)


def _consistency(config: RunConfig, teacher: Teacher | None, data: Dataset) -> tuple[Stage, ...]:
    objective = config.objective
    assert isinstance(objective, ConsistencyConfig)
    assert teacher is not None
    field, noise = teacher.field, teachers_noise(teacher)

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
            noise=noise,
        )

    return (Stage("consistency distillation", config.train.steps, 0, build),)


PLANS = {
    "flow_matching": _flow_matching,
    "progressive": _progressive,
    "consistency": _consistency,
    "meanflow": _flow_map,
    "improved_meanflow": _flow_map,
    "modular_meanflow": _flow_map,
    "alpha_flow": _flow_map,
    "soflow": _flow_map,
    "split_meanflow": _flow_map,
    "shortcut": _flow_map,
    "terminal_velocity": _flow_map,
    "align_your_flow": _flow_map,
    "free_flow": _flow_map,
    "trajectory": _flow_map,
}
