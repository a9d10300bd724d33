"""Config of an evaluation. Imports no torch."""

from typing import Annotated

from pydantic import Field

from fewstep.block import Block, SolverName

StepCount = Annotated[int, Field(ge=1)]


class EvaluateConfig(Block):
    """Step counts of the model and of its teacher, sample count, feature extractors (the first leads the report).

    ``solver`` takes the steps of teachers; students have their own rule.
    """

    steps: tuple[StepCount, ...] = Field((1, 2, 4, 8), min_length=1)
    teacher_steps: tuple[StepCount, ...] = (64,)
    solver: SolverName = "euler"
    n: int = Field(10_000, ge=2)
    features: tuple[str, ...] = Field(("pixels",), min_length=1)
    batch_size: int = Field(1000, ge=1)
