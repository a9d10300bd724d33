"""The step sweep: every candidate at every step count, on shared seeds, through every metric.

Noise and label of sample ``i`` are functions of (seed, i), so that rows are paired: two rows differ in the model or in
the number of steps and in nothing else. Labels are balanced, ``i mod classes``. Several processes draw a share of the
samples each and find the rows of one.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.data.dataset import Dataset
from fewstep.data.digests import content_digest
from fewstep.errors import FewstepError
from fewstep.evaluation.bank import Bank, Finished
from fewstep.evaluation.config import EvaluateConfig
from fewstep.evaluation.extractor import Everything, FeatureExtractor
from fewstep.evaluation.features import extractor_facts, metric_name
from fewstep.evaluation.floor import real_floor
from fewstep.evaluation.memorisation import nearest
from fewstep.evaluation.metrics import Labels, differences, outcome
from fewstep.evaluation.protocol import Protocol, digest_of
from fewstep.evaluation.quantise import clamped_fraction, to_uint8
from fewstep.evaluation.reference import (
    TILE,
    ReferenceFeatures,
    held_out_features,
    reference_features,
    tiled_everything,
)
from fewstep.evaluation.results import Measured, Row
from fewstep.evaluation.share import ALONE, Share
from fewstep.evaluation.speed import Moment, measure_speed, moment, percentile, seconds_between
from fewstep.evaluation.strips import COUNT, samples_strip
from fewstep.evaluation.trajectory import of_row, trajectory_measures
from fewstep.evaluation.transport import wasserstein2
from fewstep.keys import Key
from fewstep.precision import in_precision
from fewstep.sampling import Sampler

Seen = Callable[[Row, int, int], None]
"""What hears of a sweep's progress: the new row, how many there are now, how many there will be."""


