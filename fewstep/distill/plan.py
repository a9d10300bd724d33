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
    JvpMode,
    LogitNormalTimes,
    MeanFlowConfig,
    ProgressiveConfig,
    TimesConfig,
    TruncatedLogNormalTimes,
    UShapedTimes,
)
from fewstep.distill.consistency import ConsistencyDistillation
from fewstep.distill.couplings import Noise, assignment, gaussian_noise, independent, paired_noise, sinkhorn
from fewstep.distill.curvature import CurvatureWeighting
from fewstep.distill.flow_matching import FlowMatching
from fewstep.distill.meanflow import MeanFlow
from fewstep.distill.objective import Objective
from fewstep.distill.progressive import ProgressiveStage, SolverMap, stage_domain, stage_steps
from fewstep.distill.tangent import Derivative, central_difference, forward_derivative
from fewstep.errors import UsageError
from fewstep.flow import PATHS
from fewstep.sources import SOURCES
from fewstep.students.maps import AverageVelocityMap
from fewstep.teachers.config import AssignmentCoupling, NoiseConfig, SinkhornCoupling
from fewstep.teachers.load import Teacher
from fewstep.times import Times, logit_normal, shifted, truncated_log_normal, u_shaped, uniform


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
    if isinstance(config, LogitNormalTimes):
        times = logit_normal(config.mean, config.std)
    elif isinstance(config, TruncatedLogNormalTimes):
        times = truncated_log_normal(config.mean, config.std, config.sigma_min, config.sigma_max)
    elif isinstance(config, UShapedTimes):
        times = u_shaped(config.sharpness)
    else:
        times = uniform
    return times if config.shift == 1 else shifted(times, config.shift)


def noise_of(config: NoiseConfig) -> Noise:
    coupling = config.coupling
    if isinstance(coupling, AssignmentCoupling):
        pairs = assignment(config.group_size)
    elif isinstance(coupling, SinkhornCoupling):
        pairs = sinkhorn(config.group_size, coupling.epsilon)
    else:
        pairs = independent
    return paired_noise(SOURCES[config.source], pairs)


def teachers_noise(teacher: Teacher | None) -> Noise:
    """A student sees the noise, and the pairs, that its teacher was trained on."""
    return gaussian_noise if teacher is None else noise_of(teacher.noise)


def derivative_of(mode: JvpMode, step: float) -> Derivative:
    return forward_derivative if mode == "forward" else central_difference(step)


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
            derivative=derivative_of(objective.jvp, objective.jvp_step),
            noise=teachers_noise(teacher),
        )

    return (Stage("MeanFlow", config.train.steps, 0, build),)


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
    "meanflow": _meanflow,
    "progressive": _progressive,
    "consistency": _consistency,
}
