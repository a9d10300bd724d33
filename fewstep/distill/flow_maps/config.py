"""Config of the flow-map family. Imports no torch.

A method is a block with its paper's choices as defaults. What the methods share comes from the blocks they inherit, so
that any of them takes any weight, any pairs of times, guidance and a warm start.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fewstep.block import Block, SolverName
from fewstep.distill.times_config import (
    GapPairs,
    LogitNormalTimes,
    PairsConfig,
    SortedPairs,
    TimesConfig,
    UniformTimes,
)

JvpMode = Literal["forward", "finite_difference"]
"""How an objective takes the derivative of its student along the path."""

Share = Annotated[float, Field(ge=0, le=1)]


class PlainWeight(Block):
    """The mean square."""

    kind: Literal["none"] = "none"


class AdaptivePowerConfig(Block):
    """``||Delta||^2 / sg(||Delta||^2 + offset)^power``, norms summed over coordinates."""

    kind: Literal["power"] = "power"
    power: float = Field(1.0, ge=0, le=2)
    offset: float = Field(1e-2, gt=0)


class HuberConfig(Block):
    """``sqrt(||Delta||^2 + c^2) - c`` with ``c = scale sqrt(D)``."""

    kind: Literal["huber"] = "huber"
    scale: float = Field(0.00054, gt=0)


class NormalisedConfig(Block):
    """Deviations divided by their length plus ``offset``, per coordinate."""

    kind: Literal["normalised"] = "normalised"
    offset: float = Field(0.1, gt=0)


class LikelihoodConfig(Block):
    """A learned log-variance per pair of times."""

    kind: Literal["log_variance"] = "log_variance"


class CauchyConfig(Block):
    """A learned log-variance per pair of times, under a Cauchy loss."""

    kind: Literal["cauchy"] = "cauchy"
    offset: float = Field(0.01, gt=0)


WeightConfig = Annotated[
    PlainWeight | AdaptivePowerConfig | HuberConfig | NormalisedConfig | LikelihoodConfig | CauchyConfig,
    Field(discriminator="kind"),
]


class GuidanceConfig(Block):
    """Guidance folded into the student: ``v(null) + scale (v(c) - v(null))`` at times in ``[low, high]``.

    With a teacher's velocity it is the teacher's; with ``velocity: data`` the student guides itself, for which its
    class is dropped on the share ``label_dropout`` of rows with ``r = t``, and ``mix`` is the weight of its own
    conditional velocity (left out: ``1 - 1 / scale``). Where the student has guidance as an input, the scale is drawn
    from ``[scale, largest]`` with density ``w^-power``, and with ``random_window`` the window too.
    """

    scale: float = Field(2.0, gt=0)
    low: Share = 0.0
    high: Share = 1.0
    largest: float | None = None
    power: float = Field(1.0, ge=0)
    random_window: bool = False
    mix: float | None = Field(None, ge=0, lt=1)
    label_dropout: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _in_order(self) -> "GuidanceConfig":
        if self.low > self.high:
            raise ValueError(f"the window [{self.low:g}, {self.high:g}] is empty")
        if self.largest is not None and self.largest <= self.scale:
            raise ValueError(f"largest {self.largest:g} is not above scale {self.scale:g}")
        return self


class WarmStartConfig(Block):
    """A first stage of ``steps`` optimiser steps of trajectory regression on the teacher, out of ``train.steps``."""

    steps: int = Field(ge=1)
    solver: SolverName = "heun"
    nodes: int = Field(16, ge=2)


class FlowMapBlock(Block):
    """What all methods of the family share."""

    weight: WeightConfig = PlainWeight()
    warm_start: WarmStartConfig | None = None


class RegressionBlock(FlowMapBlock):
    """Regressions over pairs of times: ``velocity`` is the teacher's, or ``e - x`` from the data; on the share
    ``jump_fraction`` of rows ``r < t``; times of the other rows come from ``diagonal_times`` if that is given."""

    velocity: Literal["teacher", "data"] = "data"
    times: PairsConfig = LogitNormalTimes(mean=-0.4, std=1.0)
    diagonal_times: TimesConfig | None = None
    jump_fraction: Share = 0.25
    guidance: GuidanceConfig | None = None


class DerivativeBlock(RegressionBlock):
    """``jvp``: forward-mode differentiation, or a central difference of width ``2 jvp_step`` for networks that have no
    forward derivative."""

    jvp: JvpMode = "forward"
    jvp_step: float = Field(5e-3, gt=0, le=0.1)


class EulerianBlock(DerivativeBlock):
    """``jvp: one_sided`` takes the difference to the output that is trained anyway: one evaluation, of first order."""

    jvp: Literal["forward", "finite_difference", "one_sided"] = "forward"  # type: ignore[assignment]


class MeanFlowConfig(EulerianBlock):
    """MeanFlow (2505.13447), by default with the teacher's velocity as target and tangent."""

    kind: Literal["meanflow"] = "meanflow"
    velocity: Literal["teacher", "data"] = "teacher"


class ImprovedMeanFlowConfig(EulerianBlock):
    """Improved MeanFlow (2512.02012): the tangent is the student's own velocity ``u(x, t, t)``, not the target's."""

    kind: Literal["improved_meanflow"] = "improved_meanflow"
    jump_fraction: Share = 0.5


class ModularMeanFlowConfig(DerivativeBlock):
    """Modular MeanFlow (2508.17426): the gradient through the derivative is let in by and by, from none before the
    share ``begin`` of the training to ``modulation`` of it at ``end``."""

    kind: Literal["modular_meanflow"] = "modular_meanflow"
    modulation: Share = 1.0
    begin: Share = 0.0
    end: Share = 1.0

    @model_validator(mode="after")
    def _in_order(self) -> "ModularMeanFlowConfig":
        if self.begin > self.end:
            raise ValueError(f"begin {self.begin:g} is after end {self.end:g}")
        return self


