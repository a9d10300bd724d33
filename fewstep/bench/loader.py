"""How fast batches come from where data may lie, beside what a training step would consume."""

import functools
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from fewstep.bench.measure import Spread, device_name, ledger_row, spread, timed, torch_threads, where
from fewstep.bench.train import bare_training
from fewstep.checkpoint import RunDirectory
from fewstep.config import RunConfig
from fewstep.data.config import ShardsConfig
from fewstep.data.dataset import BatchSource, Dataset, Residence
from fewstep.data.encoded import Reported, unreported
from fewstep.data.prepare import write_shards
from fewstep.data.shards import load_shards
from fewstep.data.stream import stream_of
from fewstep.distill.run import check_training
from fewstep.networks.build import parameter_count

WARM_UP_STEPS = 5
COUNT = 8192
SHARDS = 4


@dataclass(frozen=True)
class LoaderRate:
    """Batches of images of one size from one place: how many come per second if nothing else is done, and how long one
    is waited for if a step of ``LoaderBench.work_ms`` lies between them."""

    size: int
    place: str
    images_per_s: Spread
    wait_ms: Spread


@dataclass(frozen=True)
class LoaderBench:
    """Rates of colour images, half of them mirrored, from memory and from shards, with and without the thread."""

    device: str
    threads: int
    batch_size: int
    repeats: int
    work_ms: float
    rates: tuple[LoaderRate, ...]

    def to_json(self) -> dict[str, Any]:
        """With where and when it was measured: a row of the ledger."""
        return ledger_row("loader", self)


def bench_loader(
    sizes: tuple[int, ...] = (32, 64),
    *,
    batch_size: int = 128,
    repeats: int = 40,
    work_ms: float = 20.0,
    device: torch.device,
    report: Reported = unreported,
) -> LoaderBench:
    """Measure ``repeats`` batches of each kind, and as many with a pause of ``work_ms`` between them.

    The pause stands for a training step that leaves the processor alone, as one on a GPU does. Images are
    random, and their shards are in the page cache: what is measured is the work of the loader and not a disk.
    """
    rates = []
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            memory = _images(size)
            path = Path(folder) / str(size)
            write_shards(stream_of(memory, "bench"), path, "bench", shard_size=COUNT // SHARDS)
            mapped = load_shards(ShardsConfig(path=str(path), flip=True), path, "bench")
            places: tuple[tuple[str, Dataset, Residence], ...] = (
                ("memory, on the device", memory, "device"),
                ("memory, by the thread", memory, "host"),
                ("shards, as asked for", mapped, "device"),
                ("shards, by the thread", mapped, "host"),
            )
            for place, data, resident in places:
                source = BatchSource(data, batch_size, 0, device=device, resident=resident)
                taken = _times(source, repeats, 0.0, device)
                waited = _times(source, repeats, work_ms / 1e3, device)
                source.close()
                rates.append(
                    LoaderRate(
                        size=size,
                        place=place,
                        images_per_s=spread([1e3 * batch_size / ms for ms in taken]),
                        wait_ms=spread(waited),
                    )
                )
                report(len(rates), len(sizes) * len(places))
    name = device_name(device)
    return LoaderBench(name, torch.get_num_threads(), batch_size, repeats, work_ms, tuple(rates))


@dataclass(frozen=True)
class RecipeLoader:
    """Samples per second of a recipe's own data, with the data on the device and fetched by the thread, beside what its
    training step consumes (batch, forward, backward and optimiser). ``ratio``: the slower of the two over the latter,
    by medians."""

    recipe: str
    device: str
    threads: int
    params: int
    batch_size: int
    resident: Spread
    fetched: Spread
    training: Spread
    ratio: float

    def to_json(self) -> dict[str, Any]:
        """With where and when it was measured: a row of the ledger."""
        return ledger_row("recipe-loader", self)


def bench_recipe_loader(
    config: RunConfig, *, repeats: int, steps: int, device: torch.device, report: Reported = unreported
) -> RecipeLoader:
    """Measure ``repeats`` batches of each kind and ``steps`` training steps, in turns of one step each."""
    with tempfile.TemporaryDirectory() as folder:  # nothing is written there
        run = RunDirectory(Path(folder) / config.name)
        request = check_training(config, run, device, processes=1, resume=False, overwrite=False)
    size = config.train.batch_size
    with torch_threads(config.train.threads):
        objective = request.stages[0].build(request.student, None).to(device)
        residences: tuple[Residence, ...] = ("device", "host")
        sources = [BatchSource(request.data, size, config.seed, device=device, resident=each) for each in residences]
        training = bare_training(objective, sources[0].batch, config.train, seed=config.seed)
        next(training)
        taken: list[list[float]] = [[], []]
        stepped = []
        for number in range(steps):
            for source, times in zip(sources, taken, strict=True):
                times += _times(source, max(1, repeats // steps), 0.0, device)
            stepped.append(timed(lambda: next(training), device).wall)
            report(number + 1, steps)
        for source in sources:
            source.close()
        resident, fetched, consumed = (spread([1e3 * size / ms for ms in each]) for each in (*taken, stepped))
        return RecipeLoader(
            recipe=config.name,
            device=device_name(device),
            threads=torch.get_num_threads(),
            params=parameter_count(request.student),
            batch_size=size,
            resident=resident,
            fetched=fetched,
            training=consumed,
            ratio=min(resident.median, fetched.median) / consumed.median,
        )


def recipe_loader_table(bench: RecipeLoader) -> Table:
    """For people: medians with quartiles."""
    table = Table()
    for head in ("", "samples/s", "quartiles", "times the training step"):
        table.add_column(head, justify="left" if head == "" else "right")
    rows = {"data on the device": bench.resident, "data fetched by the thread": bench.fetched}
    for name, rate in {**rows, "training step": bench.training}.items():
        ratio = f"{rate.median / bench.training.median:,.1f}"
        table.add_row(name, f"{rate.median:,.0f}", f"{rate.low:,.0f} to {rate.high:,.0f}", ratio)
    return table


def loader_title(bench: LoaderBench) -> str:
    """For people: what was measured."""
    return f"batches of {bench.batch_size}, {where(bench.device, bench.threads)}; {bench.repeats} of each kind"


def loader_table(bench: LoaderBench) -> Table:
    """For people: medians with quartiles."""
    table = Table()
    for head in ("images", "from", "images/s", "quartiles", f"ms waited after {bench.work_ms:g} ms of work"):
        table.add_column(head, justify="left" if head in ("images", "from") else "right")
    for rate in bench.rates:
        speed = rate.images_per_s
        quartiles = f"{speed.low:,.0f} to {speed.high:,.0f}"
        table.add_row(
            f"3x{rate.size}x{rate.size}", rate.place, f"{speed.median:,.0f}", quartiles, f"{rate.wait_ms.median:.3f}"
        )
    return table


def _images(size: int) -> Dataset:
    rows = torch.arange(COUNT)
    x = torch.randint(256, (COUNT, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Dataset(f"{size}x{size}", x, rows % 10, 10, kind="image", flip=True)


def _times(source: BatchSource, repeats: int, pause_s: float, device: torch.device) -> list[float]:
    """Milliseconds until each of ``repeats`` batches was there, asked for ``pause_s`` after the one before."""
    taken = []
    for step in range(WARM_UP_STEPS + repeats):
        time.sleep(pause_s)
        taken.append(timed(functools.partial(source.batch, step), device).wall)
    return taken[WARM_UP_STEPS:]
