"""The report: numbers survive every rendering, comparisons are right, and the page stands on its own."""

import base64
import csv
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import yaml
from PIL import Image
from reports import FD_PIXELS, make_report, strip
from rich.console import Console

from fewstep.errors import UsageError
from fewstep.evaluation.report import answer, tables, wording, write_report
from fewstep.evaluation.report.figures import HUES, figures, look_of, pareto_front, spaced
from fewstep.evaluation.report.grids import grids, tiles
from fewstep.evaluation.results import Measured, Report, Row, over_seeds, read_results


@pytest.fixture(scope="module")
def report() -> Report:
    return make_report()


@pytest.fixture(scope="module")
def written(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the whole report, for tests that only read it."""
    return write_report(report, tmp_path_factory.mktemp("report")).parent


def only(report: Report, *models: str) -> Report:
    return replace(report, rows=tuple(row for row in report.rows if row.model in models))


def with_metric(row: Row, **values: float | None) -> Row:
    return replace(row, metrics={**row.metrics, **{name: Measured(value) for name, value in values.items()}})


def parse_markdown(text: str) -> list[dict[str, str]]:
    """A Markdown table as one dict per line, marks of emphasis and intervals taken off."""
    split = [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in text.strip().splitlines()]
    heads, _, *lines = split
    clean = [[re.sub(r" \[.*\]$", "", cell.replace("**", "")) for cell in line] for line in lines]
    return [dict(zip(heads, line, strict=True)) for line in clean]


class Page(HTMLParser):
    """The tables' cells, the addresses and the open elements of a page."""

    VOID = ("meta", "img", "wbr", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.words += data
        if "table" in self.open and ("td" in self.open or "th" in self.open):
            self.tables[-1][-1][-1] += data


def test_numbers_have_three_significant_digits() -> None:
    cases = {0.43: "0.430", 27.1: "27.1", 100: "100", 0: "0", 48_000: "48,000", 1234.5: "1,230", -0.00042: "-0.000420"}
    cases |= {0.9996: "1.00", 999.6: "1,000", math.nan: "–", math.inf: "–"}
    assert {value: wording.number(value) for value in cases} == cases
    assert wording.number(None) == "–"
    assert (wording.count(84_480), wording.count(675_129_632), wording.count(999_600)) == ("84.5 k", "675 M", "1.00 M")
    assert wording.count(17) == "17"
    assert (wording.duration(95), wording.duration(5400), wording.duration(12)) == ("1.58 min", "1.50 h", "12.0 s")


def test_csv_holds_every_number_at_full_precision(report: Report, written: Path) -> None:
    with (written / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    speed = {"latency_ms", "images_per_s", "params"}
    assert len(lines) == sum(len(row.metrics) + len(speed) for row in report.rows)
    assert {"run", "model", "nfe", "steps", "metric", "value", "ci_lo", "ci_hi", "n"} <= lines[0].keys()
    found = {(line["run"], int(line["steps"]), line["metric"]): line for line in lines}
    for row in report.rows:
        for metric, measured in row.metrics.items():
            line = found[row.model, row.steps, metric]
            assert float(line["value"]) == measured.value
            assert line["ci_lo"] == ("" if measured.low is None else repr(measured.low))
            assert line["ci_hi"] == ("" if measured.high is None else repr(measured.high))
            assert (int(line["nfe"]), int(line["n"]), line["model"]) == (row.nfe, row.n, row.model)
            assert (line["role"], line["objective"], line["sampler"]) == (row.role, row.objective, row.sampler)
        for name in speed:
            assert float(found[row.model, row.steps, name]["value"]) == getattr(row, name)


def test_results_json_is_the_report(report: Report, written: Path) -> None:
    assert read_results(written / "results.json") == report


def test_markdown_and_page_show_the_same_numbers_as_the_rows(report: Report, written: Path) -> None:
    page = Page((written / "index.html").read_text())
    metrics = ["fd_pixels", "recall_pixels", "precision_pixels", "density_pixels", "coverage_pixels"]
    lines = parse_markdown(tables.markdown_table(report, metrics))
    html = next(table for table in page.tables if "precision ↑" in table[0])
    speed = next(table for table in page.tables if "p50 ms" in table[0])
    assert len(lines) == len(report.rows) == len(html) - 1 == len(speed) - 1
    for row, line, cells, times in zip(report.rows, lines, html[1:], speed[1:], strict=True):
        assert (line["model"], line["steps"], line["NFE"]) == (row.model, str(row.steps), str(row.nfe))
        for metric in metrics:
            head = {"fd_pixels": "fd_pixels ↓", "density_pixels": "density"}.get(metric, metric.split("_")[0] + " ↑")
            assert line[head] == wording.number(row.metrics[metric].value)
            shown = cells[html[0].index(head)]
            assert shown.split(" [")[0] == line[head]
        fd = row.metrics["fd_pixels"]
        assert cells[html[0].index("fd_pixels ↓")].endswith(f"[{wording.number(fd.low)}, {wording.number(fd.high)}]")
        assert line["latency ms"] == times[speed[0].index("p50 ms")] == wording.number(row.latency_ms)
        assert line["images/s"] == times[speed[0].index("images/s")] == wording.number(row.images_per_s)
    assert (
        tables.as_markdown(tables.results_table(report, wording.main_metrics(report, "digits"), speed=False))
        in (written / "report.md").read_text()
    )


def test_ratio_and_speed_up_are_against_the_teacher_at_most_steps(report: Report) -> None:
    found = {
        (line["model"], line["steps"]): line for line in parse_markdown(tables.markdown_table(report, ["fd_pixels"]))
    }
    # 0.43 / 0.54 and 25.6 ms / 1.65 ms.
    assert found["digits-meanflow", "4"]["ratio"] == "0.796"
    assert found["digits-meanflow", "4"]["speed-up"] == "15.5"
    # 1.22 / 0.54 and 25.6 / 0.45.
    assert found["digits-consistency", "1"]["ratio"] == "2.26"
    assert found["digits-consistency", "1"]["speed-up"] == "56.9"
    assert (found["digits-teacher", "64"]["ratio"], found["digits-teacher", "64"]["speed-up"]) == ("1.00", "1.00")
    assert found["digits-teacher", "1"]["speed-up"] == "64.0"
    # Another extractor has its own ratio: (3.1 * 0.43 + 0.4) / (3.1 * 0.54 + 0.4).
    other = parse_markdown(tables.markdown_table(report, ["fd_digits"]))
    assert (
        next(line for line in other if (line["model"], line["steps"]) == ("digits-meanflow", "4"))["ratio"] == "0.836"
    )


def test_best_of_each_step_count_is_bold_in_the_right_direction(report: Report) -> None:
    table = tables.results_table(report, ["fd_pixels", "recall_pixels", "density_pixels"])
    columns = {column.head: column for column in table.columns}
    rows = [row for curve in answer.series(report) for row in curve.rows]
    for metric, head, best in (("fd_pixels", "fd_pixels ↓", min), ("recall_pixels", "recall ↑", max)):
        for i, row in enumerate(rows):
            rivals = [r.metrics[metric].value for r in rows if r.steps == row.steps]
            # Nothing competes with the teacher at 16 steps and more.
            expected = len(rivals) > 1 and row.metrics[metric].value == best(rivals)
            assert columns[head].cells[i].best is expected
    assert not any(cell.best for cell in columns["density"].cells)


def test_headline_names_the_best_student_and_what_it_costs(report: Report) -> None:
    assert answer.headline(report) == (
        "At 4 steps, `digits-meanflow` has `fd_pixels` 0.430, 0.796× the teacher's 64-step figure (lower is better), "
        # 0.05 of 0.43 and of 0.54 to the sides of their difference.
        "in 1/16 of the time; recall falls from 0.878 to 0.838; "
        "the difference is -0.110, 95% interval [-0.159, -0.0615]."
    )
    # Eight steps are not few: a better student there does not lead.
    better = tuple(with_metric(row, fd_pixels=0.1) if row.steps == 8 else row for row in report.rows)
    assert answer.headline(replace(report, rows=better)).startswith("At 4 steps, `digits-meanflow` has")
    one = tuple(
        with_metric(r, fd_pixels=0.2) if (r.model[7:], r.steps) == ("progressive", 1) else r for r in report.rows
    )
    assert answer.headline(replace(report, rows=one)).startswith(
        "At 1 step, `digits-progressive` has `fd_pixels` 0.200, 0.370× the teacher's"
    )


def test_headline_says_worse_when_it_is_worse(report: Report) -> None:
    worse = answer.headline(only(report, "digits-teacher", "digits-consistency", "digits-progressive"))
    assert worse.startswith(
        "At 4 steps, even the best student is worse than the teacher: `digits-progressive` has `fd_pixels` 0.660, "
        "1.22× the teacher's 64-step figure, in 1/16 of the time"
    )
    alone = answer.headline(only(report, "digits-teacher", "digits-consistency"))
    assert alone.startswith("At 1 step, the student is worse than the teacher: `digits-consistency` has")
    even = tuple(
        with_metric(r, fd_pixels=0.54) if (r.model[7:], r.steps) == ("meanflow", 4) else r for r in report.rows
    )
    assert ", equal to the teacher's 64-step figure, in 1/16 of the time" in answer.headline(replace(report, rows=even))


def test_headline_says_when_the_difference_is_within_noise(report: Report) -> None:
    def widen(row: Row, low: float, high: float) -> Row:
        return replace(row, metrics={**row.metrics, "fd_pixels": Measured(row.metrics["fd_pixels"].value, low, high)})

    assert "within noise" not in answer.headline(report)  # [0.413, 0.452] and [0.518, 0.567]
    rows = tuple(widen(r, 0.3, 0.56) if (r.model[7:], r.steps) == ("meanflow", 4) else r for r in report.rows)
    # 0.13 and 0.027 to the sides of 0.43 - 0.54.
    assert answer.headline(replace(report, rows=rows)).endswith(
        "; the difference of -0.110 is within noise, 95% interval [-0.267, 0.0470]."
    )


@pytest.mark.parametrize(
    ("speed_up", "clause"),
    [
        (15.5, "in 1/16 of the time"),
        (3.94, "in 1/3.9 of the time"),
        (1.02, "in the same time"),
        (0.5, "in 2.00× the time"),
    ],
)
def test_clause_about_time(speed_up: float, clause: str) -> None:
    assert wording.times_as_long(speed_up) == clause


def test_headline_without_teacher_or_students(report: Report) -> None:
    students = replace(report, rows=tuple(row for row in report.rows if row.role == "student"))
    assert "no teacher was measured beside it, so what was lost is not known" in answer.headline(students)
    assert "ratio" not in tables.markdown_table(students, ["fd_pixels"])
    assert answer.headline(only(report, "digits-teacher")) == (
        "No student was measured; at 64 steps the teacher has `fd_pixels` 0.540."
    )


def test_different_sample_counts_are_not_compared(report: Report) -> None:
    rows = tuple(replace(row, n=2000) if row.model == "digits-meanflow" else row for row in report.rows)
    mixed = replace(report, rows=rows)
    assert answer.headline(mixed).startswith(
        "At 4 steps, even the best student is worse than the teacher: `digits-prog"
    )
    found = {
        (line["model"], line["steps"]): line for line in parse_markdown(tables.markdown_table(mixed, ["fd_pixels"]))
    }
    assert found["digits-meanflow", "4"]["ratio"] == "–"
    assert (found["digits-meanflow", "4"]["n"], found["digits-progressive", "4"]["n"]) == ("2,000", "10,000")
    lonely = answer.headline(only(mixed, "digits-teacher", "digits-meanflow"))
    assert lonely.endswith("is on another number of samples and does not compare.")


def test_only_inception_is_called_fid(report: Report, written: Path) -> None:
    page = (written / "index.html").read_text()
    defined = page.index("FID")
    assert page[defined - 4 : defined + 10].startswith("<dt>FID</dt>")
    assert "FID" not in (written / "report.md").read_text().split("### Definitions")[0]
    rows = tuple(replace(row, metrics={"fid": row.metrics["fd_pixels"]}) for row in report.rows)
    inception = replace(report, rows=rows, reference={**report.reference, "extractors": {"inception": {"dim": 2048}}})
    assert "fid10k ↓" in tables.markdown_table(inception, ["fid"])
    full = replace(inception, rows=tuple(replace(row, n=50_000) for row in rows))
    assert "| fid50k ↓ |" in tables.markdown_table(full, ["fid"])


def test_pareto_front_of_a_worked_example() -> None:
    points = [(1.0, 9.0), (2.0, 4.0), (2.0, 5.0), (3.0, 4.0), (4.0, 1.0), (5.0, 2.0), (0.5, 20.0), (4.0, 1.0)]
    # (2, 5) and (3, 4) lose to (2, 4), (5, 2) loses to (4, 1); the two (4, 1) do not beat each other.
    assert pareto_front(points) == [6, 0, 1, 4, 7]
    assert pareto_front([]) == []
    assert pareto_front([(1.0, 1.0)]) == [0]


def test_page_stands_on_its_own(written: Path) -> None:
    text = (written / "index.html").read_text()
    page = Page(text)
    assert page.open == []
    assert "http" not in text
    assert "<script" not in text
    assert "<link" not in text
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not re.search(r"url\((?!#)|@import", text)
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)
    assert {found for found in re.findall(r"url\(#([^)]+)\)", text)} <= set(page.ids)
    # Four figures against steps and two against time; one grid per model.
    assert text.count("<svg") == 6
    assert text.count('<img class="grid"') == 4
    assert "n = 10,000" in page.words
    assert "k = 3" in page.words
    assert "0123abcd" in page.words
    assert "guidance's second call included" in page.words


def test_two_writes_give_the_same_bytes_and_leave_nothing_behind(report: Report, written: Path, tmp_path: Path) -> None:
    write_report(report, tmp_path / "a")
    write_report(report, tmp_path / "b")
    write_report(report, tmp_path / "b")
    files = [
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()} for root in tmp_path.iterdir()
    ]
    assert files[0] == files[1]
    names = {str(path) for path in files[0]}
    assert {"index.html", "report.md", "results.csv", "results.json", "card.md", "cards/digits-meanflow.md"} <= names
    assert {"figures/fd_pixels-steps.svg", "figures/fd_pixels-latency.png", "samples/digits-teacher.png"} <= names
    assert not [name for name in names if "tmp" in name]


def test_a_users_style_does_not_change_a_report(report: Report, tmp_path: Path) -> None:
    import matplotlib

    small = only(report, "digits-meanflow")
    write_report(small, tmp_path / "a")
    with matplotlib.rc_context({"font.size": 20, "axes.linewidth": 5}):
        write_report(small, tmp_path / "b")
        assert matplotlib.rcParams["font.size"] == 20
    figure = "figures/fd_pixels-steps.svg"
    assert (tmp_path / "a" / figure).read_bytes() == (tmp_path / "b" / figure).read_bytes()


def test_names_from_outside_are_escaped(report: Report, tmp_path: Path) -> None:
    name = '_<script>alert("x")</script> & $x|y*`z'
    rows = tuple(replace(row, model=name, objective="<i>a|b") for row in only(report, "digits-meanflow").rows)
    teachers = only(report, "digits-teacher").rows
    hostile = replace(report, rows=(*teachers, *rows), models=(), environment={"<u>": "</dl>"})
    text = write_report(hostile, tmp_path).read_text()
    page = Page(text)
    assert "<script" not in text
    assert "<i>" not in text
    assert "<u>" not in text
    assert page.open == []
    assert name in page.words
    html = next(table for table in page.tables if "NFE" in table[0])
    assert sum(cells[0] == name for cells in html) == 4
    assert "<script" not in (tmp_path / "report.md").read_text()
    widths = {line.replace("\\|", "").count("|") for line in tables.markdown_table(hostile, ["fd_pixels"]).splitlines()}
    assert len(widths) == 1
    assert yaml.safe_load((tmp_path / "card.md").read_text().split("---\n")[1])["model-index"][0]["name"] == name


def test_card_front_matter_holds_the_students_numbers(report: Report, written: Path, tmp_path: Path) -> None:
    for model in list(FD_PIXELS)[1:]:
        text = (written / "cards" / f"{model}.md").read_text()
        entry = yaml.safe_load(text.split("---\n")[1])["model-index"][0]
        assert entry["name"] == model
        found = {
            (m["type"], m["args"]["steps"]): (m["value"], m["args"]["nfe"], m["args"]["n"])
            for m in entry["results"][0]["metrics"]
        }
        mine = [row for row in report.rows if row.model == model]
        assert found == {(k, r.steps): (m.value, r.nfe, r.n) for r in mine for k, m in r.metrics.items()}
    assert (written / "card.md").read_bytes() == (written / "cards" / "digits-meanflow.md").read_bytes()
    # At one step meanflow has 0.91 against the teacher's 0.54 at 64.
    assert "- Fréchet distance on pixels: 0.540 → 0.910" in (written / "card.md").read_text()
    write_report(only(report, "digits-teacher", "digits-meanflow"), tmp_path / "one")
    assert (tmp_path / "one" / "card.md").is_file()
    assert not (tmp_path / "one" / "cards").exists()


def test_grids_show_the_strips_pixel_for_pixel(report: Report) -> None:
    found = {grid.name: grid for grid in grids(report)}
    assert list(found) == list(FD_PIXELS)
    row = next(row for row in report.rows if (row.model, row.steps) == ("digits-meanflow", 8))
    picture = np.asarray(Image.open(io.BytesIO(found["digits-meanflow"].png)).convert("RGB"))
    whole = np.asarray(Image.open(io.BytesIO(base64.b64decode(row.samples_png or ""))).convert("RGB"))
    assert len(tiles(row)) == 10
    enlarged = [whole[:, left : left + 8].repeat(6, axis=0).repeat(6, axis=1) for left in (0, 8)]
    teacher = next(row for row in report.rows if (row.model, row.steps) == ("digits-teacher", 64))
    top = np.asarray(tiles(teacher)[0]).repeat(6, axis=0).repeat(6, axis=1)

    def places(tile: np.ndarray) -> list[tuple[int, int]]:
        windows = np.lib.stride_tricks.sliding_window_view(picture, tile.shape)[:, :, 0]
        corners = np.argwhere((windows[..., 0, 0, :] == tile[0, 0]).all(axis=-1))
        return [(int(y), int(x)) for y, x in corners if (windows[y, x] == tile).all()]

    (first,), (second,), (above,) = places(enlarged[0]), places(enlarged[1]), places(top)
    assert (second[0], second[1] - first[1]) == (first[0], 50)  # 8 pixels six times, and a gap of two
    assert (above[1], above[0] < first[0]) == (first[1], True)
    four = next(row for row in report.rows if (row.model, row.steps) == ("digits-meanflow", 4))
    (below,) = places(np.asarray(tiles(four)[0]).repeat(6, axis=0).repeat(6, axis=1))
    assert (below[0] - first[0], below[1]) == (50, first[1])


def test_densities_of_points_are_one_picture(report: Report) -> None:
    """A line per model and a column per step count; where a model was not measured the page stays white."""

    def density(grey: int) -> str:
        out = io.BytesIO()
        Image.fromarray(np.full((96, 96), grey, dtype=np.uint8)).save(out, format="PNG")
        return base64.b64encode(out.getvalue()).decode()

    rows = [row for row in report.rows if (row.model, row.steps) != ("digits-meanflow", 8)]
    greys = {(row.model, row.steps): 20 + 5 * place for place, row in enumerate(rows)}
    rows = [replace(row, samples_png=density(greys[row.model, row.steps])) for row in rows]
    (grid,) = grids(replace(report, rows=tuple(rows)))
    picture = np.asarray(Image.open(io.BytesIO(grid.png)).convert("L"))
    steps = sorted({row.steps for row in rows})
    left = picture.shape[1] - 98 * len(steps)  # a gap of two after each
    top = picture.shape[0] - 98 * len(FD_PIXELS)
    for line, model in enumerate(FD_PIXELS):
        for column, count in enumerate(steps):
            cell = picture[top + 98 * line :, left + 98 * column :][:96, :96]
            assert (cell == greys.get((model, count), 255)).all(), (model, count)


def test_broken_samples_are_named(report: Report, tmp_path: Path) -> None:
    rows = tuple(replace(row, samples_png="bm90IGEgcG5n") if row.steps == 2 else row for row in report.rows)
    with pytest.raises(UsageError, match="the samples of digits-teacher at 2 steps are not a PNG"):
        write_report(replace(report, rows=rows), tmp_path)


def test_series_of_one_model_are_told_apart(report: Report) -> None:
    heun = tuple(replace(row, sampler="heun", nfe=2 * row.nfe) for row in report.rows if row.role == "teacher")
    labels = [curve.label for curve in answer.series(replace(report, rows=report.rows + heun))]
    assert labels == ["digits-teacher (euler)", "digits-teacher (heun)", *list(FD_PIXELS)[1:]]


def bare(report: Report) -> Report:
    rows = [replace(row, latency_ms=None, images_per_s=None, samples_png=None) for row in report.rows]
    return Report(tuple(rows))


def single(report: Report) -> Report:
    return Report((next(row for row in report.rows if row.role == "student"),))


def awkward(report: Report) -> Report:
    rows = [with_metric(row, fd_pixels=0.0, fd_digits=math.nan, recall_pixels=None) for row in report.rows]
    return replace(report, rows=tuple(rows))


def toy(report: Report) -> Report:
    rows = [
        replace(row, metrics={"fd_identity": Measured(0.01), "swd": Measured(0.02)}, samples_png=strip(9, k=3, side=96))
        for row in report.rows
    ]
    return Report(
        tuple(rows), reference={"dataset": "two moons", "extractors": {"identity": {}}, "protocol": ["k = 3"]}
    )


def unmeasured(report: Report) -> Report:
    return replace(report, rows=tuple(replace(row, metrics={}) for row in report.rows))


def long_names(report: Report) -> Report:
    return replace(report, rows=tuple(replace(row, model=row.model + "-ema" * 40) for row in report.rows))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "make",
    [
        bare,
        awkward,
        *(pytest.param(make, marks=pytest.mark.thorough) for make in (single, toy, unmeasured, long_names)),
    ],
)
def test_incomplete_reports_are_written(make: Callable[[Report], Report], report: Report, tmp_path: Path) -> None:
    made = make(report)
    page = Page(write_report(made, tmp_path).read_text())
    assert page.open == []
    assert len(next(lines for lines in page.tables if "NFE" in lines[0])) == len(made.rows) + 1
    assert "nan" not in page.words.lower().split()
    assert "None" not in page.words
    assert json.loads((tmp_path / "results.json").read_text())["rows"]


