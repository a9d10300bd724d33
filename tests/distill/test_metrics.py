"""Metrics add up: over microbatches, over steps, over a checkpoint; a NaN loss is never left out of them."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.checkpoint import RunDirectory
from fewstep.distill.log import MetricsLog
from fewstep.distill.metrics import TIME_BINS, Sums, sums_of
from fewstep.distill.objective import LossOutput


def output(loss: list[float], t: list[float], jvp: list[float] | None = None) -> LossOutput:
    def tensor(values: list[float]) -> Tensor:
        return torch.tensor(values)

    diagnostics = {} if jvp is None else {"jvp_norm": tensor(jvp)}
    return LossOutput(tensor(loss), 2 * tensor(loss), tensor(t), diagnostics)


def test_means_by_hand() -> None:
    """Two microbatches of two and three samples; ``jvp_norm`` applies to two of the five; bins of an eighth."""
    parts = [
        output([1.0, 2.0], [0.0, 0.1], [math.nan, 3.0]),
        output([3.0, 4.0, 5.0], [0.13, 0.99, 1.0], [math.nan, 5.0, math.nan]),
    ]
    means = sums_of(parts, [0.25]).means()
    by_time = means.pop("residual_by_time")
    assert means == {"loss": 3.0, "residual": 6.0, "jvp_norm": 4.0, "grad_norm": 0.25}
    assert by_time[:2] == [3.0, 6.0]
    assert all(math.isnan(value) for value in by_time[2:7])
    assert by_time[7] == 9.0
    assert len(by_time) == TIME_BINS


def test_sums_of_steps_are_sums_of_their_samples() -> None:
    parts = [output([1.0, 2.0], [0.0, 0.1]), output([7.0, 4.0], [0.2, 0.9])]
    one, two = (sums_of([part], [norm]) for part, norm in zip(parts, (1.0, 3.0), strict=True))
    both = (one + two).means()
    assert (both["loss"], both["grad_norm"]) == (3.5, 2.0)
    assert both["residual_by_time"][:2] == [3.0, 14.0]
    with pytest.raises(ValueError, match="do not add up"):
        one + Sums(("other",), one.value)
    with pytest.raises(ValueError, match="do not add up"):
        one + Sums(one.names[::-1], one.value)


def test_a_loss_that_is_not_a_number_stays_one() -> None:
    means = sums_of([output([1.0, math.nan], [0.0, 0.1])], [1.0]).means()
    assert math.isnan(means["loss"])
    assert math.isnan(means["residual"])


def test_a_window_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    """Three steps logged at once, or two, a checkpoint and one: the same line but for the clock."""
    steps = [(output([k / 3, 1 / k], [0.1, 0.2]), 1 / k) for k in (1, 2, 3)]
    logs = []
    for name in ("whole", "resumed"):
        run = RunDirectory(tmp_path / name)
        run.path.mkdir()
        log = MetricsLog(run, 2, step=0, seconds=0.0)
        for number, (found, norm) in enumerate(steps):
            if name == "resumed" and number == 2:
                log = MetricsLog(run, 2, step=2, seconds=1.0, window=log.window_state())
            log.add([found], norm)
        logs.append(log.write(3, "stage", 1e-3, 1.5))
        assert log.window_state() is None
    assert logs[0] == pytest.approx(logs[1], rel=1e-14)
    assert logs[0]["loss"] == pytest.approx((1 / 3 + 1 + 2 / 3 + 1 / 2 + 1 + 1 / 3) / 6)


def test_a_number_that_applies_to_no_sample(tmp_path: Path) -> None:
    """Is null in the file, which knows no NaN, and not among the numbers handed on."""
    run = RunDirectory(tmp_path)
    log = MetricsLog(run, 2, step=0, seconds=0.0)
    log.add([output([1.0, 2.0], [0.1, 0.2], [math.nan, math.nan])], 0.5)
    assert log.write(1, "stage", 1e-3, 1.0) == {"loss": 1.5, "residual": 3.0, "grad_norm": 0.5}
    (line,) = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert line["jvp_norm"] is None


def test_rates_are_of_the_window(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    log = MetricsLog(run, 64, step=10, seconds=2.0)
    for step, seconds in ((12, 3.0), (16, 3.5)):
        log.add([output([1.0], [0.5])], 1.0)
        log.write(step, "stage", 1e-3, seconds)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["samples_per_s"] for line in lines] == [128.0, 512.0]
    assert all(line["peak_memory_mib"] > 50 for line in lines)
    assert lines[0]["residual_by_time"] == [None, None, None, None, 2.0, None, None, None]
