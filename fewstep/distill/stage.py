"""A stretch of training with one objective and a fresh optimiser. Most methods are one; some are several in a row."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from torch import nn

from fewstep.distill.objective import Objective
from fewstep.distill.reflow.pairs import StagePairs
from fewstep.grids import Grid


@dataclass(frozen=True)
class Stage:
    """``build(student, previous)`` makes the objective; ``previous`` is the frozen student of the stage before.

    ``serves`` is the number of sampling steps the stage's student is for, 0 for any; of stages with the same number the
    last one's student is kept. ``also`` are further numbers it is for. ``grid`` has the nodes it is sampled on,
    ``serves + 1`` of them (none: any). A stage may train on ``pairs`` instead of the data. What the next stage goes on
    from, and is given as ``previous``, are the weights as they were trained last, or their average with
    ``hands_on_average``.
    """

    name: str
    steps: int
    serves: int
    build: Callable[[nn.Module, nn.Module | None], Objective]
    grid: Grid = ()
    also: tuple[int, ...] = ()
    pairs: StagePairs | None = None
    hands_on_average: bool = False


def first_steps(stages: tuple[Stage, ...]) -> list[int]:
    """The global optimiser step at which each stage begins, and the total as last entry."""
    return [0, *accumulate(stage.steps for stage in stages)]
