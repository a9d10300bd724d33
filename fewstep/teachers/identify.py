"""Weights of other projects as networks: what they are, whether they are whole, what they are read as."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from fewstep.errors import UsageError
from fewstep.networks.condition import Inputs
from fewstep.networks.foreign.build import raw_network
from fewstep.networks.foreign.converted import ForeignNetwork
from fewstep.teachers.containers import Chosen
from fewstep.teachers.formats.base import Format, Found

SHOWN = 3
"""Names that an error lists."""


@dataclass(frozen=True)
class Source:
    """Where a teacher comes from: its file and the sha256 of it, the place of its weights in there, whether those are
    an average, and what else is there."""

    path: Path
    digest: str
    kind_of_file: str
    place: str
    averaged: bool
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been read and found whole."""

    format: Format
    found: Found
    source: Source

    @property
    def inputs(self) -> Inputs:
        """What it takes beside a state: one time, and classes if it has any."""
        return Inputs(self.found.num_classes, two_times=False)

    def network(self, shape: tuple[int, ...]) -> ForeignNetwork:
        """The network with its weights, for samples of ``shape``, in float32."""
        raw = raw_network(self.found.network, shape, self.found.num_classes)
        raw.load_state_dict(in_float32(self.found.weights))
        return ForeignNetwork(raw, self.found.network.convention, self.inputs)


def identified(format: Format, chosen: Chosen, said: Mapping[str, Any], where: str) -> Checkpoint:
    """Weights as what a format finds them to be. What it cannot be is a ``UsageError``."""
    check_numbers(chosen.weights, where)
    try:
        found = format.read(chosen.weights, said)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(("teacher.architecture", *map(str, first["loc"])))
        raise UsageError(f"{field}: {first['msg'].removeprefix('Value error, ')} ({where}, {format.title})") from error
    except (ValueError, LookupError) as error:
        raise UsageError(f"{where} is no {format.title} checkpoint: {' '.join(str(error).split())}") from error
    checked_whole(found, format.title, where)
    return Checkpoint(format, found, Source(Path(where), "", "", chosen.source, chosen.averaged, chosen.beside))


def check_numbers(weights: Mapping[str, Tensor], where: str) -> None:
    """A ``UsageError`` where weights are no numbers that a network could have."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and tensor.element_size() >= 2 and not bool(tensor.isfinite().all()):
            raise UsageError(f"{where}: {name} holds numbers that are not finite")


def checked_whole(found: Found, title: str, where: str) -> None:
    """A ``UsageError`` unless the weights are those of the network, all of them and no others."""
    with torch.device("meta"):
        side = found.side or 2**6
        expected = raw_network(found.network, (found.channels, side, side), found.num_classes).state_dict()
    check_names(found.weights, expected, title, where)


def check_names(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], title: str, where: str) -> None:
    """A ``UsageError`` with counts unless weights have the names, the shapes and the kind of numbers expected."""
    missing = [name for name in expected if name not in weights]
    surplus = [name for name in weights if name not in expected]
    reshaped = [
        f"{name} {list(weights[name].shape)} for {list(expected[name].shape)}"
        for name in expected
        if name in weights and weights[name].shape != expected[name].shape
    ]
    said = []
    for what, names in (("missing", missing), ("unexpected", surplus), ("of another shape", reshaped)):
        if names:
            said.append(f"{len(names)} {what} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})")
    if said:
        raise UsageError(f"{where} is not a whole {title} checkpoint: of {len(expected)} weights {', '.join(said)}")
    for name, tensor in weights.items():
        if expected[name].is_floating_point() and (not tensor.is_floating_point() or tensor.element_size() < 2):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UsageError(f"{where}: {name} is {kind}: quantised weights are not read, only floating-point ones")


def dtypes(weights: Mapping[str, Tensor]) -> str:
    """The types of weights with how many numbers are of each, most first."""
    counts: Counter[str] = Counter()
    for tensor in weights.values():
        counts[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return ", ".join(name for name, _ in counts.most_common())


def in_float32(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights in the precision that training keeps them in."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
