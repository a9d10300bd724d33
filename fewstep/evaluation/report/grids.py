"""Sample grids. Images: the same noise in every column, one line per step count, the teacher's best effort on top.
Points: the density of each model at each step count, all in one picture."""

import base64
import binascii
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fewstep.errors import UsageError
from fewstep.evaluation.report import answer, wording
from fewstep.evaluation.report.figures import slug
from fewstep.evaluation.results import Report, Row

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

LEAST_TILE = 48  # pixels; smaller images are enlarged by whole factors, so that a pixel stays a square
MOST_COLUMNS, MOST_WIDTH = 10, 2048
GAP, LETTERS = 2, 16
INK, RULE = (27, 27, 31), (150, 152, 160)


@dataclass(frozen=True)
class Grid:
    """The samples of one curve; ``name`` is the file name without ending."""

    name: str
    title: str
    caption: str
    png: bytes


def grids(report: Report) -> list[Grid]:
    """One grid per curve that has samples, the teacher's most-step row above every student's; where a sample of many
    is one picture, one grid for all curves."""
    curves = [(curve, [row for row in curve.rows if row.samples_png]) for curve in answer.series(report)]
    curves = [(curve, rows) for curve, rows in curves if rows]
    if curves and all(len(tiles(row)) == 1 for _, rows in curves for row in rows):
        return [_densities(curves)]
    reference = answer.reference_row(report)
    drawn: list[Grid] = []
    for curve, rows in curves:
        top = reference if reference is not None and reference.samples_png and curve.role == "student" else None
        lines = [(wording.plural(row.steps), tiles(row)) for row in reversed(rows)]
        caption = "Each column starts from the same noise."
        if top is not None:
            lines.insert(0, (f"teacher\n{wording.plural(top.steps)}", tiles(top)))
            caption = f"Top: {answer.label_of(report, top)} at {wording.plural(top.steps)}. {caption}"
        name = slug(curve.label)
        name = f"{name}-{len(drawn) + 1}" if name in {grid.name for grid in drawn} else name
        drawn.append(Grid(name, curve.label, caption, _draw(lines, rule=top is not None)))
    return drawn


def neighbour_grids(report: Report) -> list[Grid]:
    """One grid per student that has them: samples at its fewest steps, with the nearest training image under each."""
    drawn: list[Grid] = []
    for curve in answer.series(report):
        row = next((row for row in curve.rows if row.samples_png and row.neighbours_png), None)
        if row is None or curve.role == "teacher":
            continue
        lines = [
            (f"sample\n{wording.plural(row.steps)}", tiles(row)),
            ("nearest\nin training", tiles(row, "neighbours")),
        ]
        caption = (
            "Top: samples. Below each: the training image that is nearest to it in the features of the evaluation."
        )
        name = f"neighbours-{slug(curve.label)}"
        name = f"{name}-{len(drawn) + 1}" if name in {grid.name for grid in drawn} else name
        drawn.append(Grid(name, curve.label, caption, _draw(lines, rule=False)))
    return drawn


def tiles(row: Row, which: Literal["samples", "neighbours"] = "samples") -> "list[Image]":
    """A row's strip cut into its images, which are square; a strip of another shape stays one picture."""
    from PIL import Image, UnidentifiedImageError

    png = row.samples_png if which == "samples" else row.neighbours_png
    try:
        strip = Image.open(io.BytesIO(base64.b64decode(png or "", validate=True))).convert("RGBA")
    except (binascii.Error, UnidentifiedImageError, OSError) as error:
        raise UsageError(f"the {which} of {row.model} at {wording.plural(row.steps)} are not a PNG: {error}") from error
    white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, strip).convert("RGB")
    side = flat.height if flat.width % flat.height == 0 else flat.width
    return [flat.crop((left, 0, left + side, flat.height)) for left in range(0, flat.width, side)]


def _densities(curves: Sequence[tuple[answer.Series, list[Row]]]) -> Grid:
    """A line per curve, a column per step count that any of them has."""
    counts = sorted({row.steps for _, rows in curves for row in rows})
    lines = []
    for curve, rows in curves:
        at = {row.steps: tiles(row)[0] for row in rows}
        lines.append((curve.label, [at.get(count) for count in counts]))
    caption = "Densities of samples; a column is a number of steps."
    return Grid("densities", "All models", caption, _draw(lines, rule=False, columns=[str(count) for count in counts]))


def _draw(
    lines: "Sequence[tuple[str, Sequence[Image | None]]]", rule: bool, columns: "Sequence[str] | None" = None
) -> bytes:
    """The grid as PNG: labels at the left, names of columns (sample numbers) on top, a rule beneath the first line."""
    from PIL import Image, ImageDraw

    pictures = [image for _, images in lines for image in images if image is not None]
    widest = max(image.width for image in pictures)
    tallest = max(image.height for image in pictures)
    factor = max(1, math.ceil(LEAST_TILE / min(widest, tallest)))
    cell = (widest * factor, tallest * factor)
    if columns is None:
        least = min(len(images) for _, images in lines)
        columns = [str(place) for place in range(min(MOST_COLUMNS, max(1, MOST_WIDTH // cell[0]), least))]
    height = max(LETTERS, cell[1] // 8)
    letters = font(height)
    gutter = 10 + max(math.ceil(letters.getlength(part)) for label, _ in lines for part in label.split("\n"))
    head, below = height + 8, 8 if rule else 0
    size = (gutter + len(columns) * (cell[0] + GAP), head + len(lines) * (cell[1] + GAP) + below)
    page = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(page)
    for column, name in enumerate(columns):
        centre = (gutter + column * (cell[0] + GAP) + cell[0] // 2, head // 2)
        draw.text(centre, name, fill=RULE, font=letters, anchor="mm")
    for i, (label, images) in enumerate(lines):
        top = head + i * (cell[1] + GAP) + (below if i else 0)
        where = (gutter - 8, top + cell[1] // 2)
        draw.multiline_text(where, label, fill=INK, font=letters, anchor="rm", align="right", spacing=2)
        for column, image in enumerate(images[: len(columns)]):
            if image is None:
                continue
            shown = image if image.size == cell else image.resize(cell, Image.Resampling.NEAREST)
            page.paste(shown, (gutter + column * (cell[0] + GAP), top))
    if rule:
        y = head + cell[1] + GAP + below // 2 - 1
        draw.line((0, y, size[0], y), fill=RULE, width=1)
    out = io.BytesIO()
    page.save(out, format="PNG", optimize=True)
    return out.getvalue()


def font(size: int) -> "FreeTypeFont":
    """The figures' own typeface, which comes with matplotlib: the same letters on every machine."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)
