"""How students stand to the goals that were asked about, as a table and in words."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fewstep.evaluation.report.answer import label_of
from fewstep.evaluation.report.tables import Cell, Column, Table, column
from fewstep.evaluation.report.wording import DASH, interval, measured, number, plural, with_spread
from fewstep.evaluation.results import Report

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from fewstep.evaluation.goals import Reached


def goals_table(found: Sequence["Reached"], report: Report) -> Table:
    """A line per goal: reached or not, the best student, its value, the bound, the difference with its interval."""
    columns = [
        column("goal", [str(each.goal) for each in found], words=True),
        column("outcome", [outcome(each) for each in found], words=True),
        column("best student", [_student(each, report) for each in found], words=True),
        column("steps", [DASH if each.row is None else str(each.row.steps or DASH) for each in found]),
        column("value", [_value(each) for each in found]),
        column("bound", [number(each.bound) for each in found]),
        Column("difference", tuple(_margin(each) for each in found)),
    ]
    return Table(tuple(columns), tuple("student" for _ in found))


def console_goals(found: Sequence["Reached"], report: Report) -> "RichTable":
    """The same for a terminal, without what its width has no room for: the differences."""
    from rich.table import Table as RichTable
    from rich.text import Text

    columns = [each for each in goals_table(found, report).columns if each.head != "difference"]
    table = RichTable(header_style="bold", pad_edge=False)
    for each in columns:
        table.add_column(each.head, justify="left" if each.words else "right", no_wrap=not each.words, overflow="fold")
    for i in range(len(found)):
        table.add_row(*(Text(each.cells[i].text) for each in columns))
    return table


def outcome(found: "Reached") -> str:
    """``reached``, ``missed by 12 %`` (of the bound) or ``not measured``, and whether noise might have decided it."""
    if found.row is None:
        return "not measured"
    said = "reached"
    if not found.kept:
        missed = found.missed_by
        said = f"missed by {number(abs(found.margin)) if missed is None else _percent(missed)}"
    return f"{said}, within noise" if found.within_noise else said


def goals_caption(found: Sequence["Reached"], report: Report) -> str:
    """Whose bounds these are, and what the interval is of."""
    parts = ["A goal is reached if some student keeps it; the best one is shown"]
    teachers = [each.teacher for each in found if each.teacher is not None]
    named = dict.fromkeys(f"{label_of(report, row)} at {plural(row.steps)}" for row in teachers)
    parts += [f"The teacher is {' or '.join(named)}"] if named else []
    if any(each.half is not None for each in found):
        parts.append("The difference is the value less the bound, with its 95% interval; within noise: that holds 0")
    if any(each.row is not None and each.half is None for each in found):
        parts.append("Where there is no interval, nothing tells the noise")
    return f"{'. '.join(parts)}."


def as_json(found: Sequence["Reached"]) -> list[dict[str, Any]]:
    """The goals as plain values; ``difference`` is value less bound, ``low`` and ``high`` the ends of its interval."""
    return [
        {"goal": str(each.goal), "metric": each.goal.metric, "outcome": outcome(each), **_numbers(each)}
        for each in found
    ]


def _numbers(found: "Reached") -> dict[str, Any]:
    if found.row is None:
        return {"reached": False}
    ends = (None, None) if found.half is None else (found.margin - found.half, found.margin + found.half)
    return {
        **{"reached": found.kept, "within_noise": found.within_noise, "model": found.row.model},
        **{"steps": found.row.steps, "value": found.value, "bound": found.bound, "difference": found.margin},
        **{"low": ends[0], "high": ends[1]},
    }


def _student(found: "Reached", report: Report) -> str:
    return DASH if found.row is None else label_of(report, found.row)


def _value(found: "Reached") -> str:
    known = None if found.row is None else measured(found.row, found.goal.metric)
    return with_spread(known) if known else number(found.value)


def _margin(found: "Reached") -> Cell:
    if found.half is None:
        return Cell(number(found.margin))
    return Cell(number(found.margin), interval(found.margin - found.half, found.margin + found.half))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.095 else f"{100 * share:.2g} %"
