"""Config of an evaluation. Imports no torch."""

from typing import Annotated, Any

from pydantic import Field, field_validator

from fewstep.block import Block, PrecisionName, SolverName
from fewstep.data.config import DataConfig

StepCount = Annotated[int, Field(ge=1)]


class EvaluateConfig(Block):
    """Step counts of the model and of its teacher, sample count, feature extractors (the first leads the report).

    ``solver`` takes the steps of teachers; students have their own rule. ``reference`` names files of statistics that
    take the place of the data: ours (``*.refstats.safetensors``), or ``.npz`` and ``.pkl`` of other projects.
    ``precision`` is what networks are evaluated in to draw samples, teachers' and students' alike, for distances and
    times alike: true float32, float32 whose products may run in TF32, or bfloat16 as in training (``PrecisionName``).
    ``held_out`` are data of the same kind that no model has seen: beside them memorised samples show.
    """

    steps: tuple[StepCount, ...] = Field((1, 2, 4, 8), min_length=1)
    teacher_steps: tuple[StepCount, ...] = (64,)
    solver: SolverName = "euler"
    n: int = Field(10_000, ge=2)
    features: tuple[str, ...] = Field(("pixels",), min_length=1)
    batch_size: int = Field(1000, ge=1)
    reference: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    held_out: DataConfig | None = None
    precision: PrecisionName = "fp32"

    @field_validator("reference", mode="before")
    @classmethod
    def _one_path(cls, reference: Any) -> Any:
        return (reference,) if isinstance(reference, str) else reference
