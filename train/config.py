"""What a training run is: frozen dataclasses, read from a recipe (TOML) and `--set key=value`.

A recipe may begin with `extends = "other.toml"` and then only says what differs. Unknown keys and
values of the wrong type are errors.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from asdm_core import condconv
from asdm_core.addresses import UNetConfig, in_order, select
from asdm_core.architecture import FAMILIES, Architecture
from asdm_core.condconv import FORMS, CondConv, convolutions, sharing
from asdm_core.gri import GRI, LogGains

from .buckets import STEP
from .diffusion import STEPS, simple_times
from .optimisation import KINDS as KINDS_OF_OPTIMISERS
from .losses import LATENT_RGB, LOSSES, PREDICTIONS
from .schedules import SCHEDULES, Schedule, read_schedule
from .taps import KINDS, Tap

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    try:
        import tomli as tomllib
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "recipes are TOML, which Python 3.10 cannot read by itself: pip install tomli"
        ) from None


@dataclass(frozen=True)
class Range:
    """What a number may be: from `low` to `high`, both included; without: less than `high`. Infinity and nan never."""

    low: float
    high: float = math.inf
    without: bool = False
    multiple: int = 0

    def __contains__(self, value: float) -> bool:
        if not self.low <= value <= self.high or value == math.inf or self.without and value == self.high:
            return False  # nan as well
        return not self.multiple or value % self.multiple == 0

    def __str__(self) -> str:
        text = f"at least {self.low:g}" if self.high == math.inf else f"between {self.low:g} and {self.high:g}"
        text += f", {self.high:g} excluded" if self.without else ""
        return text + (f", in steps of {self.multiple}" if self.multiple else "")


def number(default: Any, low: float, high: float = math.inf, without: bool = False, multiple: int = 0) -> Any:
    """A setting that is a number, or a list of them, and its range."""
    return field(default=default, metadata={"range": Range(low, high, without, multiple)})


TRAINED = ("own", "all", "none")
STARTS = (*condconv.STARTS, "clme")
SOURCES = ("cache", "folder", "shards", "hub", "prompts", "random")
PICTURED = ("cache", "folder", "shards", "hub")  # those with pictures of one's own
HELD_OUT = ("cache", "folder", "shards")
RATES = ("trapezoid", "cosine", "linear", "polynomial", "constant_with_warmup")
TIMESTEPS = ("uniform", "snr")
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of the forward passes
SAMPLERS = ("dpmpp_2m", "ddim")
STATES = ("own", "teacher", "pairs")
STORED = ("float32", "float16", "bfloat16", "int8")


@dataclass(frozen=True)
class Network:
    """The original network.

    shape: the UNet of a family as a table, where it is none of FAMILIES.
    teacher: its weights, any file or folder Load Pruned UNet takes; "random" draws them from the run's seed.
    teacher_outputs: folder of its outputs for the samples of this run (train/teacher_outputs.py); empty: they are
    computed as the run goes.
    schedule: its noise schedule (train/schedules.py); empty: as its files say.
    """

    family: str = "sd15"
    teacher: str = ""
    prediction: str = "eps"
    teacher_outputs: str = ""
    schedule: str = ""
    shape: dict | None = None

    @property
    def config(self) -> UNetConfig:
        if self.shape is not None:
            return UNetConfig.from_dict({"family": self.family} | self.shape)
        return _one_of(FAMILIES, self.family, "network.family")

    @property
    def noise(self) -> Schedule:
        """The teacher's noise schedule. Raises ValueError for one that its prediction cannot go with."""
        found = read_schedule(self.teacher, self.schedule)
        if found.zero_snr and self.prediction == "eps":
            raise ValueError(
                f"network.prediction: {self.teacher or 'the teacher'} ends in noise alone (zero terminal SNR), where "
                "the noise says nothing of the picture; such models predict v: set network.prediction = v"
            )
        return found

    @property
    def alphas(self) -> Tensor:
        """a^2 by step of this schedule, (1000,)."""
        return self.noise.alphas


