"""From the bytes of one encoded image to its pixels."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Pixels = NDArray[np.uint8]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

_GREY = ("1", "L", "LA", "La")
_COLOUR = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
_ORIENTATION = 0x0112


class BrokenImage(Exception):
    """Bytes that do not decode to an image of eight bits per channel. Says why, and not which."""


def decode(content: bytes, size: int | None = None, channels: int | None = None) -> Pixels:
    """Pixels ``[C, H, W]`` uint8 of an encoded image, or ``BrokenImage``.

    Grey images give one channel and all others three, unless ``channels`` says which; transparency is dropped. The
    orientation that a camera noted is applied. ``size`` resizes and crops to a square, see ``centre_crop``.
    """
    try:
        with Image.open(io.BytesIO(content)) as opened:
            image = _upright(opened)
            if image.mode not in _GREY + _COLOUR:
                raise BrokenImage(f"has pixels of kind {image.mode}, which do not fit into 8 bits")
            grey = channels == 1 if channels else image.mode in _GREY
            image = image.convert("L" if grey else "RGB")
            if size is not None:
                image = centre_crop(image, size)
            pixels = np.asarray(image)
    except (BrokenImage, MemoryError):
        raise
    except Exception as error:  # decoders of damaged files raise whatever they meet
        detail = " ".join(str(error).split()).partition("<_io")[0].strip()
        raise BrokenImage(f"does not decode ({detail or type(error).__name__})") from error
    return pixels[None] if grey else pixels.transpose(2, 0, 1)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square of an image, ``size`` pixels wide, in the way most published models saw theirs.

    As in ADM (Dhariwal and Nichol 2105.05233): halve by averaging while the shorter side is at least ``2 size``, bring
    it to ``size`` with a bicubic filter that is widened against aliasing, cut the rest off at both ends.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _upright(image: Image.Image) -> Image.Image:
    if image.getexif().get(_ORIENTATION, 1) == 1:
        return image
    return ImageOps.exif_transpose(image)
