"""Pictures that are encoded as the run goes, the teacher's own pictures, and the choice of a source.

A picture that cannot be read is left out: the next one takes its place, the run counts it and says which it was.
A run whose pictures or captions are drawn often is faster on a cache (`python -m train.encode`).
"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from asdm_core.tensor_file import write_file

from . import shards
from .config import Config
from .data import Cache, Examples, Numbered, Random, Source, pooled_width
from .diffusion import as_v, coefficients, ddim
from .progress import Progress
from .seeds import seeded
from .captions import captioned, read_text, say_unreadable, texts_of
from .buckets import Shape
from .encode import BROKEN, read_picture, shapes_of
from .encoders import (
    Text,
    TextEncoders,
    ToLatents,
    Tokens,
    conditions,
    its_clip_skip,
    joined,
    latents_of,
    load_text,
    load_vae,
    whole,
)
from .provenance import ENCODERS, NETWORK, contents, digest, made, same_file

SHUFFLED = 1000  # pictures of a stream that are shuffled together
TRIES = 100  # pictures in a row that may be broken
THREADS = 8  # that decode pictures
SAMPLES_IN_FILE = 64  # of the teacher's own pictures, and the most that are drawn at once
ENDLESS = 2**62  # the length of a stream
READING = threading.Lock()  # a stream may be asked by several threads for what comes next

Predict = Callable[
    [Tensor, Tensor, Tensor, dict | None], Tensor
]  # x, t, context, SDXL's conditions -> the teacher's output


# Pictures -------------------------------------------------------------------------------------------


class Endless:
    """A stream: it goes on for ever, in an order of its own."""

    def __len__(self) -> int:
        return ENDLESS

    def order(self, generator: torch.Generator) -> Sequence[int]:
        return range(ENDLESS)


class Pictures(Numbered):
    """Pictures with captions, encoded when they are drawn. What is left to others: how many there are, and `open`."""

    def __init__(self, config: Config, to_latents: ToLatents, to_text: TextEncoders):
        self.size = config.data.size
        self.square = (config.data.size, config.data.size)
        self.to_latents = to_latents
        self.to_text = to_text
        self.tokens = to_text.tokenise
        self.wide = bool(pooled_width(config.network.config))
        self.empty = to_text([""]).on_cpu()
        self.named: set[str] = set()

    def open(self, i: int) -> tuple[str, Path | BinaryIO, list[str]]:
        """Picture i: its name, a path or a file to read it from, its captions."""
        raise NotImplementedError

    def after(self, i: int) -> int:
        """The picture that takes the place of a broken one."""
        return (i + 1) % self.count

    def shape(self, i: int) -> Shape:
        """Width and height that picture i is to have."""
        return self.square

    def one(self, i: int, draw: float, flip: bool = False) -> tuple[Tensor, Tensor, str, int]:
        """Picture (3, H, W), sizes (6,), caption, and how many before it were broken."""
        for tries in range(TRIES):
            name = f"picture {i}"
            try:
                name, file, captions = self.open(i)
                picture, sizes = read_picture(file, self.shape(i), flip)
                return picture, sizes, captions[int(draw * len(captions))], tries
            except BROKEN as e:
                if name not in self.named:
                    self.named.add(name)
                    print(f"left out {name}: {e}", flush=True)
                i = self.after(i)
        raise ValueError(
            f"data.path: none of {TRIES} pictures in a row could be read, the last was {name}; is the disk still there?"
        )

    def read(self, numbers: Sequence[int], draws: Sequence[float], flips: Sequence[bool] = ()) -> Read:
        flips = flips or [False] * len(numbers)
        with ThreadPoolExecutor(THREADS) as pool:
            pictures, sizes, captions, left_out = zip(*pool.map(self.one, numbers, draws, flips), strict=True)
        return Read(torch.stack(pictures), torch.stack(sizes), self.tokens(captions), torch.tensor(left_out))

    def encode(self, read: Read) -> Examples:
        # A VAE on the CPU may put out channels last, in which torch 2.11 crashes in the UNet's backward pass.
        latents = self.to_latents(read.pictures).float().cpu().contiguous()
        return Examples(latents, self.to_text(read.tokens).on_cpu(), read.sizes if self.wide else None, read.left_out)

    def __getstate__(self) -> dict:
        return {k: v for k, v in vars(self).items() if k not in ("to_latents", "to_text")}  # which workers do without


class Read(NamedTuple):
    """Pictures (B, 3, H, W) in [-1, 1], SDXL's sizes (B, 6), tokens of the captions, and how many were broken before
    each, (B,). places: where the lanes of shards stand after them.
    """

    pictures: Tensor
    sizes: Tensor
    tokens: list[Tokens]
    left_out: Tensor
    places: Mapping[int, tuple[int, shards.Place]] = {}


class Folder(Pictures):
    """A folder of pictures with captions (train/encode.py)."""

    def __init__(self, config: Config, to_latents: ToLatents, to_text: TextEncoders):
        super().__init__(config, to_latents, to_text)
        folder = Path(config.data.path)
        self.pictures = captioned(folder)
        say_unreadable(self.pictures, folder)
        self.shapes: list[Shape] = []
        if config.data.buckets:
            self.group = config.data.bucket_batch
            self.shapes = shapes_of([path for path, _ in self.pictures], self.size)
            kinds = sorted(set(self.shapes))
            self.buckets = [kinds.index(shape) for shape in self.shapes]

    @property
    def count(self) -> int:
        return len(self.pictures)

    def shape(self, i: int) -> Shape:
        return self.shapes[i] if self.shapes else self.square

    def after(self, i: int) -> int:
        following = ((i + n) % self.count for n in range(1, self.count + 1))
        return next(n for n in following if self.shape(n) == self.shape(i))

    def open(self, i: int) -> tuple[str, Path | BinaryIO, list[str]]:
        path, captions = self.pictures[i]
        return str(path), path, captions


def _texts(caption: object, name: object) -> list[str]:
    """The captions of a picture, from a text, a list, or an entry of JSON with `caption` or `text`. Raises ValueError
    where it has none.
    """
    if isinstance(caption, dict):
        caption = caption.get("caption") or caption.get("text") or ""
    return texts_of(caption, name)


# Webdataset shards ----------------------------------------------------------------------------------


class Shards(Endless, Pictures):
    """Webdataset shards (train/shards.py): tars of NAME.jpg (png, webp ...) with NAME.txt, or NAME.json with `caption`
    or `text`, read as streams.
    """

    def __init__(
        self, config: Config, to_latents: ToLatents, to_text: TextEncoders, process: int = 0, processes: int = 1
    ):
        super().__init__(config, to_latents, to_text)
        urls = shards.urls_of(config.data.path, config.data.pipes)
        self.lanes = shards.Lanes(urls, config.data.lanes, config.seed, config.data.pipes)
        self.urls = digest(urls)
        self.lanes.first(1)  # so that what is wrong with all of them is said now
        self.places: dict[int, tuple[int, shards.Place]] = {}
        self.says_without = False
        readers = processes * max(1, config.run.workers)
        if process == 0 and readers > 1 and self.lanes.count % (config.run.micro_batch * readers):
            print(
                f"{config.data.path}: {len(urls)} shards in {self.lanes.count} lanes; some are read by several of "
                f"{readers} readers. Each reads its own where data.lanes, and the number of shards, is a multiple of "
                f"{config.run.micro_batch * readers} (run.micro_batch x processes x run.workers)",
                flush=True,
            )

    def after(self, i: int) -> int:
        return i + self.lanes.count

    def text(self, count: int) -> Text:
        found = []
        for row in self.lanes.first(TRIES):
            with suppress(*BROKEN):
                found.append(row.captions[0])
        return self.to_text(found[:count] or [""]).on_cpu()

    def read(self, numbers: Sequence[int], draws: Sequence[float], flips: Sequence[bool] = ()) -> Read:
        rows = [self.lanes.row(n) for n in numbers]  # a stream is read in its order
        without = torch.tensor([row.without for row in rows])
        if without.any() and not self.says_without:
            self.says_without = True
            name = next(row.name for row in rows if row.without)
            print(f"pictures without a caption are left out and counted, the first before {name}", flush=True)
        read = super().read(numbers, draws, flips)
        places = {}
        for n, row in zip(numbers, rows, strict=True):
            self.lanes.forget(n)
            c, lane = divmod(n, self.lanes.count)
            places[lane] = (c + 1, row.place)
        return read._replace(left_out=read.left_out + without, places=places)

    def open(self, i: int) -> tuple[str, Path | BinaryIO, list[str]]:
        with READING:
            row = self.lanes.row(i)
        return row.name, io.BytesIO(row.picture), row.captions

    def encode(self, read: Read) -> Examples:
        self.places |= read.places
        return super().encode(read)

    def state(self, n: int) -> dict:
        return {"shards": self.urls, "places": {str(lane): [c, *place] for lane, (c, place) in self.places.items()}}

    def together(self, states: Sequence[dict]) -> dict:
        places: dict[str, list[int]] = {}
        for state in states:
            for lane, place in state["places"].items():
                places[lane] = max(places.get(lane, place), place)
        return {"shards": self.urls, "places": places}

    def restore(self, state: dict) -> None:
        if state["shards"] != self.urls:
            raise ValueError(
                "data.path: these are not the shards that the run began with, so where it stood in them says nothing; "
                "give it those, or delete its checkpoints to start anew"
            )
        for lane, (c, *place) in state["places"].items():
            self.places[int(lane)] = self.lanes.starts[int(lane)] = (c, shards.Place(*place))


# Hugging Face datasets ------------------------------------------------------------------------------


class Hub(Endless, Pictures):
    """A dataset of the Hugging Face datasets library, streamed: columns image (jpg, png, webp) and text (caption, txt).

    Pictures are shuffled within each SHUFFLED of the stream. Every process reads the whole stream and decodes its own
    samples.
    """

    ahead = False  # a stream is read in one order

    def __init__(self, config: Config, to_latents: ToLatents, to_text: TextEncoders):
        super().__init__(config, to_latents, to_text)
        try:
            import datasets
        except ModuleNotFoundError:
            raise ValueError('data.source = "hub" needs the datasets library: pip install datasets') from None
        self.seed = config.seed
        self.stream = datasets.load_dataset(config.data.path, split="train", streaming=True)
        first = list(self.stream.take(4))
        columns = first[0].keys() if first else ()
        self.image, self.caption = (
            next((c for c in wanted if c in columns), None)
            for wanted in (("image", "jpg", "png", "webp"), ("text", "caption", "txt", "json"))
        )
        if self.image is None or self.caption is None:
            raise ValueError(
                f"data.path: {config.data.path} has the columns {', '.join(columns) or 'none'}; wanted image and text"
            )
        self.captions = [_texts(row[self.caption], "the first row")[0] for row in first]
        self.stream = self.stream.cast_column(
            self.image, datasets.Image(decode=False)
        )  # whoever takes a picture decodes it
        self.restore({"window": 0, "stream": None})

    def restore(self, state: dict) -> None:
        if state["stream"] is not None:
            self.stream.load_state_dict(state["stream"])
        self.examples_left = self._read(state["stream"])
        self.windows: dict[int, list[dict]] = {}
        self.starts = {state["window"]: state["stream"]}

    def _read(self, state: dict | None) -> Iterator[dict]:
        epoch = state["epoch"] if state else 0
        while True:
            # A state belongs to its epoch; the next begins anew.
            self.stream.set_epoch(epoch)
            yield from self.stream
            epoch += 1

    def state(self, n: int) -> dict:
        window = max(w for w in self.starts if w <= n // SHUFFLED)
        return {"window": window, "stream": self.starts[window]}

    def _reach(self, w: int) -> None:
        """Read on to window w."""
        while w not in self.windows:
            reached = max(self.starts)
            part = [next(self.examples_left) for _ in range(SHUFFLED)]
            order = torch.randperm(SHUFFLED, generator=seeded(self.seed, 9, reached)).tolist()
            self.windows[reached] = [part[i] for i in order]
            self.starts[reached + 1] = json.loads(json.dumps(self.stream.state_dict()))

    def after(self, i: int) -> int:
        return i - i % SHUFFLED + (i + 1) % SHUFFLED

    def read(self, numbers: Sequence[int], draws: Sequence[float], flips: Sequence[bool] = ()) -> Read:
        self._reach(max(numbers) // SHUFFLED)
        for old in [w for w in self.windows if w < min(numbers) // SHUFFLED]:  # a process never goes back
            del self.windows[old], self.starts[old]
        return super().read(numbers, draws, flips)

    def open(self, i: int) -> tuple[str, Path | BinaryIO, list[str]]:
        row = self.windows[i // SHUFFLED][i % SHUFFLED]
        picture = row[self.image]
        file = io.BytesIO(picture["bytes"]) if picture["bytes"] else Path(picture["path"])
        name = picture["path"] or f"picture {i}"
        return name, file, _texts(row[self.caption], name)

    def text(self, count: int) -> Text:
        return self.to_text(self.captions[:count]).on_cpu()


# The teacher's own pictures -------------------------------------------------------------------------


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a text file that hold something. Raises ValueError where there are none."""
    try:
        prompts = [line.strip() for line in read_text(Path(path)).splitlines() if line.strip()]
    except OSError as e:
        raise ValueError(
            f"data.path: {path}: cannot be read ({e.strerror}); wanted a text file with a prompt in each line"
        ) from None
    if not prompts:
        raise ValueError(f"data.path: {path} holds no prompts; wanted one in each line")
    return prompts


