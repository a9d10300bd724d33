"""A step sweep beside the same done by hand: sample each row in a plain loop, score it with torchmetrics and prdc.

Both sides draw the same samples with the same networks in the same batches, and give the same five kinds of numbers for
every model, step count and set of features. Shapes: M generated samples, N real ones.
"""

import contextlib
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from fewstep.bench.measure import Reported, Work, device_name, in_turns, spread, timed, unreported
from fewstep.bench.metric_peers import Features, Values, quiet, threads_of_all
from fewstep.bench.metrics import OWN, SWEEP, MetricsBench, check_agreement, compared
from fewstep.compat import prepare_torchvision
from fewstep.config import read_config
from fewstep.data.dataset import Dataset
from fewstep.data.load import load_data
from fewstep.errors import FewstepError, UsageError
from fewstep.evaluation.config import EvaluateConfig
from fewstep.evaluation.features import FeatureExtractor, build_extractor
from fewstep.evaluation.metrics import compare
from fewstep.evaluation.protocol import K_DENSITY_COVERAGE, K_PRECISION_RECALL
from fewstep.evaluation.quantise import to_uint8
from fewstep.evaluation.reference import reference_features, tiled_features
from fewstep.evaluation.sweep import draw
from fewstep.flow import uniform_grid
from fewstep.keys import Key
from fewstep.sampling import MapSampler, OdeSampler, Sampler
from fewstep.students.load import LoadedModel, load_model
from fewstep.workflows import evaluate_runs

PEER = "torchmetrics + prdc"
SUBSETS, SUBSET = 100, 1000
TOLERANCE = {"fd": 1e-4, "precision": 2e-3, "recall": 2e-3, "density": 2e-3, "coverage": 2e-3}
"""Relative, and absolute below 1. Balls are closed here and open there: pixels are whole numbers, and ties exist."""
ERRORS = 6
"""A kernel distance over random subsets may be this many of its standard errors from the one over all pairs."""


@dataclass(frozen=True)
class Swept:
    """What both sides sweep: models with their step counts, the data and how they are measured."""

    runs: tuple[Path, ...]
    models: tuple[tuple[LoadedModel, tuple[int, ...]], ...]
    steps: tuple[int, ...] | None
    data: Dataset
    extractors: tuple[FeatureExtractor, ...]
    config: EvaluateConfig
    device: torch.device

    @property
    def rows(self) -> int:
        return sum(len(steps) for _, steps in self.models)

    @property
    def what(self) -> str:
        steps = sorted({count for _, counts in self.models for count in counts})
        counts = f"steps {','.join(map(str, steps))}" if self.steps else "their own steps"
        return f"{len(self.models)} models, {counts}: {self.rows} rows of {self.config.n:,}"


def swept_runs(folder: Path, steps: tuple[int, ...] | None, n: int, device: torch.device) -> Swept:
    """The finished runs in a folder, which have to share their data, at ``steps`` or at those of their own configs."""
    runs = sorted(path.parent for path in folder.glob("*/config.yaml")) if folder.is_dir() else []
    if not runs:
        raise UsageError(f"{folder} holds no finished runs to sweep: `fewstep demo` makes a teacher and three students")
    configs = {run: read_config(run) for run in runs}
    runs.sort(key=lambda run: configs[run].teacher is not None)
    config = configs[runs[0]].evaluate.model_copy(update={"n": n, "reference": (), "held_out": None})
    models = []
    for run in runs:
        model, own = load_model(run, device), configs[run].evaluate.steps
        if model.role == "teacher" and config.teacher_steps:
            own = config.teacher_steps
        models.append((model, steps or own))
    data = load_data(configs[runs[0]].data)
    if data.kind != "image":
        raise UsageError(f"{folder}: the packages that a sweep is compared with measure images, these are {data.kind}")
    extractors = tuple(build_extractor(name, device) for name in config.features)
    return Swept(tuple(runs), tuple(models), steps, data, extractors, config, device)


