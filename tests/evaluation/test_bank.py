"""Kept rows: an evaluation that was stopped goes on, and what has changed is measured anew."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.data.dataset import Dataset
from fewstep.evaluation import sweep as sweeping
from fewstep.evaluation.bank import Bank, Finished
from fewstep.evaluation.config import EvaluateConfig
from fewstep.evaluation.features import build_extractor
from fewstep.evaluation.results import Row, row_json
from fewstep.evaluation.sweep import Candidate, sweep
from fewstep.keys import Key
from fewstep.sampling import MapSampler, OdeSampler
from fewstep.teachers.analytic import ExactMap, GaussianTeacher

CPU = torch.device("cpu")
CLOCKS = ("latency_ms", "latency_p95_ms", "images_per_s", "batch")
CONFIG = EvaluateConfig(n=100, batch_size=64, features=("identity",))


class Stopped(Exception):
    pass


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The rows that were measured, and not found."""
    found: list[tuple[str, int]] = []
    measure = sweeping.measure

    def noted(candidate: Candidate, steps: int, *rest: Any) -> Finished:
        found.append((candidate.name, steps))
        return measure(candidate, steps, *rest)

    monkeypatch.setattr(sweeping, "measure", noted)
    return found


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The step counts at which samples were drawn."""
    found: list[int] = []
    draw = sweeping.draw

    def noted(sampler: Any, steps: int, *rest: Any, **named: Any) -> Any:
        found.append(steps)
        return draw(sampler, steps, *rest, **named)

    monkeypatch.setattr(sweeping, "draw", noted)
    return found


def run(
    bank: Bank, *, stop: int | None = None, seed: int = 3, n: int = 100, digest: str = "d", teacher_steps: Any = (8, 2)
) -> list[dict[str, Any]]:
    def report(row: Row, done: int, total: int) -> None:
        if done == stop:
            raise Stopped

    field = GaussianTeacher(0.3, 0.5)
    student = MapSampler({0: ExactMap(GaussianTeacher(0.2, 0.4))}, "jumps")
    candidates = [
        Candidate("t", "teacher", "exact", OdeSampler(field), teacher_steps, 1.0, "t", 0),
        Candidate("s", "student", "exact", student, (1, 2), 1.0, digest, 0),
    ]
    data = Dataset("cloud", 0.5 * Key(9).normal("data", torch.arange(200), (2,)), None, 0, kind="points")
    config = CONFIG.model_copy(update={"n": n})
    rows, _ = sweep(
        candidates, data, [build_extractor("identity")], config, seed=seed, device=CPU, bank=bank, report=report
    )
    documents = json.loads(json.dumps([row_json(row) for row in rows]))
    for document in documents:
        for clock in CLOCKS:
            document.pop(clock, None)
    return documents


def test_a_stopped_evaluation_goes_on_to_the_same_rows(
    tmp_path: Path, measured: list[tuple[str, int]], drawn: list[int]
) -> None:
    whole = run(Bank())
    measured.clear()
    with pytest.raises(Stopped):
        run(Bank(tmp_path), stop=3)
    assert measured == [("t", 8), ("t", 2), ("s", 2)]
    assert len(list(tmp_path.glob("*-samples-0-of-1.safetensors"))) == 1
    measured.clear()
    drawn.clear()
    assert run(Bank(tmp_path)) == whole  # with the gap and the differences to samples of the earlier call
    assert measured == [("s", 1)]
    assert drawn == [1]  # the teacher's samples were kept
    assert not list(tmp_path.glob("*-samples-*"))
    measured.clear()
    assert run(Bank(tmp_path)) == whole
    assert measured == []


def test_samples_that_were_not_kept_are_drawn_again(tmp_path: Path, drawn: list[int]) -> None:
    whole = run(Bank())
    with pytest.raises(Stopped):
        run(Bank(tmp_path), stop=3)
    for path in tmp_path.glob("*-samples-*"):
        path.write_bytes(path.read_bytes()[:50])  # damaged: as if it were not there
    drawn.clear()
    assert run(Bank(tmp_path)) == whole
    assert drawn == [8, 1]


@pytest.mark.parametrize("change", ["seed", "n", "where", "fresh", "damage"])
def test_what_has_changed_is_measured_anew(change: str, tmp_path: Path, measured: list[tuple[str, int]]) -> None:
    run(Bank(tmp_path))
    measured.clear()
    if change == "damage":
        for path in tmp_path.glob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:200])
    bank = Bank(tmp_path, fresh=change == "fresh", where={"torch": "other"} if change == "where" else {})
    run(bank, seed=4 if change == "seed" else 3, n=101 if change == "n" else 100)
    assert len(measured) == 4


def test_other_weights_are_another_row_and_another_anchor_another_difference(
    tmp_path: Path, measured: list[tuple[str, int]]
) -> None:
    run(Bank(tmp_path))
    measured.clear()
    run(Bank(tmp_path), digest="retrained")
    assert measured == [("s", 2), ("s", 1)]
    measured.clear()
    found = run(Bank(tmp_path), teacher_steps=(16,))
    assert measured == [("t", 16), ("s", 2), ("s", 1)]
    assert found == run(Bank(), teacher_steps=(16,))


def test_a_row_survives_with_what_it_does_not_know(tmp_path: Path) -> None:
    bank = Bank(tmp_path)
    row = Row("a", "student", "x", 1, 1, "jumps", 1.0, 5, 0, {}, None, None, 3, "aa", per_class={"p": [1.0, 2.0]})
    bank.keep("k", Finished(row, {"fd": torch.arange(3.0)}))
    found = bank.find("k")
    assert found is not None
    assert found.row == row
    assert torch.equal(found.influences["fd"], torch.arange(3.0))
    assert bank.find("other") is None
    assert replace(bank, fresh=True).find("k") is None