class AlphaFlowConfig(DerivativeBlock):
    """alpha-Flow (2510.20771): from flow matching over jumps to MeanFlow, by a sigmoid in the share of the training
    between ``begin`` and ``end``; ``alpha`` keeps the step constant instead. ``clip`` bounds targets (0: off)."""

    kind: Literal["alpha_flow"] = "alpha_flow"
    jump_fraction: Share = 0.5
    alpha: float | None = Field(None, gt=0, le=1)
    begin: Share = 0.0
    end: Share = 1.0
    clip: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _in_order(self) -> "AlphaFlowConfig":
        if self.begin >= self.end:
            raise ValueError(f"begin {self.begin:g} is not before end {self.end:g}")
        return self


class SoFlowConfig(RegressionBlock):
    """SoFlow (2512.15657): a discrete step that shrinks exponentially from ``first`` to ``last`` of the jump."""

    kind: Literal["soflow"] = "soflow"
    times: PairsConfig = SortedPairs(
        first=LogitNormalTimes(mean=0.2, std=0.8), second=LogitNormalTimes(mean=-1.0, std=0.8)
    )
    diagonal_times: TimesConfig | None = LogitNormalTimes(mean=-0.2, std=1.0)
    first: float = Field(0.1, gt=0, le=1)
    last: float = Field(0.002, gt=0, le=1)

    @model_validator(mode="after")
    def _shrinks(self) -> "SoFlowConfig":
        if self.last > self.first:
            raise ValueError(f"the step grows from first {self.first:g} to last {self.last:g}: it has to shrink")
        return self


class SplitMeanFlowConfig(RegressionBlock):
    """SplitMeanFlow (2507.16884): one jump is two, split at random or in half; no derivative."""

    kind: Literal["split_meanflow"] = "split_meanflow"
    velocity: Literal["teacher", "data"] = "teacher"
    times: PairsConfig = UniformTimes()
    jump_fraction: Share = 0.5
    split: Literal["random", "half"] = "random"
    target_decay: float = Field(0.0, ge=0, lt=1)


class ShortcutConfig(FlowMapBlock):
    """Shortcut models (2410.12557): steps of length 1, 1/2, ..., ``2^-(levels - 1)``, each held to two of half its
    length by an averaged network, with states and targets within ``clip``; flow matching on the other rows.

    What is known of short steps reaches the longest in ``levels`` hops, each about ``1 / (1 - target_decay)`` optimiser
    steps late: the paper's 0.999 is for long trainings, a few thousand steps want 0.9.
    """

    kind: Literal["shortcut"] = "shortcut"
    velocity: Literal["teacher", "data"] = "data"
    jump_fraction: Share = 0.125
    levels: int = Field(7, ge=1, le=20)
    clip: float = Field(4.0, ge=0)
    target_decay: float = Field(0.999, ge=0, lt=1)
    guidance: GuidanceConfig | None = None


class TerminalVelocityConfig(DerivativeBlock):
    """Terminal Velocity Matching (2511.19797): jumps end with the velocity that an averaged network has there; the
    gradient passes the derivative. ``target_decay: 0`` with ``weight: {kind: log_variance}`` is Lagrangian
    self-distillation (2505.18825)."""

    kind: Literal["terminal_velocity"] = "terminal_velocity"
    times: PairsConfig = GapPairs()
    jump_fraction: Share = 0.5
    target_decay: float = Field(0.99, ge=0, lt=1)


class AlignYourFlowConfig(DerivativeBlock):
    """Align Your Flow (2506.14603): flow maps of a teacher by the Eulerian identity (EMD), whose derivative is let in
    over ``warmup`` of the training up to ``largest`` below one, or by the Lagrangian one (LMD); tangents normalised."""

    kind: Literal["align_your_flow"] = "align_your_flow"
    velocity: Literal["teacher"] = "teacher"
    identity: Literal["eulerian", "lagrangian"] = "eulerian"
    times: PairsConfig = GapPairs()
    jump_fraction: Share = 1.0
    weight: WeightConfig = NormalisedConfig()
    warmup: Share = 0.1
    largest: Share = 0.99


class FreeFlowConfig(FlowMapBlock):
    """FreeFlow (2511.19428): no data, jumps from noise only. ``times`` are the ends of predicted jumps; the share
    ``correction`` of rows looks at where samples land, re-noised to ``renoise_times``."""

    kind: Literal["free_flow"] = "free_flow"
    times: TimesConfig = UniformTimes()
    correction: Share = 0.25
    correction_weight: float = Field(1.0, gt=0)
    renoise_times: TimesConfig = UniformTimes()
    jvp: JvpMode = "forward"
    jvp_step: float = Field(5e-3, gt=0, le=0.1)


class TrajectoryConfig(FlowMapBlock):
    """Trajectory regression (2509.24526): jumps between the ``nodes`` of the teacher's own solutions from noise."""

    kind: Literal["trajectory"] = "trajectory"
    solver: SolverName = "heun"
    nodes: int = Field(16, ge=2)
    warm_start: None = None


FlowMapConfig = (
    MeanFlowConfig
    | ImprovedMeanFlowConfig
    | ModularMeanFlowConfig
    | AlphaFlowConfig
    | SoFlowConfig
    | SplitMeanFlowConfig
    | ShortcutConfig
    | TerminalVelocityConfig
    | AlignYourFlowConfig
    | FreeFlowConfig
    | TrajectoryConfig
)