def unseen(row: Row, done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Candidate:
    """A model to be swept: its sampler, the step counts asked for, and what a row says about it."""

    name: str
    role: Literal["teacher", "student"]
    objective: str
    sampler: Sampler
    steps: tuple[int, ...]
    guidance: float
    digest: str
    params: int
    ema: str | None = None


@dataclass(frozen=True)
class Drawn:
    """This process's samples ``x [n, *D]`` with their labels, network evaluations per sample, and the rates (images per
    second) that they were drawn at, by batch size."""

    x: Tensor
    label: Tensor | None
    nfe: int
    rates: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What all rows of a sweep have in common."""

    data: Dataset
    references: Sequence[ReferenceFeatures]
    protocol: Protocol
    config: EvaluateConfig
    seed: int
    device: torch.device
    share: Share = ALONE
    held_out: Dataset | None = None


@dataclass(frozen=True)
class Anchor:
    """The teacher's row that others are compared with, and this process's samples of it."""

    finished: Finished
    x: Tensor


def sweep(
    candidates: Iterable[Candidate],
    data: Dataset,
    extractors: Iterable[FeatureExtractor],
    config: EvaluateConfig,
    *,
    seed: int,
    device: torch.device,
    report: Seen = unseen,
    share: Share = ALONE,
    bank: Bank | None = None,
    known: Iterable[ReferenceFeatures] = (),
    held_out: Dataset | None = None,
) -> tuple[list[Row], dict[str, Any]]:
    """Rows for every candidate and step count, and the reference they were measured against.

    The teacher's samples at its largest step count are the ones that ``teacher_gap`` (root mean square difference of a
    student's sample to the teacher's from the same noise, in data units) and ``differences`` refer to; of several
    teachers it is the first, or the first of the row's own guidance. ``report`` sees each row as it comes. A step count
    outside a student's training is a ``ValueError`` before any sampling starts. Whatever asks a network, for samples,
    times or trajectories, does so in ``config.precision``.

    Every process of ``share`` gets all rows. ``bank`` keeps finished rows and gives back those of an earlier call with
    the same protocol and weights. ``known`` are references that need not be computed. ``held_out`` are data that no
    model has seen, beside which memorised samples show in the leading features.
    """
    candidates = sorted(candidates, key=lambda candidate: candidate.role != "teacher")
    candidates = [replace(each, sampler=in_precision(each.sampler, config.precision)) for each in candidates]
    for candidate in candidates:
        for steps in candidate.steps:
            candidate.sampler.check(steps)
    given = {reference.extractor.name: reference for reference in known}
    references = [
        given.get(extractor.name) or reference_features(extractor, data, device, share) for extractor in extractors
    ]
    if held_out is not None:
        references[0] = replace(references[0], held_out=held_out_features(references[0], held_out, device))
    setting = Setting(data, references, protocol_of(references, data, config.n), config, seed, device, share, held_out)
    found = _Sweep(setting, bank or Bank(), candidates)
    total = sum(len(candidate.steps) for candidate in candidates)
    rows: list[tuple[int, Row]] = []
    for place, candidate in enumerate(candidates):
        for steps in sorted(candidate.steps, reverse=True):
            rows.append((place, found.row(candidate, steps)))
            report(rows[-1][1], len(rows), total)
    if share.main:
        found.bank.forget_samples()
    rows.sort(key=lambda entry: (entry[0], entry[1].steps))
    return [row for _, row in rows], describe_reference(setting)


def sweep_images(
    images: Tensor,
    data: Dataset,
    extractors: Iterable[FeatureExtractor],
    config: EvaluateConfig,
    *,
    device: torch.device,
    known: Iterable[ReferenceFeatures] = (),
) -> tuple[Row, dict[str, Any]]:
    """The row of images ``[N, C, H, W]`` uint8 that somebody else drew (it does not say how), and the reference."""
    given = {reference.extractor.name: reference for reference in known}
    references = [given.get(extractor.name) or reference_features(extractor, data, device) for extractor in extractors]
    setting = Setting(data, references, protocol_of(references, data, len(images)), config, 0, device)
    return measured_samples(images, None, setting).row, describe_reference(setting)


class _Sweep:
    """The rows found so far, as far as others are compared with them."""

    def __init__(self, setting: Setting, bank: Bank, candidates: Sequence[Candidate]) -> None:
        self.setting, self.bank = setting, bank
        self._teachers = [candidate for candidate in candidates if candidate.role == "teacher" and candidate.steps]
        self._anchors: dict[str, Anchor] = {}
        self._paths: dict[int, dict[str, float]] = {}

    def row(self, candidate: Candidate, steps: int) -> Row:
        """A row that was kept, or else a new one."""
        share, key = self.setting.share, self._key(candidate, steps)
        kept = share.from_main(self.bank.find(key) if share.main else None)
        if kept is not None:
            return kept.row
        anchor = self._anchor(candidate, steps)
        drawn = self._drawn(candidate, steps)
        finished = measure(candidate, steps, drawn, self.setting, anchor, self._measures(candidate, steps))
        if share.main:
            self.bank.keep(key, finished)
        if self._anchored_by(candidate) == (candidate, steps):
            self._anchors[key] = Anchor(finished, drawn.x)
            self.bank.keep_samples(key, share.rank, share.world, drawn.x)
        return finished.row

    def _anchored_by(self, candidate: Candidate) -> tuple[Candidate, int] | None:
        """The teacher's row that rows of a candidate are compared with."""
        if not self._teachers:
            return None
        guided = [teacher for teacher in self._teachers if teacher.guidance == candidate.guidance]
        chosen = (guided or self._teachers)[0]
        return chosen, max(chosen.steps)

    def _anchor(self, candidate: Candidate, steps: int) -> Anchor | None:
        chosen = self._anchored_by(candidate)
        if chosen is None or chosen == (candidate, steps):
            return None
        key, share = self._key(*chosen), self.setting.share
        if key not in self._anchors:  # its row was kept by an earlier call: so may its samples be
            finished = share.from_main(self.bank.find(key) if share.main else None)
            x = self.bank.find_samples(key, share.rank, share.world)
            if not all(share.everyone(x is not None)):
                x = self._drawn(*chosen).x
                self.bank.keep_samples(key, share.rank, share.world, x)
            assert x is not None
            self._anchors[key] = Anchor(finished, x.to(self.setting.device))
        return self._anchors[key]

    def _drawn(self, candidate: Candidate, steps: int) -> Drawn:
        config = self.setting.config
        return draw(
            candidate.sampler,
            steps,
            self.setting.data,
            n=config.n,
            batch_size=config.batch_size,
            seed=self.setting.seed,
            device=self.setting.device,
            share=self.setting.share,
            tile=min(TILE, config.batch_size),
        )

    def _measures(self, candidate: Candidate, steps: int) -> dict[str, float]:
        if id(candidate) not in self._paths:
            self._paths[id(candidate)] = trajectory_measures(
                candidate.sampler, self.setting.data, self.setting.seed, self.setting.device
            )
        return of_row(self._paths[id(candidate)], candidate.sampler, steps)

    def _key(self, candidate: Candidate, steps: int) -> str:
        """The digest of all that a row depends on."""
        chosen = self._anchored_by(candidate)
        setting = self.setting
        document = {
            "protocol": setting.protocol.to_json(),
            "held out": None if setting.held_out is None else content_digest(setting.held_out),
            "extractors": {each.extractor.name: each.extractor.digest for each in setting.references},
            "seed": setting.seed,
            "where": dict(self.bank.where),
            "model": (candidate.name, candidate.role, candidate.objective, candidate.digest, candidate.ema),
            "sampler": (candidate.sampler.name, candidate.guidance, steps, setting.config.precision),
            "anchor": None if chosen is None or chosen == (candidate, steps) else self._key(*chosen),
        }
        return digest_of(document)


