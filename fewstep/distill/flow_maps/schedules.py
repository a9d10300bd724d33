"""Ingredients that change over a training: functions of the share of it that is done, in [0, 1)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[float], float]


@dataclass(frozen=True)
class Constant:
    """``value`` throughout."""

    value: float

    def __call__(self, done: float) -> float:
        return self.value


@dataclass(frozen=True)
class Ramp:
    """Linear from ``first`` to ``last`` between the shares ``begin`` and ``end``, constant before and after. Of no
    length, it is a jump."""

    first: float
    last: float
    begin: float = 0.0
    end: float = 1.0

    def __call__(self, done: float) -> float:
        if done < self.begin:
            return self.first
        if done >= self.end:
            return self.last
        return self.first + (self.last - self.first) * (done - self.begin) / (self.end - self.begin)


@dataclass(frozen=True)
class Exponential:
    """``first (last / first)^done`` (SoFlow, Luo et al. 2512.15657)."""

    first: float
    last: float

    def __call__(self, done: float) -> float:
        return self.first * (self.last / self.first) ** done


@dataclass(frozen=True)
class Sigmoid:
    """``1 - sigmoid(sharpness ((done - begin) / (end - begin) - 1/2))``, with what is within ``tail`` of 0 or 1 taken
    for it (alpha-Flow, Zhang et al. 2510.20771, section 4.2)."""

    begin: float
    end: float
    sharpness: float = 25.0
    tail: float = 0.005

    def __call__(self, done: float) -> float:
        place = (done - self.begin) / (self.end - self.begin) - 0.5
        value = 1 / (1 + math.exp(min(self.sharpness * place, 700.0)))
        return 0.0 if value < self.tail else 1.0 if value > 1 - self.tail else value
