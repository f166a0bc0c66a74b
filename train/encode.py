"""Pictures with captions, encoded once into a cache of latents and text states.

    python -m train.encode photos/ data/sd15-latents --models stable-diffusion-v1-5/

Captions come from metadata.jsonl or metadata.csv in the folder (columns file_name and text; in JSON, text may
be a list of captions), or from a .txt or .caption file beside each picture. --models is a diffusers folder with vae,
text_encoder and tokenizer; nothing is downloaded. The same command goes on where it stopped; other pictures,
captions or models want another folder. A picture that cannot be read is named and left out.
"""

from __future__ import annotations

import argparse
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from asdm_core.packs import read_header, write_file

from .captions import captioned
from .progress import Progress, plain_errors
from .encoders import ToLatents, ToText, latents_of, load_text, load_vae
from .provenance import ENCODERS, contents, digest, made, same_file

BROKEN = (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError)  # what a broken picture raises
SHARD = 4096  # pictures in a file: 130 MB of SD1.5's latents and 480 MB of its text states


def read_picture(file: Path | BinaryIO, size: int) -> tuple[Tensor, Tensor]:
    """A picture as (3, size, size) in [-1, 1]: bilinear to the shorter side, cropped about its centre, as BK-SDM does.

    And SDXL's sizes of it, (6,): height and width as it was, top and left of the crop, `size` twice. Raises one of
    BROKEN.
    """
    with Image.open(file) as opened:
        picture = ImageOps.exif_transpose(opened).convert("RGB")
    width, height = picture.size
    crop = [max(0, round(size * side / min(width, height)) - size) // 2 for side in (height, width)]
    picture = ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)
    return (
        torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1,
        torch.tensor([height, width, *crop, size, size], dtype=torch.float32),
    )


def encode(
    pictures: Sequence[tuple[Path, list[str]]],
    out: Path,
    size: int,
    to_latents: ToLatents,
    to_text: ToText,
    batch: int = 8,
    shard: int = SHARD,
    models: str = "",
) -> list[Path]:
    """Write the cache (train/data.py) into the folder `out`, which may hold a part of it. Returns the pictures that
    could not be read.

    to_latents: pictures (B, 3, size, size) in [-1, 1] -> latents as the UNet sees them; to_text: B captions -> their
    states. models: what they are called. Raises ValueError where the folder holds what was made from other pictures,
    captions or models, or at another size.
    """
    out.mkdir(parents=True, exist_ok=True)
    parts = {
        out / f"{first // shard:05d}.safetensors": pictures[first : first + shard]
        for first in range(0, len(pictures), shard)
    }
    made_with = {
        path: {
            "hash of the pictures' names and captions": digest([(file.name, given) for file, given in part]),
            "size": size,
            "models": models,
        }
        for path, part in parts.items()
    }
    for path in sorted(out.glob("*.safetensors")):
        same_file(
            path, made_with.get(path, {}), "delete it and those after it to have them made anew, or give another folder"
        )
    progress = Progress("encoding", len(pictures))
    done = 0
    broken = []
    empty = to_text([""])
    for path, part in parts.items():
        done += len(part)
        if path.exists():
            continue
        latents: list[Tensor] = []
        captions: list[range] = []
        texts: list[str] = []
        sizes: list[Tensor] = []
        for at in range(0, len(part), batch):
            readable = []
            for file, given in part[at : at + batch]:
                try:
                    readable.append(read_picture(file, size))
                except BROKEN as e:
                    broken.append(file)
                    print(f"left out {file}: {e}", flush=True)
                    continue
                captions.append(range(len(texts), len(texts) + len(given)))
                texts += given
            if readable:
                latents.append(to_latents(torch.stack([picture for picture, _ in readable])).half().cpu())
                sizes += [shape for _, shape in readable]
            progress.show(done - len(part) + min(at + batch, len(part)))
        if not latents:
            continue
        most = max(map(len, captions))
        rows = torch.tensor([[row[i * len(row) // most] for i in range(most)] for row in captions])
        found = [to_text(texts[i : i + batch]) for i in range(0, len(texts), batch)]
        tensors = {
            "latents": torch.cat(latents),
            "captions": rows,
            "states": torch.cat([f.states.half().cpu() for f in found]),
            "empty": empty.states[0].half().cpu(),
        }
        if empty.pooled is not None:
            tensors |= {
                "pooled": torch.cat([f.pooled.half().cpu() for f in found if f.pooled is not None]),
                "empty_pooled": empty.pooled[0].half().cpu(),
                "sizes": torch.stack(sizes),
            }
        write_file(path, tensors, made(made_with[path]))
    progress.end()
    return broken


@plain_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.encode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", type=Path, help="folder of pictures with captions")
    parser.add_argument("cache", type=Path, help="folder to write, the data.path of a recipe")
    parser.add_argument("--models", type=Path, required=True, help="diffusers folder with the VAE and the text encoder")
    parser.add_argument("--size", type=int, default=512, help="pixels, square")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    broken = encode(
        captioned(args.pictures),
        args.cache,
        args.size,
        latents_of(load_vae(args.models, args.device)),
        load_text(args.models, device=args.device),
        args.batch,
        models=contents(args.models, ENCODERS),
    )
    caches = (read_header(path).tensors for path in args.cache.glob("*.safetensors"))
    held = sum(tensors["latents"][1][0] for tensors in caches if "latents" in tensors)
    print(f"{held} pictures in {args.cache}" + (f"; {len(broken)} could not be read" if broken else ""))


if __name__ == "__main__":
    main()
