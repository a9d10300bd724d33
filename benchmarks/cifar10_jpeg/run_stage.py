"""One stage of the cifar10-jpeg evidence, from the data in FEWSTEP_DATA to rows in the ledger.

    run.sh STAGE [--size full] [--limit SECONDS] [--fit] [--teacher unet] [key=value ...]

A stage that has run is left alone; one that was stopped goes on. With --limit it ends within that time: a training
saves a checkpoint and a measurement its rows, and the exit code is 130 (run the same command again to go on). With
--fit a training takes as many steps as fit into the limit, by what a short one took just before. With --carry runs
come from and go to files below 16 MB (carry.py), for a later call on another machine. key=value are overrides of the
recipe, in benchmarks/cifar10_jpeg/recipes. Other exit codes are fewstep's own.
"""

import argparse
import datetime
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import limits
from carry import pack, unpack
from limits import STOPPED, Clock, finish
from stages import CLASSIFIER, GOALS, HERE, RECIPES, SIZES, STAGES, STUDENTS, TAUGHT, TEACHERS, Size

from fewstep.bench.measure import append_row
from fewstep.checkpoint import RunDirectory
from fewstep.config import read_config
from fewstep.environment import describe_environment
from fewstep.errors import FewstepError, UsageError
from fewstep.evaluation.results import Report, read_results
from fewstep.files import read_json

PROBE = 24
"""Steps of the short training that tells how long a step takes; the first half of them is not counted."""
SPARE = 0.05
"""The share of the time that --fit leaves unused."""


class Evidence:
    """Where the runs, the ledger and the teacher of a set of stages are, and how large they are."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.size: Size = SIZES[asked.size]
        self.size_name: str = asked.size
        self.runs: Path = asked.runs or Path("runs") / ("cifar10_jpeg" if asked.size == "full" else asked.size)
        today = datetime.date.today().isoformat()
        full = HERE.parent / "ledger" / f"{today}-cifar10-jpeg.jsonl"
        self.ledger: Path = asked.ledger or (full if asked.size == "full" else self.runs / "ledger.jsonl")
        self.teacher: str = asked.teacher
        ships = self.runs / "classifier" if self.size.own_classifier else CLASSIFIER
        self.classifier: Path = asked.classifier or ships
        self.carry: Path | None = asked.carry
        self.fit: bool = asked.fit
        self.overrides: list[str] = asked.overrides

    def run(self, stage: str) -> RunDirectory:
        return RunDirectory(self.runs / stage)

    def done(self, stage: str) -> bool:
        return (self.run(stage).model / "config.json").is_file()

    def row(self, stage: str, **facts: Any) -> None:
        """Append to the ledger."""
        row: dict[str, Any] = {"benchmark": "cifar10-jpeg", "date": datetime.date.today().isoformat()}
        row |= {"size": self.size_name, "stage": stage, **facts, "environment": describe_environment()}
        self.ledger.parent.mkdir(parents=True, exist_ok=True)
        append_row(self.ledger, _plain(row))


def _plain(value: Any) -> Any:
    """The same with None for numbers that are not finite: JSON has none of those."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# From machine to machine ---------------------------------------------------------------------------------------------


def bring(evidence: Evidence, stages: Sequence[str]) -> None:
    """Unpack what was carried here of these stages and is not there yet."""
    for stage in stages:
        packed = evidence.carry / stage if evidence.carry is not None else None
        if packed is not None and (packed / "carry.json").is_file() and not evidence.run(stage).path.exists():
            unpack(packed, evidence.run(stage).path)
            print(f"{stage}: brought from {packed}", file=sys.stderr)


def take(evidence: Evidence, stage: str) -> None:
    """Pack a run into small files. One that has ended is replaced by what they hold: students learn here from the very
    weights that they will find elsewhere."""
    if evidence.carry is None:
        return
    run, packed = evidence.run(stage).path, evidence.carry / stage
    shutil.rmtree(packed, ignore_errors=True)
    manifest = pack(run, packed)
    if manifest["what"] == "model":
        shutil.rmtree(run)
        unpack(packed, run)
    size = sum(part["bytes"] for part in manifest["parts"])
    print(f"{stage}: {len(manifest['parts'])} parts, {size / 1e6:.1f} MB -> {packed}", file=sys.stderr)


