"""The report: which few-step student for this teacher, and what it loses. Made from a ``Report`` alone, without torch.

``write_report`` puts everything into one folder::

    index.html     one page with everything in it, to read, print or send
    report.md      the same for GitHub, with figures/ and samples/ beside it
    card.md        a model card of the best student; of several students, cards/ has one each
    table.tex      the first table for LaTeX (booktabs)
    results.csv    one line per number; results.json, what all of this was made from
"""

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.errors import UsageError
from fewstep.evaluation.report import answer, changes, costs, paper, standing, tables, tidy, wording
from fewstep.evaluation.report.card import model_card, students
from fewstep.evaluation.report.changes import Changes
from fewstep.evaluation.report.figures import HUES, Drawn, figures, floor_of, slug
from fewstep.evaluation.report.grids import Grid, grids, neighbour_grids
from fewstep.evaluation.report.latex import as_latex
from fewstep.evaluation.results import Report
from fewstep.files import write_atomic, write_json

if TYPE_CHECKING:
    from fewstep.evaluation.goals import Reached

__all__ = ["write_report"]

MOST_OPEN_ROWS = 30
"""A longer table is folded on the page, below the overview that says the same in fewer lines."""

DEFINITIONS = (
    ("steps", "solver steps from noise to sample"),
    ("NFE", "network evaluations per sample, guidance's second call included"),
    ("ratio", "the distance over the teacher's at its most steps; below 1 is closer to the data than the teacher"),
    ("Δ teacher", "the distance less the teacher's at its most steps, on the same noise"),
    ("latency", "median time of one sample at batch size 1; speed-up is the teacher's at its most steps over it"),
    ("images/s", "rate at the best of the batch sizes measured"),
    ("Fréchet distance", "between Gaussians fitted to the features of generated and of real data; 0 is best"),
    ("debiased", "without the bias of a finite sample: twice the distance less the mean of those of its halves"),
    ("FID", "the Fréchet distance on Inception features and on nothing else; fid10k is of 10,000 samples"),
    ("precision", "share of generated samples that lie within the real data: fidelity"),
    ("recall", "share of real data that lies within the generated samples: diversity"),
    ("density", "like precision, counting how many real neighbourhoods hold a sample; about 1 for real data"),
    ("coverage", "share of real neighbourhoods that hold a generated sample"),
    ("GPU-minutes", "of training: minutes by the clock times the GPUs that took part; CPU-minutes count processes"),
)


def write_report(report: Report, out: Path, against: Changes | None = None, goals: "Sequence[Reached]" = ()) -> Path:
    """Write the report's files into ``out``, each whole or not at all, and return the path of ``index.html``.

    ``against`` is what changed since an older measurement (``changes.changes``), ``goals`` how
    students stand to goals (``goals.reached``); the pages open with them.
    """
    if not report.rows:
        raise UsageError("these results hold no rows: nothing was measured, so there is nothing to report")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: the report needs a folder")
    sampled, nearest, drawn = grids(report), neighbour_grids(report), figures(report)
    for figure in drawn:
        write_atomic(out / "figures" / f"{figure.name}.svg", figure.svg)
        write_atomic(out / "figures" / f"{figure.name}.png", figure.png)
    for grid in (*sampled, *nearest):
        write_atomic(out / "samples" / f"{grid.name}.png", grid.png)
    for path, text in _cards(report).items():
        write_atomic(out / path, text)
    write_atomic(out / "results.csv", tidy.as_csv(report))
    write_atomic(out / "table.tex", _latex(report))
    write_json(out / "results.json", report.to_json())
    content = _content(report, drawn, sampled, nearest, against, goals)
    write_atomic(out / "report.md", _template("report.md.jinja")(**content))
    write_atomic(out / "index.html", _template("index.html.jinja")(**content))
    return out / "index.html"


def _cards(report: Report) -> dict[str, str]:
    """``card.md`` for the student that the headline names, and one card per student where there are several."""
    render, curves, best = _template("card.md.jinja"), students(report), answer.leading_student(report)
    cards: dict[str, str] = {}
    for curve in curves:
        text = model_card(report, curve, render)
        name = f"cards/{slug(curve.label)}"
        cards[f"{name}-{len(cards) + 1}.md" if f"{name}.md" in cards else f"{name}.md"] = text
        if "card.md" not in cards and (best is None or best in curve.rows):
            cards["card.md"] = text
    return {"card.md": cards["card.md"]} if len(curves) == 1 else cards


def _latex(report: Report) -> str:
    table, data = paper.paper_table(report), str(report.reference.get("dataset") or "unnamed data")
    known = wording.extractors(report)
    caption = f"Few-step sampling on {data}. {tables.caption(report, ', '.join(known) or 'none', table)}"
    return as_latex(table, caption, f"fewstep-{slug(data)}")


