"""The tables that a paper prints: quality, time and parameters in one; speed; classes."""

from collections.abc import Sequence
from statistics import median

from fewstep.evaluation.report.answer import ratio, reference_row, series, speed_up
from fewstep.evaluation.report.costs import training_columns
from fewstep.evaluation.report.tables import (
    Cell,
    Column,
    Table,
    column,
    difference_column,
    distances,
    head_of,
    kept,
    metric_column,
)
from fewstep.evaluation.report.wording import (
    ARROWS,
    DASH,
    count,
    debiased,
    direction,
    extractors,
    metric_names,
    number,
    of_extractor,
    primary,
    split,
)
from fewstep.evaluation.results import Report

MOST_CLASSES = 12
"""Of more classes than this a table shows the worst, the middle and the best."""


def paper_table(report: Report) -> Table:
    """Model, steps, NFE, distances, ratio and difference to the teacher, recall, density, coverage, time, parameters,
    device-minutes of training: one line per row.

    The first distance has its debiased value beside it where its interval is around that.
    """
    curves, known, reference, metric = series(report), extractors(report), reference_row(report), primary(report)
    rows = [row for curve in curves for row in curve.rows]
    several = len({row.n for row in rows}) > 1
    columns = [
        column("model", [curve.label for curve in curves for _ in curve.rows], words=True),
        column("steps", [str(row.steps or DASH) for row in rows]),
        column("NFE", [str(row.nfe or DASH) for row in rows]),
        *([column("n", [f"{row.n:,}" for row in rows])] if several else []),
    ]
    for name in distances(report):
        own = metric_column(rows, name, head_of(name, rows, known, short=True))
        columns.append(own)
        better = debiased(name)
        around = better in metric_names(report) and not any(cell.interval for cell in own.cells)
        if better is not None and name == metric and around:
            columns.append(metric_column(rows, better, head_of(better, rows, known, short=True)))
        if name == metric:
            columns.append(column("ratio", [number(ratio(row, reference, name)) for row in rows]))
            columns.append(difference_column(rows, reference, name))
    leading = split(metric, known)[1] if metric else None
    neighbours = [of_extractor(name, leading or "inception") for name in ("recall", "density", "coverage")]
    columns += [
        *(metric_column(rows, name, head_of(name, rows, known, short=True)) for name in neighbours),
        column("time ms", [number(row.latency_ms) for row in rows]),
        column("parameters", [count(row.params) for row in rows]),
        *training_columns(report, rows),
    ]
    return Table(kept(columns), tuple(row.role for row in rows))


def speed_table(report: Report) -> Table | None:
    """Latency, rate, memory and operations of every row; None where no time was taken."""
    curves, reference = series(report), reference_row(report)
    rows = [row for curve in curves for row in curve.rows]
    if not any(row.latency_ms or row.images_per_s for row in rows):
        return None
    columns = [
        column("model", [curve.label for curve in curves for _ in curve.rows], words=True),
        column("steps", [str(row.steps or DASH) for row in rows]),
        column("NFE", [str(row.nfe or DASH) for row in rows]),
        column("p50 ms", [number(row.latency_ms) for row in rows]),
        column("p95 ms", [number(row.latency_p95_ms) for row in rows]),
        column("decode ms", [number(row.decode_ms) for row in rows]),
        column("speed-up", [number(speed_up(row, reference)) for row in rows]),
        column("images/s", [number(row.images_per_s) for row in rows]),
        column("at batch", [DASH if row.batch is None else f"{row.batch:,}" for row in rows]),
        column("peak MiB", [number(row.peak_memory_mb) for row in rows]),
        column("FLOPs", [DASH if row.flops is None else count(row.flops) for row in rows]),
        column("parameters", [count(row.params) for row in rows]),
    ]
    return Table(kept(columns), tuple(row.role for row in rows))


def class_tables(report: Report) -> list[tuple[str, Table]]:
    """For every metric that was measured class by class its name and a table, one line per row."""
    names = list(dict.fromkeys(name for row in report.rows for name in row.per_class))
    return [(name, _class_table(report, name)) for name in names]


def _class_table(report: Report, metric: str) -> Table:
    labelled = [(c.label, row) for c in series(report) for row in c.rows if row.per_class.get(metric)]
    rows = [row for _, row in labelled]
    values = [row.per_class[metric] for row in rows]
    classes = max(map(len, values))
    columns = [
        column("model", [label for label, _ in labelled], words=True),
        column("steps", [str(row.steps or DASH) for row in rows]),
    ]
    if classes <= MOST_CLASSES:
        heads = [column(str(i), [number(v[i]) if i < len(v) else DASH for v in values]) for i in range(classes)]
        columns += [
            Column(each.head, each.cells, group=f"{metric}{ARROWS[direction(metric)]} of class") for each in heads
        ]
    else:
        columns += _summary(metric, values)
    return Table(kept(columns), tuple(row.role for row in rows))


def _summary(metric: str, values: Sequence[Sequence[float]]) -> list[Column]:
    """Worst, middle and best class of each line; of a metric without a better direction, lowest to highest."""
    better = direction(metric)
    ordered = [sorted(range(len(v)), key=lambda i, v=v: v[i], reverse=better == "lower") for v in values]  # type: ignore[misc]
    low, high = ("lowest", "highest") if better is None else ("worst", "best")

    def at(place: int) -> list[Cell]:
        return [Cell(f"{number(v[o[place]])} (class {o[place]})") for v, o in zip(values, ordered, strict=True)]

    return [
        Column(f"{low} {metric}", tuple(at(0))),
        column("median", [number(median(v)) for v in values]),
        Column(high, tuple(at(-1))),
    ]
