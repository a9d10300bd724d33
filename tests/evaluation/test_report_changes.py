"""What changed since: rows find their counterparts, verdicts follow intervals, ledgers and files are read."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from reports import make_report, rich_report
from typer.testing import CliRunner

from fewstep.cli import app
from fewstep.errors import UsageError
from fewstep.evaluation.report import write_report
from fewstep.evaluation.report.changes import as_json, changes, changes_table, read_ledger, read_older
from fewstep.evaluation.results import Measured, Report


def moved(report: Report, model: str, steps: int, **metrics: Measured) -> Report:
    """The report with other values in one row."""
    rows = [
        replace(row, metrics={**row.metrics, **metrics}) if (row.model, row.steps) == (model, steps) else row
        for row in report.rows
    ]
    return replace(report, rows=tuple(rows))


def test_verdicts_follow_the_intervals() -> None:
    now = make_report()
    older = moved(
        now,
        "digits-meanflow",
        4,
        fd_pixels=Measured(0.6, 0.58, 0.62),  # now 0.43 [0.41, 0.45]
        fd_digits=Measured(2.0),  # no interval
        precision_pixels=Measured(now.rows[0].metrics["precision_pixels"].value),
    )
    older = moved(older, "digits-meanflow", 1, fd_pixels=Measured(0.93, 0.90, 0.96))  # 0.91 [0.87, 0.96]
    older = moved(older, "digits-consistency", 1, fd_pixels=Measured(0.9, 0.88, 0.92))  # 1.22 [1.17, 1.28]
    found = changes(now, older, "older.json")
    by = {(change.label, change.steps, change.metric): change.verdict for change in found.changes}
    assert by["digits-meanflow", 4, "fd_pixels"] == "better"
    assert by["digits-meanflow", 1, "fd_pixels"] == "within noise"
    assert by["digits-consistency", 1, "fd_pixels"] == "worse"
    assert by["digits-meanflow", 4, "fd_digits"] == "changed"
    assert by["digits-teacher", 64, "fd_pixels"] == "equal"
    assert found.changes[0].verdict == "worse"
    assert (found.notes, found.against) == ((), "older.json")
    total = len(found.changes)
    assert found.summary() == (
        f"Of {total} values in 19 rows: 1 worse, 1 better, 2 changed by an amount of unknown noise, 1 within noise, "
        f"{total - 5} equal to the last digit."
    )
    table = changes_table([change for change in found.changes if change.verdict == "better"])
    line = {column.head: (column.cells[0].text, column.cells[0].interval) for column in table.columns}
    # 0.02 and 0.0215 (0.05 of 0.43) to the sides of -0.17.
    assert line["change"] == ("-0.170", "[-0.212, -0.128]")
    assert (line["before"][0], line["now"][0], line["verdict"][0]) == ("0.600", "0.430", "better")


def test_the_same_teacher_makes_the_comparison_finer() -> None:
    """0.01 apart: less than the intervals of both values tell apart, more than the paired differences do."""
    now = rich_report()
    rows = []
    for row in now.rows:
        value = row.metrics["fd_debiased_pixels"].value
        if (row.model, row.steps) == ("digits-meanflow", 4):
            value += 0.05
            stated = {"fd_debiased_pixels": Measured(value - 0.53, value - 0.54, value - 0.52)}
            metrics = {**row.metrics, "fd_debiased_pixels": Measured(value, value - 0.03, value + 0.03)}
            row = replace(row, metrics=metrics, differences=stated)
        rows.append(row)
    (found,) = [
        change
        for change in changes(now, replace(now, rows=tuple(rows)), "before").changes
        if (change.label, change.steps, change.metric) == ("digits-meanflow", 4, "fd_debiased_pixels")
    ]
    assert (found.verdict, found.difference.how) == ("better", "bound")
    assert found.difference.high == pytest.approx(-0.05 + 0.02 + 0.01)


def test_rows_without_a_counterpart_are_named() -> None:
    now = make_report()
    rows = [row for row in now.rows if (row.model, row.steps) != ("digits-progressive", 2)]
    rows = [replace(row, n=500) if (row.model, row.steps) == ("digits-meanflow", 8) else row for row in rows]
    rows = [replace(row, guidance=1.5) if (row.model, row.steps) == ("digits-teacher", 64) else row for row in rows]
    older = replace(now, rows=tuple(rows), reference={**now.reference, "protocol": {"neighbours": "k = 5"}})
    assert changes(now, older, "older.json").notes == (
        "the protocol of the reference differs from older.json's: some of what changed may be that",
        "digits-teacher at 64 steps: measured there with another sampler, guidance or average",
        "digits-meanflow at 8 steps: measured there on 500 samples, here on 10000",
        "digits-progressive at 2 steps: not measured there",
    )
    with pytest.raises(UsageError, match="was measured on moons, not on digits 8x8"):
        changes(now, replace(now, reference={"dataset": "moons"}), "older.json")
    assert changes(now, replace(now, rows=()), "x").summary() == "Nothing was measured in both."


def ledger(path: Path, *lines: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps({"n": 10_000, "varied": "", **line}) + "\n" for line in lines))
    return path


def test_a_ledger_is_read_as_means_over_seeds(tmp_path: Path) -> None:
    path = ledger(
        tmp_path / "ledger.jsonl",
        *(
            {"recipe": "digits-meanflow", "steps": 4, "seed": seed, "fd_pixels": value, "train_s": 9, "ratio": 1.0}
            for seed, value in enumerate((0.18, 0.19, 0.20))
        ),
        *({"recipe": "twice", "steps": 1, "seed": 0, "fd_pixels": 1.0, "varied": varied} for varied in "ab"),
    )
    (row,) = read_ledger(path).rows
    assert (row.model, row.steps, row.n, row.seeds) == ("digits-meanflow", 4, 10_000, 3)
    assert row.metrics == {"fd_pixels": Measured(pytest.approx(0.19), sd=pytest.approx(0.01))}
    # One training of now beside three: 4.303 * 0.01 * sqrt(4/3) = 0.0497 to the sides.
    now = moved(make_report(), "digits-meanflow", 4, fd_pixels=Measured(0.25, 0.24, 0.26))
    (change,) = changes(now, read_older(path), "ledger.jsonl").changes
    assert (change.verdict, change.difference.how) == ("worse", "trainings")
    assert change.difference.low == pytest.approx(0.06 - 0.0497, abs=1e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{broken", "is not a readable ledger"),
        ('{"method": "MeanFlow"}', "has no line with recipe, steps and n"),
        ("", "has no line with recipe, steps and n"),
    ],
)
def test_other_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_older(tmp_path / "x.jsonl")
    ambiguous = [{"recipe": "twice", "steps": 1, "fd_pixels": 1.0, "varied": varied} for varied in "ab"]
    with pytest.raises(UsageError, match="measured with several settings"):
        read_older(ledger(tmp_path / "y.jsonl", *ambiguous))
    with pytest.raises(UsageError, match=r"no .*results.json"):
        read_older(tmp_path)


def test_changes_are_on_the_pages(tmp_path: Path) -> None:
    now = make_report()
    now = replace(now, rows=tuple(row for row in now.rows if row.model == "digits-meanflow"))
    older = moved(now, "digits-meanflow", 4, fd_pixels=Measured(0.6, 0.58, 0.62), fd_digits=Measured(2.0))
    found = changes(now, older, "older & wiser.json")
    page = write_report(now, tmp_path, found).read_text()
    markdown = (tmp_path / "report.md").read_text()
    assert "What changed since older &amp; wiser.json" in page
    assert "## What changed since older &amp; wiser.json" in markdown
    for text in (page, markdown):
        assert "1 better" in text
        assert "[-0.212, -0.128]" in text
        assert "Changes of which the noise is not known" in text
    assert "| digits-meanflow | 4 | fd_pixels | 0.600 | 0.430 | -0.170 [-0.212, -0.128] | better |" in markdown
    said = json.loads(json.dumps(as_json(found)))
    assert said["values"][0]["verdict"] == "better"
    write_report(now, tmp_path)
    assert "What changed" not in (tmp_path / "report.md").read_text()


def test_the_command_says_what_changed(tmp_path: Path) -> None:
    now = make_report()
    now = replace(now, rows=tuple(row for row in now.rows if (row.model, row.steps) == ("digits-meanflow", 4)))
    older = moved(now, "digits-meanflow", 4, fd_pixels=Measured(0.6, 0.58, 0.62))
    for name, report in (("now", now), ("before", older)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(report.to_json()))
    line = ["report", str(tmp_path / "now"), "--against", str(tmp_path / "before"), "--json"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)["changes"]
    assert (said["against"], said["values"][0]["verdict"]) == ("before", "better")
    assert "1 better" in result.stderr
    assert "What changed since before" in (tmp_path / "now" / "report" / "index.html").read_text()
    line[3] = str(tmp_path / "nowhere")
    assert CliRunner().invoke(app, line).exit_code == 2
