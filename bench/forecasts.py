"""Makes models/forecasts.safetensors, what Speed Up knows of runs without a profile.

    python bootstrap.py bench NAME=forecasts

Runs of the emoji teacher in many steps, with guidance 3 and 7, are recorded: with samplers that add no noise, some at
every step, or all of it anew, and with two that try states beside their path. Of v only inner products are kept. What
the plans fitted from them are worth beside other ways of saving is measured by part "runs" of bench/inheritance.py, on
other prompts.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import safetensors.numpy
import torch

from bench._common import ROOT, add_common_arguments, begin, pack_module
from bench._unets import with_technique

FAMILY = ROOT / "models" / "emoji"
TABLE = ROOT / "models" / "forecasts.safetensors"
# What the table is recorded with, (sampler, steps): by what the sampler does with noise (adds none, some at every step,
# all anew), and whether it tries states beside its path. What those are off by is stretched to the step of a run,
# so these have fewer steps; with 20, the noise between two levels of a longer run would be missing.
RECORDED = {
    "none": ("dpmpp_2m", 60),
    "some": ("dpmpp_2m_sde", 60),
    "all": ("lcm", 60),
    "none beside": ("heun", 40),
    "some beside": ("dpmpp_sde", 40),
}
SMALLEST = 1e-9  # of the eigenvalues of a Gram matrix, beside the largest, that is kept
# First prompt among the concepts, first seed. The test prompts of bench/inheritance.py are others, but for "tennis",
# which is among both, with other noises.
FIRST, SEED = 17, 1000


class Prompts:
    """The emoji teacher with some prompts, and runs of it."""

    def __init__(self, pictures: int, first: int, seed: int):
        load = pack_module("nodes.engine.models").load_checkpoint
        self.model, clip, _ = load(FAMILY / "emoji-teacher.safetensors")
        names = list(json.loads((FAMILY / "concepts.json").read_text("utf-8")).values())
        chosen = names[first :: max(1, len(names) // pictures)][:pictures]

        def encode(text):
            return clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0]

        self.cond = [[torch.cat([encode(name) for name in chosen]), {}]]
        self.uncond = [[encode("").repeat(len(chosen), 1, 1), {}]]
        seeds = range(seed, seed + len(chosen))
        self.noise = torch.cat([torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def run(self, model, sampler: str, scheduler: str, steps: int, cfg: float) -> torch.Tensor:
        """Latents (N, 4, 16, 16)."""
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
                torch.zeros_like(self.noise),
                seed=1,
                disable_pbar=True,
            )

    def recorded(self, run):
        """(recorder, root mean square of the result) of a run in full."""
        recorded = pack_module("nodes.engine.forecasts").Recorded()
        recorder = recorded.results
        latents = self.run(with_technique(self.model, recorded), *run)
        return recorder, float(self.model.model.process_latent_in(latents).square().mean() ** 0.5)


def write_table(prompts: Prompts) -> None:
    """Record runs with guidance 3 and 7, and keep the inner products of their v."""
    tensors: dict[str, np.ndarray] = {}
    for kind, (sampler, steps) in RECORDED.items():
        for cfg in (3.0, 7.0):
            recorder, size = prompts.recorded((sampler, "karras", steps, cfg))
            found = recorder.statistics(cfg, size)
            values, vectors = np.linalg.eigh(found.gram)
            name = f"{kind}-cfg{cfg:g}"
            kept = values > SMALLEST * values[-1]
            tensors |= {
                f"{name}.factor": np.ascontiguousarray(vectors[:, kept] * np.sqrt(values[kept]), np.float32),
                f"{name}.beside": found.beside.astype(np.uint8),
                f"{name}.sigmas": found.sigmas.astype(np.float32),
                f"{name}.run": np.array([cfg, size], dtype=np.float32),
            }
    metadata = {"model": "emoji-teacher", "pictures": str(len(prompts.noise))}
    safetensors.numpy.save_file(tensors, TABLE, metadata)
    print(f"wrote {TABLE.relative_to(ROOT)}, {TABLE.stat().st_size // 1024} KB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=8)
    add_common_arguments(parser)
    args, *_ = begin(parser)
    write_table(Prompts(args.pictures, FIRST, SEED))


if __name__ == "__main__":
    main()
