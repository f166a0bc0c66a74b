"""What networks attend to: maps of queries, keys and values, of the emoji family and of random weights."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from bench._common import pack_module
from bench._family import Family

DENOISE, CFG = 0.5, 3.0


@dataclass(frozen=True)
class Map:
    """Queries, keys and values (B, N, heads * dim) of one self-attention, at `block` of the host's network."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    heads: int
    block: tuple = ("input", 1)

    @property
    def side(self) -> int:
        return int(self.q.shape[1] ** 0.5)

    @functools.cached_property
    def wanted(self) -> torch.Tensor:
        return full(self)


def full(m: Map) -> torch.Tensor:
    from comfy.ldm.modules.attention import optimized_attention

    return optimized_attention(m.q, m.k, m.v, m.heads)


def error(out: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((out - wanted).float().norm() / wanted.float().norm())


def recorded(model, run) -> list[Map]:
    """The self-attentions of the first level in a run of a MODEL, of the prompted half of each batch."""
    found = []
    regional = pack_module("nodes.engine.regional")
    config = pack_module("nodes.engine.network").architecture_of(model).config
    clone = model.clone()

    def remember(q, k, v, options):
        half = len(q) // 2
        prompted = slice(half) if options["cond_or_uncond"][0] == 0 else slice(half, None)
        found.append(Map(*(t[prompted].clone() for t in (q, k, v)), options["n_heads"], options["block"]))
        return full(replace(found[-1], q=q, k=k, v=v))

    for block in regional.Regional(stages=1).blocks(config):
        clone.set_model_attn1_replace(remember, *block)
    run(clone)
    return found


class Larger(Family):
    """The emoji family on maps larger than it was trained for."""

    def sample(self, model, noise, cond, steps: int = 6, latent=None):
        """Latents of a run from noise, or from noised latents."""
        import comfy.samplers

        sampler = comfy.samplers.KSampler(
            model, steps, noise.device, "euler", "normal", 1.0 if latent is None else DENOISE, model.model_options
        )
        uncond = [[self.uncond[0][0][:1].repeat(len(noise), 1, 1), {}]]
        with torch.inference_mode():
            return sampler.sample(
                noise,
                cond,
                uncond,
                CFG,
                latent_image=torch.zeros_like(noise) if latent is None else latent,
                disable_pbar=True,
                seed=1,
            )

    @functools.cached_property
    def originals(self) -> torch.Tensor:
        """An emoji of each concept chosen, as latents (N, 4, 16, 16)."""
        return torch.cat(
            [
                self.sample(self.model, noise, [[context, {}]])
                for noise, context in zip(self.noise.split(16), self.cond[0][0].split(16), strict=True)
            ]
        )

    def sheets(self, side: int) -> torch.Tensor:
        """The originals side by side, (sheets, 4, side, side), moved so that no border of a tile is one of an emoji."""
        n = side // 16
        sheets = self.originals[: len(self.originals) // n**2 * n**2].unflatten(0, (-1, n, n))
        return sheets.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3).roll((5, 7), (2, 3))

    def cut_out(self, pictures: torch.Tensor) -> torch.Tensor:
        """The emoji of sheets (S, 3, 8 side, 8 side), one by one."""
        n = pictures.shape[-1] // 128
        parts = pictures.roll((-40, -56), (2, 3)).unflatten(3, (n, 128)).unflatten(2, (n, 128))
        return parts.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)

    def again(self, model, latents: torch.Tensor, seed: int = 5, steps: int = 4) -> torch.Tensor:
        """Image to image: each sheet with the prompt of nothing in particular."""
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
        cond = [[self.uncond[0][0][:1].repeat(len(latents), 1, 1), {}]]
        return self.sample(model, noise, cond, steps, latents)

    def maps(self, side: int, number: int) -> list[Map]:
        """What the first level attends to in runs on a sheet and on an enlarged emoji, at their first and
        third step.
        """
        large = F.interpolate(self.pictures(self.originals[number : number + 1]), 8 * side, mode="bicubic").clamp(0, 1)
        found = []
        for latents in (self.sheets(side)[number : number + 1], self.vae.encode(large.movedim(1, -1))):
            of_run = recorded(self.model, lambda model, latents=latents: self.again(model, latents, number))
            of_step = len(of_run) // 4
            found += of_run[:of_step] + of_run[2 * of_step : 3 * of_step]
        return found
