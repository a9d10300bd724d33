"""What the benchmarks' commands share."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep.commands.shared import PrecisionChoice
from fewstep.console import emit_json
from fewstep.errors import UsageError, nearest

Ledger = Annotated[Path | None, typer.Option("--ledger", help="Append the row to this file.")]
Threads = Annotated[int, typer.Option("--threads", min=0, help="torch threads (0: as many as torch takes).")]


Precision = Annotated[PrecisionChoice, typer.Option("--precision", help="Of networks, as train.precision is.")]
Compiled = Annotated[bool, typer.Option("--compile", help="Compile the networks, as train.compile does.")]


def check_ledger(ledger: Path | None) -> None:
    """Refuse a ledger that could not be written, before anything is measured."""
    from fewstep.files import check_folder

    if ledger is not None:
        check_folder(ledger.absolute().parent)


def keep(row: dict[str, Any], ledger: Path | None, as_json: bool) -> None:
    """Append the row to the ledger and print it as JSON, where they are asked for."""
    from fewstep.bench.measure import append_row

    if ledger is not None:
        append_row(ledger, row)
    if as_json:
        emit_json(row)


def shape_of(text: str) -> tuple[int, ...]:
    """A shape from sizes with commas between them."""
    sides = text.split(",")
    if not all(side.strip().isdecimal() and int(side) for side in sides):
        raise UsageError(f"--shape takes sizes such as 3,32,32, got '{text}'")
    return tuple(map(int, sides))


def gates_of(option: str, texts: list[str], measured: list[str]) -> dict[str, float]:
    """``NAME=RATIO`` of every text, each of something that is measured."""
    found = {}
    for text in texts:
        name, _, ratio = text.partition("=")
        if name not in measured:
            raise UsageError(f"{option}: '{name}' is not measured; {nearest(name, measured)}")
        try:
            found[name] = float(ratio)
        except ValueError:
            found[name] = math.nan
        if not math.isfinite(found[name]):
            raise UsageError(f"{option} takes NAME=RATIO with a finite number, got '{text}'")
    return found