def draw(
    sampler: Sampler,
    steps: int,
    data: Dataset,
    *,
    n: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    share: Share = ALONE,
    tile: int = 1,
) -> Drawn:
    """A process's share of the samples ``0 .. n - 1`` of a seed, in batches that change nothing but the speed.

    Below ``TILE`` rows, and at the edge of some other sizes, matrix products take kernels that round otherwise: the
    last batch is filled up to a multiple of ``tile``, so that neither ``n`` nor the number of processes changes a bit.
    On a GPU nothing waits for a batch before the next one is asked for.
    """
    parts, labels, nfe = [], [], 0
    timed: list[tuple[int, Moment, Moment]] = []
    every, count = share.own(n, tile=tile, device=device)
    for indices in every.split(batch_size):
        noise = sampler.source(Key(seed), "noise", indices, data.shape)
        label = data.drawn_condition(indices)
        began = moment(device)
        samples = sampler(steps, noise, label, Key(seed), indices)
        timed.append((len(indices), began, moment(device)))
        nfe = samples.nfe
        parts.append(samples.x)
        if isinstance(label, Tensor):
            labels.append(label)
    rates: dict[int, list[float]] = {}
    for size, began, ended in timed:
        rates.setdefault(size, []).append(size / seconds_between(began, ended))
    middle = {size: statistics.median(found) for size, found in rates.items()}
    return Drawn(torch.cat(parts)[:count], torch.cat(labels)[:count] if labels else None, nfe, middle)


def measure(
    candidate: Candidate,
    steps: int,
    drawn: Drawn,
    setting: Setting,
    anchor: Anchor | None,
    paths: Mapping[str, float],
) -> Finished:
    """All metrics of one set of samples, from one pass through each extractor; ``paths`` are measures of the model's
    trajectories. Every process gets the row, the main one also the influences."""
    share, config = setting.share, setting.config
    images = _agreed(share, lambda: quantised(drawn.x, setting.data), f"{candidate.name} at {steps} steps")
    measured = measured_samples(images, drawn.x, setting)
    gap: Tensor | None = None
    if candidate.role == "student" and anchor is not None:
        gap = share.gather((drawn.x.double() - anchor.x.double()).flatten(1).square().mean(1), config.n)
    if not share.main:
        return share.from_main(None)
    metrics = {**measured.row.metrics, **{name: Measured(value) for name, value in paths.items()}}
    if gap is not None:
        metrics |= gap_metrics(gap)
    speed = measure_speed(
        candidate.sampler, steps, setting.data, seed=setting.seed, device=setting.device, known=drawn.rates
    )
    apart = (
        {}
        if anchor is None
        else differences(metrics, measured.influences, anchor.finished.row.metrics, anchor.finished.influences)
    )
    row = replace(
        measured.row,
        model=candidate.name,
        role=candidate.role,
        objective=candidate.objective,
        steps=steps,
        nfe=drawn.nfe,
        sampler=candidate.sampler.name,
        precision=config.precision,
        guidance=candidate.guidance,
        metrics=metrics,
        params=candidate.params,
        digest=candidate.digest,
        ema=candidate.ema,
        differences=apart,
        **asdict(speed),
    )
    share.from_main(Finished(row))
    return Finished(row, measured.influences)


