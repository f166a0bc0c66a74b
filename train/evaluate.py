"""How good a product is.

    python -m train.evaluate emoji runs/emoji-m2/emoji-m2.safetensors runs/emoji-tiny/emoji-tiny.safetensors
    accelerate launch -m train.evaluate sd my-m2.safetensors --models stable-diffusion-v1-5/ --prompts coco/metadata.csv
    --real coco/val2014

emoji: against the teacher, or with --on openmoji against the finetune, on the same inputs and from the same noises
(train/emoji/compare.py). sd: BK-SDM's protocol (train/coco.py), over all processes; without a product, the
original. The same command goes on where it stopped; other settings want another --out. Ends in a JSON file and a
picture there.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from torchvision.transforms.functional import to_tensor

from . import coco
from .emoji.compare import Judge, named
from .emoji.training import plain_errors, save_grid
from .settings import digest, same_folder
from .stages import assembled, open_product

SHOWN = 16


def emoji(args: argparse.Namespace) -> None:
    """The products and the host itself, each row below the one before in the picture."""
    torch.set_num_threads(args.threads)
    judge = Judge(args.on, args.out, args.runs, args.family, args.prompts, args.steps, args.cfg, args.comfy)

    def load(path: Path) -> nn.Module:
        return assembled(judge.whole, path)

    for path in args.products:
        open_product(path)  # better asked before the work than after it
    networks = {"whole": lambda: judge.whole} | {named(path): partial(load, path) for path in args.products}
    rows = [judge.measure(name, network, args.rounds) for name, network in networks.items()]
    (args.out / f"evaluation-{args.on}.json").write_text(json.dumps(rows, indent=1) + "\n")
    pictures = [judge.pictures(name, network, 0)["images"] for name, network in networks.items()]
    every = max(1, len(pictures[0]) // SHOWN)
    save_grid(args.out / f"evaluation-{args.on}.png", torch.cat([x[::every][:SHOWN] for x in pictures]), columns=SHOWN)
    for row in rows:
        print(
            " ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                for k, v in row.items()
                if not isinstance(v, dict)
            )
        )


def sd(args: argparse.Namespace) -> None:
    coco.libraries()
    accelerator = Accelerator(cpu=args.cpu)
    prompts = coco.read_prompts(args.prompts, args.limit)
    folder = args.out / (named(args.product) if args.product else "whole")
    pipeline = coco.load_pipeline(args.models, args.product, accelerator.device)
    if accelerator.is_main_process:  # once it is known that pictures can be drawn
        folder.mkdir(parents=True, exist_ok=True)
        same_folder(
            folder,
            {
                "models": str(args.models.resolve()),
                "pictures": len(prompts),
                "hash of the prompts": digest(prompts),
                "steps": args.steps,
                "cfg": args.cfg,
            },
        )
    accelerator.wait_for_everyone()
    coco.generate(pipeline, prompts, folder, accelerator, args.batch, args.steps, args.cfg)
    del pipeline
    row = {"network": folder.name, "steps": args.steps, "cfg": args.cfg} | coco.scores(
        prompts, folder, args.real, accelerator
    )
    if accelerator.is_main_process:
        (args.out / f"{folder.name}.json").write_text(json.dumps(row, indent=1) + "\n")
        files = sorted(folder.glob("*.jpg"))[:SHOWN]
        save_grid(
            args.out / f"{folder.name}.png", torch.stack([to_tensor(Image.open(file)) for file in files]), columns=4
        )
        print(json.dumps(row))


@plain_errors
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(required=True, metavar="emoji|sd")
    family = kinds.add_parser("emoji", help="against the emoji family's teacher")
    family.add_argument("products", type=Path, nargs="*", help="packs and pruned UNets")
    family.add_argument(
        "--on", choices=("teacher", "openmoji"), default="teacher", help="the network packs are played in"
    )
    family.add_argument(
        "--runs", type=Path, default=Path("runs/emoji"), help="folder of the family's glyphs and latents"
    )
    family.add_argument("--family", type=Path, default=Path("models/emoji"), help="folder of the family's weights")
    family.add_argument("--comfy", help="ComfyUI folder, for the CLIP tokeniser")
    family.add_argument("--prompts", type=int, default=360)
    family.add_argument(
        "--rounds",
        type=int,
        default=1,
        help="noises of each prompt; from 65 pictures in all on there is a Frechet distance",
    )
    family.add_argument("--steps", type=int, default=20)
    family.add_argument("--cfg", type=float, default=3.0)
    family.add_argument("--threads", type=int, default=1)
    family.set_defaults(evaluate=emoji)
    real = kinds.add_parser("sd", help="BK-SDM's protocol on MS-COCO")
    real.add_argument("product", type=Path, nargs="?", help="a pack or a pruned UNet; none: the original")
    real.add_argument("--models", type=Path, required=True, help="diffusers folder of the original")
    real.add_argument("--prompts", type=Path, required=True, help="metadata.csv with a column text")
    real.add_argument("--real", type=Path, required=True, help="folder of the real pictures at 256 px")
    real.add_argument(
        "--limit",
        type=int,
        help="only the first so many prompts; not comparable with the published numbers, and each number wants its "
        "own --out",
    )
    real.add_argument("--batch", type=int, default=1)
    real.add_argument("--steps", type=int, default=25)
    real.add_argument("--cfg", type=float, default=7.5)
    real.add_argument("--cpu", action="store_true")
    real.set_defaults(evaluate=sd)
    for kind in (family, real):
        kind.add_argument("--out", type=Path, default=Path("runs/evaluation"))
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    args.evaluate(args)


if __name__ == "__main__":
    main()
