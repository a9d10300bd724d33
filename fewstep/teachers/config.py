"""Config of teachers. Imports no torch."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from fewstep.block import Block
from fewstep.conventions import ConventionConfig, GuidanceForm, canonical_guidance


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


class ForeignTeacher(Block):
    """What teachers from other projects have in common.

    ``path``: the checkpoint, or what ``fewstep teacher convert`` made of it. ``convention`` replaces that of its kind,
    for a checkpoint that was trained otherwise. ``guidance`` is the ``w`` of ``v_u + w (v_c - v_u)``, off at 1; beside
    ``guidance_form: excess`` it is read as the ``w`` of ``v_c + w (v_c - v_u)``, and becomes one more. ``noise`` is
    what the teacher was trained on, for students trained on data. ``precision`` is that of ``RunTeacher``.
    """

    path: str = Field(min_length=1)
    convention: ConventionConfig | None = None
    guidance: float = Field(1.0, ge=0)
    noise: NoiseConfig = NoiseConfig()
    precision: Literal["fp32", "bf16"] = "fp32"

    @model_validator(mode="before")
    @classmethod
    def _one_guidance(cls, given: Any) -> Any:
        """The one scale, whatever it is counted from."""
        if not isinstance(given, Mapping) or "guidance_form" not in given:
            return given
        rest = {name: value for name, value in given.items() if name != "guidance_form"}
        form = given["guidance_form"]
        if form not in get_args(GuidanceForm):
            raise ValueError(f"guidance_form is scale (off at 1) or excess (off at 0), not {form}")
        if "guidance" not in rest:
            raise ValueError("guidance_form says how guidance is counted: give guidance too")
        return {**rest, "guidance": canonical_guidance(float(rest["guidance"]), form)}


class CheckpointTeacher(ForeignTeacher):
    """A checkpoint of the project that ``kind`` names.

    ``architecture`` has those fields of its network that weights do not tell, such as ``heads``. ``weights`` takes the
    average if there is one (``auto``), insists on it, or takes the ``raw`` ones. ``guided_channels`` is how many
    leading channels guidance moves; by default as many as the project's own sampler, 3 of 4 for SiT and DiT. A pickle
    that names more than tensors is not opened unless ``trust_pickle`` says that its code may run. With ``weak``, a
    checkpoint of the same kind, guidance goes away from that one: EDM2's ``gnet``.
    """

    kind: Literal["sit", "dit", "repa", "minrf", "torchcfm", "flow_matching", "rectified_flow", "edm", "edm2"]
    architecture: dict[str, Any] = Field(default_factory=dict)
    weights: Literal["auto", "ema", "raw"] = "auto"
    guided_channels: Annotated[int, Field(ge=1)] | Literal["project", "all"] = "project"
    trust_pickle: bool = False
    weak: str | None = Field(None, min_length=1)


class DiffusersTeacher(ForeignTeacher):
    """A folder that diffusers saved: a pipeline, or its transformer or U-Net alone. How it counts time is read from its
    scheduler's config. ``embedded_guidance`` is what a network that was distilled with guidance as an input is told.
    ``null_class``: the last class of a ``UNet2DModel`` stands for none."""

    kind: Literal["diffusers"] = "diffusers"
    embedded_guidance: float | None = Field(None, ge=0)
    null_class: bool = False


TeacherConfig = Annotated[
    RunTeacher | AnalyticTeacher | PythonTeacher | CheckpointTeacher | DiffusersTeacher, Field(discriminator="kind")
]
