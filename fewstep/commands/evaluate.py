"""`fewstep evaluate`: a run, or images of others, against step counts and bounds."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewstep.commands.shared import (
    AsJson,
    Processes,
    SamplingPrecision,
    SolverOption,
    WindowOption,
    show_row,
    user_errors,
)
from fewstep.console import emit_json, meter, say, stderr
from fewstep.errors import UsageError
from fewstep.launch import is_main_process, launched, run_launched

if TYPE_CHECKING:
    from fewstep.config import RunConfig
    from fewstep.evaluation.config import EvaluateConfig
    from fewstep.evaluation.gates import Gate
    from fewstep.evaluation.results import Report

Bounds = list[str] | None


def evaluate(
    run: Annotated[Path | None, typer.Argument(help="A run directory (or none, with --images).", metavar="RUN")] = None,
    steps: Annotated[
        str | None, typer.Option("--steps", help="Step counts, for example 1,2,4 (default: config).")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", "--count", min=2, help="Samples per row (default: config).")] = None,
    features: Annotated[str | None, typer.Option("--features", help="Extractors, for example pixels,digits.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of noise and labels, shared by all rows.")] = 0,
    solver: SolverOption = None,
    guidance: Annotated[
        str | None,
        typer.Option("--guidance", help="Scales, for example 1,1.5,2: rows of each, where the model takes guidance."),
    ] = None,
    window: WindowOption = None,
    ema: Annotated[
        str | None,
        typer.Option("--ema", help="Tracked averages of the weights, NAME,... or all (default: the exported one)."),
    ] = None,
    precision: SamplingPrecision = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Sampling batch.")] = None,
    processes: Processes = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure finished rows of an earlier call again.")] = False,
    reference: Annotated[
        list[Path] | None,
        typer.Option("--reference", help="Statistics in the place of the data: .refstats.safetensors, .npz, .pkl."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", help="Inception weights file, if not in a usual place.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Measure images instead: a folder, or .npz with arr_0 (uint8 NHWC).")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="What --images are compared with: a recipe, a YAML file or a path.")
    ] = None,
    nfe: Annotated[int, typer.Option("--nfe", min=0, help="Network evaluations that --images took (0: unknown).")] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="Where --images' results go (default: runs/NAME).")] = None,
    max_fd: Annotated[
        float | None,
        typer.Option("--max-fd", help="Exit 4 if the leading Fréchet distance of any row of RUN exceeds this."),
    ] = None,
    max_fid: Annotated[float | None, typer.Option("--max-fid", help="The same for fid, on Inception features.")] = None,
    min_recall: Annotated[
        float | None, typer.Option("--min-recall", help="Exit 4 if the leading recall of any row of RUN is below this.")
    ] = None,
    at_most: Annotated[
        Bounds,
        typer.Option(
            "--max",
            "--at-most",
            help="Exit 4 beyond METRIC=X, or METRIC=X@STEPS: a metric, latency_ms or images_per_s; X a number, or for "
            "students 1.05*teacher, teacher+0.02: of the teacher's row at most steps.",
        ),
    ] = None,
    at_least: Annotated[
        Bounds,
        typer.Option(
            "--min",
            "--at-least",
            help="Exit 4 below it, for example recall_pixels=0.85 or recall_pixels=teacher-0.02@4.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a run against step counts -> RUN/results.json.

    The teacher is measured beside a student, on the same seeds. A call that was stopped goes on from its last row.

    Example: fewstep evaluate runs/digits-meanflow --steps 1,2,4 --max fd_pixels=0.5@4
    """
    with user_errors():
        if (run is None) == (images is None):
            raise UsageError("say what to measure: a RUN, or --images with --data")
        given = {
            "n": n,
            "features": tuple(features.split(",")) if features else None,
            "solver": None if solver is None else solver.value,
            "precision": None if precision is None else precision.value,
            "batch_size": batch_size,
            "reference": tuple(map(str, reference)) if reference else None,
        }
        gates = _Gates(max_fd, max_fid, min_recall, at_most or [], at_least or [])
        if images is not None:
            drawn = {"--guidance": guidance, "--window": window, "--ema": ema, "--solver": solver}
            _refuse({**drawn, "--precision": precision, "--fresh": fresh or None})
            _refuse({"--processes": processes if processes > 1 else None}, "is for runs: images are drawn already")
            _images(images, data, given, steps, nfe, out, weights, gates, as_json)
            return
        _refuse({"--data": data, "--nfe": nfe or None, "--out": out}, "goes with --images")
        assert run is not None
        counts, scales = step_counts(steps), _scales(guidance, window)
        from fewstep.config import read_config
        from fewstep.evaluation.results import read_results

        config = read_config(run)
        settings = _settings(config.evaluate, given)
        gates.read(settings.features, alone=_alone(run, config, settings))
        if processes > 1 and not launched():
            pairs = {
                "--steps": steps,
                "--count": n,
                "--features": features,
                "--solver": given["solver"],
                "--guidance": guidance,
                "--window": window,
                "--ema": ema,
                "--precision": given["precision"],
                "--batch-size": batch_size,
                "--weights": weights,
            }
            line = ["evaluate", str(run), "--seed", str(seed), *(["--fresh"] if fresh else [])]
            line += [word for name, value in pairs.items() if value is not None for word in (name, str(value))]
            line += [word for path in reference or [] for word in ("--reference", str(path))]
            code = run_launched(processes, line)
            if code:
                raise typer.Exit(code)
            results = read_results(run / "results.json")
        else:
            results = _measured(run, settings, counts, seed, weights, scales, ema, fresh)
            if not is_main_process():
                return
            if launched() and not (as_json or gates.given):
                return
        if as_json:
            emit_json(results.to_json())
        gates.check(results, config.name)


