"""What training took, in tables, files and cards: by the clock, and in minutes of all devices."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reports import make_report, rich_report

from fewstep.evaluation.report import costs, paper, tables, tidy, write_report
from fewstep.evaluation.results import Report, read_results


def told(report: Report, **trained: dict[str, Any]) -> Report:
    """The report with facts of single models, by the last word of their name."""
    models = tuple(replace(model, **trained.get(model.name.partition("-")[2], {})) for model in report.models)
    return replace(report, models=models)


def texts(table: tables.Table, head: str) -> list[str]:
    return next(([cell.text for cell in column.cells] for column in table.columns if column.head == head), [])


def heads(table: tables.Table) -> list[str]:
    return [column.head for column in table.columns]


def test_device_minutes_are_time_times_devices() -> None:
    """Teacher 95 s, students 155, 215 and 275 s, on two GPUs each."""
    table = costs.costs_table(rich_report())
    assert texts(table, "GPU-minutes") == ["3.17", "5.17", "7.17", "9.17"]
    assert texts(table, "GPU-minutes with its teacher's") == ["–", "8.33", "10.3", "12.3"]
    assert "trained on" not in heads(table)
    assert costs.costs_caption(rich_report()).endswith(". Trained on NVIDIA H100 80GB HBM3.")


def test_processors_are_no_gpus() -> None:
    report, on = rich_report(), {"device": "EPYC", "device_type": "cpu", "processes": 1}
    table = costs.costs_table(replace(report, models=tuple(replace(model, **on) for model in report.models)))
    assert texts(table, "CPU-minutes") == ["1.58", "2.58", "3.58", "4.58"]


def test_minutes_of_a_gpu_and_of_a_processor_are_not_added() -> None:
    report = told(rich_report(), meanflow={"device": "EPYC", "device_type": "cpu"})
    table = costs.costs_table(report)
    assert texts(table, "device-minutes") == ["3.17", "5.17", "7.17", "9.17"]
    assert texts(table, "device-minutes with its teacher's") == ["–", "–", "10.3", "12.3"]
    assert texts(table, "trained on")[:2] == ["NVIDIA H100 80GB HBM3", "EPYC"]
    first = paper.paper_table(report)
    assert set(zip(texts(first, "model"), texts(first, "trained on"), strict=True)) == {
        (name, "EPYC" if name == "digits-meanflow" else "NVIDIA H100 80GB HBM3") for name in texts(first, "model")
    }


def test_two_gpus_are_gpus() -> None:
    report = told(rich_report(), meanflow={"device": "NVIDIA H200"})
    table = costs.costs_table(report)
    assert texts(table, "GPU-minutes with its teacher's") == ["–", "8.33", "10.3", "12.3"]
    assert texts(table, "trained on")[1] == "NVIDIA H200"
    assert "trained on" not in heads(paper.paper_table(report))
    assert "Trained on" not in costs.costs_caption(report)


def test_what_nobody_knows_is_a_dash() -> None:
    report = told(rich_report(), meanflow={"device": None, "device_type": None})
    table = costs.costs_table(report)
    assert texts(table, "GPU-minutes") == ["3.17", "–", "7.17", "9.17"]
    assert texts(table, "GPU-minutes with its teacher's")[1] == "–"
    plain = costs.costs_table(make_report())
    assert not [head for head in heads(plain) if "minutes" in head or head == "trained on"]
    assert "minutes" not in costs.costs_caption(make_report())


def test_an_untrained_teacher_cost_nothing_known() -> None:
    """A teacher of somebody else: its training is no training of 0 s."""
    report = told(rich_report(), teacher={"train_s": 0.0, "device": None, "device_type": None, "processes": 1})
    table = costs.costs_table(report)
    assert texts(table, "GPU-minutes")[0] == "–"
    assert "with its teacher's" not in heads(table)


def test_every_file_has_them(tmp_path: Path) -> None:
    report = rich_report()
    few = replace(report, rows=tuple(row for row in report.rows if row.steps in (1, 64)))
    write_report(few, tmp_path)
    for name in ("index.html", "report.md", "table.tex"):
        assert "GPU-minutes" in (tmp_path / name).read_text()
    card = (tmp_path / "cards" / "digits-meanflow.md").read_text()
    assert "4,000 optimiser steps, 512 k samples, 2.58 min on 2 × NVIDIA H100 80GB HBM3, 5.17 GPU-minutes" in card
    lines = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    minutes = {line["model"]: float(line["value"]) for line in lines if line["metric"] == "device_minutes"}
    assert minutes["digits-meanflow"] == pytest.approx(155 * 2 / 60)
    assert read_results(tmp_path / "results.json") == few


def test_results_without_the_keys_are_reported_as_before(tmp_path: Path) -> None:
    document = json.loads(json.dumps(make_report().to_json()))
    assert not {"processes", "device", "device_type", "device_s"} & set(document["models"][0])
    report = Report.from_json(document)
    assert "device_minutes" not in tidy.as_csv(report)
    table = paper.paper_table(report)
    assert heads(table)[-1] == "parameters"
    assert costs.training_words(report.models[1]) == "4,000 optimiser steps, 512 k samples, 2.58 min"
