"""The stages of progressive distillation: one per halving, each with the previous stage's student as its teacher; and
before them, where guidance is learned in a stage of its own, that one."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fewstep.config import RunConfig
from fewstep.data.dataset import Dataset
from fewstep.distill.flow_maps.config import GuidanceConfig
from fewstep.distill.flow_maps.guidance import GuidanceRange
from fewstep.distill.flow_maps.methods import contrasted_velocity
from fewstep.distill.flow_maps.objective import FlowMapMatching
from fewstep.distill.flow_maps.rows import Guided
from fewstep.distill.flow_maps.rules import Split
from fewstep.distill.flow_maps.velocity import ContrastedField
from fewstep.distill.ingredients import contrast_of, grid_of, range_of, teachers_noise, time_weight_of
from fewstep.distill.objective import Objective, mean_square
from fewstep.distill.progressive.config import OptimisedGrid, ProgressiveConfig
from fewstep.distill.progressive.objective import ProgressiveStage, SolverMap, Told, stage_steps
from fewstep.distill.progressive.optimised_grid import optimised_nodes, step_costs
from fewstep.distill.stage import Stage
from fewstep.errors import UsageError
from fewstep.flow import FlowMap, TimeDomain, VelocityField
from fewstep.grids import Grid, thinned
from fewstep.keys import Key
from fewstep.sources import SOURCES
from fewstep.students.maps import AverageVelocityMap
from fewstep.teachers.guided import GuidedField
from fewstep.teachers.load import Teacher
from fewstep.teachers.network import NetworkField
from fewstep.times import sorted_pairs, uniform


def progressive_stages(config: RunConfig, teacher: Teacher | None, data: Dataset) -> tuple[Stage, ...]:
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
        label = data.drawn_condition(index)
        guidance_B3 = None if draws is None else draws.draw(key, index)
        costs = costs + len(index) * step_costs(field(guidance_B3), noise, label, config.fine)
    return optimised_nodes(costs, steps)
