"""The training pictures of the UNets as latents, encoded once, 2 KB each: every glyph on every background.

python -m train.emoji.latents noto twemoji openmoji --copies 4
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from asdm_core.tensor_file import write_file

from .codec import load_codec
from .data import Glyphs, Variant, draw, load_glyphs, variants
from .sources import STYLES
from ..progress import Progress, plain_errors
from .training import add_common_arguments, start


@dataclass(frozen=True)
class LatentSet:
    """variants[i] says what latents[i] (fp16, 4x16x16) shows."""

    variants: list[Variant]
    latents: Tensor


def path_of(runs: Path, style: str) -> Path:
    return runs / f"latents-{style}.safetensors"


def load_latents(runs: Path, glyphs: Glyphs, styles: tuple[str, ...], copies: int = 1) -> LatentSet:
    """The cached latents of some styles, the first `copies` of each picture.

    Raises ValueError where they are missing, too few or of other concepts.
    """
    wanted, parts = [], []
    for style in styles:
        path = path_of(runs, style)
        if not path.exists():
            raise ValueError(f"{path} is missing; make it with `python -m train.emoji.latents {style}`")
        with safe_open(path, framework="pt") as f:
            latents = f.get_tensor("latents")
            cached = int(f.metadata().get("copies", "0"))
        if len(latents) != len(variants(glyphs.concepts, (style,), copies=cached)):
            raise ValueError(
                f"{path} holds {len(latents)} pictures, which is not what the glyphs make; "
                f"make it again with `python -m train.emoji.latents {style}`"
            )
        if cached < copies:
            raise ValueError(
                f"{path} holds {cached} copies of each picture and {copies} were asked for; "
                f"make it with `python -m train.emoji.latents {style} --copies {copies}`"
            )
        chosen = variants(glyphs.concepts, (style,), copies=copies)
        wanted += chosen
        parts.append(latents[: len(chosen)])
    return LatentSet(wanted, torch.cat(parts))


@plain_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, training=False)
    parser.add_argument("styles", nargs="*", default=list(STYLES))
    parser.add_argument("--copies", type=int, default=1, help="of each picture: the first upright, the others jittered")
    args = parser.parse_args()
    start(args)
    glyphs = load_glyphs(args.runs)
    codec = load_codec(args.models).to(args.device)
    for style in args.styles:
        chosen = variants(glyphs.concepts, (style,), copies=args.copies)
        latents = torch.empty(len(chosen), 4, 16, 16, dtype=torch.float16)
        progress = Progress(f"encoding {style}", len(chosen))
        with torch.no_grad():
            for i in range(0, len(chosen), 16):
                latents[i : i + 16] = codec.encode(draw(glyphs, chosen[i : i + 16]).to(args.device)).half().cpu()
                progress.show(min(i + 16, len(chosen)))
        progress.end()
        write_file(path_of(args.runs, style), {"latents": latents}, {"copies": str(args.copies)})
        spread = latents.float().std((0, 2, 3)).tolist()
        print(f"{style}: latent mean {latents.float().mean():.3f}, std by channel {[round(s, 3) for s in spread]}")


if __name__ == "__main__":
    main()