def test_nothing_measured_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing was measured"):
        write_report(Report(()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_console_table_fits_a_hundred_columns(report: Report) -> None:
    for made in (report, long_names(report), unmeasured(report)):
        console = Console(width=100, file=io.StringIO(), color_system=None)
        console.print(tables.console_table(made))
        shown = console.file.getvalue()
        assert max(map(len, shown.splitlines())) <= 100
        assert "48,000" in shown
    console = Console(width=100, file=io.StringIO(), color_system=None)
    console.print(tables.console_table(report))
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in console.file.getvalue().splitlines()]
    assert ["digits-meanflow", "1", "1", "0.910", "3.22", "0.795", "1.69", "0.450", "48,000"] in lines
    assert ["", "4", "4", "0.430", "1.73", "0.838", "0.796", "1.65", "12,000"] in lines


def test_report_imports_no_torch() -> None:
    import subprocess
    import sys

    heavy = ("torch", "matplotlib", "jinja2", "PIL")
    code = f"import sys, fewstep.evaluation.report; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# One table and one figure --------------------------------------------------------------------------------------------


def overview(text: str) -> dict[str, dict[str, str]]:
    """The overview of a Markdown report, by model."""
    block = next(block for block in text.split("\n\n") if "fd_pixels ↓ at 1" in block)
    return {line["model"]: line for line in parse_markdown(block)}


def test_the_overview_has_a_line_per_model(report: Report, written: Path) -> None:
    lines = overview((written / "report.md").read_text())
    assert list(lines) == list(FD_PIXELS)
    for row in report.rows:
        if row.steps > 8:
            continue  # no student has as many
        line = lines[row.model]
        for metric, arrow in (("fd_pixels", "↓"), ("fd_digits", "↓"), ("recall_pixels", "↑")):
            assert line[f"{metric} {arrow} at {row.steps}"] == wording.number(row.metrics[metric].value)
    assert len(lines["digits-teacher"]) == 1 + 3 * 4
    table = tables.overview_table(report)
    assert table is not None
    assert table.groups() == [("", 1), ("fd_pixels ↓", 4), ("fd_digits ↓", 4), ("recall_pixels ↑", 4)]
    best = {
        column.head: table.columns[0].cells[i].text
        for column in table.columns[1:5]
        for i, cell in enumerate(column.cells)
        if cell.best
    }
    assert best == {"1": "digits-meanflow", "2": "digits-meanflow", "4": "digits-meanflow", "8": "digits-meanflow"}
    assert "digits-teacher at 64 steps: fd_pixels 0.540, fd_digits 2.07, recall_pixels" in tables.overview_caption(
        report
    )


def test_the_overview_has_a_dash_where_nothing_was_measured(report: Report, tmp_path: Path) -> None:
    kept = [row for row in report.rows if row.model != "digits-consistency" or row.steps == 1]
    write_report(replace(report, rows=tuple(kept)), tmp_path)
    line = overview((tmp_path / "report.md").read_text())["digits-consistency"]
    assert line["fd_pixels ↓ at 1"] == "1.22"
    assert {line[f"fd_pixels ↓ at {steps}"] for steps in (2, 4, 8)} == {"–"}
    assert tables.overview_table(only(report, "digits-teacher", "digits-meanflow")) is None


def test_a_spread_has_the_decimals_of_its_value() -> None:
    cases = {(0.2687, 0.0123): "± 0.012", (27.13, 0.4): "± 0.4", (4.7612, 0.096): "± 0.10", (1234.0, 56.0): "± 56"}
    cases |= {(-0.000606, 0.021529): "± 0.022", (0.5, 5.21): "± 5.2", (3.0, 1234.0): "± 1,234"}
    cases |= {(0.2687, 0.0002): "± 0.0002", (0.0, 0.0): "± 0", (0.5, 0.0): "± 0.000", (0.5, math.nan): ""}
    assert {pair: wording.spread(*pair) for pair in cases} == cases
    assert wording.spread(0.5, None) == ""
    assert wording.with_spread(Measured(0.2687, sd=0.0123)) == "0.269 ± 0.012"
    assert wording.with_spread(None) == "–"


@pytest.fixture(scope="module")
def spread_out(report: Report) -> Report:
    """The same over three trainings, at 0.9, 1 and 1.1 times each distance: the mean stays, sd is a tenth of it."""
    seeds = {}
    for seed, factor in enumerate((0.9, 1.0, 1.1)):
        rows = []
        for row in report.rows:
            scaled = {n: Measured(m.value * (factor if n.startswith("fd") else 1)) for n, m in row.metrics.items()}
            rows.append(replace(row, metrics=scaled, seed=seed, digest=f"{row.digest}-{seed}"))
        seeds[seed] = replace(report, rows=tuple(rows))
    return over_seeds(seeds)


def test_spreads_are_in_every_rendering(spread_out: Report, report: Report, tmp_path: Path) -> None:
    text = write_report(spread_out, tmp_path).read_text()
    markdown = (tmp_path / "report.md").read_text()
    # digits-consistency at one step: 1.22 and a tenth of it.
    assert overview(markdown)["digits-consistency"]["fd_pixels ↓ at 1"] == "1.22 ± 0.12"
    assert "1.22 <small>± 0.12</small>" in text
    (main,) = [
        block for block in markdown.split("\n\n") if block.startswith("| model | objective") and "fd_pixels" in block
    ]
    assert "1.22 ± 0.12" in main
    for page in (Page(text).words, markdown):
        assert "mean and standard deviation over 3 trainings" in page
        assert "No intervals are shown" not in page
    with (tmp_path / "results.csv").open() as file:
        lines = {(line["model"], line["steps"], line["metric"]): line for line in csv.DictReader(file)}
    line = lines["digits-consistency", "1", "fd_pixels"]
    assert (float(line["value"]), float(line["sd"]), line["seeds"]) == (pytest.approx(1.22), pytest.approx(0.122), "3")
    assert read_results(tmp_path / "results.json") == spread_out
    assert answer.headline(spread_out).startswith(
        "At 4 steps, `digits-meanflow` has `fd_pixels` 0.430 ± 0.043 over 3 tr"
    )
    assert len(answer.series(spread_out)) == 4
    assert "0, 1, 2" in dict(dict(_sections(text))["Data"])["seed"]
    card = yaml.safe_load((tmp_path / "card.md").read_text().split("---\n")[1])["model-index"][0]
    first = card["results"][0]["metrics"][0]
    assert (first["args"]["sd"], first["args"]["trainings"]) == (pytest.approx(0.1 * first["value"]), 3)
    console = Console(width=100, file=io.StringIO(), color_system=None)
    console.print(tables.console_table(spread_out))
    assert "1.22 ± 0.12" in console.file.getvalue()
    assert max(map(len, console.file.getvalue().splitlines())) <= 100
    assert "±" not in tables.markdown_table(report, ["fd_pixels"])


def _sections(page: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """Headings of a page with the names and texts of the list below each."""
    found = re.findall(r"<h3>([^<]*)</h3>\s*<dl>(.*?)</dl>", page, flags=re.DOTALL)
    return [(heading, re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", body)) for heading, body in found]


def test_bands_of_a_figure_are_one_standard_deviation(spread_out: Report, report: Report) -> None:
    one = only(spread_out, "digits-meanflow")
    rows = [replace(row, metrics={"recall_pixels": row.metrics["recall_pixels"]}) for row in one.rows]
    without = [replace(row, metrics={"recall_pixels": Measured(0.5)}, seeds=1) for row in rows]
    (banded,), (plain,) = (figures(Report(tuple(made), (), {"extractors": {"pixels": {}}})) for made in (rows, without))
    assert "Points and bands: mean and standard deviation over 3 trainings" in banded.caption
    assert "PolyCollection" in banded.svg
    assert "bands" not in plain.caption
    assert "PolyCollection" not in plain.svg
    # A figure of many curves has no room for bands.
    wide = next(figure for figure in figures(many(report)) if figure.name == "fd_pixels-steps")
    assert "Points and bars: mean and standard deviation over 1–3 trainings, set apart sideways" in wide.caption
    assert "PolyCollection" not in wide.svg
    assert wording.ends(Measured(0.5, sd=0.1)) == pytest.approx((0.4, 0.6))
    assert wording.ends(Measured(0.5, 0.3, 0.9, sd=0.1)) == (0.3, 0.9)
    assert wording.ends(Measured(0.5)) is None


def many(report: Report, count: int = 14) -> Report:
    """As many students, one of them with a single step, one at zero, beside the teacher."""
    students = []
    for i in range(count):
        own = [row for row in report.rows if row.model == list(FD_PIXELS)[1 + i % 3]]
        for row in own[: 1 if i == 5 else None]:
            metrics = {
                name: replace(m, value=m.value * (1 + i / 9) if i != 7 else 0.0, low=None, high=None, sd=0.02)
                for name, m in row.metrics.items()
                if name in ("fd_pixels", "recall_pixels")
            }
            students.append(replace(row, model=f"student-{i}", metrics=metrics, seeds=3))
    teacher = [with_only(row, *students[0].metrics) for row in only(report, "digits-teacher").rows]
    return Report((*teacher, *students), (), {"dataset": "digits", "floor": {"fd_pixels": 0.02}})


def with_only(row: Row, *metrics: str) -> Row:
    return replace(row, metrics={name: row.metrics[name] for name in metrics})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("teacher", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_fourteen_curves_are_told_apart(teacher: bool, report: Report, tmp_path: Path) -> None:
    made = many(report)
    if not teacher:
        made = replace(made, rows=tuple(row for row in made.rows if row.role == "student"))
    looks = look_of(answer.series(made))
    drawn = {(look["color"], look["marker"], look["linestyle"], look.get("markerfacecolor")) for look in looks.values()}
    assert len(drawn) == len(looks) == 14 + teacher
    # Neither a hue nor a marker alone tells two of them apart twice.
    students = [look for label, look in looks.items() if label.startswith("student")]
    assert len({(look["color"], look["linestyle"]) for look in students}) == 14
    text = write_report(made, tmp_path).read_text()
    page = Page(text)
    assert page.open == []
    assert text.count('class="wide"') == 3
    assert "<details>" in text
    assert len(page.ids) == len(set(page.ids))
    for i in range(len(HUES)):  # a light and a dark colour of each
        assert text.count(f"--hue-{i}: ") == 2
    assert not [hue for hue in HUES if hue.lower() in text.replace("--hue", "").split("</style>")[1]]
    assert page.words.count("The axes hold the students") == 2


def test_only_curves_that_end_inside_at_the_right_are_named_there() -> None:
    from matplotlib.figure import Figure

    from fewstep.evaluation.report.figures import _name_at_ends

    axes = Figure().add_subplot()
    lines = {"near": [2, 3, 3], "above": [9, 9, 9], "leaves below": [3, 2, -7], "short": [2]}
    drawn = {label: axes.plot([1, 2, 4][: len(y)], y, label=label)[0] for label, y in lines.items()}
    axes.set_xlim(0, 5)
    axes.set_ylim(0, 5)
    assert _name_at_ends(axes, drawn, 4.6) == ["near"]
    assert [text.get_text() for text in axes.texts if text.get_text()] == ["near"]


@pytest.mark.parametrize("curves", [8, 18, 30, 45])
def test_a_wide_figure_has_room_for_the_names_of_all_curves(curves: int) -> None:
    from fewstep.evaluation.report.figures import LABEL_INCHES, STYLE, _canvas

    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas(wide=True, curves=curves)
        axes.set_xlabel("solver steps")
        figure.draw_without_rendering()
    height = axes.get_position().height * figure.get_figheight()
    assert height > 0.97 * (curves - 1) * LABEL_INCHES


def test_names_beside_curves_keep_their_distance() -> None:
    assert spaced([0.1, 0.5, 0.9], 0.05) == pytest.approx([0.1, 0.5, 0.9])
    # Two at one place part evenly; a third that they push aside joins them.
    assert spaced([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    assert spaced([0.5, 0.5, 0.58], 0.1) == pytest.approx([0.4267, 0.5267, 0.6267], abs=1e-4)
    assert spaced([0.0, 0.01], 0.1) == pytest.approx([0.0, 0.1])
    assert spaced([1.0, 1.0, 1.0], 0.1) == pytest.approx([0.8, 0.9, 1.0])
    assert spaced([], 0.1) == []
