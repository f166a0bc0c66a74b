"""Styles made here: finetunes of the teacher on glyphs of its own sets, recoloured, redrawn and bent.

    python -m train.emoji.styles turned --minutes 6
    python -m train.emoji.styles drawn-1 drawn-2 drawn-3 --minutes 2
    python -m train.emoji.styles drawn-4 drawn-5 --pictures 480 --steps 60 --lr 6e-4

The last of these need little time for each style, for sets of many.

Some have names, and any number of others are drawn by their numbers: `drawn-7` is always the same. They are for
training packs over many styles, and for choosing settings: OpenMoji, the style that packs are judged in, stays unseen.
The checkpoints are written beside the other files of the run, not into models/; those that are there stay.
"""

from __future__ import annotations

import argparse
import math
import random
import re
from collections.abc import Callable
from functools import partial
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor


from ..progress import Progress, plain_errors
from ..seeds import seeded
from .codec import load_codec
from .data import Glyphs, Variant, draw, load_glyphs, variants
from .latents import LatentSet
from .sources import STYLES
from .teacher import LICENCE, TEACHER_STYLES, Batches, add_unet_arguments, provenance, train
from .text import Tokens, host_folder, load_text
from .training import add_common_arguments, start
from .unet import load_unet, save_unet

Change = Callable[[Tensor], Tensor]  # premultiplied RGBA in [0, 1], (B, 4, H, W) -> the same


def turned(pixels: Tensor) -> Tensor:
    """Red, green and blue change places. pixels: premultiplied RGBA in [0, 1], (B, 4, H, W)."""
    return pixels[:, [1, 2, 0, 3]]


def grey(pixels: Tensor) -> Tensor:
    """Shades of grey."""
    light = pixels[:, :3].mean(1, keepdim=True)
    return torch.cat([light.expand(-1, 3, -1, -1), pixels[:, 3:]], 1)


def as_it_is(pixels: Tensor) -> Tensor:
    return pixels


def recoloured(pixels: Tensor, angle: float, saturation: float, inverted: bool) -> Tensor:
    """Hues turned by an angle about grey, nearer to grey or farther from it, and light for dark where inverted."""
    third, root = (1 - math.cos(angle)) / 3, math.sin(angle) / math.sqrt(3)
    turn = torch.tensor([[third] * 3] * 3) + math.cos(angle) * torch.eye(3)
    turn += root * torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    matrix = saturation * turn + (1 - saturation) / 3
    alpha = pixels[:, 3:]
    colour = torch.einsum("ij,bjhw->bihw", matrix, pixels[:, :3])
    colour = alpha - colour if inverted else colour
    return torch.cat([colour.clamp_min(0).minimum(alpha), alpha], 1)


def rimmed(pixels: Tensor, width: int, ink: tuple[float, float, float], pale: float) -> Tensor:
    """A rim of this colour inside the shape; what it surrounds goes so far towards white. width: odd."""
    alpha = pixels[:, 3:]
    inner = -F.max_pool2d(-alpha, width, 1, width // 2)
    colour = ((1 - pale) * pixels[:, :3] + pale * alpha) * inner
    return torch.cat([colour + torch.tensor(ink)[:, None, None] * (alpha - inner), alpha], 1)


def lined(pixels: Tensor, strength: float) -> Tensor:
    """Dark where colours meet, as far as they differ."""
    light = pixels[:, :3].mean(1, keepdim=True)
    edge = F.max_pool2d(light, 5, 1, 2) + F.max_pool2d(-light, 5, 1, 2)
    return torch.cat([pixels[:, :3] * (1 - strength * edge).clamp(0, 1), pixels[:, 3:]], 1)


def bent(pixels: Tensor, amount: float, seed: int) -> Tensor:
    """Each glyph bent smoothly in a way of its own. amount: in halves of the picture, about."""
    count = len(pixels)
    bends = [torch.randn(1, 2, 4, 4, generator=seeded(seed, int(p[3].sum()))) for p in pixels]
    field = F.interpolate(torch.cat(bends), pixels.shape[-2:], mode="bicubic", align_corners=True)
    plain = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, plain + amount * field.movedim(1, -1), align_corners=False)


def levelled(pixels: Tensor, levels: int) -> Tensor:
    """So many levels above 0 of each channel."""
    alpha = pixels[:, 3:]
    straight = (pixels[:, :3] / alpha.clamp_min(1e-3)).clamp(0, 1)
    return torch.cat([(straight * levels).round() / levels * alpha, alpha], 1)


