"""Model cards: what a student is, what it loses against its teacher, how to sample it. YAML front matter on top."""

from collections.abc import Callable, Sequence
from typing import Any

import yaml

from fewstep.evaluation.report import tables
from fewstep.evaluation.report.tables import Series
from fewstep.evaluation.results import Model, Report, Row


def students(report: Report) -> list[Series]:
    return [curve for curve in tables.series(report) if curve.role == "student"]


def front_matter(report: Report, rows: Sequence[Row]) -> str:
    """Every measured number of a model as ``model-index`` results, each with the steps and NFE it was measured at."""
    dataset = str(report.reference.get("dataset") or "unknown")
    known = tables.extractors(report)
    metrics: list[dict[str, Any]] = []
    for row in rows:
        for metric in row.metrics:
            if (found := tables.measured(row, metric)) is None:
                continue
            entry: dict[str, Any] = {
                "type": metric,
                "name": f"{tables.describe(metric, known)}, {tables.plural(row.steps)}, n = {row.n:,}",
                "value": found.value,
                "args": {
                    **{"steps": row.steps, "nfe": row.nfe, "sampler": row.sampler},
                    **{"guidance": row.guidance, "n": row.n, "seed": row.seed},
                },
            }
            if found.low is not None and found.high is not None:
                entry["args"] |= {"low": found.low, "high": found.high}
            metrics.append(entry)
    task = {"type": "other", "name": "few-step generation"}
    result = {"task": task, "dataset": {"type": dataset, "name": dataset}, "metrics": metrics}
    objective = [rows[0].objective] if rows[0].objective else []
    card = {
        "library_name": "fewstep",
        "tags": ["flow-matching", "distillation", "few-step", *objective],
        "model-index": [{"name": rows[0].model, "results": [result]}],
    }
    return yaml.safe_dump(card, sort_keys=False, allow_unicode=True, width=120)


def model_card(report: Report, curve: Series, render: Callable[..., str]) -> str:
    """The card of one student. ``render`` fills the template ``card.md.jinja`` beside this file."""
    reference = tables.reference_row(report)
    mine = Report(tuple(curve.rows), report.models, report.reference, report.environment)
    beside = Report((*((reference,) if reference else ()), *curve.rows), (), report.reference)
    model = next((model for model in report.models if model.name == curve.rows[0].model), None)
    known = tables.extractors(mine)
    return render(
        front_matter=front_matter(report, curve.rows),
        name=curve.rows[0].model,
        objective=curve.rows[0].objective,
        params=tables.count(curve.rows[0].params),
        digest=curve.rows[0].digest,
        answer=tables.headline(beside, tables.code_markdown),
        results=[
            (tables.as_markdown(table), tables.caption(beside, extractor, table))
            for extractor in known
            for table in [tables.results_table(beside, tables.main_metrics(mine, extractor))]
        ],
        steps=", ".join(str(row.steps) for row in curve.rows),
        guidance=sorted({f"{row.guidance:g}" for row in curve.rows}),
        sampler=sorted({row.sampler for row in curve.rows}),
        example_steps=_example_steps(curve),
        dataset=str(report.reference.get("dataset") or "not recorded"),
        training=_training(model),
        teacher_digest=model.teacher_digest if model else None,
        losses=_losses(mine, reference, known),
        has_teacher=reference is not None,
    )


def _example_steps(curve: Series) -> int:
    """The step count that the card's example uses: the largest of the few that were measured."""
    return max((row.steps for row in curve.rows if row.steps in tables.FEW_STEPS), default=curve.rows[0].steps)


def _training(model: Model | None) -> str | None:
    if model is None:
        return None
    samples, took = tables.count(model.train_samples), tables.duration(model.train_s)
    return f"{model.train_steps:,} optimiser steps, {samples} samples, {took}"


def _losses(mine: Report, reference: Row | None, known: Sequence[str]) -> list[str]:
    """What is lost at the fewest steps, metric by metric: the limitations that were measured."""
    fewest = min(mine.rows, key=lambda row: row.steps)
    if reference is None or fewest.n != reference.n:
        return []
    lost = []
    for metric in tables.metric_names(mine):
        better = tables.direction(metric)
        a, b = tables.value(fewest, metric), tables.value(reference, metric)
        if tables.is_gap(metric) or better is None or a is None or b is None:
            continue
        if (a > b) if better == "lower" else (a < b):
            lost.append(f"{tables.describe(metric, known)}: {tables.number(b)} → {tables.number(a)}")
    return lost