@dataclass(frozen=True)
class Student:
    """What is cut, what is trained and where it starts.

    preset: a row of asdm_core.architecture.PRESETS, or "full" to train the teacher on; or cut and on: range expressions
    of Architecture.choose. start: product of the stage before, whose weights its own units take; empty: the teacher's.
    trained: "own": the units the architecture calls its own, everything else frozen; "all"; "none", for a LoRA alone.
    stem: whether a combined UNet's conv_in, norm_out and conv_out are trained too. They belong to the host
    by default: a pack must fit any finetune.
    """

    preset: str = ""
    cut: str = ""
    on: str = "*"
    start: str = ""
    trained: str = "own"
    stem: bool = False


@dataclass(frozen=True)
class Experts:
    """Further experts of the student's convolutions (asdm_core/condconv.py).

    on: range expression of the units whose 3x3 convolutions get them, where these are kept; empty: none.
    count: experts of each convolution, its own included.
    start: "zero" changes nothing at first; "random" is the papers' start; "clme" gathers them from the teacher's other
    layers of the same block, as many as fit (A-SDM, section 2.3), and then `count` says nothing.
    form: "difference" or "mixture". router: whether the routers are trained.
    """

    on: str = ""
    count: int = number(2, 2, 64)
    start: str = "zero"
    form: str = "difference"
    router: bool = True


@dataclass(frozen=True)
class Regional:
    """GRI attention (asdm_core/gri.py) in the student, whose gains, one for each head, are trained.

    on: range expression of the units whose self-attention it replaces; empty: none.
    window, pool: in tokens, as GRI.choose takes them; 0 leaves the choice to it.
    """

    on: str = ""
    window: int = number(0, 0)
    pool: int = number(0, 0)

    def sized(self, side: int) -> GRI:
        """The settings for a square map."""
        return GRI.choose(side, side, self.window, self.pool)


@dataclass(frozen=True)
class Lora:
    """A LoRA (train/lora.py) on what is not trained itself.

    rank: 0 for none; no layer gets more than its own rank. alpha: 0 for the rank. on: range expression of units.
    convolutions: whether convolutions get one (LoCon), or linear layers alone. start: LoRA file of the stage before, of
    this rank or smaller ones. trained: whether it learns; if not, that of start stays as it is, on all of the student,
    and the units of a pack learn to play with it.
    """

    rank: int = number(0, 0)
    alpha: float = number(0.0, 0)
    on: str = "*"
    convolutions: bool = True
    start: str = ""
    trained: bool = True


