"""The command line: parse, one call, render. No mathematics, and no heavy import at module level."""

import json
import os
import shlex
import signal
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep import __version__
from fewstep.commands.bench import bench_app
from fewstep.commands.compare import compare, demo
from fewstep.commands.data import data_app
from fewstep.commands.evaluate import evaluate, guidance_of
from fewstep.commands.shared import (
    AsJson,
    Config,
    DryRun,
    GuidanceOption,
    Out,
    Overrides,
    Overwrite,
    PrecisionChoice,
    PrintLaunch,
    Processes,
    Resume,
    RunPath,
    Seed,
    SolverOption,
    WindowOption,
    show_training,
    user_errors,
)
from fewstep.commands.teacher import teacher_app
from fewstep.console import emit_json, say, stderr
from fewstep.errors import FewstepError, UsageError
from fewstep.launch import (
    is_main_process,
    launch_lines,
    launch_text,
    launched,
    launched_alone,
    leave_group,
    run_launched,
)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    add_completion=True,
    rich_markup_mode=None,
    help="Distil a flow-matching teacher into a student that samples in 1-4 network evaluations, "
    "and measure what that cost.",
    epilog="Exit codes: 0 done, 1 failed, 2 usage or config, 3 environment, 4 quality gate, 130 interrupted.",
)
recipes_app = typer.Typer(no_args_is_help=True, help="The recipes that ship with fewstep.", rich_markup_mode=None)
app.add_typer(recipes_app, name="recipes")
app.add_typer(bench_app, name="bench")
app.add_typer(data_app, name="data")
app.add_typer(teacher_app, name="teacher")


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


# Training ------------------------------------------------------------------------------------------------------------


@app.command()
def teach(
    config: Config,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    seed: Seed = None,
    processes: Processes = 1,
    dry_run: DryRun = False,
    print_launch: PrintLaunch = False,
    as_json: AsJson = False,
) -> None:
    """Train a teacher by flow matching.

    Example: fewstep teach digits-teacher train.steps=500 --out runs/short
    """
    with user_errors():
        _train(
            "teach", config, overrides or [], out, resume, overwrite, seed, processes, dry_run, print_launch, as_json
        )


@app.command()
def distill(
    config: Config,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    seed: Seed = None,
    processes: Processes = 1,
    dry_run: DryRun = False,
    print_launch: PrintLaunch = False,
    as_json: AsJson = False,
) -> None:
    """Train a few-step student from a teacher (or from scratch where the method allows).

    Example: fewstep distill digits-meanflow --seed 1 --out runs/meanflow-1
    """
    with user_errors():
        _train(
            "distill", config, overrides or [], out, resume, overwrite, seed, processes, dry_run, print_launch, as_json
        )


def _train(
    command: str,
    source: str,
    overrides: list[str],
    out: Path | None,
    resume: bool,
    overwrite: bool,
    seed: int | None,
    processes: int,
    dry_run: bool,
    print_launch: bool,
    as_json: bool,
) -> None:
    from fewstep.config import command_of, config_yaml, load_config

    if seed is not None:
        overrides = [*overrides, f"seed={seed}"]
    config = load_config(source, overrides)
    other = command_of(config)
    if other != command:
        raise UsageError(
            f"{config.name} trains a {'teacher' if other == 'teach' else 'student'}: use `fewstep {other}`"
        )
    if dry_run and print_launch:
        raise UsageError("--dry-run and --print-launch exclude each other")
    if dry_run:
        if as_json:
            emit_json(json.loads(config.model_dump_json()))
        else:
            typer.echo(config_yaml(config), nl=False)
        return
    path = out or Path("runs") / config.name
    same = [command, source, *overrides, *(["--out", str(out)] if out else [])]
    if print_launch:
        _print_launch(config.name, path, same, processes, resume, overwrite, as_json)
        return
    if launched_alone():
        say("warning: accelerate launch was asked for several processes and started this one alone: see --print-launch")
    if processes > 1 and not launched():
        _launch(config, path, same, processes, resume, overwrite, as_json)
        return

    from fewstep.checkpoint import RunDirectory
    from fewstep.distill.run import Interrupted, run_training
    from fewstep.files import read_json

    try:
        show_training(
            config.name,
            lambda stopped: run_training(
                config, RunDirectory(path), resume=resume, overwrite=overwrite, stopped=stopped
            ),
        )
    except Interrupted as error:
        world = os.environ.get("WORLD_SIZE", "1") if launched() else "1"
        again = ["fewstep", *same, *(["--processes", world] if world != "1" else []), "--resume"]
        raise Interrupted(f"{error}: {shlex.join(again)}", error.step) from error
    if is_main_process():
        card = read_json(path / "model" / "config.json")
        say(f"{config.name}: {card['train']['steps']} steps in {card['train']['seconds']:.1f} s -> {path}")
        if as_json:
            emit_json({"run": str(path), "model": card})


