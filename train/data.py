"""Latents and text states to learn from, and the batch of any step.

A cache is one or several safetensors files with

    latents   (N, 4, h, w)   as the UNet sees them, scaled
    captions  (N, K)         numbers of captions: K of each picture, one of which is drawn
    states    (M, L, D)      states of the text encoder, one row for each caption, or several where it is long
    empty     (L, D)         those of the empty caption, for caption dropout

where they are needed

    rows      (C, 2)         the first row of each caption and how many it has; without: one each
    mirrored  (N, 4, h, w)   latents of the mirrored pictures

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
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from asdm_core.addresses import UNetConfig
from asdm_core.tensor_file import read_header

from .buckets import groups, in_groups
from .buckets import shapes as bucket_shapes
from .config import Config
from .diffusion import STEPS, step_weights
from .seeds import seeded
from .encoders import Text, joined, whole

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
    [0, 1), mirrored where `flips` says so; texts: their conditions alone. text: of the first few captions, always the
    same.
    read and encode: the two halves of examples, what needs no network and what does. ahead: whether worker processes
    may read, in any order.
    state: what besides the step a resumed run must know, for going on with sample n of the run; together: of the states
    of all processes, the one that a checkpoint holds; restore: takes it.
    """

    empty: Text
    ahead: bool

    def __len__(self) -> int: ...

    def order(self, generator: torch.Generator) -> Sequence[int]: ...

    def examples(self, numbers: Sequence[int], draws: Sequence[float]) -> Examples: ...

    def read(self, numbers: Sequence[int], draws: Sequence[float], flips: Sequence[bool] = ()) -> Any: ...

    def encode(self, read: Any) -> Examples: ...

    def texts(self, numbers: Sequence[int], draws: Sequence[float]) -> Text: ...

    def text(self, count: int) -> Text: ...

    def state(self, n: int) -> dict: ...

    def together(self, states: Sequence[dict]) -> dict: ...

    def restore(self, state: dict) -> None: ...


