"""What the shapes of weights say of the network that they fit."""

import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from fewstep.conventions import ConventionConfig
from fewstep.networks.foreign.config import ForeignBlock
from fewstep.teachers.formats.base import Weights

Config = TypeVar("Config", bound=ForeignBlock)


def shape_of(weights: Weights, name: str, dims: int, title: str) -> tuple[int, ...]:
    """The shape of one weight of that many dimensions. ``ValueError`` if it is missing or has others."""
    if name not in weights:
        raise ValueError(f"the checkpoint has no {name}: it is not a whole {title} checkpoint")
    shape = tuple(weights[name].shape)
    if len(shape) != dims or not all(shape):
        raise ValueError(f"{name} has shape {list(shape)}: it is no {title} checkpoint's")
    return shape


def numbered(weights: Weights, prefix: str, title: str) -> int:
    """How many modules ``prefix.0``, ``prefix.1``, ... there are. ``ValueError`` if a number is left out, or all."""
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    found = {int(match[1]) for name in weights if (match := pattern.match(name))}
    missing = next(number for number in range(len(found) + 1) if number not in found)
    if missing < max(found, default=0) or not found:
        raise ValueError(f"the checkpoint has no {prefix}.{missing}: it is not a whole {title} checkpoint")
    return len(found)


def root(count: int, what: str) -> int:
    """The side of a square of ``count``. ``ValueError`` if there is none."""
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(f"{what} number {count}, which is no square")
    return side


def settled(block: type[Config], inferred: Mapping[str, Any], said: Mapping[str, Any]) -> Config:
    """The config of what weights say and a user adds to it. ``ValueError`` if the two differ.

    Of ``convention`` a user has the last word: see ``completed``.
    """
    own = ConventionConfig.model_validate(inferred.get("convention", {}))
    convention = completed(own, said.get("convention", {}))
    config = block.model_validate({**inferred, **said, "convention": convention})
    declared = dict(config)
    for name, value in inferred.items():
        if name != "convention" and declared[name] != value:
            raise ValueError(f"{name} is {value} by the weights, and {declared[name]} was declared")
    return config


def completed(own: ConventionConfig, said: ConventionConfig | Mapping[str, Any]) -> dict[str, Any]:
    """A declared convention's fields; what it leaves out is as the weights' own project has it, where that has a
    meaning still."""
    told = said.model_dump(exclude_unset=True) if isinstance(said, ConventionConfig) else dict(said)
    fields = own.model_dump()
    if told.get("path", own.path) != own.path:
        del fields["betas"]
    if told.get("prediction", own.prediction) != "velocity":
        del fields["velocity_to"]
    return {**fields, **told}


DATASETS = (10, 100, 1000)
"""Numbers of classes that data are known to have."""


def classes(rows: int, said: Mapping[str, Any]) -> tuple[int, bool]:
    """Of a table of classes with that many rows: how many classes, and whether a row stands for none of them.

    One row does, unless ``null_row`` is said to be false. Nothing else being said, it does not where there are as many
    rows as CIFAR-10, CIFAR-100 or ImageNet have classes: nobody has data of 9, 99 or 999.
    """
    null_row = bool(said.get("null_row", rows not in DATASETS))
    return rows - null_row, null_row
