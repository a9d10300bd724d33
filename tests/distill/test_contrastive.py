"""Contrastive flow matching: its biased minimiser, the correction of a teacher for it, and that it travels with one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EVALUATE, SMALL, succeed
from safetensors.torch import load_file
from scores import bound, gradient, mean_of, products
from torch import Tensor, nn

from fewstep.checkpoint import DATA_MEAN
from fewstep.config import load_config
from fewstep.data.config import DigitsConfig
from fewstep.data.dataset import Batch, BatchSource, Dataset, LatentScale
from fewstep.data.load import digits
from fewstep.distill.couplings import gaussian_noise
from fewstep.distill.export import data_mean
from fewstep.distill.flow_maps.velocity import TeacherVelocity
from fewstep.distill.flow_matching import FlowMatching, next_in_group
from fewstep.distill.plan import plan
from fewstep.flow import PATHS
from fewstep.keys import Key
from fewstep.students.load import load_model
from fewstep.teachers.analytic import GaussianTeacher
from fewstep.teachers.config import RunTeacher
from fewstep.teachers.contrastive import CorrectedField
from fewstep.teachers.guided import guided
from fewstep.teachers.load import load_teacher
from fewstep.teachers.network import NetworkField

MEAN, STD, CONTRAST, GROUP = 0.8, 0.5, 0.1, 4
CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def score(velocity: object, x: Tensor, time: float, label: Tensor | None = None, **settings: object) -> float:
    """Of the contrastive loss. The samples of a group see each other: what is independent are groups."""
    of = gradient(velocity, x, time, label, contrast=CONTRAST, group=GROUP, **settings)
    return mean_of(products(*of).reshape(-1, GROUP, 10).mean(axis=1)).score


# ------------------------------------------------------------------------------------------------------ the minimiser


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("time", [0.4, 0.9])
def test_minimiser_on_a_gaussian(time: float, path: str) -> None:
    """``(v + c E[x]) / (1 - c)``: the gradient has mean zero there against ten functions of the state, 80,000 samples,
    Bonferroni at 1e-3. At ``v`` itself it has not (its mean is ``-2 c (v + E[x])``, which vanishes where ``v`` is
    constant, ``t = s^2 / (1 + s^2)``, and only there), nor at the field of the other sign, nor at one 3 % off."""
    x, v = MEAN + STD * normal(80_000, 1), GaussianTeacher(MEAN, STD)

    def at(sign: float, factor: float = 1.0) -> float:
        field = lambda z, t: factor * (v(z, t) + sign * CONTRAST * MEAN) / (1 - CONTRAST)  # noqa: E731
        return score(field, x, time, path=PATHS[path])

    limit = bound(10)
    assert at(1.0) < limit
    assert score(v, x, time, path=PATHS[path]) > limit + 2
    assert at(-1.0) > limit + 2
    assert at(1.0, 1.03) > limit + 2


def test_minimiser_of_a_class_needs_the_mean_of_all() -> None:
    """The other sample is of any class, so the bias of class y is ``(v_y + c E[x]) / (1 - c)`` with the mean over all
    classes; that of its own does not do."""
    means = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    label = (normal(80_000, seed=3) < -0.3).long()
    share = 0.5 * (1 + torch.special.erf(torch.tensor(-0.3 / 2**0.5))).item()
    of_all = (1 - share) * -1.0 + share * 2.0
    x = means[label][:, None] + STD * normal(80_000, 1)

    def field(shift: Tensor) -> object:
        def velocity(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
            m = means[y][:, None]
            of_class = GaussianTeacher(0.0, STD)(z - (1 - t[:, None]) * m, t) - m
            return (of_class + CONTRAST * shift[y][:, None]) / (1 - CONTRAST)

        return velocity

    limit = bound(10)
    assert score(field(torch.full((2,), of_all)), x, 0.6, label) < limit
    assert score(field(means), x, 0.6, label) > limit + 2


def test_loss_by_hand() -> None:
    """``||v - (e_i - x_i)||^2 - c ||v - (e_j - x_j)||^2`` over D, j the next of the group, times the path's weight;
    the residual is the plain one."""
    torch.manual_seed(0)
    net = nn.Linear(3, 3, dtype=torch.float64)

    class Student(nn.Module):
        def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
            return net(x)

    x, index = normal(12, 3), torch.arange(12)
    times = lambda u: torch.full_like(u, 0.5)  # noqa: E731
    noise = lambda batch, key: gaussian_noise(batch, key).double()  # noqa: E731
    settings = {"times": times, "label_dropout": 0.0, "null_label": 0, "noise": noise}
    objective = FlowMatching(Student(), contrast=0.3, group=4, **settings)
    output = objective(Batch(x, None, index), Key(1))
    e = noise(Batch(x, None, index), Key(1))
    other = [1, 2, 3, 0, 5, 6, 7, 4, 9, 10, 11, 8]
    v = net((x + e) / 2)
    plain = (v - (e - x)).square().mean(dim=1)
    wanted = plain - 0.3 * (v - (e - x)[other]).square().mean(dim=1)
    torch.testing.assert_close(output.per_sample_B, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(output.residual_B, plain.detach(), rtol=0, atol=1e-12)
    # On the cosine path both terms have the weight (pi / 2)^2 / 2 at one half, where cos + sin is sqrt(2).
    on_path = FlowMatching(Student(), contrast=0.3, group=4, path=PATHS["cosine"], **settings)
    torch.testing.assert_close(
        on_path(Batch(x, None, index), Key(1)).per_sample_B, wanted * np.pi**2 / 8, rtol=1e-6, atol=0
    )


def test_next_in_group() -> None:
    """Row i + 1, and the first after the last, of each group by itself and of any shape; a group of one is its own."""
    value = torch.arange(12).reshape(6, 1, 2)
    assert next_in_group(value, 3)[:, 0, 0].tolist() == [2, 4, 0, 8, 10, 6]
    assert torch.equal(next_in_group(value, 1), value)
    assert torch.equal(torch.cat([next_in_group(part, 3) for part in value.split(3)]), next_in_group(value, 3))


# ------------------------------------------------------------------------------------------------------ the correction


def classed(z: Tensor, t_B: Tensor, label_B: Tensor | None = None) -> Tensor:
    """A field with classes and a null label, 2."""
    shift = torch.tensor([0.3, -0.7, 0.1], dtype=torch.float64)
    label = torch.full((len(z),), 2) if label_B is None else label_B
    return torch.cos(z) * t_B[:, None] + shift[label][:, None]


class Counted:
    nfe = 1

    def __init__(self, function: object) -> None:
        self.function = function

    def __call__(self, x: Tensor, t_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        return self.function(x, t_B, label_B)


def test_correction_is_the_inverse_of_the_bias() -> None:
    """``(1 - c) [(v + c m) / (1 - c)] - c m = v`` to rounding, for any field, contrast and mean."""
    z, t, label, mean = normal(7, 3), torch.linspace(0, 1, 7, dtype=torch.float64), torch.arange(7) % 2, normal(3)
    for contrast in (0.05, 0.5, 0.9):
        biased = Counted(lambda x, t, y, c=contrast: (classed(x, t, y) + c * mean) / (1 - c))
        for y in (label, None):
            found = CorrectedField(biased, contrast, mean)(z, t, y)
            torch.testing.assert_close(found, classed(z, t, y), rtol=0, atol=1e-12)


def test_correction_commutes_with_guidance() -> None:
    """Guided then corrected equals corrected then guided, at twice the cost of a call either way."""
    z, t, label, mean = normal(7, 3), torch.linspace(0, 1, 7, dtype=torch.float64), torch.arange(7) % 2, normal(3)
    field = Counted(classed)
    first = CorrectedField(guided(field, w=2.5, null_label=2), 0.2, mean)
    last = guided(CorrectedField(field, 0.2, mean), w=2.5, null_label=2)
    torch.testing.assert_close(first(z, t, label), last(z, t, label), rtol=0, atol=1e-12)
    assert (CorrectedField(field, 0.2, mean).nfe, first.nfe, last.nfe) == (1, 2, 2)


def test_correction_keeps_the_precision_of_the_state() -> None:
    mean = normal(3).float()
    for dtype in (torch.float32, torch.float64):
        assert CorrectedField(Counted(classed), 0.2, mean)(normal(2, 3).to(dtype), torch.ones(2)).dtype == torch.float64
    exact = CorrectedField(Counted(lambda x, t, y: x), 0.2, mean)
    assert exact(normal(2, 3).bfloat16(), torch.ones(2)).dtype == torch.bfloat16


def test_mean_of_the_data_as_training_sees_it() -> None:
    """In float64 over all rows, more than one piece of them; grey levels as [-1, 1]; with mirrored halves, the mean of
    the samples of many batches."""
    x = torch.randint(0, 256, (5000, 1, 2, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    data = Dataset("noise", x, None, 0, kind="image")
    torch.testing.assert_close(data_mean(data), (x.double() / 127.5 - 1).mean(dim=0).float(), rtol=0, atol=1e-6)
    ramp = torch.tensor([0.0, 0.5, 1.0]).expand(600, 1, 2, 3) + 0.1 * normal(600, 1, 2, 3).float()
    flipped = Dataset("ramp", ramp, None, 0, kind="image", flip=True)
    source = BatchSource(flipped, 600, 0, device=CPU)
    seen = torch.stack([source.batch(step).x.double().mean(dim=0) for step in range(100)]).mean(dim=0)
    # The share of mirrored samples scatters by 1 / (2 sqrt(60,000)), of a difference of one.
    torch.testing.assert_close(data_mean(flipped).double(), seen, rtol=0, atol=4.5 / (2 * 60_000**0.5))
    assert not torch.allclose(data_mean(Dataset("ramp", ramp, None, 0, kind="image")).double(), seen, atol=0.2)


def test_mean_of_latents_that_have_mirrored_copies() -> None:
    """Half of the draws are of the mirrored image's own latent, which is not the latent's mirror image."""
    x, mirrored = torch.full((10, 4, 2, 2), 3.0), torch.full((10, 4, 2, 2), -1.0)
    x[..., 0], mirrored[..., 0] = 5.0, 7.0
    scale = LatentScale.of_channels([1.0] * 4, [0.5] * 4)
    data = Dataset("latents", x, None, 0, kind="latents", latent=scale, mirrored=mirrored, flip=True)
    wanted = torch.tensor([(5 + 7) / 2, (3 - 1) / 2]).sub(1).mul(0.5).expand(4, 2, 2)
    torch.testing.assert_close(data_mean(data), wanted, rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------- through the command line


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contrastive") / "run"
    overrides = ("objective.contrast=0.05", "objective.noise.group_size=8", "train.steps=5", "train.ema=[0.9, 0.5]")
    succeed("teach", "digits-teacher", *SMALL, *EVALUATE, *overrides, "--out", folder)
    return folder


def of_digits() -> Tensor:
    return digits().x.double().mean(dim=0).float()


def test_a_contrastive_teacher_takes_the_mean_along(run: Path) -> None:
    """Beside its weights, in the card with its digest; a plain teacher has neither."""
    card = json.loads((run / "model" / "config.json").read_text())
    assert card["contrast"] == 0.05
    assert set(card["digests"]) == {"model.safetensors", DATA_MEAN}
    page = (run / "model" / "README.md").read_text()
    assert "contrastive, weight 0.05" in page
    assert "noise" not in page.replace("t=1 noise", "")
    torch.testing.assert_close(load_file(run / "model" / DATA_MEAN)["mean"], of_digits(), rtol=0, atol=1e-6)


def test_a_plain_teacher_has_no_contrast(trained: Path) -> None:
    card = json.loads((trained / "teacher" / "model" / "config.json").read_text())
    assert "contrast" not in card
    assert not (trained / "teacher" / "model" / DATA_MEAN).exists()


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_contrastive_teacher_is_corrected(run: Path, guidance: float) -> None:
    """By default, around its guidance: ``.95 v - .05 E[x]``. Not where that is switched off."""
    corrected, biased = (
        load_teacher(
            RunTeacher(path=str(run), guidance=guidance, correct_contrast=correct), DigitsConfig(), digits(), CPU
        )
        for correct in (True, False)
    )
    x, t, label = normal(6, 1, 8, 8).float(), torch.linspace(0.1, 1, 6), torch.arange(6)
    v = biased.field(x, t, label)
    torch.testing.assert_close(corrected.field(x, t, label), 0.95 * v - 0.05 * of_digits(), rtol=0, atol=1e-6)
    assert (corrected.name, biased.name) == ("digits-teacher (corrected)", "digits-teacher")
    assert corrected.field.nfe == biased.field.nfe == (1 if guidance == 1 else 2)
    if guidance == 1:
        torch.testing.assert_close(v, NetworkField(biased.net)(x, t, label), rtol=0, atol=0)


@pytest.mark.parametrize("correct", [True, False])
def test_students_learn_from_the_corrected_field(run: Path, correct: bool) -> None:
    """The field in the objective that a student's config builds."""
    config = load_config(
        "digits-meanflow", [f"teacher.path={run}", f"teacher.correct_contrast={correct}", "objective.velocity=teacher"]
    )
    teacher = load_teacher(config.teacher, config.data, digits(), CPU)
    (stage,) = plan(config, teacher, digits())
    velocity = stage.build(nn.Linear(1, 1), None).velocity
    assert isinstance(velocity, TeacherVelocity)
    assert isinstance(velocity.field, CorrectedField) == correct