def soft(pixels: Tensor, width: int) -> Tensor:
    """Blurred. width: odd."""
    return F.avg_pool2d(pixels, width, 1, width // 2)


# The styles -----------------------------------------------------------------------------------------

outlined = partial(rimmed, width=9, ink=(0.0, 0.0, 0.0), pale=0.5)

# Name -> the sets it is drawn from, and what is done to them.
MADE: dict[str, tuple[tuple[str, ...], Change]] = {
    "noto": (TEACHER_STYLES[:1], as_it_is),
    "twemoji": (TEACHER_STYLES[1:], as_it_is),
    "turned": (TEACHER_STYLES, turned),
    "grey": (TEACHER_STYLES, grey),
    "outlined": (TEACHER_STYLES, outlined),
    "flat": (TEACHER_STYLES, partial(levelled, levels=2)),
    "outlined-turned": (TEACHER_STYLES, lambda pixels: outlined(turned(pixels))),
}


def drawn(number: int) -> tuple[tuple[str, ...], Change]:
    """The sets and the change of a style by its number: one to four of the changes above, in their order."""
    its = random.Random(f"style/{number}")
    ink = (its.random() / 2, its.random() / 2, its.random() / 2)
    possible: list[tuple[float, Change]] = [
        (0.6, partial(bent, amount=its.uniform(0.03, 0.12), seed=number)),
        (
            0.7,
            partial(
                recoloured,
                angle=its.uniform(0, 2 * math.pi),
                saturation=its.uniform(0, 1.4),
                inverted=its.random() < 0.2,
            ),
        ),
        (0.3, partial(levelled, levels=its.randint(1, 4))),
        (0.3, partial(soft, width=its.choice((5, 9)))),
        (0.4, partial(lined, strength=its.uniform(1, 3))),
        (0.5, partial(rimmed, width=its.choice((5, 9, 13)), ink=ink, pale=its.uniform(0, 0.7))),
    ]
    chosen = [change for likely, change in possible if its.random() < likely] or [possible[1][1]]
    sets = its.choice((TEACHER_STYLES, TEACHER_STYLES[:1], TEACHER_STYLES[1:]))

    def change(pixels: Tensor) -> Tensor:
        for one in chosen[:4]:
            pixels = one(pixels)
        return pixels

    return sets, change


def style_of(name: str) -> tuple[tuple[str, ...], Change]:
    """Raises ValueError for a name that is none."""
    if found := re.fullmatch(r"drawn-(\d+)", name):
        return drawn(int(found[1]))
    if name not in MADE:
        raise ValueError(f"{name} is no style; wanted one of {', '.join(MADE)}, or drawn-1, drawn-2 and so on")
    return MADE[name]


# Making them ----------------------------------------------------------------------------------------


def restyled(glyphs: Glyphs, change: Change) -> Glyphs:
    """Glyphs of the teacher's sets in another style; OpenMoji's are left out."""
    pixels = torch.zeros_like(glyphs.pixels)
    for number, style in enumerate(STYLES):
        if style in TEACHER_STYLES:
            for some, into in zip(glyphs.pixels[number].split(32), pixels[number].split(32), strict=True):
                into.copy_((change(some.float() / 255) * 255).round().clamp(0, 255).to(torch.uint8))
    return replace(glyphs, pixels=pixels)


def by_lot(pictures: list[Variant], count: int, name: str) -> list[Variant]:
    """So many of the pictures that a style may learn from, the same ones each time; 0: all."""
    return random.Random(name).sample(pictures, min(count, len(pictures))) if count else pictures


def make(args: argparse.Namespace, name: str, glyphs: Glyphs) -> None:
    """Finetune the teacher on one style, and write its checkpoint."""
    torch.manual_seed(args.seed)
    sets, change = style_of(name)
    glyphs = restyled(glyphs, change)
    chosen = by_lot(variants(glyphs.concepts, sets), args.pictures, name)
    codec = load_codec(args.models).to(args.device)
    latents, progress = torch.empty(len(chosen), 4, 16, 16), Progress(f"encoding {name}", len(chosen))
    with torch.no_grad():
        for i in range(0, len(chosen), 16):
            latents[i : i + 16] = codec.encode(draw(glyphs, chosen[i : i + 16]).to(args.device)).cpu()
            progress.show(min(i + 16, len(chosen)))
    progress.end()
    encoder = load_text(args.models / "emoji-text.safetensors")
    tokens = Tokens(host_folder(args.host), ids=encoder.ids.tolist())
    batches = Batches(glyphs, LatentSet(chosen, latents), tokens, args.seed + 1)
    unet = load_unet(args.models / "emoji-teacher.safetensors")
    unet, _, run = train(args, f"style-{name}", unet, encoder, batches, sets, joint=False)
    training = provenance(args, run) | {"data": f"{' and '.join(sets)}, {name}", "from": "emoji-teacher"}
    path = args.runs / f"emoji-{name}.safetensors"
    save_unet(path, unet, LICENCE, training)
    (args.runs / f"style-{name}.safetensors").unlink()  # 160 MB that a stopped run would go on from
    print(f"wrote {path}")


@plain_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    add_unet_arguments(parser)
    parser.add_argument("styles", nargs="+", help=f"{', '.join(MADE)}, drawn-1, drawn-2 and so on")
    parser.add_argument("--pictures", type=int, default=0, help="learn from so many, drawn by lot; 0: from all")
    parser.set_defaults(lr=4e-4, batch=16, ema=0.99, pooled_samples=0)
    args = parser.parse_args()
    for name in args.styles:
        style_of(name)
    if args.pictures < 0:
        raise ValueError(f"--pictures: wanted 0 or more, got {args.pictures}")
    start(args)
    glyphs = load_glyphs(args.runs)
    for name in args.styles:
        if (args.runs / f"emoji-{name}.safetensors").exists() and not args.fresh:
            print(f"{name} is there; --fresh makes it anew")
        else:
            make(args, name, glyphs)


if __name__ == "__main__":
    main()
