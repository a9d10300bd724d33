"""Model cards: what a student is, what it loses against its teacher, how to sample it. YAML front matter on top."""

from collections.abc import Callable, Sequence
from typing import Any

from fewstep.evaluation.report import answer, tables, wording
from fewstep.evaluation.report.answer import Series
from fewstep.evaluation.report.costs import training_words
from fewstep.evaluation.results import Model, Report, Row


def students(report: Report) -> list[Series]:
    return [curve for curve in answer.series(report) if curve.role == "student"]


def front_matter(report: Report, rows: Sequence[Row]) -> str:
    """Every measured number of a model as ``model-index`` results, each with the steps and NFE it was measured at."""
    from huggingface_hub import EvalResult, ModelCardData

    dataset = str(report.reference.get("dataset") or "unknown")
    known = wording.extractors(report)
    results = []
    for row in rows:
        for metric in row.metrics:
            if (found := wording.measured(row, metric)) is None:
                continue
            arguments: dict[str, Any] = {"steps": row.steps, "nfe": row.nfe, "sampler": row.sampler}
            arguments |= {"guidance": row.guidance, "n": row.n, "seed": row.seed}
            arguments |= {"ema": row.ema} if row.ema else {}
            arguments |= {"precision": row.precision} if row.precision != "fp32" else {}
            if found.low is not None and found.high is not None:
                arguments |= {"low": found.low, "high": found.high}
            if found.sd is not None:
                arguments |= {"sd": found.sd, "trainings": row.seeds}
            results.append(
                EvalResult(
                    task_type="other",
                    task_name="few-step generation",
                    dataset_type=dataset,
                    dataset_name=dataset,
                    metric_type=metric,
                    metric_name=f"{wording.describe(metric, known)}, {wording.plural(row.steps)}, n = {row.n:,}",
                    metric_value=found.value,
                    metric_args=arguments,
                )
            )
    objective = [rows[0].objective] if rows[0].objective else []
    tags = ["flow-matching", "distillation", "few-step", *objective]
    card = ModelCardData(library_name="fewstep", tags=tags)
    if results:  # an index needs results
        card = ModelCardData(library_name="fewstep", tags=tags, model_name=rows[0].model, eval_results=results)
    return f"{card.to_yaml()}\n"


def model_card(report: Report, curve: Series, render: Callable[..., str]) -> str:
    """The card of one student. ``render`` fills the template ``card.md.jinja`` beside this file."""
    reference = answer.reference_row(report)
    mine = Report(tuple(curve.rows), report.models, report.reference, report.environment)
    beside = Report((*((reference,) if reference else ()), *curve.rows), (), report.reference)
    model = next((model for model in report.models if model.name == curve.rows[0].model), None)
    known = wording.extractors(mine)
    return render(
        front_matter=front_matter(report, curve.rows),
        name=curve.rows[0].model,
        objective=curve.rows[0].objective,
        params=wording.count(curve.rows[0].params),
        digest=curve.rows[0].digest,
        answer=answer.headline(beside, tables.code_markdown),
        results=[
            (tables.as_markdown(table), tables.caption(beside, extractor, table))
            for extractor in known
            for table in [tables.results_table(beside, wording.main_metrics(mine, extractor))]
        ],
        steps=", ".join(str(row.steps) for row in curve.rows),
        guidance=sorted({f"{row.guidance:g}" for row in curve.rows}),
        sampler=sorted({row.sampler for row in curve.rows}),
        precision=wording.low_precision(mine),
        example_steps=_example_steps(curve),
        dataset=str(report.reference.get("dataset") or "not recorded"),
        training=_training(model),
        teacher_digest=model.teacher_digest if model else None,
        losses=_losses(mine, reference, known),
        has_teacher=reference is not None,
    )


def _example_steps(curve: Series) -> int:
    """The step count that the card's example uses: the largest of the few that were measured."""
    return max((row.steps for row in curve.rows if row.steps in answer.FEW_STEPS), default=curve.rows[0].steps)


def _training(model: Model | None) -> str | None:
    return None if model is None else training_words(model)


def _losses(mine: Report, reference: Row | None, known: Sequence[str]) -> list[str]:
    """What is lost at the fewest steps, metric by metric: the limitations that were measured."""
    fewest = min(mine.rows, key=lambda row: row.steps)
    if reference is None or fewest.n != reference.n:
        return []
    lost = []
    for metric in wording.metric_names(mine):
        better = wording.direction(metric)
        a, b = wording.value(fewest, metric), wording.value(reference, metric)
        if wording.is_gap(metric) or better is None or a is None or b is None:
            continue
        if (a > b) if better == "lower" else (a < b):
            lost.append(f"{wording.describe(metric, known)}: {wording.number(b)} → {wording.number(a)}")
    return lost
