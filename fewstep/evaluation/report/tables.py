"""What the report says in words and numbers: which rows are compared, the headline, and the tables.

Every number shown anywhere is made here, once: HTML, Markdown, CSV and the terminal render the same cells.
"""

import csv
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fewstep.evaluation.results import Measured, Report, Row

if TYPE_CHECKING:
    from rich.table import Table as RichTable

DASH = "–"
FEW_STEPS = (1, 2, 4)
INCEPTION = frozenset(("fid", "fid_debiased", "kid", "sfid", "is", "precision", "recall", "density", "coverage"))
CSV_COLUMNS = (
    *("model", "role", "objective", "steps", "nfe", "sampler", "guidance", "n", "seed"),
    *("metric", "value", "low", "high", "latency_ms", "images_per_s", "params"),
)


# --- numbers as text ---------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """Three significant digits; a dash for what was not measured (None, NaN or infinite)."""
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    rounded = float(f"{value:.2e}")
    return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:#.3g}".rstrip(".")


def count(value: float) -> str:
    """A large count with its unit, as in ``675 M``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if float(f"{value:.2e}") >= size:
            return f"{number(value / size)} {unit}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds)} s"


def times_as_long(speed_up: float) -> str:
    """The sentence's clause about time, from how many times faster the student is."""
    if 0.95 < speed_up < 1.05:
        return "in the same time"
    if speed_up > 1:
        return f"in 1/{speed_up:.0f} of the time" if speed_up >= 9.5 else f"in 1/{speed_up:.2g} of the time"
    return f"in {number(1 / speed_up)}× the time"


def first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def shortened(label: str, most: int = 44) -> str:
    """Both ends of a long name: its beginning and its end tell siblings apart."""
    return label if len(label) <= most else f"{label[: most - most // 2 - 1]}…{label[-(most // 2) :]}"


def plural(steps: int) -> str:
    return f"{steps} step" if steps == 1 else f"{steps} steps"


# --- metrics and extractors --------------------------------------------------------------------------------------


def measured(row: Row, metric: str) -> Measured | None:
    """A row's measurement, or None where it is missing, null or not finite."""
    found = row.metrics.get(metric)
    return found if found is not None and found.value is not None and math.isfinite(found.value) else None


def value(row: Row, metric: str) -> float | None:
    found = measured(row, metric)
    return found.value if found else None


def metric_names(report: Report) -> list[str]:
    return list(dict.fromkeys(name for row in report.rows for name in row.metrics))


def extractors(report: Report) -> list[str]:
    """The extractors with metrics in some row, in the order of the reference: the first one leads."""
    names = metric_names(report)
    known = list(report.reference.get("extractors") or {})
    if not known:
        suffixes = [name.removeprefix("fd_") for name in names if name.startswith("fd_")]
        # fd_pixels_debiased and fd_debiased_pixels name no extractor of their own.
        known = [a for a in suffixes if not any(a.endswith(f"_{b}") or a.startswith(f"{b}_") for b in suffixes)]
    if "inception" not in known:
        known.insert(0, "inception")
    return [name for name in known if any(split(metric, known)[1] == name for metric in names)]


def split(metric: str, known: Sequence[str]) -> tuple[str, str | None]:
    """``fd_pixels`` -> ``("fd", "pixels")``; a metric on no extractor keeps its name and gets None."""
    for extractor in sorted(known, key=len, reverse=True):
        if metric.endswith(f"_{extractor}"):
            return metric.removesuffix(f"_{extractor}"), extractor
    return metric, "inception" if metric in INCEPTION else None


def of_extractor(name: str, extractor: str) -> str:
    """The metric's name on an extractor: only Inception's Fréchet distance is called FID."""
    if extractor == "inception":
        return {"fd": "fid", "kd": "kid"}.get(name, name)
    return f"{name}_{extractor}"


def is_gap(metric: str) -> bool:
    return "gap" in metric or "teacher" in metric


def main_metrics(report: Report, extractor: str) -> list[str]:
    """The columns of one extractor's table; the teacher gaps that need no extractor stand in the primary table."""
    known = extractors(report)
    here = [of_extractor(base, extractor) for base in ("fd", "recall", "precision", "density", "coverage")]
    homes = (extractor, None) if extractor == known[0] else (extractor,)
    gaps = [name for name in metric_names(report) if is_gap(name) and split(name, known)[1] in homes]
    return [name for name in here if name in metric_names(report)] + gaps