# Trainings -----------------------------------------------------------------------------------------------------------


def train(evidence: Evidence, stage: str, clock: Clock) -> int:
    """Train a recipe, or go on with it, and write what came of it to the ledger."""
    bring(evidence, [stage, *([evidence.teacher] if stage in TAUGHT else [])])
    if evidence.done(stage):
        print(f"{stage} is trained: {evidence.run(stage).path}", file=sys.stderr)
        return 0
    command = "teach" if stage in TEACHERS else "distill"
    overrides = evidence.size.overrides(stage)
    if stage in TAUGHT:
        overrides.append(f"teacher.path={evidence.run(evidence.teacher).path}")
    overrides += evidence.overrides
    run = evidence.run(stage)
    resumes = run.resumes()
    recipe = RECIPES / f"{stage}.yaml"
    if resumes:  # as it began: the steps that fitted then, too
        recipe, overrides = run.path / "config.yaml", list(evidence.overrides)
    elif evidence.fit:
        if clock.limit is None:
            raise UsageError("--fit needs the --limit that the training is to fit into")
        overrides += fit(evidence, command, stage, overrides, clock)
    words = ["fewstep", command, str(recipe), *overrides, "--out", str(run.path)]
    if clock.left() <= limits.GRACE:
        return STOPPED
    began = time.monotonic()
    code = finish([*words, "--resume" if resumes else "--overwrite"] if run.path.exists() else words, clock)
    seconds = time.monotonic() - began
    if (run.path / "status.json").is_file():
        evidence.row(stage, **_training_facts(evidence, stage, code, seconds, overrides))
    if code in (0, STOPPED) and (evidence.done(stage) or run.resumes()):
        take(evidence, stage)
    return code


def _training_facts(
    evidence: Evidence, stage: str, code: int, seconds: float, overrides: Sequence[str]
) -> dict[str, Any]:
    run, status = evidence.run(stage), read_json(evidence.run(stage).path / "status.json")
    config = read_config(run.path)
    lines = run.metrics.read_text().splitlines() if run.metrics.is_file() else []
    last = json.loads(lines[-1]) if lines else {}
    facts: dict[str, Any] = {
        "kind": "training",
        "state": status["state"],
        "exit_code": code,
        "steps": status["step"],
        "batch_size": config.train.batch_size,
        "precision": config.train.precision,
        "compile": config.train.compile,
        "train_s": last.get("seconds"),
        "samples_per_s": last.get("samples_per_s"),
        "peak_memory_mib": last.get("peak_memory_mib"),
        "loss": last.get("loss"),
        "residual": last.get("residual"),
        "wall_s": round(seconds, 1),
        "overrides": [each for each in overrides if not each.startswith("teacher.path")],
    }
    if stage in TAUGHT:
        facts["teacher"] = evidence.teacher
    if evidence.done(stage):
        facts["params"] = read_json(run.model / "config.json").get("params")
    return facts


