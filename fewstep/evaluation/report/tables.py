"""The tables: HTML, Markdown, CSV and the terminal render the same cells."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from fewstep.evaluation.report.answer import (
    FEW_STEPS,
    best_student,
    label_of,
    ratio,
    recall_of,
    reference_row,
    series,
    speed_up,
)
from fewstep.evaluation.report.significance import difference, within_noise
from fewstep.evaluation.report.wording import (
    ARROWS,
    DASH,
    bar,
    count,
    counted,
    direction,
    extractors,
    first_upper,
    interval,
    low_precision,
    measured,
    metric_names,
    number,
    of_extractor,
    plural,
    primary,
    shortened,
    split,
    spread,
    trainings,
    value,
    with_spread,
)
from fewstep.evaluation.results import Report, Row

if TYPE_CHECKING:
    from rich.table import Table as RichTable


MOST_ACROSS = 12
"""Columns, an interval counted as one, that fit a page side by side."""


@dataclass(frozen=True)
class Cell:
    text: str
    interval: str = ""
    best: bool = False


@dataclass(frozen=True)
class Column:
    head: str
    cells: tuple[Cell, ...]
    words: bool = False  # set left; numbers are set right
    group: str = ""  # neighbours of one group share a head above their own


@dataclass(frozen=True)
class Table:
    columns: tuple[Column, ...]
    roles: tuple[str, ...]  # one per line, for the rule between teachers and students

    def groups(self) -> list[tuple[str, int]]:
        """The heads that columns share, each with its number of columns; empty where no column has one."""
        shared = [(group, len(list(run))) for group, run in groupby(self.columns, key=lambda column: column.group)]
        return shared if any(group for group, _ in shared) else []

    def crowded(self) -> bool:
        """Whether intervals go below their numbers, because there is no room beside them."""
        intervals = sum(any(cell.interval for cell in column.cells) for column in self.columns)
        return bool(self.groups()) or len(self.columns) + intervals > MOST_ACROSS

    def lines(self) -> list[tuple[str, list[tuple[Column, Cell]]]]:
        return [(role, [(c, c.cells[i]) for c in self.columns]) for i, role in enumerate(self.roles)]


def column(head: str, texts: Sequence[str], words: bool = False) -> Column:
    return Column(head, tuple(Cell(text) for text in texts), words)


def kept(columns: Sequence[Column]) -> tuple[Column, ...]:
    """The columns in which something was measured."""
    return tuple(column for column in columns if any(cell.text != DASH for cell in column.cells))


def metric_column(rows: Sequence[Row], metric: str, head: str) -> Column:
    """A metric's values with their intervals; the best of each step count is marked, and what is within noise of it."""
    better = direction(metric)
    cells = []
    for row in rows:
        found = measured(row, metric)
        rivals = [r for r in rows if (r.steps, r.n) == (row.steps, row.n) and value(r, metric) is not None]
        best = len(rivals) > 1 and found is not None and better is not None
        if best:
            leader = (min if better == "lower" else max)(rivals, key=lambda r: value(r, metric) or 0.0)
            best = value(leader, metric) == value(row, metric) or within_noise(row, leader, metric)
        cells.append(Cell(number(found.value if found else None), interval_of(row, metric), best))
    return Column(head + ARROWS[better], tuple(cells))


def interval_of(row: Row, metric: str) -> str:
    """What stands small beside a number: its interval, or its spread over trainings."""
    found = measured(row, metric)
    if found is None:
        return ""
    if found.sd is not None:
        return spread(found.value, found.sd)
    shown = bar(row, metric)
    return interval(*shown) if shown else ""


def head_of(metric: str, rows: Sequence[Row], known: Sequence[str], short: bool) -> str:
    """A column's head: FID says its sample count; others drop the extractor that a caption names."""
    base, extractor = split(metric, known)
    if extractor in (None, "inception"):
        return counted(metric, rows)
    return base if short and not base.startswith("fd") else metric


