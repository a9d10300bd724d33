"""The measured rows, and ``results.json``: the source of truth of every report. Imports no torch.

A metric's name carries its extractor (``fd_pixels``, ``recall_digits``); the bare names ``fid``, ``kid``,
``precision``, ``recall``, ``density``, ``coverage`` mean Inception features and nothing else.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fewstep.errors import UsageError

SCHEMA = 1


@dataclass(frozen=True)
class Measured:
    """A metric's value, with the ends of its 95 % interval where a tested method gives one (else None)."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """One measured point: a model sampled with a number of steps.

    ``steps`` are solver steps, ``nfe`` network evaluations per sample as counted by the sampler (guidance included).
    ``latency_ms`` is the median time of one sample at batch size 1, ``images_per_s`` the rate at the largest batch
    measured. ``samples_png`` is a base64 PNG strip of the samples of the first seeds, the same seeds in every row.
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
            "rows": [asdict(row) for row in self.rows],
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
    for other in reports[1:]:
        for part in ("dataset", "n", "extractors", "protocol"):
            if first.reference.get(part) != other.reference.get(part):
                raise UsageError(
                    f"these results do not compare: reference {part} is {first.reference.get(part)!r} in one and "
                    f"{other.reference.get(part)!r} in another"
                )
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
