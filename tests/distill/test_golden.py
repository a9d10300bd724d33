"""Golden losses: the first 20 steps of each objective, as text in ``tests/golden``.

They say nothing about what is right, only that it has not changed. A refactoring must reproduce them; a change of
numerics rewrites them with ``python tests/distill/rewrite_golden.py`` and says why. The tolerance of 1e-4 is for the
order of summation, which differs between machines, libraries and thread counts and which twenty steps of Adam amplify
(measured: 1.4e-7 between two instruction sets).
"""

from pathlib import Path

import pytest
import tiny

STEPS = 20
FOLDER = Path(__file__).parents[1] / "golden"


def losses(name: str) -> list[float]:
    return [state.loss for state in tiny.run(tiny.OBJECTIVES[name](), STEPS)]


def as_text(values: list[float]) -> str:
    return "".join(f"{step} {value:.9g}\n" for step, value in enumerate(values, start=1))


@pytest.mark.parametrize("name", tiny.OBJECTIVES)
def test_losses_are_the_recorded_ones(name: str) -> None:
    recorded = [line.split() for line in (FOLDER / f"{name}.txt").read_text().splitlines()]
    assert [int(step) for step, _ in recorded] == list(range(1, STEPS + 1))
    assert losses(name) == pytest.approx([float(loss) for _, loss in recorded], rel=1e-4)


def test_every_record_has_its_objective() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(tiny.OBJECTIVES)