def results_table(report: Report, metrics: Sequence[str], speed: bool = True) -> Table:
    """One line per row, teachers first, the best of each step count marked; the ratio is that of the first metric, and
    so is the difference to the teacher at most steps, where its interval is known."""
    curves = series(report)
    rows = [row for curve in curves for row in curve.rows]
    labels = [curve.label for curve in curves for _ in curve.rows]
    known, reference = extractors(report), reference_row(report)
    short = len({split(metric, known)[1] for metric in metrics} - {None}) == 1
    columns = [metric_column(rows, metric, head_of(metric, rows, known, short)) for metric in metrics]
    if metrics and direction(metrics[0]) == "lower":
        columns.insert(1, column("ratio", [number(ratio(row, reference, metrics[0])) for row in rows]))
        columns.insert(2, difference_column(rows, reference, metrics[0]))
    if len({row.n for row in rows}) > 1:
        columns.insert(0, column("n", [f"{row.n:,}" for row in rows]))
    columns = [
        column("model", labels, words=True),
        column("objective", [row.objective or DASH for row in rows], words=True),
        column("steps", [str(row.steps or DASH) for row in rows]),
        column("NFE", [str(row.nfe or DASH) for row in rows]),
        *columns,
    ]
    if speed:
        columns += [
            column("latency ms", [number(row.latency_ms) for row in rows]),
            column("images/s", [number(row.images_per_s) for row in rows]),
            column("speed-up", [number(speed_up(row, reference)) for row in rows]),
            column("params", [count(row.params) for row in rows]),
        ]
    return Table(kept(columns), tuple(row.role for row in rows))


def difference_column(rows: Sequence[Row], reference: Row | None, metric: str) -> Column:
    """Each row's metric minus the reference row's, with its interval; a dash where no interval is known."""
    cells = []
    for row in rows:
        found = difference(row, reference, metric) if reference is not None and row is not reference else None
        known = found is not None and found.low is not None
        within = interval(found.low, found.high) if found is not None and known else ""
        cells.append(Cell(number(found.value) if found is not None and known else DASH, within))
    return Column("Δ teacher", tuple(cells))


def metrics_table(report: Report, metrics: Sequence[str]) -> Table:
    """The metrics that have no place in a main table, under their full names."""
    curves = series(report)
    rows = [row for curve in curves for row in curve.rows]
    columns = [
        column("model", [curve.label for curve in curves for _ in curve.rows], words=True),
        column("steps", [str(row.steps) for row in rows]),
        *(metric_column(rows, metric, metric) for metric in metrics),
    ]
    return Table(kept(columns), tuple(row.role for row in rows))


def overview_table(report: Report) -> Table | None:
    """One line per model: each extractor's distance and the primary recall at every step count that students have.

    What was not measured is a dash. None where there are fewer than two students to compare.
    """
    metric, curves = primary(report), series(report)
    steps = sorted({row.steps for row in report.rows if row.role == "student"})
    if metric is None or sum(curve.role == "student" for curve in curves) < 2:
        return None
    curves = [curve for curve in curves if any(row.steps in steps for row in curve.rows)]
    metrics = distances(report)
    metrics += [name for name in (recall_of(report, metric),) if name in metric_names(report)]
    columns = [column("model", [curve.label for curve in curves], words=True)]
    for name in metrics:
        better = direction(name)
        for number_of_steps in steps:
            rows = [next((row for row in curve.rows if row.steps == number_of_steps), None) for curve in curves]
            cells = [_overview_cell(row, [r for r in rows if r is not None], name) for row in rows]
            columns.append(Column(str(number_of_steps), tuple(cells), group=name + ARROWS[better]))
    return Table(kept(columns), tuple(curve.role for curve in curves))


def _overview_cell(row: Row | None, rows: Sequence[Row], metric: str) -> Cell:
    return Cell(DASH) if row is None else metric_column(rows, metric, "").cells[rows.index(row)]