class Prompts(Endless, Numbered):
    """Pictures the teacher draws from prompts, in latents, new ones for every sample of the run: an epoch
    never ends.
    """

    ahead = False  # there is nothing to read

    def __init__(self, config: Config, predict: Predict, to_text: TextEncoders, device: torch.device):
        self.config = config
        self.predict = predict
        self.device = device
        self.prompts = read_prompts(config.data.path)
        self.to_text = to_text
        self.wide = bool(pooled_width(config.network.config))
        self.empty = to_text([""]).on_cpu()

    @property
    def settings(self) -> dict:
        """What a picture of a number depends on."""
        config = self.config
        return {
            "network.teacher": contents(config.network.teacher, NETWORK),
            "network.prediction": config.network.prediction,
            "schedule": dict(config.network.noise.settings),
            **text_settings(config),
            "hash of the prompts": digest(self.prompts),
            "seed": config.seed,
            "data.size": config.data.size,
            "samples.steps": config.samples.steps,
            "samples.guidance": config.samples.guidance,
        }

    def text(self, count: int) -> Text:
        return self.to_text(self.prompts[:count]).on_cpu()

    def texts(self, numbers: Sequence[int], draws: Sequence[float]) -> Text:
        return self.to_text([self.prompts[n % len(self.prompts)] for n in numbers]).on_cpu()

    def read(self, numbers: Sequence[int], draws: Sequence[float], flips: Sequence[bool] = ()) -> list[int]:
        return list(numbers)

    def encode(self, numbers: Sequence[int]) -> Examples:
        text = self.texts(numbers, [])
        side, channels = self.config.data.side, self.config.network.config.in_channels
        noise = torch.stack(
            [torch.randn(channels, side, side, generator=seeded(self.config.seed, 8, n)) for n in numbers]
        )
        sizes = whole(self.config.data.size).expand(len(noise), -1) if self.wide else None
        return Examples(draw(self.config, self.predict, noise.to(self.device), text, self.empty).cpu(), text, sizes)


