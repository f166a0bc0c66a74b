"""Narrow random UNets, their packs and sampling runs: for the check of a card, and for the tests inside a host."""

from __future__ import annotations

import functools
from pathlib import Path

import comfy.sample
import comfy.sd
import comfy.supported_models
import torch

from ..asdm_core import addresses, architecture, packs, surgery
from ..asdm_core.architecture import Architecture

_SD = {"down": ((1, 1), (1, 1), (1, 1), (0, 0)), "mid": 1, "up": ((0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1))}
SD = addresses.UNetConfig("small-sd", 32, (1, 2, 4, 4), **_SD, context_dim=48, num_heads=4)
SD2 = addresses.UNetConfig("small-sd2", 32, (1, 2, 4, 4), **_SD, context_dim=48, head_channels=16, use_linear=True)
SDXL = addresses.UNetConfig(
    "small-sdxl",
    32,
    (1, 2, 4),
    ((0, 0), (2, 2), (10, 10)),
    10,
    ((10, 10, 10), (2, 2, 2), (0, 0, 0)),
    context_dim=48,
    head_channels=16,
    use_linear=True,
    adm_channels=2816,
)
# Few layers, for graphs that a CPU has to compile.
SHORT = addresses.UNetConfig("small-short", 32, (1, 2), ((1,), (1,)), 1, ((1, 1), (1, 1)), context_dim=48, num_heads=4)
CONFIGS = {"sd": SD, "sd2": SD2, "sdxl": SDXL, "short": SHORT}

# Files without a description are recognised as members of these families too, by us and by the stock loaders.
architecture.FAMILIES.update({config.family: config for config in CONFIGS.values()})


def _stock_class(config, base):
    host_config = config.to_host()
    names = ("context_dim", "model_channels", "use_linear_in_transformer", "adm_in_channels", "use_temporal_attention")
    heads = {name: host_config[name] for name in ("num_heads", "num_head_channels")}
    return type(
        f"Small{base.__name__}",
        (base,),
        {
            "unet_config": {name: host_config[name] for name in names},
            "unet_extra_config": {**base.unet_extra_config, **heads},
        },
    )


comfy.supported_models.models[:0] = [
    _stock_class(SD, comfy.supported_models.SD15),
    _stock_class(SD2, comfy.supported_models.SD20),
    _stock_class(SDXL, comfy.supported_models.SDXL),
    _stock_class(SHORT, comfy.supported_models.SD15),
]


def drawn(slots, seed=0, rows=False):
    """Random tensors for slots {name: Slot}, one by one, with which activations stay near 1.

    rows: one row of noise for all outputs of a layer, since drawing a billion numbers takes longer than their use.
    """
    generator = torch.Generator().manual_seed(seed)
    for key, slot in slots.items():
        shape = slot.shape
        if len(shape) > 1:
            noise = torch.randn((1, *shape[1:]) if rows else shape, generator=generator)
            yield key, (noise / noise[0].numel() ** 0.5).expand(shape)
        else:
            noise = torch.randn(shape, generator=generator)
            yield key, noise * 0.1 + (slot.tensor.part == "norm" or "norm" in key) * key.endswith("weight")


@functools.lru_cache(maxsize=12)
def weights(config, seed=0):
    """A random full state dict (addressed LDM names). Not to be changed."""
    return dict(drawn(addresses.keys(config), seed))


def write_unet(path, config=SD, cut="", on="*", seed=0, prediction="eps", dtype=None):
    chosen = Architecture.choose(config, cut, on) if cut else Architecture.full(config)
    sd, _ = surgery.cut(weights(config, seed), chosen)
    packs.write_unet(path, sd, packs.Description("unet", chosen, prediction=prediction), dtype)
    return str(path)


def write_pack(path, config=SD, preset="m2", seed=0, dtype=None, units=None, chosen=None):
    chosen = chosen or Architecture.preset(preset, config)
    units = units or chosen.pack_units()
    packs.write_pack(
        path, surgery.extract(weights(config, seed), chosen, units), packs.Description("pack", chosen, units), dtype
    )
    return Path(path)


def model(folder, config=SD, seed=0, prediction="eps"):
    """A MODEL of an unpruned UNet, as the stock loader gives it."""
    path = Path(folder) / f"{config.family}-{seed}-{prediction}.safetensors"
    if not path.exists():
        write_unet(path, config, seed=seed, prediction=prediction)
    return comfy.sd.load_diffusion_model(str(path))


def cond(config=SD, seed=0, tokens=7, batch=1, **more):
    generator = torch.Generator().manual_seed(1000 + seed)
    extra = dict(more)
    if config.adm_channels:
        extra["pooled_output"] = torch.randn(batch, 1280, generator=generator)
    return [[torch.randn(batch, tokens, config.context_dim, generator=generator), extra]]


def sample(model, config=SD, size=(16, 16), batch=1, seed=0, latent=None, **more):
    """The latents of one sampling run through the host's own sampling code; `more` as in `run`."""
    latent = torch.zeros(batch, 4, *size) if latent is None else latent
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
    return run(model, noise, latent, config, seed=seed, **more)


def run(
    model,
    noise,
    latent,
    config=SD,
    steps=2,
    cfg=3.0,
    sampler="euler",
    scheduler="normal",
    positive=None,
    negative=None,
    **more,
):
    return comfy.sample.sample(
        model,
        noise,
        steps,
        cfg,
        sampler,
        scheduler,
        positive or cond(config, 1),
        negative or cond(config, 2),
        latent,
        disable_pbar=True,
        **more,
    )


def difference(a, b):
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())
