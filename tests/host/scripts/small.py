"""Small random UNets, packs and sampling runs for scripts inside a host process."""

import hashlib
from pathlib import Path

import comfy.sample
import comfy.samplers
import torch
from in_host import module

addresses = module("asdm_core.addresses")
architecture = module("asdm_core.architecture")
packs = module("asdm_core.packs")
surgery = module("asdm_core.surgery")
Architecture = architecture.Architecture

_SD = {"down": ((1, 1), (1, 1), (1, 1), (0, 0)), "mid": 1, "up": ((0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1))}
SD = addresses.UNetConfig("small-sd", 32, (1, 2, 4, 4), **_SD, context_dim=48, num_heads=4)
SD2 = addresses.UNetConfig("small-sd2", 32, (1, 2, 4, 4), **_SD, context_dim=48, head_channels=16, use_linear=True)
SDXL = addresses.UNetConfig("small-sdxl", 32, (1, 2, 4), ((0, 0), (2, 2), (10, 10)), 10,
                            ((10, 10, 10), (2, 2, 2), (0, 0, 0)), context_dim=48, head_channels=16, use_linear=True, adm_channels=2816)
CONFIGS = {"sd": SD, "sd2": SD2, "sdxl": SDXL}


def weights(config, seed=0):
    """A random full state dict (addressed LDM names) whose activations stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    sd = {}
    for key, slot in addresses.keys(config).items():
        noise = torch.randn(slot.shape, generator=generator)
        if len(slot.shape) > 1:
            sd[key] = noise / noise[0].numel() ** 0.5
        else:
            sd[key] = noise * 0.1 + (slot.tensor.part == "norm" or "norm" in key) * key.endswith("weight")
    return sd


def write_unet(path, config=SD, cut="", on="*", seed=0, prediction="eps", dtype=None):
    chosen = Architecture.choose(config, cut, on) if cut else Architecture.full(config)
    sd, _ = surgery.cut(weights(config, seed), chosen)
    packs.write_unet(path, sd, packs.Description("unet", chosen, prediction=prediction), dtype)
    return str(path)


def write_pack(path, config=SD, preset="m2", seed=0, dtype=None, units=None):
    chosen = Architecture.preset(preset, config)
    units = units or chosen.pack_units()
    packs.write_pack(path, surgery.extract(weights(config, seed), chosen, units),
                     packs.Description("pack", chosen, units), dtype)
    return Path(path)


def cond(config=SD, seed=0, tokens=7, batch=1, **more):
    generator = torch.Generator().manual_seed(1000 + seed)
    extra = dict(more)
    if config.adm_channels:
        extra["pooled_output"] = torch.randn(batch, 1280, generator=generator)
    return [[torch.randn(batch, tokens, config.context_dim, generator=generator), extra]]


def sample(model, config=SD, steps=4, cfg=3.0, sampler="euler", scheduler="normal", seed=0, size=(16, 16), batch=1,
           positive=None, negative=None, latent=None, denoise=1.0):
    """The latents of one sampling run through the host's own sampling code."""
    latent = torch.zeros(batch, 4, *size) if latent is None else latent
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
    return comfy.sample.sample(model, noise, steps, cfg, sampler, scheduler, positive or cond(config, 1),
                               negative or cond(config, 2), latent, denoise=denoise, seed=seed, disable_pbar=True)


def digest(tensor):
    """Equal for bit-equal tensors only."""
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()[:16]


def difference(a, b):
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())