class Numbered:
    """A source that finds any picture by its number: shuffled as a whole, and it has no state.

    count: pictures. buckets: the bucket of each, where a batch is of one (train/buckets.py), in groups of `group`.
    """

    empty: Text
    ahead = True
    buckets: Sequence[int] = ()
    group = 1

    @property
    def count(self) -> int:
        raise NotImplementedError

    def __len__(self) -> int:
        return groups(self.buckets, self.group) * self.group if self.buckets else self.count

    def examples(self, numbers: Sequence[int], draws: Sequence[float]) -> Examples:
        return self.encode(self.read(numbers, draws))

    def read(self, numbers: Sequence[int], draws: Sequence[float], flips: Sequence[bool] = ()) -> Any:
        raise NotImplementedError

    def encode(self, read: Any) -> Examples:
        return read  # where nothing is left to encode

    def order(self, generator: torch.Generator) -> Sequence[int]:
        shuffled = torch.randperm(self.count, generator=generator).tolist()
        return in_groups(shuffled, self.buckets, self.group, generator) if self.buckets else shuffled

    def texts(self, numbers: Sequence[int], draws: Sequence[float]) -> Text:
        return self.examples(numbers, draws).text

    def text(self, count: int) -> Text:
        few = range(min(count, self.count))
        return self.texts(few, [0.0] * len(few))

    def state(self, n: int) -> dict:
        return {}

    def together(self, states: Sequence[dict]) -> dict:
        return states[0]

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

    @property
    def count(self) -> int:
        return len(self.latents)

    def read(self, numbers: Sequence[int], draws: Sequence[float], flips: Sequence[bool] = ()) -> Examples:
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
        sizes = []
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
            if wrong := self._wrong(shapes["latents"][1:], config):
                raise ValueError(f"{file.name}: its latents are {list(shapes['latents'][1:])}, wanted {wrong}")
            if shapes["states"][2] != unet.context_dim:
                raise ValueError(
                    f"{file.name}: its text states are {shapes['states'][2]} wide, a UNet of {unet.family} "
                    f"takes {unet.context_dim}"
                )
            if config.data.flip and "mirrored" not in shapes:
                raise ValueError(
                    f"data.flip: {file.name} holds no mirrored pictures; make the cache with `python -m train.encode "
                    "--flip`"
                )
            counts.append(shapes["latents"][0])
            sizes.append(shapes["latents"][2:])
            if self.wide and not shapes.keys() >= {"pooled", "sizes", "empty_pooled"}:
                raise ValueError(
                    f"{file.name}: it lacks the pooled states and sizes that a UNet of {unet.family} takes; make the "
                    "cache "
                    "with `python -m train.encode` and the models of this family"
                )
        self.ends = list(accumulate(counts))
        if not self.ends[-1]:
            raise ValueError(f"data.path: {path} holds no pictures")
        if config.data.buckets:
            self.group = config.data.bucket_batch
            self.buckets = [sizes.index(its) for its, count in zip(sizes, counts, strict=True) for _ in range(count)]
        self.files = [safe_open(file, framework="pt") for file in self.paths]
        self.captions = [f.get_tensor("captions") for f in self.files]
        self.rows = [f.get_tensor("rows") if "rows" in f.keys() else None for f in self.files]
        first = self.files[0]
        for file, *its in zip(self.paths, self.captions, self.rows, self.files, counts, strict=True):
            self._check_rows(file, *its)
        if first.get_slice("empty").get_shape()[-1] != unet.context_dim:
            raise ValueError(f"{self.paths[0].name}: its empty caption is of another width than its text states")
        self.empty = Text(
            first.get_tensor("empty").float()[None],
            first.get_tensor("empty_pooled").float()[None] if self.wide else None,
        )

    @staticmethod
    def _check_rows(path: Path, captions: Tensor, rows: Tensor | None, file: Any, count: int) -> None:
        """Raise ValueError where pictures name captions that are not there, or these lie outside of the states."""
        held = file.get_slice("states").get_shape()[0]
        wrong = len(captions) != count or not captions.shape[1] or captions.is_floating_point()
        texts = held if rows is None else len(rows)
        wrong = wrong or bool((captions < 0).any()) or bool((captions >= texts).any())
        if rows is not None and not wrong:
            wrong = bool((rows < 0).any()) or bool((rows.sum(1) > held).any())
        if wrong:
            raise ValueError(
                f"{path.name}: its captions are not those of its {count} pictures and {texts} texts; make the cache "
                "anew with `python -m train.encode`"
            )

    def __getstate__(self) -> dict:
        return {k: v for k, v in vars(self).items() if k != "files"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.files = [safe_open(file, framework="pt") for file in self.paths]

    @staticmethod
    def _wrong(shape: tuple[int, ...], config: Config) -> str:
        """What is wanted of latents (C, h, w), where they are something else."""
        channels, side, size = config.network.config.in_channels, config.data.side, config.data.size
        if config.data.buckets:
            allowed = {(channels, height // 8, width // 8) for width, height in bucket_shapes(size)}
            return "" if shape in allowed else f"one of the shapes around {size} px (data.size = {size}, data.buckets)"
        if shape == (channels, side, side):
            return ""
        hint = "" if shape[1] == shape[2] else "; pictures of different shapes want data.buckets = true"
        return f"{[channels, side, side]} (data.size = {size}){hint}"

    @property
    def count(self) -> int:
        return self.ends[-1]

    def row(self, i: int, draw: float) -> tuple[int, int, int]:
        """Where picture i is: its file, its row there, and the number of the caption that `draw` takes."""
        n = bisect_right(self.ends, i)
        row = i - (self.ends[n - 1] if n else 0)
        captions = self.captions[n][row]
        return n, row, int(captions[int(draw * len(captions))])

    def texts(self, numbers: Sequence[int], draws: Sequence[float]) -> Text:
        return self._text([self.row(i, draw) for i, draw in zip(numbers, draws, strict=True)])

    def _text(self, rows: Sequence[tuple[int, int, int]]) -> Text:
        found = []
        for n, _, caption in rows:
            file, its = self.files[n], self.rows[n]
            first, count = (caption, 1) if its is None else its[caption].tolist()
            states = file.get_slice("states")[first : first + count].flatten(0, 1)[None].float()
            pooled = file.get_slice("pooled")[caption : caption + 1].float() if self.wide else None
            found.append(Text(states, pooled))
        return joined(found)

    def read(self, numbers: Sequence[int], draws: Sequence[float], flips: Sequence[bool] = ()) -> Examples:
        rows = [self.row(i, draw) for i, draw in zip(numbers, draws, strict=True)]

        def one(n: int, row: int, name: str) -> Tensor:
            return self.files[n].get_slice(name)[row : row + 1].float()

        names = ["mirrored" if flip else "latents" for flip in flips or [False] * len(rows)]
        return Examples(
            torch.cat([one(n, row, name) for (n, row, _), name in zip(rows, names, strict=True)]),
            self._text(rows),
            torch.cat([one(n, row, "sizes") for n, row, _ in rows]) if self.wide else None,
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
        self.flip = config.data.flip
        self.weights = (
            step_weights(config.network.alphas) if config.data.timesteps == "snr" else torch.full((STEPS,), 1 / STEPS)
        )
        self.cumulated = self.weights.double().cumsum(0)
        self.order = lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> Sequence[int]:
        return self.source.order(seeded(self.seed, 6, epoch))

    def __getstate__(self) -> dict:
        return {k: v for k, v in vars(self).items() if k != "order"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.order = lru_cache(maxsize=2)(self._order)

    def __call__(self, numbers: Sequence[int]) -> Batch:
        return self.finish(self.load(numbers))

    def load(self, numbers: Sequence[int]) -> Loaded:
        """What of a batch needs no network: a worker process may do it."""
        chosen, draws, dropped, times, noise_of = [], [], [], [], []
        # Of numbers of their own, so that a run without flips draws what it always drew.
        flips = [bool(torch.rand((), generator=seeded(self.seed, 15, n)) < 0.5) for n in numbers] if self.flip else ()
        for n in numbers:
            epoch, at = divmod(n, len(self.source))
            noise_of.append(g := seeded(self.seed, 7, n))
            drop, caption, time = torch.rand(3, generator=g, dtype=torch.float64).tolist()
            chosen.append(self.order(epoch)[at])
            draws.append(caption)
            dropped.append(drop < self.dropout)
            times.append(min(int(torch.searchsorted(self.cumulated, time, right=True)), STEPS - 1))
        read = self.source.read(chosen, draws, flips)
        return Loaded(read, torch.tensor(dropped), torch.tensor(times), [g.get_state() for g in noise_of])

    def finish(self, loaded: Loaded) -> Batch:
        """The batch of what was loaded."""
        found = self.source.encode(loaded.read)
        shape = found.latents.shape[1:]
        noise = []
        for state in loaded.generators:
            g = torch.Generator()
            g.set_state(state)
            noise.append(torch.randn(shape, generator=g))
        text = found.text.where_not(loaded.drop, self.source.empty)
        return Batch(
            found.latents,
            torch.stack(noise),
            loaded.t,
            text.states,
            text.pooled,
            found.sizes,
            torch.zeros(len(loaded.drop), dtype=torch.long) if found.left_out is None else found.left_out,
        )


class Loaded(NamedTuple):
    """A batch before the networks: what the source has read, which captions are dropped, the time steps, and the
    generators' states from which its noise is drawn.
    """

    read: Any
    drop: Tensor
    t: Tensor
    generators: list[Tensor]
