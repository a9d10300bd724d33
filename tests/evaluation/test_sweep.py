"""The sweep: pairing, the teacher gap, the floor, and what a row says, against values worked out here."""

import base64
import io
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fewstep.data.dataset import Dataset
from fewstep.evaluation.config import EvaluateConfig
from fewstep.evaluation.features import build_extractor
from fewstep.evaluation.floor import real_floor
from fewstep.evaluation.reference import reference_features
from fewstep.evaluation.results import Row
from fewstep.evaluation.strips import samples_grid, samples_strip
from fewstep.evaluation.sweep import Candidate, draw, sweep
from fewstep.keys import Key
from fewstep.sampling import Samples
from fewstep.sources import Source, gaussian

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shifted:
    """A 'model' whose sample is its noise, scaled, plus its label and an offset per step: everything is known."""

    scale: float
    offset: float
    name: str = "shifted"
    source: Source = gaussian

    def check(self, steps: int) -> None:
        if steps == 3:
            raise ValueError("not for 3 steps")

    def __call__(self, steps: int, noise: Tensor, label_B: Tensor | None, key: Key, index_B: Tensor) -> Samples:
        label = 0 if label_B is None else label_B[:, None].to(noise)
        return Samples(self.scale * noise + label + self.offset / steps, nfe=2 * steps)


def points(n: int = 400, num_classes: int = 0) -> Dataset:
    x = Key(7).normal("data", torch.arange(n), (2,))
    return Dataset("cloud", x, None, num_classes, kind="points")


def candidate(name: str, role: str, sampler: Shifted, steps: tuple[int, ...]) -> Candidate:
    return Candidate(name, role, "none", sampler, steps, 1.5, f"digest of {name}", 11)  # type: ignore[arg-type]


def test_rows_are_paired_and_say_what_was_done() -> None:
    """Student minus teacher is exactly the offset, sample by sample, so the gap is its size; NFE is the sampler's."""
    data = points()
    seen: list[tuple[str, int, int]] = []

    def report(row: Row, done: int, total: int) -> None:
        seen.append((row.model, done, total))

    rows, reference = sweep(
        [candidate("s", "student", Shifted(1.0, 0.8), (1, 2)), candidate("t", "teacher", Shifted(1.0, 0.0), (4, 1))],
        data,
        [build_extractor("identity")],
        EvaluateConfig(n=300, batch_size=128, features=("identity",)),
        seed=5,
        device=CPU,
        report=report,
    )
    assert [(row.model, row.steps, row.nfe) for row in rows] == [("t", 1, 2), ("t", 4, 8), ("s", 1, 2), ("s", 2, 4)]
    assert rows[2].metrics["teacher_gap"].value == pytest.approx(0.8, rel=1e-6)
    assert rows[3].metrics["teacher_gap"].value == pytest.approx(0.4, rel=1e-6)
    assert "teacher_gap" not in rows[0].metrics
    assert (rows[2].n, rows[2].seed, rows[2].guidance, rows[2].params) == (300, 5, 1.5, 11)
    assert [done for _, done, _ in seen] == [1, 2, 3, 4]
    assert {total for _, _, total in seen} == {4}
    assert (reference["dataset"], reference["n"]) == ("cloud", 400)
    # Same noise, shifted mean: the Fréchet distance differs by what the means say, exactly.
    mean = Key(5).normal("noise", torch.arange(300), (2,)).double().mean(0) - data.x.double().mean(0)
    difference = ((mean + 0.8).square() - mean.square()).sum()
    gained = rows[2].metrics["fd_identity"].value - rows[0].metrics["fd_identity"].value
    assert gained == pytest.approx(float(difference), rel=1e-6)


def test_a_step_count_the_model_refuses_stops_the_sweep_before_any_sampling() -> None:
    with pytest.raises(ValueError, match="not for 3 steps"):
        sweep(
            [candidate("s", "student", Shifted(1.0, 0.0), (1, 3))],
            points(),
            [build_extractor("identity")],
            EvaluateConfig(n=100, features=("identity",)),
            seed=0,
            device=CPU,
            report=lambda row, done, total: pytest.fail("sampled first"),
        )


