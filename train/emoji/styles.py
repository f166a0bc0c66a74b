"""Styles made here: finetunes of the teacher on glyphs of its own sets, recoloured and outlined.

    python -m train.emoji.styles turned --minutes 6

They are for training packs over many styles, and for choosing settings: OpenMoji, the style that packs are judged in,
stays unseen. The checkpoint is written beside the other files of the run, not into models/.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from asdm_core.tensor_file import write_file

from ..progress import Progress, plain_errors
from .codec import load_codec
from .data import Glyphs, draw, load_glyphs, variants
from .latents import LatentSet
from .sources import STYLES
from .teacher import LICENCE, TEACHER_STYLES, Batches, add_unet_arguments, provenance, train
from .text import Tokens, host_folder, load_text
from .training import add_common_arguments, start
from .unet import load_unet, save_unet

RIM = 9  # width of an outline, in pixels of the glyphs: an odd number


def turned(pixels: Tensor) -> Tensor:
    """Red, green and blue change places. pixels: premultiplied RGBA in [0, 1], (B, 4, H, W)."""
    return pixels[:, [1, 2, 0, 3]]


def grey(pixels: Tensor) -> Tensor:
    """Shades of grey."""
    light = pixels[:, :3].mean(1, keepdim=True)
    return torch.cat([light.expand(-1, 3, -1, -1), pixels[:, 3:]], 1)


def outlined(pixels: Tensor) -> Tensor:
    """Pale inside a dark rim."""
    alpha = pixels[:, 3:]
    inner = -F.max_pool2d(-alpha, RIM, 1, RIM // 2)
    pale = 0.5 * pixels[:, :3] + 0.5 * alpha
    return torch.cat([pale * inner, alpha], 1)


def flat(pixels: Tensor) -> Tensor:
    """Few colours: three of each channel."""
    alpha = pixels[:, 3:]
    straight = pixels[:, :3] / alpha.clamp_min(1e-3)
    return torch.cat([(straight.clamp(0, 1) * 2).round() / 2 * alpha, alpha], 1)


def as_it_is(pixels: Tensor) -> Tensor:
    return pixels


# Name -> the sets it is drawn from, and what is done to them.
MADE: dict[str, tuple[tuple[str, ...], Callable[[Tensor], Tensor]]] = {
    "noto": (TEACHER_STYLES[:1], as_it_is),
    "twemoji": (TEACHER_STYLES[1:], as_it_is),
    "turned": (TEACHER_STYLES, turned),
    "grey": (TEACHER_STYLES, grey),
    "outlined": (TEACHER_STYLES, outlined),
    "flat": (TEACHER_STYLES, flat),
    "outlined-turned": (TEACHER_STYLES, lambda pixels: outlined(turned(pixels))),
}


def restyled(glyphs: Glyphs, change: Callable[[Tensor], Tensor]) -> Glyphs:
    """Glyphs of the teacher's sets in another style; OpenMoji's are left out."""
    pixels = torch.zeros_like(glyphs.pixels)
    for number, style in enumerate(STYLES):
        if style in TEACHER_STYLES:
            for some, into in zip(glyphs.pixels[number].split(32), pixels[number].split(32), strict=True):
                into.copy_((change(some.float() / 255) * 255).round().clamp(0, 255).to(torch.uint8))
    return replace(glyphs, pixels=pixels)


@plain_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    add_unet_arguments(parser)
    parser.add_argument("style", choices=MADE)
    parser.set_defaults(lr=4e-4, batch=16, ema=0.99, pooled_samples=0)
    args = parser.parse_args()
    start(args)
    torch.manual_seed(args.seed)
    sets, change = MADE[args.style]
    glyphs = restyled(load_glyphs(args.runs), change)
    chosen = variants(glyphs.concepts, sets)
    codec = load_codec(args.models).to(args.device)
    latents, progress = torch.empty(len(chosen), 4, 16, 16), Progress(f"encoding {args.style}", len(chosen))
    with torch.no_grad():
        for i in range(0, len(chosen), 16):
            latents[i : i + 16] = codec.encode(draw(glyphs, chosen[i : i + 16]).to(args.device)).cpu()
            progress.show(min(i + 16, len(chosen)))
    progress.end()
    write_file(args.runs / f"latents-{args.style}.safetensors", {"latents": latents.half()}, {"copies": "1"})
    encoder = load_text(args.models / "emoji-text.safetensors")
    tokens = Tokens(host_folder(args.host), ids=encoder.ids.tolist())
    batches = Batches(glyphs, LatentSet(chosen, latents), tokens, args.seed + 1)
    unet = load_unet(args.models / "emoji-teacher.safetensors")
    unet, _, run = train(args, f"style-{args.style}", unet, encoder, batches, sets, joint=False)
    training = provenance(args, run) | {"data": f"{' and '.join(sets)}, {args.style}", "from": "emoji-teacher"}
    path = args.runs / f"emoji-{args.style}.safetensors"
    save_unet(path, unet, LICENCE, training)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
