"""`fewstep data`: what data are, and making them ready."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep.commands.shared import AsJson, PrecisionChoice, SolverChoice, user_errors
from fewstep.console import emit_json, meter, say, stderr
from fewstep.errors import UsageError

data_app = typer.Typer(no_args_is_help=True, help="Data sets: inspect, prepare, measure.", rich_markup_mode=None)


class Channels(StrEnum):
    grey = "1"
    colour = "3"


Source = Annotated[
    str,
    typer.Argument(
        help="A folder, .zip, .parquet, .tar, shards or latents; or a recipe or YAML file with a data block.",
        metavar="SOURCE",
    ),
]
Size = Annotated[
    int | None, typer.Option("--size", min=1, max=65_536, help="Resize the shorter side and crop to a square.")
]
ChannelsOption = Annotated[Channels | None, typer.Option("--channels", help="Convert to grey (1) or colour (3).")]
SkipBroken = Annotated[bool, typer.Option("--skip-broken", help="Leave broken images out and count them.")]
NoLabels = Annotated[bool, typer.Option("--no-labels", help="Ignore classes.")]
MaxImages = Annotated[int | None, typer.Option("--max-images", min=1, help="The first images alone.")]


OPTIONS = {
    "data.size": "--size N",
    "data.channels": "--channels 3",
    "data.skip_broken": "--skip-broken",
    "data.labels=false": "--no-labels",
}
"""What keys of a config, which errors advise to set, are called on this command line."""


@contextmanager
def _in_options() -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        options = [option for key, option in OPTIONS.items() if key in str(error)]
        raise UsageError(f"{error} (here: {', '.join(options)})" if options else str(error)) from error


@data_app.command("inspect")
def data_inspect(
    source: Source,
    size: Size = None,
    channels: ChannelsOption = None,
    skip_broken: SkipBroken = False,
    no_labels: NoLabels = False,
    max_images: MaxImages = None,
    as_json: AsJson = False,
) -> None:
    """Read all of a data set and say what it is. The first broken, odd or unlabelled file is an error.

    Example: fewstep data inspect images.zip
    """
    with user_errors(), _in_options():
        from fewstep.data.inspect import inspect
        from fewstep.workflows import data_source

        config = data_source(source, **_options(size, channels, skip_broken, no_labels, max_images))
        with meter("inspect") as shown:
            found = inspect(config, lambda done, total: shown.update(done, total, "samples"))
        _show(found)
        if as_json:
            emit_json(found.to_json())


@data_app.command("prepare")
def data_prepare(
    source: Source,
    out: Annotated[Path, typer.Option("--out", help="Folder of the shards.")],
    size: Size = None,
    channels: ChannelsOption = None,
    skip_broken: SkipBroken = False,
    no_labels: NoLabels = False,
    max_images: MaxImages = None,
    shard_size: Annotated[
        int | None, typer.Option("--shard-size", min=1, help="Samples per shard (default: 256 MiB of them).")
    ] = None,
    encoder: Annotated[
        Path | None, typer.Option("--encoder", help="Write latents: the folder of an AutoencoderKL of diffusers.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the shards that lie at --out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a data set as shards, which are read from disk without decoding (data.kind=shards).

    Example: fewstep data prepare images/ --size 64 --out images-64
    """
    with user_errors(), _in_options():
        from fewstep.workflows import data_source, prepare_data

        config = data_source(source, **_options(size, channels, skip_broken, no_labels, max_images))
        with meter("prepare") as shown:
            meta = prepare_data(
                config,
                out,
                encoder=encoder,
                shard_size=shard_size,
                overwrite=overwrite,
                report=lambda done, total: shown.update(done, total, "samples"),
            )
        if meta["skipped"]:
            say(f"left out {meta['skipped']} broken images")
        shape = "x".join(map(str, meta["shape"]))
        shards = len(meta["shards"])
        say(f"{meta['count']} {meta['kind']} of {shape} in {shards} shard{'s' if shards > 1 else ''} -> {out}")
        if as_json:
            emit_json({"data": str(out), **meta})


