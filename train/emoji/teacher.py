"""The teacher: UNet and text encoder, trained together on Noto and Twemoji.

    python -m train.emoji.teacher --minutes 90
    python -m train.emoji.teacher --minutes 110 --copies 4

The first samples run on latents pooled to 8x8, four times as fast on a CPU: there the text learns what
goes with what. Then every glyph upright; jittered copies are for a network that knows the shapes.
Weights are bfloat16 with float32 masters.
"""

from __future__ import annotations

import argparse
import copy
import platform
import random
import time

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from .captions import caption, own_tags, prompt, vocabulary
from .codec import Codec, load_codec
from .data import Glyphs, Variant, load_glyphs
from ..diffusion import ddim, noised, step_weights
from .latents import LatentSet, load_latents
from .sources import STYLES
from .text import TextEncoder, Tokens, host_folder, save_text
from .training import Checkpoint, Optimiser, TrainingState, add_common_arguments, start
from ..progress import Progress, plain_errors
from ..figures import save_curve, save_grid
from ..seeds import seeded
from .unet import build, save_unet

TEACHER_STYLES = STYLES[:2]
LICENCE = "CC-BY-4.0"  # Noto Emoji (Apache-2.0) and Twemoji (CC-BY 4.0) were learned from
ON_WHITE = 0.5
SHORT = 24  # tokens most captions fit in
SHOWN = (
    "pizza",
    "cat face",
    "red heart",
    "rocket",
    "spider",
    "sailboat",
    "avocado",
    "skull",
    "umbrella",
    "guitar",
    "dress",
    "owl",
    "volcano",
    "key",
    "robot",
    "bicycle",
)


def background_share(variants: list[Variant]) -> Tensor:
    """How often each picture is drawn, (N,): those on white make ON_WHITE of all, so that shapes are learned first."""
    white = torch.tensor([v.background == "white" for v in variants])
    return torch.where(white, ON_WHITE / white.sum(), (1 - ON_WHITE) / (~white).sum())


class Batches:
    """The batch of any step, from the seed and the step alone."""

    def __init__(self, glyphs: Glyphs, data: LatentSet, tokens: Tokens, seed: int):
        self.concepts = glyphs.concepts
        self.data = data
        self.tokens = tokens
        self.seed = seed
        self.tags = own_tags(glyphs.concepts)
        self.weights = step_weights()
        self.share = background_share(data.variants)

    def __call__(self, step: int, size: int, pooled: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x0, noise, t, rows): latents and noise (B, 4, h, w), time steps (B,), token rows (B, 77 or SHORT)."""
        g = seeded(self.seed, 2, step)
        chosen = torch.multinomial(self.share, size, replacement=True, generator=g)
        rng = random.Random(f"{self.seed}/{step}")
        texts = []
        for i in chosen.tolist():
            v = self.data.variants[i]
            c = self.concepts[v.concept]
            texts.append(caption(c, v.style, v.background, self.tags[c.code], rng))
        x0 = self.data.latents[chosen].float()
        if pooled:
            x0 = F.avg_pool2d(x0, 2)
        noise = torch.randn(x0.shape, generator=g)
        t = torch.multinomial(self.weights, size, replacement=True, generator=g)
        rows = self.tokens(texts)
        # Most of the 77 positions are padding, and reading from left to right the encoder gives the same
        # states without them: three steps of four do without, the fourth keeps the UNet used to them.
        if rng.random() < 0.75 and (rows[:, SHORT:] == rows[:, -1:]).all():
            rows = rows[:, :SHORT]
        return x0, noise, t, rows


def v_loss(unet: UNet2DConditionModel, context: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Squared error of v per sample, (B,)."""
    x, v = noised(x0, noise, t)
    predicted = unet(x.to(context.dtype), t, context).sample.float()
    return (predicted - v).square().mean((1, 2, 3))


def batch_size(pooled: bool) -> int:
    """Small batches learn more per sample, and at 16x16 a CPU gains nothing from larger ones."""
    return 32 if pooled else 16


def sample_images(
    unet: UNet2DConditionModel,
    encoder: TextEncoder,
    tokens: Tokens,
    codec: Codec,
    prompts: list[str],
    seeds: list[int],
    steps: int = 20,
    cfg: float = 3.0,
    size: int = 16,
    batch: int = 32,
) -> Tensor:
    """Pictures (B, 3, H, W) for prompts, each from the noise of its own seed. Networks in eval mode."""
    return codec_images(codec, sample_latents(unet, encoder, tokens, prompts, seeds, steps, cfg, size, batch))


@torch.no_grad()
def sample_latents(
    unet: nn.Module,
    encoder: TextEncoder,
    tokens: Tokens,
    prompts: list[str],
    seeds: list[int],
    steps: int = 20,
    cfg: float = 3.0,
    size: int = 16,
    batch: int = 32,
    progress: Progress | None = None,
) -> Tensor:
    """Latents (B, 4, size, size) for prompts, each from the noise of its own seed."""
    device = next(unet.parameters()).device
    dtype = next(unet.parameters()).dtype
    uncond = encoder(tokens([""]).to(device))
    parts = []
    for i in range(0, len(prompts), batch):
        noise = torch.stack([torch.randn(4, size, size, generator=seeded(s, 3)) for s in seeds[i : i + batch]]).to(
            device
        )
        cond = encoder(tokens(prompts[i : i + batch]).to(device))
        parts.append(
            ddim(lambda x, t, c: unet(x.to(dtype), t, c.to(dtype)).sample, noise, cond, uncond, steps, cfg).cpu()
        )
        if progress:
            progress.show(min(i + batch, len(prompts)))
    return torch.cat(parts)


