"""The stages of reflow: rounds of straightening and a distillation, each on pairs of its own; or windows, coarser and
coarser."""

from torch import nn

from fewstep.config import RunConfig
from fewstep.data.dataset import Dataset
from fewstep.data.paths import expanded
from fewstep.distill.ingredients import teachers_noise, times_of
from fewstep.distill.objective import Objective, mean_square
from fewstep.distill.reflow.config import PiecewiseReflowConfig, PseudoHuberLoss, ReflowConfig
from fewstep.distill.reflow.objective import PseudoHuber, Reflow, nodes
from fewstep.distill.reflow.pairs import StagePairs, load_pairs, request_of
from fewstep.distill.reflow.windows import PiecewiseReflow
from fewstep.distill.stage import Stage
from fewstep.flow import PATHS
from fewstep.teachers.load import Teacher


def reflow_stages(config: RunConfig, teacher: Teacher | None, data: Dataset) -> tuple[Stage, ...]:
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
        field = teacher.field if first else None
        return StagePairs(f"round-{number + 1}", made, request, settings.batch_size, field, data.embeddings)

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


def piecewise_reflow_stages(config: RunConfig, teacher: Teacher | None, data: Dataset) -> tuple[Stage, ...]:
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
