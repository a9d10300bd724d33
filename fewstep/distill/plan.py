"""From a config to the stages of training: which objective, for how long, and which step counts its student serves.

Most methods are one stage. Progressive distillation is one stage per halving, each with the previous stage's student as
its teacher and with a fresh optimiser.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from fewstep.config import RunConfig
from fewstep.data.dataset import Dataset
from fewstep.data.paths import expanded
from fewstep.distill.config import CurvatureConfig, FlowMatchingConfig, ProgressiveConfig
from fewstep.distill.consistency.config import (
    ConsistencyFamilyConfig,
    ConsistencyFlowMatchingConfig,
    PhasedConsistencyConfig,
    TruncatedConsistencyConfig,
)
from fewstep.distill.consistency.methods import Given as ConsistencyGiven
from fewstep.distill.consistency.methods import consistency_objective, straight_stage, truncated_stage
from fewstep.distill.curvature import CurvatureWeighting
from fewstep.distill.flow_maps.config import FlowMapConfig, GuidanceConfig, TrajectoryConfig
from fewstep.distill.flow_maps.guidance import GuidanceRange
from fewstep.distill.flow_maps.methods import Given, contrasted_velocity, objective_of
from fewstep.distill.flow_maps.objective import FlowMapMatching
from fewstep.distill.flow_maps.rows import Guided
from fewstep.distill.flow_maps.rules import Split
from fewstep.distill.flow_maps.velocity import ContrastedField
from fewstep.distill.flow_matching import FlowMatching
from fewstep.distill.ingredients import (
    contrast_of,
    derivative_of,
    grid_of,
    noise_of,
    range_of,
    teachers_noise,
    time_weight_of,
    times_of,
)
from fewstep.distill.objective import Objective, mean_square
from fewstep.distill.optimised_grid import optimised_nodes, step_costs
from fewstep.distill.progressive import ProgressiveStage, SolverMap, Told, stage_steps
from fewstep.distill.progressive_config import OptimisedGrid
from fewstep.distill.reflow.config import PiecewiseReflowConfig, PseudoHuberLoss, ReflowConfig
from fewstep.distill.reflow.objective import PseudoHuber, Reflow, nodes
from fewstep.distill.reflow.pairs import StagePairs, load_pairs, request_of
from fewstep.distill.reflow.windows import PiecewiseReflow
from fewstep.errors import UsageError
from fewstep.flow import PATHS, FlowMap, TimeDomain, VelocityField
from fewstep.grids import Grid, thinned, uniform_nodes
from fewstep.keys import Key
from fewstep.sources import SOURCES
from fewstep.students.maps import AverageVelocityMap
from fewstep.teachers.guided import GuidedField
from fewstep.teachers.load import Teacher
from fewstep.teachers.network import NetworkField
from fewstep.times import sorted_pairs, uniform


@dataclass(frozen=True)
class Stage:
    """``build(student, previous)`` makes the objective; ``previous`` is the frozen student of the stage before.

    ``serves`` is the number of sampling steps the stage's student is for, 0 for any; of stages with the same number the
    last one's student is kept. ``also`` are further numbers it is for. ``grid`` has the nodes it is sampled on,
    ``serves + 1`` of them (none: any). A stage may train on ``pairs`` instead of the data. What the next stage goes on
    from, and is given as ``previous``, are the weights as they were trained last, or their average with
    ``hands_on_average``.
    """

    name: str
    steps: int
    serves: int
    build: Callable[[nn.Module, nn.Module | None], Objective]
    grid: Grid = ()
    also: tuple[int, ...] = ()
    pairs: StagePairs | None = None
    hands_on_average: bool = False


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
    grid = uniform_nodes(serves) if serves else ()
    stages = (Stage(objective.kind.replace("_", " "), total - begin, serves, build, grid),)
    if warm is None:
        return stages

    def build_warm(student: nn.Module, previous: nn.Module | None) -> Objective:
        return objective_of(TrajectoryConfig(solver=warm.solver, nodes=warm.nodes), given(student))

    return (Stage("trajectory regression", begin, serves, build_warm, grid), *stages)


def _progressive(config: RunConfig, teacher: Teacher | None, data: Dataset) -> tuple[Stage, ...]:
    objective = config.objective
    assert isinstance(objective, ProgressiveConfig)
    assert teacher is not None
    try:
        counts = stage_steps(objective.start_steps, objective.end_steps)
    except ValueError as error:
        raise UsageError(f"objective.start_steps: {error}") from error
    noise, weight = teachers_noise(teacher), time_weight_of(objective.weight)
    draws = range_of(objective.guidance) if objective.guidance and config.student.guidance_input else None
    field = partial(_guided_field, teacher, objective.guidance)
    field(None)  # a teacher that cannot be guided is told now, before anything is written
    finest = grid_of(
        objective.grid,
        objective.start_steps,
        lambda grid: _optimised_grid(grid, objective.start_steps, teacher, field, draws, data, config.seed),
    )
    two_stages = objective.guidance_stages == "two"

    def stage(steps: int) -> Stage:
        teacher_grid = thinned(finest, 2 * steps)

        def build(student: nn.Module, previous: nn.Module | None) -> Objective:
            def jumps(guidance_B3: Tensor | None) -> FlowMap:
                if previous is None:
                    return SolverMap(field(guidance_B3), objective.solver, objective.substeps)
                net = previous if guidance_B3 is None else Guided(previous, guidance_B3)
                if two_stages and steps == counts[0]:
                    return SolverMap(NetworkField(net), objective.solver, objective.substeps)
                return AverageVelocityMap(net, TimeDomain("grid", teacher_grid))

            return ProgressiveStage(
                student,
                teacher=jumps(None),
                teacher_grid=teacher_grid,
                weight=weight,
                told=None if draws is None else Told(draws, jumps),
                noise=noise,
            )

        factor = objective.last_stages_factor if steps <= 2 else 1.0
        length = round(config.train.steps * factor)
        return Stage(f"{2 * steps} -> {steps} steps", length, steps, build, thinned(finest, steps))

    halvings = tuple(stage(steps) for steps in counts)
    if not two_stages:
        return halvings

    def build_guided(student: nn.Module, previous: nn.Module | None) -> Objective:
        assert objective.guidance is not None
        return FlowMapMatching(
            student,
            rule=Split("half"),
            pairs=sorted_pairs(uniform),
            jump_fraction=0.0,
            velocity=contrasted_velocity(teacher, objective.guidance),
            weight=lambda delta, t_B, r_B: weight(t_B) * mean_square(delta),
            guidance=draws,
            null_label=data.num_classes,
            noise=noise,
        )

    # It carries the number of the stage it prepares, whose student replaces its own.
    return (Stage("guided velocity", config.train.steps, counts[0], build_guided), *halvings)


def _guided_field(teacher: Teacher, guidance: GuidanceConfig | None, guidance_B3: Tensor | None) -> VelocityField:
    """The teacher's velocity: as it is, under the guidance of each row, or under a fixed one."""
    if guidance is None:
        return teacher.field
    if guidance_B3 is not None:
        return ContrastedField(contrast_of(teacher), guidance_B3)
    return GuidedField(contrast_of(teacher), guidance.scale, guidance.low, guidance.high)


