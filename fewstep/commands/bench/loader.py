"""`fewstep bench loader`: how fast batches come."""

from pathlib import Path
from typing import Annotated

import typer

from fewstep.commands.bench.shared import Ledger, check_ledger, keep
from fewstep.commands.shared import AsJson, Overrides, user_errors
from fewstep.console import meter, say, stderr
from fewstep.errors import GateFailed, UsageError


def bench_loader(
    config: Annotated[
        str | None, typer.Argument(help="A recipe or YAML file: its data beside its training step.", metavar="[CONFIG]")
    ] = None,
    overrides: Overrides = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images of a batch.")] = 128,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Batches of each kind.")] = 40,
    work_ms: Annotated[
        float, typer.Option("--work-ms", min=0, help="Milliseconds between batches, as of a training step.")
    ] = 20.0,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Training steps, with CONFIG.")] = 5,
    min_ratio: Annotated[
        float | None,
        typer.Option("--min-ratio", help="With CONFIG: exit 4 if batches come less than this many times as fast."),
    ] = None,
    ledger: Ledger = None,
    as_json: AsJson = False,
) -> None:
    """How many images per second the loader gives, and how long a training step waits for its batch.

    Without CONFIG: random images from memory and from shards on disk, gathered as asked for or ahead by a thread, in
    32x32 and 64x64. With CONFIG: that recipe's data, beside what its training step consumes.

    Example: fewstep bench loader cifar10-teacher --min-ratio 2
    """
    with user_errors():
        from fewstep.bench.loader import bench_loader, loader_table, loader_title
        from fewstep.workflows import default_device

        check_ledger(ledger)
        if config is not None:
            _of_recipe(config, overrides or [], repeats, steps, min_ratio, ledger, as_json)
            return
        if min_ratio is not None:
            raise UsageError("--min-ratio compares with a training step: name a CONFIG")
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
        keep(bench.to_json(), ledger, as_json)


def _of_recipe(
    source: str,
    overrides: list[str],
    repeats: int,
    steps: int,
    min_ratio: float | None,
    ledger: Path | None,
    as_json: bool,
) -> None:
    from fewstep.bench.loader import bench_recipe_loader, recipe_loader_table
    from fewstep.config import load_config
    from fewstep.workflows import default_device

    config = load_config(source, overrides)
    with meter(f"bench {config.name}") as shown:
        bench = bench_recipe_loader(
            config,
            repeats=repeats,
            steps=steps,
            device=default_device(),
            report=lambda done, total: shown.update(done, total, "steps"),
        )
    say(f"{bench.recipe}: {bench.params:,} parameters, batches of {bench.batch_size}, {bench.device}")
    stderr().print(recipe_loader_table(bench))
    keep(bench.to_json(), ledger, as_json)
    if min_ratio is not None and not bench.ratio >= min_ratio:
        raise GateFailed(f"batches come {bench.ratio:.2f} times as fast as they are consumed, below {min_ratio:g}")
