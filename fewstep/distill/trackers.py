"""Metrics to TensorBoard or Weights & Biases, for those who ask for it. Neither is needed, nor imported unasked."""

import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from fewstep.config import RunConfig, config_yaml
from fewstep.errors import EnvironmentFault
from fewstep.files import make_folder, write_atomic


@dataclass(frozen=True)
class Trackers:
    """What a run reports to; nothing in most. For the main process alone: the others have an empty one."""

    opened: tuple[GeneralTracker, ...] = ()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Report plain numbers of a finished step."""
        for tracker in self.opened:
            tracker.log(dict(values), step=step)

    def close(self) -> None:
        for tracker in self.opened:
            tracker.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Before anything starts: an ``EnvironmentFault`` for a package that ``train.report_to`` needs and is not there."""
    for name in names:
        found = find_spec(name)
        # A folder of that name (W&B makes one where it runs) is found as well, as a package of nothing.
        if found is None or found.origin is None:
            raise EnvironmentFault(f"train.report_to: {name} is not installed: pip install {name}")


def open_trackers(config: RunConfig, folder: Path, step: int) -> Trackers:
    """Open what ``train.report_to`` names, with its files below ``folder``, to go on after finished step ``step``.

    A run that is resumed goes on in the same place. Weights & Biases stays offline unless the user has logged in to it
    or set ``WANDB_MODE``.
    """
    return Trackers(tuple(OPENS[name](config, folder, step) for name in config.train.report_to))


def _tensorboard(config: RunConfig, folder: Path, step: int) -> GeneralTracker:
    # A killed run has reported steps beyond its last checkpoint: they are purged, and will be reported again.
    tracker = TensorBoardTracker("tensorboard", logging_dir=folder, purge_step=step + 1 if step else None)
    tracker.start()
    if step == 0:
        # Not store_init_configuration, which makes a further folder, and calls it a run, each time.
        text = "".join(f"    {line}\n" for line in config_yaml(config).splitlines())
        tracker.log({"config": text}, step=0)
    return tracker


def _wandb(config: RunConfig, folder: Path, step: int) -> GeneralTracker:
    make_folder(folder)
    tracker = WandBTracker(
        "fewstep",
        name=config.name,
        id=_wandb_id(folder),
        resume="allow",
        dir=str(folder),
        mode=None if _wandb_configured() else "offline",
        # Not what the terminal shows: the meter is no log.
        settings={"console": "off"},
    )
    tracker.start()
    tracker.store_init_configuration(dict(_scalars(json.loads(config.model_dump_json()))))
    return tracker


OPENS = {"tensorboard": _tensorboard, "wandb": _wandb}


def _wandb_configured() -> bool:
    """Whether the user has said where W&B's data go, or logged in: else it would ask for an account."""
    if "WANDB_MODE" in os.environ or "WANDB_API_KEY" in os.environ:
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return host in netrc(os.environ.get("NETRC", Path("~/.netrc").expanduser())).hosts
    except (OSError, NetrcParseError):
        return False


def _wandb_id(folder: Path) -> str:
    """What the run is called there: drawn once and kept with the run, so that one started again is a new one."""
    file = folder / "wandb-id"
    if not file.is_file():
        write_atomic(file, secrets.token_hex(8))
    return file.read_text()


def _scalars(tree: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and plain values: trackers take no trees. Lists become text."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{place}{name}.")
        else:
            yield place + name, json.dumps(value) if isinstance(value, list) else value
