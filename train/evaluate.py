"""How good a product is, by BK-SDM's protocol on MS-COCO (train/coco.py).

    accelerate launch -m train.evaluate my-m2.safetensors --models stable-diffusion-v1-5/ --prompts coco/metadata.csv
    --real coco/val2014

Over all processes; without a product, the original. The same command goes on where it stopped; other settings want
another --out. What the libraries must download is said before anything is drawn. Ends in a JSON file and a picture
there, and in scores.md, all of them above the published ones (train/published.py). `python -m train.coco` makes the
real pictures. Products of the emoji family: `python -m train.emoji.protocol`, and with more numbers
`train.emoji.compare`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torchvision.transforms.functional import to_tensor

from . import coco
from .figures import save_grid
from .progress import plain_errors
from .provenance import ENCODERS, NETWORK, contents, digest, named, same_folder
from .published import beside

SHOWN = 16


def evaluate(args: argparse.Namespace, judge: coco.Inception) -> None:
    judge.check(args.download)
    coco.check_real(args.real)
    accelerator = Accelerator(cpu=args.cpu)
    prompts = coco.read_prompts(args.prompts, args.limit)
    folder = args.out / (named(args.product) if args.product else "whole")
    pipeline = judge.pipeline(args.models, args.product, accelerator.device)
    if accelerator.is_main_process:  # once it is known that pictures can be drawn
        folder.mkdir(parents=True, exist_ok=True)
        same_folder(
            folder,
            {
                "models": contents(args.models, (*NETWORK, *ENCODERS)),
                "pictures": len(prompts),
                "hash of the prompts": digest(prompts),
                "steps": args.steps,
                "cfg": args.cfg,
            },
        )
    accelerator.wait_for_everyone()
    coco.generate(pipeline, prompts, folder, accelerator, args.batch, args.steps, args.cfg)
    row = {"network": folder.name, "steps": args.steps, "cfg": args.cfg, "parameters": coco.parameters(pipeline)}
    del pipeline
    row |= coco.scores(prompts, folder, args.real, accelerator, judge)
    if accelerator.is_main_process:
        (args.out / f"{folder.name}.json").write_text(json.dumps(row, indent=1) + "\n")
        rows = [json.loads(path.read_text()) for path in sorted(args.out.glob("*.json"))]
        (args.out / "scores.md").write_text(beside([r for r in rows if "fid" in r], judge.note))
        files = sorted(folder.glob("*.jpg"))[:SHOWN]
        save_grid(
            args.out / f"{folder.name}.png", torch.stack([to_tensor(Image.open(file)) for file in files]), columns=4
        )
        print(json.dumps(row))


@plain_errors
def main(arguments: list[str] | None = None, judge: coco.Inception | None = None) -> None:
    """judge: what scores in the place of Inception and CLIP (train/emoji/protocol.py)."""
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("product", type=Path, nargs="?", help="a pack or a pruned UNet; none: the original")
    parser.add_argument("--models", type=Path, required=True, help="diffusers folder of the original")
    parser.add_argument("--prompts", type=Path, required=True, help="metadata.csv with a column text")
    parser.add_argument("--real", type=Path, required=True, help="folder of the real pictures at 256 px")
    parser.add_argument(
        "--limit",
        type=int,
        help="only the first so many prompts; not comparable with the published numbers, and each number wants its "
        "own --out",
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--cfg", type=float, default=7.5)
    parser.add_argument("--download", action="store_true", help="let the libraries fetch the weights they lack")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/evaluation"))
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    evaluate(args, judge or coco.Inception())


if __name__ == "__main__":
    main()
