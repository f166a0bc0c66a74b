"""The family's latents and captions as a cache for the recipes of `train/configs/emoji-*.toml`.

    python -m train.emoji.cache
    python -m train.emoji.cache --out prompts.safetensors --captions 2 --plain 0.6

The second is for rollouts, which take the captions alone: most of people's prompts are a plain name.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from asdm_core.tensor_file import write_file

from .captions import caption, own_tags, prompt
from .data import Glyphs, load_glyphs
from .latents import LatentSet, load_latents
from .teacher import TEACHER_STYLES
from .text import Tokens, host_folder, load_text
from ..progress import Progress, plain_errors
from .training import add_common_arguments, start


def write_cache(
    path: Path,
    glyphs: Glyphs,
    data: LatentSet,
    to_states: Callable[[Sequence[str]], Tensor],
    captions: int,
    seed: int,
    plain: float = 0.0,
) -> None:
    """Write a cache of `train/data.py` with some captions of each picture. to_states: B texts -> (B, L, D).

    plain: share of them that is the name of what is shown and nothing else.
    """
    tags, rng = own_tags(glyphs.concepts), random.Random(seed)
    rows: list[list[int]] = []
    texts: dict[str, int] = {}
    for v in data.variants:
        concept = glyphs.concepts[v.concept]
        chosen: list[int] = []
        while len(chosen) < captions:
            # Empty captions are the recipe's caption dropout.
            bare = plain and rng.random() < plain
            if text := prompt(concept) if bare else caption(concept, v.style, v.background, tags[concept.code], rng):
                chosen.append(texts.setdefault(text, len(texts)))
        rows.append(chosen)
    every = list(texts)
    states = []
    progress = Progress("text states", len(texts))
    for i in range(0, len(every), 64):
        states.append(to_states(every[i : i + 64]).half().cpu())
        progress.show(min(i + 64, len(every)))
    progress.end()
    write_file(
        path,
        {
            "latents": data.latents.half(),
            "captions": torch.tensor(rows),
            "states": torch.cat(states),
            "empty": to_states([""])[0].half().cpu(),
        },
        {"format": "pt"},
    )


@plain_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, training=False)
    parser.add_argument("--host", help="ComfyUI folder, for the CLIP tokeniser")
    parser.add_argument("--captions", type=int, default=4, help="different captions of each picture")
    parser.add_argument("--plain", type=float, default=0.0, help="share of the captions that is the name alone")
    parser.add_argument("--out", default="cache.safetensors", help="name of the file in the runs folder")
    args = parser.parse_args()
    start(args)
    glyphs = load_glyphs(args.runs)
    encoder = load_text(args.models / "emoji-text.safetensors").to(args.device)
    tokens = Tokens(host_folder(args.host), ids=encoder.ids.tolist())

    @torch.no_grad()
    def to_states(texts: Sequence[str]) -> Tensor:
        return encoder(tokens(texts).to(args.device))

    path = args.runs / args.out
    write_cache(
        path, glyphs, load_latents(args.runs, glyphs, TEACHER_STYLES), to_states, args.captions, args.seed, args.plain
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
