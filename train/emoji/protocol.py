"""The protocol of train.evaluate on the family: the same pictures, command and columns, the classifier in the place of
Inception and CLIP.

    python -m train.coco pictures/ real-256/
    python -m train.emoji.protocol models/emoji/emoji-m2.safetensors --models models/emoji --prompts metadata.csv
    --real real-256/ --steps 25 --cfg 3

FID is the Frechet distance of the classifier's 64 features, IS that of its classes, and the CLIP score the cosine of a
picture's features and the weights of the concept that its prompt names. Such numbers say nothing beside published ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import PNDMScheduler
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image, to_tensor

from asdm_core.tensor_file import read_header

from .. import coco
from ..diffusion import STEPS
from ..evaluate import main as evaluate
from ..metrics import frechet
from ..networks import assembled
from ..schedules import STANDARD
from .classifier import Classifier, load_classifier
from .codec import load_codec
from .teacher import codec_images
from .text import Tokens, host_folder, load_text
from .unet import load_unet

SPLITS = 10  # of the inception score, as torch-fidelity has it


class Pipeline:
    """Prompts to pictures of 128 px by PNDM, called as diffusers' pipelines are."""

    def __init__(self, models: Path, product: Path | None, device: torch.device):
        self.device = device
        self.unet: nn.Module = load_unet(models / "emoji-teacher.safetensors")
        if product is not None:
            self.unet = assembled(self.unet, product)
        nn.Module.to(self.unet, device)
        self.vae = load_codec(models).to(device)
        self.text_encoder = load_text(models / "emoji-text.safetensors").to(device)
        self.tokens = Tokens(host_folder(None), ids=self.text_encoder.ids.tolist())

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        num_inference_steps: int,
        guidance_scale: float,
        generator: Sequence[torch.Generator],
    ) -> SimpleNamespace:
        betas = {key: STANDARD[key] for key in ("beta_schedule", "beta_start", "beta_end")}
        scheduler: Any = PNDMScheduler(STEPS, **betas, skip_prk_steps=True, prediction_type="v_prediction")
        scheduler.set_timesteps(num_inference_steps)
        texts = list(prompts)
        if guidance_scale != 1:  # at 1 the picture without a prompt has no part in it
            texts += [""] * len(prompts)
        context = self.text_encoder(self.tokens(texts).to(self.device))
        x = torch.stack([torch.randn(4, 16, 16, generator=g) for g in generator]).to(self.device)
        for t in scheduler.timesteps:
            copies = len(texts) // len(prompts)
            seen = self.unet(x.repeat(copies, 1, 1, 1), t.expand(len(texts)).to(self.device), context).sample
            cond, *uncond = seen.chunk(copies)
            v = uncond[0] + guidance_scale * (cond - uncond[0]) if uncond else cond
            x = scheduler.step(v, t, x).prev_sample
        return SimpleNamespace(images=[to_pil_image(image.clamp(0, 1)) for image in codec_images(self.vae, x)])


class ClassifierJudge(coco.Inception):
    """models: folder of the family's weights."""

    note = (
        "Own rows: the emoji family's classifier in the place of Inception and CLIP; published rows are of other "
        "scores."
    )

    def __init__(self, models: Path):
        self.codes = json.loads(read_header(models / "emoji-classifier.safetensors").metadata["codes"])
        self.classifier: Classifier = load_classifier(models, self.codes)
        names = json.loads((models / "concepts.json").read_text("utf-8"))
        self.classes = {name: self.codes.index(code) for code, name in names.items()}

    def check(self, download: bool) -> None:
        pass  # everything lies in the folder

    def pipeline(self, models: Path, product: Path | None, device: torch.device) -> Pipeline:
        return Pipeline(models, product, device)

    @torch.no_grad()
    def features(self, folder: Path) -> Tensor:
        """Features (N, 64) of the JPEGs in a folder, in the order of their names."""
        files = sorted(folder.glob("*.jpg"))
        parts = [files[at : at + 64] for at in range(0, len(files), 64)]
        return torch.cat([self.seen([Image.open(file) for file in part]) for part in parts])

    @torch.no_grad()
    def seen(self, pictures: Sequence[Image.Image]) -> Tensor:
        x = torch.stack([to_tensor(picture.convert("RGB")) for picture in pictures])
        # The features of 128 px: an average of what the protocol has enlarged to 256.
        return self.classifier.features(nn.functional.avg_pool2d(x, x.shape[-1] // 128))

    def fid(self, folder: Path, real: Path, device: torch.device) -> float:
        return frechet(self.features(folder), self.features(real))

    @torch.no_grad()
    def inception_score(self, folder: Path, device: torch.device) -> tuple[float, float]:
        classes = self.classifier.head(self.features(folder)).double().softmax(1)
        found = []
        for part in classes.tensor_split(SPLITS):
            mean = part.mean(0, keepdim=True)
            found.append((part * (part.log() - mean.log())).sum(1).mean().exp())
        values = torch.stack(found)
        return float(values.mean()), float(values.std(correction=0))

    def sides(self, device: torch.device) -> Callable[[Sequence[Image.Image], Sequence[str]], tuple[Tensor, Tensor]]:
        def both(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
            unknown = [text for text in prompts if text not in self.classes]
            if unknown:
                raise ValueError(f"{unknown[0]!r} is no concept of the family; see concepts.json")
            rows = self.classifier.head.weight[[self.classes[text] for text in prompts]]
            return self.seen(pictures).to(device), rows.to(device)

        return both


def main(arguments: list[str] | None = None, models: Path = Path("models/emoji")) -> None:
    evaluate(arguments, ClassifierJudge(models))


if __name__ == "__main__":
    main()
