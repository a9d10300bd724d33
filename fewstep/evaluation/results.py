"""The measured rows, and ``results.json``: the source of truth of every report. Imports no torch.

A metric's name carries its extractor (``fd_pixels``, ``recall_digits``); the bare names ``fid``, ``kid``,
``precision``, ``recall``, ``density``, ``coverage`` mean Inception features and nothing else.

Schema 1 has grown keys, which are left out where they say nothing: older files still load, and older versions read
every file that needs none of them.
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fewstep.block import PrecisionName
from fewstep.errors import UsageError
from fewstep.evaluation.protocol import check_same_count, check_same_precision, check_same_reference

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

    ``steps`` are solver steps, ``nfe`` network evaluations per sample as counted by the sampler (guidance included); 0
    is for samples of which that is not known. ``latency_ms`` and ``latency_p95_ms`` are the median and the 95th
    percentile of the time of one sample at batch size 1, ``images_per_s`` the best rate of all batch sizes measured,
    which was that at ``batch``. ``peak_memory_mb`` is what a GPU held at most meanwhile (MiB, weights included),
    ``flops`` what one sample takes in floating-point operations, ``decode_ms`` the time of an autoencoder, apart.
    ``ema`` names the average of the weights where it is not the one that the run exported, ``precision`` what the
    networks were evaluated in, for the samples and for the times.

    ``differences`` are metrics minus those of the teacher's row at most steps, on the same noise, with the ends of
    their 95 % interval; ``per_class`` are metrics of each class by itself. ``heavy`` lists metrics of which a few
    samples carry most of the variance: their intervals are not to be trusted. ``samples_png`` is a base64 PNG strip of
    the samples of the first seeds, the same seeds in every row, and ``neighbours_png`` one of the training image
    nearest to each of them. ``seeds`` says how many trainings the row is the mean of (``over_seeds``); ``seed`` is then
    the first one's.
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
    latency_p95_ms: float | None = None
    batch: int | None = None
    peak_memory_mb: float | None = None
    flops: float | None = None
    decode_ms: float | None = None
    ema: str | None = None
    differences: Mapping[str, Measured] = field(default_factory=dict)
    per_class: Mapping[str, Sequence[float]] = field(default_factory=dict)
    heavy: Sequence[str] = ()
    neighbours_png: str | None = None
    precision: PrecisionName = "fp32"


@dataclass(frozen=True)
class Model:
    """What a row's model is: its training cost and provenance, once per model instead of once per row.

    ``train_s`` is training by the clock, over all resumptions, on ``processes`` devices called ``device``, of torch's
    ``device_type`` (several names are joined with ", "; None where it is not known). ``device_s`` is the sum of seconds
    times processes where that is not their product: a run that went on with fewer or more of them.
    """

    name: str
    role: Literal["teacher", "student"]
    objective: str
    params: int
    train_steps: int
    train_samples: int
    train_s: float
    teacher_digest: str | None = None
    processes: int = 1
    device: str | None = None
    device_type: str | None = None
    device_s: float | None = None

    @property
    def device_minutes(self) -> float | None:
        """Minutes by the clock times devices; None where nothing says on what it was trained, or that it was."""
        if self.device is None or not self.train_s:
            return None
        return (self.train_s * self.processes if self.device_s is None else self.device_s) / 60


@dataclass(frozen=True)
class Report:
    """A table of rows with what they were measured against (``reference``) and where (``environment``).

    ``reference`` holds ``dataset``, ``n``, ``floor`` (metric name -> value of real data against real data),
    ``extractors`` (name -> dim and digest) and ``protocol`` (``Protocol.to_json``).
    """

    rows: tuple[Row, ...]
    models: tuple[Model, ...] = ()
    reference: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "rows": [row_json(row) for row in self.rows],
            "models": [model_json(model) for model in self.models],
            "reference": dict(self.reference),
            "environment": dict(self.environment),
        }

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> "Report":
        if document.get("schema") != SCHEMA:
            raise UsageError(f"results schema {document.get('schema')!r} is not {SCHEMA}: evaluate again")
        rows = tuple(row_from_json(row) for row in document["rows"])
        models = tuple(Model(**model) for model in document.get("models", ()))
        return Report(rows, models, document.get("reference", {}), document.get("environment", {}))


_SILENT = {
    **dict.fromkeys(("latency_p95_ms", "batch", "peak_memory_mb", "flops", "decode_ms", "ema", "neighbours_png")),
    **{"seeds": 1, "differences": {}, "per_class": {}, "heavy": [], "precision": "fp32"},
}
"""Keys of a row that are left out, and the value that says nothing."""

_SILENT_OF_MODEL = {"processes": 1, "device": None, "device_type": None, "device_s": None}


def row_json(row: Row) -> dict[str, Any]:
    """A row as plain values, without the keys that say nothing of it."""
    document = {**asdict(row), "heavy": list(row.heavy)}
    for key, silent in _SILENT.items():
        if document[key] == silent:
            del document[key]
    for metric in (*document["metrics"].values(), *document.get("differences", {}).values()):
        if metric["sd"] is None:
            del metric["sd"]
    return document


def model_json(model: Model) -> dict[str, Any]:
    """A model as plain values, without the keys that say nothing of it."""
    document = asdict(model)
    return {key: value for key, value in document.items() if (key, value) not in _SILENT_OF_MODEL.items()}


def row_from_json(document: Mapping[str, Any]) -> Row:
    """What ``row_json`` gave; anything else is a ``TypeError``, ``KeyError`` or ``AttributeError``."""
    measured = {
        key: {name: Measured(**metric) for name, metric in document[key].items()}
        for key in ("metrics", "differences")
        if key == "metrics" or key in document
    }
    return Row(**{**document, **measured, "heavy": tuple(document.get("heavy", ()))})


def read_results(path: Path) -> Report:
    """Read a ``results.json``; a missing or broken file is a ``UsageError`` that says what to do."""
    if not path.is_file():
        raise UsageError(f"no {path}: run `fewstep evaluate {path.parent}` first")
    try:
        return Report.from_json(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} is not a readable results file ({error}): evaluate again") from error


def merge(reports: Iterable[Report]) -> Report:
    """One report of several. Rows of different protocols, extractors, counts of samples or precisions do not belong in
    one table: a ``UsageError`` names what differs.

    Where the environments differ, all are kept, by the models measured in them: a latency belongs to its machine.
    """
    reports = list(reports)
    first = reports[0]
    check_same_reference([report.reference for report in reports])
    check_same_count([frozenset(row.n for row in report.rows) for report in reports])
    check_same_precision([_precisions(report) for report in reports])
    rows: dict[tuple[Any, ...], Row] = {}
    models: dict[str, Model] = {}
    for report in reports:
        for row in report.rows:
            rows.setdefault((*_kind(row), row.digest, row.seed), row)
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
    check_same_reference([report.reference for report in every])
    check_same_precision([_precisions(report) for report in every])
    rows: dict[tuple[Any, ...], list[Row]] = {}
    models: dict[str, list[Model]] = {}
    for report in every:
        for row in report.rows:
            rows.setdefault(_kind(row), []).append(row)
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


def _precisions(report: Report) -> frozenset[str]:
    """What models were evaluated in; of images in files it is not known."""
    return frozenset(row.precision for row in report.rows if row.sampler != "files")


def _kind(row: Row) -> tuple[Any, ...]:
    """What rows of several trainings of one model have in common."""
    return row.model, row.steps, row.sampler, row.guidance, row.n, row.ema


def _mean_row(rows: Sequence[Row]) -> Row:
    return replace(
        rows[0],
        metrics=_means([row.metrics for row in rows]),
        differences=_means([row.differences for row in rows]),
        per_class=_class_means([row.per_class for row in rows]),
        heavy=tuple(dict.fromkeys(name for row in rows for name in row.heavy)),
        latency_ms=_median([row.latency_ms for row in rows]),
        latency_p95_ms=_median([row.latency_p95_ms for row in rows]),
        images_per_s=_median([row.images_per_s for row in rows]),
        peak_memory_mb=_median([row.peak_memory_mb for row in rows]),
        decode_ms=_median([row.decode_ms for row in rows]),
        digest=", ".join(row.digest for row in rows),
        seeds=len(rows),
    )


def _means(measured: Sequence[Mapping[str, Measured]]) -> dict[str, Measured]:
    shared = [name for name in measured[0] if all(name in each for each in measured)]
    return {name: _mean([each[name].value for each in measured]) for name in shared}


def _class_means(each: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """Class by class, of what all trainings have; a class that one of them has no number for has none here."""
    known = [{name: [math.nan if x is None else x for x in of] for name, of in found.items()} for found in each]
    shared = [name for name in known[0] if len({len(found.get(name, ())) for found in known}) == 1]
    return {
        name: [statistics.fmean(of) for of in zip(*(found[name] for found in known), strict=True)] for name in shared
    }


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
    """What training took, as a median over the seeds; every seed has a teacher of its own, and maybe a machine."""
    teachers = [model.teacher_digest for model in models if model.teacher_digest]
    minutes = [model.device_minutes for model in models]
    alike = len({(model.processes, model.device_s) for model in models}) == 1
    devices = dict.fromkeys(model.device for model in models)
    return replace(
        models[0],
        train_s=statistics.median(model.train_s for model in models),
        teacher_digest=", ".join(teachers) or None,
        device=None if None in devices else ", ".join(map(str, devices)),
        device_type=models[0].device_type if len({model.device_type for model in models}) == 1 else None,
        device_s=models[0].device_s if alike or None in minutes else 60 * statistics.median(filter(None, minutes)),
    )
