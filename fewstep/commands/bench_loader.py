"""`fewstep bench loader`: how fast batches come."""

from pathlib import Path
from typing import Annotated

import typer

from fewstep.commands.shared import AsJson, user_errors
from fewstep.console import emit_json, meter, say, stderr


def bench_loader(
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images of a batch.")] = 128,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Batches of each kind.")] = 40,
    work_ms: Annotated[
        float, typer.Option("--work-ms", min=0, help="Milliseconds between batches, as of a training step.")
    ] = 20.0,
    ledger: Annotated[Path | None, typer.Option("--ledger", help="Append the row to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """How many images per second the loader gives, and how long a training step waits for its batch.

    From memory and from shards on disk, gathered as asked for or ahead by a thread, in 32x32 and 64x64.

    Example: fewstep bench loader --batch-size 256
    """
    with user_errors():
        from fewstep.bench import append_row
        from fewstep.bench_loader import bench_loader, loader_table, loader_title
        from fewstep.files import check_folder
        from fewstep.workflows import default_device

        if ledger is not None:
            check_folder(ledger.absolute().parent)
        with meter("bench loader") as shown:
            bench = bench_loader(
                batch_size=batch_size,
                repeats=repeats,
                work_ms=work_ms,
                device=default_device(),
                report=lambda done, total: shown.update(done, total, "kinds"),
            )
        say(loader_title(bench))
        stderr().print(loader_table(bench))
        if ledger is not None:
            append_row(ledger, bench.to_json())
        if as_json:
            emit_json(bench.to_json())