def _measured(
    run: Path,
    settings: "EvaluateConfig",
    steps: tuple[int, ...] | None,
    seed: int,
    weights: Path | None,
    guidance: Sequence[Any],
    ema: str | None,
    fresh: bool,
) -> "Report":
    """Measure in this process, or in this one's share, and write the results."""
    from fewstep.evaluation.report.tables import console_table
    from fewstep.workflows import evaluate_runs, write_results

    with meter(f"evaluate {run.name}", show=is_main_process()) as shown:
        results = evaluate_runs(
            [run],
            settings=settings,
            steps=steps,
            seed=seed,
            weights=weights,
            guidance=guidance,
            emas=ema.split(",") if ema else (),
            keep=run / "evaluation",
            fresh=fresh,
            report=show_row(shown) if is_main_process() else lambda row, done, total: None,
        )
    if is_main_process():
        write_results(run / "results.json", results)
        stderr().print(console_table(results))
    return results


def _images(
    images: Path,
    data: str | None,
    given: dict[str, Any],
    steps: str | None,
    nfe: int,
    out: Path | None,
    weights: Path | None,
    gates: "_Gates",
    as_json: bool,
) -> None:
    if data is None:
        raise UsageError("--images are compared with something: say with what by --data CONFIG")
    counts = step_counts(steps) or (0,)
    if len(counts) > 1:
        raise UsageError("--images were made with one number of --steps")
    from fewstep.config import load_config, recipe_names
    from fewstep.evaluation.config import EvaluateConfig
    from fewstep.evaluation.report.tables import console_table
    from fewstep.files import check_folder
    from fewstep.workflows import data_source, evaluate_images, write_results

    if not images.exists():
        raise UsageError(f"no {images}")
    whole = data in recipe_names() or data.endswith((".yaml", ".yml"))
    settings = _settings(load_config(data).evaluate if whole else EvaluateConfig(), given)
    gates.read(settings.features, alone="--images are measured without one")
    name = images.name.removesuffix(".npz")
    folder = out or Path("runs") / name
    check_folder(folder)
    results = evaluate_images(
        images,
        data_source(data),
        name=name,
        settings=settings,
        steps=counts[0],
        nfe=nfe,
        limit=given["n"],
        weights=weights,
    )
    write_results(folder / "results.json", results)
    stderr().print(console_table(results))
    say(f"results -> {folder / 'results.json'}")
    if as_json:
        emit_json(results.to_json())
    gates.check(results, name)


