"""Two or more MODELs or pictures side by side: what is compared, in words, drawn, and for the view in the browser."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import nodes as host_nodes
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ...asdm_core import measure
from ...asdm_core.pictures import CELL, HEAT_HEAD, Row, duration, grid, heat_map, likeness
from .on_model import without_techniques
from .picture import coloured, from_image
from .technique import techniques_of

NAMES = "ABCDEFGH"
LARGEST_CELL = 512
ORIGINAL = "original"  # the name of a MODEL without anything of asdm


# What is compared -----------------------------------------------------------------------------------


def original_of(model):
    """A clone of MODEL without anything that asdm's nodes put on it."""
    return without_techniques(model)


def techniques(model) -> str:
    """What asdm's nodes put on a MODEL, in a few words; ORIGINAL for nothing."""
    within_first = sorted(techniques_of(model), key=lambda technique: technique.outermost)
    return " + ".join(filter(None, (technique.label() for technique in within_first))) or ORIGINAL


@dataclass(frozen=True)
class Sampling:
    """What a KSampler is set to: the inputs of `common.sampling_inputs`."""

    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float

    def of(self, positive: list, negative: list, latent_image: dict) -> Callable[[Any], dict]:
        """What KSampler makes of these, a LATENT, as a function of the MODEL."""
        return lambda model: host_nodes.common_ksampler(  # type: ignore[attr-defined]  # ComfyUI's module of that name
            model,
            self.seed,
            self.steps,
            self.cfg,
            self.sampler_name,
            self.scheduler,
            positive,
            negative,
            latent_image,
            denoise=self.denoise,
        )[0]

    def __str__(self) -> str:
        return f"{self.steps} steps, CFG {self.cfg:g}, {self.sampler_name}, {self.scheduler}"

    def facts(self, model, images: torch.Tensor, rounds: int) -> dict[str, Any]:
        """How these pictures were made, for a report."""
        made = {"height": images.shape[1], "width": images.shape[2], "batch_size": len(images), "rounds": rounds}
        return asdict(self) | made | {"device": str(model.load_device), "torch": torch.__version__}


def decode(vae, latent: dict) -> torch.Tensor:
    return host_nodes.VAEDecode().decode(vae, latent)[0]  # type: ignore[attr-defined]  # ComfyUI's module of that name


# Texts and pictures -----------------------------------------------------------------------------------


def alike(a: torch.Tensor, b: torch.Tensor) -> list[tuple[float, float] | None]:
    """PSNR and SSIM of each pair of two IMAGEs; None for all where their sizes differ, SSIM nan for pictures too small
    for it.

    Of a shorter batch the last picture stands for those it lacks.
    """
    if a.shape[1:3] != b.shape[1:3]:
        return [None] * max(len(a), len(b))
    found: list[tuple[float, float] | None] = []
    for i in range(max(len(a), len(b))):  # one by one: of a film they would take the memory of a dozen of it
        pair = [t[[min(i, len(t) - 1)], ..., :3].movedim(-1, 1) for t in (a, b)]
        small = min(a.shape[1:3]) < measure.SSIM_WINDOW
        found.append((float(measure.psnr(*pair)), math.nan if small else float(measure.ssim(*pair))))
    return found


def paired(images: torch.Tensor, count: int) -> torch.Tensor:
    """A batch as long as `count`: its last picture stands for those it lacks."""
    return images[[min(i, len(images) - 1) for i in range(count)]]


def in_words(pair: tuple[float, float] | None) -> str:
    return "sizes differ" if pair is None else likeness(*pair)


def faster(before: float, after: float) -> str:
    """Two times in words: "1.62x, 3.1 s to 1.9 s"."""
    return f"{before / after:.2f}x, {duration(before)} to {duration(after)}"


def cell_of(images: torch.Tensor) -> tuple[int, int]:
    """Size of a cell for pictures of an IMAGE: as large as they are, within limits that leave room for labels."""
    height, width = images.shape[1:3]
    scale = min(max(max(height, width), CELL), LARGEST_CELL) / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def draw(title: str, subtitle: str, labels: list[str], batches: list[torch.Tensor]) -> Image.Image:
    """All batches side by side, one line per picture. Two of one size get a heat-map; more than two their likeness to
    the first below.
    """
    count = max(map(len, batches))
    columns = [[from_image(picture) for picture in paired(batch, count)] for batch in batches]
    likenesses = [[in_words(pair) for pair in alike(batches[0], batch)] for batch in batches[1:]]
    heads, pair = [f"{name}  {label}".rstrip() for name, label in zip(NAMES, labels, strict=False)], len(batches) == 2
    with_heat = pair and batches[0].shape[1:3] == batches[1].shape[1:3]
    rows = []
    for i, pictures in enumerate(zip(*columns, strict=True)):
        caption = f"{i + 1} of {count}" if count > 1 else ""
        notes = [of[min(i, len(of) - 1)] for of in likenesses]
        if pair:
            rows.append(Row((*pictures, heat_map(*pictures)) if with_heat else pictures, caption, notes[0]))
        else:
            rows.append(Row(pictures, caption, notes=["", *notes]))
    return grid(title, subtitle, [*heads, HEAT_HEAD] if with_heat else heads, rows, cell_of(batches[0]))


def view(cls, title: str, labels: list[str], batches: list[torch.Tensor]) -> dict:
    """What web/compare.js shows: the pictures, saved with the workflow in them, their labels and likenesses."""
    # A name of its own for each result: browsers keep the picture of an address that a page has shown already, and the
    # host counts from 1 again after a restart.
    own = secrets.token_hex(4)
    saved = [
        ui.ImageSaveHelper.save_images(
            coloured(batch), f"asdm.compare.{own}.{name}", io.FolderType.temp, cls, compress_level=1
        )
        for name, batch in zip(NAMES, batches, strict=False)
    ]
    likenesses = {
        f"{i}{j}": [in_words(pair) for pair in alike(batches[i], batches[j])]
        for j in range(len(batches))
        for i in range(j)
    }
    return {"asdm_compare": ({"title": title, "labels": labels, "batches": saved, "likeness": likenesses},)}
