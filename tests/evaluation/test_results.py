"""Merging results: one row per measurement, all provenance, only what compares in one table; means over seeds."""

import json
import math
import statistics
from dataclasses import replace

import pytest

from fewstep.errors import UsageError
from fewstep.evaluation.results import Measured, Model, Report, Row, merge, over_seeds

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


# Several trainings ---------------------------------------------------------------------------------------------------

VALUES = (0.30, 0.42, 0.33)
"""Mean 0.35; deviations -0.05, 0.07, -0.02 with squares 0.0025 + 0.0049 + 0.0004 = 0.0078, and sd sqrt(0.0039)."""


def of_seed(seed: int, value: float, **changes: object) -> Row:
    metrics = {"fd_pixels": Measured(value, 0.1, 0.9), "recall_pixels": Measured(1 - value)}
    times = {"latency_ms": (1.0, 9.0, 2.0)[seed], "images_per_s": (10.0, 30.0, 20.0)[seed]}
    own = {"seed": seed, "metrics": metrics, "digest": f"d{seed}", "samples_png": f"png{seed}", **times}
    return replace(ROW, **{**own, **changes})


def test_mean_and_standard_deviation_by_hand() -> None:
    merged = over_seeds({seed: report(of_seed(seed, value)) for seed, value in enumerate(VALUES)})
    (row,) = merged.rows
    fd, recall = row.metrics["fd_pixels"], row.metrics["recall_pixels"]
    assert fd.value == pytest.approx(0.35)
    assert fd.sd == pytest.approx(math.sqrt(0.0039))
    assert fd.sd == pytest.approx(statistics.stdev(VALUES))
    assert (fd.low, fd.high) == (None, None)  # an interval of one training is none of their mean
    assert (recall.value, recall.sd) == (pytest.approx(0.65), pytest.approx(math.sqrt(0.0039)))
    assert (row.latency_ms, row.images_per_s) == (2.0, 20.0)
    assert (row.seeds, row.seed, row.samples_png, row.digest) == (3, 0, "png0", "d0, d1, d2")
    assert merged.reference["training_seeds"] == [0, 1, 2]
    assert merged.reference["dataset"] == "digits"
    assert merged.environment == {"processor": "one"}


def test_each_model_and_step_count_has_its_own_mean() -> None:
    seeds = {}
    for seed, value in enumerate(VALUES):
        rows = [of_seed(seed, value), of_seed(seed, 2 * value, steps=2, nfe=2), of_seed(seed, 3 * value, model="b")]
        seeds[seed] = report(*(rows if seed != 1 else rows[:2]))
    merged = {(row.model, row.steps): row for row in over_seeds(seeds).rows}
    assert list(merged) == [("a", 1), ("a", 2), ("b", 1)]
    assert [row.metrics["fd_pixels"].value for row in merged.values()] == pytest.approx([0.35, 0.7, 0.945])
    assert [row.seeds for row in merged.values()] == [3, 3, 2]
    assert merged["b", 1].digest == "d0, d2"


def test_one_seed_is_itself() -> None:
    alone = report(of_seed(0, 0.3))
    assert over_seeds({0: alone}) is alone


def test_a_value_that_is_not_finite_leaves_no_mean() -> None:
    merged = over_seeds({0: report(of_seed(0, 0.3)), 1: report(of_seed(1, math.nan))})
    found = merged.rows[0].metrics["fd_pixels"]
    assert math.isnan(found.value)
    assert found.sd is None


def test_training_cost_is_a_median_and_every_teacher_is_named() -> None:
    def trained(seed: int, seconds: float) -> Report:
        model = Model("a", "student", "meanflow", 3, 10, 160, seconds, teacher_digest=f"t{seed}")
        return replace(report(of_seed(seed, 0.3), machine=f"m{seed}"), models=(model,))

    merged = over_seeds({seed: trained(seed, seconds) for seed, seconds in enumerate((5.0, 50.0, 6.0))})
    assert merged.models == (Model("a", "student", "meanflow", 3, 10, 160, 6.0, teacher_digest="t0, t1, t2"),)
    assert merged.environment == {f"seed {seed}": {"processor": f"m{seed}"} for seed in range(3)}


def test_seeds_measured_against_other_data_have_no_mean() -> None:
    with pytest.raises(UsageError, match="do not compare: reference dataset"):
        over_seeds({0: report(of_seed(0, 0.3)), 1: report(of_seed(1, 0.3), dataset="letters")})


def test_files_of_before_and_after_spreads_are_one_schema() -> None:
    merged = over_seeds({seed: report(of_seed(seed, value)) for seed, value in enumerate(VALUES)})
    document = json.loads(json.dumps(merged.to_json()))
    assert document["schema"] == 1
    assert Report.from_json(document) == merged
    assert document["rows"][0]["seeds"] == 3
    # What holds one training is what earlier versions wrote and read: no key that they do not know.
    single = report(ROW).to_json()
    assert set(single["rows"][0]["metrics"]["fd_pixels"]) == {"value", "low", "high"}
    assert "seeds" not in single["rows"][0]
    assert Report.from_json(single).rows[0].seeds == 1
