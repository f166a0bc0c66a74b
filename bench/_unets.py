"""UNets at SD1.5's full size with random weights, alone and as MODELs, and what is put on a MODEL."""

from __future__ import annotations

import torch

from asdm_core.architecture import FAMILIES, Architecture
from bench._common import pack_module, randomise

SD15 = FAMILIES["sd15"]


def build(config, dtype: torch.dtype, device: torch.device):
    from comfy import ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    unet = UNetModel(**config.to_host(), dtype=dtype, device=device, operations=ops.disable_weight_init)
    randomise(unet.requires_grad_(False).eval())
    return unet


class Cutter:
    """One skeleton that becomes any of the variants by exchanging its units."""

    def __init__(self, unet):
        stand_in = pack_module("nodes.engine.units").stand_in
        self.unet = unet
        full = Architecture.full(SD15)
        self.units = {
            u.address: (u, unet.get_submodule(u.ldm), stand_in(u))
            for u in full.kept
            if u.kind in ("resnet", "transformer", "downsampler", "upsampler")
        }

    def become(self, architecture: Architecture) -> None:
        for address, (unit, layer, stand_in) in self.units.items():
            parent, _, name = unit.ldm.rpartition(".")
            self.unet.get_submodule(parent).add_module(name, stand_in if address in architecture.cut else layer)


def full_size(dtype: torch.dtype, architecture: Architecture | None = None, seed: int = 0):
    """A MODEL at SD1.5's full size with random weights, of an architecture or of all units, as its loader gives it."""
    import comfy.model_management as management
    import comfy.model_patcher

    config = pack_module("nodes.engine.models").model_config(architecture or Architecture.full(SD15), "eps")
    config.set_inference_dtype(dtype, None)
    base = config.get_model({}, "")
    randomise(base.diffusion_model, seed)
    return comfy.model_patcher.CoreModelPatcher(
        base, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )


def with_technique(model, technique):
    """A clone of MODEL with a technique of the pack's."""
    return pack_module("nodes.engine.on_model").with_technique(model, technique)


def with_plan(model, plan):
    """A clone of MODEL with feature inheritance."""
    return with_technique(model, pack_module("nodes.engine.inheritance").Inheritance(plan))
