"""Config of progressive distillation. Imports no torch."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from fewstep.block import Block, SolverName
from fewstep.distill.flow_maps.config import GuidanceConfig


class UniformGrid(Block):
    """Equal steps in time."""

    kind: Literal["uniform"] = "uniform"


class ShiftedGrid(Block):
    """``t -> a t / (1 + (a - 1) t)`` of the uniform grid, ``a = shift``: above 1 most nodes near noise."""

    kind: Literal["shifted"] = "shifted"
    shift: float = Field(3.0, gt=0)


class CosineGrid(Block):
    """Equal steps in the angle of the cosine schedule: most nodes near both ends."""

    kind: Literal["cosine"] = "cosine"


class OptimisedGrid(Block):
    """The nodes, out of those of ``fine`` uniform steps, between which the teacher's Euler steps err least on
    ``samples`` of its trajectories (BOSS, 2312.16414)."""

    kind: Literal["optimised"] = "optimised"
    fine: int = Field(128, ge=2, le=4096)
    samples: int = Field(128, ge=1)


GridConfig = Annotated[UniformGrid | ShiftedGrid | CosineGrid | OptimisedGrid, Field(discriminator="kind")]


class TimeWeightConfig(Block):
    """Whose error counts: of the ``velocity`` (weight 1), the ``data`` prediction (``t^2``), the ``noise`` prediction
    (``(1 - t)^2``), the sum of both (``snr_plus_one``) or the larger of them (``truncated_snr``)."""

    kind: Literal["velocity", "data", "noise", "snr_plus_one", "truncated_snr"] = "velocity"


class EdmWeightConfig(Block):
    """``(t^2 + s^2 (1 - t)^2) / s^2`` with ``s = sigma_data``, the standard deviation of the data."""

    kind: Literal["edm"] = "edm"
    sigma_data: float = Field(0.5, gt=0)


class ProgressiveConfig(Block):
    """Progressive distillation ``start_steps -> start_steps / 2 -> ... -> end_steps``.

    ``train.steps`` is the length of a stage; the stages of 2 and 1 steps are ``last_stages_factor`` times as long.
    In the first stage the teacher takes ``substeps`` steps of ``solver`` from each node of ``grid`` to the next; every
    student's grid is each second node of its teacher's. ``weight`` may be given by its name alone.

    ``guidance`` is folded into the first halving. Where the student has guidance as an input, scales are drawn, and a
    student and its teacher hear of the same ones; ``guidance_stages: two`` has the guided velocity learned in a stage
    of its own before anything is halved (2210.03142).
    """

    kind: Literal["progressive"] = "progressive"
    start_steps: int = Field(32, ge=2)
    end_steps: int = Field(1, ge=1)
    solver: SolverName = "euler"
    substeps: int = Field(1, ge=1)
    grid: GridConfig = UniformGrid()
    weight: Annotated[TimeWeightConfig | EdmWeightConfig, Field(discriminator="kind")] = TimeWeightConfig()
    guidance: GuidanceConfig | None = None
    guidance_stages: Literal["one", "two"] = "one"
    last_stages_factor: float = Field(2.0, gt=0)

    @field_validator("weight", mode="before")
    @classmethod
    def _bare_name(cls, weight: Any) -> Any:
        """``data`` is ``{kind: data}``."""
        return {"kind": weight} if isinstance(weight, str) else weight

    @model_validator(mode="after")
    def _parts_fit(self) -> "ProgressiveConfig":
        if self.grid.kind == "optimised" and self.grid.fine < self.start_steps:
            raise ValueError(f"grid.fine {self.grid.fine} has fewer nodes than start_steps {self.start_steps} needs")
        if self.guidance is not None and self.guidance.mix is not None:
            raise ValueError("guidance.mix is for students that guide themselves (objective.velocity data)")
        if self.guidance_stages == "two" and self.guidance is None:
            raise ValueError("guidance_stages two needs guidance")
        return self
