"""What a run shows: pictures of teacher and student on the way, and the model card at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from asdm_core.architecture import Architecture

from . import networks
from .config import Config
from .data import Source, cast_added
from .figures import save_grid
from .seeds import seeded
from .encoders import has_vae, load_vae
from .losses import LATENT_RGB, latent_rgb
from .rollout import few_steps, guided_trajectory
from .sources import Predict, draw, encoders

PICTURES = 4


def predictor(unet: nn.Module, dtype: torch.dtype) -> Predict:
    """A diffusers UNet as a function of x, t, context and SDXL's conditions, computed in a dtype."""

    def predict(x: Tensor, t: Tensor, context: Tensor, added: Mapping[str, Tensor] | None) -> Tensor:
        return unet(x.to(dtype), t, context.to(dtype), added_cond_kwargs=cast_added(added, dtype), return_dict=False)[0]

    return predict


def decoder(config: Config, device: torch.device) -> tuple[Callable[[Tensor], Tensor], float] | None:
    """What makes pictures (B, 3, H, W) in [0, 1] of latents, and how much larger they should be shown.

    The VAE where the recipe names one, else the fixed matrix of the family; None where there is neither.
    """
    models = encoders(config)
    if has_vae(models):
        vae = load_vae(models)

        @torch.no_grad()
        def decode(latents: Tensor) -> Tensor:
            vae.to(device)  # on the GPU only while it is needed
            pictures = torch.cat([vae.decode(x[None] / vae.config.scaling_factor).sample for x in latents])
            vae.to("cpu")
            return pictures / 2 + 0.5

        return decode, 1.0
    if config.network.family in LATENT_RGB:
        return lambda latents: latent_rgb(latents, config.network.family), 4.0
    return None


class Show:
    """The same few captions and seeds again and again: teacher above, student beneath."""

    def __init__(
        self,
        config: Config,
        source: Source,
        teacher: Predict,
        decode: Callable[[Tensor], Tensor],
        scale: float,
        device: torch.device,
    ):
        self.config = config
        self.decode = decode
        self.scale = scale
        self.text = source.text(PICTURES)
        self.empty = source.empty
        side, channels = config.data.side, config.network.config.in_channels
        self.noise = torch.stack(
            [
                torch.randn(channels, side, side, generator=seeded(config.seed, 10, i))
                for i in range(len(self.text.states))
            ]
        ).to(device)
        self.teacher = self._pictures(teacher, few=False)

    def _pictures(self, predict: Predict, few: bool) -> Tensor:
        """few: whether it is a student of few steps, who is drawn in as many as it is to be run in."""
        rollout = self.config.rollout
        if not rollout.steps:
            latents = draw(self.config, predict, self.noise, self.text, self.empty)
        else:
            times, sampler, guidance = rollout.teacher_times, rollout.sampler, rollout.guidance
            if few:
                times = few_steps(rollout).times
                sampler = "ddim"
                guidance = 1.0
            given = self.noise, self.text, self.empty, times, sampler, guidance
            latents = guided_trajectory(
                predict, *given, self.config.network.prediction, self.config.data.size, self.config.network.alphas
            )[:, -1]
        return self.decode(latents).float().clamp(0, 1).cpu()

    def rows(self, student: Predict, teacher: Predict | None = None) -> Tensor:
        """Teacher's and student's pictures, (2, B, 3, H, W). teacher: where it is another one than before."""
        its = self.teacher if teacher is None else self._pictures(teacher, few=False)
        return torch.stack([its, self._pictures(student, few=True)])

    def save(self, step: int, rows: Tensor) -> None:
        """Write pictures/STEP.png."""
        path = self.config.folder / "pictures" / f"{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        save_grid(path, rows.flatten(0, 1), len(self.teacher), self.scale)


def write_card(config: Config, training: Mapping) -> Path:
    """Write the model card, NAME.md beside the product."""
    architecture = config.architecture
    training = networks.full_training(config, training)
    if not config.makes_network:
        kind, node = "A LoRA", "Load LoRA"
    else:
        description = networks.describe_product(config, training)
        training = description.training
        kind, node = {
            "pack": ("A pack", "Apply Pack on any checkpoint of its family"),
            "unet": ("A pruned UNet", "Load Pruned UNet"),
        }[description.kind]
    if further := training.get("pack"):
        node += f", with the pack of its experts and gains, {further}, applied to it (Apply Pack)"
    if further := training.get("lora"):
        node += f", with its LoRA, {further} (Load LoRA)"
    settings = {
        "teacher": training["teacher"],
        "start": training["start"],
        "noise schedule": str(config.network.noise),
        "data": config.data.source,
        "resolution": f"{config.data.size} px",
        "steps": training["steps"],
        "samples": training["samples"],
        "learning rate": config.optimiser.lr,
        "steps skipped (not finite)": training["skipped"],
        "pictures left out (unreadable)": training["left_out"],
        "minutes": training["minutes"],
        "machine": f"{training['machine']}, torch {training['torch']}",
        "seed": config.seed,
    }
    lines = [
        f"# {config.name}",
        "",
        f"{kind} of the {config.network.family} family ({architecture.name or 'free choice of units'}), for the node "
        f"{node}.",
        f"{architecture.params / 1e6:.1f} of {Architecture.full(config.network.config).params / 1e6:.1f} M parameters, "
        f"{training['trained'] / 1e6:.1f} M of them trained; predicts {config.network.prediction}; stored as "
        f"{config.run.stored}.",
        "",
        "| training | |",
        "|---|---|",
        *(f"| {k} | {v} |" for k, v in settings.items()),
        "",
        "| loss | weight | at the end (mean since the line of the log before) |",
        "|---|---|---|",
        *(f"| {name} | {weight} | {training['final'].get(name, '')} |" for name, weight in training["losses"].items()),
        "",
        "The losses are comparable between runs of this family on the same data only; they do not say how good "
        "pictures are.",
        "The weights come from the teacher's and are under its licence.",
        "",
        "## Recipe",
        "",
        "```toml",
        config.to_text(),
        "```",
        "",
    ]
    path = config.product.with_suffix(".md")
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
