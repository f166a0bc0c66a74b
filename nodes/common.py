"""What several nodes share: where they stand in the menu, what they show, how they ask for a sampler."""

from __future__ import annotations

import comfy.samplers
from comfy_api.latest import io

CATEGORY = "model/asdm"

# What a node shows of itself after a run: said with one of its inputs, for web/.
SHOWS = "asdm_shows"
SHOWS_COMPARISON, SHOWS_PICTURE, SHOWS_WORDS = ({SHOWS: what} for what in ("comparison", "picture", "words"))

PIXELS = 8  # picture pixels per latent pixel, for every family here


def sampling_inputs() -> list[io.Input]:
    """What a sampler needs, named as in KSampler."""
    return [
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=True,
            tooltip="Of the noise, the same for all.",
        ),
        io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Steps of each run."),
        io.Float.Input(
            "cfg", default=7.0, min=0.0, max=100.0, step=0.1, tooltip="Classifier-free guidance, as in KSampler."
        ),
        io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, tooltip="As in KSampler."),
        io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, tooltip="As in KSampler."),
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.01,
            max=1.0,
            step=0.01,
            advanced=True,
            tooltip="As in KSampler; below 1 for image to image.",
        ),
    ]