class _Gates:
    """The bounds of the command line; those of a leading metric are known once the features are."""

    def __init__(
        self,
        max_fd: float | None,
        max_fid: float | None,
        min_recall: float | None,
        at_most: Sequence[str],
        at_least: Sequence[str],
    ) -> None:
        from fewstep.evaluation.gates import parse_gate

        self._leading = [("--max-fd", max_fd), ("--max-fid", max_fid), ("--min-recall", min_recall)]
        for option, bound in self._leading:
            if bound is not None and not math.isfinite(bound):
                raise UsageError(f"{option} takes a finite number, got {bound}")
        self._gates: list[Gate] = [parse_gate(text, "max") for text in at_most]
        self._gates += [parse_gate(text, "min") for text in at_least]
        self.given = bool(self._gates) or any(bound is not None for _, bound in self._leading)

    def read(self, features: Sequence[str], alone: str | None) -> None:
        """Name the leading metrics; a gate on features that are not measured is a ``UsageError``. So is one relative to
        the teacher where none will be measured: ``alone`` says why."""
        if not self.given:
            return
        relative = next((gate for gate in self._gates if gate.relative), None)
        if relative is not None and alone is not None:
            raise UsageError(f"{relative.metric} is to be held against the teacher ({relative.bound}): {alone}")
        from fewstep.evaluation.features import extractor_name, metric_name
        from fewstep.evaluation.gates import Gate

        features = [extractor_name(name) for name in features]

        (_, max_fd), (_, max_fid), (_, min_recall) = self._leading
        if max_fid is not None:
            if metric_name("fd", features[0]) != "fid" and "inception" not in features:
                raise UsageError(f"--max-fid is for inception features, and these are {', '.join(features)}: --max-fd")
            self._gates.append(Gate("fid", "max", max_fid))
        if max_fd is not None:
            self._gates.append(Gate(metric_name("fd", features[0]), "max", max_fd))
        if min_recall is not None:
            self._gates.append(Gate(metric_name("recall", features[0]), "min", min_recall))

    def check(self, results: "Report", name: str) -> None:
        """``GateFailed`` for the first row of a model that does not keep a bound."""
        from fewstep.evaluation.gates import check_gates

        check_gates(self._gates, [row for row in results.rows if row.model == name], results.rows)


def _alone(run: Path, config: "RunConfig", settings: "EvaluateConfig") -> str | None:
    """Why no teacher is measured beside a run; None where one is."""
    if config.objective.kind == "flow_matching":
        return f"{run} is a teacher itself"
    if config.teacher is None:
        return f"{run} was trained without one"
    return None if settings.teacher_steps else "evaluate.teacher_steps is empty, so none is measured"


def _settings(block: "EvaluateConfig", given: dict[str, Any]) -> "EvaluateConfig":
    from fewstep.evaluation.config import EvaluateConfig

    return EvaluateConfig.model_validate(block.model_dump() | {key: value for key, value in given.items() if value})


def _refuse(options: dict[str, Any], why: str = "says how a run is sampled: --images are samples already") -> None:
    for name, value in options.items():
        if value is not None:
            raise UsageError(f"{name} {why}")


def _scales(text: str | None, window: str | None) -> list[Any]:
    """``--guidance`` with several scales, each in the same window."""
    if text is None:
        guidance_of(None, window)
        return []
    try:
        scales = list(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        raise UsageError(f"--guidance takes numbers separated by commas, got '{text}'") from None
    return [guidance_of(scale, window) for scale in scales]


def guidance_of(scale: float | None, window: str | None) -> Any:
    """``--guidance`` and ``--window`` as a ``GuidanceInput``, None where neither was given."""
    if scale is None:
        if window is not None:
            raise UsageError("--window says when --guidance acts: give that too")
        return None
    try:
        low, high = (float(part) for part in ("0,1" if window is None else window).split(","))
    except ValueError:
        raise UsageError(f"--window takes two times separated by a comma, got '{window}'") from None
    from fewstep.students.maps import GuidanceInput

    try:
        return GuidanceInput(scale, low, high)
    except ValueError as error:
        raise UsageError(f"--guidance, --window: {error}") from None


def step_counts(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        counts = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise UsageError(f"--steps takes whole numbers separated by commas, got '{text}'") from None
    if min(counts) < 1:
        raise UsageError(f"--steps takes numbers from 1, got '{text}'")
    return counts
