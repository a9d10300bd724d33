"""Config of objectives and of training. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from fewstep.block import Block, SolverName


class UniformTimes(Block):
    """``t`` uniform on (0, 1)."""

    kind: Literal["uniform"] = "uniform"


class LogitNormalTimes(Block):
    """``logit t ~ N(mean, std^2)``."""

    kind: Literal["logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: float = Field(1.0, gt=0)


TimesConfig = Annotated[UniformTimes | LogitNormalTimes, Field(discriminator="kind")]


class FlowMatchingConfig(Block):
    """Flow matching: trains a teacher. ``label_dropout`` prepares it for guidance."""

    kind: Literal["flow_matching"] = "flow_matching"
    times: TimesConfig = UniformTimes()
    label_dropout: float = Field(0.1, ge=0, lt=1)


class MeanFlowConfig(Block):
    """MeanFlow. ``velocity``: the teacher's marginal velocity, or ``e - x`` from data."""

    kind: Literal["meanflow"] = "meanflow"
    velocity: Literal["teacher", "data"] = "teacher"
    times: TimesConfig = LogitNormalTimes(mean=-0.4, std=1.0)
    jump_fraction: float = Field(0.25, ge=0, le=1)
    weight_power: float = Field(0.0, ge=0, le=2)
    weight_offset: float = Field(1e-2, gt=0)


class ProgressiveConfig(Block):
    """Progressive distillation ``start_steps -> start_steps / 2 -> ... -> end_steps``.

    ``train.steps`` is the length of a stage; the stages of 2 and 1 steps are ``last_stages_factor`` times as long.
    ``solver`` takes the teacher's steps in the first stage.
    """

    kind: Literal["progressive"] = "progressive"
    start_steps: int = Field(32, ge=2)
    end_steps: int = Field(1, ge=1)
    solver: SolverName = "euler"
    last_stages_factor: float = Field(2.0, gt=0)


class ConsistencyConfig(Block):
    """Consistency distillation over a grid that is refined from ``start_nodes`` to ``nodes`` intervals by doubling.

    ``target_decay`` is the averaging of the target network (0: the student itself).
    """

    kind: Literal["consistency"] = "consistency"
    start_nodes: int = Field(4, ge=1)
    nodes: int = Field(32, ge=1)
    solver: SolverName = "heun"
    target_decay: float = Field(0.0, ge=0, lt=1)
    huber: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _doubles(self) -> "ConsistencyConfig":
        ratio = self.nodes // self.start_nodes
        if self.start_nodes * ratio != self.nodes or ratio & (ratio - 1):
            raise ValueError(f"nodes {self.nodes} is not start_nodes {self.start_nodes} times a power of two")
        return self


ObjectiveConfig = Annotated[
    FlowMatchingConfig | MeanFlowConfig | ProgressiveConfig | ConsistencyConfig, Field(discriminator="kind")
]


class TrainConfig(Block):
    """The trainer. Durations are in optimiser steps; ``batch_size`` counts all processes together.

    ``lr_schedule`` runs after the warm-up: ``constant``, ``linear`` to zero or ``cosine`` to zero. The first ``ema``
    decay is the one exported. ``grad_clip`` bounds the gradient norm (0: off). ``threads`` is torch's thread count
    while training on a CPU (0: its own choice): matrices as small as the recipes' are multiplied faster by one thread
    than by two that have to wait for each other.
    """

    steps: int = Field(4000, ge=1)
    batch_size: int = Field(128, ge=1)
    lr: float = Field(1e-3, gt=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = Field(100, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    grad_clip: float = Field(1.0, ge=0)
    ema: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = Field((0.999,), min_length=1)
    threads: int = Field(0, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoint_every: int = Field(1000, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    log_every: int = Field(50, ge=1)

    @field_validator("betas")
    @classmethod
    def _decay_rates(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"both lie in [0, 1), got {betas}")
        return betas
