"""The methods of the family: which ingredients each puts into its objective. One function per method."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fewstep.distill.consistency.config import (
    AbsoluteDistance,
    ConsistencyBlock,
    ConsistencyConfig,
    ConsistencyFamilyConfig,
    ConsistencyFlowMatchingConfig,
    ContinuousConsistencyConfig,
    CoordinateHuberConfig,
    DistanceConfig,
    EasyConsistencyConfig,
    GridBlock,
    ImprovedConsistencyConfig,
    LevelBlock,
    MatchingBlock,
    PhasedConsistencyConfig,
    SelfCorrectedConfig,
    TruncatedConsistencyConfig,
)
from fewstep.distill.consistency.continuous import ContinuousConsistency
from fewstep.distill.consistency.measures import (
    CoordinateHuber,
    OutputScale,
    Unit,
    absolute,
    noise_step,
    one,
    step_length,
)
from fewstep.distill.consistency.objective import AlongTeacher, ConsistencyMatching, Frozen, along_data
from fewstep.distill.consistency.schedules import (
    Constant,
    Doubling,
    FollowingDecay,
    Intervals,
    SquareRoot,
    Stages,
    WholeDoubling,
)
from fewstep.distill.consistency.self_corrected import SelfCorrected
from fewstep.distill.consistency.steps import (
    NODES,
    ConstantSteps,
    Draw,
    GridSteps,
    LevelSteps,
    SegmentSteps,
    StageShare,
    TruncatedSteps,
)
from fewstep.distill.couplings import Noise
from fewstep.distill.flow_maps.config import HuberConfig
from fewstep.distill.flow_maps.methods import weight_of
from fewstep.distill.flow_maps.weights import PseudoHuber, Weight, plain
from fewstep.distill.ingredients import derivative_of, times_of
from fewstep.distill.objective import Objective
from fewstep.errors import UsageError
from fewstep.flow import VelocityField
from fewstep.teachers.load import Teacher


@dataclass(frozen=True)
class Given:
    """What a method finds: the network to train, the teacher if there is one, the noise, the optimiser steps that its
    schedules extend over."""

    student: nn.Module
    teacher: Teacher | None
    noise: Noise
    total_steps: int


def consistency_objective(config: ConsistencyFamilyConfig, given: Given) -> Objective:
    """The objective that a config asks for; of a method with stages that need no other one, the first."""
    return METHODS[config.kind](config, given)


def _consistency(config: ConsistencyConfig, given: Given) -> Objective:
    intervals = _intervals(config, given.total_steps)
    follows = (
        FollowingDecay(config.target_decay, config.start_nodes, intervals) if config.target_follows_nodes else None
    )
    changes: dict[str, Any] = {"decay_at": follows}
    if config.huber:
        changes["distance"] = PseudoHuber(0.00054 * config.huber)
    return _matching(config, given, _grid_steps(config, intervals), **changes)


def _improved_consistency(config: ImprovedConsistencyConfig, given: Given) -> Objective:
    return _matching(config, given, _grid_steps(config, _intervals(config, given.total_steps)))


def _easy_consistency(config: EasyConsistencyConfig, given: Given) -> Objective:
    return _matching(config, given, _level_steps(config, given.total_steps))


def _truncated_consistency(config: TruncatedConsistencyConfig, given: Given) -> Objective:
    """The first stage."""
    return _matching(config, given, _level_steps(config, given.total_steps))


def truncated_stage(config: TruncatedConsistencyConfig, given: Given, previous: nn.Module) -> Objective:
    """The second stage: the first one's student ``previous``, frozen, answers below the boundary; its finest steps."""
    share = StageShare(Stages(config.stages, 1), config.base, config.largest)
    levels = LevelSteps(times_of(config.truncated_times), lambda step: share(1))
    steps = TruncatedSteps(levels, config.boundary, config.boundary_fraction, config.boundary_weight)
    return _matching(config, given, steps, frozen=Frozen(previous, config.boundary))


def _phased_consistency(config: PhasedConsistencyConfig, given: Given) -> Objective:
    return _matching(config, given, SegmentSteps(config.segments, config.nodes, config.shrink))


