"""Several methods side by side: `fewstep compare`, and `fewstep demo`, which is a comparison of its own."""

import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewstep.commands.shared import AsJson, Overwrite, Resume, show_row, show_training, user_errors
from fewstep.console import emit_json, meter, say, stderr
from fewstep.errors import FewstepError, UsageError

if TYPE_CHECKING:
    from fewstep.comparison.config import Budget, Comparison
    from fewstep.evaluation.results import Report

Run = Any
"""A ``comparison.run.Run``, which needs torch."""

Source = Annotated[
    str, typer.Argument(help="A comparison recipe (see `fewstep recipes list`) or a YAML file.", metavar="COMPARISON")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Overrides, for example seeds=[0] students=[a,b] set.train.steps=100.", metavar="[key=value ...]"
    ),
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the comparison (default: runs/<name>).")]
GoOn = Annotated[bool, typer.Option("--resume", help="Go on: finished runs are left alone, the others continue.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the comparison and its runs, stop.")]


def compare(
    source: Source,
    overrides: Overrides = None,
    out: Out = None,
    resume: GoOn = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Train a teacher and several students at equal budget, over several seeds: one table and one figure.

    Every seed has a teacher of its own, from which all its students learn. The report shows means over the seeds with
    their standard deviation.

    Example: fewstep compare digits-all seeds=[0] set.train.steps=500 --out runs/short
    """
    with user_errors():
        from fewstep.comparison.config import comparison_yaml, load_comparison

        comparison = load_comparison(source, overrides or [])
        path = out or Path("runs") / comparison.name
        if not dry_run:
            _check_folder(path, resume=resume, overwrite=overwrite)

        from fewstep.comparison.run import check_place, check_runs, seed_folder, seed_runs
        from fewstep.files import write_atomic

        groups = {seed: seed_runs(comparison, seed_folder(path, seed), seed) for seed in comparison.seeds}
        budgets = check_runs(comparison, groups[comparison.seeds[0]])
        if dry_run:
            _print_plan(comparison, groups, budgets, path, as_json)
            return
        for run in (run for runs in groups.values() for run in runs):
            check_place(run, resume=resume, overwrite=overwrite)
        _warn_of_unequal(budgets[1:])
        write_atomic(path / "comparison.yaml", comparison_yaml(comparison))
        again = ["fewstep", "compare", source, *(overrides or []), *(["--out", str(out)] if out else []), "--resume"]
        folders = {seed: seed_folder(path, seed) for seed in groups}
        results = _carry_out(comparison, groups, folders, resume=resume, overwrite=overwrite, again=again)
        _show_results(results, path, as_json)


def demo(
    out: Annotated[Path, typer.Option("--out", help="Where the demo's runs and its report go.")] = Path("runs/demo"),
    resume: Resume = False,
    overwrite: Overwrite = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of every random draw.")] = 0,
    n: Annotated[int, typer.Option("--n", min=100, help="Samples per row of the evaluation.")] = 10_000,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Config override for all four runs.")] = None,
    as_json: AsJson = False,
) -> None:
    """The whole story on shipped data: a teacher, three students, the report. Minutes on a CPU.

    Trains digits-teacher, digits-progressive, digits-meanflow and digits-consistency, then measures them against
    step counts.
    """
    with user_errors():
        _check_folder(out, resume=resume, overwrite=overwrite)

        from fewstep.comparison.config import load_comparison
        from fewstep.comparison.run import check_place, check_runs, seed_runs

        measuring = [override for override in overrides or [] if override.startswith("evaluate.")]
        comparison = load_comparison("demo", [*measuring, f"seeds=[{seed}]", f"evaluate.n={n}"])
        runs = seed_runs(comparison, out, seed, overrides or [])
        check_runs(comparison, runs)
        for run in runs:  # all of them, before the first is deleted
            check_place(run, resume=resume, overwrite=overwrite)
        again = ["fewstep", "demo", "--out", str(out), "--seed", str(seed), "--n", str(n)]
        again += [word for override in overrides or [] for word in ("--set", override)]
        results = _carry_out(
            comparison, {seed: runs}, {seed: out}, resume=resume, overwrite=overwrite, again=[*again, "--resume"]
        )
        _show_results(results, out, as_json)


def _check_folder(path: Path, *, resume: bool, overwrite: bool) -> None:
    from fewstep.files import check_folder

    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    check_folder(path)
    if path.is_dir() and any(path.iterdir()) and not (resume or overwrite):
        raise UsageError(f"{path} exists: --resume goes on with it, --overwrite starts it again")


def _carry_out(
    comparison: "Comparison",
    groups: Mapping[int, Sequence[Run]],
    folders: Mapping[int, Path],
    *,
    resume: bool,
    overwrite: bool,
    again: Sequence[str],
) -> "Report":
    """Train and measure the runs of each seed, and merge. ``again`` is the command that goes on."""
    from fewstep.comparison.run import measured_already
    from fewstep.evaluation.results import over_seeds
    from fewstep.workflows import write_results

    command = shlex.join(again)
    found = {}
    for seed, runs in groups.items():
        for run in runs:
            _train(run, resume=resume, overwrite=overwrite, command=command)
        known = measured_already(comparison, runs, folders[seed]) if resume else None
        rows = folders[seed] / "evaluation"
        found[seed] = known or _measure(comparison, runs, seed, rows, command)
        write_results(folders[seed] / "results.json", found[seed])
        shutil.rmtree(rows, ignore_errors=True)  # they are in the results now
    return over_seeds(found)


def _train(run: Run, *, resume: bool, overwrite: bool, command: str) -> None:
    """One training behind its meter. What goes wrong names the run and the command that goes on."""
    from fewstep.comparison.run import train_run
    from fewstep.distill.run import Interrupted

    try:
        show_training(
            run.config.name, lambda stopped: train_run(run, resume=resume, overwrite=overwrite, stopped=stopped)
        )
    except Interrupted as error:
        raise Interrupted(f"{error}: {command}", error.step) from error
    except FewstepError as error:
        named = FewstepError(f"{run.directory.path}: {error}. What is done is kept; go on with: {command}")
        named.exit_code = error.exit_code
        raise named from error
    except Exception:
        say(f"{run.directory.path} failed. What is done is kept; go on with: {command}")
        raise


def _measure(comparison: "Comparison", runs: Sequence[Run], seed: int, keep: Path, command: str) -> "Report":
    """The runs of a seed behind a meter; asked to stop, it does so after a row. Rows are kept meanwhile."""
    from fewstep.comparison.run import measure_seed
    from fewstep.distill.run import Interrupted
    from fewstep.interrupts import stop_requested

    title = "evaluate" if len(comparison.seeds) == 1 else f"evaluate seed {seed}"
    with stop_requested() as stopped, meter(title) as shown:
        show = show_row(shown)

        def seen(row: Any, done: int, total: int) -> None:
            show(row, done, total)
            if stopped():
                raise Interrupted(f"stopped after {done} of {total} rows; go on with --resume: {command}", done)

        return measure_seed(comparison, runs, seed, keep, seen)


def _show_results(results: "Report", out: Path, as_json: bool) -> None:
    from fewstep.evaluation.report import write_report
    from fewstep.evaluation.report.tables import console_table
    from fewstep.workflows import write_results

    write_results(out / "results.json", results)
    page = write_report(results, out / "report")
    stderr().print(console_table(results))
    say(f"report -> {page}")
    if as_json:
        emit_json(results.to_json())


def _print_plan(
    comparison: "Comparison",
    groups: Mapping[int, Sequence[Run]],
    budgets: "Sequence[Budget]",
    out: Path,
    as_json: bool,
) -> None:
    """The resolved comparison, and its runs as comments: what is printed is a comparison again."""
    from fewstep.comparison.config import comparison_yaml

    planned = [
        (seed, run.directory.path, budget)
        for seed, runs in groups.items()
        for run, budget in zip(runs, budgets, strict=True)
    ]
    if as_json:
        runs = [
            {"path": str(path), "name": budget.name, "seed": seed, "steps": budget.steps, "samples": budget.samples}
            for seed, path, budget in planned
        ]
        emit_json({"comparison": comparison.model_dump(mode="json"), "runs": runs})
        return
    typer.echo(comparison_yaml(comparison), nl=False)
    typer.echo(f"# {len(planned)} runs in {out}:")
    width = max(len(str(path.relative_to(out))) for _, path, _ in planned)
    for _, path, budget in planned:
        place = str(path.relative_to(out))
        typer.echo(f"#   {place:<{width}}  {budget.steps:,} steps, {budget.samples:,} samples")


def _warn_of_unequal(budgets: "Sequence[Budget]") -> None:
    """Say so where students do not see as many samples (to 1 %: stages divide a budget only nearly)."""
    counts = [budget.samples for budget in budgets]
    if max(counts) > 1.01 * min(counts):
        listed = ", ".join(f"{budget.name} {budget.samples:,}" for budget in budgets)
        say(f"warning: the students' budgets differ, in samples seen: {listed}")