@dataclass(frozen=True)
class Rollout:
    """A student of few steps without guidance (train/rollout.py).

    steps: evaluations of the student in a run, in turn: [8, 4, 2] gives each a third of the training; empty: no
    rollout. teacher_steps: of the teacher, a multiple of each. times: its time steps, descending; empty: those of the
    host's scheduler "simple". sampler, guidance: of the teacher.
    uses: how often each trajectory is walked; window: how many are shuffled together; bank: folder for them, which runs
    with the same teacher and prompts may share; empty: in the run's folder.
    states: "own" of the student; "teacher": its trajectory's; "pairs": of noise and picture of a trajectory
    (Rectified Diffusion).
    """

    steps: tuple[int, ...] = number((), 1, STEPS)
    teacher_steps: int = number(8, 1, STEPS)
    times: tuple[int, ...] = number((), 0, STEPS - 1)
    sampler: str = "dpmpp_2m"
    guidance: float = number(3.0, 1)
    uses: int = number(3, 1)
    window: int = number(128, 1)
    states: str = "own"
    bank: str = ""

    @property
    def scheduler(self) -> str:
        """The host's name of the time steps."""
        return "custom" if self.times else "simple"

    @property
    def teacher_times(self) -> tuple[int, ...]:
        return self.times or simple_times(self.teacher_steps)

    def student_times(self, steps: int) -> tuple[int, ...]:
        times = self.teacher_times
        return times[:: len(times) // steps]


@dataclass(frozen=True)
class Styles:
    """The networks that teach, drawn from a set (train/styles.py), for a pack that rides on each as a difference.

    checkpoints: finetunes of network.teacher, files or diffusers folders; loras: LoRA files for any of them. Without
    either, and with teacher = 1, network.teacher teaches alone.
    teacher: share of the turns in which it does. merged: share of the others with a merge of two of the networks,
    network.teacher among them. lora: share of the others with a LoRA on them; random: of these, share whose LoRA is a
    random one, where loras are given. rank, strength: of a random LoRA, whose change of a weight is at most so large in
    proportion to the weight. every: steps of a turn.
    draws: whether the network of a step draws its pictures itself, by [samples], for captions of the data; uses:
    samples of each such picture.
    """

    checkpoints: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()
    teacher: float = number(1.0, 0, 1)
    merged: float = number(0.3, 0, 1)
    lora: float = number(0.5, 0, 1)
    random: float = number(0.5, 0, 1)
    rank: int = number(16, 1)
    strength: float = number(0.1, 0)
    every: int = number(1, 1)
    draws: bool = False
    uses: int = number(1, 1)

    @property
    def many(self) -> bool:
        """Whether there is more than network.teacher in the set."""
        return self.teacher < 1


@dataclass(frozen=True)
class Data:
    """Latents and text states to learn from.

    source, and what `path` is then (train/sources.py):
        "cache"    file or folder made by `python -m train.encode`
        "folder"   pictures with captions, encoded as the run goes
        "shards"   the same in webdataset tars, streamed: file, folder, pattern or addresses (train/shards.py)
        "hub"      dataset of the Hugging Face datasets library, streamed: its name, or a local folder
        "prompts"  text file, a prompt a line: the teacher draws the pictures itself (section [samples])
        "random"   nothing; for trying things out
    size: pixels of the pictures, square. timesteps: "uniform", or "snr": rarely those with little noise in them.
    buckets: whether pictures keep their aspect ratio, in shapes of about that area (train/buckets.py), for "cache" and
    "folder"; bucket_batch: samples in a row that have one shape, a multiple of run.micro_batch.
    lanes: shards that are read side by side; each process and worker reads its own where it is a multiple of
    run.micro_batch, processes and workers. pipes: whether `path` may name commands of the shell (pipe:).
    flip: whether every other picture is mirrored. held_out: another path of the same kind, whose pictures are not
    trained on: the losses of the averaged weights on held_out_count of them go into the log with the pictures
    (run.picture_every); empty: none.
    """

    source: str = "cache"
    path: str = ""
    size: int = number(512, 8, 8192, multiple=8)
    caption_dropout: float = number(0.1, 0, 1)
    timesteps: str = "uniform"
    buckets: bool = False
    bucket_batch: int = number(16, 1)
    lanes: int = number(16, 1, 65536)
    pipes: bool = False
    flip: bool = False
    held_out: str = ""
    held_out_count: int = number(64, 1)

    @property
    def side(self) -> int:
        """Of the latents."""
        return self.size // 8


@dataclass(frozen=True)
class Encoders:
    """VAE and text encoder, for all sources but "cache" and "random".

    models: diffusers folder or checkpoint of SD1.5 or SDXL; empty: network.teacher.
    tokenizer: folder of CLIP's vocabulary, where models has none; empty: that of the ComfyUI this pack lies in.
    clip_skip: the layer of the text encoder that is taken, from its end; 0: as the model says or as its family has it
    (1 for SD1.5, 2 for SDXL). Finetunes that descend from NovelAI's want 2.
    rows: the most of a caption, each of 75 tokens; what is longer is cut.
    """

    models: str = ""
    tokenizer: str = ""
    clip_skip: int = number(0, 0, 24)
    rows: int = number(3, 1, 4)


@dataclass(frozen=True)
class Samples:
    """The teacher's own pictures, for the source "prompts".

    count: pictures made before training and kept in the run's folder; 0: new ones for every step.
    steps, guidance: of DDIM, from the prompt and the empty prompt.
    """

    count: int = number(2000, 0)
    steps: int = number(25, 1, STEPS)
    guidance: float = number(7.5, 1)


@dataclass(frozen=True)
class Loss:
    """Weights of the losses (train/losses.py); 0 leaves one out.

    relative: features (blocks, layers, attention, mid) in proportion to the teacher's.
    vgg: file of the weights of the perceptual loss's VGG16; empty: torchvision's own cache.
    classifier: folder of the emoji family's weights, whose classifier then takes the place of VGG; for that family
    alone. perceptual_until: timesteps from which x_0 shows nothing yet. perceptual_warmup: steps over which its weight
    rises.
    """

    task: float = number(1.0, 0)
    output: float = number(1.0, 0)
    blocks: float = number(0.0, 0)
    layers: float = number(0.0, 0)
    attention: float = number(0.0, 0)
    mid: float = number(0.0, 0)
    perceptual: float = number(0.0, 0)
    rollout: float = number(0.0, 0)
    relative: bool = False
    vgg: str = ""
    classifier: str = ""
    perceptual_until: int = number(800, 0, STEPS)
    perceptual_warmup: int = number(1000, 0)

    @property
    def weights(self) -> dict[str, float]:
        """Those that are not 0, by name."""
        return {name: weight for name in LOSSES if (weight := getattr(self, name))}


@dataclass(frozen=True)
class Optimiser:
    """The optimiser, with clipped gradients, a course of the learning rate (steps), and the average of the weights.

    kind: "adamw"; "adamw-8bit" (bitsandbytes) or "adamw-8bit-torchao", whose moments take a quarter; "adafactor", which
    keeps a third of them for 3x3 convolutions and hardly any for the rest, and has no betas; "muon", which keeps half.
    clip: the largest norm of the gradient; 0 for no clipping. schedule: "trapezoid" (warm-up, constant, cooldown to 0),
    or one of diffusers' schedules over the whole run, with warm-up and without cooldown.
    """

    lr: float = number(5e-5, 0)
    betas: tuple[float, float] = number((0.9, 0.999), 0, 1, without=True)
    weight_decay: float = number(0.01, 0, 1)
    clip: float = number(1.0, 0)
    warmup: int = number(0, 0)
    cooldown: int = number(0, 0)
    ema: float = number(0.9999, 0, 1)
    schedule: str = "trapezoid"
    kind: str = "adamw"


@dataclass(frozen=True)
class RunSettings:
    """How long, how large, how exact, where.

    batch: samples of one update, over all processes; micro_batch: of one forward pass of one process. The
    rest is gradient accumulation, so a run is the same run on any number of processes.
    shard: share weights, gradients, optimiser and average out among the processes (FSDP2) instead of copying them
    (DDP). precision: of the forward passes; weights are float32. folder: for checkpoints, the log and the product.
    stored: dtype of the product. picture_every: steps between two pictures of teacher and student, 0 for none.
    tensorboard: whether the log goes to TensorBoard as well, with pictures. trackers: others that it goes to, by
    accelerate's names ("wandb", "mlflow", ...), with all settings. workers: processes that read the data ahead, for
    each process of the run; 0: it reads by itself. offload: keep moments and average on the CPU, where
    AdamW's step is then made. compile: backend of torch.compile ("inductor") for the parts of teacher and student;
    empty: none.
    """

    steps: int = number(50_000, 1)
    batch: int = number(256, 1)
    micro_batch: int = number(8, 1)
    workers: int = number(0, 0, 64)
    shard: bool = False
    offload: bool = False
    compile: str = ""
    precision: str = "no"
    checkpoint_gradients: bool = False
    save_every: int = number(1000, 1)
    keep: int = number(2, 1)
    log_every: int = number(50, 1)
    picture_every: int = number(1000, 0)
    tensorboard: bool = False
    trackers: tuple[str, ...] = ()
    folder: str = ""
    stored: str = "float16"


@dataclass(frozen=True)
class Config:
    """A whole recipe."""

    name: str
    seed: int = number(1234, 0, 2**63 - 1)
    network: Network = field(default_factory=Network)
    student: Student = field(default_factory=Student)
    experts: Experts = field(default_factory=Experts)
    gri: Regional = field(default_factory=Regional)
    lora: Lora = field(default_factory=Lora)
    rollout: Rollout = field(default_factory=Rollout)
    styles: Styles = field(default_factory=Styles)
    data: Data = field(default_factory=Data)
    encoders: Encoders = field(default_factory=Encoders)
    samples: Samples = field(default_factory=Samples)
    loss: Loss = field(default_factory=Loss)
    optimiser: Optimiser = field(default_factory=Optimiser)
    run: RunSettings = field(default_factory=RunSettings)

    def __post_init__(self):
        for key, allowed in (
            ("network.prediction", PREDICTIONS),
            ("network.schedule", SCHEDULES),
            ("student.trained", TRAINED),
            ("experts.start", STARTS),
            ("experts.form", FORMS),
            ("data.source", SOURCES),
            ("data.timesteps", TIMESTEPS),
            ("rollout.sampler", SAMPLERS),
            ("rollout.states", STATES),
            ("optimiser.schedule", RATES),
            ("optimiser.kind", KINDS_OF_OPTIMISERS),
            ("run.precision", PRECISIONS),
            ("run.stored", STORED),
        ):
            section, _, name = key.partition(".")
            _one_of(dict.fromkeys(allowed), getattr(getattr(self, section), name), key)
        for key, value, allowed in _numbers(self):
            if value not in allowed:
                raise ValueError(f"{key} must be {allowed}, got {value}")
        if self.name in ("", ".", "..") or set(self.name) & set("/\\:"):
            raise ValueError(
                f"name: wanted a plain file name, for the folder and the files of the run, got {self.name!r}"
            )
        if not self.loss.weights:
            raise ValueError(f"loss: one of the weights must be above 0: {', '.join(LOSSES)}")
        if self.optimiser.cooldown and self.optimiser.schedule != "trapezoid":
            raise ValueError(f"optimiser.cooldown: {self.optimiser.schedule} has its own end; set it to 0")
        if self.run.shard and self.run.precision == "fp16":
            raise ValueError("run.shard does not go with fp16, whose gradient scaler needs gradients whole; use bf16")
        self._check_data()
        self._check_memory()
        if bool(self.student.preset) == bool(self.student.cut):
            raise ValueError("student: give either preset or cut")
        if self.loss.classifier and self.network.family != "emoji":
            raise ValueError(
                f"loss.classifier: it knows the pictures of the emoji family alone, not of {self.network.family!r}"
            )
        if self.loss.perceptual and not self.loss.classifier and self.network.family not in LATENT_RGB:
            raise ValueError(
                f"loss.perceptual: the latents of {self.network.family!r} have no known way to a picture; "
                f"possible with {', '.join(LATENT_RGB)}, or for emoji with loss.classifier"
            )
        if self.gri.window and self.gri.pool:
            GRI(self.gri.window, self.gri.pool)
        # Raises for a choice of units that cannot work, of the network, its experts or its gains.
        trains = {"all": True, "own": bool(self.architecture.own), "none": False}[self.student.trained]
        if not (self.condconv or self.gains or trains or self.lora.rank):
            raise ValueError(
                f"{self.name} trains nothing: student.preset = {self.student.preset!r} leaves the original as it is; "
                "set "
                "student.trained = all, experts.on, gri.on or lora.rank"
            )
        if self.student.start and not (self.architecture.own or self.student.stem):
            raise ValueError(
                f"student.start: with student.preset = {self.student.preset!r} the student is the original, whose "
                "weights it begins "
                "with; set student.start to nothing"
            )
        self._check_lora()
        self._check_rollout()
        self._check_styles()
        _ = self.taps  # raises as well

    def _check_data(self) -> None:
        data, run = self.data, self.run
        if data.flip and data.source not in PICTURED:
            raise ValueError(
                f"data.flip: {data.source!r} has no pictures to mirror; possible with {', '.join(PICTURED)}"
            )
        if data.held_out and (data.source not in HELD_OUT or self.rollout.steps or self.network.teacher_outputs):
            raise ValueError(
                f"data.held_out: possible with the sources {', '.join(HELD_OUT)}, without rollout and without "
                "network.teacher_outputs, which are of other samples"
            )
        if not data.buckets:
            return
        if data.source not in ("cache", "folder"):
            raise ValueError(
                f"data.buckets: the shapes of {data.source!r} are not known beforehand; encode the pictures into a "
                'cache (python -m train.encode --buckets), or take the source "folder"'
            )
        if data.size % STEP:
            raise ValueError(f"data.size: with data.buckets a multiple of {STEP}, got {data.size}")
        if data.bucket_batch % run.micro_batch or run.batch % data.bucket_batch:
            raise ValueError(
                f"data.bucket_batch = {data.bucket_batch}: wanted a multiple of run.micro_batch = {run.micro_batch} "
                f"that run.batch = {run.batch} is a multiple of"
            )
        if self.gri.on or self.rollout.steps:
            raise ValueError("data.buckets does not go with gri or rollout, which want square pictures; leave it out")

    def _check_memory(self) -> None:
        run, kind = self.run, self.optimiser.kind
        if run.offload and (kind != "adamw" or run.shard):
            raise ValueError(
                "run.offload goes with optimiser.kind = adamw and without run.shard; leave one of them out, got "
                f"{kind!r}{' and run.shard' if run.shard else ''}"
            )
        if run.shard and kind != "adamw":
            raise ValueError(f"run.shard goes with optimiser.kind = adamw, got {kind!r}")
        if run.compile and run.shard:
            raise ValueError("run.compile does not go with run.shard; leave one of them out")
        backends = torch.compiler.list_backends(exclude_tags=()) if run.compile else []
        if run.compile and run.compile not in backends:
            raise ValueError(f"run.compile: {run.compile!r} is none of torch's backends: {', '.join(backends)}")

    def _check_lora(self) -> None:
        if not self.lora.rank:
            if self.lora.start:
                raise ValueError("lora.start: set lora.rank to that of the file")
            return
        if not self.lora.trained and not (self.lora.start and self.makes_network):
            raise ValueError(
                "lora.trained = false is for a pack that learns to play with a LoRA: name that in lora.start, and "
                "choose a preset with units of its own and student.trained = own"
            )
        if self.student.trained == "all":
            raise ValueError("lora.rank: with student.trained = all nothing is left for a LoRA; choose own or none")
        if self.condconv or self.gains:
            raise ValueError("lora.rank does not go with further experts or gains; train one after the other")
        if self.run.shard:
            raise ValueError("lora.rank does not go with run.shard, which splits the weights it changes; leave it out")
        select(self.network.config, self.lora.on)

    def _check_rollout(self) -> None:
        rollout = self.rollout
        others = [name for name in self.loss.weights if name != "rollout"]
        if bool(rollout.steps) != bool(self.loss.rollout):
            raise ValueError(
                "loss.rollout and rollout.steps go together: one is the weight of the loss, the other the steps of the "
                f"student; got {self.loss.rollout} and {list(rollout.steps)}"
            )
        if not rollout.steps:
            return
        if others:
            raise ValueError(
                f"loss.{others[0]}: a rollout has nothing to compare but where its steps land; set all other losses "
                "to 0"
            )
        times = rollout.teacher_times
        if list(times) != sorted(set(times), reverse=True):
            raise ValueError(f"rollout.times: wanted descending whole numbers from {STEPS - 1} to 0, got {list(times)}")
        for steps in rollout.steps:
            if len(times) % steps:
                raise ValueError(
                    f"rollout.steps: {steps} does not divide the teacher's {len(times)} steps; change "
                    "rollout.teacher_steps"
                )
        if self.run.shard:
            raise ValueError("rollout does not go with run.shard; leave it out")

    def _check_styles(self) -> None:
        styles, run = self.styles, self.run
        if styles.draws and (self.rollout.steps or self.data.held_out or self.data.flip or self.data.buckets):
            raise ValueError(
                "styles.draws: of the data the captions are taken, and no pictures; it does not go with rollout, "
                "data.held_out, data.flip or data.buckets"
            )
        if styles.draws and run.batch % styles.uses:
            raise ValueError(f"styles.uses = {styles.uses}: run.batch = {run.batch} must be a multiple of it")
        if not styles.many:
            if styles.checkpoints or styles.loras:
                raise ValueError(
                    "styles.teacher: with 1 network.teacher teaches alone, styles.checkpoints and styles.loras never; "
                    "set it to the share of the steps that it is to have, such as 0.25"
                )
            return
        if self.student.trained == "all" or self.condconv or self.gains:
            raise ValueError(
                "styles: only what can ride on another network as a difference is trained over many: a pack's own "
                "units (student.trained = own) and a LoRA, without further experts or gains"
            )
        for there, name in (
            (self.rollout.steps, "rollout"),
            (run.shard, "run.shard"),
            (self.network.teacher_outputs, "network.teacher_outputs"),
        ):
            if there:
                raise ValueError(f"styles does not go with {name}: it belongs to one teacher; leave one of them out")

    @property
    def architecture(self) -> Architecture:
        config = self.network.config
        if self.student.preset == "full":
            return Architecture.full(config)
        if self.student.preset:
            return Architecture.preset(self.student.preset, config)
        return Architecture.choose(config, self.student.cut, self.student.on)

    @property
    def condconv(self) -> CondConv | None:
        """The convolutions with further experts; None where the recipe asks for none."""
        architecture, unet = self.architecture, self.network.config
        if not self.experts.on:
            return None
        units = set(select(unet, self.experts.on)) - architecture.cut
        chosen = [address for address, conv in convolutions(unet).items() if conv.unit.address in units]
        if self.experts.start == "clme":
            return sharing(unet, chosen, self.experts.form)[0]
        if not chosen:
            raise ValueError(
                f"experts.on: {self.experts.on!r} holds no convolution that {architecture.name or 'the student'} keeps"
            )
        return CondConv(dict.fromkeys(chosen, self.experts.count), self.experts.form)

    @property
    def gains(self) -> LogGains | None:
        """The transformers with GRI attention; None where the recipe asks for none."""
        architecture = self.architecture
        if not self.gri.on:
            return None
        units = set(select(self.network.config, self.gri.on))
        chosen = [u.address for u in architecture.kept if u.kind == "transformer" and u.address in units]
        if not chosen:
            raise ValueError(
                f"gri.on: {self.gri.on!r} holds no transformer that {architecture.name or 'the student'} keeps"
            )
        for u in architecture.kept:
            side = self.data.side // u.scale
            if u.address in chosen and (settings := self.gri.sized(side)).covers(side, side):
                raise ValueError(
                    f"gri.on: with data.size = {self.data.size} the maps of {u.address} are {side} x {side} tokens, "
                    "and a window of "
                    f"{settings.window} covers them: there GRI is full attention, and gains do nothing. Give larger "
                    "pictures, a "
                    "smaller gri.window (with gri.pool), or fewer units"
                )
        return LogGains(in_order(self.network.config, chosen))

    @property
    def taps(self) -> dict[str, tuple[Tap, ...]]:
        """What each feature loss compares. Raises ValueError for one that finds nothing to compare."""
        changed = set(self.architecture.own)
        if self.condconv:
            changed |= {conv.unit.address for conv in self.condconv.convs(self.network.config).values()}
        if self.gains:
            changed |= set(self.gains.units)
        found = {kind: of(self.architecture, changed) for kind, of in KINDS.items() if getattr(self.loss, kind)}
        for kind, taps in found.items():
            if not taps:
                raise ValueError(
                    f"loss.{kind} has nothing to compare: no unit it looks at differs from the original; set it to 0"
                )
        return found

    @property
    def folder(self) -> Path:
        return Path(self.run.folder or f"runs/{self.name}")

    @property
    def makes_network(self) -> bool:
        """Whether the run ends in a pack or a UNet: not where a LoRA is all it trains."""
        own = self.architecture.own and self.student.trained == "own"
        return bool(own or self.student.stem or not self.lora.rank)

    @property
    def lora_file(self) -> Path:
        """The file of the LoRA: the product, or beside it where there is a pack as well."""
        return self.folder / f"{self.name}-lora.safetensors" if self.makes_network else self.product

    @property
    def product(self) -> Path:
        """The file the run ends in."""
        return self.folder / f"{self.name}.safetensors"

    def accumulation(self, processes: int) -> int:
        """Forward passes of each process in one update. Raises ValueError where the batch cannot be shared out so."""
        each = self.run.micro_batch * processes
        if self.run.batch % each:
            raise ValueError(
                f"run.batch = {self.run.batch} is no multiple of run.micro_batch = {self.run.micro_batch} "
                f"times {processes} processes = {each}"
            )
        return self.run.batch // each

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def to_text(self) -> str:
        """All settings, as a recipe."""
        lines = [f"{k} = {json.dumps(v)}" for k, v in self.to_dict().items() if not isinstance(v, dict)]
        for section, values in self.to_dict().items():
            if isinstance(values, dict):
                lines += ["", f"[{section}]", *(f"{k} = {_inline(v)}" for k, v in values.items() if v is not None)]
        return "\n".join(lines)


def _numbers(settings: Any, section: str = "") -> Iterator[tuple[str, float, Range]]:
    """Every number of a recipe under its key, and what it may be."""
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if dataclasses.is_dataclass(value):
            yield from _numbers(value, f"{f.name}.")
        elif "range" in f.metadata:
            for each in value if isinstance(value, tuple) else (value,):
                yield f"{section}{f.name}", each, f.metadata["range"]


def load(path: str | Path, changes: Iterable[str] = ()) -> Config:
    """A recipe with `key=value` changes, keys dotted, values TOML or plain text. Raises ValueError."""
    path = Path(path)
    data = _read(path)
    data.setdefault("name", path.stem)
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"--set {change}: wanted key=value, such as optimiser.lr=1e-4")
        _put(data, key.strip(), _value(text.strip()))
    return _build(Config, data, path.name)


