"""The emoji family that ships with the pack, in a benchmark."""

from __future__ import annotations

import json

import torch

from bench._common import ROOT, pack_module

FAMILY = ROOT / "models" / "emoji"


class Family:
    """The emoji teacher, prompts for it, and the pictures of a run.

    first, seed: the first prompt among the concepts, and the first seed of the noise.
    """

    def __init__(self, pictures: int, first: int = 0, seed: int = 0):
        from safetensors import safe_open

        from train.emoji.classifier import load_classifier

        self.model, clip, self.vae = pack_module("nodes.engine.models").load_checkpoint(
            FAMILY / "emoji-teacher.safetensors"
        )
        with safe_open(FAMILY / "emoji-classifier.safetensors", framework="pt") as f:
            codes = json.loads(f.metadata()["codes"])
        self.classifier = load_classifier(FAMILY, codes)
        names = json.loads((FAMILY / "concepts.json").read_text("utf-8"))
        chosen = list(names.items())[first :: max(1, len(names) // pictures)][:pictures]
        self.targets = torch.tensor([codes.index(code) for code, _ in chosen])

        def encode(text):
            return clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0]

        self.cond: list = [[torch.cat([encode(name) for _, name in chosen]), {}]]
        self.uncond: list = [[encode("").repeat(len(chosen), 1, 1), {}]]
        self.noise = torch.cat(
            [torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed + i)) for i in range(len(chosen))]
        )

    def latents(
        self,
        model,
        sampler: str,
        scheduler: str,
        steps: int,
        cfg: float = 3.0,
        denoise: float = 1.0,
        start: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Latents (N, 4, 16, 16) of a run; start: those it begins with, for image to image."""
        import comfy.sample

        with torch.inference_mode():
            return comfy.sample.sample(
                model,
                self.noise,
                steps,
                cfg,
                sampler,
                scheduler,
                self.cond,
                self.uncond,
                torch.zeros_like(self.noise) if start is None else start,
                denoise=denoise,
                seed=1,
                disable_pbar=True,
            )

    def run(self, model, sampler: str, scheduler: str, steps: int, clock) -> tuple[torch.Tensor, float]:
        """Pictures (N, 3, 128, 128) and the seconds of sampling."""
        before = clock()
        return self.pictures(self.latents(model, sampler, scheduler, steps)), clock() - before

    @torch.inference_mode()
    def pictures(self, latents):
        return self.vae.decode(latents).movedim(-1, 1).float().clamp(0, 1)

    def top1(self, pictures) -> float:
        from train.emoji.classifier import top_k

        return float(top_k(self.classifier, pictures, self.targets)[0].float().mean())
