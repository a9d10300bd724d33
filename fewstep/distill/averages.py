"""The averages of a run after its training: those it tracked, and others rebuilt from snapshots."""

from collections.abc import Iterator, Sequence

from fewstep.checkpoint import (
    Checkpoint,
    RunDirectory,
    Tensors,
    checkpoints,
    read_checkpoint,
    read_whole,
    write_checkpoint,
)
from fewstep.config import RunConfig
from fewstep.distill.config import PowerEMA
from fewstep.distill.ema import EMA
from fewstep.distill.posthoc import reconstruct, reconstruction_weights
from fewstep.errors import UsageError, nearest


def keep_snapshot(run: RunDirectory, step: int, averages: Sequence[EMA], write: bool) -> None:
    """Keep the power-function averages of this step for good. Where they are sharded every process takes part, and the
    one with ``write`` writes."""
    groups = {ema.name: ema.state(write) for ema in averages if isinstance(ema.config, PowerEMA)}
    if write:
        write_checkpoint(run.averages, step, Checkpoint(groups, {"stage": 0, "done": step}), keep=None)


def tracked(run: RunDirectory, config: RunConfig, name: str) -> Tensors:
    """An average of ``train.ema`` by its name, as the run's last checkpoint has it."""
    names = [average.name for average in config.train.ema]
    if name not in names:
        raise UsageError(f"{run.path} has no average '{name}'; {nearest(name, names)}")
    found = checkpoints(run.checkpoints)
    if not found:
        raise UsageError(
            f"{run.checkpoints} is empty: averages that were not exported are read from the last checkpoint"
        )
    return read_checkpoint(found[-1]).groups[f"ema-{name}"]


def rebuilt(run: RunDirectory, config: RunConfig, relative_std: float, step: int | None) -> Tensors:
    """The power-function average of any width at ``step`` (None: the last), from the snapshots of the tracked ones
    (Karras et al. 2312.02696, section 3.2)."""
    folders = checkpoints(run.averages)
    if not folders:
        raise UsageError(
            f"{run.path} has no snapshots of its averages: train with two averages of kind power and "
            "train.ema_snapshot_every"
        )
    widths = {average.name: average.relative_std for average in config.train.ema if isinstance(average, PowerEMA)}
    steps = [int(folder.name.removeprefix("step-")) for folder in folders]
    profiles = [(at, width) for at in steps for width in widths.values()]
    try:
        weights = reconstruction_weights(profiles, (step or steps[-1], relative_std))
    except ValueError as error:
        raise UsageError(f"{run.path}: {error}") from error

    def snapshots() -> Iterator[Tensors]:
        for folder in folders:
            groups = read_whole(folder).groups
            for name in widths:
                yield groups[name]

    return reconstruct(snapshots(), weights.tolist())
