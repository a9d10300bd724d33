"""Measures of trajectories against fields and maps whose own are known."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fewstep.data.dataset import Dataset
from fewstep.evaluation.trajectory import self_consistency, semigroup_error, trajectory_measures, turning
from fewstep.flow import ANY_JUMP, TimeDomain
from fewstep.keys import Key
from fewstep.sampling import FieldSampler, MapSampler, OdeSampler, ServedField
from fewstep.teachers.analytic import ExactMap, GaussianTeacher

CPU = torch.device("cpu")
NOISE = Key(0).normal("noise", torch.arange(200), (2,)).double()
CLOUD = Dataset("cloud", torch.zeros(10, 2), None, 0, kind="points")


@dataclass(frozen=True)
class Rotation:
    """``v = w J x``: the speed stays, the direction turns by the angle ``w`` in all."""

    angle: float
    nfe: int = 1

    def __call__(self, x: Tensor, t_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        return self.angle * torch.stack((-x[:, 1], x[:, 0]), dim=1)


@dataclass(frozen=True)
class Contraction:
    """A map that takes ``x`` to ``(1 - c (t - r)) x``: of no flow, since two jumps multiply. Its composition over ``q``
    exceeds the single jump by ``c^2 (t - q)(q - r) x``."""

    c: float
    domain: TimeDomain = ANY_JUMP
    nfe: int = 1

    def __call__(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        return (1 - self.c * (t_B - r_B))[:, None] * x


@pytest.mark.parametrize("angle", [0.5, 2.0])
def test_a_rotation_turns_by_its_angle(angle: float) -> None:
    """Euler steps spiral outwards by ``w^2 h / 2`` each, which 2,000 of them reduce to a thousandth."""
    assert turning(Rotation(angle), NOISE, steps=2000) == pytest.approx(angle, rel=2e-3)
    assert turning(Rotation(angle), NOISE, steps=200) == pytest.approx(angle, rel=2e-2)


def test_straight_paths_do_not_turn() -> None:
    class Shift:
        nfe = 1

        def __call__(self, x: Tensor, t_B: Tensor, label_B: Tensor | None = None) -> Tensor:
            return torch.full_like(x, 2.5)

    assert turning(Shift(), NOISE) == 0
    assert turning(GaussianTeacher(0.7, 0.1), NOISE) > 0.1


def test_jumps_of_a_flow_agree_and_those_of_another_map_differ_by_what_they_should() -> None:
    assert semigroup_error(ExactMap(GaussianTeacher(0.7, 0.3)), NOISE, None, seed=0) < 1e-6
    q = Key(3).uniform("semigroup", torch.arange(200))[:, None]
    wanted = float((0.25 * (1 - q) * q * NOISE).square().mean().sqrt())
    assert semigroup_error(Contraction(0.5), NOISE, None, seed=3) == pytest.approx(wanted, rel=1e-5)


def test_one_step_against_two() -> None:
    """At ``q = 1/2`` the contraction's excess is ``c^2 / 4``."""
    sampler = MapSampler({0: Contraction(0.5)}, "jumps")
    wanted = 0.25 / 4 * float(NOISE.square().mean().sqrt())
    assert self_consistency(sampler, NOISE, None, seed=0) == pytest.approx(wanted, rel=1e-6)


def test_each_model_is_asked_what_it_can_answer() -> None:
    teacher = GaussianTeacher(0.0, 0.5)
    exact = ExactMap(teacher)
    names = {
        "ode": OdeSampler(teacher),
        "map": MapSampler({0: exact}, "jumps"),
        "one": MapSampler({1: exact}, "jumps"),
        "renoise": MapSampler({0: exact}, "renoise"),
        "field": FieldSampler((ServedField(teacher),)),
        "nodes": FieldSampler((ServedField(teacher, steps=2),)),
    }
    found = {name: set(trajectory_measures(sampler, CLOUD, 0, CPU)) for name, sampler in names.items()}  # type: ignore[arg-type]
    assert found == {
        "ode": {"straightness", "curvature"},
        "map": {"self_consistency", "semigroup_error"},
        "one": set(),
        "renoise": set(),
        "field": {"straightness", "curvature", "self_consistency"},
        "nodes": set(),
    }
    assert all(math.isfinite(value) for value in trajectory_measures(names["map"], CLOUD, 0, CPU).values())  # type: ignore[arg-type]
