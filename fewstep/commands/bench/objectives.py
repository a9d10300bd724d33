"""`fewstep bench objectives`: what a training step of each objective costs."""

import math
from typing import Annotated

import typer

from fewstep.commands.bench.shared import (
    Ledger,
    Precision,
    PrecisionChoice,
    Threads,
    check_ledger,
    gates_of,
    keep,
    shape_of,
)
from fewstep.commands.shared import AsJson, user_errors
from fewstep.console import meter, say, stderr
from fewstep.errors import GateFailed, UsageError


def bench_objectives(
    kinds: Annotated[
        list[str] | None,
        typer.Argument(help="Kinds of objectives, or single lines of the table (default: all).", metavar="[KIND ...]"),
    ] = None,
    size: Annotated[str, typer.Option("--size", help="The network, by its name.")] = "flot-mini",
    shape: Annotated[str, typer.Option("--shape", help="Shape of an image: C,H,W.")] = "1,8,8",
    classes: Annotated[int, typer.Option("--classes", min=0, help="Classes (0: unconditional).")] = 10,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Samples of a batch.")] = 128,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Rounds in which every objective takes its turn.")
    ] = 15,
    threads: Threads = 0,
    precision: Precision = PrecisionChoice.fp32,
    ledger: Ledger = None,
    max_ratio: Annotated[
        list[str] | None,
        typer.Option(
            "--max-ratio", help="Exit 4 if a step costs more times that of flow matching.", metavar="NAME=RATIO"
        ),
    ] = None,
    max_memory: Annotated[
        list[str] | None,
        typer.Option("--max-memory", help="The same for the peak memory of a step.", metavar="NAME=RATIO"),
    ] = None,
    max_textbook: Annotated[
        float | None,
        typer.Option(
            "--max-textbook", help="Exit 4 if a MeanFlow step costs more times that of the paper's algorithm 1."
        ),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Every objective a second time, as train.compile trains it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What a training step of each objective costs, with that of flow matching as one.

    Same network, same batches, same optimiser; the objectives take turns, so that other work on the machine meets all.
    Printed are medians and quartiles over the rounds, by processor time (which the gates compare, and on a GPU the
    clock) and by the clock, and the most memory a step holds beyond what stays between steps; with meanflow-textbook
    also the ratios to that, which has the same loss and gradient as meanflow.

    Example: fewstep bench objectives meanflow --max-ratio meanflow=1.3 --max-textbook 0.7
    """
    with user_errors():
        from fewstep.bench.objectives import bench_objectives, objectives_table, objectives_title
        from fewstep.bench.variants import TEXTBOOK, chosen_variants
        from fewstep.workflows import default_device

        measured = [variant.name for variant in chosen_variants(kinds or [])]
        ratios = gates_of("--max-ratio", max_ratio or [], measured)
        memories = gates_of("--max-memory", max_memory or [], measured)
        if max_textbook is not None and (not math.isfinite(max_textbook) or not {"meanflow", TEXTBOOK} <= {*measured}):
            raise UsageError("--max-textbook takes a finite number, and meanflow and meanflow-textbook to compare")
        check_ledger(ledger)
        with meter("bench objectives") as shown:
            bench = bench_objectives(
                kinds or [],
                size,
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
        say(objectives_title(bench))
        stderr().print(objectives_table(bench))
        keep(bench.to_json(), ledger, as_json)
        textbook = bench.textbook("meanflow")
        if max_textbook is not None and textbook is not None and not textbook.median <= max_textbook:
            raise GateFailed(
                f"a step of meanflow costs {textbook.median:.3f} of the textbook's, above {max_textbook:g}"
            )
        for cost in bench.objectives:
            found = bench.ratio(cost)
            if not found <= ratios.get(cost.name, math.inf):
                raise GateFailed(
                    f"a step of {cost.name} costs {found:.3f} of flow matching's, above {ratios[cost.name]:g}"
                )
            if not cost.memory_ratio <= memories.get(cost.name, math.inf):
                raise GateFailed(
                    f"a step of {cost.name} holds {cost.memory_ratio:.3f} of flow matching's memory, "
                    f"above {memories[cost.name]:g}"
                )
