"""The examples run: each has a ``main`` with sizes, so they cannot rot."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from oracle import mixture_velocity

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_teacher_is_the_exact_velocity() -> None:
    example = load("own_teacher")
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = example.MEANS.double().numpy()
    for t in (0.1, 0.5, 0.9):
        v = example.MyTeacher()(x, torch.full((16,), t, dtype=torch.float64))
        exact = mixture_velocity(x.numpy(), t, np.full(3, 1 / 3), means, np.full(3, example.STD))
        np.testing.assert_allclose(v.numpy(), exact, atol=1e-6)


def test_own_teacher_distils_a_little() -> None:
    """After 150 steps one jump already beats the data's mean, which is one Euler step of any teacher."""
    example = load("own_teacher")
    distances = example.main(steps=150, n=400)
    assert len(distances) == 3
    spread = example.MEANS.var(dim=0, correction=0).sum() + 2 * example.STD**2
    assert distances[0] < 0.5 * float(spread)