def measured_samples(images: Tensor, x: Tensor | None, setting: Setting) -> Finished:
    """What features say of samples: this process's ``images`` (uint8, or points) and ``x`` as they were drawn, None for
    images that come quantised. The row says nothing yet of a model; on other processes than the main one it is empty.
    """
    share, data, n = setting.share, setting.data, setting.config.n
    metrics: dict[str, Measured] = {}
    influences: dict[str, Tensor] = {}
    per_class: dict[str, list[float]] = {}
    heavy: tuple[str, ...] = ()
    closest: Tensor | None = None
    floating = images.float() / 127.5 - 1 if x is None else x
    for place, reference in enumerate(setting.references):
        extractor = reference.extractor
        own = tiled_everything(extractor, images if extractor.takes == "uint8" else floating)
        logits, spatial = (None if part is None else share.gather(part, n) for part in (own.logits, own.spatial))
        seen = Everything(share.gather(own.features, n), logits, spatial)
        if not share.main:
            continue
        labels = None if x is None else _generated_from(setting, reference)
        found = outcome(reference, seen, labels=labels, leading=place == 0)
        metrics |= found.metrics
        influences |= found.influences
        per_class |= found.per_class
        heavy += found.heavy
        if data.kind == "points" and reference.features is not None:
            metrics[metric_name("w2", extractor.name)] = Measured(wasserstein2(reference.features, seen.features))
        if place == 0 and reference.features is not None and reference.rows is not None and data.kind == "image":
            at = nearest(seen.features[: max(2, min(n, COUNT))], reference.features)[1]
            closest = to_uint8(data.samples(reference.rows[at.cpu()]))
    if data.kind == "image" and x is not None:
        outside = share.everyone((clamped_fraction(x) * len(x)) if len(x) else 0.0)
        metrics["clamped"] = Measured(sum(outside) / n)
    shown = n if data.kind == "points" else min(n, COUNT)
    first = share.gather(images[: len(range(share.rank, shown, share.world))], shown)
    row = Row(
        model="",
        role="student",
        objective="",
        steps=0,
        nfe=0,
        sampler="",
        guidance=1.0,
        n=n,
        seed=setting.seed,
        metrics=metrics,
        latency_ms=None,
        images_per_s=None,
        params=0,
        digest="",
        samples_png=samples_strip(first, data.kind),
        neighbours_png=None if closest is None else samples_strip(closest, data.kind),
        per_class=per_class,
        heavy=heavy,
    )
    return Finished(row, {name: influence.float().cpu() for name, influence in influences.items()})


def _generated_from(setting: Setting, reference: ReferenceFeatures) -> Labels | None:
    """The classes of samples and of the reference's, where there are classes."""
    data, device = setting.data, setting.device
    label = data.drawn_condition(torch.arange(setting.config.n, device=device))
    if not isinstance(label, Tensor) or not data.num_classes:
        return None
    return Labels(label, reference.label, data.num_classes)


def gap_metrics(square_n: Tensor) -> dict[str, Measured]:
    """The gap to the teacher from mean squares per sample: its root mean square, median and 95th percentile."""
    each = square_n.sqrt().tolist()
    return {
        "teacher_gap": Measured(float(square_n.mean().sqrt())),
        "teacher_gap_p50": Measured(percentile(each, 0.5)),
        "teacher_gap_p95": Measured(percentile(each, 0.95)),
    }


def quantised(x: Tensor, data: Dataset) -> Tensor:
    """Images become uint8, once; points stay as they are."""
    return to_uint8(x) if data.kind == "image" else x


def _agreed(share: Share, compute: Callable[[], Tensor], what: str) -> Tensor:
    """What ``compute`` returns; what it finds wrong in one process ends all of them, which would wait for it."""
    found, wrong = None, None
    try:
        found = compute()
    except ValueError as error:
        wrong = str(error)
    first = next((text for text in share.everyone(wrong) if text), None)
    if first is not None:
        raise FewstepError(f"{what}: {first}")
    assert found is not None
    return found


def protocol_of(references: Sequence[ReferenceFeatures], data: Dataset, n: int) -> Protocol:
    """How a sweep measures. Statistics of a file count as what they are of."""
    own = [reference for reference in references if not reference.facts]
    digests = {reference.extractor.name: str(reference.facts["digest"]) for reference in references if reference.facts}
    if own:
        digests |= dict.fromkeys((reference.extractor.name for reference in own), content_digest(data))
    imported = [
        f"{reference.extractor.name}: statistics of {reference.facts['dataset']}, imported"
        for reference in references
        if reference.facts.get("imported")
    ]
    said = ["all samples of the data set"] if len(imported) < len(references) else []
    return Protocol(
        reference="; ".join([*said, *imported]),
        reference_digest=", ".join(dict.fromkeys(digests.values())),
        n=n,
        labels=_labels(data),
        quantisation="uint8 by (127.5 x + 128), clamped, once" if data.kind == "image" else f"none ({data.kind})",
    )


def _labels(data: Dataset) -> str:
    """What samples are generated from, in words."""
    if data.embeddings is not None:
        return "embeddings, i mod rows"
    return "balanced, i mod classes" if data.num_classes else "none"


def describe_reference(setting: Setting) -> dict[str, Any]:
    """The reference block of ``results.json``: data, extractors, protocol, and real data against real data."""
    floor: dict[str, float] = {}
    if setting.share.main:
        for reference in setting.references:
            floor |= real_floor(reference, setting.config.n)
    told = [reference.facts for reference in setting.references if reference.facts]
    whole = told[0] if told and len(told) == len(setting.references) else None
    return {
        "dataset": setting.data.name if whole is None else whole["dataset"],
        "n": len(setting.data.x) if whole is None else whole["n"],
        "extractors": {
            reference.extractor.name: {**extractor_facts(reference.extractor), "dim": len(reference.moments.mean)}
            for reference in setting.references
        },
        "floor": floor,
        "protocol": setting.protocol.to_json(),
    }
