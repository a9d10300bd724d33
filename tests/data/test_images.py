"""From encoded bytes to pixels: channels, sizes, orientation, and what is broken."""

import io

import numpy as np
import pytest
from PIL import Image
from written import png

from fewstep.data.images import BrokenImage, centre_crop, decode


def noise(channels: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (channels, height, width), dtype=np.uint8)


def encoded(image: Image.Image, form: str = "PNG", **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
def test_lossless_images_come_back_as_they_were(channels: int) -> None:
    pixels = noise(channels, 5, 9)
    assert np.array_equal(decode(png(pixels)), pixels)


def test_grey_gives_one_channel_and_everything_else_three() -> None:
    colour = Image.fromarray(noise(3, 4, 4).transpose(1, 2, 0))
    shapes = {"1": 1, "L": 1, "LA": 1, "RGB": 3, "RGBA": 3, "P": 3}
    for mode, channels in shapes.items():
        assert decode(encoded(colour.convert(mode))).shape == (channels, 4, 4), mode
        for wanted in (1, 3):
            assert decode(encoded(colour.convert(mode)), channels=wanted).shape == (wanted, 4, 4), mode


def test_conversions_to_grey_and_back_are_those_of_the_standard() -> None:
    """Grey is 0.299 R + 0.587 G + 0.114 B (ITU-R 601) to within rounding; colour repeats the grey level."""
    pixels = noise(3, 6, 6)
    grey = decode(png(pixels), channels=1)[0]
    assert np.abs(grey - np.tensordot([0.299, 0.587, 0.114], pixels, 1)).max() <= 1
    assert np.array_equal(decode(png(noise(1, 6, 6)), channels=3), noise(1, 6, 6).repeat(3, 0))


def test_transparency_is_dropped() -> None:
    pixels = noise(4, 4, 4)
    assert np.array_equal(decode(png(pixels)), pixels[:3])


def test_the_orientation_of_a_camera_is_applied() -> None:
    """Orientation 6: the top of the picture is at the right of what is stored."""
    pixels = noise(3, 4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode(encoded(Image.fromarray(pixels.transpose(1, 2, 0)), exif=exif))
    assert np.array_equal(turned, np.rot90(pixels, -1, (1, 2)))


@pytest.mark.parametrize("pixels", [np.zeros((4, 4), kind) for kind in (np.uint16, np.int32, np.float32)])
def test_more_than_eight_bits_are_refused(pixels: np.ndarray) -> None:
    """Cutting them off would be silent."""
    with pytest.raises(BrokenImage, match="8 bits"):
        decode(encoded(Image.fromarray(pixels), "TIFF"))


@pytest.mark.parametrize(
    "content", [b"", b"not an image", png(noise(3, 40, 40))[:-60], png(noise(3, 9, 9), "JPEG")[:60]]
)
def test_what_does_not_decode_says_so(content: bytes) -> None:
    with pytest.raises(BrokenImage, match=r"^does not decode \(.+\)$") as error:
        decode(content)
    assert "BytesIO" not in str(error.value)


# Resizing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 13), (20, 8), (33, 70), (5, 7), (16, 16), (64, 15)])
def test_any_image_becomes_a_square(height: int, width: int) -> None:
    assert decode(png(noise(3, height, width)), size=8).shape == (3, 8, 8)


def test_an_image_of_the_right_height_is_cut_in_the_middle() -> None:
    pixels = noise(3, 8, 14)
    assert np.array_equal(decode(png(pixels), size=8), pixels[:, :, 3:11])
    assert np.array_equal(decode(png(pixels.transpose(0, 2, 1)), size=8), pixels.transpose(0, 2, 1)[:, 3:11])


def test_halving_is_averaging() -> None:
    """An image of twice the size is the mean of its squares of four; PIL rounds once per direction."""
    pixels = noise(1, 16, 16)
    means = pixels.reshape(8, 2, 8, 2).mean((1, 3))
    assert np.abs(decode(png(pixels), size=8)[0] - means).max() <= 1


def test_shrinking_does_not_alias() -> None:
    """A pattern of single black and white lines shrinks to an even grey: sampling without a filter leaves stripes."""
    lines = np.zeros((1, 60, 60), np.uint8)
    lines[:, :, ::2] = 255
    small = decode(png(lines), size=40)[0, 4:-4, 4:-4].astype(float)
    aliased = np.asarray(Image.fromarray(lines[0]).resize((40, 40), Image.Resampling.NEAREST)).astype(float)
    assert aliased[4:-4, 4:-4].std() > 100
    assert small.std() < 45
    smaller = decode(png(lines), size=24)[0, 2:-2, 2:-2].astype(float)
    assert np.abs(smaller - 127.5).max() < 2


def test_constant_images_and_straight_slopes_survive() -> None:
    flat = np.full((3, 50, 37), 77, np.uint8)
    assert (decode(png(flat), size=16) == 77).all()
    ramp = np.arange(96, dtype=np.uint8)[None, None].repeat(96, 1) * 2
    small = decode(png(ramp), size=32)[0].astype(float)
    assert np.abs(small[:, 3:-3] - (np.arange(32) * 3 + 1)[3:-3] * 2).max() <= 1.5


def test_the_published_crop_step_by_step() -> None:
    """The algorithm as it was published, written out with PIL for one size of each kind."""
    for width, height, size in ((100, 75, 16), (31, 90, 30), (20, 20, 32)):
        image = Image.fromarray(noise(3, height, width).transpose(1, 2, 0))
        expected = image
        while min(*expected.size) >= 2 * size:
            expected = expected.resize(tuple(side // 2 for side in expected.size), resample=Image.Resampling.BOX)  # type: ignore[arg-type]
        scale = size / min(*expected.size)
        expected = expected.resize(tuple(round(side * scale) for side in expected.size), Image.Resampling.BICUBIC)  # type: ignore[arg-type]
        pixels = np.array(expected)
        top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
        assert np.array_equal(np.asarray(centre_crop(image, size)), pixels[top : top + size, left : left + size])
