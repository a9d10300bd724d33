"""Config of teachers. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field

from fewstep.block import Block


class RunTeacher(Block):
    """A velocity network trained by ``fewstep teach``: the path of its run. ``guidance = 1`` is off.

    ``precision: bf16`` evaluates it in bfloat16, time embeddings apart, in half the memory.
    """

    kind: Literal["run"] = "run"
    path: str
    guidance: float = Field(1.0, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"


class AnalyticTeacher(Block):
    """The exact velocity of a Gaussian mixture toy (``data: {kind: toy, name: eight_gaussians | mixture}``)."""

    kind: Literal["analytic"] = "analytic"
    guidance: float = Field(1.0, ge=0)


TeacherConfig = Annotated[RunTeacher | AnalyticTeacher, Field(discriminator="kind")]
