"""SVG glyphs to pictures: one box for all, then jitter and a background colour."""

from __future__ import annotations

import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SIZE = 128  # pixels of a picture
BOX = 120  # longest side of an unjittered glyph
BACKGROUNDS = {
    "white": (255, 255, 255),
    "grey": (176, 182, 190),
    "yellow": (255, 238, 150),
    "pink": (255, 200, 221),
    "blue": (170, 208, 255),
    "green": (190, 230, 180),
}


def render(svg: str) -> Tensor:
    """A glyph as premultiplied RGBA in [0, 1], (4, 2*SIZE, 2*SIZE), its longest side 2*BOX, centred."""
    import resvg_py  # only needed where graphics are rendered

    drawn = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=512, skip_system_fonts=True))
    picture = Image.open(io.BytesIO(drawn)).convert("RGBA")
    box = picture.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox()
    if box is None:
        raise ValueError("the glyph is empty")
    picture = picture.crop(box)
    scale = 2 * BOX / max(picture.size)
    size = max(1, round(scale * picture.width)), max(1, round(scale * picture.height))
    rgba = np.asarray(picture, dtype=np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    planes = [Image.fromarray(rgba[..., c]).resize(size, Image.Resampling.LANCZOS) for c in range(4)]
    canvas = torch.zeros(4, 2 * SIZE, 2 * SIZE)
    x, y = (2 * SIZE - size[0]) // 2, (2 * SIZE - size[1]) // 2
    canvas[:, y : y + size[1], x : x + size[0]] = torch.tensor(np.stack([np.asarray(plane) for plane in planes])).clamp(
        0, 1
    )
    canvas[:3] = torch.minimum(canvas[:3], canvas[3:])
    return canvas


def jitter(generator: torch.Generator, count: int, wild: bool = False) -> Tensor:
    """Random affine maps (count, 2, 3) for `compose`.

    For the UNets: scale 0.85-1, shift +-6 px, rotation +-6 degrees. wild, for the codec and the
    classifier: mirrored half the time, scale 0.75-1, shift +-10 px, rotation +-10 degrees.
    """
    u = torch.rand(count, 5, generator=generator)
    smallest, furthest, degrees = (0.75, 10, 10) if wild else (0.85, 6, 6)
    flip = torch.where(u[:, 0] < 0.5, -1.0, 1.0) if wild else torch.ones(count)
    scale = smallest + (1 - smallest) * u[:, 1]
    angle = math.radians(degrees) * (2 * u[:, 2] - 1)
    # A glyph that fills its box would leave the picture if it were shifted: shift within the room that is left.
    room = (2 * furthest / SIZE) * ((1 - scale) / (1 - smallest))
    shift = room[:, None] * (2 * u[:, 3:5] - 1)
    # affine_grid maps output to input coordinates, so this is the inverse of scale * rotation + shift.
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    linear = torch.stack([torch.stack([flip * cos, flip * sin], 1), torch.stack([-sin, cos], 1)], 1)
    return torch.cat([linear, -(linear @ shift[:, :, None])], 2)


IDENTITY = torch.tensor([[[1.0, 0, 0], [0, 1.0, 0]]])


def compose(glyphs: Tensor, maps: Tensor, backgrounds: list[str]) -> Tensor:
    """Pictures in [0, 1], (B, 3, SIZE, SIZE), from premultiplied RGBA (B, 4, 2*SIZE, 2*SIZE) in [0, 1]."""
    grid = F.affine_grid(maps, list(glyphs.shape), align_corners=False)
    moved = F.avg_pool2d(F.grid_sample(glyphs, grid, align_corners=False), 2)
    ground = torch.tensor([BACKGROUNDS[b] for b in backgrounds], dtype=torch.float32)[:, :, None, None] / 255
    return (moved[:, :3] + (1 - moved[:, 3:]) * ground).clamp(0, 1)