def _content(
    report: Report,
    drawn: list[Drawn],
    sampled: list[Grid],
    nearest: list[Grid],
    against: Changes | None,
    goals: "Sequence[Reached]",
) -> dict[str, Any]:
    """What both pages show, in their order."""
    known = wording.extractors(report)
    others = wording.other_metrics(report)
    main, speed = paper.paper_table(report), paper.speed_table(report)
    return {
        "dataset": str(report.reference.get("dataset") or "unnamed data"),
        "headline": lambda code: answer.headline(report, code),
        "glance": tables.glance_table(report),
        "overview": tables.overview_table(report),
        "overview_caption": tables.overview_caption(report),
        "folded": len(report.rows) > MOST_OPEN_ROWS,
        "paper": main,
        "paper_caption": tables.caption(report, ", ".join(known) or "none", main),
        "speed": speed,
        "speed_caption": _speed_caption(report),
        "classes": paper.class_tables(report),
        "goals": standing.goals_table(goals, report) if goals else None,
        "goals_caption": standing.goals_caption(goals, report),
        "against": against,
        "changed": against and _changed(against, ("better", "worse")),
        "unsure": against and _changed(against, ("changed",)),
        "unchanged": against and _changed(against, ("within noise", "equal")),
        "trainings": wording.trainings(report),
        "tables": [
            (extractor, table, tables.caption(report, extractor, table))
            for extractor in known
            for table in [tables.results_table(report, wording.main_metrics(report, extractor), speed=False)]
        ],
        "others": tables.metrics_table(report, others) if others else None,
        "figures": [figure for figure in drawn if not figure.name.endswith("-latency")],
        "fronts": [figure for figure in drawn if figure.name.endswith("-latency")],
        "grids": sampled,
        "neighbours": nearest,
        "costs": costs.costs_table(report) if report.models else None,
        "costs_caption": costs.costs_caption(report),
        "hues": HUES,
        "definitions": DEFINITIONS,
        "provenance": _provenance(report),
        "heavy": _heavy(report),
        "intervals": any(m.low is not None for row in report.rows for m in row.metrics.values()),
        "csv": tidy.as_csv(report),
    }


def _changed(against: Changes, verdicts: Sequence[str]) -> tables.Table | None:
    found = [change for change in against.changes if change.verdict in verdicts]
    return changes.changes_table(found) if found else None


def _heavy(report: Report) -> str:
    """The metrics of which a few samples carry most of the variance, by row."""
    rows = [(curve.label, row) for curve in answer.series(report) for row in curve.rows if row.heavy]
    return "; ".join(f"{label} at {wording.plural(row.steps)}: {', '.join(row.heavy)}" for label, row in rows)


def _speed_caption(report: Report) -> str:
    """How times were taken, and on what."""
    reference = answer.reference_row(report)
    parts = ["p50 and p95: time of one sample at batch size 1; images/s: the best of the batch sizes measured"]
    if reference is not None:
        parts.append(f"speed-up against {answer.label_of(report, reference)} at {wording.plural(reference.steps)}")
    parts += [said] if (said := wording.low_precision(report)) else []
    machine = report.environment.get("accelerator") or report.environment.get("processor")
    parts += [f"measured on {machine}"] if machine else []
    return f"{'; '.join(parts)}."


def _provenance(report: Report) -> list[tuple[str, list[tuple[str, str]]]]:
    """Under headings, names and texts of all that fixes the numbers."""
    reference = report.reference
    counts = ", ".join(f"{n:,}" for n in sorted({row.n for row in report.rows}))
    seeds = ", ".join(map(str, reference.get("training_seeds") or sorted({row.seed for row in report.rows})))
    floors = {metric: floor_of(report, metric) for metric in reference.get("floor") or {}}
    named = ("dataset", "n", "floor", "extractors", "protocol", "training_seeds")
    against = [("dataset", str(reference.get("dataset") or wording.DASH))]
    against += [("n of the reference", tables.flat(reference.get("n"))[0][1])] if "n" in reference else []
    against += [("samples per row", counts), ("seed", seeds)]
    against += [(f"real against real, {metric}", wording.number(floor)) for metric, floor in floors.items()]
    against += [pair for key in reference if key not in named for pair in tables.flat(reference[key], str(key))]
    digests = {
        curve.label: "; ".join(dict.fromkeys(row.digest for row in curve.rows)) for curve in answer.series(report)
    }
    samplers = {
        curve.label: "; ".join(
            dict.fromkeys(f"{row.sampler}, guidance {row.guidance:g}, {row.precision}" for row in curve.rows)
        )
        for curve in answer.series(report)
    }
    teachers = {model.name: model.teacher_digest for model in report.models if model.teacher_digest}
    features = [
        (name, ", ".join(f"{key} {text}".strip() for key, text in tables.flat(of)))
        for name, of in (reference.get("extractors") or {}).items()
    ]
    sections = [
        ("Data", against),
        ("Protocol", tables.flat(reference.get("protocol") or {})),
        ("Extractors", features),
        ("Samplers", list(samplers.items())),
        ("Digests of the weights", list(digests.items())),
        ("Digests of the teachers that students were distilled from", list(teachers.items())),
        ("Environment", tables.flat(report.environment)),
    ]
    return [(heading, pairs) for heading, pairs in sections if pairs]


def _template(name: str) -> Callable[..., str]:
    """A template beside this file, everything from outside escaped unless it says otherwise."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup, escape

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = lambda text: Markup(tables.escape_markdown(text))
    environment.filters["as_markdown"] = lambda table: Markup(tables.as_markdown(table))
    environment.filters["base64"] = lambda data: base64.b64encode(
        data.encode() if isinstance(data, str) else data
    ).decode()
    environment.filters["breakable"] = lambda head: Markup(str(escape(head)).replace("_", "_<wbr>"))
    environment.globals["html_headline"] = lambda answer: Markup(answer(lambda name: f"<code>{escape(name)}</code>"))
    environment.globals["md_headline"] = lambda answer: Markup(answer(tables.code_markdown))
    return environment.get_template(name).render
