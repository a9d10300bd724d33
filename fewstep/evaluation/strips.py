"""A row's first samples as a small picture, carried inside ``results.json``."""

import base64
import io
from typing import Literal

import numpy as np
from PIL import Image
from torch import Tensor

COUNT = 10  # samples in a strip: one of each class where there are ten
_SIDE = 96  # pixels of a points picture
_EXTENT = 1.5  # which covers the square [-1.5, 1.5]^2


def samples_strip(samples: Tensor, kind: Literal["image", "points", "latents"]) -> str | None:
    """Base64 PNG of the first samples side by side (uint8 NCHW), or of the density of 2-D points (float ``[N, 2]``).

    None for points of another dimension, and for latents.
    """
    picture = _tiles(samples[:COUNT], COUNT) if kind == "image" else _density(samples)
    return None if picture is None else base64.b64encode(_png(picture)).decode()


def samples_grid(samples: Tensor, kind: Literal["image", "points", "latents"]) -> bytes | None:
    """PNG of all samples in rows of ten, small images enlarged to be seen; points as in ``samples_strip``."""
    picture = _tiles(samples, COUNT) if kind == "image" else _density(samples)
    if picture is None:
        return None
    zoom = max(1, 48 // samples.shape[-1]) if kind == "image" else 4
    return _png(picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST))


def _tiles(images: Tensor, columns: int) -> Image.Image:
    """Images uint8 ``[N, C, H, W]`` with one or three channels, row by row."""
    tiles = images.permute(0, 2, 3, 1).cpu().numpy()
    count, height, width, channels = tiles.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = np.zeros((rows * height, columns * width, channels), dtype=np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * height, i % columns * width
        sheet[top : top + height, left : left + width] = tile
    return Image.fromarray(sheet[:, :, 0] if channels == 1 else sheet)


def _density(points: Tensor) -> Image.Image | None:
    if points.shape[1:] != (2,):
        return None
    x, y = points.cpu().double().numpy().T
    edges = np.linspace(-_EXTENT, _EXTENT, _SIDE + 1)
    count, _, _ = np.histogram2d(-y, x, bins=(edges, edges))
    # Scaled by the 99th percentile of the occupied cells, so that one crowded cell does not hide the rest.
    top = np.percentile(count[count > 0], 99) if count.any() else 1.0
    return Image.fromarray((255 * (1 - np.sqrt(count / top))).clip(0, 255).astype(np.uint8))


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
