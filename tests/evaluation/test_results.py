"""Merging results: one row per measurement, all provenance, and no table of things that do not compare."""

from dataclasses import replace

import pytest

from fewstep.errors import UsageError
from fewstep.evaluation.results import Measured, Model, Report, Row, merge

ROW = Row(
    model="a",
    role="student",
    objective="meanflow",
    steps=1,
    nfe=1,
    sampler="jumps",
    guidance=1.0,
    n=10,
    seed=0,
    metrics={"fd_pixels": Measured(0.5)},
    latency_ms=1.0,
    images_per_s=10.0,
    params=3,
    digest="aa",
)
TEACHER = replace(ROW, model="t", role="teacher", digest="tt", steps=64, nfe=64)
REFERENCE = {"dataset": "digits", "n": 1797, "extractors": {"pixels": {"dim": 64}}, "protocol": {}}


def report(*rows: Row, machine: str = "one", **reference: object) -> Report:
    models = tuple(Model(row.model, row.role, row.objective, 3, 1, 1, 1.0) for row in rows)
    return Report(rows, models, {**REFERENCE, **reference}, {"processor": machine})


def test_a_shared_teacher_appears_once() -> None:
    other = replace(ROW, model="b", digest="bb")
    merged = merge([report(ROW, TEACHER), report(other, TEACHER)])
    assert [(row.model, row.steps) for row in merged.rows] == [("a", 1), ("t", 64), ("b", 1)]
    assert [model.name for model in merged.models] == ["a", "t", "b"]
    assert merged.environment == {"processor": "one"}


def test_retrained_weights_are_another_row() -> None:
    merged = merge([report(ROW), report(replace(ROW, digest="new"))])
    assert [row.digest for row in merged.rows] == ["aa", "new"]


def test_different_machines_are_both_named() -> None:
    merged = merge([report(ROW), report(replace(ROW, model="b"), machine="two")])
    assert merged.environment == {"a": {"processor": "one"}, "b": {"processor": "two"}}


@pytest.mark.parametrize("part", ["dataset", "n", "extractors", "protocol"])
def test_other_references_do_not_merge(part: str) -> None:
    with pytest.raises(UsageError, match=f"do not compare: reference {part}"):
        merge([report(ROW), report(ROW, **{part: "other"})])


def test_json_round_trip() -> None:
    whole = report(ROW, TEACHER)
    assert Report.from_json(whole.to_json()) == whole
