"""Sheets of pictures for comparing them: labelled grids, and heat-maps of what differs."""

from __future__ import annotations

import math
from functools import lru_cache
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .text import printable

CELL = 256
GAP = 8
MARGIN = 32
CAPTION, NOTE = 44, 30  # heights of the texts above and below pictures
_LONGEST, _LINES = 1000, 20  # letters and lines of a text that are looked at: more than fit on any sheet
FULL_HEAT = 1 / 3  # a difference from here on is drawn in the brightest colour

INK, QUIET, EDGE, PAPER = "#16181d", "#5c626e", "#d5d9e0", "#ffffff"

# Dark to bright, so that it reads in print too; equal pictures are black.
_HEAT = ((0.0, (0, 0, 0)), (0.25, (66, 10, 104)), (0.5, (187, 55, 84)), (0.75, (249, 142, 9)), (1.0, (252, 255, 200)))
HEAT = np.stack(
    [np.interp(np.linspace(0, 1, 256), [at for at, _ in _HEAT], [colour[i] for _, colour in _HEAT]) for i in range(3)],
    1,
)
HEAT = HEAT.round().astype(np.uint8)


@dataclass(frozen=True)
class Row:
    """Pictures side by side, a caption and a note above them, and a note below each."""

    images: Sequence[Image.Image]
    caption: str = ""
    note: str = ""
    notes: Sequence[str] = ()


def heat_map(a: Image.Image, b: Image.Image) -> Image.Image:
    """Where two pictures of one size differ: the largest difference of the channels, by colour, on a scale that never
    changes.
    """
    off = np.abs(np.asarray(a.convert("RGB"), np.float32) - np.asarray(b.convert("RGB"), np.float32)).max(2) / 255
    return Image.fromarray(HEAT[(255 * np.minimum(off / FULL_HEAT, 1)).round().astype(np.uint8)])


HEAT_HEAD = f"difference (brightest: {FULL_HEAT:.0%})"


def likeness(psnr: float | None, ssim: float) -> str:
    """Both numbers in words; psnr None or inf: identical pictures; ssim nan: not known."""
    if psnr is None or math.isinf(psnr):
        return "identical"
    return f"PSNR {psnr:.1f} dB" + ("" if math.isnan(ssim) else f", SSIM {ssim:.2f}")


def duration(seconds: float) -> str:
    """A time for people: 31 ms, 0.31 s, 3.1 s."""
    return f"{1000 * seconds:.0f} ms" if seconds < 0.1 else f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"


def finite(number: float) -> float | None:
    """None for what is infinite, as the PSNR of identical pictures, or no number: JSON has no word for these."""
    return number if math.isfinite(number) else None


@lru_cache(maxsize=32)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def fitted(draw: ImageDraw.ImageDraw, text: str, size: int, width: float) -> str:
    """The text in one line, shortened to a width."""
    text = printable(text.replace("\r\n", " ").replace("\n", " ").replace("\t", " "), _LONGEST)
    if draw.textlength(text, font(size)) <= width:
        return text
    low, high = 0, len(text)  # so many letters fit, and so many do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if draw.textlength(text[:middle] + "...", font(size)) <= width else (low, middle)
    return text[:low].rstrip() + "..."


def shown(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A picture in a cell of a size, its proportions kept."""
    scale = min(size[0] / image.width, size[1] / image.height)
    # Small pictures are shown with their own pixels, not blurred up.
    way = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    fitting = image.convert("RGB").resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), way
    )
    if fitting.size == size:
        return fitting
    cell = Image.new("RGB", size, "#eef0f3")
    cell.paste(fitting, ((size[0] - fitting.width) // 2, (size[1] - fitting.height) // 2))
    return cell


def grid(
    title: str,
    subtitle: str,
    heads: Sequence[str],
    rows: Sequence[Row],
    cell: tuple[int, int] = (CELL, CELL),
    groups: int = 1,
) -> Image.Image:
    """The labelled grid: one column for each of `heads`, one line of pictures for each row, `groups` rows side by side.

    title: may be empty. subtitle: up to 20 lines. Texts that are too long are shortened.
    """
    lines, below = -(-len(rows) // groups), NOTE if any(row.notes for row in rows) else 0
    above = CAPTION if any(row.caption or row.note for row in rows) else GAP
    small = subtitle.split("\n", _LINES)[:_LINES] if subtitle else []
    over = 72 if title else 14
    header = over + 28 * len(small) + 50
    group, tall = len(heads) * (cell[0] + GAP) - GAP, above + cell[1] + below
    width = groups * group + (groups + 1) * MARGIN
    sheet = Image.new("RGB", (width, header + lines * tall + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 22), fitted(draw, title, 38, width - 2 * MARGIN), INK, font(38))
    for i, line in enumerate(small):
        draw.text((MARGIN, over + 28 * i), fitted(draw, line, 22, width - 2 * MARGIN), QUIET, font(22))
    for index in range(min(groups, len(rows))):
        left = MARGIN + index * (group + MARGIN)
        for i, head in enumerate(heads):
            draw.text((left + i * (cell[0] + GAP), header - 30), fitted(draw, head, 20, cell[0]), INK, font(20))
    for index, row in enumerate(rows):
        left, top = MARGIN + (index % groups) * (group + MARGIN), header + (index // groups) * tall
        short = fitted(draw, row.note, 18, group / 2)
        note = draw.textlength(short, font(18))
        draw.text((left, top + 12), fitted(draw, row.caption, 22, group - note - 20), INK, font(22))
        draw.text((left + group - note, top + 15), short, QUIET, font(18))
        for i, image in enumerate(row.images):
            x, y = left + i * (cell[0] + GAP), top + above
            draw.rectangle((x - 1, y - 1, x + cell[0], y + cell[1]), outline=EDGE)  # white pictures end somewhere too
            sheet.paste(shown(image, cell), (x, y))
        for i, text in enumerate(row.notes):
            draw.text(
                (left + i * (cell[0] + GAP), top + above + cell[1] + 5),
                fitted(draw, text, 17, cell[0]),
                QUIET,
                font(17),
            )
    return sheet
