"""What the commands share: the types of their options, progress, and how a user's mistake is told."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep.console import Meter, meter, say
from fewstep.errors import FewstepError, is_out_of_memory
from fewstep.files import FULL, DiskError
from fewstep.launch import is_main_process

Config = Annotated[
    str, typer.Argument(help="A recipe name (see `fewstep recipes list`) or a YAML file.", metavar="CONFIG")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Config overrides, for example train.steps=500.", metavar="[key=value ...]")
]
Out = Annotated[Path | None, typer.Option("--out", help="Run directory (default: runs/<name>).")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run directory.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start again where a run directory exists.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Seed of every random draw (overrides the config).")]
Processes = Annotated[int, typer.Option("--processes", min=1, help="Processes on this machine (through torchrun).")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and stop.")]
PrintLaunch = Annotated[
    bool,
    typer.Option("--print-launch", help="Print what starts this in several processes (torchrun, Slurm), and stop."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Put one JSON document on stdout, and nothing else there.")]


class SolverChoice(StrEnum):
    euler = "euler"
    heun = "heun"
    midpoint = "midpoint"


class PrecisionChoice(StrEnum):
    fp32 = "fp32"
    tf32 = "tf32"
    bf16 = "bf16"


SolverOption = Annotated[
    SolverChoice | None, typer.Option("--solver", help="Solver of a teacher's steps; a student has its own rule.")
]
SamplingPrecision = Annotated[
    PrecisionChoice | None,
    typer.Option("--precision", help="Of the networks: fp32 (default: config), tf32 (on GPUs) or bf16 (autocast)."),
]
GuidanceOption = Annotated[
    float | None,
    typer.Option("--guidance", help="Scale, 1 is off: for students that take it as an input, teachers with classes."),
]
WindowOption = Annotated[
    str | None, typer.Option("--window", help="Times in which --guidance acts, for example 0.1,0.8 (default: all).")
]
RunPath = Annotated[Path, typer.Argument(help="A run directory.", metavar="RUN")]


def show_training(title: str, start: Callable[[Callable[[], bool]], Iterator[Any]]) -> None:
    """Run a training to its end behind a progress meter, stopping cleanly when asked to."""
    from fewstep.interrupts import stop_requested

    with stop_requested() as stopped, meter(title, show=is_main_process()) as shown:
        for progress in start(stopped):
            metrics = progress.metrics
            detail = progress.stage
            if metrics:
                detail += f"  loss {metrics['loss']:.4g}  residual {metrics['residual']:.4g}"
            shown.update(progress.step, progress.total, detail)


def show_row(shown: Meter) -> Callable[[Any, int, int], None]:
    """What tells a meter of a sweep's rows."""
    return lambda row, done, total: shown.update(done, total, f"{row.model} at {row.steps} steps")


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a user's mistake into one sentence on stderr and its exit code; a defect keeps its traceback."""
    try:
        yield
    except FewstepError as error:
        if is_main_process():
            say(f"error: {error}")
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(130) from None
    except (OSError, MemoryError, RuntimeError) as error:
        explained = _explain(error)
        if explained is None:
            raise
        if is_main_process():
            say(f"error: {explained[0]}")
        raise typer.Exit(explained[1]) from None


def _explain(error: Exception) -> tuple[str, int] | None:
    """A sentence and an exit code for what the machine refuses: a path, or memory. None for anything else."""
    if isinstance(error, OSError) and (error.filename is not None or error.errno in FULL):
        refused = DiskError(error, error.filename or "standard output")  # every file that is written gives its name
        return str(refused), refused.exit_code
    if is_out_of_memory(error):
        return f"out of memory, ask for less at once ({str(error).partition(chr(10))[0][:160]})", 1
    return None
