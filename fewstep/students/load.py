"""An exported model, teacher or student, as a sampler."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fewstep.checkpoint import ExportedModel, damage_in, read_model
from fewstep.errors import UsageError
from fewstep.flow import ANY_JUMP, FlowMap, TimeDomain
from fewstep.grids import check_grid
from fewstep.networks.build import network_from_card, parameter_count
from fewstep.sampling import SOLVERS, FieldSampler, MapSampler, OdeSampler, Sampler, ServedField
from fewstep.sources import SOURCES, Source
from fewstep.students.maps import AverageVelocityMap, ConsistencyMap, GuidanceInput
from fewstep.teachers.config import NoiseConfig
from fewstep.teachers.guided import ClassContrast, GuidedField, WeakContrast
from fewstep.teachers.network import NetworkField, freeze


@dataclass(frozen=True)
class LoadedModel:
    """A sampler with its card; ``digest`` identifies the weights, ``guidance`` the scale of its samples."""

    name: str
    role: str
    objective: str
    sampler: Sampler
    guidance: float
    digest: str
    params: int
    card: dict[str, Any]


def load_model(path: Path, device: torch.device) -> LoadedModel:
    """Read a run's exported model. Missing, truncated or foreign files are a ``UsageError``.

    A student that takes guidance as an input comes with it off.
    """
    exported = read_model(path)
    card = exported.card
    with damage_in(exported.folder):
        return LoadedModel(
            name=str(card["name"]),
            role=str(card["role"]),
            objective=str(card["objective"]),
            sampler=replace(_sampler(exported, device), source=_source(exported)),
            guidance=1.0 if takes_guidance(card) else float(card["guidance"]),
            digest=exported.digest(),
            params=parameter_count(network_from_card(card)[1]),
            card=card,
        )


def takes_guidance(card: Mapping[str, Any]) -> bool:
    """Whether guidance is an input of the model."""
    return bool(card.get("guidance_input", False))


def with_guidance(model: LoadedModel, guidance: GuidanceInput) -> LoadedModel:
    """The same model guided so: a student by its input, at no cost, a teacher with classes by a second evaluation.

    ``UsageError`` for a model that can do neither.
    """
    sampler = model.sampler
    if isinstance(sampler, OdeSampler):
        classes = model.card["data"]["num_classes"]
        if not classes:
            raise UsageError(f"{model.name} is a teacher without classes: --guidance needs one that was taught them")
        guided = guided_sampler(sampler, ClassContrast(sampler.field, classes), guidance)
        return replace(model, sampler=guided, guidance=guidance.scale)
    if not takes_guidance(model.card) or not isinstance(sampler, MapSampler):
        raise UsageError(
            f"{model.name} is a student that does not take guidance: train it with student.guidance_input=true for "
            "--guidance, or with teacher.guidance for one scale that is built in"
        )
    maps = {steps: _guided_map(flow_map, guidance) for steps, flow_map in sampler.maps.items()}
    window = (guidance.low, guidance.high)
    return replace(model, sampler=replace(sampler, maps=maps, window=window), guidance=guidance.scale)


def guided_sampler(sampler: OdeSampler, contrast: ClassContrast | WeakContrast, guidance: GuidanceInput) -> OdeSampler:
    """A teacher under guidance; two evaluations per call, unless it is off."""
    window = (guidance.low, guidance.high)
    if guidance.scale == 1:
        return replace(sampler, window=window)
    return replace(sampler, field=GuidedField(contrast, guidance.scale, *window), window=window)


def _guided_map(flow_map: FlowMap, guidance: GuidanceInput) -> FlowMap:
    assert isinstance(flow_map, AverageVelocityMap | ConsistencyMap)
    return replace(flow_map, guidance=guidance)


def _source(exported: ExportedModel) -> Source:
    """The noise its samples start from."""
    return SOURCES[NoiseConfig.model_validate(exported.card.get("noise", {})).source]


def _sampler(exported: ExportedModel, device: torch.device) -> OdeSampler | MapSampler | FieldSampler:
    role, spec = exported.card["role"], exported.sampler
    if role == "teacher":
        if spec["solver"] not in SOLVERS:
            raise ValueError(f"solver {spec['solver']!r}")
        return OdeSampler(NetworkField(_network(exported, "model.safetensors", device)), spec["solver"])
    if role == "student" and exported.card["student"] == "velocity":
        if spec["sampler"] not in (*SOLVERS, "fixed_noise"):
            raise ValueError(f"sampler {spec['sampler']!r}")
        return FieldSampler(_fields(exported, device), spec["sampler"])
    if role != "student" or spec["sampler"] not in ("jumps", "renoise"):
        raise ValueError(f"role {role!r} with sampler {spec['sampler']!r}")
    return MapSampler(_maps(exported, device), spec["sampler"])


def _fields(exported: ExportedModel, device: torch.device) -> tuple[ServedField, ...]:
    return tuple(
        ServedField(
            NetworkField(_network(exported, entry["weights"], device)), int(steps), bool(entry.get("multiples", False))
        )
        for steps, entry in exported.sampler["steps"].items()
    )


def _maps(exported: ExportedModel, device: torch.device) -> dict[int, FlowMap]:
    kind = exported.card["student"]
    guidance = GuidanceInput(1.0) if takes_guidance(exported.card) else None
    maps: dict[int, FlowMap] = {}
    for steps, entry in exported.sampler["steps"].items():
        net = _network(exported, entry["weights"], device)
        if kind == "consistency":
            maps[int(steps)] = ConsistencyMap(net, guidance=guidance)
        elif kind == "average_velocity":
            maps[int(steps)] = AverageVelocityMap(net, _domain(int(steps), entry), guidance=guidance)
        else:
            raise UsageError(f"{exported.folder}: this version knows no student of kind {kind!r}")
    return maps


def _domain(steps: int, entry: Mapping[str, Any]) -> TimeDomain:
    """The jumps of a student of so many steps. ``ValueError`` for times that are no grid of theirs."""
    if "times" not in entry:
        return ANY_JUMP
    grid = tuple(float(time) for time in entry["times"])
    if len(grid) != steps + 1:
        raise ValueError(f"times of {len(grid) - 1} steps for a student of {steps}")
    check_grid(grid)
    return TimeDomain("grid", grid)


def _network(exported: ExportedModel, weights: str, device: torch.device) -> torch.nn.Module:
    _, net = network_from_card(exported.card)
    net.load_state_dict(exported.weights(weights))
    return freeze(net.to(device))
