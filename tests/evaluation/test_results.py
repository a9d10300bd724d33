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


def test_device_minutes_of_seeds_are_a_median_too() -> None:
    """9, 8 and 2 minutes by the clock, on 1, 2 and 4 devices: 9, 16 and 8 device-minutes."""

    def trained(seed: int, minutes: float, processes: int, device: str) -> Report:
        model = Model("a", "student", "meanflow", 3, 10, 160, 60 * minutes)
        model = replace(model, processes=processes, device=device, device_type="cuda")
        return replace(report(of_seed(seed, 0.3)), models=(model,))

    cases = ((9.0, 1, "H100"), (8.0, 2, "H100"), (2.0, 4, "H200"))
    (merged,) = over_seeds({seed: trained(seed, *case) for seed, case in enumerate(cases)}).models
    assert (merged.train_s, merged.device_minutes) == (480.0, 9.0)
    assert (merged.device, merged.device_type) == ("H100, H200", "cuda")
    (alike,) = over_seeds({seed: trained(seed, minutes, 2, "H100") for seed, minutes in enumerate((1.0, 3.0))}).models
    assert (alike.device_s, alike.device_minutes) == (None, 4.0)


def test_a_model_without_a_device_is_written_as_before() -> None:
    bare = Model("a", "student", "meanflow", 3, 10, 160, 60.0)
    document = replace(report(ROW), models=(bare,)).to_json()
    assert set(document["models"][0]) == {
        *("name", "role", "objective", "params", "train_steps", "train_samples", "train_s", "teacher_digest"),
    }
    assert bare.device_minutes is None  # nobody knows on how many devices
    told = replace(bare, processes=4, device="H100", device_type="cuda")
    assert told.device_minutes == 4.0
    assert replace(told, train_s=0.0).device_minutes is None
    moved = replace(told, device_s=90.0)
    assert moved.device_minutes == 1.5
    document = json.loads(json.dumps(replace(report(ROW), models=(told, moved)).to_json()))
    assert Report.from_json(document).models == (told, moved)


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
