"""What changed between an older measurement and this one, metric by metric, and whether noise explains it."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fewstep.errors import UsageError
from fewstep.evaluation.report.answer import label_of
from fewstep.evaluation.report.significance import Difference, difference
from fewstep.evaluation.report.tables import Cell, Column, Table, column
from fewstep.evaluation.report.wording import DASH, direction, interval, measured, metric_names, number, plural
from fewstep.evaluation.results import Measured, Report, Row, read_results

Verdict = Literal["better", "worse", "within noise", "equal", "changed"]
ORDER: tuple[Verdict, ...] = ("worse", "better", "changed", "within noise", "equal")

_NOT_METRICS = frozenset(("seed", "steps", "n", "ratio", "train_s", "nfe", "params", "batch_size", "latency_ms"))


@dataclass(frozen=True)
class Change:
    """One metric of one row, before and now; ``changed`` is a change of which the noise is not known."""

    label: str
    steps: int
    metric: str
    before: Measured
    now: Measured
    difference: Difference
    verdict: Verdict


@dataclass(frozen=True)
class Changes:
    """All changes, ``against`` what, and ``notes`` on rows and conventions that do not compare."""

    against: str
    changes: tuple[Change, ...]
    notes: tuple[str, ...]

    def summary(self) -> str:
        """How many changed which way, in one sentence."""
        if not self.changes:
            return "Nothing was measured in both."
        counts = Counter(change.verdict for change in self.changes)
        said = {"changed": "changed by an amount of unknown noise", "equal": "equal to the last digit"}
        parts = [f"{counts[verdict]} {said.get(verdict, verdict)}" for verdict in ORDER if counts[verdict]]
        rows = len({(change.label, change.steps) for change in self.changes})
        return f"Of {len(self.changes)} values in {rows} rows: {', '.join(parts)}."


def changes(report: Report, older: Report, against: str) -> Changes:
    """Every metric that the same model, steps, sampler and guidance have in both. Different data are a ``UsageError``.

    Two evaluations share no influence vectors: a difference is paired only where both rows state theirs to the same
    teacher, and its interval is otherwise the sum of both, which is never too short (``significance``).
    """
    mine, theirs = report.reference.get("dataset"), older.reference.get("dataset")
    if mine and theirs and mine != theirs:
        raise UsageError(f"{against} was measured on {theirs}, not on {mine}: the two do not compare")
    notes = [
        f"the {part} of the reference differs from {against}'s: some of what changed may be that"
        for part in ("n", "extractors", "protocol")
        if older.reference.get(part) and report.reference.get(part) != older.reference.get(part)
    ]
    if (was := _precisions(older)) != (now := _precisions(report)) and older.rows:
        notes.append(f"networks were evaluated in {was} there and in {now} here: some of what changed may be that")
    found: list[Change] = []
    for row in report.rows:
        before = _counterpart(row, older.rows)
        at = f"{label_of(report, row)} at {plural(row.steps)}"
        if isinstance(before, str):
            notes.append(f"{at}: {before}")
            continue
        found += [change for metric in metric_names(report) if (change := _change(report, row, before, metric))]
    found.sort(key=lambda change: ORDER.index(change.verdict))
    return Changes(against, tuple(found), tuple(notes))


def _precisions(report: Report) -> str:
    return ", ".join(sorted({row.precision for row in report.rows}))


def _counterpart(row: Row, older: Sequence[Row]) -> Row | str:
    """The older row of the same model and sampling, or why there is none."""
    same = [other for other in older if (other.model, other.steps) == (row.model, row.steps)]
    if not same:
        return "not measured there"
    counted = [other for other in same if other.n == row.n]
    if not counted:
        return f"measured there on {', '.join(sorted({str(other.n) for other in same}))} samples, here on {row.n}"

    def traits(other: Row) -> tuple[Any, ...]:
        return other.sampler or row.sampler, other.guidance, other.ema

    alike = [o for o in counted if traits(o) == (row.sampler, row.guidance, row.ema) or not o.sampler]
    if len(alike) > 1:
        alike = [other for other in alike if other.seed == row.seed] or alike
    return alike[0] if alike else "measured there with another sampler, guidance or average"


def _change(report: Report, row: Row, before: Row, metric: str) -> Change | None:
    old, new, found = measured(before, metric), measured(row, metric), difference(row, before, metric)
    if old is None or new is None or found is None:
        return None
    verdict: Verdict
    if old.value == new.value:
        verdict = "equal"
    elif found.low is None or found.high is None:
        verdict = "changed"
    elif found.low <= 0 <= found.high:
        verdict = "within noise"
    elif direction(metric) is None:
        verdict = "changed"
    else:
        verdict = "better" if found.verdict() == "better" else "worse"
    return Change(label_of(report, row), row.steps, metric, old, new, found, verdict)


def changes_table(found: Sequence[Change]) -> Table:
    """A line per change: model, steps, metric, before, now, change with its interval, verdict."""
    columns = [
        column("model", [change.label for change in found], words=True),
        column("steps", [str(change.steps or DASH) for change in found]),
        column("metric", [change.metric for change in found], words=True),
        column("before", [number(change.before.value) for change in found]),
        column("now", [number(change.now.value) for change in found]),
        Column("change", tuple(_cell(change.difference) for change in found)),
        column("verdict", [change.verdict for change in found], words=True),
    ]
    return Table(tuple(columns), tuple("student" for _ in found))


def _cell(found: Difference) -> Cell:
    return Cell(number(found.value), interval(found.low, found.high))


def as_json(found: Changes) -> dict[str, Any]:
    """The changes as plain values."""
    return {
        "against": found.against,
        "summary": found.summary(),
        "notes": list(found.notes),
        "values": [
            {
                **{"model": change.label, "steps": change.steps, "metric": change.metric, "verdict": change.verdict},
                **{"before": change.before.value, "now": change.now.value, "difference": change.difference.value},
                **{"low": change.difference.low, "high": change.difference.high, "interval": change.difference.how},
            }
            for change in found.changes
        ],
    }


# --- what to compare with ----------------------------------------------------------------------------------------


def read_older(path: Path) -> Report:
    """A ``results.json``, a folder that holds one, or a ledger of one JSON object per line."""
    if path.suffix == ".jsonl":
        return read_ledger(path)
    return read_results(path / "results.json" if path.is_dir() else path)


def read_ledger(path: Path) -> Report:
    """The rows of a ledger: ``recipe``, ``steps``, ``n``, ``seed`` and metrics by name; seeds become means and spreads.

    A recipe of which several settings were measured has no row: which of them to compare with is not said.
    """
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a readable ledger ({error}): it takes one JSON object per line") from error
    measured_lines = [line for line in lines if isinstance(line, dict) and {"recipe", "steps", "n"} <= line.keys()]
    if not measured_lines:
        raise UsageError(f"{path} has no line with recipe, steps and n: it is not a ledger of measured quality")
    settings: dict[str, set[str]] = {}
    groups: dict[tuple[str, int, int], dict[int, Mapping[str, Any]]] = {}
    for line in measured_lines:
        settings.setdefault(line["recipe"], set()).add(str(line.get("varied") or ""))
        # Files are appended to: the last line of a seed holds.
        groups.setdefault((line["recipe"], line["steps"], line["n"]), {})[line.get("seed", 0)] = line
    rows = [_ledger_row(*key, seeds) for key, seeds in groups.items() if len(settings[key[0]]) == 1]
    if not rows:
        raise UsageError(
            f"every recipe of {path} was measured with several settings: which to compare with is not said"
        )
    return Report(tuple(rows))


def _ledger_row(recipe: str, steps: int, n: int, seeds: Mapping[int, Mapping[str, Any]]) -> Row:
    lines = list(seeds.values())
    names = [name for name in lines[0] if _is_metric(name, lines[0][name])]
    metrics = {}
    for name in names:
        values = [float(line[name]) for line in lines if _is_metric(name, line.get(name))]
        if len(values) == len(lines):
            sd = statistics.stdev(values) if len(values) > 1 else None
            metrics[name] = Measured(statistics.fmean(values), sd=sd)
    return Row(
        model=recipe,
        role="student",
        objective="",
        steps=steps,
        nfe=0,
        sampler="",
        guidance=1.0,
        n=n,
        seed=min(seeds),
        metrics=metrics,
        latency_ms=None,
        images_per_s=None,
        params=0,
        digest=", ".join(str(line.get("digest", "")) for line in lines),
        seeds=len(lines),
    )


def _is_metric(name: str, value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return name not in _NOT_METRICS and math.isfinite(value)
