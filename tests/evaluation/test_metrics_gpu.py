"""Metrics on an accelerator are those of the CPU; skipped where there is none (``pytest -m gpu``)."""

import pytest
import torch

from fewstep.data.load import digits
from fewstep.evaluation.config import EvaluateConfig
from fewstep.evaluation.features import build_extractor
from fewstep.evaluation.frechet import frechet_distance, moments
from fewstep.evaluation.results import Measured
from fewstep.evaluation.sweep import sweep_images

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")]

DEVICES = (torch.device("cpu"), torch.device("cuda"))


def test_every_metric_of_images_is_that_of_the_cpu() -> None:
    """Fréchet and kernel distances are float64; of a share two samples in 400 may change sides, at a ball's edge."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (400, 1, 8, 8), dtype=torch.uint8, generator=generator)
    found: list[dict[str, Measured]] = []
    for device in DEVICES:
        extractors = [build_extractor(name, device) for name in ("digits", "pixels", "random_conv", "pca")]
        row, _ = sweep_images(images.to(device), digits(), extractors, EvaluateConfig(n=400), device=device)
        found.append(dict(row.metrics))
    cpu, gpu = found
    assert gpu.keys() == cpu.keys()
    for name in cpu:
        share = name.startswith(("precision", "recall", "density", "coverage", "authentic", "accuracy"))
        assert gpu[name].value == pytest.approx(cpu[name].value, rel=1e-4, abs=5e-3 if share else 1e-6), name


@pytest.mark.parametrize("rows", [40, 2000], ids=["fewer than dimensions", "more"])
def test_a_frechet_distance_of_singular_covariances(rows: int) -> None:
    """A column that is constant sends the factor by way of ``eigh``."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(rows, 100, generator=generator).index_fill(1, torch.tensor([7]), 3.0) for _ in range(2))
    cpu, gpu = (frechet_distance(moments(x.to(device)), moments(y.to(device))) for device in DEVICES)
    assert gpu == pytest.approx(cpu, rel=1e-6)
