"""Config of teachers. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field

from fewstep.block import Block
from fewstep.conventions import ConventionConfig


class IndependentCoupling(Block):
    """Noise and data independent of each other."""

    kind: Literal["independent"] = "independent"


class AssignmentCoupling(Block):
    """The pairing of least squared distance within each group of a batch (and within classes), exactly."""

    kind: Literal["assignment"] = "assignment"


class SinkhornCoupling(Block):
    """Pairs drawn from the entropic transport plan of each group; ``epsilon`` is relative to the mean cost."""

    kind: Literal["sinkhorn"] = "sinkhorn"
    epsilon: float = Field(0.05, gt=0)


CouplingConfig = Annotated[IndependentCoupling | AssignmentCoupling | SinkhornCoupling, Field(discriminator="kind")]


SourceName = Literal["gaussian", "uniform", "laplace", "sphere"]
"""Distributions at ``t = 1``."""


class NoiseConfig(Block):
    """The noise a teacher is trained on, and its students after it: drawn from ``source``, and paired with the data by
    ``coupling`` within groups of ``group_size`` consecutive samples of a batch."""

    source: SourceName = "gaussian"
    coupling: CouplingConfig = IndependentCoupling()
    group_size: int = Field(64, ge=2)


class RunTeacher(Block):
    """A velocity network trained by ``fewstep teach``: the path of its run. ``guidance = 1`` is off.

    ``precision: bf16`` evaluates it in bfloat16, time embeddings apart, in half the memory. One trained by contrastive
    flow matching is corrected for the bias of that, unless ``correct_contrast`` is false. With ``weak``, the run of a
    worse teacher of the same kind, guidance goes away from that one instead of from the model without a class
    (autoguidance).
    """

    kind: Literal["run"] = "run"
    path: str
    guidance: float = Field(1.0, ge=0)
    weak: str | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    correct_contrast: bool = True


class AnalyticTeacher(Block):
    """The exact velocity of a Gaussian mixture toy (``data: {kind: toy, name: eight_gaussians | mixture}``)."""

    kind: Literal["analytic"] = "analytic"
    guidance: float = Field(1.0, ge=0)


class PythonTeacher(Block):
    """Any function ``(x, t, label) -> prediction``, or a module or a class without arguments that is one: ``target``
    is its place, ``package.module:name``. ``convention`` says how to read it; `fewstep teacher check` finds out whether
    that is right. With classes, ``label`` is the number of classes where there is none."""

    kind: Literal["python"] = "python"
    target: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")
    convention: ConventionConfig = ConventionConfig()
    guidance: float = Field(1.0, ge=0)


TeacherConfig = Annotated[RunTeacher | AnalyticTeacher | PythonTeacher, Field(discriminator="kind")]
