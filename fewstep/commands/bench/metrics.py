"""`fewstep bench metrics`: what metrics and a step sweep cost beside other packages."""

from pathlib import Path
from typing import Annotated

import typer

from fewstep.commands.bench.shared import Ledger, check_ledger, gates_of, keep
from fewstep.commands.shared import AsJson, user_errors
from fewstep.console import meter, say, stderr
from fewstep.errors import GateFailed


def bench_metrics(
    metrics: Annotated[
        list[str] | None,
        typer.Argument(
            help="frechet, neighbours, kernel, inception, sweep (default: all but sweep).", metavar="[METRIC ...]"
        ),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=100, help="Features of either side; samples of a row.")] = 10_000,
    dim: Annotated[int, typer.Option("--dim", min=16, help="Dimensions of the features.")] = 2048,
    images: Annotated[int, typer.Option("--images", min=1, help="Images that go through Inception.")] = 32,
    runs: Annotated[
        Path, typer.Option("--runs", help="For sweep: a folder of finished runs, as `fewstep demo` leaves it.")
    ] = Path("runs/demo"),
    steps: Annotated[
        str, typer.Option("--steps", help="For sweep: step counts of every model, or own: those of its config.")
    ] = "1,4",
    pairs: Annotated[int, typer.Option("--pairs", min=1, help="Rounds in which each side has its turn.")] = 5,
    threads: Annotated[int, typer.Option("--threads", min=0, help="torch threads (0: as many as torch takes).")] = 1,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Peak memory of a call, each in a process of its own.")
    ] = True,
    ledger: Ledger = None,
    min_ratio: Annotated[
        list[str] | None,
        typer.Option("--min-ratio", help="Exit 4 if any package is less times slower than this.", metavar="NAME=R"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What metrics cost beside clean-fid, torchmetrics, torch-fidelity and prdc; one that is missing is left out.

    The sides take turns on the same features; what both compute has to agree before times are compared. Printed are
    processor seconds (which the gates compare, and on a GPU the clock) and the peak memory of a call. With sweep: every
    model of --runs at every step count, sampled and measured, beside a plain loop scored by torchmetrics and prdc; and
    beside that all that `fewstep evaluate` measures (sweep-all), its rows found again (sweep-again).

    Example: fewstep bench metrics sweep --runs runs/demo --min-ratio sweep=2
    """
    with user_errors():
        from fewstep.bench.metrics import (
            SWEEP,
            bench_metrics,
            check_metrics,
            joined,
            metrics_table,
            metrics_title,
        )
        from fewstep.commands.evaluate import step_counts
        from fewstep.workflows import default_device

        names = check_metrics(metrics or [])
        measured = [*names, *([f"{SWEEP}-all", f"{SWEEP}-again"] if SWEEP in names else [])]
        gates = gates_of("--min-ratio", min_ratio or [], measured)
        check_ledger(ledger)
        benches = []
        with meter("bench metrics") as shown:
            if SWEEP in names:
                from fewstep.bench.sweep import bench_sweep, swept_runs

                swept = swept_runs(runs, None if steps == "own" else step_counts(steps), n, default_device())
                say(f"sweep: {swept.what}")
                benches.append(
                    bench_sweep(
                        swept,
                        pairs=pairs,
                        threads=threads,
                        report=lambda done, total: shown.update(done, total, "sweeps"),
                    )
                )
            others = [name for name in names if name != SWEEP]
            if others:
                benches.insert(
                    0,
                    bench_metrics(
                        others,
                        n=n,
                        dim=dim,
                        images=images,
                        pairs=pairs,
                        device=default_device(),
                        threads=threads,
                        memory=memory,
                        report=lambda done, total: shown.update(done, total, "pairs"),
                    ),
                )
        bench = joined(benches)
        say(metrics_title(bench))
        stderr().print(metrics_table(bench))
        for name, reason in bench.left_out.items():
            say(f"left out, {name}: {reason}")
        keep(bench.to_json(), ledger, as_json)
        for each in bench.compared:
            if each.metric in gates and not bench.ratio(each) >= gates[each.metric]:
                raise GateFailed(
                    f"{each.peer} takes {bench.ratio(each):.2f} times as long for {each.metric}, "
                    f"below {gates[each.metric]:g}"
                )
