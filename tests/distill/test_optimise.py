"""Rates and optimisers by hand."""

import math

import pytest
import torch
from torch import nn

from fewstep.distill.config import TrainConfig
from fewstep.distill.optimise import build_optimizer, learning_rate


def test_learning_rate_by_hand() -> None:
    """Four steps of warm-up to the full rate, then eight of the schedule, whose zero lies one step past the end."""

    def rates(schedule: str, warmup: int = 4, reference: int = 0) -> list[float]:
        config = TrainConfig(lr=2.0, lr_schedule=schedule, warmup_steps=warmup, lr_reference_steps=reference)
        return [learning_rate(config, step, 12) for step in range(12)]

    warm = [0.5, 1.0, 1.5, 2.0]
    assert rates("constant") == [*warm, *8 * [2.0]]
    assert rates("linear") == [*warm, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25]
    half = math.sqrt(0.5)
    cosine = rates("cosine")
    assert cosine[:4] == warm
    assert [cosine[i] for i in (4, 6, 8, 10)] == pytest.approx([2, 1 + half, 1, 1 - half], abs=1e-12)
    assert rates("linear", warmup=0)[:2] == pytest.approx([2, 2 * 11 / 12], abs=1e-12)
    # A warm-up longer than the run reaches the full rate at its end.
    assert rates("cosine", warmup=100) == pytest.approx([2 * (k + 1) / 12 for k in range(12)], abs=1e-12)
    # The inverse square root starts from the last rate of the warm-up, or keeps the full rate up to a reference.
    assert rates("inverse_sqrt") == pytest.approx(warm + [2 * math.sqrt(4 / k) for k in range(5, 13)], abs=1e-12)
    assert rates("inverse_sqrt", reference=9)[4:] == pytest.approx(
        5 * [2] + [2 * math.sqrt(9 / k) for k in (10, 11, 12)]
    )
    assert rates("inverse_sqrt", warmup=0) == pytest.approx([2 / math.sqrt(k) for k in range(1, 13)], abs=1e-12)


def trajectory(name: str, steps: int, weight_decay: float = 0.0) -> list[float]:
    """A single weight under gradients 1, -2, 3, -4, ... at rate 0.1."""
    config = TrainConfig(optimizer=name, lr=0.1, betas=(0.9, 0.99), weight_decay=weight_decay)
    weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = build_optimizer([weight], config)
    path = []
    for k in range(steps):
        weight.grad = torch.full_like(weight, (k + 1) * (-1) ** k)
        optimizer.step()
        path.append(float(weight.detach()))
    return path


def by_hand(name: str, steps: int, decay: float) -> list[float]:
    """Adam (1412.6980, algorithm 1), decoupled decay (1711.05101), rectification (1908.03265, algorithm 2)."""
    w, m, v, b1, b2, lr = 1.0, 0.0, 0.0, 0.9, 0.99, 0.1
    longest = 2 / (1 - b2) - 1
    path = []
    for k in range(steps):
        t = k + 1
        g = float(t * (-1) ** k)
        if name == "adamw":
            w -= lr * decay * w
        else:
            g += decay * w
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        mean, size = m / (1 - b1**t), math.sqrt(v / (1 - b2**t)) + 1e-8
        if name != "radam":
            w -= lr * mean / size
        else:
            length = longest - 2 * t * b2**t / (1 - b2**t)
            if length > 5:
                rectified = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
                w -= lr * mean * math.sqrt(rectified) / size
            else:
                w -= lr * mean
        path.append(w)
    return path


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("name", ["adamw", "adam", "radam"])
def test_optimisers_by_hand(name: str, decay: float) -> None:
    """Twelve steps: the rectification of RAdam sets in at the sixth."""
    assert trajectory(name, 12, decay) == pytest.approx(by_hand(name, 12, decay), rel=1e-6, abs=1e-8)


def test_the_optimisers_differ() -> None:
    """The control of the test above."""
    ends = {(name, decay): by_hand(name, 12, decay)[-1] for name in ("adamw", "adam", "radam") for decay in (0.0, 0.5)}
    assert ends.pop(("adamw", 0.0)) == ends[("adam", 0.0)]
    assert min(abs(a - b) for a in ends.values() for b in ends.values() if a != b) > 1e-3
    assert len(set(ends.values())) == 5
