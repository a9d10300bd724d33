"""An exported model, teacher or student, as a sampler."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fewstep.checkpoint import ExportedModel, damage_in, read_model
from fewstep.errors import UsageError
from fewstep.flow import FlowMap, TimeDomain
from fewstep.networks.build import network_from_card, parameter_count
from fewstep.sampling import SOLVERS, MapSampler, OdeSampler, Sampler
from fewstep.sources import SOURCES, Source
from fewstep.students.maps import AverageVelocityMap, ConsistencyMap
from fewstep.teachers.config import NoiseConfig
from fewstep.teachers.network import NetworkField, freeze


@dataclass(frozen=True)
class LoadedModel:
    """A sampler with its card; ``digest`` identifies the weights, ``guidance`` what is built into the samples."""

    name: str
    role: str
    objective: str
    sampler: Sampler
    guidance: float
    digest: str
    params: int
    card: dict[str, Any]


def load_model(path: Path, device: torch.device) -> LoadedModel:
    """Read a run's exported model. Missing, truncated or foreign files are a ``UsageError``."""
    exported = read_model(path)
    card = exported.card
    with damage_in(exported.folder):
        return LoadedModel(
            name=str(card["name"]),
            role=str(card["role"]),
            objective=str(card["objective"]),
            sampler=replace(_sampler(exported, device), source=_source(exported)),
            guidance=float(card["guidance"]),
            digest=exported.digest(),
            params=parameter_count(network_from_card(card)[1]),
            card=card,
        )


def _source(exported: ExportedModel) -> Source:
    """The noise its samples start from."""
    return SOURCES[NoiseConfig.model_validate(exported.card.get("noise", {})).source]


def _sampler(exported: ExportedModel, device: torch.device) -> OdeSampler | MapSampler:
    role, spec = exported.card["role"], exported.sampler
    if role == "teacher":
        if spec["solver"] not in SOLVERS:
            raise ValueError(f"solver {spec['solver']!r}")
        return OdeSampler(NetworkField(_network(exported, "model.safetensors", device)), spec["solver"])
    if role != "student" or spec["sampler"] not in ("jumps", "renoise"):
        raise ValueError(f"role {role!r} with sampler {spec['sampler']!r}")
    return MapSampler(_maps(exported, device), spec["sampler"])


def _maps(exported: ExportedModel, device: torch.device) -> dict[int, FlowMap]:
    kind = exported.card["student"]
    maps: dict[int, FlowMap] = {}
    for steps, entry in exported.sampler["steps"].items():
        net = _network(exported, entry["weights"], device)
        if kind == "consistency":
            maps[int(steps)] = ConsistencyMap(net)
        elif kind == "average_velocity":
            grid = tuple(entry["times"]) if "times" in entry else ()
            maps[int(steps)] = AverageVelocityMap(net, TimeDomain("grid", grid) if grid else TimeDomain("any"))
        else:
            raise UsageError(f"{exported.folder}: this version knows no student of kind {kind!r}")
    return maps


def _network(exported: ExportedModel, weights: str, device: torch.device) -> torch.nn.Module:
    _, net = network_from_card(exported.card)
    net.load_state_dict(exported.weights(weights))
    return freeze(net.to(device))