def overview_caption(report: Report) -> str:
    """What the overview's numbers are, and the teacher at its most steps, which has no column there."""
    parts = ["Columns are solver steps; a dash is a step count that a model does not serve or was not measured at"]
    if said := trainings(report):
        parts.insert(0, f"{first_upper(said)} (n - 1), each with a teacher of its own")
    if said := low_precision(report):
        parts.append(first_upper(said))
    reference, metric = reference_row(report), primary(report)
    if reference is not None and metric is not None:
        names = [name for name in (*distances(report), recall_of(report, metric)) if measured(reference, name)]
        figures = ", ".join(f"{name} {with_spread(measured(reference, name))}" for name in names)
        parts.append(f"{label_of(report, reference)} at {plural(reference.steps)}: {figures}")
    return (
        ". ".join(parts) + ". Bold: the best of each column, and what is within noise of it where intervals are known."
    )


def distances(report: Report) -> list[str]:
    """Each extractor's Fréchet distance."""
    return [name for name in (of_extractor("fd", e) for e in extractors(report)) if name in metric_names(report)]


def glance_table(report: Report) -> Table | None:
    """The best student at each of 1, 2 and 4 steps, beside the teacher at as many steps and at its most."""
    metric, reference = primary(report), reference_row(report)
    if metric is None:
        return None
    found = [(steps, best_student(report, metric, (steps,))) for steps in FEW_STEPS]
    best = [row for _, row in found if row is not None]
    if not best:
        return None
    known = extractors(report)
    head = head_of(metric, best, known, short=True)
    most = f"× teacher at {reference.steps}" if reference else "× teacher"
    recall = recall_of(report, metric)

    def teacher_at(steps: int, n: int) -> float | None:
        same = [row for row in report.rows if (row.role, row.steps, row.n) == ("teacher", steps, n)]
        return min((v for row in same if (v := value(row, metric)) is not None), default=None)

    columns = [
        column("steps", [str(row.steps) for row in best]),
        column("best student", [label_of(report, row) for row in best], words=True),
        column(head, [with_spread(measured(row, metric)) for row in best]),
        column(most, [number(ratio(row, reference, metric)) for row in best]),
        column("teacher, same steps", [number(teacher_at(row.steps, row.n)) for row in best]),
        column("recall", [with_spread(measured(row, recall)) for row in best]),
        column("speed-up", [number(speed_up(row, reference)) for row in best]),
    ]
    return Table(kept(columns), tuple("student" for _ in best))


def caption(report: Report, extractor: str, table: Table) -> str:
    """What a table's numbers are of: features, sample count, what the ratio is against, what bold means."""
    counts = sorted({row.n for row in report.rows})
    samples = f"n = {counts[0]:,} samples per row" if len(counts) == 1 else "n samples per row as in the column n"
    reference = reference_row(report)
    features = "Inception features" if extractor == "inception" else f"features: {extractor}"
    parts = [features, samples, *(said for said in (low_precision(report), trainings(report)) if said)]
    if len(counts) > 1:
        parts.append("rows of different n are not compared")
    if reference is not None:
        against = f"{label_of(report, reference)} at {plural(reference.steps)}"
        parts.append(f"ratio and speed-up against {against}")
    if any(column.head == "Δ teacher" for column in table.columns):
        parts.append("Δ teacher: the difference to it with its 95% interval, of debiased values where there are")
    return f"{first_upper('; '.join(parts))}.{bold_words(table)} ↓ lower is better, ↑ higher is better."


def bold_words(table: Table) -> str:
    """What bold means, where something is."""
    if not any(cell.best for column in table.columns for cell in column.cells):
        return ""
    return " Bold: the best of each step count, and what is within noise of it where intervals are known."


# --- renderings --------------------------------------------------------------------------------------------------


def escape_markdown(text: object) -> str:
    """Text from outside as Markdown that shows it literally, inside a table too."""
    plain = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # An underscore between letters is no emphasis: fd_pixels stays readable.
    return re.sub(r"([\\`*\[\]|~$]|(?<!\w)_|_(?!\w))", r"\\\1", plain)


