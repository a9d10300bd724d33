"""`fewstep teacher`: what is a teacher, is it read right, and how is it kept?"""

from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep.commands.shared import AsJson, Config, Overrides, Seed, user_errors
from fewstep.console import emit_json, say, stderr
from fewstep.errors import GateFailed, UsageError

teacher_app = typer.Typer(
    no_args_is_help=True, help="Teachers: inspect, check and convert them.", rich_markup_mode=None
)

TeacherPath = Annotated[
    Path, typer.Argument(help="A checkpoint, a diffusers folder, a converted teacher or a run.", metavar="PATH")
]
Kind = Annotated[
    str | None,
    typer.Option("--kind", help="The project it is from, where names and shapes do not tell: sit, dit, repa, ..."),
]
TrustPickle = Annotated[
    bool,
    typer.Option("--trust-pickle", help="Let the code run that a pickle names. Only for files whose maker you trust."),
]
Architecture = Annotated[
    list[str] | None,
    typer.Argument(help="What weights do not tell of their network, for example heads=6.", metavar="[key=value ...]"),
]


@teacher_app.callback()
def teacher() -> None:
    """Teachers: inspect, check and convert them."""


@teacher_app.command("inspect")
def teacher_inspect(
    path: TeacherPath,
    architecture: Architecture = None,
    kind: Kind = None,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """Say what a teacher is: project, network, sizes, averages, convention, digest and license, and how to use it.

    Nothing in a file is run. A pickle that names more than tensors is refused, and what it names is listed.

    Example: fewstep teacher inspect SiT-XL-2-256x256.pt --kind sit
    """
    with user_errors():
        from rich.table import Table

        from fewstep.teachers.inspect import inspect_teacher

        found = inspect_teacher(path, kind=kind, trust=trust_pickle, architecture=_fields(architecture))
        side = f"{found.side} x {found.side}" if found.side else "any size it can halve"
        rows = {
            "project": found.title,
            "file": f"{found.kind_of_file}, sha256 {found.digest[:16]}",
            "weights": f"{found.place}{' (an average)' if found.averaged else ''}, {found.dtype}",
            "beside them": ", ".join(found.beside) or "nothing",
            "parameters": f"{found.params:,}",
            "samples": f"{found.channels} channels, {side}",
            "classes": str(found.num_classes or "none"),
            "network": _said(found.network),
            "convention": _said(found.convention),
            "license": f"{found.license} (of what its project published)",
        }
        if found.left_out:
            rows["left out"] = f"{len(found.left_out)} weights that no sampling needs ({found.left_out[0]}, ...)"
        table = Table(show_header=False, title=str(path))
        for name, value in rows.items():
            table.add_row(name, value)
        stderr().print(table, markup=False)
        for note in found.notes:
            say(f"note: {note}")
        told = (
            f", architecture: {{{', '.join(item.replace('=', ': ') for item in architecture)}}}" if architecture else ""
        )
        say(f"use it: teacher: {{kind: {found.kind}, path: {path}{told}}}, then `fewstep teacher check CONFIG`")
        if as_json:
            emit_json(found.to_json())


@teacher_app.command("check")
def teacher_check(
    config: Config,
    overrides: Overrides = None,
    n: Annotated[int, typer.Option("--n", min=16, help="Samples of the data to look at.")] = 512,
    seed: Seed = None,
    as_json: AsJson = False,
) -> None:
    """Find out whether the teacher of a config is read right: sign, time and scale against the usual mistakes.

    Compares the regression loss on the config's data as declared with that of every usual mistake, and looks at the
    mean and deviation of samples in 20 steps. Exit code 4 if something is wrong; the sentence says what to change.

    Example: fewstep teacher check digits-meanflow
    """
    with user_errors():
        from rich.table import Table

        from fewstep.workflows import teacher_check as check

        found = check(config, overrides or (), n=n, seed=seed or 0)
        table = Table("reading", "loss", title=f"{found.teacher}, n = {found.count}")
        for name, loss in found.losses.items():
            table.add_row(f"{name}{'  <- least' if name == found.best else ''}", f"{loss:.4g}")
        stderr().print(table)
        samples, data = found.samples, found.data
        say(f"samples: mean {samples.mean:.3g}, deviation {samples.std:.3g} (data: {data.mean:.3g}, {data.std:.3g})")
        if as_json:
            emit_json(found.to_json())
        if not found.right:
            raise GateFailed(found.says())
        say(found.says())


@teacher_app.command("convert")
def teacher_convert(
    path: TeacherPath,
    architecture: Architecture = None,
    kind: Kind = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write (default: the cache, found by the file's digest).")
    ] = None,
    weights: Annotated[str, typer.Option("--weights", help="auto (the average if there is one), ema or raw.")] = "auto",
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """Keep a checkpoint's weights as safetensors and what it is as JSON: smaller, quicker to load, nothing to trust.

    In the cache it is found again by the digest of the file: a config goes on naming that. The same file is not
    converted twice.

    Example: fewstep teacher convert SiT-XL-2-256x256.pt --kind sit --out teachers/sit-xl-2
    """
    with user_errors():
        from fewstep.workflows import teacher_convert as convert

        folder, checkpoint = convert(
            path, kind, out, weights=weights, trust=trust_pickle, architecture=_fields(architecture)
        )
        where = f"{checkpoint.source.place}{' (an average)' if checkpoint.source.averaged else ''}"
        say(f"{checkpoint.format.title} of {path}, weights from {where}: {folder}")
        if as_json:
            emit_json({"folder": str(folder), "kind": checkpoint.format.name, "digest": checkpoint.source.digest})


def _fields(given: list[str] | None) -> dict[str, Any]:
    """``key=value`` as a mapping, values as YAML reads them."""
    import yaml

    found = {}
    for item in given or ():
        key, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"'{item}' is not key=value")
        found[key] = yaml.safe_load(value)
    return found


def _said(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items() if value not in (None, {}, ()))
