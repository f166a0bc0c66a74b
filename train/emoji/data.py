"""Rendered glyphs and the pictures made of them.

    python -m train.emoji.data

writes glyphs.safetensors: every chosen emoji in the three styles, as premultiplied RGBA; and beside the
finished weights concepts.json: code point and name of each, which are the prompts the family knows.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from asdm_core.tensor_file import write_file

from .captions import held_out
from .render import BACKGROUNDS, IDENTITY, compose, jitter, render
from .sources import STYLES, Concept, fetch, read_concepts, read_graphics
from ..progress import Progress, plain_errors
from .training import add_common_arguments
from ..figures import save_grid
from ..seeds import seeded

ALL_COPIES = 2  # pictures of a glyph on each background that the codec and the classifier learn from


@dataclass(frozen=True)
class Glyphs:
    """concepts: all of them; pixels: uint8 premultiplied RGBA (styles, concepts, 4, 2*SIZE, 2*SIZE), in order of
    STYLES.
    """

    concepts: list[Concept]
    pixels: Tensor

    def pictures(
        self, style: str, indices: list[int], maps: Tensor | None = None, backgrounds: list[str] | None = None
    ) -> Tensor:
        """Pictures in [0, 1] (B, 3, SIZE, SIZE); without maps and backgrounds upright on white."""
        glyphs = self.pixels[STYLES.index(style), indices].float() / 255
        maps = IDENTITY.expand(len(indices), 2, 3) if maps is None else maps
        return compose(glyphs, maps, backgrounds or ["white"] * len(indices))


@dataclass(frozen=True)
class Variant:
    """One training picture: which glyph, on which background, which of its copies (0 is upright, the others are
    jittered).
    """

    concept: int
    style: str
    background: str
    copy: int


def variants(
    concepts: list[Concept], styles: tuple[str, ...], everything: bool = False, copies: int = 1
) -> list[Variant]:
    """Training pictures in some styles, copy by copy; with `everything` also the held-out pairs."""
    return [
        Variant(i, style, background, copy)
        for style in styles
        for copy in range(copies)
        for i, c in enumerate(concepts)
        if everything or not held_out(c.code, "style", style)
        for background in BACKGROUNDS
        if everything or not held_out(c.code, "background", background)
    ]


def draw(glyphs: Glyphs, chosen: list[Variant], seed: int = 0, wild: bool = False) -> Tensor:
    """The pictures of some variants, (B, 3, SIZE, SIZE).

    A variant always gets the same geometry for a seed, and a copy has one geometry on all backgrounds:
    with one of its own on each, a network has six times as many shapes to learn and learns none of them.
    Copy 0 is upright unless `wild`.
    """
    maps = torch.cat(
        [
            IDENTITY
            if v.copy == 0 and not wild
            else jitter(seeded(seed, int(glyphs.concepts[v.concept].code, 16), STYLES.index(v.style), v.copy), 1, wild)
            for v in chosen
        ]
    )
    pixels = torch.stack([glyphs.pixels[STYLES.index(v.style), v.concept] for v in chosen]).float() / 255
    return compose(pixels, maps, [v.background for v in chosen])


def write_names(models: Path, concepts: list[Concept]) -> None:
    """The names of the concepts by code point, for those who use the weights without the graphics."""
    table = json.dumps({c.code: c.name for c in concepts}, indent=0)
    models.mkdir(parents=True, exist_ok=True)
    (models / "concepts.json").write_text(table + "\n")


def load_glyphs(folder: Path) -> Glyphs:
    path = folder / "glyphs.safetensors"
    if not path.exists():
        raise ValueError(f"{path} is missing; make it with `python -m train.emoji.data`")
    with safe_open(path, framework="pt") as f:
        concepts = [Concept(**{**c, "tags": tuple(c["tags"])}) for c in json.loads(f.metadata()["concepts"])]
        return Glyphs(concepts, f.get_tensor("pixels"))


@plain_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, training=False)
    args = parser.parse_args()
    cache = args.runs / "sources"
    for what in ("names", *STYLES):
        fetch(what, cache)
    concepts = read_concepts(cache)
    pixels = torch.empty(len(STYLES), len(concepts), 4, 256, 256, dtype=torch.uint8)
    for s, style in enumerate(STYLES):
        progress = Progress(f"rendering {style}", len(concepts))
        for i, svg in enumerate(read_graphics(style, [c.code for c in concepts], cache).values()):
            pixels[s, i] = (render(svg) * 255).round().to(torch.uint8)
            progress.show(i + 1)
        progress.end()
    glyphs = Glyphs(concepts, pixels)
    write_file(
        args.runs / "glyphs.safetensors", {"pixels": pixels}, {"concepts": json.dumps([asdict(c) for c in concepts])}
    )
    write_names(args.models, concepts)
    for style in STYLES:
        save_grid(
            args.runs / f"glyphs-{style}.png", glyphs.pictures(style, list(range(len(concepts)))), columns=24, scale=0.5
        )
    print(f"{len(concepts)} concepts; {len(variants(concepts, STYLES[:2]))} training pictures of noto and twemoji")


if __name__ == "__main__":
    main()
