"""Config of objectives and of training. Imports no torch."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from fewstep.block import Block, PathName, PrecisionName
from fewstep.distill.consistency.config import (
    ConsistencyConfig,
    ConsistencyFlowMatchingConfig,
    ContinuousConsistencyConfig,
    EasyConsistencyConfig,
    ImprovedConsistencyConfig,
    PhasedConsistencyConfig,
    SelfCorrectedConfig,
    TruncatedConsistencyConfig,
)
from fewstep.distill.flow_maps.config import (
    AlignYourFlowConfig,
    AlphaFlowConfig,
    FreeFlowConfig,
    ImprovedMeanFlowConfig,
    JvpMode,
    MeanFlowConfig,
    ModularMeanFlowConfig,
    ShortcutConfig,
    SoFlowConfig,
    SplitMeanFlowConfig,
    TerminalVelocityConfig,
    TrajectoryConfig,
)
from fewstep.distill.progressive.config import ProgressiveConfig
from fewstep.distill.reflow.config import PiecewiseReflowConfig, ReflowConfig
from fewstep.distill.times_config import TimesConfig, UniformTimes
from fewstep.teachers.config import NoiseConfig


class NoWeighting(Block):
    """Every time counts the same."""

    kind: Literal["none"] = "none"


class CurvatureConfig(Block):
    """Weights that follow the curvature of the flow to the given ``power``, from ``warmup_steps`` on; it is estimated
    on the share ``probed`` of each batch, three evaluations each (``jvp: forward`` costs about as much)."""

    kind: Literal["curvature"] = "curvature"
    power: float = Field(0.5, ge=0, le=2)
    warmup_steps: int = Field(500, ge=0)
    probed: float = Field(0.25, gt=0, le=1)
    jvp: JvpMode = "finite_difference"
    jvp_step: float = Field(5e-3, gt=0, le=0.1)


WeightingConfig = Annotated[NoWeighting | CurvatureConfig, Field(discriminator="kind")]


class FlowMatchingConfig(Block):
    """Flow matching: trains a teacher. ``label_dropout`` prepares it for guidance.

    ``path`` is the one whose velocity is regressed and which ``times`` belong to; the teacher works on the linear path
    whatever it is. ``contrast`` is the weight of contrastive flow matching (0: off; the paper's is 0.05), between
    samples of one group of ``noise.group_size``.
    """

    kind: Literal["flow_matching"] = "flow_matching"
    path: PathName = "linear"
    times: TimesConfig = UniformTimes()
    noise: NoiseConfig = NoiseConfig()
    contrast: float = Field(0.0, ge=0, lt=1)
    weighting: WeightingConfig = NoWeighting()
    label_dropout: float = Field(0.1, ge=0, lt=1)


ObjectiveConfig = Annotated[
    FlowMatchingConfig
    | ProgressiveConfig
    | ConsistencyConfig
    | ImprovedConsistencyConfig
    | EasyConsistencyConfig
    | ContinuousConsistencyConfig
    | TruncatedConsistencyConfig
    | PhasedConsistencyConfig
    | ConsistencyFlowMatchingConfig
    | SelfCorrectedConfig
    | ReflowConfig
    | PiecewiseReflowConfig
    | MeanFlowConfig
    | ImprovedMeanFlowConfig
    | ModularMeanFlowConfig
    | AlphaFlowConfig
    | SoFlowConfig
    | SplitMeanFlowConfig
    | ShortcutConfig
    | TerminalVelocityConfig
    | AlignYourFlowConfig
    | FreeFlowConfig
    | TrajectoryConfig,
    Field(discriminator="kind"),
]


class ConstantEMA(Block):
    """A constant ``decay`` per step, approached by ``(1 + k) / (10 + k)`` in the first steps ``k``."""

    kind: Literal["constant"] = "constant"
    decay: float = Field(ge=0, lt=1)

    @property
    def name(self) -> str:
        return f"{self.decay:g}"


class PowerEMA(Block):
    """Weights of every step ``tau`` up to ``k`` in proportion to ``tau^gamma`` (Karras et al. 2312.02696, section 3).

    ``relative_std`` is the width of that profile relative to the steps so far: a twentieth to a fifth is usual. It
    stays the same share of a long training and of a short one, and other widths can be rebuilt after training.
    """

    kind: Literal["power"] = "power"
    relative_std: float = Field(0.1, gt=0, lt=0.28)

    @property
    def name(self) -> str:
        return f"power-{self.relative_std:g}"


class HalfLifeEMA(Block):
    """The weight of a step halves every ``half_life_steps``, and at first every ``ramp`` of the steps so far
    (Karras et al. 2206.00364, appendix F.1); ``ramp = 0`` switches that off."""

    kind: Literal["half_life"] = "half_life"
    half_life_steps: float = Field(gt=0)
    ramp: float = Field(0.05, ge=0)

    @property
    def name(self) -> str:
        return f"half-life-{self.half_life_steps:g}"


EMAConfig = Annotated[ConstantEMA | PowerEMA | HalfLifeEMA, Field(discriminator="kind")]


class TrainConfig(Block):
    """The trainer. Durations are in optimiser steps; ``batch_size`` counts everything one step sees: all processes,
    all ``gradient_accumulation_steps`` (which change the memory a step takes and nothing else).

    ``lr_schedule`` runs after the warm-up: ``constant``, ``linear`` to zero, ``cosine`` to zero, or ``inverse_sqrt``,
    ``lr sqrt(w / step)`` from step ``w = lr_reference_steps`` (0: the warm-up) on. ``weight_decay`` is decoupled for
    ``adamw`` and added to the gradient for ``adam`` and ``radam``. ``grad_clip`` bounds the gradient norm (0: off).

    ``ema`` lists the averages to keep, a bare number being a constant decay; the first is the one exported. Every
    ``ema_snapshot_every`` steps (0: never) the power-function averages are kept for ``fewstep average``.

    ``precision`` is what products and convolutions are computed in: ``fp32`` true float32, on a GPU too; ``tf32``
    float32 tensors whose factors a GPU may round to 10 bits; ``bf16`` bfloat16 where that is safe, while weights, time
    embeddings, Jacobian-vector products and losses stay in float32, with products as under ``tf32``. ``parallel`` says
    how several processes share the student: a copy each (ddp) or a shard each (fsdp2). ``compile`` runs student and
    tangents through torch.compile, after checking them against eager mode. ``threads`` is torch's thread count while
    training on a CPU (0: its own choice): matrices as small as the recipes' are multiplied faster by one thread than
    by two that have to wait for each other.
    """

    steps: int = Field(4000, ge=1)
    batch_size: int = Field(128, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    optimizer: Literal["adamw", "adam", "radam"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    lr_schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "cosine"
    lr_reference_steps: int = Field(0, ge=0)
    warmup_steps: int = Field(100, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    grad_clip: float = Field(1.0, ge=0)
    ema: tuple[EMAConfig, ...] = Field((ConstantEMA(decay=0.999),), min_length=1)
    ema_snapshot_every: int = Field(0, ge=0)
    precision: PrecisionName = "fp32"
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    compile: bool = False
    threads: int = Field(0, ge=0)
    checkpoint_every: int = Field(1000, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    log_every: int = Field(50, ge=1)
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()

    @field_validator("betas")
    @classmethod
    def _decay_rates(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"both lie in [0, 1), got {betas}")
        return betas

    @field_validator("ema", mode="before")
    @classmethod
    def _bare_numbers(cls, ema: Any) -> Any:
        """``[0.999]`` is ``[{kind: constant, decay: 0.999}]``."""
        if not isinstance(ema, (list, tuple)):
            return ema
        return tuple({"kind": "constant", "decay": each} if _is_number(each) else each for each in ema)

    @model_validator(mode="after")
    def _parts_fit(self) -> "TrainConfig":
        names = [average.name for average in self.ema]
        if len(set(names)) < len(names):
            raise ValueError(f"ema lists the same average twice: {', '.join(names)}")
        if self.ema_snapshot_every and sum(average.kind == "power" for average in self.ema) < 2:
            raise ValueError("ema_snapshot_every needs two averages of kind power: others are rebuilt from those")
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide into "
                f"{self.gradient_accumulation_steps} gradient_accumulation_steps"
            )
        if self.compile and self.parallel == "fsdp2":
            raise ValueError("compile with parallel fsdp2 has not been shown to give the right gradients: choose one")
        return self


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
