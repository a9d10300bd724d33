"""`fewstep bench network`: what networks cost."""

from typing import Annotated

import typer

from fewstep.commands.bench.shared import (
    Compiled,
    Ledger,
    Precision,
    PrecisionChoice,
    Threads,
    check_ledger,
    keep,
    shape_of,
)
from fewstep.commands.shared import AsJson, user_errors
from fewstep.console import meter, say, stderr


def bench_network(
    sizes: Annotated[
        list[str] | None,
        typer.Argument(help="Named networks (default: all that take the shape but the largest).", metavar="[SIZE ...]"),
    ] = None,
    shape: Annotated[str, typer.Option("--shape", help="Shape of a sample: C,H,W of images, D of points.")] = "3,32,32",
    classes: Annotated[int, typer.Option("--classes", min=0, help="Classes (0: unconditional).")] = 10,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Samples of a batch.")] = 4,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Rounds in which every network takes its turn.")
    ] = 10,
    threads: Threads = 0,
    precision: Precision = PrecisionChoice.fp32,
    compiled: Compiled = False,
    ledger: Ledger = None,
    as_json: AsJson = False,
) -> None:
    """What networks cost: parameters, operations per sample, and the time of a batch on this machine.

    Timed are a forward pass, a training step (forward, backward and AdamW) and the derivative along the path that
    MeanFlow needs; printed are medians and quartiles over the rounds. A multiply-add counts as two operations.
    The last column is the arithmetic of the step over its time, as a share of what large matrix products reach here.
    Sizes that share a last word, such as flot-mini and unet-mini, are pairs of about equal parameters.

    Example: fewstep bench network flot-tiny unet-tiny --shape 1,8,8 --batch-size 128
    """
    with user_errors():
        from fewstep.bench.network import bench_networks, network_table, network_title
        from fewstep.workflows import default_device

        check_ledger(ledger)
        with meter("bench network") as shown:
            bench = bench_networks(
                sizes or [],
                shape_of(shape),
                classes=classes,
                batch_size=batch_size,
                repeats=repeats,
                device=default_device(),
                threads=threads,
                precision=precision.value,
                compiled=compiled,
                report=lambda done, total: shown.update(done, total, "rounds"),
            )
        say(network_title(bench))
        stderr().print(network_table(bench))
        keep(bench.to_json(), ledger, as_json)
