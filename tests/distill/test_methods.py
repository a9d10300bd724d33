"""From config to objective: every setting of a method arrives where it belongs."""

from typing import Any

import pytest
import tiny
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from fewstep.distill.config import ObjectiveConfig
from fewstep.distill.couplings import gaussian_noise
from fewstep.distill.flow_maps.free_flow import FreeFlow
from fewstep.distill.flow_maps.guidance import GuidanceRange
from fewstep.distill.flow_maps.methods import METHODS, Given, objective_of
from fewstep.distill.flow_maps.objective import FlowMapMatching
from fewstep.distill.flow_maps.rules import Discrete, Eulerian, Lagrangian, Modulated, Split
from fewstep.distill.flow_maps.schedules import Constant, Exponential, Ramp, Sigmoid
from fewstep.distill.flow_maps.trajectory import TrajectoryRegression
from fewstep.distill.flow_maps.velocity import (
    ContrastedVelocity,
    SelfGuided,
    TeacherVelocity,
    conditional,
    diagonal,
)
from fewstep.distill.flow_maps.weights import (
    AdaptivePower,
    Cauchy,
    Likelihood,
    NormalisedTangent,
    PseudoHuber,
    plain,
)
from fewstep.distill.tangent import end_derivative, forward_derivative, path_derivative
from fewstep.errors import UsageError
from fewstep.keys import Key
from fewstep.teachers.config import NoiseConfig
from fewstep.teachers.guided import ClassContrast
from fewstep.teachers.load import Teacher
from fewstep.teachers.network import NetworkField, freeze
from fewstep.times import dyadic_pairs, jump_rows, logit_normal, sample_times, sorted_pairs, u_shaped, uniform

FIELD = NetworkField(freeze(tiny.network(two_times=False, seed=1)))
CONTRAST = ClassContrast(FIELD, 10)
ADAPTER: TypeAdapter[Any] = TypeAdapter(ObjectiveConfig)


def teacher(noise: str = "gaussian", *, contrast: bool = True) -> Teacher:
    source = NoiseConfig.model_validate({"source": noise})
    return Teacher("t", FIELD, None, None, 1.0, "", 0, source, CONTRAST if contrast else None)


def done(step: int) -> float:
    return step / 100


def build(
    kind: str, *, source: Teacher | None = None, classes: int = 10, told: bool = False, **settings: object
) -> Any:
    given = Given(tiny.student(), source or teacher(), gaussian_noise, classes, told, done)
    return objective_of(ADAPTER.validate_python({"kind": kind, **settings}), given)


def matching(kind: str, **settings: Any) -> FlowMapMatching:
    found = build(kind, **settings)
    assert isinstance(found, FlowMapMatching)
    return found


@pytest.mark.parametrize("kind", METHODS)
def test_every_method_is_built_from_its_defaults(kind: str) -> None:
    found = build(kind)
    assert isinstance(found.student, nn.Module)
    assert isinstance(found, FlowMapMatching | FreeFlow | TrajectoryRegression)
    if isinstance(found, FlowMapMatching):
        assert found.done is done
        assert found.null_label == 10
        assert found.noise is gaussian_noise
        assert found.guidance is None
        assert found.label_dropout == 0


RULES: dict[str, tuple[str, dict[str, Any], object]] = {
    "meanflow": ("meanflow", {}, Eulerian()),
    "improved meanflow": ("improved_meanflow", {}, Eulerian(tangent=diagonal)),
    "modular meanflow": (
        "modular_meanflow",
        {"modulation": 0.5, "begin": 0.2, "end": 0.7},
        Modulated(path_derivative, Ramp(0.0, 0.5, 0.2, 0.7)),
    ),
    "alpha-flow": ("alpha_flow", {"begin": 0.1, "end": 0.6, "clip": 4}, Discrete(Sigmoid(0.1, 0.6), 4.0)),
    "alpha-flow, fixed": ("alpha_flow", {"alpha": 0.3}, Discrete(Constant(0.3))),
    "soflow": ("soflow", {"first": 0.2, "last": 0.01}, Discrete(Exponential(0.2, 0.01))),
    "split": ("split_meanflow", {"split": "half"}, Split("half")),
    "split at random": ("split_meanflow", {}, Split("random")),
    "shortcut": ("shortcut", {"levels": 4, "clip": 3}, Split("half", 3.0, finest=1 / 8)),
    "terminal velocity": ("terminal_velocity", {}, Lagrangian(end_derivative)),
    "align your flow": ("align_your_flow", {"warmup": 0.2, "largest": 0.9}, Eulerian(factor=Ramp(0, 0.9, 0, 0.2))),
    "align your flow, lagrangian": (
        "align_your_flow",
        {"identity": "lagrangian"},
        Lagrangian(end_derivative, velocity=TeacherVelocity(FIELD)),
    ),
}