def other_metrics(report: Report) -> list[str]:
    shown = {metric for extractor in extractors(report) for metric in main_metrics(report, extractor)}
    return [name for name in metric_names(report) if name not in shown]


def primary(report: Report) -> str | None:
    """The Fréchet distance that the headline and the ratios are about."""
    distances = [of_extractor("fd", extractor) for extractor in extractors(report)]
    return next((metric for metric in distances if metric in metric_names(report)), None)


def direction(metric: str) -> Literal["lower", "higher"] | None:
    """Which way is better. Density has no better way: its ideal is one."""
    if metric.startswith(("precision", "recall", "coverage")) or metric in ("is", "authpct"):
        return "higher"
    distance = metric.startswith(("fid", "fd_", "sfid", "kid", "kd_", "cmmd"))
    return "lower" if distance or is_gap(metric) else None


def describe(metric: str, known: Sequence[str]) -> str:
    """A metric's name in words."""
    base, extractor = split(metric, known)
    words = {"fid": "FID", "kid": "KID", "fd": "Fréchet distance", "kd": "kernel distance"}.get(base)
    words = words or base.replace("_", " ")
    return words if extractor in (None, "inception") else f"{words} on {extractor}"


# --- which rows are compared -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """One curve: the rows of a model with one sampler, guidance, sample count and seed, by steps."""

    label: str
    role: Literal["teacher", "student"]
    rows: tuple[Row, ...]


def series(report: Report) -> list[Series]:
    """Teachers, then students, as first met. A label says more than the model's name only where it must."""

    def traits(row: Row) -> tuple[str, ...]:
        return (row.role, row.sampler, f"w = {row.guidance:g}", f"n = {row.n:,}", f"seed {row.seed}", row.digest[:8])

    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in report.rows:
        groups.setdefault((row.model, *traits(row)), []).append(row)
    curves = []
    for (model, *mine), rows in groups.items():
        namesakes = [others for name, *others in groups if name == model]
        differing = [trait for i, trait in enumerate(mine) if len({other[i] for other in namesakes}) > 1]
        label = f"{model} ({', '.join(differing)})" if differing else model
        curves.append(Series(label, rows[0].role, tuple(sorted(rows, key=lambda row: row.steps))))
    return sorted(curves, key=lambda curve: curve.role != "teacher")


def reference_row(report: Report) -> Row | None:
    """The teacher at its most steps: what ratios and speed-ups are against. Of several, the best by the primary."""
    teachers = [row for row in report.rows if row.role == "teacher"]
    metric = primary(report) or ""

    def rank(row: Row) -> tuple[float, float]:
        distance = value(row, metric)
        return -row.steps, math.inf if distance is None else distance

    return min(teachers, key=rank, default=None)


def ratio(row: Row, reference: Row | None, metric: str) -> float | None:
    """The row's metric over the reference's; None unless both are measured, on as many samples."""
    if reference is None or row.n != reference.n:
        return None
    mine, theirs = value(row, metric), value(reference, metric)
    return mine / theirs if mine is not None and theirs else None


def speed_up(row: Row, reference: Row | None) -> float | None:
    if reference is None or not row.latency_ms or not reference.latency_ms:
        return None
    return reference.latency_ms / row.latency_ms


def best_student(report: Report, metric: str, steps: Sequence[int]) -> Row | None:
    """The student with the lowest ``metric`` at one of these step counts; equals go to the fewer steps."""
    reference = reference_row(report)
    students = [r for r in report.rows if r.role == "student" and r.steps in steps and value(r, metric) is not None]
    # Distances on different sample counts have different biases: prefer what compares with the teacher.
    comparable = [row for row in students if reference is not None and row.n == reference.n] or students
    return min(comparable, key=lambda row: (value(row, metric), row.steps), default=None)


def leading_student(report: Report) -> Row | None:
    """The student that the headline is about: the best at 1, 2 or 4 steps, or else at the fewest there are."""
    metric = primary(report)
    steps = [row.steps for row in report.rows if row.role == "student"]
    if metric is None or not steps:
        return None
    return best_student(report, metric, FEW_STEPS) or best_student(report, metric, (min(steps),))