def _read(path: Path, heirs: tuple[Path, ...] = ()) -> dict:
    """The table of a recipe on top of those it extends. heirs: the recipes that led here."""
    heirs = (*heirs, path.resolve())
    if heirs[-1] in heirs[:-1]:
        raise ValueError(f"{path}: a recipe cannot extend itself ({' -> '.join(p.name for p in heirs)})")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8; save the recipe as UTF-8") from None
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise ValueError(f"{path}: not valid TOML ({e})") from None
    parent = data.pop("extends", None)
    if parent is None:
        return data
    if not isinstance(parent, str):
        raise ValueError(f"{path}: extends: wanted the name of another recipe, got {parent!r}")
    base = _read(path.parent / parent, heirs)
    base.pop("name", None)  # a recipe is named after its own file
    return _merged(base, data)


def _merged(base: dict, data: Mapping) -> dict:
    return base | {
        k: _merged(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v for k, v in data.items()
    }


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text  # a path or a name needs no quotes


def _put(data: dict, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise ValueError(f"--set {key}: {section} is no section")
    data[name] = value


def _build(cls: type, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: wanted a section with keys, got {data!r}")
    hints = get_type_hints(cls)
    for key in data:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 1, 0.5)
            raise ValueError(
                f"{where}: unknown key {key!r}"
                + (f"; did you mean {near[0]!r}?" if near else "")
                + f" Known are {', '.join(hints)}"
            )
    return cls(**{key: _typed(hints[key], value, f"{where}: {key}") for key, value in data.items()})


def _typed(hint: Any, value: Any, where: str) -> Any:
    """The value as the field's type; whole numbers pass for others, nothing else is converted."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if get_origin(hint) in (Union, types.UnionType):
        hint = get_args(hint)[0]
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        if kinds[1:] == (Ellipsis,) and isinstance(value, list):
            return tuple(_typed(kinds[0], v, where) for v in value)
        if not isinstance(value, list) or len(value) != len(kinds):
            raise ValueError(f"{where}: wanted a list of {len(kinds)}, got {value!r}")
        return tuple(_typed(k, v, where) for k, v in zip(kinds, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{where}: this number is too large") from None
    if not isinstance(value, hint) or hint is not bool and isinstance(value, bool):
        raise ValueError(f"{where}: wanted {_TYPES[hint]}, got {value!r}")
    return value


_TYPES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", dict: "a table"}


def _inline(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_inline(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)


def _one_of(choices: Mapping, value: str, key: str) -> Any:
    if value not in choices:
        near = difflib.get_close_matches(value, choices, 1)
        raise ValueError(
            f"{key}: {value!r} is none of {', '.join(choices)}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return choices[value]