def fit(evidence: Evidence, command: str, stage: str, overrides: Sequence[str], clock: Clock) -> list[str]:
    """The number of steps of each stage of a training that fit into what is left of the limit, as overrides.

    A training of ``PROBE`` steps tells what a step takes (the last half of each stage's) and what everything else does:
    reading the data, compilation, the export.
    """
    if stage == "reflow":
        raise UsageError("reflow makes its pairs first: give train.steps and objective.pairs.count instead of --fit")
    probe = evidence.runs / "probe"
    shutil.rmtree(probe, ignore_errors=True)
    short = [f"train.steps={PROBE}", f"train.log_every={PROBE // 2}", "train.warmup_steps=1"]
    short += [f"train.checkpoint_every={10 * PROBE}"]
    words = ["fewstep", command, str(RECIPES / f"{stage}.yaml"), *overrides, *short, "--out", str(probe)]
    began = time.monotonic()
    code = finish(words, clock)
    whole = time.monotonic() - began
    if code:
        raise UsageError(f"the short training that tells how long a step takes ended with exit code {code}")
    lines = [json.loads(line) for line in RunDirectory(probe).metrics.read_text().splitlines()]
    steps = fitting_steps(lines, whole, clock.left() - limits.GRACE)
    shutil.rmtree(probe)
    if steps < PROBE:
        raise UsageError(f"{clock.left():.0f} s are too few: {steps} steps would fit")
    print(f"{stage}: {steps} steps of each stage fit", file=sys.stderr)
    return [f"train.steps={steps}", f"train.warmup_steps={max(1, steps // 40)}"]


def fitting_steps(lines: Sequence[dict[str, Any]], whole: float, left: float) -> int:
    """Steps of each stage that ``left`` seconds hold, by the logged lines of a training that took ``whole`` of them.

    Time outside of the steps counts once more, in full: compilation comes again.
    """
    unit = 0.0
    for before, after in itertools.pairwise(lines):
        if before["stage"] == after["stage"]:
            unit += (after["seconds"] - before["seconds"]) / (after["step"] - before["step"])
    stages = list(dict.fromkeys(line["stage"] for line in lines))
    # What the counted rate says the logged steps took: compilation is in the first half of a stage.
    train_s = unit * lines[-1]["step"] / len(stages)
    return int((left * (1 - SPARE) - (whole - train_s)) / unit)


# Measurements --------------------------------------------------------------------------------------------------------


def measure(evidence: Evidence, stage: str, clock: Clock) -> int:
    """Sweep the teachers, or the teacher and its students, as far as they are trained; rows go to the ledger."""
    names = TEACHERS if stage == "teachers" else (evidence.teacher, *STUDENTS)
    bring(evidence, names)
    runs = [evidence.run(name).path for name in names if evidence.done(name)]
    if stage == "students" and not evidence.done(evidence.teacher):
        raise UsageError(f"no teacher to measure students against: run the stage {evidence.teacher} first")
    if not runs:
        raise UsageError(f"nothing to measure: run one of {', '.join(names)} first")
    size = evidence.size
    features = ",".join([f"classifier:{evidence.classifier}", *size.features])
    out = evidence.runs / stage
    before = {_identity(row) for row in _results(out).rows} if (out / "results.json").is_file() else set()
    words = ["measure", *map(str, runs), "--out", str(out), "--n", str(size.n), "--features", features]
    words += ["--precision", size.precision]
    words += ["--steps", ",".join(map(str, size.steps)), "--teacher-steps", ",".join(map(str, size.teacher_steps))]
    code = finish(words, clock)
    if code:
        return code
    found = _results(out)
    models = {model.name: model for model in found.models}
    for row in found.rows:
        if _identity(row) in before:
            continue
        evidence.row(
            stage,
            kind="quality",
            model=row.model,
            role=row.role,
            objective=row.objective,
            steps=row.steps,
            nfe=row.nfe,
            n=row.n,
            seed=row.seed,
            precision=row.precision,
            metrics={name: [each.value, each.low, each.high] for name, each in row.metrics.items()},
            differences={name: [each.value, each.low, each.high] for name, each in row.differences.items()},
            latency_ms=row.latency_ms,
            images_per_s=row.images_per_s,
            at_batch=row.batch,
            params=row.params,
            train_s=models[row.model].train_s,
            device_minutes=models[row.model].device_minutes,
            digest=row.digest,
        )
    return 0


def _results(folder: Path) -> Report:
    return read_results(folder / "results.json")


def _identity(row: Any) -> tuple[Any, ...]:
    return row.model, row.digest, row.steps, row.n, row.seed