def _optimised_grid(
    config: OptimisedGrid,
    steps: int,
    teacher: Teacher,
    field: Callable[[Tensor | None], VelocityField],
    draws: GuidanceRange | None,
    data: Dataset,
    seed: int,
) -> Grid:
    """The cheapest nodes over trajectories of the teacher from keyed noise, a few of them at a time."""
    costs = torch.zeros(())
    for index in torch.arange(config.samples, device=teacher.device).split(16):
        key = Key(seed)
        noise = SOURCES[teacher.noise.source](key, "grid", index, data.shape)
        label = index % data.num_classes if data.num_classes else None
        guidance_B3 = None if draws is None else draws.draw(key, index)
        costs = costs + len(index) * step_costs(field(guidance_B3), noise, label, config.fine)
    return optimised_nodes(costs, steps)


def _consistency(config: RunConfig, teacher: Teacher | None, data: Dataset) -> tuple[Stage, ...]:
    objective, total = config.objective, config.train.steps
    assert isinstance(objective, ConsistencyFamilyConfig)

    def build(student: nn.Module, previous: nn.Module | None) -> Objective:
        return consistency_objective(objective, ConsistencyGiven(student, teacher, teachers_noise(teacher), total))

    name = objective.kind.replace("_", " ")
    if objective.kind == "consistency":
        name = "consistency distillation" if objective.velocity == "teacher" else "consistency training"
    return (Stage(name, total, 0, build),)


def _phased_consistency(config: RunConfig, teacher: Teacher | None, data: Dataset) -> tuple[Stage, ...]:
    assert isinstance(config.objective, PhasedConsistencyConfig)
    first, *others = config.objective.segments
    (stage,) = _consistency(config, teacher, data)
    return (replace(stage, serves=first, also=tuple(others)),)


