"""The one-style finetune: the teacher trained on with OpenMoji, a style it never saw.

    python -m train.emoji.finetune --minutes 15

The text encoder stays as it is, as in most finetunes of SD1.5.
"""

from __future__ import annotations

import argparse

import torch

from .data import load_glyphs
from .latents import load_latents
from .teacher import Batches, add_unet_arguments, provenance, train
from .text import Tokens, host_folder, load_text
from .training import add_common_arguments, start
from ..progress import plain_errors
from .unet import load_unet, save_unet

STYLE = ("openmoji",)
LICENCE = "CC-BY-SA-4.0"  # OpenMoji is share-alike


@plain_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    add_unet_arguments(parser)
    parser.set_defaults(lr=4e-4, batch=16, ema=0.99, pooled_samples=0)
    args = parser.parse_args()
    start(args)
    torch.manual_seed(args.seed)
    glyphs = load_glyphs(args.runs)
    encoder = load_text(args.models / "emoji-text.safetensors")
    tokens = Tokens(host_folder(args.host), ids=encoder.ids.tolist())
    data = load_latents(args.runs, glyphs, STYLE)
    batches = Batches(glyphs, data, tokens, args.seed + 1)
    unet = load_unet(args.models / "emoji-teacher.safetensors")
    unet, _, run = train(args, "openmoji", unet, encoder, batches, STYLE, joint=False)
    training = provenance(args, run) | {
        "data": "OpenMoji",
        "from": "emoji-teacher.safetensors",
        "concepts": len(glyphs.concepts),
    }
    save_unet(args.models / "emoji-openmoji.safetensors", unet, LICENCE, training)
    print("wrote emoji-openmoji.safetensors")


if __name__ == "__main__":
    main()
