"""What a model's own trajectories say: how straight they are, how much they turn, and whether jumps agree.

``transport.straightness`` is the first of these. None needs data, and none says whether samples are good.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.condition import Condition
from fewstep.data.dataset import Dataset
from fewstep.evaluation.transport import straightness, straightness_samples
from fewstep.flow import FlowMap, VelocityField, uniform_grid
from fewstep.keys import Key
from fewstep.sampling import FieldSampler, MapSampler, OdeSampler, Sampler

TURNING_STEPS = 32


@torch.no_grad()
def turning(field: VelocityField, noise: Tensor, label_B: Condition | None = None, steps: int = TURNING_STEPS) -> float:
    """The curvature of a field's trajectories: how much the velocity changes along them, in units of its size.

    ``E int |dv/dt| dt / E int |v| dt`` over the trajectories of ``noise [B, *D]``, from Euler steps on a uniform grid:
    0 if all paths are straight and evenly run, ``w`` for a rotation by the angle ``w``.
    """
    x, changes, lengths = noise, 0.0, 0.0
    before: Tensor | None = None
    for t, r in pairwise(uniform_grid(steps, dtype=torch.float64).tolist()):
        t_B = torch.full((len(x),), t, device=x.device)
        v = field(x, t_B, label_B)
        if before is not None:
            changes += float((v - before).double().flatten(1).norm(dim=1).mean())
        lengths += float(v.double().flatten(1).norm(dim=1).mean()) / steps
        x, before = x + (r - t) * v, v
    changes *= steps / (steps - 1)  # of as many intervals as there are steps
    return changes / lengths if lengths else 0.0


@torch.no_grad()
def self_consistency(sampler: Sampler, noise: Tensor, label_B: Condition | None, seed: int) -> float:
    """Root mean square difference, in data units, of one step and two from the same ``noise [B, *D]``."""
    index = torch.arange(len(noise), device=noise.device)
    one, two = (sampler(steps, noise, label_B, Key(seed), index).x for steps in (1, 2))
    return _rms(one - two)


@torch.no_grad()
def semigroup_error(flow_map: FlowMap, noise: Tensor, label_B: Condition | None, seed: int) -> float:
    """Root mean square of ``X(X(e, 1, q), q, 0) - X(e, 1, 0)`` in data units, each sample with a ``q`` of its own,
    uniform in (0, 1): 0 for the map of any flow, at any size of its jumps."""
    index = torch.arange(len(noise), device=noise.device)
    q_B = Key(seed).uniform("semigroup", index).to(torch.float32)
    one_B, zero_B = torch.ones_like(q_B), torch.zeros_like(q_B)
    middle = flow_map(noise, one_B, q_B, label_B)
    return _rms(flow_map(middle, q_B, zero_B, label_B) - flow_map(noise, one_B, zero_B, label_B))


def field_of(sampler: Sampler) -> VelocityField | None:
    """The velocity field whose paths a sampler follows; None for a flow map and for a field made for certain nodes."""
    if isinstance(sampler, FieldSampler):
        return next((each.field for each in sampler.fields if each.steps == 0), None)
    return sampler.field if isinstance(sampler, OdeSampler) else None


def straightness_of(sampler: Sampler, data: Dataset, seed: int, device: torch.device) -> float | None:
    """How straight a velocity field's own paths are, from a few of the seed's samples; None where it has none."""
    field = field_of(sampler)
    return None if field is None else straightness(field, *_few(sampler, data, seed, device))


def trajectory_measures(sampler: Sampler, data: Dataset, seed: int, device: torch.device) -> dict[str, float]:
    """Every measure of this file that a model allows, by name, from a few of the seed's samples."""
    noise, label = _few(sampler, data, seed, device)
    field = field_of(sampler)
    if field is not None:
        found = {"straightness": straightness(field, noise, label), "curvature": turning(field, noise, label)}
        return {**found, **_consistency(sampler, noise, label, seed)}
    if not isinstance(sampler, MapSampler) or sampler.rule != "jumps":
        return {}  # what goes back to noise on its way does not say where it would have gone
    found = _consistency(sampler, noise, label, seed)
    if 0 in sampler.maps and sampler.maps[0].domain.kind == "any":
        found["semigroup_error"] = semigroup_error(sampler.maps[0], noise, label, seed)
    return found


def of_row(measures: dict[str, float], sampler: Sampler, steps: int) -> dict[str, float]:
    """Those measures that belong to a row: where a field was made for the very nodes, how another one runs says
    nothing."""
    own_nodes = isinstance(sampler, FieldSampler) and sampler.serving(steps).steps != 0
    return {} if own_nodes else measures


def _consistency(sampler: Sampler, noise: Tensor, label: Condition | None, seed: int) -> dict[str, float]:
    if isinstance(sampler, OdeSampler):
        return {}  # of a teacher it is the error of the solver
    try:
        sampler.check(1)
        sampler.check(2)
    except ValueError:
        return {}
    return {"self_consistency": self_consistency(sampler, noise, label, seed)}


def _few(sampler: Sampler, data: Dataset, seed: int, device: torch.device) -> tuple[Tensor, Condition | None]:
    index = torch.arange(straightness_samples(math.prod(data.shape)), device=device)
    return sampler.source(Key(seed), "noise", index, data.shape), data.drawn_condition(index)


def _rms(difference: Tensor) -> float:
    return float(difference.double().square().mean().sqrt())