def label_of(report: Report, row: Row) -> str:
    return next(curve.label for curve in series(report) if row in curve.rows)


# --- the answer --------------------------------------------------------------------------------------------------


def headline(report: Report, code: Callable[[str], str] = lambda name: f"`{name}`") -> str:
    """One computed sentence: the best few-step student against the teacher at its most steps.

    ``code`` marks up every name that comes from outside, so that it can also escape it.
    """
    metric, reference = primary(report), reference_row(report)
    if metric is None:
        return "No Fréchet distance was measured, so no student can be named best."
    best = leading_student(report)
    if best is None:
        if reference is None or value(reference, metric) is None:
            return f"No row has a value of {code(metric)}."
        found = number(value(reference, metric))
        return f"No student was measured; at {plural(reference.steps)} the teacher has {code(metric)} {found}."
    at, name, found = plural(best.steps), code(label_of(report, best)), number(value(best, metric))
    opening = f"At {at}, {name} has {code(metric)} {found}"
    if reference is None:
        return f"{opening}; no teacher was measured beside it, so what was lost is not known."
    whose = "the teacher" if len({c.label for c in series(report) if c.role == "teacher"}) == 1 else None
    theirs = f"{whose or code(label_of(report, reference))}'s {reference.steps}-step figure"
    if reference.n != best.n:
        return f"{opening}; {theirs} is on another number of samples and does not compare."
    quotient = ratio(best, reference, metric)
    if quotient is None:
        return f"{opening}; {theirs} is {number(value(reference, metric))}, which gives no ratio."
    if number(value(best, metric)) == number(value(reference, metric)):
        sentence = f"{opening}, equal to {theirs}"
    elif quotient < 1:
        sentence = f"{opening}, {number(quotient)}× {theirs} (lower is better)"
    else:
        several = len({c.label for c in series(report) if c.role == "student"}) > 1
        who = "even the best student" if several else "the student"
        sentence = f"At {at}, {who} is worse than the teacher: {name} has {code(metric)} {found}, "
        sentence += f"{number(quotient)}× {theirs}"
    faster = speed_up(best, reference)
    sentence += f", {times_as_long(faster)}" if faster else ""
    return sentence + _recall_clause(best, reference, _recall_of(report, metric)) + _overlap(best, reference, metric)


def _recall_of(report: Report, metric: str) -> str:
    return of_extractor("recall", split(metric, extractors(report))[1] or "inception")


def _recall_clause(best: Row, reference: Row, recall: str) -> str:
    mine, theirs = value(best, recall), value(reference, recall)
    if mine is None or theirs is None:
        return ""
    if number(mine) == number(theirs):
        return f"; recall stays at {number(mine)}"
    return f"; recall {'falls' if mine < theirs else 'rises'} from {number(theirs)} to {number(mine)}"


def _overlap(best: Row, reference: Row, metric: str) -> str:
    a, b = measured(best, metric), measured(reference, metric)
    if a is None or b is None or a.low is None or a.high is None or b.low is None or b.high is None:
        return "."
    return " (the two 95% intervals overlap)." if a.low <= b.high and b.low <= a.high else "."


# --- tables ------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Table:
    columns: tuple[Column, ...]
    roles: tuple[str, ...]  # one per line, for the rule between teachers and students

    def lines(self) -> list[tuple[str, list[tuple[Column, Cell]]]]:
        return [(role, [(c, c.cells[i]) for c in self.columns]) for i, role in enumerate(self.roles)]


def _column(head: str, texts: Sequence[str], words: bool = False) -> Column:
    return Column(head, tuple(Cell(text) for text in texts), words)


def _kept(columns: Sequence[Column]) -> tuple[Column, ...]:
    """The columns in which something was measured."""
    return tuple(column for column in columns if any(cell.text != DASH for cell in column.cells))


