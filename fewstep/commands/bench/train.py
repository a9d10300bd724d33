"""`fewstep bench train`: the training loop beside one written by hand."""

import math
import os
from typing import Annotated

import typer

from fewstep.commands.bench.shared import Ledger, check_ledger, keep
from fewstep.commands.shared import AsJson, Overrides, user_errors
from fewstep.console import meter, say, stderr
from fewstep.errors import GateFailed, UsageError

DEFAULT_BENCH = "digits-teacher"


def bench_train(
    config: Annotated[
        str, typer.Argument(help="A recipe name or a YAML file; its teacher has to exist.", metavar="CONFIG")
    ] = DEFAULT_BENCH,
    overrides: Overrides = None,
    step_ms: Annotated[
        float, typer.Option("--step-ms", min=0.1, help="Milliseconds of a bare step: the batch is made to fit.")
    ] = 20.0,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Pairs of segments, one of each loop.")] = 40,
    segment: Annotated[int, typer.Option("--segment", min=1, help="Steps of a segment.")] = 10,
    threads: Annotated[int, typer.Option("--threads", min=0, help="torch threads of both (0: train.threads).")] = 0,
    ledger: Ledger = None,
    max_overhead: Annotated[
        float | None, typer.Option("--max-overhead", help="Exit 4 if the median overhead exceeds this percentage.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What the training loop costs beside a bare PyTorch loop: same network, same objective, same batches.

    Short segments of both take turns, so that other work on the machine meets both. Printed are medians and quartiles
    over the pairs, by the clock and by processor time, and where the difference goes.

    Example: fewstep bench train digits-teacher --step-ms 20 --repeats 40
    """
    with user_errors():
        if max_overhead is not None and not math.isfinite(max_overhead):
            raise UsageError(f"--max-overhead takes a finite number, got {max_overhead}")
        from fewstep.bench.train import bench_table, bench_title, bench_training
        from fewstep.config import load_config

        check_ledger(ledger)
        if "=" in config and not os.path.exists(config):  # CONFIG left out
            config, overrides = DEFAULT_BENCH, [config, *(overrides or [])]
        settings = load_config(config, overrides or [])
        with meter(f"bench {settings.name}") as shown:
            bench = bench_training(
                settings,
                step_ms=step_ms,
                pairs=repeats,
                segment=segment,
                threads=threads,
                report=lambda done, total: shown.update(done, total, "pairs"),
            )
        say(bench_title(bench))
        stderr().print(bench_table(bench))
        keep(bench.to_json(), ledger, as_json)
        if max_overhead is not None and not bench.overhead.median <= max_overhead:
            raise GateFailed(f"the training loop costs {bench.overhead.median:.2f} %, above {max_overhead:g} %")
