"""Pictures with captions, encoded once into a cache of latents and text states.

    python -m train.encode photos/ data/sd15-latents --models stable-diffusion-v1-5/

Captions come from metadata.jsonl or metadata.csv in the folder (columns file_name and text; in JSON, text may
be a list of captions), or from a .txt or .caption file beside each picture. --models is a checkpoint of SD1.5 or SDXL,
or a diffusers folder; nothing is downloaded. The same command goes on where it stopped; other pictures,
captions or models want another folder. A picture that cannot be read is named and left out.
"""

from __future__ import annotations

import argparse
import struct
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from asdm_core.tensor_file import read_header, write_file

from .buckets import STEP, Shape, nearest
from .captions import Captioned, captioned
from .progress import Progress, plain_errors
from .encoders import ROWS, Text, ToLatents, ToText, latents_of, load_text, load_vae
from .provenance import ENCODERS, contents, digest, made, same_file

BROKEN = (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError)  # what a broken picture raises
SHARD = 4096  # pictures in a file: 130 MB of SD1.5's latents and 480 MB of its text states


def read_picture(file: Path | BinaryIO, shape: Shape, flip: bool = False) -> tuple[Tensor, Tensor]:
    """A picture as (3, H, W) in [-1, 1]: bilinear to `shape` (width, height) or larger, cropped about its centre, as
    BK-SDM does; mirrored where `flip`.

    And SDXL's sizes of it, (6,): height and width as it was, top and left of the crop, height and width wanted. Raises
    one of BROKEN.
    """
    with Image.open(file) as opened:
        picture = ImageOps.exif_transpose(opened).convert("RGB")
    width, height = picture.size
    scale = max(shape[0] / width, shape[1] / height)
    crop = [max(0, round(scale * side) - wanted) // 2 for side, wanted in ((height, shape[1]), (width, shape[0]))]
    picture = ImageOps.fit(picture, shape, Image.Resampling.BILINEAR)
    if flip:
        picture = ImageOps.mirror(picture)
    return (
        torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1,
        torch.tensor([height, width, *crop, shape[1], shape[0]], dtype=torch.float32),
    )


def shape_of(path: Path, size: int) -> Shape:
    """The shape of a picture's bucket; of one that cannot be read, the square."""
    try:
        with Image.open(path) as opened:
            turned = opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            width, height = opened.size[::-1] if turned else opened.size
    except BROKEN:
        return size, size
    return nearest(size, width, height)


def shapes_of(paths: Sequence[Path], size: int, threads: int = 8) -> list[Shape]:
    """The same of many."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda path: shape_of(path, size), paths))


class Part(NamedTuple):
    """One file of a cache, with pictures of one shape."""

    path: Path
    shape: Shape
    pictures: Sequence[Captioned]


def parts_of(pictures: Sequence[Captioned], out: Path, size: int, shard: int, buckets: bool) -> list[Part]:
    """The files of a cache in the folder `out`, each of at most `shard` pictures."""
    shapes = shapes_of([file for file, _ in pictures], size) if buckets else [(size, size)] * len(pictures)
    found = []
    for shape in sorted(set(shapes)):
        mine = [picture for picture, its in zip(pictures, shapes, strict=True) if its == shape]
        prefix = f"{shape[0]}x{shape[1]}-" if buckets else ""
        for first in range(0, len(mine), shard):
            path = out / f"{prefix}{first // shard:05d}.safetensors"
            found.append(Part(path, shape, mine[first : first + shard]))
    return found


def encode(
    pictures: Sequence[Captioned],
    out: Path,
    size: int,
    to_latents: ToLatents,
    to_text: ToText,
    batch: int = 8,
    shard: int = SHARD,
    models: str = "",
    buckets: bool = False,
    flip: bool = False,
    reading: Mapping[str, str | int] = MappingProxyType({}),
) -> list[Path]:
    """Write the cache (train/data.py) into the folder `out`, which may hold a part of it. Returns the pictures that
    could not be read.

    to_latents: pictures (B, 3, H, W) in [-1, 1] -> latents as the UNet sees them; to_text: B captions -> their
    states. models: what they are called. buckets: whether pictures keep their aspect ratio (train/buckets.py), a file
    for each shape. flip: whether mirrored ones are encoded as well. reading: how captions are read, beside the models.
    Raises ValueError where the folder holds what was made from other pictures, captions or models, or at another size.
    """
    out.mkdir(parents=True, exist_ok=True)
    parts = parts_of(pictures, out, size, shard, buckets)
    made_with = {
        part.path: {
            "hash of the pictures' names and captions": digest([(file.name, given) for file, given in part.pictures]),
            "size": size,
            "models": models,
            "clip skip": getattr(to_text, "clip_skip", 0),
            "mirrored": flip,
            **reading,
        }
        for part in parts
    }
    for path in sorted(out.glob("*.safetensors")):
        same_file(
            path, made_with.get(path, {}), "delete it and those after it to have them made anew, or give another folder"
        )
    progress, done = Progress("encoding", len(pictures)), 0
    broken: list[Path] = []
    empty = to_text([""])
    for part in parts:
        if not part.path.exists():
            each = partial(_show, progress, done)
            latents, captions, lost = _latents(part, to_latents, batch, flip, each)
            broken += lost
            if captions:
                sizes = latents.pop("sizes")
                tensors = latents | _states(captions, to_text, empty, batch)
                tensors |= {"sizes": sizes} if empty.pooled is not None else {}
                write_file(part.path, tensors, made(made_with[part.path]))
        done += len(part.pictures)
    progress.end()
    return broken


def _show(progress: Progress, before: int, n: int) -> None:
    progress.show(before + n)


def _latents(
    part: Part, to_latents: ToLatents, batch: int, flip: bool, each: Callable[[int], None]
) -> tuple[dict[str, Tensor], list[list[str]], list[Path]]:
    """The latents of a part, of the mirrored pictures where `flip`, and the sizes before the crop; the captions of each
    picture; those pictures that could not be read. each: is told how many are done.
    """
    latents: list[Tensor] = []
    mirrored: list[Tensor] = []
    sizes: list[Tensor] = []
    captions: list[list[str]] = []
    broken: list[Path] = []
    for at in range(0, len(part.pictures), batch):
        readable = []
        for file, given in part.pictures[at : at + batch]:
            try:
                readable.append(read_picture(file, part.shape))
            except BROKEN as e:
                broken.append(file)
                print(f"left out {file}: {e}", flush=True)
                continue
            captions.append(given)
        if readable:
            stacked = torch.stack([picture for picture, _ in readable])
            latents.append(to_latents(stacked).half().cpu())
            if flip:
                mirrored.append(to_latents(stacked.flip(-1)).half().cpu())
            sizes += [shape for _, shape in readable]
        each(min(at + batch, len(part.pictures)))
    found = {"latents": torch.cat(latents), "sizes": torch.stack(sizes)} if latents else {}
    return found | ({"mirrored": torch.cat(mirrored)} if mirrored else {}), captions, broken


def _states(captions: Sequence[Sequence[str]], to_text: ToText, empty: Text, batch: int) -> dict[str, Tensor]:
    """The states of all captions, and which of them belong to each picture, as the cache holds them."""
    texts = [text for given in captions for text in given]
    most, first, of_each = max(map(len, captions)), 0, []
    for given in captions:  # of fewer than others a picture has some several times
        of_each.append([first + i * len(given) // most for i in range(most)])
        first += len(given)
    # Captions of several rows lie as rows of the empty caption's length, one after the other.
    length = empty.states.shape[1]
    found = []
    for i in range(0, len(texts), batch):
        text = to_text(texts[i : i + batch])
        found += [text] if text.states.shape[1] == length else [to_text([t]) for t in texts[i : i + batch]]
    counts = torch.tensor([f.states.shape[1] // length for f in found for _ in f.states])
    states = torch.cat([f.states.half().cpu().unflatten(1, (-1, length)).flatten(0, 1) for f in found])
    if not states.isfinite().all():
        row = int((~states.flatten(1).isfinite().all(1)).nonzero()[0])
        its = texts[int(torch.searchsorted(counts.cumsum(0), row, right=True))]
        raise ValueError(
            f"{its!r:.200}: for this caption the text encoder gives numbers that half precision does not hold. A "
            "number in parentheses is a weight, as in ComfyUI; \\( and \\) are plain ones"
        )
    tensors = {
        "captions": torch.tensor(of_each),
        "states": states,
        "empty": empty.states[0].half().cpu(),
    }
    if counts.max() > 1:
        tensors["rows"] = torch.stack([counts.cumsum(0) - counts, counts], 1)
    if empty.pooled is not None:
        tensors["pooled"] = torch.cat([f.pooled.half().cpu() for f in found if f.pooled is not None])
        tensors["empty_pooled"] = empty.pooled[0].half().cpu()
    return tensors


@plain_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.encode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", type=Path, help="folder of pictures with captions")
    parser.add_argument("cache", type=Path, help="folder to write, the data.path of a recipe")
    parser.add_argument(
        "--models", type=Path, required=True, help="checkpoint or diffusers folder with the VAE and the text encoder"
    )
    parser.add_argument("--size", type=int, default=512, help="pixels, square")
    parser.add_argument(
        "--buckets", action="store_true", help="keep the aspect ratio, in shapes of about the area of the square"
    )
    parser.add_argument("--flip", action="store_true", help="encode each picture mirrored as well")
    parser.add_argument("--tokenizer", default="", help="folder of CLIP's vocabulary, where the models have none")
    parser.add_argument(
        "--clip-skip", type=int, default=0, help="layer of the text encoder from its end; 0: as the model has it"
    )
    parser.add_argument("--rows", type=int, default=ROWS, help="the most of a caption, each of 75 tokens")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    for name, least in (("batch", 1), ("rows", 1), ("clip_skip", 0)):
        if getattr(args, name) < least:
            raise ValueError(
                f"--{name.replace('_', '-')}: wanted a whole number of at least {least}, got {getattr(args, name)}"
            )
    step = STEP if args.buckets else 8
    if args.size < step or args.size % step:
        raise ValueError(f"--size: wanted a multiple of {step} pixels, got {args.size}")
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: torch finds no CUDA card here; leave it out, or give cpu")
    to_text = load_text(args.models, args.tokenizer, args.device, args.clip_skip, args.rows)
    broken = encode(
        captioned(args.pictures),
        args.cache,
        args.size,
        latents_of(load_vae(args.models, args.device)),
        to_text,
        args.batch,
        models=contents(args.models, ENCODERS),
        buckets=args.buckets,
        flip=args.flip,
        reading={"tokenizer": contents(args.tokenizer) if args.tokenizer else "", "rows": args.rows},
    )
    caches = (read_header(path).tensors for path in args.cache.glob("*.safetensors"))
    held = sum(tensors["latents"][1][0] for tensors in caches if "latents" in tensors)
    print(f"{held} pictures in {args.cache}" + (f"; {len(broken)} could not be read" if broken else ""))


if __name__ == "__main__":
    main()