def _consistency_flow_matching(config: RunConfig, teacher: Teacher | None, data: Dataset) -> tuple[Stage, ...]:
    objective, total = config.objective, config.train.steps
    assert isinstance(objective, ConsistencyFlowMatchingConfig)
    straight = objective.straight_steps
    if straight >= total:
        raise UsageError(f"objective.straight_steps {straight} leaves none of train.steps {total} to consistency")

    def build(student: nn.Module, previous: nn.Module | None) -> Objective:
        return straight_stage(objective, ConsistencyGiven(student, teacher, teachers_noise(teacher), straight))

    (last,) = _consistency(config, teacher, data)
    last = replace(last, steps=total - straight, serves=objective.segments)
    return (Stage("flow matching on segments", straight, objective.segments, build), last) if straight else (last,)


def _truncated_consistency(config: RunConfig, teacher: Teacher | None, data: Dataset) -> tuple[Stage, ...]:
    objective, total = config.objective, config.train.steps
    assert isinstance(objective, TruncatedConsistencyConfig)

    def build(student: nn.Module, previous: nn.Module | None) -> Objective:
        assert previous is not None
        return truncated_stage(objective, ConsistencyGiven(student, teacher, teachers_noise(teacher), total), previous)

    (first,) = _consistency(config, teacher, data)
    # The uniform grid of two steps has its second node at the boundary, those of more steps have one below it.
    return (
        replace(first, name="easy consistency", serves=1),
        Stage("truncated consistency", round(total * objective.second_stage_factor), 1, build, also=(2,)),
    )


def _reflow(config: RunConfig, teacher: Teacher | None, data: Dataset) -> tuple[Stage, ...]:
    objective = config.objective
    assert isinstance(objective, ReflowConfig)
    assert teacher is not None
    settings = objective.pairs
    folder = None if settings.path is None else expanded(settings.path)
    given = None if folder is None else load_pairs(folder, teacher, data)

    def pairs(number: int) -> StagePairs:
        """Those of a stage: the teacher's in the first, those of the student before in the others."""
        first = number == 0
        request = request_of(
            settings,
            data,
            teacher=teacher.name if first else f"{config.name}, round {number}",
            teacher_digest=teacher.digest if first else "",
            source=teacher.noise.source,
            seed=config.seed,
            round=number,
            guidance=teacher.guidance if first else 1.0,
        )
        made = given if first else None
        return StagePairs(f"round-{number + 1}", made, request, settings.batch_size, teacher.field if first else None)

    def straighten(student: nn.Module, previous: nn.Module | None) -> Objective:
        return Reflow(
            student,
            times=times_of(objective.times),
            path=PATHS[objective.path],
            prediction=objective.prediction,
            loss=PseudoHuber(objective.loss.scale) if isinstance(objective.loss, PseudoHuberLoss) else mean_square,
            falling=objective.time_weight == "falling",
        )

    steps, rounds, last = config.train.steps, objective.rounds, objective.distil_steps
    stages = [
        Stage(f"reflow {k + 1} of {rounds}", steps, 0, straighten, pairs=pairs(k), hands_on_average=True)
        for k in range(rounds)
    ]
    if last is not None:

        def distil(student: nn.Module, previous: nn.Module | None) -> Objective:
            return Reflow(student, times=nodes(last))

        name = f"distillation to {last} step{'s' if last > 1 else ''}"
        stages.append(Stage(name, steps, last, distil, pairs=pairs(rounds)))
    return tuple(stages)


def _piecewise_reflow(config: RunConfig, teacher: Teacher | None, data: Dataset) -> tuple[Stage, ...]:
    objective = config.objective
    assert isinstance(objective, PiecewiseReflowConfig)
    assert teacher is not None
    field, noise = teacher.field, teachers_noise(teacher)

    def stage(windows: int) -> Stage:
        def build(student: nn.Module, previous: nn.Module | None) -> Objective:
            return PiecewiseReflow(
                student,
                teacher=field,
                windows=windows,
                solver=objective.solver,
                substeps=objective.solver_steps // windows,
                direction=objective.direction,
                start_share=objective.start_share,
                noise=noise,
            )

        return Stage(f"{windows} window{'s' if windows > 1 else ''}", config.train.steps, windows, build)

    return tuple(stage(windows) for windows in objective.windows)


PLANS = {
    "flow_matching": _flow_matching,
    "progressive": _progressive,
    "consistency": _consistency,
    "improved_consistency": _consistency,
    "easy_consistency": _consistency,
    "continuous_consistency": _consistency,
    "truncated_consistency": _truncated_consistency,
    "phased_consistency": _phased_consistency,
    "consistency_flow_matching": _consistency_flow_matching,
    "self_corrected": _consistency,
    "reflow": _reflow,
    "piecewise_reflow": _piecewise_reflow,
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
