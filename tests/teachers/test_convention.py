"""Foreign conventions: the exact Gaussian velocity in disguise comes out as the canonical one."""

import itertools

import pytest
import torch
from torch import Tensor

from fewstep.conventions import BetaSchedule, ConventionConfig
from fewstep.conversion import bounds, canonical_velocity, noise_shares, path_of
from fewstep.flow import PATHS, uniform_grid
from fewstep.keys import Key
from fewstep.sampling import sample_ode
from fewstep.teachers.analytic import GaussianTeacher
from fewstep.teachers.convention import ConvertedField, Model, variants
from fewstep.teachers.formats.table import FORMATS

MEAN, STD = 0.4, 0.6
EXACT = GaussianTeacher(MEAN, STD)
CONVENTIONS = [
    ConventionConfig(path=path, prediction="velocity", noise_at=end, velocity_to=to, time_scale=scale)
    for path, end, to, scale in itertools.product(PATHS, (0, 1), ("noise", "data"), (1.0, 999.0))
] + [
    ConventionConfig(path=path, prediction=prediction, noise_at=end, time_scale=scale, earliest=1e-3, latest=0.999)
    for path, prediction, end, scale in itertools.product(
        PATHS, ("noise", "data", "score", "v_prediction"), (0, 1), (1.0, 1000.0)
    )
]
EDM = ConventionConfig(path="variance_exploding", prediction="data", earliest=0.002 / 1.002, latest=80 / 81)
DIFFUSIONS = [
    ConventionConfig(path="betas", betas=betas, prediction=prediction, time_scale=999, earliest=1e-3, latest=0.999)
    for betas, prediction in itertools.product(
        (
            BetaSchedule(),
            BetaSchedule(kind="scaled_linear", start=8.5e-4, end=0.012),
            BetaSchedule(kind="squared_cosine"),
            BetaSchedule(kind="scaled_linear", start=8.5e-4, end=0.012, zero_terminal=True),
        ),
        ("noise", "data", "v_prediction"),
    )
]
CONTINUOUS = [
    ConventionConfig(path="betas", betas=BetaSchedule(kind="continuous"), **said)
    for said in (
        {"velocity_to": "data", "noise_at": 0},  # SiT's VP
        {"prediction": "noise", "time_scale": 999, "latest": 0.999},  # score_sde's
        {"prediction": "score", "latest": 0.999},
        {"prediction": "v_prediction"},
    )
]
CONVENTIONS += [*CONTINUOUS, EDM, EDM.model_copy(update={"prediction": "score"}), *DIFFUSIONS]
CONVENTIONS += [each.convention for each in FORMATS.values() if each.convention not in CONVENTIONS]


def named(said: ConventionConfig) -> str:
    betas = "" if said.betas is None else f"-{said.betas.kind}{'-zero' if said.betas.zero_terminal else ''}"
    told = (said.path + betas, said.prediction, said.noise_at, said.velocity_to, said.time_scale)
    return "-".join(map(str, told))