def _metric_column(rows: Sequence[Row], metric: str, head: str) -> Column:
    better = direction(metric)
    cells = []
    for row in rows:
        found = measured(row, metric)
        rivals = [value(other, metric) for other in rows if (other.steps, other.n) == (row.steps, row.n)]
        known = [rival for rival in rivals if rival is not None]
        best = len(known) > 1 and found is not None and better is not None
        best = best and found is not None and found.value == (min if better == "lower" else max)(known)
        interval = ""
        if found is not None and found.low is not None and found.high is not None:
            interval = f"[{number(found.low)}, {number(found.high)}]"
        cells.append(Cell(number(found.value if found else None), interval, best))
    return Column(head + {"lower": " ↓", "higher": " ↑", None: ""}[better], tuple(cells))


def head_of(metric: str, rows: Sequence[Row], known: Sequence[str], short: bool) -> str:
    """A column's head: FID says its sample count below 50,000; others drop the extractor that a caption names."""
    base, extractor = split(metric, known)
    if metric == "fid":
        counts = {row.n for row in rows}
        smallest = min(counts)
        at = f"{smallest / 1000:g}k" if smallest % 1000 == 0 else str(smallest)
        return "FID" if smallest >= 50_000 else f"FID@{at}" if len(counts) == 1 else "FID@n"
    return base if short and extractor is not None and base != "fd" else metric


def results_table(report: Report, metrics: Sequence[str]) -> Table:
    """One line per row, teachers first, the best of each step count marked; the ratio is that of the first metric."""
    curves = series(report)
    rows = [row for curve in curves for row in curve.rows]
    labels = [curve.label for curve in curves for _ in curve.rows]
    known, reference = extractors(report), reference_row(report)
    short = len({split(metric, known)[1] for metric in metrics} - {None}) == 1
    columns = [_metric_column(rows, metric, head_of(metric, rows, known, short)) for metric in metrics]
    if metrics and direction(metrics[0]) == "lower":
        columns.insert(1, _column("ratio", [number(ratio(row, reference, metrics[0])) for row in rows]))
    if len({row.n for row in rows}) > 1:
        columns.insert(0, _column("n", [f"{row.n:,}" for row in rows]))
    columns = [
        _column("model", labels, words=True),
        _column("objective", [row.objective or DASH for row in rows], words=True),
        _column("steps", [str(row.steps) for row in rows]),
        _column("NFE", [str(row.nfe) for row in rows]),
        *columns,
        _column("latency ms", [number(row.latency_ms) for row in rows]),
        _column("images/s", [number(row.images_per_s) for row in rows]),
        _column("speed-up", [number(speed_up(row, reference)) for row in rows]),
        _column("params", [count(row.params) for row in rows]),
    ]
    return Table(_kept(columns), tuple(row.role for row in rows))


def metrics_table(report: Report, metrics: Sequence[str]) -> Table:
    """The metrics that have no place in a main table, under their full names."""
    curves = series(report)
    rows = [row for curve in curves for row in curve.rows]
    columns = [
        _column("model", [curve.label for curve in curves for _ in curve.rows], words=True),
        _column("steps", [str(row.steps) for row in rows]),
        *(_metric_column(rows, metric, metric) for metric in metrics),
    ]
    return Table(_kept(columns), tuple(row.role for row in rows))


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
    recall = _recall_of(report, metric)

    def teacher_at(steps: int, n: int) -> float | None:
        same = [row for row in report.rows if (row.role, row.steps, row.n) == ("teacher", steps, n)]
        return min((v for row in same if (v := value(row, metric)) is not None), default=None)

    columns = [
        _column("steps", [str(row.steps) for row in best]),
        _column("best student", [label_of(report, row) for row in best], words=True),
        _column(head, [number(value(row, metric)) for row in best]),
        _column(most, [number(ratio(row, reference, metric)) for row in best]),
        _column("teacher, same steps", [number(teacher_at(row.steps, row.n)) for row in best]),
        _column("recall", [number(value(row, recall)) for row in best]),
        _column("speed-up", [number(speed_up(row, reference)) for row in best]),
    ]
    return Table(_kept(columns), tuple("student" for _ in best))


def costs_table(report: Report) -> Table:
    """What training each model took."""
    models = sorted(report.models, key=lambda model: model.role != "teacher")
    columns = [
        _column("model", [model.name for model in models], words=True),
        _column("role", [model.role for model in models], words=True),
        _column("objective", [model.objective or DASH for model in models], words=True),
        _column("params", [count(model.params) for model in models]),
        _column("training steps", [f"{model.train_steps:,}" for model in models]),
        _column("samples seen", [count(model.train_samples) for model in models]),
        _column("training time", [duration(model.train_s) for model in models]),
    ]
    return Table(_kept(columns), tuple(model.role for model in models))


