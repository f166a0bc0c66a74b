"""The protocol BK-SDM measures with (arXiv 2305.15798; scripts/eval_scores.sh): FID, IS and CLIP score on MS-COCO.

30,000 fixed prompts of the 2014 validation set, one picture each: 512 px, PNDM, 25 steps, guidance 7.5, saved as JPEG,
then resized (bicubic) to 256 px and saved as JPEG again. FID against the pictures of that set, all squeezed to 256 px
the same way; IS of the same folder; CLIP score as the mean cosine of ViT-g-14. FID falls with the number of pictures:
5,000 are never compared with 30,000.

Where the protocol draws all noises from one generator, here each picture has its own, by its number: only so can
several processes share the work, and a stopped run go on.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from .captions import SUFFIXES, read_text
from .progress import Progress, plain_errors
from .seeds import seeded
from .networks import assembled

SIZE = 256
CLIP = ("ViT-g-14", "laion2b_s34b_b88k")
LIBRARIES = {"cleanfid": "clean-fid", "torch_fidelity": "torch-fidelity", "open_clip": "open_clip_torch"}


def libraries() -> tuple:
    """clean-fid's module fid, torch_fidelity, open_clip. Raises ValueError, which names all that are missing."""
    missing = [package for module, package in LIBRARIES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(f"FID, IS and CLIP score need {', '.join(missing)}: pip install {' '.join(missing)}")
    return (
        importlib.import_module("cleanfid.fid"),
        importlib.import_module("torch_fidelity"),
        importlib.import_module("open_clip"),
    )


WEIGHTS = {  # of the libraries, in torch's cache of downloads: what for, and whence
    "pt_inception-2015-12-05-6726825d.pth": ("FID", "https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights"),
    "weights-inception-2015-12-05-6726825d.pth": ("IS", "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0"),
}
CLIP_REPOSITORY = "laion/CLIP-ViT-g-14-laion2B-s34B-b88K"
CLIP_FILES = ("open_clip_pytorch_model.bin", "open_clip_model.safetensors", "model.safetensors")


def downloads() -> list[str]:
    """What the libraries would download before they can score, a line each."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    found = [
        f"{name} for {what}, from {whence}, into {folder}"
        for name, (what, whence) in WEIGHTS.items()
        if not (folder / name).is_file()
    ]
    if not any(isinstance(try_to_load_from_cache(CLIP_REPOSITORY, name), str) for name in CLIP_FILES):
        found.append(f"{CLIP[0]} ({CLIP[1]}) for the CLIP score: hf download {CLIP_REPOSITORY}")
    return found


def check_real(real: Path) -> None:
    """Raise ValueError where the real pictures are not there, or not at the protocol's size."""
    files = sorted(real.glob("*.jpg")) if real.is_dir() else []
    if not files:
        raise ValueError(
            f"{real} is no folder of pictures; wanted those of COCO's 2014 validation set at {SIZE} px. Download "
            f"val2014.zip (http://images.cocodataset.org/zips/val2014.zip), unpack it, and python -m train.coco "
            f"val2014/ {real}"
        )
    with Image.open(files[0]) as first:
        if first.size != (SIZE, SIZE):
            raise ValueError(
                f"{files[0]} is {first.size[0]} x {first.size[1]}; wanted {SIZE} x {SIZE} px: python -m "
                f"train.coco {real} another-folder/"
            )


def real_pictures(source: Path, out: Path, names: Sequence[str] | None = None) -> int:
    """Squeeze pictures to SIZE as the protocol does, into `out`; what is there stays. Returns how many there are.

    names: file names of those to take; None: all. Raises ValueError where some are missing.
    """
    if names is None:
        paths = sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES)
    else:
        paths = [source / name for name in dict.fromkeys(names)]
        if missing := [p for p in paths if not p.is_file()]:
            raise ValueError(
                f"{source} lacks {len(missing)} of the list's {len(paths)} pictures, first {missing[0].name}"
            )
    if not paths:
        raise ValueError(f"{source} holds no pictures")
    same: dict[str, Path] = {}
    for path in paths:
        if (other := same.setdefault(path.stem, path)) != path:
            raise ValueError(f"{source}: {other.name} and {path.name} would both become {path.stem}.jpg; rename one")
    out.mkdir(parents=True, exist_ok=True)
    progress = Progress("real pictures", len(paths))
    for i, path in enumerate(paths):
        wanted = out / f"{path.stem}.jpg"
        if not wanted.exists():
            temporary = wanted.with_suffix(".part")
            with Image.open(path) as picture:
                squeezed = picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            squeezed.save(temporary, "JPEG")
            temporary.replace(wanted)
        progress.show(i + 1)
    progress.end()
    return len(paths)


