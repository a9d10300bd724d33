"""Foreign conventions: the exact Gaussian velocity in disguise comes out as the canonical one."""

import itertools

import pytest
import torch
from torch import Tensor

from fewstep.conventions import ConventionConfig
from fewstep.flow import PATHS, uniform_grid
from fewstep.keys import Key
from fewstep.sampling import sample_ode
from fewstep.teachers.analytic import GaussianTeacher
from fewstep.teachers.convention import ConvertedField, Model, variants

MEAN, STD = 0.4, 0.6
EXACT = GaussianTeacher(MEAN, STD)
CONVENTIONS = [
    ConventionConfig(path=path, prediction="velocity", noise_at=end, velocity_to=to, time_scale=scale)
    for path, end, to, scale in itertools.product(PATHS, (0, 1), ("noise", "data"), (1.0, 999.0))
] + [
    ConventionConfig(path=path, prediction=prediction, noise_at=end, time_scale=scale, earliest=1e-3, latest=0.999)
    for path, prediction, end, scale in itertools.product(PATHS, ("noise", "data"), (0, 1), (1.0, 1000.0))
]


def disguised(said: ConventionConfig) -> Model:
    """What a perfect model of that convention says of data ~ N(MEAN, STD^2), from the posterior means alone."""

    def model(z: Tensor, clock: Tensor, label: Tensor | None) -> Tensor:
        path, tau = PATHS[said.path], clock / said.time_scale
        tau = (tau if said.noise_at == 1 else 1 - tau)[:, None]
        alpha, sigma = path.alpha(tau), path.sigma(tau)
        off = (z - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        data, noise = MEAN + alpha * STD**2 * off, sigma * off
        if said.prediction != "velocity":
            return data if said.prediction == "data" else noise
        towards_noise = path.d_alpha(tau) * data + path.d_sigma(tau) * noise
        return towards_noise if said.velocity_to == "noise" else -towards_noise

    return model


def states(count: int = 64) -> tuple[Tensor, Tensor]:
    index = torch.arange(count)
    t = 0.02 + 0.96 * Key(0).uniform("time", index)
    e = Key(0).normal("noise", index, (3,)).double()
    x = MEAN + STD * Key(0).normal("data", index, (3,)).double()
    return (1 - t[:, None]) * x + t[:, None] * e, t


@pytest.mark.parametrize("said", CONVENTIONS, ids=lambda said: "-".join(map(str, said.model_dump().values())))
def test_the_velocity_is_the_canonical_one(said: ConventionConfig) -> None:
    x_t, t = states()
    field = ConvertedField(disguised(said), said)
    torch.testing.assert_close(field(x_t, t), EXACT(x_t, t), rtol=0, atol=1e-9)
    # Its 64-step samples are those of the exact teacher but for what lies beyond its bounds.
    e = Key(1).normal("noise", torch.arange(4000), (1,)).double()
    here, there = (sample_ode(each, e, uniform_grid(64)).x for each in (field, EXACT))
    torch.testing.assert_close(here.mean(), there.mean(), rtol=0, atol=2e-3)
    torch.testing.assert_close(here.std(), there.std(), rtol=5e-3, atol=0)
    assert abs(float(here.mean()) - MEAN) < 0.02
    assert float(here.std()) == pytest.approx(STD, rel=0.05)


@pytest.mark.parametrize("said", CONVENTIONS, ids=lambda said: "-".join(map(str, said.model_dump().values())))
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
    assert len(losses) == 4
    assert all(not loss < 1.02 * right for loss in losses.values()), losses


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prediction": "noise"}, "set latest below 1"),
        ({"prediction": "data"}, "set earliest above 0"),
        ({"earliest": 0.5, "latest": 0.5}, "is not before latest"),
        ({"prediction": "data", "earliest": 0.1, "velocity_to": "data"}, "no meaning for prediction data"),
    ],
)
def test_conventions_that_say_too_little(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ConventionConfig.model_validate(fields)
