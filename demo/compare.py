"""Draws compare.png: A, B and their difference, labelled, for every prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw, ImageFont

CELL = 256
GAP = 8
MARGIN = 32
CAPTION = 44
HEADER = 150
COLUMNS = 2  # groups of (A, B, difference) side by side
GAIN = 3

INK, QUIET, PAPER = "#16181d", "#5c626e", "#ffffff"


@dataclass(frozen=True)
class Row:
    """One prompt: both images, and what was measured on them."""

    prompt: str
    a: Image.Image
    b: Image.Image
    note: str


def difference(a: Image.Image, b: Image.Image, gain: float = GAIN) -> Image.Image:
    """The absolute difference of two images, amplified."""
    return ImageChops.difference(a, b).point(lambda value: min(255, round(value * gain)))


def font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)


def fitted(draw: ImageDraw.ImageDraw, text: str, size: int, width: float) -> str:
    """The text, shortened to a width."""
    if draw.textlength(text, font(size)) <= width:
        return text
    while text and draw.textlength(text + "...", font(size)) > width:
        text = text[:-1]
    return text.rstrip() + "..."


def cell(image: Image.Image) -> Image.Image:
    # Small images are shown with their own pixels, not blurred up.
    way = Image.Resampling.NEAREST if image.width < CELL else Image.Resampling.LANCZOS
    return image.resize((CELL, CELL), way)


def grid(title: str, subtitle: str, labels: Sequence[str], rows: Sequence[Row]) -> Image.Image:
    """The labelled grid. ``labels`` name A and B."""
    lines = -(-len(rows) // COLUMNS)
    group = 3 * CELL + 2 * GAP
    width = COLUMNS * group + (COLUMNS + 1) * MARGIN
    height = HEADER + lines * (CAPTION + CELL) + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 22), fitted(draw, title, 38, width - 2 * MARGIN), INK, font(38))
    draw.text((MARGIN, 72), fitted(draw, subtitle, 22, width - 2 * MARGIN), QUIET, font(22))
    heads = [f"A  {labels[0]}", f"B  {labels[1]}", f"|A - B| x {GAIN}"]
    for column in range(min(COLUMNS, len(rows))):
        left = MARGIN + column * (group + MARGIN)
        for i, head in enumerate(heads):
            draw.text((left + i * (CELL + GAP), HEADER - 30), fitted(draw, head, 20, CELL), INK, font(20))
    for index, row in enumerate(rows):
        left = MARGIN + (index % COLUMNS) * (group + MARGIN)
        top = HEADER + (index // COLUMNS) * (CAPTION + CELL)
        note = draw.textlength(row.note, font(18))
        draw.text((left, top + 12), fitted(draw, row.prompt, 22, group - note - 20), INK, font(22))
        draw.text((left + group - note, top + 15), row.note, QUIET, font(18))
        for i, image in enumerate((row.a, row.b, difference(row.a, row.b))):
            sheet.paste(cell(image), (left + i * (CELL + GAP), top + CAPTION))
    return sheet