def read_names(path: Path) -> list[str]:
    """The column file_name of a metadata.csv."""
    names = [row.get("file_name") or "" for row in csv.DictReader(io.StringIO(read_text(path), newline=""))]
    if not names or not all(names):
        raise ValueError(f"{path}: every row needs a picture in the column file_name")
    return names


def read_prompts(path: Path, limit: int | None = None) -> list[str]:
    """The column text of a metadata.csv, in its order. Raises ValueError where there is none."""
    try:
        texts = [row.get("text") or "" for row in csv.DictReader(io.StringIO(read_text(path), newline=""))]
    except OSError as e:
        raise ValueError(
            f"{path}: cannot be read ({e.strerror}); wanted BK-SDM's metadata.csv with a column text"
        ) from None
    if not texts or not all(texts):
        raise ValueError(f"{path}: every row needs a prompt in the column text")
    return texts[:limit]


def saved(picture: Image.Image, path: Path) -> None:
    """Write a picture as the protocol does: JPEG, bicubic to SIZE, JPEG again; whole or not at all."""
    first = io.BytesIO()
    picture.convert("RGB").save(first, "JPEG")
    temporary = path.with_suffix(".part")
    Image.open(first).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(temporary, "JPEG")
    temporary.replace(path)


def load_pipeline(models: Path, product: Path | None, device: torch.device):
    """The pipeline of a diffusers folder with PNDM and, where one is given, a product in its UNet; half precision on a
    GPU.

    The filter that blacks pictures out is off: it would be measured as well.
    """
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        models, local_files_only=True, safety_checker=None, requires_safety_checker=False
    )
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config, skip_prk_steps=True)
    if product is not None:
        pipeline.unet = assembled(pipeline.unet, product)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device, torch.float16 if device.type == "cuda" else torch.float32)


def generate(
    pipeline, prompts: Sequence[str], folder: Path, accelerator: Accelerator, batch: int, steps: int, cfg: float
) -> None:
    """Draw what is missing of one picture for each prompt; every process its share."""
    folder.mkdir(parents=True, exist_ok=True)
    mine = [
        i
        for i in range(accelerator.process_index, len(prompts), accelerator.num_processes)
        if not (folder / f"{i:06d}.jpg").exists()
    ]
    progress = Progress("pictures", len(mine))
    for at in range(0, len(mine), batch):
        numbers = mine[at : at + batch]
        pictures = pipeline(
            [prompts[i] for i in numbers],
            num_inference_steps=steps,
            guidance_scale=cfg,
            generator=[seeded(1234, i) for i in numbers],
        ).images
        for i, picture in zip(numbers, pictures, strict=True):
            saved(picture, folder / f"{i:06d}.jpg")
        progress.show(at + len(numbers))
    accelerator.wait_for_everyone()


