"""The stages of a flow map: one, or two with a warm start."""

from torch import nn

from fewstep.config import RunConfig
from fewstep.data.dataset import Dataset
from fewstep.distill.flow_maps.config import FlowMapConfig, TrajectoryConfig
from fewstep.distill.flow_maps.methods import Given, objective_of
from fewstep.distill.ingredients import teachers_noise
from fewstep.distill.objective import Objective
from fewstep.distill.stage import Stage
from fewstep.errors import UsageError
from fewstep.grids import uniform_nodes
from fewstep.teachers.load import Teacher


def flow_map_stages(config: RunConfig, teacher: Teacher | None, data: Dataset) -> tuple[Stage, ...]:
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