def code_markdown(name: str) -> str:
    """A name from outside as a code span, or escaped where it would end the span."""
    return escape_markdown(name) if "`" in name else f"`{' '.join(name.split())}`"


def as_markdown(table: Table) -> str:
    def cell(column: Column, content: Cell) -> str:
        text = " ".join(filter(None, (escape_markdown(content.text), content.interval)))
        return f"**{text}**" if content.best else text

    lines = [
        "| " + " | ".join(escape_markdown(_whole_head(column)) for column in table.columns) + " |",
        "|" + "|".join(":---" if column.words else "---:" for column in table.columns) + "|",
    ]
    lines += ["| " + " | ".join(cell(*pair) for pair in line) + " |" for _, line in table.lines()]
    return "\n".join(lines) + "\n"


def _whole_head(column: Column) -> str:
    """A column's head where the one it shares has no line of its own."""
    return f"{column.group} at {column.head}" if column.group else column.head


def markdown_table(report: Report, metrics: Sequence[str]) -> str:
    """The main table with these metrics as GitHub Markdown; the ratio is that of the first one."""
    return as_markdown(results_table(report, metrics))


def console_table(report: Report) -> "RichTable":
    """The rows for a terminal of 100 columns: each extractor's distance, the primary's recall and ratio, speed."""
    from rich.table import Table as RichTable
    from rich.text import Text

    known, reference, metric = extractors(report), reference_row(report), primary(report)
    recall = recall_of(report, metric) if metric else ""
    curves = series(report)
    rows = [row for curve in curves for row in curve.rows]
    columns = [
        column("steps", [str(row.steps) for row in rows]),
        column("NFE", [str(row.nfe) for row in rows]),
        *(metric_column(rows, name, head_of(name, rows, known, short=True)) for name in distances(report)),
        metric_column(rows, recall, "recall"),
        column("ratio", [number(ratio(row, reference, metric or "")) for row in rows]),
        column("ms", [number(row.latency_ms) for row in rows]),
        column("images/s", [number(row.images_per_s) for row in rows]),
    ]
    if trainings(report):  # spreads take the room of these two
        columns = [_spelt_out(each) for each in columns if each.head not in ("NFE", "images/s")]
    table = RichTable(header_style="bold", pad_edge=False)
    table.add_column("model", no_wrap=True)
    columns = list(kept(columns))
    room = 100 - 3  # of a terminal's width, what the numbers and the rules leave to the names
    for each in columns:
        head = each.head.replace("_", "\n", 1)
        table.add_column(head, justify="right", no_wrap=True)
        room -= 3 + max(map(len, [*head.split("\n"), *(cell.text for cell in each.cells)]))
    labels = [curve.label for curve in curves for _ in curve.rows]
    for i, row in enumerate(rows):
        last = i + 1 == len(rows) or labels[i + 1] != labels[i]
        cells = [Text(c.cells[i].text, style="bold" if c.cells[i].best else "") for c in columns]
        name = labels[i] if i == 0 or labels[i - 1] != labels[i] else ""
        table.add_row(
            Text(shortened(name, max(room, 12)), style="dim" if row.role == "teacher" else ""), *cells, end_section=last
        )
    return table


def _spelt_out(column: Column) -> Column:
    """The column with what is small beside its numbers as part of their text."""
    cells = [replace(cell, text=f"{cell.text} {cell.interval}".strip()) for cell in column.cells]
    return replace(column, cells=tuple(cells))


def flat(items: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested protocol or environment entries as name and text; a list without names is numbered."""
    if isinstance(items, Mapping):
        pairs = [(str(key), item) for key, item in items.items()]
    elif isinstance(items, (list, tuple)):
        if all(not isinstance(item, (Mapping, list, tuple)) for item in items) and prefix:
            return [(prefix, ", ".join(map(str, items)) or DASH)]
        pairs = [(str(i + 1), item) for i, item in enumerate(items)]
    else:
        return [(prefix, DASH if items is None or items == "" else str(items))]
    return [pair for key, item in pairs for pair in flat(item, f"{prefix}.{key}" if prefix else key)]