@data_app.command("pairs")
def data_pairs(
    teacher: Annotated[
        Path, typer.Argument(help="The run of a teacher, or of a straightened flow.", metavar="TEACHER")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the pairs.")],
    n: Annotated[int, typer.Option("--n", "--count", min=1, help="Number of pairs.")],
    solver: Annotated[SolverChoice, typer.Option("--solver", help="Solver of the teacher's flow.")] = SolverChoice.heun,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Its steps.")] = 64,
    guidance: Annotated[
        float, typer.Option("--guidance", min=0, help="Scale, 1 is off: for teachers with classes.")
    ] = 1.0,
    window: Annotated[
        str, typer.Option("--window", help="Times in which --guidance acts, for example 0.1,0.8.")
    ] = "0,1",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Pair i comes from (seed, i) alone.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Pairs that are solved at a time.")] = 1024,
    shard_size: Annotated[int, typer.Option("--shard-size", min=1, help="Pairs per file.")] = 16_384,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make the pairs that lie at --out again.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what a killed call has left at --out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Solve a teacher's flow from noise and keep both ends: what objective reflow trains on.

    Several processes (torchrun, accelerate launch) make files of their own, of the same bytes as one would. There write
    --count for --n, which torchrun takes for its own.

    Example: fewstep data pairs runs/digits-teacher --out pairs --n 50000
    """
    with user_errors():
        times = _window(window)
        from fewstep.launch import is_main_process
        from fewstep.workflows import solve_pairs

        with meter("pairs", show=is_main_process()) as shown:
            meta = solve_pairs(
                teacher,
                out,
                count=n,
                solver=solver.value,
                steps=steps,
                guidance=guidance,
                window=times,
                seed=seed,
                batch_size=batch_size,
                shard_size=shard_size,
                overwrite=overwrite,
                resume=resume,
                report=lambda done, total: shown.update(done, total, "pairs"),
            )
        if not is_main_process():
            return
        say(f"{meta['count']} pairs of {meta['teacher']} by {meta['steps']} {meta['solver']} steps -> {out}")
        if as_json:
            emit_json({"pairs": str(out), **meta})


def _window(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--window takes two times separated by a comma, got '{text}'") from None
    if not 0 <= low <= high <= 1:
        raise UsageError(f"--window takes two times in [0, 1], the lower first, got '{text}'")
    return low, high


@data_app.command("stats")
def data_stats(
    source: Source,
    features: Annotated[
        str | None,
        typer.Option("--features", help="Also the mean and covariance of these features, for example pixels."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Their file: .refstats.safetensors, or .npz (mu, sigma, n).")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", help="Inception weights file, if not in a usual place.")
    ] = None,
    size: Size = None,
    channels: ChannelsOption = None,
    skip_broken: SkipBroken = False,
    no_labels: NoLabels = False,
    max_images: MaxImages = None,
    as_json: AsJson = False,
) -> None:
    """Mean and deviation per channel, images per class, the digest of the content; with --features their statistics.

    Example: fewstep data stats images.zip --features pixels --out images-pixels.npz
    """
    with user_errors(), _in_options():
        from fewstep.workflows import data_source, data_statistics

        config = data_source(source, **_options(size, channels, skip_broken, no_labels, max_images))
        with meter("stats") as shown:
            found = data_statistics(
                config,
                out,
                features=features,
                weights=weights,
                report=lambda done, total: shown.update(done, total, "samples"),
            )
        _show(found)
        if out is not None:
            say(f"statistics of {features} features -> {out}")
        if as_json:
            emit_json({**found.to_json(), **({} if out is None else {"features": features, "statistics": str(out)})})


@data_app.command("classifier")
def data_classifier(
    source: Source,
    out: Annotated[Path, typer.Option("--out", help="Folder of the classifier.")],
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of training.")] = 600,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images per step.")] = 64,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which images are held out, and the training.")] = 0,
    test: Annotated[
        str | None, typer.Option("--test", help="A test set, as SOURCE, that gives the accuracy: nothing is held out.")
    ] = None,
    widths: Annotated[
        str | None, typer.Option("--widths", help="Channels of each stage, multiples of 8. [default: 32,64,64]")
    ] = None,
    feature_dim: Annotated[int, typer.Option("--features", min=1, help="Numbers per image.")] = 64,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror half of the images of every batch.")] = False,
    precision: Annotated[
        PrecisionChoice, typer.Option("--precision", help="Of the products in training.")
    ] = PrecisionChoice.fp32,
    size: Size = None,
    channels: ChannelsOption = None,
    skip_broken: SkipBroken = False,
    max_images: MaxImages = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the classifier that lies at --out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a small classifier on labelled images: features and class accuracy for data that Inception does not know.

    What it got right of the images that were held out is printed, and stored beside the weights.

    Example: fewstep data classifier images/ --out classifier; then --features classifier:classifier
    """
    with user_errors(), _in_options():
        stages = None if widths is None else _widths(widths)
        from fewstep.data.load import load_data
        from fewstep.evaluation.classifier import WIDTHS
        from fewstep.evaluation.classifier_training import train_classifier
        from fewstep.workflows import data_source, default_device

        config = data_source(source, **_options(size, channels, skip_broken, False, max_images))
        test_config = None if test is None else data_source(test, **_options(size, channels, skip_broken, False, None))
        with meter("classifier") as shown:
            card = train_classifier(
                load_data(config),
                out,
                test=None if test_config is None else load_data(test_config),
                widths=WIDTHS if stages is None else stages,
                feature_dim=feature_dim,
                flip=flip,
                precision=precision.value,
                steps=steps,
                batch_size=batch_size,
                seed=seed,
                device=default_device(),
                overwrite=overwrite,
                report=lambda done, total: shown.update(done, total, "steps"),
            )
        kind = f"images of {card['tested_on']}" if test is not None else "held-out images"
        say(f"{card['accuracy']:.2%} of {card['held_out']} {kind} right after {card['seconds']} s -> {out}")
        say(f"features: --features classifier:{out}")
        if as_json:
            emit_json({"classifier": str(out), **card})


def _widths(text: str) -> tuple[int, ...]:
    if not all(width.strip().isdecimal() for width in text.split(",")):
        raise UsageError(f"--widths takes numbers such as 32,64,128, got '{text}'")
    return tuple(map(int, text.split(",")))


def _options(
    size: int | None, channels: Channels | None, skip_broken: bool, no_labels: bool, max_images: int | None
) -> dict[str, Any]:
    """Fields of a data config; None where an option was not given."""
    return {
        "size": size,
        "channels": None if channels is None else int(channels.value),
        "skip_broken": skip_broken or None,
        "labels": False if no_labels else None,
        "max_images": max_images,
    }


def _show(found: Any) -> None:
    from rich.table import Table

    counts = found.class_counts
    names = f": {', '.join(found.class_names[:10])}{', ...' if len(found.class_names) > 10 else ''}"
    lines = {
        "kind": found.kind,
        "samples": f"{found.count} {found.stored} of {'x'.join(map(str, found.shape))}",
        "classes": f"{found.num_classes}{names if found.class_names else ''}" if found.num_classes else "none",
        "per class": f"{min(counts)} to {max(counts)}" if counts else "",
        "stored values": f"{found.low:g} to {found.high:g}",
        "channel means": ", ".join(f"{value:.4f}" for value in found.mean),
        "channel deviations": ", ".join(f"{value:.4f}" for value in found.std),
        "broken": f"{len(found.skipped)} left out, first {found.skipped[0]}" if found.skipped else "",
        "digest": found.digest,
    }
    table = Table(title=found.name, show_header=False)
    for name, text in lines.items():
        if text:
            table.add_row(name, text)
    stderr().print(table)
