"""`fewstep teacher`: is a teacher read right?"""

from typing import Annotated

import typer

from fewstep.commands.shared import AsJson, Config, Overrides, Seed, user_errors
from fewstep.console import emit_json, say, stderr
from fewstep.errors import GateFailed

teacher_app = typer.Typer(no_args_is_help=True, help="Teachers: check how one is read.", rich_markup_mode=None)


@teacher_app.callback()
def teacher() -> None:
    """Teachers: check how one is read."""


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