def disguised(said: ConventionConfig, mean: float = MEAN, std: float = STD) -> Model:
    """What a perfect model of that convention says of data ~ N(mean, std^2), from the posterior means alone."""

    def model(z: Tensor, clock: Tensor, label: Tensor | None) -> Tensor:
        path, tau = path_of(said), clock / said.time_scale
        tau = (tau if said.noise_at == 1 else 1 - tau).reshape(-1, *(1,) * (z.ndim - 1))
        alpha, sigma = path.alpha(tau), path.sigma(tau)
        off = (z - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        data, noise = mean + alpha * std**2 * off, sigma * off
        if said.prediction in ("noise", "data"):
            return data if said.prediction == "data" else noise
        if said.prediction == "score":
            return -off
        if said.prediction == "v_prediction":
            return alpha * noise - sigma * data
        towards_noise = path.d_alpha(tau) * data + path.d_sigma(tau) * noise
        return towards_noise if said.velocity_to == "noise" else -towards_noise

    return model


def states(count: int = 64) -> tuple[Tensor, Tensor]:
    index = torch.arange(count)
    t = 0.02 + 0.96 * Key(0).uniform("time", index)
    e = Key(0).normal("noise", index, (3,)).double()
    x = MEAN + STD * Key(0).normal("data", index, (3,)).double()
    return (1 - t[:, None]) * x + t[:, None] * e, t


@pytest.mark.parametrize("said", CONVENTIONS, ids=named)
def test_the_velocity_is_the_canonical_one(said: ConventionConfig) -> None:
    x_t, t = states()
    field = ConvertedField(disguised(said), said)
    first, last = bounds(said)
    asked = (t > first) & (t < last)
    assert asked.float().mean() > 0.9
    torch.testing.assert_close(field(x_t, t)[asked], EXACT(x_t, t)[asked], rtol=0, atol=1e-9)
    # Its 64-step samples are those of the exact teacher but for what lies beyond its bounds.
    e = Key(1).normal("noise", torch.arange(4000), (1,)).double()
    here, there = (sample_ode(each, e, uniform_grid(64)).x for each in (field, EXACT))
    torch.testing.assert_close(here.mean(), there.mean(), rtol=0, atol=2e-3)
    torch.testing.assert_close(here.std(), there.std(), rtol=5e-3, atol=0)
    assert abs(float(here.mean()) - MEAN) < 0.02
    assert float(here.std()) == pytest.approx(STD, rel=0.05)


@pytest.mark.parametrize("said", CONVENTIONS, ids=named)
def test_every_other_reading_has_a_larger_loss(said: ConventionConfig) -> None:
    """Each of them, declared wrongly, is told what to change."""
    index = torch.arange(2000)
    t = 0.02 + 0.96 * Key(0).uniform("time", index)
    e = Key(0).normal("noise", index, (3,)).double()
    x = MEAN + STD * Key(0).normal("data", index, (3,)).double()
    x_t = (1 - t[:, None]) * x + t[:, None] * e
    losses = {
        name: float((ConvertedField(disguised(said), read)(x_t, t) - (e - x)).square().mean())
        for name, read in variants(said).items()
    }
    right = losses.pop("as declared")
    # A noise level cannot be reversed, alone or beside something else.
    assert len(losses) == (2 if said.path == "variance_exploding" else 4)
    assert all(not loss < 1.02 * right for loss in losses.values()), losses


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prediction": "noise"}, "set latest below 1"),
        ({"prediction": "data"}, "set earliest above 0"),
        ({"earliest": 0.5, "latest": 0.5}, "is not before latest"),
        ({"prediction": "data", "earliest": 0.1, "velocity_to": "data"}, "no meaning for prediction data"),
        ({"path": "betas", "prediction": "noise", "latest": 0.9}, "betas belong to path betas"),
        ({"betas": {}}, "betas belong to path betas"),
        ({"path": "variance_exploding", "prediction": "data", "earliest": 0.1}, "latest below 1"),
        ({"path": "variance_exploding", "latest": 0.9}, "no velocity of its own"),
        ({"prediction": "score"}, "set latest below 1"),
        ({"path": "betas", "betas": {"end": 20}, "prediction": "data", "earliest": 0.1}, "lie below 1"),
        ({"path": "betas", "betas": {"kind": "continuous", "zero_terminal": True}}, "for schedules of steps"),
        ({"path": "betas", "betas": {}}, "no velocity of its own"),
    ],
)
def test_conventions_that_say_too_little(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ConventionConfig.model_validate(fields)


@pytest.mark.parametrize("betas", [said.betas for said in DIFFUSIONS[::3]], ids=lambda betas: betas.kind)
def test_the_steps_of_a_diffusion_are_those_of_its_own_library(betas: BetaSchedule) -> None:
    from diffusers import DDPMScheduler

    schedules = {"linear": "linear", "scaled_linear": "scaled_linear", "squared_cosine": "squaredcos_cap_v2"}
    theirs = DDPMScheduler(
        betas.steps,
        betas.start,
        betas.end,
        schedules[betas.kind],
        rescale_betas_zero_snr=betas.zero_terminal,
    ).alphas_cumprod.double()
    alpha, sigma = theirs.sqrt(), (1 - theirs).sqrt()
    torch.testing.assert_close(noise_shares(betas), sigma / (alpha + sigma), rtol=0, atol=1e-5)  # theirs are float32


def test_at_the_steps_of_a_diffusion_the_model_sees_its_own_states_and_numbers() -> None:
    said = DIFFUSIONS[0]
    assert said.betas is not None
    seen = {}

    def model(z: Tensor, clock: Tensor) -> Tensor:
        seen.update(z=z, clock=clock)
        return z

    k = torch.arange(5, 999, 7)
    bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[k]
    alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
    x, e = Key(0).normal("data", k, (3,)).double(), Key(0).normal("noise", k, (3,)).double()
    t = sigma / (alpha + sigma)
    canonical_velocity(said, model, (1 - t[:, None]) * x + t[:, None] * e, t)
    torch.testing.assert_close(seen["clock"], k.double(), rtol=0, atol=1e-8)
    torch.testing.assert_close(seen["z"], alpha[:, None] * x + sigma[:, None] * e, rtol=0, atol=1e-12)


def test_noise_enters_a_path_without_end_at_its_latest_time() -> None:
    """EDM's sampler starts from ``80 e`` at ``sigma = 80``; so do we, and what it says of the data is kept."""
    seen = {}

    def model(z: Tensor, sigma: Tensor) -> Tensor:
        seen.update(z=z, sigma=sigma)
        return torch.full_like(z, 0.25)

    e = Key(0).normal("noise", torch.arange(4), (3,)).double()
    v = canonical_velocity(EDM, model, e, torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(seen["sigma"], torch.full((4,), 80.0, dtype=torch.float64))
    torch.testing.assert_close(seen["z"], 80 * e)
    torch.testing.assert_close(v, e - 0.25)


def test_a_continuous_diffusion_by_hand() -> None:
    """Against the integral of its betas, and its derivatives against differences."""
    path = path_of(CONTINUOUS[0])
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    fine = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    beta = 0.1 + 19.9 * fine
    integral = torch.cat((torch.zeros(1, dtype=torch.float64), ((beta[1:] + beta[:-1]) / 2 / 200_000).cumsum(0)))
    at = (t * 200_000).round().long()
    torch.testing.assert_close(path.alpha(fine[at]), (-integral[at] / 2).exp(), rtol=1e-8, atol=0)
    torch.testing.assert_close(path.alpha(t).square() + path.sigma(t).square(), torch.ones_like(t))
    h = 1e-6
    for value, slope in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        torch.testing.assert_close(slope(t), (value(t + h) - value(t - h)) / (2 * h), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(path.time_at(path.linear_time(t)), t, rtol=1e-9, atol=0)
