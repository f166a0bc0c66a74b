"""UNets of narrow layers, with random weights."""

import functools
from typing import Any

import torch

from asdm_core.addresses import UNetConfig, keys

_SD: dict[str, Any] = {
    "down": ((1, 1), (1, 1), (1, 1), (0, 0)),
    "mid": 1,
    "up": ((0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
}
SD = UNetConfig("narrow-sd", 8, (1, 2, 4, 4), **_SD, context_dim=6, num_heads=2)
SD2 = UNetConfig("narrow-sd2", 8, (1, 2, 4, 4), **_SD, context_dim=6, head_channels=4, use_linear=True)
SDXL = UNetConfig(
    "narrow-sdxl",
    8,
    (1, 2, 4),
    ((0, 0), (2, 2), (10, 10)),
    10,
    ((10, 10, 10), (2, 2, 2), (0, 0, 0)),
    context_dim=6,
    head_channels=4,
    use_linear=True,
    adm_channels=20,
)
CONFIGS = {"sd15": SD, "sd21": SD2, "sdxl": SDXL}


@functools.lru_cache(maxsize=8)
def weights(config, seed=0):
    """A full state dict (addressed LDM names). Not to be changed."""
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(slot.shape, generator=generator) for key, slot in keys(config).items()}


def equal(a, b):
    """Whether two state dicts are the same, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