@pytest.mark.parametrize("case", RULES)
def test_rules(case: str) -> None:
    kind, settings, wanted = RULES[case]
    assert matching(kind, **settings).rule == wanted


def test_derivatives() -> None:
    """Forward mode, or differences of the width asked for: also where the gradient passes the derivative."""
    assert matching("meanflow").derivative is forward_derivative
    x, t = torch.ones(2, 1), torch.full((2,), 0.5)

    def net(x: Tensor, t: Tensor, r: Tensor, label: Tensor | None) -> Tensor:
        return (t**3 + r**3)[:, None] * x

    wide = {"jvp": "finite_difference", "jvp_step": 0.1}
    # d/dt t^3 by a central difference is 3 t^2 + h^2.
    derivative = matching("meanflow", **wide).derivative
    assert derivative is not None
    torch.testing.assert_close(derivative(net, x, 0 * x, t, t, None), torch.full((2, 1), 0.76))
    modulated = matching("modular_meanflow", **wide).rule
    assert isinstance(modulated, Modulated)
    torch.testing.assert_close(modulated.derivative(net, x, 0 * x, t, t, None)[1], torch.full((2, 1), 0.76))
    ends = [matching("terminal_velocity", **wide).rule, matching("align_your_flow", identity="lagrangian", **wide).rule]
    for end in (*(rule.derivative for rule in ends), build("free_flow", **wide).end_derivative):  # type: ignore[attr-defined]
        torch.testing.assert_close(end(net, x, t, t, None)[1], torch.full((2, 1), 0.76))
    assert build("free_flow").end_derivative is end_derivative


@pytest.mark.parametrize("kind", ["split_meanflow", "shortcut", "terminal_velocity"])
def test_averaged_targets(kind: str) -> None:
    assert matching(kind, target_decay=0.75).target_decay == 0.75
    assert len(matching(kind, target_decay=0.75).targets()) == 1
    assert matching(kind, target_decay=0).targets() == ()


def test_pairs_of_times() -> None:
    """Those of the config, with a distribution of their own where nothing jumps; the shortcut's are dyadic."""
    index = torch.arange(64)
    jump = jump_rows(index, 0.5)
    times = {"kind": "logit_normal", "mean": 0.3, "std": 0.7}
    plainly = matching("meanflow", times=times, jump_fraction=0.4)
    assert plainly.jump_fraction == 0.4
    wanted = sorted_pairs(logit_normal(0.3, 0.7))(Key(0), index, jump)
    found = plainly.pairs(Key(0), index, jump)
    assert torch.equal(found.t, wanted.t)
    assert torch.equal(found.r, wanted.r)
    apart = matching("meanflow", times=times, diagonal_times={"kind": "u_shaped"}).pairs(Key(0), index, jump)
    assert torch.equal(apart.r[jump], wanted.r[jump])
    assert torch.equal(apart.t[~jump], sample_times(u_shaped(4.0), Key(0), "diagonal_time", index)[~jump])
    steps = matching("shortcut", levels=3, jump_fraction=0.2)
    assert steps.jump_fraction == 0.2
    assert torch.equal(steps.pairs(Key(0), index, jump).r, dyadic_pairs(3)(Key(0), index, jump).r)


WEIGHTS: list[tuple[dict[str, Any], object]] = [
    ({"kind": "none"}, plain),
    ({"kind": "power", "power": 0.5, "offset": 0.2}, AdaptivePower(0.5, 0.2)),
    ({"kind": "huber", "scale": 0.3}, PseudoHuber(0.3)),
    ({"kind": "normalised", "offset": 0.4}, NormalisedTangent(0.4)),
]


