"""The emoji teacher as models by flow matching are sampled."""

from __future__ import annotations

import torch
from comfy.model_sampling import CONST, ModelSamplingDiscreteFlow

SHIFT = 3.0  # as is usual at SDXL's size


class Blended(ModelSamplingDiscreteFlow, CONST):
    """The noise levels and the latents of flow matching, for a network that was trained with noise on top (`its`): a
    latent in proportion to the picture it holds is one of its own.
    """

    def __init__(self, its: torch.nn.Module):
        super().__init__()
        self.set_parameters(shift=SHIFT)
        self.its = its

    def timestep(self, sigma):
        return self.its.timestep(sigma / _picture(sigma))

    def calculate_input(self, sigma, noise):
        part = _picture(sigma)
        return self.its.calculate_input(sigma / part, noise / part.view(-1, 1, 1, 1))

    def calculate_denoised(self, sigma, model_output, model_input):
        part = _picture(sigma)
        return self.its.calculate_denoised(sigma / part, model_output, model_input / part.view(-1, 1, 1, 1))


def _picture(sigma: torch.Tensor) -> torch.Tensor:
    """How much of the picture a latent holds; of noise alone next to nothing."""
    return (1 - sigma).clamp_min(1e-3)


def blended(model):
    """A clone of MODEL with them."""
    model = model.clone()
    model.add_object_patch("model_sampling", Blended(model.get_model_object("model_sampling")))
    return model