def report(evidence: Evidence, clock: Clock) -> int:
    """A report of the teachers and one of the students, as far as they are measured; the latter with the goals."""
    written = 0
    for stage in ("teachers", "students"):
        folder = evidence.runs / stage
        if not (folder / "results.json").is_file():
            continue
        goals = [word for goal in GOALS for word in ("--goal", goal)] if stage == "students" else []
        out = evidence.runs / f"report-{stage}"
        code = finish(["fewstep", "report", str(folder), "--out", str(out), *goals], clock)
        if code:
            return code
        written += 1
    if not written:
        raise UsageError("nothing is measured: run the stages teachers or students first")
    return 0


def classifier(evidence: Evidence, clock: Clock) -> int:
    """Train the feature classifier again, into a folder of its own. It cannot be stopped and resumed."""
    out = evidence.runs / "classifier"
    if (out / "classifier.json").is_file():
        print(f"the classifier is trained: {out}", file=sys.stderr)
        return 0
    data = Path(os.environ["FEWSTEP_DATA"]) / "cifar10-jpeg"
    words = ["fewstep", "data", "classifier", str(data / "train.parquet"), "--test", str(data / "test.parquet")]
    code = finish([*words, "--features", "128", "--flip", *evidence.size.classifier, "--out", str(out)], clock)
    if not code:
        card = read_json(out / "classifier.json")
        evidence.row("classifier", kind="classifier", **{key: each for key, each in card.items() if key != "format"})
    return code


# The command ---------------------------------------------------------------------------------------------------------


def stage_code(evidence: Evidence, stage: str, clock: Clock) -> int:
    """Run one stage; its exit code."""
    if stage == "classifier":
        return classifier(evidence, clock)
    if stage in ("teachers", "students"):
        return measure(evidence, stage, clock)
    if stage == "report":
        return report(evidence, clock)
    return train(evidence, stage, clock)


def arguments(words: Sequence[str]) -> argparse.Namespace:
    listed = "\n".join(f"  {name:<17} {what}" for name, what in STAGES.items())
    parser = argparse.ArgumentParser(
        prog="run.sh",
        description=__doc__,
        epilog=f"stages:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=STAGES, metavar="STAGE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--size", choices=SIZES, default="full", help="full: on a GPU; tiny: minutes on a CPU")
    parser.add_argument("--limit", type=float, help="seconds within which the stage ends")
    parser.add_argument("--fit", action="store_true", help="train as many steps as fit into the limit")
    parser.add_argument("--teacher", choices=TEACHERS, default="unet", help="whose students (default: unet)")
    parser.add_argument("--runs", type=Path, help="folder of the runs (default: runs/cifar10_jpeg, or runs/SIZE)")
    parser.add_argument("--ledger", type=Path, help="default: benchmarks/ledger/DATE-cifar10-jpeg.jsonl, or in --runs")
    parser.add_argument(
        "--carry", type=Path, help="folder of small files: runs are brought from it, and packed into it as they end"
    )
    parser.add_argument("--classifier", type=Path, help="default: the one that ships")
    asked = parser.parse_intermixed_args(words)
    if asked.limit is not None and asked.limit <= limits.GRACE:
        parser.error(f"--limit is above {limits.GRACE:.0f} s, which are left to a stage to stop in")
    for override in asked.overrides:
        if "=" not in override:
            parser.error(f"overrides are key=value, got '{override}'")
    return asked


def main(words: Sequence[str]) -> int:
    asked = arguments(words)
    evidence, clock = Evidence(asked), Clock(asked.limit)
    stages = [name for name in STAGES if name != "all"] if asked.stage == "all" else [asked.stage]
    try:
        if "FEWSTEP_DATA" not in os.environ:
            raise UsageError("set FEWSTEP_DATA to the folder that holds cifar10-jpeg/train.parquet")
        for stage in stages:
            code = stage_code(evidence, stage, clock)
            if code:
                if code == STOPPED:
                    print(f"{stage}: not finished; run the same command again to go on", file=sys.stderr)
                return code
    except FewstepError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"rows -> {evidence.ledger}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