@pytest.mark.parametrize("kind", ["meanflow", "shortcut", "free_flow", "trajectory"])
def test_weights(kind: str) -> None:
    for settings, wanted in WEIGHTS:
        assert build(kind, weight=settings).weight == wanted
    assert type(build(kind, weight={"kind": "log_variance"}).weight) is Likelihood
    cauchy = build(kind, weight={"kind": "cauchy", "offset": 0.3}).weight
    assert type(cauchy) is Cauchy
    assert cauchy.offset == 0.3


GUIDANCE = {"scale": 1.5, "low": 0.1, "high": 0.9, "power": 2.0, "random_window": True, "mix": 0.4}


@pytest.mark.parametrize("kind", ["meanflow", "shortcut", "alpha_flow"])
def test_guidance(kind: str) -> None:
    """Of the student by itself, where labels are dropped too, or of the teacher's contrast, where they are not; told to
    the student if it has an input for it."""
    own = matching(kind, velocity="data", guidance={**GUIDANCE, "label_dropout": 0.2})
    assert own.velocity == SelfGuided(10, (1.5, 0.1, 0.9), 0.4)
    assert (own.label_dropout, own.null_label, own.guidance) == (0.2, 10, None)
    theirs = matching(kind, velocity="teacher", guidance=GUIDANCE)
    assert theirs.velocity == ContrastedVelocity(CONTRAST, (1.5, 0.1, 0.9))
    assert (theirs.label_dropout, theirs.guidance) == (0.0, None)
    told = matching(kind, velocity="data", guidance={**GUIDANCE, "largest": 8.0}, told=True)
    assert told.guidance == GuidanceRange(1.5, 0.1, 0.9, 8.0, 2.0, True)
    assert matching(kind, velocity="data").velocity is conditional
    assert matching(kind, velocity="teacher").velocity == TeacherVelocity(FIELD)


def test_a_lagrangian_of_a_teacher_is_guided_where_jumps_end() -> None:
    rule = matching("align_your_flow", identity="lagrangian", guidance=GUIDANCE).rule
    assert isinstance(rule, Lagrangian)
    assert rule.velocity == ContrastedVelocity(CONTRAST, (1.5, 0.1, 0.9))


def test_free_flow() -> None:
    found = build(
        "free_flow",
        times={"kind": "u_shaped"},
        renoise_times={"kind": "logit_normal", "mean": 1.0},
        correction=0.5,
        correction_weight=0.3,
    )
    u = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    assert torch.equal(found.ends(u), u_shaped(4.0)(u))
    assert torch.equal(found.renoise(u), logit_normal(1.0, 1.0)(u))
    assert (found.correction, found.correction_weight) == (0.5, 0.3)
    assert found.teacher is FIELD
    assert torch.equal(build("free_flow").ends(u), uniform(u))


def test_trajectory() -> None:
    found = build("trajectory", solver="midpoint", nodes=5)
    assert (found.solver, found.nodes, found.teacher) == ("midpoint", 5, FIELD)


def test_what_does_not_fit() -> None:
    with pytest.raises(UsageError, match="needs classes, and the data have none"):
        build("meanflow", velocity="data", guidance=GUIDANCE, classes=0)
    with pytest.raises(UsageError, match="the teacher t has neither classes nor a weaker one beside it"):
        build("meanflow", guidance=GUIDANCE, source=teacher(contrast=False))
    with pytest.raises(UsageError, match="needs Gaussian noise, the teacher's is laplace"):
        build("free_flow", source=teacher("laplace"))
    assert build("free_flow", source=teacher("laplace"), correction=0.0).fake is None
    given = Given(tiny.student(), None, gaussian_noise, 10, False, done)
    for kind, words in (("meanflow", "velocity teacher"), ("free_flow", "free_flow"), ("trajectory", "trajectory")):
        with pytest.raises(UsageError, match=f"{words} needs a teacher block"):
            objective_of(ADAPTER.validate_python({"kind": kind}), given)
