"""The training pictures of the UNets as latents, encoded once, 2 KB each: every glyph taught, on every background.

    python -m train.emoji.latents noto twemoji openmoji
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from asdm_core.packs import write_file

from .codec import load_codec
from .data import Glyphs, Variant, draw, load_glyphs, variants
from .sources import STYLES
from .training import Progress, add_common_arguments, start


@dataclass(frozen=True)
class LatentSet:
    """variants[i] says what latents[i] (fp16, 4x16x16) shows."""

    variants: list[Variant]
    latents: Tensor


def path_of(runs: Path, style: str) -> Path:
    return runs / f"latents-{style}.safetensors"


def load_latents(runs: Path, glyphs: Glyphs, styles: tuple[str, ...]) -> LatentSet:
    """The cached latents of some styles. Raises ValueError where they are missing or of other concepts."""
    parts = []
    for style in styles:
        path = path_of(runs, style)
        if not path.exists():
            raise ValueError(f"{path} is missing; make it with `python -m train.emoji.latents {style}`")
        with safe_open(path, framework="pt") as f:
            parts.append(f.get_tensor("latents"))
    wanted = variants(glyphs.concepts, styles)
    latents = torch.cat(parts)
    if len(latents) != len(wanted):
        raise ValueError(f"the cached latents hold {len(latents)} pictures, the glyphs make {len(wanted)}; "
                         "make them again with `python -m train.emoji.latents`")
    return LatentSet(wanted, latents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, training=False)
    parser.add_argument("styles", nargs="*", default=list(STYLES))
    args = parser.parse_args()
    start(args)
    glyphs, codec = load_glyphs(args.runs), load_codec(args.models).to(args.device)
    for style in args.styles:
        chosen = variants(glyphs.concepts, (style,))
        latents = torch.empty(len(chosen), 4, 16, 16, dtype=torch.float16)
        progress = Progress(f"encoding {style}", len(chosen))
        with torch.no_grad():
            for i in range(0, len(chosen), 16):
                latents[i : i + 16] = codec.encode(draw(glyphs, chosen[i : i + 16]).to(args.device)).half().cpu()
                progress.show(min(i + 16, len(chosen)))
        progress.end()
        write_file(path_of(args.runs, style), {"latents": latents}, {})
        spread = latents.float().std((0, 2, 3)).tolist()
        print(f"{style}: latent mean {latents.float().mean():.3f}, std by channel {[round(s, 3) for s in spread]}")


if __name__ == "__main__":
    main()