@torch.no_grad()
def draw(config: Config, predict: Predict, noise: Tensor, text: Text, empty: Text) -> Tensor:
    """Latents a network draws from noise (B, C, h, w) by DDIM with the recipe's steps and guidance. Returns (B, C, h,
    w), float32.
    """
    device = noise.device
    added = conditions(text, empty, 1 if config.samples.guidance == 1 else 2, config.data.size, device)

    def predict_v(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return as_v(
            predict(x, t, context, added), x, *coefficients(t, config.network.alphas), config.network.prediction
        )

    return ddim(
        predict_v,
        noise,
        text.states.to(device),
        empty.states.to(device),
        config.samples.steps,
        config.samples.guidance,
        config.network.alphas,
    )


class Drawn(Endless, Numbered):
    """Pictures that a network draws for the captions of another source, new ones all the time, each for `uses` samples
    in a row: an epoch never ends. Captions come as in train/rollout.py: an epoch of the source gives each once.

    Whoever changes the network does so between batches, which are a multiple of `uses`: a picture is drawn once for
    samples that are asked for one part after the other.
    """

    ahead = False  # the network may be another one at each step

    def __init__(self, config: Config, captions: Source, predict: Predict, device: torch.device):
        self.config, self.captions, self.predict, self.device = config, captions, predict, device
        self.empty = captions.empty
        self.wide = bool(pooled_width(config.network.config))
        self.drawn: dict[int, tuple[Tensor, Text]] = {}  # by number: those of the last part
        self.epoch = lru_cache(maxsize=2)(lambda epoch: captions.order(seeded(config.seed, 17, epoch)))

    def text(self, count: int) -> Text:
        return self.captions.text(count)

    def read(self, numbers: Sequence[int], draws: Sequence[float], flips: Sequence[bool] = ()) -> list[int]:
        return list(numbers)

    def encode(self, numbers: Sequence[int]) -> Examples:
        uses = self.config.styles.uses
        pictures = list(dict.fromkeys(n // uses for n in numbers))
        new = [n for n in pictures if n not in self.drawn]
        if new:
            latents, text = self._draw(new)
            pooled = None if text.pooled is None else text.pooled.split(1)
            texts = [Text(row, pooled[i] if pooled else None) for i, row in enumerate(text.states.split(1))]
            self.drawn |= dict(zip(new, zip(latents.split(1), texts, strict=True), strict=True))
        self.drawn = {n: self.drawn[n] for n in pictures}
        found = [self.drawn[n // uses] for n in numbers]
        sizes = whole(self.config.data.size).expand(len(found), -1) if self.wide else None
        return Examples(torch.cat([latents for latents, _ in found]), joined([text for _, text in found]), sizes)

    def _draw(self, pictures: Sequence[int]) -> tuple[Tensor, Text]:
        config = self.config
        places = [divmod(n, len(self.captions)) for n in pictures]
        draws = [float(torch.rand((), generator=seeded(config.seed, 18, n), dtype=torch.float64)) for n in pictures]
        text = self.captions.texts([self.epoch(epoch)[at] for epoch, at in places], draws)
        side, channels = config.data.side, config.network.config.in_channels
        noise = torch.stack([torch.randn(channels, side, side, generator=seeded(config.seed, 19, n)) for n in pictures])
        return draw(config, self.predict, noise.to(self.device), text, self.empty).cpu(), text

    def state(self, n: int) -> dict:
        return self.captions.state(n // self.config.styles.uses)

    def restore(self, state: dict) -> None:
        self.captions.restore(state)


def write_samples(folder: Path, source: Prompts, count: int, batch: int, process: int = 0, processes: int = 1) -> None:
    """Draw `count` pictures into a cache in `folder`, or what is missing of them; each process makes its share of the
    files.

    Raises ValueError where the folder holds pictures that were drawn otherwise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [
        (folder / f"{n // SAMPLES_IN_FILE:05d}.safetensors", range(n, min(n + SAMPLES_IN_FILE, count)))
        for n in range(0, count, SAMPLES_IN_FILE)
    ]
    drawn_with = source.settings | {"samples.count": count}
    for path, _ in files:
        if path.exists():
            same_file(path, drawn_with, f"delete {folder} to have them drawn anew, or choose another run.folder")
    # Shared out first: what is missing changes while the others draw.
    missing = [(path, numbers) for path, numbers in files[process::processes] if not path.exists()]
    progress = Progress("the teacher draws", sum(len(numbers) for _, numbers in missing))
    done = 0
    for path, numbers in missing:
        parts = []
        for at in range(0, len(numbers), batch):
            parts.append(source.examples(numbers[at : at + batch], []))
            progress.show(done + min(at + batch, len(numbers)))
        done += len(numbers)
        text = joined([p.text for p in parts])
        rows = text.states.unflatten(1, (-1, source.empty.states.shape[1]))
        tensors = {
            "latents": torch.cat([p.latents for p in parts]).half(),
            "captions": torch.arange(len(numbers))[:, None],
            "states": rows.flatten(0, 1).half(),
            "empty": source.empty.states[0].half(),
        }
        if rows.shape[1] > 1:
            tensors["rows"] = torch.tensor([[n * rows.shape[1], rows.shape[1]] for n in range(len(rows))])
        if text.pooled is not None and source.empty.pooled is not None:
            tensors |= {
                "pooled": text.pooled.half(),
                "empty_pooled": source.empty.pooled[0].half(),
                "sizes": torch.cat([p.sizes for p in parts if p.sizes is not None]),
            }
        if not tensors["latents"].isfinite().all():
            raise ValueError(
                "the teacher draws pictures that are not finite; is network.prediction right, and samples.guidance not "
                "too high?"
            )
        write_file(path, tensors, made(drawn_with))
    if missing:
        progress.end()


# The choice -----------------------------------------------------------------------------------------

PICTURES: dict[str, Callable[..., Pictures]] = {"folder": Folder, "shards": Shards, "hub": Hub}


def encoders(config: Config) -> str:
    """Where VAE and text encoder come from."""
    return config.encoders.models or config.network.teacher


def text_settings(config: Config) -> dict[str, str | int]:
    """What the states of a prompt depend on beside the prompt."""
    models = Path(encoders(config))
    return {
        "clip skip": config.encoders.clip_skip or (its_clip_skip(models) if models.exists() else 0),
        "encoders.models": contents(encoders(config), ENCODERS),
        "encoders.tokenizer": contents(config.encoders.tokenizer) if config.encoders.tokenizer else "",
        "encoders.rows": config.encoders.rows,
    }


def open_source(
    config: Config,
    predict: Predict | None = None,
    device: torch.device | str = "cpu",
    process: int = 0,
    processes: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> Source:
    """The data a recipe names. Raises ValueError.

    predict: the teacher, for the source "prompts". wait: until all processes are there.
    """
    data = config.data
    if data.source == "random":
        return Random(config)
    if not data.path:
        raise ValueError("data.path: give the data to learn from, or data.source = random to try things out")
    if data.source == "cache":
        return Cache(data.path, config)
    given = config.encoders
    to_text = load_text(encoders(config), given.tokenizer, device, given.clip_skip, given.rows)
    if data.source in PICTURES:
        given_too = {"process": process, "processes": processes} if data.source == "shards" else {}
        to_latents = latents_of(load_vae(encoders(config), device))
        pictures = PICTURES[data.source](config, to_latents, to_text, **given_too)
        _check_width(pictures.empty, config)
        return pictures
    source = Prompts(config, predict or _no_teacher, to_text, torch.device(device))
    _check_width(source.empty, config)
    if not config.samples.count or config.rollout.steps or config.styles.draws:  # these take the prompts alone
        return source
    folder = config.folder / "samples"
    write_samples(folder, source, config.samples.count, config.run.micro_batch, process, processes)
    wait()
    cache = Cache(folder, config)
    if len(cache) != config.samples.count:
        raise ValueError(
            f"{folder} holds {len(cache)} pictures, wanted samples.count = {config.samples.count}; delete it to have "
            "them drawn anew"
        )
    return cache


def _no_teacher(*_: object) -> Tensor:
    raise ValueError('data.source = "prompts": there is no teacher here to draw with')


def _check_width(text: Text, config: Config) -> None:
    if text.states.shape[-1] != config.network.config.context_dim:
        raise ValueError(
            f"encoders.models: {encoders(config)} has text states {text.states.shape[-1]} wide, a UNet of "
            f"{config.network.family} takes {config.network.config.context_dim}"
        )
