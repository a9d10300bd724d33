"""The measured rows, and ``results.json``: the source of truth of every report. Imports no torch.

A metric's name carries its extractor (``fd_pixels``, ``recall_digits``); the bare names ``fid``, ``kid``,
``precision``, ``recall``, ``density``, ``coverage`` mean Inception features and nothing else.

Schema 1 has grown ``sd`` and ``seeds``, which are left out where one training was measured: older files still load, and
versions that know neither read every file but those with a spread.
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fewstep.errors import UsageError

SCHEMA = 1


@dataclass(frozen=True)
class Measured:
    """A metric's value, with the ends of its 95 % interval where a tested method gives one (else None).

    ``sd`` is the standard deviation (n - 1) over training seeds whose mean ``value`` is; None for a single training.
    """

    value: float
    low: float | None = None
    high: float | None = None
    sd: float | None = None


@dataclass(frozen=True)
class Row:
    """One measured point: a model sampled with a number of steps.

    ``steps`` are solver steps, ``nfe`` network evaluations per sample as counted by the sampler (guidance included).
    ``latency_ms`` is the median time of one sample at batch size 1, ``images_per_s`` the rate at the largest batch
    measured. ``samples_png`` is a base64 PNG strip of the samples of the first seeds, the same seeds in every row.
    ``seeds`` says how many trainings the row is the mean of (``over_seeds``); ``seed`` is then the first one's.
    """

    model: str
    role: Literal["teacher", "student"]
    objective: str
    steps: int
    nfe: int
    sampler: str
    guidance: float
    n: int
    seed: int
    metrics: Mapping[str, Measured]
    latency_ms: float | None
    images_per_s: float | None
    params: int
    digest: str
    samples_png: str | None = None
    seeds: int = 1


@dataclass(frozen=True)
class Model:
    """What a row's model is: its training cost and provenance, once per model instead of once per row."""

    name: str
    role: Literal["teacher", "student"]
    objective: str
    params: int
    train_steps: int
    train_samples: int
    train_s: float
    teacher_digest: str | None = None


@dataclass(frozen=True)
class Report:
    """A table of rows with what they were measured against (``reference``) and where (``environment``).

    ``reference`` holds ``dataset``, ``n``, ``floor`` (metric name -> value of real data against real data),
    ``extractors`` (name -> dim and digest) and ``protocol`` (fixed conventions, as text).
    """

    rows: tuple[Row, ...]
    models: tuple[Model, ...] = ()
    reference: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "rows": [_row_json(row) for row in self.rows],
            "models": [asdict(model) for model in self.models],
            "reference": dict(self.reference),
            "environment": dict(self.environment),
        }

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> "Report":
        if document.get("schema") != SCHEMA:
            raise UsageError(f"results schema {document.get('schema')!r} is not {SCHEMA}: evaluate again")
        rows = tuple(
            Row(**{**row, "metrics": {name: Measured(**metric) for name, metric in row["metrics"].items()}})
            for row in document["rows"]
        )
        models = tuple(Model(**model) for model in document.get("models", ()))
        return Report(rows, models, document.get("reference", {}), document.get("environment", {}))


def _row_json(row: Row) -> dict[str, Any]:
    """A row as plain values, without the keys that say nothing of a single training."""
    document = asdict(row)
    if row.seeds == 1:
        del document["seeds"]
    for metric in document["metrics"].values():
        if metric["sd"] is None:
            del metric["sd"]
    return document


def read_results(path: Path) -> Report:
    """Read a ``results.json``; a missing or broken file is a ``UsageError`` that says what to do."""
    if not path.is_file():
        raise UsageError(f"no {path}: run `fewstep evaluate {path.parent}` first")
    try:
        return Report.from_json(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} is not a readable results file ({error}): evaluate again") from error


def merge(reports: Iterable[Report]) -> Report:
    """One report of several. Rows measured against different references or extractors do not belong in one table.

    Where the environments differ, all are kept, by the models measured in them: a latency belongs to its machine.
    """
    reports = list(reports)
    first = reports[0]
    _check_same_reference(reports)
    rows: dict[tuple[Any, ...], Row] = {}
    models: dict[str, Model] = {}
    for report in reports:
        for row in report.rows:
            rows.setdefault((row.model, row.digest, row.steps, row.sampler, row.guidance, row.n, row.seed), row)
        for model in report.models:
            models.setdefault(model.name, model)
    environment = first.environment
    if any(report.environment != environment for report in reports):
        environment = {
            ", ".join(dict.fromkeys(row.model for row in report.rows)): dict(report.environment) for report in reports
        }
    return Report(tuple(rows.values()), tuple(models.values()), first.reference, environment)


def over_seeds(reports: Mapping[int, Report]) -> Report:
    """One report of the same models trained with several seeds: seed -> its report. One row per model and step count.

    A metric is the mean over the seeds and ``sd`` its standard deviation with n - 1; a value that is not finite in one
    of them is not finite here. Times are medians, samples and ``seed`` are the first seed's, and ``digest`` joins the
    digests of all, in the order of the seeds, with ", ". A row that some seeds lack is the mean of the others, and
    ``seeds`` says of how many. One seed gives its own report back.
    """
    every = list(reports.values())
    if len(every) == 1:
        return every[0]
    first = every[0]
    _check_same_reference(every)
    rows: dict[tuple[Any, ...], list[Row]] = {}
    models: dict[str, list[Model]] = {}
    for report in every:
        for row in report.rows:
            rows.setdefault((row.model, row.steps, row.sampler, row.guidance, row.n), []).append(row)
        for model in report.models:
            models.setdefault(model.name, []).append(model)
    environment = first.environment
    if any(report.environment != environment for report in every):
        environment = {f"seed {seed}": dict(report.environment) for seed, report in reports.items()}
    return Report(
        tuple(_mean_row(group) for group in rows.values()),
        tuple(_middle_model(group) for group in models.values()),
        {**first.reference, "training_seeds": list(reports)},
        environment,
    )


def _mean_row(rows: Sequence[Row]) -> Row:
    shared = [name for name in rows[0].metrics if all(name in row.metrics for row in rows)]
    return replace(
        rows[0],
        metrics={name: _mean([row.metrics[name].value for row in rows]) for name in shared},
        latency_ms=_median([row.latency_ms for row in rows]),
        images_per_s=_median([row.images_per_s for row in rows]),
        digest=", ".join(row.digest for row in rows),
        seeds=len(rows),
    )


def _mean(values: Sequence[float]) -> Measured:
    if len(values) == 1:
        return Measured(values[0])
    if not all(math.isfinite(value) for value in values):
        return Measured(math.nan)
    return Measured(statistics.fmean(values), sd=statistics.stdev(values))


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _middle_model(models: Sequence[Model]) -> Model:
    """What training took, as a median over the seeds; every seed has a teacher of its own."""
    teachers = [model.teacher_digest for model in models if model.teacher_digest]
    return replace(
        models[0],
        train_s=statistics.median(model.train_s for model in models),
        teacher_digest=", ".join(teachers) or None,
    )


def _check_same_reference(reports: Sequence[Report]) -> None:
    """Rows of one table were measured against the same data in the same way: else ``UsageError``."""
    first = reports[0]
    for other in reports[1:]:
        for part in ("dataset", "n", "extractors", "protocol"):
            if first.reference.get(part) != other.reference.get(part):
                raise UsageError(
                    f"these results do not compare: reference {part} is {first.reference.get(part)!r} in one and "
                    f"{other.reference.get(part)!r} in another"
                )