def test_another_average_keeps_the_mean(run: Path, tmp_path: Path) -> None:
    """``fewstep average`` writes the mean along: the other weights teach corrected as well, and are sampled."""
    succeed("average", run, "--ema", "0.5", "--out", tmp_path / "other")
    card = json.loads((tmp_path / "other" / "model" / "config.json").read_text())
    assert card["contrast"] == 0.05
    kept = load_file(tmp_path / "other" / "model" / DATA_MEAN)["mean"]
    assert torch.equal(kept, load_file(run / "model" / DATA_MEAN)["mean"])
    teacher = load_teacher(RunTeacher(path=str(tmp_path / "other")), DigitsConfig(), digits(), CPU)
    assert isinstance(teacher.field, CorrectedField)
    assert load_model(tmp_path / "other", CPU).card["ema"] == "0.5"


def test_a_student_of_a_contrastive_teacher_is_not_corrected_again(run: Path, tmp_path: Path) -> None:
    """Its card has no contrast: it has learned the corrected field."""
    overrides = (*SMALL[:2], *EVALUATE, f"teacher.path={run}", "train.steps=2")
    succeed("distill", "digits-meanflow", *overrides, "--out", tmp_path / "s")
    assert "contrast" not in json.loads((tmp_path / "s" / "model" / "config.json").read_text())
    assert not (tmp_path / "s" / "model" / DATA_MEAN).exists()