def caption(report: Report, extractor: str, table: Table) -> str:
    """What a table's numbers are of: features, sample count, what the ratio is against, what bold means."""
    counts = sorted({row.n for row in report.rows})
    samples = f"n = {counts[0]:,} samples per row" if len(counts) == 1 else "n samples per row as in the column n"
    reference = reference_row(report)
    features = "Inception features" if extractor == "inception" else f"features: {extractor}"
    parts = [features, samples]
    if len(counts) > 1:
        parts.append("rows of different n are not compared")
    if reference is not None:
        against = f"{label_of(report, reference)} at {plural(reference.steps)}"
        parts.append(f"ratio and speed-up against {against}")
    bold = (
        " Bold: the best of each step count." if any(c.best for column in table.columns for c in column.cells) else ""
    )
    return f"{first_upper('; '.join(parts))}.{bold} ↓ lower is better, ↑ higher is better."


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
        "| " + " | ".join(escape_markdown(column.head) for column in table.columns) + " |",
        "|" + "|".join(":---" if column.words else "---:" for column in table.columns) + "|",
    ]
    lines += ["| " + " | ".join(cell(*pair) for pair in line) + " |" for _, line in table.lines()]
    return "\n".join(lines) + "\n"


def markdown_table(report: Report, metrics: Sequence[str]) -> str:
    """The main table with these metrics as GitHub Markdown; the ratio is that of the first one."""
    return as_markdown(results_table(report, metrics))


def as_csv(report: Report) -> str:
    """One line per row and metric, at full precision; a row without metrics keeps one line."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in report.rows:
        head = (row.model, row.role, row.objective, row.steps, row.nfe, row.sampler, row.guidance, row.n, row.seed)
        tail = (row.latency_ms, row.images_per_s, row.params)
        for metric in row.metrics or ("",):
            found = measured(row, metric)
            writer.writerow((*head, metric, *((found.value, found.low, found.high) if found else ("", "", "")), *tail))
    return out.getvalue()


def console_table(report: Report) -> "RichTable":
    """The rows for a terminal of 100 columns: each extractor's distance, the primary's recall and ratio, speed."""
    from rich.table import Table as RichTable
    from rich.text import Text

    known, reference, metric = extractors(report), reference_row(report), primary(report)
    recall = _recall_of(report, metric) if metric else ""
    distances = [name for name in (of_extractor("fd", e) for e in known) if name in metric_names(report)]
    curves = series(report)
    rows = [row for curve in curves for row in curve.rows]
    columns = [
        _column("steps", [str(row.steps) for row in rows]),
        _column("NFE", [str(row.nfe) for row in rows]),
        *(_metric_column(rows, name, head_of(name, rows, known, short=True)) for name in distances),
        _metric_column(rows, recall, "recall"),
        _column("ratio", [number(ratio(row, reference, metric or "")) for row in rows]),
        _column("ms", [number(row.latency_ms) for row in rows]),
        _column("images/s", [number(row.images_per_s) for row in rows]),
    ]
    table = RichTable(header_style="bold", pad_edge=False)
    table.add_column("model", no_wrap=True)
    columns = list(_kept(columns))
    room = 100 - 3  # of a terminal's width, what the numbers and the rules leave to the names
    for column in columns:
        head = column.head.replace("_", "\n", 1)
        table.add_column(head, justify="right", no_wrap=True)
        room -= 3 + max(map(len, [*head.split("\n"), *(cell.text for cell in column.cells)]))
    labels = [curve.label for curve in curves for _ in curve.rows]
    for i, row in enumerate(rows):
        last = i + 1 == len(rows) or labels[i + 1] != labels[i]
        cells = [Text(c.cells[i].text, style="bold" if c.cells[i].best else "") for c in columns]
        name = labels[i] if i == 0 or labels[i - 1] != labels[i] else ""
        table.add_row(
            Text(shortened(name, max(room, 12)), style="dim" if row.role == "teacher" else ""), *cells, end_section=last
        )
    return table


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
