"""Config of the consistency family. Imports no torch.

A method is a block with its paper's choices as defaults. Times are the flow's; noise levels are ``sigma = t / (1 -
t)``.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fewstep.block import Block, SolverName
from fewstep.distill.flow_maps.config import HuberConfig, JvpMode, LikelihoodConfig, WeightConfig
from fewstep.distill.times_config import LogitNormalTimes, TimesConfig, TruncatedStudentTimes


class SquareDistance(Block):
    """The mean square over coordinates."""

    kind: Literal["square"] = "square"


class AbsoluteDistance(Block):
    """The mean absolute value over coordinates."""

    kind: Literal["absolute"] = "absolute"


class CoordinateHuberConfig(Block):
    """``sqrt(delta^2 + offset^2) - offset`` of each coordinate, their mean."""

    kind: Literal["coordinate_huber"] = "coordinate_huber"
    offset: float = Field(1e-3, gt=0)


DistanceConfig = Annotated[
    SquareDistance | AbsoluteDistance | HuberConfig | CoordinateHuberConfig, Field(discriminator="kind")
]

UnitName = Literal["none", "step", "noise_step", "output_scale"]
"""What a loss is divided by: 1, ``t - q``, ``sigma_t - sigma_q``, or EDM's ``c_out^2`` for a standard deviation of
.5."""


class ConsistencyBlock(Block):
    """What all methods share. ``velocity``: where the state nearer to data comes from, a step of the teacher's
    ``solver``, or the same pair of sample and noise (``data``)."""

    velocity: Literal["teacher", "data"] = "data"


class MatchingBlock(ConsistencyBlock):
    """What the discrete methods share. ``distance`` is between the ends of two jumps, and ``divide_by`` what it is
    divided by; ``target_decay`` is the averaging of the network that targets come from (0: the student itself)."""

    solver: SolverName = "euler"
    distance: DistanceConfig = SquareDistance()
    divide_by: UnitName = "none"
    target_decay: float = Field(0.0, ge=0, lt=1)


class GridBlock(MatchingBlock):
    """A ``grid`` of intervals between t = 1 and 0, uniform in ``t`` or as EDM's (``karras``), refined by ``schedule``
    from ``start_nodes`` to ``nodes`` intervals. Each interval alike, or with the probability that ``times`` gives
    it."""

    grid: Literal["uniform", "karras"] = "uniform"
    schedule: Literal["doubling", "square_root", "constant"] = "doubling"
    start_nodes: int = Field(4, ge=1)
    nodes: int = Field(32, ge=1)
    times: LogitNormalTimes | None = None

    @model_validator(mode="after")
    def _grid_fits(self) -> "GridBlock":
        ratio = self.nodes // self.start_nodes
        doubles = self.start_nodes * ratio == self.nodes and not ratio & (ratio - 1)
        if self.schedule == "doubling" and (not ratio or not doubles):
            raise ValueError(f"nodes {self.nodes} is not start_nodes {self.start_nodes} times a power of two")
        if self.schedule == "square_root" and not ratio:
            raise ValueError(f"nodes {self.nodes} are fewer than start_nodes {self.start_nodes}")
        if self.times is not None and self.times.shift != 1:
            raise ValueError("times of intervals take no shift: change their mean")
        return self


class ConsistencyConfig(GridBlock):
    """Consistency distillation, and with ``velocity: data`` training (2303.01469).

    ``target_follows_nodes`` makes ``target_decay`` the first value of the paper's ``mu(k)``, which grows with the grid.
    ``huber`` is short for ``distance: {kind: huber, scale: .00054 huber}``.
    """

    kind: Literal["consistency"] = "consistency"
    velocity: Literal["teacher", "data"] = "teacher"
    solver: SolverName = "heun"
    divide_by: UnitName = "step"
    huber: float = Field(0.0, ge=0)
    target_follows_nodes: bool = False

    @model_validator(mode="after")
    def _one_distance(self) -> "ConsistencyConfig":
        if self.huber and self.distance.kind != "square":
            raise ValueError("huber and distance exclude each other: one of them is the distance")
        if self.target_follows_nodes and not self.target_decay:
            raise ValueError("target_follows_nodes needs a target_decay to begin with")
        return self


class ImprovedConsistencyConfig(GridBlock):
    """Improved consistency training (2310.14189): no averaged target, a pseudo-Huber distance over the noise step,
    levels of noise drawn log-normally, a grid that doubles in equal parts of the training."""

    kind: Literal["improved_consistency"] = "improved_consistency"
    distance: DistanceConfig = HuberConfig()
    divide_by: UnitName = "noise_step"
    grid: Literal["uniform", "karras"] = "karras"
    start_nodes: int = Field(10, ge=1)
    nodes: int = Field(1280, ge=1)
    times: LogitNormalTimes | None = LogitNormalTimes(mean=-1.1, std=2.0)


class LevelBlock(MatchingBlock):
    """Steps of a share of the noise level: in the ``j``-th of ``stages`` equal parts of the training, from 0, what is
    left of it is ``1 - n(sigma) base^-(j + 1)``, at most ``largest`` for the finest; where it is nothing, the target is
    the data point. ``times`` are those of the noisier state."""

    distance: DistanceConfig = HuberConfig()
    divide_by: UnitName = "noise_step"
    times: TimesConfig = LogitNormalTimes(mean=-1.1, std=2.0)
    base: float = Field(2.0, gt=1)
    stages: int = Field(8, ge=1)
    largest: float = Field(0.999, gt=0, lt=1)


class EasyConsistencyConfig(LevelBlock):
    """Easy consistency tuning (2406.14548): begins as denoising and becomes consistency training by and by."""

    kind: Literal["easy_consistency"] = "easy_consistency"


class TruncatedConsistencyConfig(LevelBlock):
    """Truncated consistency models (2410.14895): a first stage of easy consistency tuning, then one for noise above
    ``boundary`` alone, with the first stage's student, frozen, below it.

    ``train.steps`` is the length of the first stage, the second is ``second_stage_factor`` times as long. In it the
    share ``boundary_fraction`` of rows starts at the boundary and counts ``boundary_weight`` in all, and
    ``truncated_times`` are those of the others. The student is for one step and for two.
    """

    kind: Literal["truncated_consistency"] = "truncated_consistency"
    truncated_times: TruncatedStudentTimes = TruncatedStudentTimes()
    boundary_fraction: float = Field(0.25, gt=0, lt=1)
    boundary_weight: float = Field(0.1, gt=0)
    second_stage_factor: float = Field(1.0, gt=0)

    @property
    def boundary(self) -> float:
        """The time where the student ends and the frozen one begins."""
        sigma = self.truncated_times.sigma_min
        return sigma / (1 + sigma)

    @model_validator(mode="after")
    def _two_steps(self) -> "TruncatedConsistencyConfig":
        if self.boundary > 0.5:
            raise ValueError(
                f"truncated_times.sigma_min {self.truncated_times.sigma_min:g} lies above 1: the second of two steps "
                "starts at t = 0.5, where the noise is 1"
            )
        if self.truncated_times.shift != 1:
            raise ValueError("truncated_times take no shift: change their sigma_min")
        return self


class PhasedConsistencyConfig(MatchingBlock):
    """Phased consistency models (2405.18407): jumps to the ends of equal segments, one of them per step.

    Of several ``segments`` each sample draws one number, and jumps end below its segment's end by up to the share
    ``shrink`` of it (target-driven distillation, 2409.01347). The student is for those numbers of steps. ``nodes`` is
    the least number of intervals of the grid.
    """

    kind: Literal["phased_consistency"] = "phased_consistency"
    velocity: Literal["teacher", "data"] = "teacher"
    distance: DistanceConfig = CoordinateHuberConfig()
    segments: tuple[Annotated[int, Field(ge=1)], ...] = Field((4,), min_length=1)
    nodes: int = Field(100, ge=1)
    shrink: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _segments_fit(self) -> "PhasedConsistencyConfig":
        if len(set(self.segments)) < len(self.segments):
            raise ValueError(f"segments lists a number twice: {', '.join(map(str, self.segments))}")
        if max(self.segments) > self.nodes:
            raise ValueError(f"{self.nodes} nodes do not hold {max(self.segments)} segments")
        return self


class ConsistencyFlowMatchingConfig(MatchingBlock):
    """Consistency flow matching (2407.02398): points ``length`` apart agree on the end of their segment, and with
    ``velocity_weight`` on their velocities. Targets at times below ``near_data`` (left out: .1, and 0 with a teacher)
    are the true end. Of ``train.steps`` the first ``straight_steps`` regress on the true ends alone, as a stage of
    their own. The student is for ``segments`` steps.
    """

    kind: Literal["consistency_flow_matching"] = "consistency_flow_matching"
    segments: int = Field(2, ge=1)
    length: float = Field(1e-3, gt=0, lt=1)
    near_data: float | None = Field(None, ge=0, le=1)
    velocity_weight: float = Field(1e-5, ge=0)
    straight_steps: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _ends_are_known(self) -> "ConsistencyFlowMatchingConfig":
        if self.velocity == "teacher" and (self.near_data or self.straight_steps):
            name = "near_data" if self.near_data else "straight_steps"
            raise ValueError(f"{name} needs velocity data: a teacher's step does not know where a segment ends")
        return self


class ContinuousConsistencyConfig(ConsistencyBlock):
    """Continuous-time consistency models (2410.11081) in TrigFlow's or in the flow's own coordinates (``form``).

    Deviations are divided by their length plus ``normalise`` (0: not at all); the derivative is let in over
    ``warmup_steps``; ``data_std`` is TrigFlow's. ``jvp``: forward-mode differentiation or a central difference.
    """

    kind: Literal["continuous_consistency"] = "continuous_consistency"
    form: Literal["trigflow", "flow"] = "trigflow"
    times: TimesConfig = LogitNormalTimes(mean=-1.0, std=1.4)
    data_std: float = Field(0.5, gt=0)
    normalise: float = Field(0.1, ge=0)
    warmup_steps: int = Field(10_000, ge=0)
    weight: WeightConfig = LikelihoodConfig()
    jvp: JvpMode = "forward"
    jvp_step: float = Field(5e-3, gt=0, le=0.1)


class SelfCorrectedConfig(ConsistencyBlock):
    """Self-corrected flow distillation (2412.16906) without its adversary: the jump agrees with those from up to
    ``reach`` nearer to data and farther from it, and with the straight line from noise to where the student itself
    takes it. Targets from below ``data_below`` are the data point."""

    kind: Literal["self_corrected"] = "self_corrected"
    velocity: Literal["teacher"] = "teacher"
    reach: float = Field(0.1, gt=0, le=1)
    data_below: float = Field(0.4, ge=0, le=1)
    outward_weight: float = Field(0.1, ge=0)
    straight_weight: float = Field(0.1, ge=0)
    distance: DistanceConfig = CoordinateHuberConfig(offset=0.01)
    target_decay: float = Field(0.9, ge=0, lt=1)


ConsistencyFamilyConfig = (
    ConsistencyConfig
    | ImprovedConsistencyConfig
    | EasyConsistencyConfig
    | ContinuousConsistencyConfig
    | TruncatedConsistencyConfig
    | PhasedConsistencyConfig
    | ConsistencyFlowMatchingConfig
    | SelfCorrectedConfig
)
