"""`fewstep bench sample`: what samplers cost beside bare calls of the network."""

import math
from enum import StrEnum
from typing import Annotated

import typer

from fewstep.commands.bench.shared import Ledger, Threads, check_ledger, keep, shape_of
from fewstep.commands.shared import AsJson, user_errors
from fewstep.console import meter, say, stderr
from fewstep.errors import GateFailed, UsageError


class Precision(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


def bench_sample(
    network: Annotated[str, typer.Option("--network", help="The network, by its name.")] = "flot-tiny",
    shape: Annotated[str, typer.Option("--shape", help="Shape of a sample: C,H,W of images, D of points.")] = "1,8,8",
    classes: Annotated[int, typer.Option("--classes", min=0, help="Classes (0: unconditional).")] = 10,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of every sampler.")] = 4,
    call_ms: Annotated[
        float, typer.Option("--call-ms", min=0.01, help="Milliseconds of a bare call: the batch is made to fit.")
    ] = 5.0,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Pairs of every way and bare calls.")] = 30,
    threads: Threads = 0,
    compile: Annotated[bool, typer.Option("--compile", help="Jumps with a compiled network, too.")] = False,
    precision: Annotated[
        Precision, typer.Option("--precision", help="bf16: jumps with a network in bfloat16, too.")
    ] = Precision.fp32,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Jumps with a network of convolutions in that layout, too.")
    ] = False,
    ledger: Ledger = None,
    max_overhead: Annotated[
        float | None,
        typer.Option("--max-overhead", help="Exit 4 if a sampler of few steps costs more than this percentage."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What samplers cost beside bare calls of the network: ours, loops by hand, and those of diffusers and torchdiffeq.

    Each first has to draw the samples it should. Then all take turns, each beside as many bare calls on as large a
    batch: at the batch size where a call takes --call-ms, and at batch 1. Printed are medians and quartiles of the
    pairs, and what a way takes per call around a network that returns at once. The gate compares jumps and Euler
    at the larger batch, by processor time (on a GPU: by the clock).

    Example: fewstep bench sample --network flot-tiny --call-ms 5 --max-overhead 2
    """
    with user_errors():
        if max_overhead is not None and not math.isfinite(max_overhead):
            raise UsageError(f"--max-overhead takes a finite number, got {max_overhead}")
        from fewstep.bench.sample import bench_sampling, sample_tables, sample_title
        from fewstep.workflows import default_device

        check_ledger(ledger)
        with meter("bench sample") as shown:
            bench = bench_sampling(
                network,
                shape_of(shape),
                classes=classes,
                steps=steps,
                call_ms=call_ms,
                repeats=repeats,
                device=default_device(),
                threads=threads,
                compile=compile,
                precision=precision.value,
                channels_last=channels_last,
                report=lambda done, total: shown.update(done, total, "rounds"),
            )
        say(sample_title(bench))
        for table in sample_tables(bench):
            stderr().print(table)
        keep(bench.to_json(), ledger, as_json)
        for way in bench.batches[0].ways:
            found = bench.compared(way).median
            if max_overhead is not None and way.gated and not found <= max_overhead:
                raise GateFailed(f"{way.name} costs {found:.2f} %, above {max_overhead:g} %")
