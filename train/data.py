"""Latents and text states to learn from, and the batch of any step.

A cache is one or several safetensors files with

    latents   (N, 4, h, w)   as the UNet sees them, scaled
    captions  (N, K)         rows of `states`: K captions of each picture, one of which is drawn
    states    (M, L, D)      states of the text encoder
    empty     (L, D)         those of the empty caption, for caption dropout

and for SDXL

    pooled (M, P), empty_pooled (P,)   the pooled states
    sizes  (N, 6)                      height and width of the picture, top and left of the crop, height and width
    wanted

`python -m train.encode` makes one from pictures; only the rows that are drawn are read from disk. Other sources
are in train/sources.py.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from asdm_core.addresses import UNetConfig
from asdm_core.packs import read_header

from .config import Config
from .diffusion import STEPS, step_weights
from .seeds import seeded
from .encoders import Text, whole

TENSORS = {"latents": 4, "captions": 2, "states": 3, "empty": 2}  # dimensions of each


class Batch(NamedTuple):
    """x0, noise: (B, 4, h, w) float32; t: (B,); context: (B, L, D) float32.

    pooled: (B, P), sizes: (B, 6), for SDXL. left_out: (B,), how many pictures could not be read before the one that was
    taken. x, v: (B, 4, h, w), weight: (B,), for rollouts: the state, the v wanted there, its weight in the loss.
    """

    x0: Tensor
    noise: Tensor
    t: Tensor
    context: Tensor
    pooled: Tensor | None = None
    sizes: Tensor | None = None
    left_out: Tensor | None = None
    x: Tensor | None = None
    v: Tensor | None = None
    weight: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        return self._replace(**{k: part.to(device) for k, part in self._asdict().items() if part is not None})

    @property
    def added(self) -> dict[str, Tensor] | None:
        """SDXL's further conditions, as diffusers' UNet takes them."""
        if self.pooled is None or self.sizes is None:
            return None
        return {"text_embeds": self.pooled, "time_ids": self.sizes}


class Examples(NamedTuple):
    """What a source gives for some numbers; the fields are those of Batch."""

    latents: Tensor
    text: Text
    sizes: Tensor | None = None
    left_out: Tensor | None = None


class Source(Protocol):
    """Pictures by number. `empty`: the empty caption, (1, L, D). len: pictures of an epoch.

    order: the numbers of an epoch, shuffled by a generator. examples: some by number, each caption drawn by a number in
    [0, 1); texts: their conditions alone. text: of the first few captions, the same ones always.
    state: what besides the step a resumed run must know, for going on with sample n of the run; restore: takes it.
    """

    empty: Text

    def __len__(self) -> int: ...

    def order(self, generator: torch.Generator) -> Sequence[int]: ...

    def examples(self, numbers: Sequence[int], draws: Sequence[float]) -> Examples: ...

    def texts(self, numbers: Sequence[int], draws: Sequence[float]) -> Text: ...

    def text(self, count: int) -> Text: ...

    def state(self, n: int) -> dict: ...

    def restore(self, state: dict) -> None: ...


class Numbered:
    """A source that finds any picture by its number: shuffled as a whole, and it has no state."""

    empty: Text

    def __len__(self) -> int:
        raise NotImplementedError

    def examples(self, numbers: Sequence[int], draws: Sequence[float]) -> Examples:
        raise NotImplementedError

    def order(self, generator: torch.Generator) -> Sequence[int]:
        return torch.randperm(len(self), generator=generator).tolist()

    def texts(self, numbers: Sequence[int], draws: Sequence[float]) -> Text:
        return self.examples(numbers, draws).text

    def text(self, count: int) -> Text:
        few = range(min(count, len(self)))
        return self.examples(few, [0.0] * len(few)).text

    def state(self, n: int) -> dict:
        return {}

    def restore(self, state: dict) -> None:
        pass


class Random(Numbered):
    """Fixed random latents and text states, for trying things out."""

    def __init__(self, config: Config, count: int = 64, tokens: int = 8):
        side, unet = config.data.side, config.network.config
        pooled = pooled_width(unet)
        g = seeded(config.seed, 5)
        self.latents = torch.randn(count, unet.in_channels, side, side, generator=g)
        self.states = torch.randn(count, tokens, unet.context_dim, generator=g)
        self.pooled = torch.randn(count, pooled, generator=g) if pooled else None
        self.empty = Text(torch.zeros(1, tokens, unet.context_dim), torch.zeros(1, pooled) if pooled else None)
        self.sizes = whole(config.data.size) if pooled else None

    def __len__(self) -> int:
        return len(self.latents)

    def examples(self, numbers: Sequence[int], draws: Sequence[float]) -> Examples:
        rows = list(numbers)
        if self.pooled is None or self.sizes is None:
            return Examples(self.latents[rows], Text(self.states[rows]))
        return Examples(
            self.latents[rows], Text(self.states[rows], self.pooled[rows]), self.sizes.expand(len(rows), -1)
        )


class Cache(Numbered):
    """The caches in a file or in all files of a folder. Raises ValueError (BadFile) where one is not what it
    should be.
    """

    def __init__(self, path: str | Path, config: Config):
        path = Path(path)
        self.paths = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not self.paths:
            raise ValueError(f"data.path: {path} holds no .safetensors file; make one with `python -m train.encode`")
        counts = []
        unet = config.network.config
        self.wide = bool(pooled_width(unet))
        for file in self.paths:
            shapes = {k: shape for k, (_, shape) in read_header(file).tensors.items()}
            for name, dimensions in TENSORS.items():
                if len(shapes.get(name, ())) != dimensions:
                    raise ValueError(
                        f"{file.name}: wanted a tensor {name!r} of {dimensions} dimensions, got "
                        f"{list(shapes[name]) if name in shapes else 'none'}; make the cache with `python -m "
                        "train.encode`"
                    )
            wanted = (unet.in_channels, config.data.side, config.data.side)
            if shapes["latents"][1:] != wanted:
                raise ValueError(
                    f"{file.name}: its latents are {list(shapes['latents'][1:])}, wanted {list(wanted)} "
                    f"(data.size = {config.data.size})"
                )
            if shapes["states"][2] != unet.context_dim:
                raise ValueError(
                    f"{file.name}: its text states are {shapes['states'][2]} wide, a UNet of {unet.family} "
                    f"takes {unet.context_dim}"
                )
            counts.append(shapes["latents"][0])
            if self.wide and not shapes.keys() >= {"pooled", "sizes", "empty_pooled"}:
                raise ValueError(
                    f"{file.name}: it lacks the pooled states and sizes that a UNet of {unet.family} takes; make the "
                    "cache "
                    "with `python -m train.encode` and the models of this family"
                )
        self.ends = list(accumulate(counts))
        if not self.ends[-1]:
            raise ValueError(f"data.path: {path} holds no pictures")
        self.files = [safe_open(file, framework="pt") for file in self.paths]
        self.captions = [f.get_tensor("captions") for f in self.files]
        first = self.files[0]
        self.empty = Text(
            first.get_tensor("empty").float()[None],
            first.get_tensor("empty_pooled").float()[None] if self.wide else None,
        )

    def __len__(self) -> int:
        return self.ends[-1]

    def row(self, i: int, draw: float) -> tuple[int, int, int]:
        """Where picture i is: its file, its row there, and the row of the caption that `draw` takes."""
        n = bisect_right(self.ends, i)
        row = i - (self.ends[n - 1] if n else 0)
        captions = self.captions[n][row]
        return n, row, int(captions[int(draw * len(captions))])

    def examples(self, numbers: Sequence[int], draws: Sequence[float]) -> Examples:
        rows = [self.row(i, draw) for i, draw in zip(numbers, draws, strict=True)]

        def read(name: str, column: int) -> Tensor:
            return torch.cat(
                [self.files[row[0]].get_slice(name)[row[column] : row[column] + 1] for row in rows]
            ).float()

        return Examples(
            read("latents", 1),
            Text(read("states", 2), read("pooled", 2) if self.wide else None),
            read("sizes", 1) if self.wide else None,
        )


def pooled_width(unet: UNetConfig) -> int:
    """Width of the pooled text states a UNet takes: SDXL's conditioning is these and six sizes of 256 numbers each. 0
    without.
    """
    return unet.adm_channels - 6 * 256 if unet.adm_channels else 0


def cast_added(added: Mapping[str, Tensor] | None, dtype: torch.dtype) -> dict[str, Tensor] | None:
    """SDXL's further conditions for a UNet in a dtype. Its sizes stay as they are: bfloat16 would make 1368 of 1365 px,
    and diffusers casts what it makes of them itself.
    """
    return None if added is None else {**added, "text_embeds": added["text_embeds"].to(dtype)}


class Batches:
    """Batches by the numbers of their samples.

    All randomness of a sample comes from the seed and its number in the run, never from who computes it:
    a resumed run, or one on another number of processes, sees the same samples.
    """

    def __init__(self, source: Source, config: Config):
        self.source = source
        self.seed = config.seed
        self.dropout = config.data.caption_dropout
        self.weights = (
            step_weights(config.network.alphas) if config.data.timesteps == "snr" else torch.full((STEPS,), 1 / STEPS)
        )
        self.cumulated = self.weights.double().cumsum(0)
        self.order = lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> Sequence[int]:
        return self.source.order(seeded(self.seed, 6, epoch))

    def __call__(self, numbers: Sequence[int]) -> Batch:
        chosen, draws, dropped, times, generators = [], [], [], [], []
        for n in numbers:
            epoch, at = divmod(n, len(self.source))
            generators.append(g := seeded(self.seed, 7, n))
            drop, caption, time = torch.rand(3, generator=g, dtype=torch.float64).tolist()
            chosen.append(self.order(epoch)[at])
            draws.append(caption)
            dropped.append(drop < self.dropout)
            times.append(min(int(torch.searchsorted(self.cumulated, time, right=True)), STEPS - 1))
        found = self.source.examples(chosen, draws)
        empty = self.source.empty
        drop = torch.tensor(dropped)
        noise = torch.stack([torch.randn(found.latents.shape[1:], generator=g) for g in generators])
        text = found.text.where_not(drop, empty)
        return Batch(
            found.latents,
            noise,
            torch.tensor(times),
            text.states,
            text.pooled,
            found.sizes,
            torch.zeros(len(drop), dtype=torch.long) if found.left_out is None else found.left_out,
        )