def _print_launch(
    name: str, path: Path, same: list[str], processes: int, resume: bool, overwrite: bool, as_json: bool
) -> None:
    flags = {"--resume": resume, "--overwrite": overwrite}
    lines = launch_lines(name, path, processes, same, [flag for flag, given in flags.items() if given])
    if as_json:
        emit_json({"processes": processes, **vars(lines)})
    else:
        typer.echo(launch_text(lines), nl=False)


def _launch(
    config: Any, path: Path, same: list[str], processes: int, resume: bool, overwrite: bool, as_json: bool
) -> None:
    """Run the same command in several processes, and end with the exit code that ``status.json`` gives."""
    import torch

    from fewstep.checkpoint import RunDirectory
    from fewstep.distill.run import check_training
    from fewstep.files import read_json

    # Here, where a mistake is one sentence from one process.
    run = RunDirectory(path)
    check_training(config, run, torch.device("cpu"), processes=processes, resume=resume, overwrite=overwrite)
    flags = {"--resume": resume, "--overwrite": overwrite, "--json": as_json}
    began = time.time_ns()
    code = run_launched(processes, [*same, *(flag for flag, given in flags.items() if given)])
    status = path / "status.json"
    if code and status.is_file() and status.stat().st_mtime_ns >= began:
        said = read_json(status)
        killed = code > 130 and said["state"] == "failed"  # by the others, who lost it
        if killed or said["state"] == "running":
            message = f"a process ended without saying why (exit code {code})"
            then = f"; then {said['message']}" if said["message"] else ""
            run.write_status("failed", step=said["step"], message=message + then, exit_code=1)
            raise FewstepError(message)
        code = said["exit_code"] or code  # the launcher's is that of whichever process failed first
    if code:
        raise typer.Exit(code)


# Sampling, evaluation, report ----------------------------------------------------------------------------------------