def bench_sweep(
    swept: Swept, *, pairs: int, threads: int, everything: bool = True, report: Reported = unreported
) -> MetricsBench:
    """The sweep with those metrics that both have, beside the same by hand; and with ``everything`` what ``fewstep
    evaluate`` takes for all that it measures (intervals, floors, speed, trajectories ...), its rows measured (``-all``)
    and its rows found again (``-again``).

    But for the last nothing is kept from one sweep to the next: references are computed in every one.
    """
    by_hand = ByHand(swept)
    parts: dict[str, dict[str, list[float]]] = {OWN: defaultdict(list), PEER: defaultdict(list)}
    with threads_of_all(threads), contextlib.ExitStack() as stack:
        values: dict[str, Values] = {}

        def own() -> None:
            values[OWN] = plain_sweep(swept, parts[OWN])

        def theirs() -> None:
            values[PEER] = by_hand.sweep(parts[PEER])

        works: dict[str, Work] = {OWN: own, PEER: theirs}
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if everything:
            works["evaluate"] = lambda: _evaluate(swept, Path(folder), fresh=True)
        small = replace(swept, models=swept.models[:1], config=swept.config.model_copy(update={"n": 200}))
        _ = plain_sweep(small), ByHand(small).sweep()  # what a first call loads is not counted
        taken = in_turns(works, pairs, swept.device, report)
        error, tolerance = check_sweeps(values[OWN], values[PEER], by_hand.errors)
        both = values[OWN], values[PEER]
        lines = [compared(SWEEP, PEER, swept.what, taken[OWN], taken[PEER], both, error, tolerance)]
        medians = [{name: spread(found).median for name, found in parts[side].items()} for side in (OWN, PEER)]
        lines[0] = replace(lines[0], parts=medians[0], peer_parts=medians[1])
        if everything:
            again = [timed(lambda: _evaluate(swept, Path(folder), fresh=False), swept.device) for _ in range(pairs)]
            for name, times, what in (
                ("all", taken["evaluate"], "all that `fewstep evaluate` measures"),
                ("again", again, "the same, its rows kept"),
            ):
                what = f"{swept.what}; {what}"
                lines.append(compared(f"{SWEEP}-{name}", PEER, what, times, taken[PEER], both, error, tolerance))
        return MetricsBench(pairs, device_name(swept.device), torch.get_num_threads(), tuple(lines), {})


def _evaluate(swept: Swept, keep: Path, *, fresh: bool) -> None:
    evaluate_runs(swept.runs, settings=swept.config, steps=swept.steps, keep=keep, fresh=fresh)


