"""Config of distributions over times, and of pairs of times. Imports no torch."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fewstep.block import Block


class TimesBlock(Block):
    """``shift = a`` maps the times drawn by ``t -> a t / (1 + (a - 1) t)``; above 1 it moves them towards noise."""

    shift: float = Field(1.0, gt=0)


class UniformTimes(TimesBlock):
    """``t`` uniform on (0, 1)."""

    kind: Literal["uniform"] = "uniform"


class LogitNormalTimes(TimesBlock):
    """``logit t ~ N(mean, std^2)``."""

    kind: Literal["logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: float = Field(1.0, gt=0)


class TruncatedLogNormalTimes(TimesBlock):
    """``ln sigma ~ N(mean, std^2)`` between ``sigma_min`` and ``sigma_max``, ``sigma = t / (1 - t)``. The defaults are
    EDM's."""

    kind: Literal["truncated_log_normal"] = "truncated_log_normal"
    mean: float = -1.2
    std: float = Field(1.2, gt=0)
    sigma_min: float = Field(0.002, gt=0)
    sigma_max: float = Field(80.0, gt=0)

    @model_validator(mode="after")
    def _in_order(self) -> "TruncatedLogNormalTimes":
        if self.sigma_max <= self.sigma_min:
            raise ValueError(f"sigma_max {self.sigma_max:g} is not above sigma_min {self.sigma_min:g}")
        low, high = ((math.log(sigma) - self.mean) / self.std for sigma in (self.sigma_min, self.sigma_max))
        if low > 30 or high < -30:
            raise ValueError("sigma_min to sigma_max lies more than 30 standard deviations from the mean")
        return self


class UShapedTimes(TimesBlock):
    """Density in proportion to ``exp(a t) + exp(a (1 - t))``, ``a = sharpness``: most draws near both ends."""

    kind: Literal["u_shaped"] = "u_shaped"
    sharpness: float = Field(4.0, gt=0, le=100)


class TruncatedStudentTimes(TimesBlock):
    """``ln sigma`` from Student's t distribution of the given ``degrees`` of freedom and ``scale``, between
    ``sigma_min`` and ``sigma_max``, ``sigma = t / (1 - t)``. The defaults are those of truncated consistency models
    (2410.14895)."""

    kind: Literal["truncated_student"] = "truncated_student"
    degrees: float = Field(0.01, gt=0, le=100)
    scale: float = Field(0.2, gt=0)
    sigma_min: float = Field(1.0, gt=0)
    sigma_max: float = Field(80.0, gt=0)

    @model_validator(mode="after")
    def _in_order(self) -> "TruncatedStudentTimes":
        if self.sigma_max <= self.sigma_min:
            raise ValueError(f"sigma_max {self.sigma_max:g} is not above sigma_min {self.sigma_min:g}")
        return self


TimesConfig = Annotated[
    UniformTimes | LogitNormalTimes | TruncatedLogNormalTimes | TruncatedStudentTimes | UShapedTimes,
    Field(discriminator="kind"),
]


class SortedPairs(Block):
    """``t`` the larger and ``r`` the smaller of a draw from ``first`` and one from ``second``."""

    kind: Literal["sorted"] = "sorted"
    first: TimesConfig = UniformTimes()
    second: TimesConfig = UniformTimes()


class ClippedPairs(Block):
    """``t`` from ``start`` and ``r`` from ``end``, cut off at ``t``."""

    kind: Literal["clipped"] = "clipped"
    start: TimesConfig = LogitNormalTimes(mean=-0.6, std=1.6)
    end: TimesConfig = LogitNormalTimes(mean=-4.0, std=1.6)


class GapPairs(Block):
    """``t - r`` from ``gap``, then ``r`` from ``end`` given that it leaves room for the gap."""

    kind: Literal["gap"] = "gap"
    gap: TimesConfig = LogitNormalTimes(mean=-0.8, std=1.0)
    end: TimesConfig = LogitNormalTimes(mean=-0.4, std=1.0)


PairsConfig = Annotated[
    UniformTimes
    | LogitNormalTimes
    | TruncatedLogNormalTimes
    | TruncatedStudentTimes
    | UShapedTimes
    | SortedPairs
    | ClippedPairs
    | GapPairs,
    Field(discriminator="kind"),
]
"""Pairs ``r <= t``. A distribution of single times stands for two draws from it, sorted."""