def _consistency_flow_matching(config: ConsistencyFlowMatchingConfig, given: Given) -> Objective:
    near = config.near_data
    if near is None:
        near = 0.1 if config.velocity == "data" else 0.0
    steps = ConstantSteps(config.segments, config.length, near)
    return _matching(config, given, steps, velocity_weight=config.velocity_weight)


def straight_stage(config: ConsistencyFlowMatchingConfig, given: Given) -> Objective:
    """Every target is the true end of its segment: flow matching on each segment, weighted by what is left of it."""
    return _matching(config, given, ConstantSteps(config.segments, config.length, near_data=1.0))


def _continuous_consistency(config: ContinuousConsistencyConfig, given: Given) -> Objective:
    return ContinuousConsistency(
        given.student,
        form=config.form,
        times=times_of(config.times),
        derivative=derivative_of(config.jvp, config.jvp_step),
        teacher=_field(config, given) if config.velocity == "teacher" else None,
        data_std=config.data_std,
        normalise=config.normalise,
        warmup_steps=config.warmup_steps,
        weight=weight_of(config.weight),
        noise=given.noise,
    )


def _self_corrected(config: SelfCorrectedConfig, given: Given) -> Objective:
    return SelfCorrected(
        given.student,
        teacher=_field(config, given),
        reach=config.reach,
        data_below=config.data_below,
        outward_weight=config.outward_weight,
        straight_weight=config.straight_weight,
        distance=distance_of(config.distance),
        target_decay=config.target_decay,
        noise=given.noise,
    )


METHODS: dict[str, Callable[[Any, Given], Objective]] = {
    "consistency": _consistency,
    "improved_consistency": _improved_consistency,
    "easy_consistency": _easy_consistency,
    "truncated_consistency": _truncated_consistency,
    "phased_consistency": _phased_consistency,
    "consistency_flow_matching": _consistency_flow_matching,
    "continuous_consistency": _continuous_consistency,
    "self_corrected": _self_corrected,
}


def _matching(config: MatchingBlock, given: Given, steps: Draw, **changes: Any) -> ConsistencyMatching:
    """The discrete form with what all its methods are given in the same way."""
    teacher = config.velocity == "teacher"
    shared: dict[str, Any] = {
        "nearer": AlongTeacher(_field(config, given), config.solver) if teacher else along_data,
        "distance": distance_of(config.distance),
        "unit": UNITS[config.divide_by],
        "target_decay": config.target_decay,
        "noise": given.noise,
    }
    return ConsistencyMatching(given.student, steps=steps, **{**shared, **changes})


def _intervals(config: GridBlock, total: int) -> Intervals:
    if config.schedule == "constant":
        return Constant(config.nodes)
    if config.schedule == "square_root":
        return SquareRoot(config.start_nodes, config.nodes, total)
    parts = WholeDoubling if isinstance(config, ImprovedConsistencyConfig) else Doubling
    return parts(config.start_nodes, config.nodes, total)


def _grid_steps(config: GridBlock, intervals: Intervals) -> GridSteps:
    log_normal = None if config.times is None else (config.times.mean, config.times.std)
    return GridSteps(NODES[config.grid], intervals, log_normal)


def _level_steps(config: LevelBlock, total: int) -> LevelSteps:
    return LevelSteps(times_of(config.times), StageShare(Stages(config.stages, total), config.base, config.largest))


UNITS: dict[str, Unit] = {
    "none": one,
    "step": step_length,
    "noise_step": noise_step,
    "output_scale": OutputScale(0.5),
}


def distance_of(config: DistanceConfig) -> Weight:
    if isinstance(config, HuberConfig):
        return PseudoHuber(config.scale)
    if isinstance(config, CoordinateHuberConfig):
        return CoordinateHuber(config.offset)
    return absolute if isinstance(config, AbsoluteDistance) else plain


def _field(config: ConsistencyBlock | ConsistencyFamilyConfig, given: Given) -> VelocityField:
    if given.teacher is None:
        raise UsageError("velocity teacher needs a teacher block")
    return given.teacher.field
