"""``results.csv``: one line per number, at full precision, for whoever draws figures of their own."""

import csv
import io
from collections.abc import Iterator

from fewstep.evaluation.report.answer import Series, series
from fewstep.evaluation.results import Measured, Report, Row

COLUMNS = (
    *("run", "model", "nfe", "steps", "metric", "value", "ci_lo", "ci_hi", "n"),
    *("sd", "seeds", "class", "difference", "difference_lo", "difference_hi"),
    *("role", "objective", "sampler", "guidance", "ema", "seed", "digest", "precision"),
)
"""``run`` tells the curves of one model apart (by sampler, guidance, ...); ``ci_lo`` and ``ci_hi`` are the ends of the
95 % interval and ``sd`` the standard deviation over trainings; ``class`` is for metrics of one class. The differences
are to the teacher at most steps. The metric ``device_minutes`` is what training the model took."""

SPEED = ("latency_ms", "latency_p95_ms", "decode_ms", "images_per_s", "batch", "peak_memory_mb", "flops", "params")


def as_csv(report: Report) -> str:
    """The report as CSV. What was not measured has no line; every row has that of its parameters."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    minutes = {model.name: model.device_minutes for model in report.models}
    for curve in series(report):
        for row in curve.rows:
            writer.writerows(_lines(curve, row, minutes.get(row.model)))
    return out.getvalue()


def _lines(curve: Series, row: Row, device_minutes: float | None) -> Iterator[dict[str, object]]:
    head: dict[str, object] = {"run": curve.label, "ema": row.ema or "", "seeds": row.seeds}
    head |= {key: getattr(row, key) for key in ("model", "nfe", "steps", "n", "role", "objective", "sampler")}
    head |= {key: getattr(row, key) for key in ("guidance", "seed", "digest", "precision")}
    for metric, found in row.metrics.items():
        if found.value is None:
            continue
        line = {"metric": metric, "value": found.value, **_ends(found, "ci_lo", "ci_hi")}
        line |= {} if found.sd is None else {"sd": found.sd}
        if to_teacher := row.differences.get(metric):
            line |= {"difference": to_teacher.value, **_ends(to_teacher, "difference_lo", "difference_hi")}
        yield head | line
    for metric, values in row.per_class.items():
        yield from (head | {"metric": metric, "class": i, "value": each} for i, each in enumerate(values))
    for name in SPEED:
        if (speed := getattr(row, name)) is not None:
            yield head | {"metric": name, "value": speed}
    if device_minutes is not None:
        yield head | {"metric": "device_minutes", "value": device_minutes}


def _ends(found: Measured, low: str, high: str) -> dict[str, object]:
    return {key: end for key, end in ((low, found.low), (high, found.high)) if end is not None}
