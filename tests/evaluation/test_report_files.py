"""The files of a report beside its page: LaTeX, CSV, model cards; and what rows with every key look like in them."""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from reports import FD_PIXELS, make_report, rich_report

from fewstep.evaluation.report import answer, costs, paper, tables, tidy, wording, write_report
from fewstep.evaluation.report.card import front_matter
from fewstep.evaluation.report.latex import as_latex, escape
from fewstep.evaluation.results import Measured, Report, read_results


@pytest.fixture(scope="module")
def rich() -> Report:
    return rich_report()


@pytest.fixture(scope="module")
def written(rich: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(rich, tmp_path_factory.mktemp("rich")).parent


def small(report: Report) -> Report:
    """The teacher at 64 steps and MeanFlow at 1 and 4."""
    kept = {("digits-teacher", 64), ("digits-meanflow", 1), ("digits-meanflow", 4)}
    rows = tuple(row for row in report.rows if (row.model, row.steps) in kept)
    metrics = ("fd_pixels", "fd_debiased_pixels", "recall_pixels")
    rows = tuple(replace(row, metrics={m: row.metrics[m] for m in metrics if m in row.metrics}) for row in rows)
    return replace(report, rows=rows)


def test_the_first_table(rich: Report) -> None:
    """0.42 - 0.53 = -0.11 and 0.02 to its sides; the interval stands at the debiased distance, whose it is. Training
    took 95 and 155 s on two GPUs."""
    assert tables.as_markdown(paper.paper_table(small(rich))).splitlines() == [
        "| model | steps | NFE | fd_pixels ↓ | fd_debiased_pixels ↓ | ratio | Δ teacher "
        "| recall ↑ | time ms | parameters | GPU-minutes |",
        "|:---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        "| digits-teacher | 64 | 128 | 0.540 | 0.530 [0.500, 0.560] | 1.00 | – "
        "| 0.878 [0.868, 0.888] | 25.6 | 84.5 k | 3.17 |",
        "| digits-meanflow | 1 | 1 | 0.910 | 0.900 [0.870, 0.930] | 1.69 | 0.370 [0.350, 0.390] "
        "| 0.795 [0.785, 0.805] | 0.450 | 84.5 k | 5.17 |",
        "| digits-meanflow | 4 | 4 | 0.430 | 0.420 [0.390, 0.450] | 0.796 | -0.110 [-0.130, -0.0900] "
        "| 0.838 [0.828, 0.848] | 1.65 | 84.5 k | 5.17 |",
    ]
    assert "; the paired debiased difference is -0.110, 95% interval [-0.130, -0.0900]." in answer.headline(rich)


def test_the_table_of_older_files_has_what_they_hold() -> None:
    plain = make_report()
    heads = [column.head for column in paper.paper_table(plain).columns]
    assert heads == [
        *("model", "steps", "NFE", "fd_pixels ↓", "ratio", "Δ teacher", "fd_digits ↓", "recall ↑", "density"),
        *("coverage ↑", "time ms", "parameters"),
    ]
    bare = replace(plain, rows=tuple(replace(row, latency_ms=None, images_per_s=None) for row in plain.rows))
    assert paper.speed_table(bare) is None
    assert paper.class_tables(plain) == []
    speed = paper.speed_table(plain)
    assert speed is not None
    assert [column.head for column in speed.columns][3:] == ["p50 ms", "speed-up", "images/s", "parameters"]


def test_older_results_render(tmp_path: Path) -> None:
    """A file without any of the later keys, as the first versions wrote it."""
    plain = make_report()
    few = replace(plain, rows=tuple(row for row in plain.rows if row.steps in (1, 64)))
    document = json.loads(json.dumps(few.to_json()))
    for row in document["rows"]:
        assert set(row) == {
            *("model", "role", "objective", "steps", "nfe", "sampler", "guidance", "n", "seed", "metrics"),
            *("latency_ms", "images_per_s", "params", "digest", "samples_png"),
        }
        assert all(set(metric) == {"value", "low", "high"} for metric in row["metrics"].values())
    (tmp_path / "results.json").write_text(json.dumps(document))
    write_report(read_results(tmp_path / "results.json"), tmp_path / "report")
    assert json.loads((tmp_path / "report" / "results.json").read_text()) == document


def test_every_key_survives_the_file(rich: Report, written: Path) -> None:
    assert read_results(written / "results.json") == rich


# LaTeX ---------------------------------------------------------------------------------------------------------------


def test_latex_is_escaped() -> None:
    assert escape(r"50% of $x_1$ & {a}#~^\ ") == (
        r"50\% of \$x\_1\$ \& \{a\}\#\textasciitilde{}\textasciicircum{}\textbackslash{}"
    )
    assert escape("fd ↓ ± × – Δ\n<b>") == r"fd $\downarrow$ $\pm$ $\times$ -- $\Delta$ \textless{}b\textgreater{}"


def test_the_latex_table(rich: Report) -> None:
    text = as_latex(paper.paper_table(small(rich)), "On 100% of digits_8x8.", "fewstep-digits")
    assert text.splitlines() == [
        r"% Needs \usepackage{booktabs}.",
        r"\begin{table}",
        r"\centering\small",
        r"\caption{On 100\% of digits\_8x8.}",
        r"\label{tab:fewstep-digits}",
        r"\begin{tabular}{lrrrrrrrrrr}",
        r"\toprule",
        r"model & steps & NFE & fd\_pixels $\downarrow$ & fd\_debiased\_pixels $\downarrow$ & ratio & $\Delta$ teacher "
        r"& recall $\uparrow$ & time ms & parameters & GPU-minutes \\",
        r"\midrule",
        r"digits-teacher & 64 & 128 & 0.540 & 0.530 {\scriptsize {[0.500, 0.560]}} & 1.00 & -- "
        r"& 0.878 {\scriptsize {[0.868, 0.888]}} & 25.6 & 84.5 k & 3.17 \\",
        r"\midrule",
        r"digits-meanflow & 1 & 1 & 0.910 & 0.900 {\scriptsize {[0.870, 0.930]}} & 1.69 "
        r"& 0.370 {\scriptsize {[0.350, 0.390]}} & 0.795 {\scriptsize {[0.785, 0.805]}} & 0.450 & 84.5 k & 5.17 \\",
        r" & 4 & 4 & 0.430 & 0.420 {\scriptsize {[0.390, 0.450]}} & 0.796 "
        r"& $-$0.110 {\scriptsize {[$-$0.130, $-$0.0900]}} & 0.838 {\scriptsize {[0.828, 0.848]}} "
        r"& 1.65 & 84.5 k & 5.17 \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]


def test_table_tex_is_the_first_table(rich: Report, written: Path) -> None:
    text = (written / "table.tex").read_text()
    lines = [line for line in text.splitlines() if line.endswith(r" \\")]
    assert len(lines) == len(rich.rows) + 1
    assert len({line.replace(r"\&", "").count("&") for line in lines}) == 1
    assert r"\textbf{0.430}" in text
    assert text.count("\\midrule") == len(FD_PIXELS)
    assert "[table.tex](table.tex)" in (written / "report.md").read_text()


# CSV -----------------------------------------------------------------------------------------------------------------


def test_the_csv_has_intervals_differences_classes_and_speed(rich: Report) -> None:
    lines = list(csv.DictReader(io.StringIO(tidy.as_csv(rich))))
    mine = [line for line in lines if (line["run"], line["steps"]) == ("digits-meanflow", "1")]
    debiased = next(line for line in mine if line["metric"] == "fd_debiased_pixels")
    assert float(debiased["difference"]) == pytest.approx(0.37)
    assert float(debiased["difference_lo"]) == pytest.approx(0.35)
    assert (float(debiased["ci_lo"]), float(debiased["ci_hi"])) == (pytest.approx(0.87), pytest.approx(0.93))
    classes = [line for line in mine if line["metric"] == "accuracy_digits"]
    assert [(line["class"], float(line["value"])) for line in classes] == [
        (str(i), pytest.approx(0.99 - 0.01 * i)) for i in range(10)
    ]
    speed = {line["metric"]: float(line["value"]) for line in mine if line["metric"] in tidy.SPEED}
    assert speed == {
        **{"latency_ms": 0.45, "latency_p95_ms": pytest.approx(0.5625), "decode_ms": 0.1, "images_per_s": 48_000},
        **{"batch": 512, "peak_memory_mb": 130, "flops": 6e5, "params": 84_480},
    }


def test_runs_of_one_model_are_told_apart(rich: Report) -> None:
    other = tuple(replace(row, ema="0.9999") for row in rich.rows if row.model == "digits-meanflow")
    lines = csv.DictReader(io.StringIO(tidy.as_csv(replace(rich, rows=rich.rows + other))))
    assert {(line["run"], line["ema"]) for line in lines if line["model"] == "digits-meanflow"} == {
        ("digits-meanflow (exported weights)", ""),
        ("digits-meanflow (ema 0.9999)", "0.9999"),
    }


# Cards ---------------------------------------------------------------------------------------------------------------


def test_the_card_is_one_that_the_hub_reads(rich: Report, written: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(written / "card.md")
    mine = [row for row in rich.rows if row.model == "digits-meanflow"]
    results = card.data.eval_results
    assert results is not None
    assert len(results) == sum(len(row.metrics) for row in mine)
    found = {(r.metric_type, r.metric_args["steps"]): r for r in results if r.metric_args}
    fd = found["fd_debiased_pixels", 4]
    assert (fd.metric_value, fd.dataset_name, fd.task_type) == (pytest.approx(0.42), "digits 8x8", "other")
    assert fd.metric_args is not None
    assert (fd.metric_args["low"], fd.metric_args["high"]) == (pytest.approx(0.39), pytest.approx(0.45))
    assert card.data.model_name == "digits-meanflow"
    assert card.data.library_name == "fewstep"


def test_a_card_of_nothing_measured_has_no_index(rich: Report) -> None:
    rows = [replace(row, metrics={}) for row in rich.rows if row.role == "student"]
    parsed = yaml.safe_load(front_matter(rich, rows))
    assert "model-index" not in parsed
    assert parsed["library_name"] == "fewstep"


# What rows may hold --------------------------------------------------------------------------------------------------


def test_fid_is_named_by_its_sample_count(rich: Report) -> None:
    rows = [replace(row, n=50_000) for row in rich.rows]
    assert wording.counted("fid", rows) == "fid50k"
    assert wording.counted("fid_debiased", rows) == "fid50k_debiased"
    assert wording.counted("sfid", [replace(row, n=1797) for row in rows]) == "sfid1797"
    assert wording.counted("fid", [rows[0], replace(rows[1], n=10_000)]) == "fid@n"
    assert wording.counted("fd_pixels", rows) == "fd_pixels"


def test_speed_classes_neighbours_and_doubts_are_on_the_page(rich: Report, written: Path) -> None:
    text = (written / "index.html").read_text()
    for head in ("p50 ms", "p95 ms", "decode ms", "at batch", "peak MiB", "FLOPs"):
        assert f">{head}</th>" in text
    assert "77 M" in text.replace("76.8 M", "77 M")  # 128 evaluations of 0.6 M
    assert re.search(r"<summary>Class by class</summary>\s*<h3>accuracy_digits</h3>", text)
    assert "Nearest neighbours in the training data" in text
    assert "digits-meanflow at 1 step: fd_pixels" in text
    assert "approximate" in text
    names = {path.name for path in (written / "samples").iterdir()}
    assert {"neighbours-digits-meanflow.png", "digits-meanflow.png"} <= names
    assert "neighbours-digits-teacher.png" not in names
    # Training: 95 s of the teacher and 155 of meanflow.
    table = costs.costs_table(rich)
    whole = next(column for column in table.columns if column.head == "with its teacher's")
    assert [cell.text for cell in whole.cells[:2]] == ["–", wording.duration(95 + 155)]


def test_many_classes_are_the_worst_the_middle_and_the_best(rich: Report) -> None:
    values = [0.5 + 0.002 * ((7 * i) % 100) for i in range(100)]
    rows = tuple(replace(row, per_class={"recall_pixels": values}) for row in rich.rows[:2])
    ((name, table),) = paper.class_tables(replace(rich, rows=rows))
    assert name == "recall_pixels"
    heads = {column.head: column.cells[0].text for column in table.columns}
    # 7 * 57 = 399, the largest remainder.
    assert heads["worst recall_pixels"] == "0.500 (class 0)"
    assert heads["best"] == "0.698 (class 57)"
    assert heads["median"] == "0.599"


def test_samples_from_elsewhere_have_no_steps(rich: Report, tmp_path: Path) -> None:
    """A folder of images: neither steps nor NFE nor time are known."""
    row = replace(
        small(rich).rows[-1],
        model="theirs",
        steps=0,
        nfe=0,
        latency_ms=None,
        images_per_s=None,
        differences={},
        digest="x",
    )
    page = write_report(replace(rich, rows=(*small(rich).rows, row), models=()), tmp_path).read_text()
    assert "theirs" in page
    alone = write_report(Report((row,), (), rich.reference), tmp_path / "alone").read_text()
    assert "At unknown steps, <code>theirs</code>" in alone


def test_means_over_trainings_render_beside_their_differences(rich: Report, tmp_path: Path) -> None:
    rows = tuple(
        replace(
            row,
            seeds=3,
            metrics={name: Measured(m.value, sd=0.01) for name, m in row.metrics.items()},
            differences={name: Measured(m.value, sd=0.01) for name, m in row.differences.items()},
        )
        for row in small(rich).rows
    )
    page = write_report(replace(rich, rows=rows), tmp_path).read_text()
    assert "mean and standard deviation over 3 trainings" in page
    assert "0.430 <small>± 0.010</small>" in page.replace("<b>", "").replace("</b>", "")