def test_labels_are_balanced_and_batches_change_nothing() -> None:
    data = points(num_classes=3)
    whole = draw(Shifted(1.0, 0.0), 1, data, n=20, batch_size=20, seed=2, device=CPU)
    parts = draw(Shifted(1.0, 0.0), 1, data, n=20, batch_size=7, seed=2, device=CPU)
    assert whole.label is not None
    assert whole.label.tolist() == [i % 3 for i in range(20)]
    assert torch.equal(whole.x, parts.x)
    noise = Key(2).normal("noise", torch.arange(20), (2,))
    torch.testing.assert_close(whole.x - noise, whole.label[:, None].expand(20, 2).float())


def test_the_floor_follows_the_bias_of_the_frechet_distance() -> None:
    """For N(0, I_2) samples the expected distance of two samples is ``c (1/n1 + 1/n2)`` with ``c = D + D (D + 1) / 4``.

    The mean term gives ``D (1/n1 + 1/n2)``. A covariance error ``dS`` costs ``|dS|_F^2 / 4``, and ``E|dS|_F^2`` is
    ``(D^2 + D) / n`` per sample. With D = 2, c = 3.5; 4 splits of 4,000 points leave an error of some 20 %.
    """
    reference = reference_features(build_extractor("identity"), points(4000), CPU)
    floor = real_floor(reference, n=10_000)["fd_identity"]
    expected = 3.5 * (1 / 4000 + 1 / 10_000)
    assert 0.5 * expected < floor < 1.8 * expected


def decode(strip: str | bytes) -> np.ndarray:
    content = base64.b64decode(strip) if isinstance(strip, str) else strip
    return np.asarray(Image.open(io.BytesIO(content)))


def test_image_strips_hold_the_first_samples_in_order() -> None:
    images = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    strip = samples_strip(images, "image")
    assert strip is not None
    assert decode(strip).shape == (8, 80)
    for i in range(10):
        np.testing.assert_array_equal(decode(strip)[:, 8 * i : 8 * i + 8], images[i, 0].numpy())
    grid = samples_grid(images, "image")
    assert grid is not None
    # Twelve images in rows of ten, enlarged six times: image 11 is the second of the second row.
    np.testing.assert_array_equal(decode(grid)[48:96:6, 48:96:6], images[11, 0].numpy())


def test_points_are_drawn_with_y_upwards() -> None:
    strip = samples_strip(torch.tensor([[0.75, 0.75]] * 50), "points")
    assert strip is not None
    rows, columns = np.nonzero(decode(strip) < 128)
    assert rows.mean() < 48 < columns.mean()
    assert samples_strip(torch.zeros(5, 3), "points") is None


def test_what_was_learned_by_heart_shows_beside_held_out_data() -> None:
    """Half of the samples are nearer to the training set where nothing is copied, nearly all where they are copies."""
    train, held_out = points(400), replace(points(800), x=points(800).x[400:])

    @dataclass(frozen=True)
    class Copies(Shifted):
        def __call__(self, steps: int, noise: Tensor, label_B: Tensor | None, key: Key, index_B: Tensor) -> Samples:
            return Samples(train.x[index_B % 400] + 1e-3 * noise, 1)

    found = {}
    for name, sampler in (("fresh", Shifted(1.0, 0.0)), ("copies", Copies(1.0, 0.0))):
        rows, _ = sweep(
            [candidate(name, "student", sampler, (1,))],
            train,
            [build_extractor("identity")],
            EvaluateConfig(n=400, features=("identity",)),
            seed=5,
            device=CPU,
            held_out=held_out,
        )
        found[name] = rows[0].metrics["memorised_identity"]
    assert found["copies"].value > 0.95
    # Its interval is given both sets, which are of 400 random points each: their own luck comes on top.
    assert found["fresh"].value == pytest.approx(0.5, abs=0.1)