@app.command()
def sample(
    run: RunPath,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Sampling steps.")] = 4,
    n: Annotated[int, typer.Option("--n", min=1, help="Number of samples.")] = 64,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Sample i comes from (seed, i) alone.")] = 0,
    solver: SolverOption = None,
    guidance: GuidanceOption = None,
    window: WindowOption = None,
    precision: Annotated[
        PrecisionChoice, typer.Option("--precision", help="Of the network: fp32, tf32 (on GPUs) or bf16 (autocast).")
    ] = PrecisionChoice.fp32,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Changes the speed, not the samples.")] = 256,
    out: Annotated[Path | None, typer.Option("--out", help="Folder (default: RUN/samples).")] = None,
    graph: Annotated[
        bool, typer.Option("--graph", help="Replay batches as a CUDA graph: the same samples, faster in small batches.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Draw samples from a run: a picture and a safetensors file.

    Example: fewstep sample runs/digits-meanflow --steps 2 --n 100
    """
    with user_errors():
        chosen = guidance_of(guidance, window)
        from fewstep.checkpoint import write_tensors
        from fewstep.evaluation.quantise import to_uint8
        from fewstep.evaluation.strips import samples_grid
        from fewstep.files import check_folder, write_atomic
        from fewstep.workflows import sample_run

        folder = out or run / "samples"
        if out is not None:
            check_folder(folder)
        sampled = sample_run(
            run,
            steps=steps,
            n=n,
            seed=seed,
            batch_size=batch_size,
            solver=_name(solver),
            guidance=chosen,
            precision=precision.value,
            graph=graph,
        )
        low = [precision.value] if precision != PrecisionChoice.fp32 else []
        stem = "-".join([*([solver] if solver else []), *_said(chosen), *low, f"steps-{steps:02d}-seed-{seed}"])
        x = to_uint8(sampled.x) if sampled.data.kind == "image" else sampled.x
        tensors = {"x": x} | ({} if sampled.label is None else {"label": sampled.label})
        write_tensors(folder / f"{stem}.safetensors", tensors, {"model": sampled.model.digest, "seed": str(seed)})
        picture = samples_grid(x, sampled.data.kind)
        if picture is not None:
            write_atomic(folder / f"{stem}.png", picture)
        say(f"{n} samples at {steps} steps, NFE {sampled.nfe} -> {folder / stem}.*")
        if as_json:
            emit_json({"samples": str(folder / f"{stem}.safetensors"), "n": n, "steps": steps, "nfe": sampled.nfe})


@app.command()
def average(
    run: RunPath,
    out: Annotated[Path, typer.Option("--out", help="Where the model goes, as a run of its own.")],
    ema: Annotated[str | None, typer.Option("--ema", help="An average of train.ema, for example 0.9999.")] = None,
    relative_std: Annotated[
        float | None, typer.Option("--relative-std", help="Width of a power-function average to be rebuilt.")
    ] = None,
    at_step: Annotated[int | None, typer.Option("--at-step", min=1, help="Its step (default: the last).")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a finished run's model under another average of its weights.

    Averages that were not tracked are rebuilt from the snapshots of train.ema_snapshot_every.

    Example: fewstep average runs/digits-meanflow --relative-std 0.07 --out runs/digits-meanflow-007
    """
    with user_errors():
        from fewstep.workflows import average_run

        name = average_run(run, out, ema=ema, relative_std=relative_std, step=at_step)
        say(f"{name} -> {out}")
        if as_json:
            emit_json({"run": str(out), "name": name})


app.command()(evaluate)


def _name(solver: Any) -> Any:
    return None if solver is None else solver.value


def _said(guidance: Any) -> list[str]:
    """Guidance in the name of a file."""
    if guidance is None:
        return []
    whole = (guidance.low, guidance.high) == (0, 1)
    window = [] if whole else [f"window-{guidance.low:g}-{guidance.high:g}"]
    return [f"guidance-{guidance.scale:g}", *window]


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories with a results.json.", metavar="RUN [RUN ...]")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the report (default: RUN/report for one run).")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="Show what changed since this results.json, run or ledger (.jsonl)."),
    ] = None,
    goal: Annotated[
        list[str] | None,
        typer.Option(
            "--goal",
            help="Show whether some student reaches METRIC=X, or METRIC=X@STEPS: X or better. X is a number, or "
            "relative to the teacher at its most steps: 1.05*teacher, teacher-0.02.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the report (HTML, Markdown, LaTeX, CSV, figures, sample grids, model card) from results.json alone.

    Example: fewstep report runs/digits-meanflow runs/digits-progressive --out comparison
    """
    with user_errors():
        from fewstep.evaluation.goals import parse_goal, reached
        from fewstep.evaluation.report import changes, standing, write_report
        from fewstep.evaluation.results import merge, read_results

        goals = [parse_goal(text) for text in goal or []]
        if out is None and len(runs) > 1:
            raise UsageError("several runs make one report: say where with --out DIR")
        results = merge(read_results(run / "results.json") for run in runs)
        changed = None if against is None else changes.changes(results, changes.read_older(against), against.name)
        found = [reached(each, results) for each in goals]
        page = write_report(results, out or runs[0] / "report", changed, found)
        if found:
            stderr().print(standing.console_goals(found, results))
        if changed is not None:
            say(changed.summary())
        say(f"report -> {page}")
        if as_json:
            said: dict[str, object] = {} if changed is None else {"changes": changes.as_json(changed)}
            said |= {"goals": standing.as_json(found)} if found else {}
            emit_json({"report": str(page), "rows": len(results.rows), **said})


app.command()(compare)
app.command()(demo)


# Recipes and environment ---------------------------------------------------------------------------------------------


@recipes_app.command("list")
def recipes_list(as_json: AsJson = False) -> None:
    """List the recipes, each with its command and what it is for."""
    from fewstep.config import command_of, comparison_names, load_config, recipe_names, recipe_text

    commands = {name: command_of(load_config(name)) for name in recipe_names()}
    commands |= {name: "compare" for name in comparison_names()}
    names = sorted(commands)
    summaries = {name: recipe_text(name).splitlines()[0].lstrip("# ") for name in names}
    if as_json:
        emit_json({"recipes": summaries, "commands": {name: commands[name] for name in names}})
        return
    width = max(map(len, names))
    for name in names:
        typer.echo(f"{name:<{width}}  {commands[name]:<7}  {summaries[name]}")


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(help="A recipe name.", metavar="NAME")]) -> None:
    """Print a recipe: its command, its cost, what it reached, and its config."""
    with user_errors():
        from fewstep.config import recipe_text

        typer.echo(recipe_text(name), nl=False)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check this machine: versions, accelerators, forward-mode AD, processes, offline weights.

    Exits with 3 if something needed is missing.
    """
    with user_errors():
        from fewstep.doctor import examine

        checks = examine()
        if as_json:
            emit_json({"checks": [vars(check) for check in checks]})
        for check in checks:
            say(f"{check.status:<8}{check.name:<24}{check.detail}")
        if any(check.status == "missing" for check in checks):
            raise typer.Exit(3)


def main() -> None:
    """Entry point of ``fewstep`` and of ``python -m fewstep.cli``."""
    # Before torch loads OpenMP. Threads that spin while they wait make a busy machine several times slower; sleeping
    # ones cost nothing in an evaluation and hurt small networks only, which train best on one thread (train.threads).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `fewstep recipes show X | head` ends quietly
    try:
        app()
    except SystemExit as end:
        if not end.code:  # all have come to the end; one that fails must not wait for others
            leave_group()
        raise


if __name__ == "__main__":
    main()
