"""`fewstep bench`: measure fewstep itself."""

import math
import os
from pathlib import Path
from typing import Annotated

import typer

from fewstep.commands.bench_loader import bench_loader
from fewstep.commands.shared import AsJson, Overrides, user_errors
from fewstep.console import emit_json, meter, say, stderr
from fewstep.errors import GateFailed, UsageError, nearest

bench_app = typer.Typer(no_args_is_help=True, help="Measure fewstep itself.", rich_markup_mode=None)

DEFAULT_BENCH = "digits-teacher"

Ledger = Annotated[Path | None, typer.Option("--ledger", help="Append the row to this file.")]


@bench_app.command("train")
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
        from fewstep.bench import append_row, bench_table, bench_title, bench_training
        from fewstep.config import load_config
        from fewstep.files import check_folder

        if ledger is not None:
            check_folder(ledger.absolute().parent)
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
        if ledger is not None:
            append_row(ledger, bench.to_json())
        if as_json:
            emit_json(bench.to_json())
        if max_overhead is not None and not bench.overhead.median <= max_overhead:
            raise GateFailed(f"the training loop costs {bench.overhead.median:.2f} %, above {max_overhead:g} %")


@bench_app.command("network")
def bench_network(
    sizes: Annotated[
        list[str] | None,
        typer.Argument(help="Named networks (default: all that take the shape).", metavar="[SIZE ...]"),
    ] = None,
    shape: Annotated[str, typer.Option("--shape", help="Shape of a sample: C,H,W of images, D of points.")] = "3,32,32",
    classes: Annotated[int, typer.Option("--classes", min=0, help="Classes (0: unconditional).")] = 10,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Samples of a batch.")] = 4,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Rounds in which every network takes its turn.")
    ] = 10,
    threads: Annotated[int, typer.Option("--threads", min=0, help="torch threads (0: as many as torch takes).")] = 0,
    ledger: Ledger = None,
    as_json: AsJson = False,
) -> None:
    """What networks cost: parameters, operations per sample, and the time of a batch on this machine.

    Timed are a forward pass, a training step (forward, backward and AdamW) and the derivative along the path that
    MeanFlow needs; printed are medians and quartiles over the rounds. A multiply-add counts as two operations.
    Sizes that share a last word, such as flot-mini and unet-mini, are pairs of about equal parameters.

    Example: fewstep bench network flot-tiny unet-tiny --shape 1,8,8 --batch-size 128
    """
    with user_errors():
        from fewstep.bench import append_row
        from fewstep.bench_network import bench_networks, network_table, network_title
        from fewstep.files import check_folder
        from fewstep.workflows import default_device

        if ledger is not None:
            check_folder(ledger.absolute().parent)
        with meter("bench network") as shown:
            bench = bench_networks(
                sizes or [],
                _shape(shape),
                classes=classes,
                batch_size=batch_size,
                repeats=repeats,
                device=default_device(),
                threads=threads,
                report=lambda done, total: shown.update(done, total, "rounds"),
            )
        say(network_title(bench))
        stderr().print(network_table(bench))
        if ledger is not None:
            append_row(ledger, bench.to_json())
        if as_json:
            emit_json(bench.to_json())


@bench_app.command("objectives")
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
    threads: Annotated[int, typer.Option("--threads", min=0, help="torch threads (0: as many as torch takes).")] = 0,
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
    as_json: AsJson = False,
) -> None:
    """What a training step of each objective costs, with that of flow matching as one.

    Same network, same batches, same optimiser; the objectives take turns, so that other work on the machine meets all.
    Printed are medians and quartiles over the rounds, by processor time (which the gates compare, and on a GPU the
    clock) and by the clock, and the most memory a step holds beyond what stays between steps.

    Example: fewstep bench objectives meanflow --max-ratio meanflow=1.3
    """
    with user_errors():
        from fewstep.bench import append_row
        from fewstep.bench_objectives import bench_objectives, chosen_variants, objectives_table, objectives_title
        from fewstep.files import check_folder
        from fewstep.workflows import default_device

        measured = [variant.name for variant in chosen_variants(kinds or [])]
        ratios = _gates("--max-ratio", max_ratio or [], measured)
        memories = _gates("--max-memory", max_memory or [], measured)
        if ledger is not None:
            check_folder(ledger.absolute().parent)
        with meter("bench objectives") as shown:
            bench = bench_objectives(
                kinds or [],
                size,
                _shape(shape),
                classes=classes,
                batch_size=batch_size,
                repeats=repeats,
                device=default_device(),
                threads=threads,
                report=lambda done, total: shown.update(done, total, "rounds"),
            )
        say(objectives_title(bench))
        stderr().print(objectives_table(bench))
        if ledger is not None:
            append_row(ledger, bench.to_json())
        if as_json:
            emit_json(bench.to_json())
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


def _gates(option: str, texts: list[str], measured: list[str]) -> dict[str, float]:
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


def _shape(text: str) -> tuple[int, ...]:
    sides = text.split(",")
    if not all(side.strip().isdecimal() and int(side) for side in sides):
        raise UsageError(f"--shape takes sizes such as 3,32,32, got '{text}'")
    return tuple(map(int, sides))


bench_app.command("loader")(bench_loader)
