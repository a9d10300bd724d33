"""Config of reflow. Imports no torch."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from fewstep.block import Block, PathName, SolverName
from fewstep.distill.times_config import TimesConfig, UniformTimes

VelocityRule = Literal["euler", "heun", "midpoint", "fixed_noise"]
"""How a straightened flow is sampled: by a solver, or from data predictions that all go back to the first noise."""


class PairsSettings(Block):
    """Pairs of noise and where the teacher's flow takes it. ``path`` names a folder that `fewstep data pairs` made, for
    the first round; all others are made by the run itself, under its own folder: ``count`` of them, by ``steps`` steps
    of ``solver``, ``batch_size`` at a time, in files of ``shard_size``."""

    path: str | None = Field(None, min_length=1)
    count: int = Field(20_000, ge=1)
    solver: SolverName = "heun"
    steps: int = Field(32, ge=1)
    batch_size: int = Field(1024, ge=1)
    shard_size: int = Field(16_384, ge=1)


class SquareLoss(Block):
    """The mean square."""

    kind: Literal["square"] = "square"


class PseudoHuberLoss(Block):
    """``(sqrt(||d||^2 + c^2) - c) / D`` with ``c = scale D`` (2405.20320)."""

    kind: Literal["huber"] = "huber"
    scale: float = Field(0.00054, gt=0)


LossConfig = Annotated[SquareLoss | PseudoHuberLoss, Field(discriminator="kind")]


class ReflowConfig(Block):
    """Reflow (2209.03003): flow matching on the pairs of a flow, which straightens it. ``train.steps`` is the length of
    a stage.

    ``rounds`` stages straighten, each on the pairs of what the one before reached (the first: of the teacher);
    ``distil_steps: N`` adds a stage that distils the result to exactly N steps, on pairs of its own. ``times`` are of
    ``path``, whose velocity, data or noise (``prediction``) is what the loss compares (2410.07303); the network has the
    linear velocity whatever they are. ``time_weight: falling`` multiplies by ``1 - t``. ``sampler`` is how the
    straightened flow is sampled.
    """

    kind: Literal["reflow"] = "reflow"
    pairs: PairsSettings = PairsSettings()
    rounds: int = Field(1, ge=1)
    distil_steps: int | None = Field(None, ge=1)
    path: PathName = "linear"
    times: TimesConfig = UniformTimes()
    prediction: Literal["velocity", "data", "noise"] = "velocity"
    loss: LossConfig = SquareLoss()
    time_weight: Literal["flat", "falling"] = "flat"
    sampler: VelocityRule = "euler"

    @field_validator("pairs", mode="before")
    @classmethod
    def _bare_path(cls, pairs: Any) -> Any:
        """``pairs: DIR`` is ``pairs: {path: DIR}``."""
        return {"path": pairs} if isinstance(pairs, str) else pairs


class PiecewiseReflowConfig(Block):
    """Reflow within windows of time (PeRFlow, 2405.07510), online: ``windows`` equal parts of [0, 1], each solved by
    its share of ``solver_steps`` steps of the teacher and straightened by itself.

    Several numbers of windows are a curriculum (ProReflow, 2503.04824): a stage for each, of ``train.steps``, with a
    fresh optimiser; ``direction`` is the weight of ``1 - cos(v, v*)`` beside the mean square. ``start_share`` of the
    rows are where a window starts, the others anywhere in it. A stage serves as many steps as it has windows, and
    multiples of that.
    """

    kind: Literal["piecewise_reflow"] = "piecewise_reflow"
    windows: tuple[Annotated[int, Field(ge=1)], ...] = Field((4,), min_length=1)
    solver: SolverName = "heun"
    solver_steps: int = Field(16, ge=1)
    direction: float = Field(0.0, ge=0)
    start_share: float = Field(0.0, ge=0, lt=1)

    @field_validator("windows", mode="before")
    @classmethod
    def _bare_number(cls, windows: Any) -> Any:
        """``windows: 4`` is ``windows: [4]``."""
        return (windows,) if isinstance(windows, int) and not isinstance(windows, bool) else windows

    @field_validator("windows")
    @classmethod
    def _fewer_each_time(cls, windows: tuple[int, ...]) -> tuple[int, ...]:
        if list(windows) != sorted(set(windows), reverse=True):
            raise ValueError(f"each stage has fewer windows than the one before, got {', '.join(map(str, windows))}")
        return windows

    @field_validator("solver_steps")
    @classmethod
    def _whole_steps(cls, solver_steps: int, info: Any) -> int:
        for windows in info.data.get("windows", ()):
            if solver_steps % windows:
                raise ValueError(f"{solver_steps} steps of the solver do not divide among {windows} windows")
        return solver_steps
