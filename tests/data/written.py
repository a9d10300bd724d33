"""The shipped digits as 8-bit images, written in every layout that fewstep reads."""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.data.load import digits

COUNT = 300


def images() -> tuple[Tensor, Tensor]:
    """The first digits ``[COUNT, 1, 8, 8]`` uint8 in the order of their classes, and the classes ``[COUNT]``."""
    data = digits()
    assert data.label is not None
    label, order = data.label[:COUNT].sort(stable=True)
    return ((data.x[:COUNT][order] + 1) * 127.5).round().to(torch.uint8), label


def png(image: Tensor | np.ndarray, form: str = "PNG", **settings: object) -> bytes:
    """An image ``[C, H, W]`` uint8 as a file's bytes."""
    pixels = np.asarray(image).transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, form, **settings)
    return buffer.getvalue()


def as_folder(path: Path) -> Path:
    """A folder per class."""
    for number, (image, label) in enumerate(zip(*images(), strict=True)):
        file = path / str(int(label)) / f"{number:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(image))
    return path


def edm_names() -> list[str]:
    return [f"{number // 100:05d}/img{number:08d}.png" for number in range(COUNT)]


def manifest() -> str:
    return json.dumps({"labels": [[name, int(label)] for name, label in zip(edm_names(), images()[1], strict=True)]})


def as_edm_tree(path: Path) -> Path:
    for name, image in zip(edm_names(), images()[0], strict=True):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(png(image))
    (path / "dataset.json").write_text(manifest())
    return path


def as_zip(path: Path) -> Path:
    path = path.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for name, image in reversed(list(zip(edm_names(), images()[0], strict=True))):  # no order is relied on
            archive.writestr(name, png(image))
        archive.writestr("dataset.json", manifest())
    return path


def as_parquet(path: Path) -> Path:
    """Two files of small row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.mkdir()
    x, label = images()
    for part, rows in enumerate(torch.arange(COUNT).split(170)):
        image = [{"bytes": png(x[row]), "path": None} for row in rows]
        table = pa.table({"img": image, "fine_label": label[rows].tolist()})
        pq.write_table(table, path / f"train-{part:05d}-of-00002.parquet", row_group_size=37)
    return path


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def as_tar(path: Path) -> Path:
    """Two archives, one of them compressed, with labels in three kinds of file."""
    path.mkdir()
    x, label = images()
    for part, rows in enumerate(torch.arange(COUNT).split(170)):
        with tarfile.open(path / f"part-{part}.tar{'.gz' if part else ''}", "w:gz" if part else "w") as archive:
            for row in rows.flip(0).tolist():
                text = str(int(label[row]))
                labels = {"cls": text, "txt": text + "\n", "json": json.dumps({"label": int(text), "caption": "digit"})}
                suffix = list(labels)[row % 3]
                add(archive, f"{row:06d}.{suffix}", labels[suffix].encode())
                add(archive, f"{row:06d}.png", png(x[row]))
    return path


LAYOUTS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "folder": ("folder", as_folder),
    "EDM tree": ("folder", as_edm_tree),
    "zip": ("zip", as_zip),
    "parquet": ("parquet", as_parquet),
    "webdataset": ("webdataset", as_tar),
}
"""By name: the kind of data, and what writes it to a path and returns where it lies."""