class Inception:
    """What the protocol scores with: Inception's networks by clean-fid and torch-fidelity, CLIP by open_clip."""

    note = ""  # what the table says of one's own rows

    def check(self, download: bool) -> None:
        """Raise ValueError where something is not on this machine. download: whether the libraries may fetch it."""
        libraries()
        if not download and (wanted := downloads()):
            raise ValueError(
                "\n".join(
                    [
                        "the scores need what is not on this machine:",
                        *wanted,
                        "or let the libraries fetch it: --download",
                    ]
                )
            )

    def pipeline(self, models: Path, product: Path | None, device: torch.device) -> Any:
        return load_pipeline(models, product, device)

    def fid(self, folder: Path, real: Path, device: torch.device) -> float:
        # The mode that agrees with pytorch-fid, which the protocol uses; clean-fid's own resizing is not comparable.
        return libraries()[0].compute_fid(str(folder), str(real), mode="legacy_pytorch", device=device)

    def inception_score(self, folder: Path, device: torch.device) -> tuple[float, float]:
        """Mean and deviation over the splits."""
        metrics = libraries()[1].calculate_metrics(
            input1=str(folder), isc=True, cuda=device.type == "cuda", verbose=False
        )
        return metrics["inception_score_mean"], metrics["inception_score_std"]

    def sides(self, device: torch.device) -> Callable[[Sequence[Image.Image], Sequence[str]], tuple[Tensor, Tensor]]:
        """What makes vectors (B, D) of pictures and of their prompts, the cosine of which is the CLIP score."""
        open_clip = libraries()[2]
        model, _, transform = open_clip.create_model_and_transforms(CLIP[0], pretrained=CLIP[1])
        model = model.to(device).eval()
        tokenizer = open_clip.get_tokenizer(CLIP[0])

        def both(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
            seen = torch.stack([transform(picture) for picture in pictures]).to(device)
            return model.encode_image(seen), model.encode_text(tokenizer(list(prompts)).to(device))

        return both


@torch.no_grad()
def clip_score(
    judge: Inception, prompts: Sequence[str], folder: Path, accelerator: Accelerator, batch: int = 32
) -> float:
    """Mean cosine of picture and prompt; every process scores its share."""
    sides = judge.sides(accelerator.device)
    mine = range(accelerator.process_index, len(prompts), accelerator.num_processes)
    total = torch.zeros((), device=accelerator.device, dtype=torch.float64)
    for at in range(0, len(mine), batch):
        numbers = mine[at : at + batch]
        pictures = [Image.open(folder / f"{i:06d}.jpg").convert("RGB") for i in numbers]
        a, b = (
            torch.nn.functional.normalize(side.float(), dim=-1)
            for side in sides(pictures, [prompts[i] for i in numbers])
        )
        total += (a * b).sum()
    return float(accelerator.reduce(total)) / len(prompts)


def scores(
    prompts: Sequence[str], folder: Path, real: Path, accelerator: Accelerator, judge: Inception | None = None
) -> dict:
    """FID, IS and CLIP score of a folder of `generate` against a folder of real pictures, in all processes alike."""
    judge = judge or Inception()
    check_real(real)
    found = {"pictures": len(prompts), "clip": clip_score(judge, prompts, folder, accelerator)}
    if accelerator.is_main_process:
        found["fid"] = judge.fid(folder, real, accelerator.device)
        found["is"], found["is_std"] = judge.inception_score(folder, accelerator.device)
    accelerator.wait_for_everyone()
    return found


def parameters(pipeline: Any) -> int:
    """Of all networks of a pipeline, as BK-SDM's Table 1 counts them."""
    networks = [getattr(pipeline, name, None) for name in ("unet", "vae", "text_encoder")]
    return sum(p.numel() for net in networks if net is not None for p in net.parameters())


@plain_errors
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.coco", description="The real pictures of the protocol: squeezed to 256 x 256."
    )
    parser.add_argument("source", type=Path, help="folder of COCO's val2014")
    parser.add_argument("out", type=Path, help="folder to write, the --real of train.evaluate")
    parser.add_argument("--names", type=Path, help="metadata.csv with a column file_name: only these pictures")
    args = parser.parse_args(arguments)
    count = real_pictures(args.source, args.out, read_names(args.names) if args.names else None)
    print(f"{count} pictures of {SIZE} px in {args.out}")


if __name__ == "__main__":
    main()
