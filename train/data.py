"""Latents and text states to learn from, and the batch of any step.

A cache is one or several safetensors files with

    latents   (N, 4, h, w)   as the UNet sees them, scaled
    captions  (N, K)         rows of `states`: K captions of each picture, one of which is drawn
    states    (M, L, D)      states of the text encoder
    empty     (L, D)         those of the empty caption, for caption dropout

`python -m train.encode` makes one from pictures; only the rows that are drawn are read from disk.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from asdm_core.packs import read_header

from .config import Config
from .emoji.diffusion import STEPS, step_weights
from .emoji.training import seeded

TENSORS = {"latents": 4, "captions": 2, "states": 3, "empty": 2}  # dimensions of each


class Batch(NamedTuple):
    """x0, noise: (B, 4, h, w) float32; t: (B,); context: (B, L, D) float32."""

    x0: Tensor
    noise: Tensor
    t: Tensor
    context: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(part.to(device) for part in self))


class Source(Protocol):
    """Pictures by number. sample: latents (4, h, w) and text states (L, D) of one, the caption drawn with `draw` in [0, 1)."""

    empty: Tensor

    def __len__(self) -> int: ...

    def sample(self, i: int, draw: float) -> tuple[Tensor, Tensor]: ...


class Random:
    """Fixed random latents and text states, for trying things out."""

    def __init__(self, config: Config, count: int = 64, tokens: int = 8):
        side, unet = config.data.size // 8, config.network.config
        g = seeded(config.seed, 5)
        self.latents = torch.randn(count, unet.in_channels, side, side, generator=g)
        self.states = torch.randn(count, tokens, unet.context_dim, generator=g)
        self.empty = torch.zeros(tokens, unet.context_dim)

    def __len__(self) -> int:
        return len(self.latents)

    def sample(self, i: int, draw: float) -> tuple[Tensor, Tensor]:
        return self.latents[i], self.states[i]


class Cache:
    """The caches in a file or in all files of a folder. Raises ValueError (BadFile) where one is not what it should be."""

    def __init__(self, path: str | Path, config: Config):
        path = Path(path)
        self.paths = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not self.paths:
            raise ValueError(f"data.path: {path} holds no .safetensors file; make one with `python -m train.encode`")
        counts, unet = [], config.network.config
        for file in self.paths:
            shapes = {k: shape for k, (_, shape) in read_header(file).tensors.items()}
            for name, dimensions in TENSORS.items():
                if len(shapes.get(name, ())) != dimensions:
                    raise ValueError(f"{file.name}: wanted a tensor {name!r} of {dimensions} dimensions, got "
                                     f"{list(shapes[name]) if name in shapes else 'none'}; make the cache with `python -m train.encode`")
            wanted = (unet.in_channels, config.data.size // 8, config.data.size // 8)
            if shapes["latents"][1:] != wanted:
                raise ValueError(f"{file.name}: its latents are {list(shapes['latents'][1:])}, wanted {list(wanted)} "
                                 f"(data.size = {config.data.size})")
            if shapes["states"][2] != unet.context_dim:
                raise ValueError(f"{file.name}: its text states are {shapes['states'][2]} wide, a UNet of {unet.family} "
                                 f"takes {unet.context_dim}")
            counts.append(shapes["latents"][0])
        self.ends = list(accumulate(counts))
        if not self.ends[-1]:
            raise ValueError(f"data.path: {path} holds no pictures")
        self.files = [safe_open(file, framework="pt") for file in self.paths]
        self.captions = [f.get_tensor("captions") for f in self.files]
        self.empty = self.files[0].get_tensor("empty").float()

    def __len__(self) -> int:
        return self.ends[-1]

    def sample(self, i: int, draw: float) -> tuple[Tensor, Tensor]:
        n = bisect_right(self.ends, i)
        row = i - (self.ends[n - 1] if n else 0)
        captions = self.captions[n][row]
        state = int(captions[int(draw * len(captions))])
        file = self.files[n]
        return file.get_slice("latents")[row : row + 1][0].float(), file.get_slice("states")[state : state + 1][0].float()


class Batches:
    """Batches by the numbers of their samples.

    All randomness of a sample comes from the seed and its number in the run, never from who computes it:
    a resumed run, or one on another number of processes, sees the same samples.
    """

    def __init__(self, source: Source, config: Config):
        self.source, self.seed, self.dropout = source, config.seed, config.data.caption_dropout
        self.weights = step_weights() if config.data.timesteps == "snr" else torch.full((STEPS,), 1 / STEPS)
        self.cumulated = self.weights.double().cumsum(0)
        self.order = lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> list[int]:
        return torch.randperm(len(self.source), generator=seeded(self.seed, 6, epoch)).tolist()

    def __call__(self, numbers: Sequence[int]) -> Batch:
        rows = []
        for n in numbers:
            epoch, at = divmod(n, len(self.source))
            g = seeded(self.seed, 7, n)
            dropped, caption, time = torch.rand(3, generator=g, dtype=torch.float64).tolist()
            x0, context = self.source.sample(self.order(epoch)[at], caption)
            t = min(int(torch.searchsorted(self.cumulated, time, right=True)), STEPS - 1)
            rows.append((x0, torch.randn(x0.shape, generator=g), torch.tensor(t),
                         self.source.empty if dropped < self.dropout else context))
        return Batch(*map(torch.stack, zip(*rows, strict=True)))


def open_source(config: Config) -> Source:
    """The data a recipe names."""
    if config.data.source == "random":
        return Random(config)
    if not config.data.path:
        raise ValueError("data.path: give the latents to learn from, or data.source = random to try things out")
    return Cache(config.data.path, config)