@torch.no_grad()
def codec_images(codec: Codec, latents: Tensor) -> Tensor:
    if latents.shape[-1] < 16:
        latents = F.interpolate(latents, scale_factor=16 // latents.shape[-1])
    device = next(codec.parameters()).device
    return torch.cat([codec.decode(z.to(device)).cpu() for z in latents.split(32)])


def train(
    args: argparse.Namespace,
    name: str,
    unet: UNet2DConditionModel,
    encoder: TextEncoder,
    batches: Batches,
    styles: tuple[str, ...],
    joint: bool,
) -> tuple[UNet2DConditionModel, TextEncoder, TrainingState]:
    """The loop shared by teacher and finetune. Returns averaged networks in float32 and the finished Run."""
    device = torch.device(args.device)
    nn.Module.to(unet, device)  # diffusers' own `to` has no type
    averaged_unet, averaged_encoder = copy.deepcopy(unet), copy.deepcopy(encoder).to(device)
    nn.Module.to(unet, device, torch.bfloat16)
    unet.train()
    encoder = encoder.to(device, torch.bfloat16)
    parameters = {f"unet.{k}": p for k, p in unet.named_parameters()}
    if joint:
        parameters |= {f"text.{k}": p for k, p in encoder.named_parameters()}
    encoder.requires_grad_(joint)
    optimiser = Optimiser(parameters, ema=args.ema)
    # Masters start from the float32 weights, not from their bfloat16 copies.
    for prefix, source in (("unet.", averaged_unet), ("text.", averaged_encoder)):
        for key, p in source.named_parameters():
            if prefix + key in optimiser.master:
                optimiser.master[prefix + key].data.copy_(p.data)
                optimiser.average.weights[prefix + key].copy_(p.data)
    checkpoint = Checkpoint(args.runs / f"{name}.safetensors")
    run = TrainingState(args.minutes, args.steps)
    if not args.fresh:
        run = checkpoint.load(optimiser, run)
    codec = load_codec(args.models).to(device)
    names = {c.name: c for c in batches.concepts}
    shown = [prompt(names[n], style) for style in styles for n in SHOWN if n in names]

    def average() -> None:
        optimiser.averaged(averaged_unet, "unet.")
        if joint:
            optimiser.averaged(averaged_encoder, "text.")

    def show() -> None:
        average()
        size = 8 if run.samples < args.pooled_samples else 16
        images = sample_images(
            averaged_unet, averaged_encoder, batches.tokens, codec, shown, list(range(len(shown))), size=size
        )
        save_grid(args.runs / f"{name}.png", images, columns=16)
        save_curve(args.runs / f"{name}-loss.png", run.curve, f"{name}, {run.samples} samples", "v-MSE")

    progress = Progress(name)
    shown_at = time.monotonic()
    while not run.done:
        began = time.perf_counter()
        pooled = run.samples < args.pooled_samples
        size = args.batch or batch_size(pooled)
        x0, noise, t, rows = (part.to(device) for part in batches(run.step, size, pooled))
        loss = v_loss(unet, encoder(rows), x0, noise, t).mean()
        loss.backward()
        optimiser.step(run.rate(args.lr))
        run.advance(size, float(loss.detach()), began)
        recent = sum(c[3] for c in run.curve[-10:]) / len(run.curve[-10:])
        progress.show(run.step, f"loss {recent:.4f}, {run.samples} samples, {run.status()}")
        if checkpoint.due():
            checkpoint.save(optimiser, run)
            if time.monotonic() - shown_at > args.show_minutes * 60:
                show()
                shown_at = time.monotonic()
    progress.end()
    checkpoint.save(optimiser, run)
    show()
    averaged_unet.cpu().eval()
    return averaged_unet, averaged_encoder.cpu().eval(), run


def provenance(args: argparse.Namespace, run: TrainingState) -> dict:
    return {
        "minutes": round(run.seconds / 60, 1),
        "steps": run.step,
        "samples": run.samples,
        "lr": args.lr,
        "seed": args.seed,
        "device": args.device,
        "threads": args.threads,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }


def add_unet_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", help="ComfyUI folder, for the CLIP tokeniser")
    parser.add_argument("--batch", type=int, help="fixed batch size instead of the schedule")
    parser.add_argument("--lr", type=float, default=6e-4, help="at batch 16 the loss stands still from about 1e-3 on")
    parser.add_argument("--ema", type=float, default=0.996)
    parser.add_argument("--show-minutes", type=float, default=5, help="minutes between sample grids")


@plain_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    add_unet_arguments(parser)
    parser.add_argument("--pooled-samples", type=int, default=60_000, help="samples trained on latents pooled to 8x8")
    parser.add_argument(
        "--copies", type=int, default=1, help="of each picture to learn from: the first upright, the others jittered"
    )
    args = parser.parse_args()
    start(args)
    torch.manual_seed(args.seed)
    glyphs = load_glyphs(args.runs)
    tokens = Tokens(host_folder(args.host), texts=vocabulary(glyphs.concepts))
    data = load_latents(args.runs, glyphs, TEACHER_STYLES, args.copies)
    batches = Batches(glyphs, data, tokens, args.seed)
    unet, encoder, run = train(args, "teacher", build(), TextEncoder(tokens.ids), batches, TEACHER_STYLES, joint=True)
    training = provenance(args, run) | {
        "data": "Noto Emoji and Twemoji",
        "copies": args.copies,
        "concepts": len(glyphs.concepts),
    }
    save_text(args.models / "emoji-text.safetensors", encoder, training)
    save_unet(args.models / "emoji-teacher.safetensors", unet, LICENCE, training)
    print("wrote emoji-teacher.safetensors and emoji-text.safetensors")


if __name__ == "__main__":
    main()