class _Parts:
    """Processor seconds by part of a sweep, added up over its rows."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        began = time.process_time()
        yield
        self._spent[name] += time.process_time() - began

    def into(self, kept: dict[str, list[float]] | None) -> None:
        for name, seconds in self._spent.items() if kept is not None else ():
            assert kept is not None
            kept[name].append(seconds)


@torch.no_grad()
def plain_sweep(swept: Swept, kept: dict[str, list[float]] | None = None) -> Values:
    """The values alone, by the functions that `fewstep evaluate` is made of: one pass through each extractor, and what
    belongs to the reference once for all rows. ``kept`` takes the processor seconds of its parts."""
    config, data, device = swept.config, swept.data, swept.device
    values: dict[str, float] = {}
    parts = _Parts()
    with parts.of("references"):
        references = [reference_features(extractor, data, device) for extractor in swept.extractors]
    for model, counts in swept.models:
        for steps in counts:
            with parts.of("sampling"):
                drawn = draw(
                    model.sampler, steps, data, n=config.n, batch_size=config.batch_size, seed=0, device=device
                )
            images = to_uint8(drawn.x)
            for reference in references:
                with parts.of("features"):
                    features = tiled_features(reference.extractor, images)
                with parts.of("metrics"):
                    found = compare(reference, features)
                values |= {f"{model.name}@{steps} {name}": value for name, value in found.items()}
    parts.into(kept)
    return values


class ByHand:
    """A sweep as one writes it with the usual packages: row by row, sample, update the metrics, compute.

    What does not belong to the time of it is made before: networks are loaded, and the noise, which has to be ours for
    the values to agree, is drawn. Real images are given to torchmetrics once (``reset_real_features=False``); prdc has
    no such thing. Both torchmetrics extract features for themselves, and prdc's are extracted once for two calls, since
    precision and recall are of other balls (k = 3) than density and coverage (k = 5).
    """

    def __init__(self, swept: Swept) -> None:
        data, device = swept.data, swept.device
        index = torch.arange(swept.config.n, device=device)
        self.swept = swept
        self.errors: dict[str, float] = {}
        """The standard errors of the kernel distances, which are means over random subsets."""
        label = data.drawn_condition(index)
        if not (label is None or isinstance(label, Tensor)):
            raise UsageError(f"{data.name} has embeddings: a sweep by hand is written for classes")
        self._label = label
        self._real = to_uint8(data.samples(torch.arange(len(data.x))).to(device))
        self._noise = {
            model.name: model.sampler.source(Key(0), "noise", index, data.shape) for model, _ in swept.models
        }
        self._fresh = {
            (model.name, k): model.sampler.source(Key(0, k), "renoise", index, data.shape)
            for model, counts in swept.models
            if isinstance(model.sampler, MapSampler) and model.sampler.rule == "renoise"
            for k in range(max(counts) - 1)
        }

    @torch.no_grad()
    def sweep(self, kept: dict[str, list[float]] | None = None) -> Values:
        """``kept`` takes the processor seconds of its parts."""
        prepare_torchvision()
        from prdc import compute_prdc
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance

        swept, size, parts = self.swept, self.swept.config.batch_size, _Parts()
        values: dict[str, float] = {}
        torch.manual_seed(0)  # of the subsets
        metrics = []
        with quiet(), parts.of("references"):
            for extractor in swept.extractors:
                width = extractor(self._real[:1]).shape[1]
                network = Features(width, extractor)
                shape = (self._real.shape[1], self._real.shape[2], self._real.shape[3])
                fid = FrechetInceptionDistance(network, reset_real_features=False, input_img_size=shape)
                subset = min(SUBSET, len(self._real), swept.config.n)
                kid = KernelInceptionDistance(network, SUBSETS, subset, reset_real_features=False)
                for batch in self._real.split(size):
                    fid.update(batch, real=True)
                    kid.update(batch, real=True)
                metrics.append((extractor, fid, kid))
        for model, counts in swept.models:
            for steps in counts:
                row = f"{model.name}@{steps}"
                with parts.of("sampling"):
                    images = self.sampled(model, steps)
                for extractor, fid, kid in metrics:
                    name = f"{row} {{}}_{extractor.name}".format
                    with parts.of("torchmetrics: fid"):
                        for batch in images.split(size):
                            fid.update(batch, real=False)
                        values[name("fd")] = float(fid.compute())
                        fid.reset()
                    with parts.of("torchmetrics: kid"), quiet():
                        for batch in images.split(size):
                            kid.update(batch, real=False)
                        mean, deviation = kid.compute()
                        kid.reset()
                    values[name("kd")] = float(mean)
                    self.errors[name("kd")] = float(deviation) / SUBSETS**0.5
                    with parts.of("features"):
                        sides = [
                            torch.cat([extractor(batch) for batch in each.split(size)]).cpu().numpy()
                            for each in (self._real, images)
                        ]
                    with parts.of(f"prdc, k = {K_PRECISION_RECALL}"), quiet():
                        narrow = compute_prdc(*sides, nearest_k=K_PRECISION_RECALL)
                    with parts.of(f"prdc, k = {K_DENSITY_COVERAGE}"), quiet():
                        wide = compute_prdc(*sides, nearest_k=K_DENSITY_COVERAGE)
                    for kind in ("precision", "recall"):
                        values[name(kind)] = float(narrow[kind])
                    for kind in ("density", "coverage"):
                        values[name(kind)] = float(wide[kind])
        parts.into(kept)
        return values

    def sampled(self, model: LoadedModel, steps: int) -> Tensor:
        """uint8 images ``[M, C, H, W]`` from a plain loop."""
        images = []
        for rows in torch.arange(self.swept.config.n, device=self.swept.device).split(self.swept.config.batch_size):
            label = None if self._label is None else self._label[rows]
            fresh = [self._fresh[model.name, k][rows] for k in range(steps - 1) if (model.name, k) in self._fresh]
            x = plain_loop(model.sampler, steps, self._noise[model.name][rows], label, fresh)
            images.append((x * 127.5 + 128).clamp(0, 255).to(torch.uint8))
        return torch.cat(images)


def plain_loop(sampler: Sampler, steps: int, x: Tensor, label: Tensor | None, fresh: Sequence[Tensor]) -> Tensor:
    """Euler steps of a field, or the jumps of a map, with ``fresh`` noise between them where its rule wants that."""
    if isinstance(sampler, OdeSampler) and sampler.solver == "euler":
        for t, r in pairwise(uniform_grid(steps).tolist()):
            x = x + (r - t) * sampler.field(x, torch.full((len(x),), t, device=x.device), label)
        return x
    if not isinstance(sampler, MapSampler):
        raise UsageError(f"no plain loop is written for the rule '{sampler.name}': sweep teachers and flow maps")
    flow_map = sampler.maps[steps if steps in sampler.maps else 0]
    times = flow_map.domain.grid or uniform_grid(steps).tolist()
    for k, (t, r) in enumerate(pairwise(times)):
        t_B, r_B = (torch.full((len(x),), time, device=x.device) for time in (t, r))
        if sampler.rule == "jumps":
            x = flow_map(x, t_B, r_B, label)
        else:
            x = flow_map(x, t_B, torch.zeros_like(t_B), label)
            if r > 0:
                x = (1 - r) * x + r * fresh[k]
    return x


def check_sweeps(own: Values, theirs: Values, errors: Mapping[str, float]) -> tuple[float, float]:
    """The largest difference as a share of what is tolerated, and 1; ``FewstepError`` where it is more, or where one
    side has what the other has not. ``errors`` are the standard errors of kernel distances."""
    if own.keys() != theirs.keys():
        raise FewstepError(f"two sweeps of different rows: {sorted(own.keys() ^ theirs.keys())[:3]}")
    worst = 0.0
    for name, value in own.items():
        kind = name.split()[1].split("_")[0]
        tolerance = ERRORS * errors[name] if kind == "kd" else TOLERANCE[kind]
        error = check_agreement(name, PEER, {kind: value}, {kind: theirs[name]}, tolerance)
        worst = max(worst, error / tolerance)
    return worst, 1.0
