"""Images as their source stores them, and the one way they become arrays, whatever the source.

Shapes: N images, C channels, H rows, W columns.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from fewstep.console import say
from fewstep.data.config import ImagesConfig
from fewstep.data.dataset import Dataset
from fewstep.data.images import BrokenImage, Pixels, decode
from fewstep.data.labels import checked_labels
from fewstep.errors import FewstepError, UsageError, is_out_of_memory
from fewstep.launch import is_main_process

_PIECE = 64  # images that a thread decodes at a time


@dataclass(frozen=True)
class Encoded:
    """Images that are not decoded yet, in their final order.

    ``where`` is the source as errors name it, ``names`` are its images, ``label`` their classes (None where one has
    none, or all). ``read(i)`` gives the bytes of image ``i``, or raises ``BrokenImage``; threads call it. ``missing``
    are images that the source should have and has not.
    """

    where: str
    names: Sequence[str]
    label: Sequence[int | None] | None
    read: Callable[[int], bytes]
    class_names: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


Reported = Callable[[int, int], None]
"""What hears how many samples of how many are done."""


def unreported(done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Piece:
    """Some decoded images ``x [n, C, H, W]`` uint8, their places ``rows [n]`` in the source, and the broken ones."""

    x: Tensor
    rows: Tensor
    skipped: tuple[str, ...]


def pieces(encoded: Encoded, config: ImagesConfig, report: Reported = unreported) -> Iterator[Piece]:
    """Decode everything, in order, on all cores; memory holds a few pieces at a time.

    An image that is broken (unless ``config.skip_broken``), or of another size or number of channels than the first, is
    a ``UsageError`` that names it.
    """
    count = min(len(encoded.names), config.max_images or len(encoded.names))
    if encoded.missing and not config.skip_broken:
        raise UsageError(f"{encoded.missing[0]} is missing (data.skip_broken=true goes on without it)")
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    first: Pixels | None = None
    first_name = ""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        starts = iter(range(0, count, _PIECE))
        waiting: deque[tuple[int, Future[list[Pixels | BrokenImage]]]] = deque()
        for start in islice(starts, 2 * workers):
            waiting.append((start, pool.submit(_decode_some, encoded, config, start, min(start + _PIECE, count))))
        while waiting:
            start, future = waiting.popleft()
            decoded = future.result()
            for following in islice(starts, 1):
                stop = min(following + _PIECE, count)
                waiting.append((following, pool.submit(_decode_some, encoded, config, following, stop)))
            rows, skipped = [], []
            for row, image in enumerate(decoded, start):
                name = encoded.names[row]
                if isinstance(image, BrokenImage):
                    if not config.skip_broken:
                        raise UsageError(f"{name} {image}: mend it, or set data.skip_broken=true to leave it out")
                    skipped.append(name)
                    continue
                if first is None:
                    first, first_name = image, name
                _check_alike(image, name, first, first_name)
                rows.append(row)
            images = [image for image in decoded if not isinstance(image, BrokenImage)]
            if images:
                yield Piece(torch.from_numpy(np.stack(images)), torch.tensor(rows), tuple(skipped))
            elif skipped:
                yield Piece(torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), tuple(skipped))
            if first is None and not waiting:
                raise UsageError(f"{encoded.where}: every one of its {count} images is broken")
            report(min(start + _PIECE, count), count)
    finally:
        pool.shutdown(cancel_futures=True)


def _decode_some(encoded: Encoded, config: ImagesConfig, start: int, stop: int) -> list[Pixels | BrokenImage]:
    found: list[Pixels | BrokenImage] = []
    for row in range(start, stop):
        try:
            found.append(decode(encoded.read(row), config.size, config.channels))
        except BrokenImage as broken:
            found.append(broken)
    return found


def _check_alike(image: Pixels, name: str, first: Pixels, first_name: str) -> None:
    if image.shape == first.shape:
        return
    if image.shape[1:] != first.shape[1:]:
        (high, wide), (first_high, first_wide) = image.shape[1:], first.shape[1:]
        raise UsageError(
            f"{name} is {wide}x{high} pixels and {first_name} is {first_wide}x{first_high}: set data.size=N to bring "
            f"all to NxN, for example data.size={min(wide, high, first_wide, first_high)}"
        )
    kinds = {1: "grey", 3: "colour"}
    raise UsageError(
        f"{name} is {kinds[image.shape[0]]} and {first_name} is {kinds[first.shape[0]]}: set data.channels=3 (or 1) to "
        "convert all"
    )


def labels_of(encoded: Encoded, config: ImagesConfig) -> tuple[Tensor | None, int]:
    """Labels of all images and the number of classes: also those that ``config.max_images`` leaves out count."""
    return checked_labels(encoded.label, encoded.names, encoded.where, config.labels)


def load_images(encoded: Encoded, config: ImagesConfig, name: str) -> Dataset:
    """Decode a whole source into memory. What was skipped is told on stderr and kept with the data."""
    label, num_classes = labels_of(encoded, config)
    count = min(len(encoded.names), config.max_images or len(encoded.names))
    x = torch.empty(0)
    rows, skipped, filled = [], list(encoded.missing), 0
    for piece in pieces(encoded, config):
        if not filled and len(piece.x):
            x = _room(count, tuple(piece.x.shape[1:]), encoded.where)
        x[filled : filled + len(piece.x)] = piece.x
        filled += len(piece.x)
        rows.append(piece.rows)
        skipped += piece.skipped
    tell_skipped(encoded.where, skipped)
    return Dataset(
        name,
        x[:filled],
        None if label is None else label[torch.cat(rows)],
        num_classes,
        kind="image",
        flip=config.flip,
        resident=config.resident,
        class_names=encoded.class_names if num_classes else (),
        skipped=tuple(skipped),
    )


def tell_skipped(where: str, skipped: Sequence[str]) -> None:
    if skipped and is_main_process():
        others = f" and {len(skipped) - 1} more" if len(skipped) > 1 else ""
        images = "1 broken image" if len(skipped) == 1 else f"{len(skipped)} broken images"
        say(f"warning: {where}: left out {images}: {skipped[0]}{others}")


def _room(count: int, shape: tuple[int, ...], where: str) -> Tensor:
    try:
        return torch.empty((count, *shape), dtype=torch.uint8)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        size = f"{count * int(np.prod(shape)) / 2**30:.1f} GiB"
        raise FewstepError(
            f"{where}: {count} images of {'x'.join(map(str, shape))} need {size} of memory; `fewstep data prepare` "
            "makes shards of them, which stay on disk"
        ) from error
