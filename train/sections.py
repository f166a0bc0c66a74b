"""The sections of a recipe: frozen dataclasses, and what each number in them may be."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from asdm_core import condconv
from asdm_core.addresses import UNetConfig
from asdm_core.architecture import FAMILIES
from asdm_core.carry import MAX_RANK
from asdm_core.gri import GRI

from .diffusion import STEPS, simple_times
from .losses import LOSSES
from .schedules import Schedule, read_schedule


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
        return one_of(FAMILIES, self.family, "network.family")

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
    carry: rank of the matrices by which units take over what a style changes in others of their block
    (asdm_core/carry.py). These alone are learned then, and the units stay as student.start has them, so that nothing
    changes in network.teacher; 0: the units learn, and carry nothing over.
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
    carry: int = number(0, 0, MAX_RANK)

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
    vgg: .safetensors file of the weights of the perceptual loss's VGG16 (train/vgg.py).
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
    keeps a third of them for 3x3 convolutions and hardly any for the rest, has no betas, and whose lr is relative to
    the size of each weight (.001 to .01: at 5e-5 hardly anything moves); "muon", which keeps half.
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


def one_of(choices: Mapping, value: str, key: str) -> Any:
    if value not in choices:
        near = difflib.get_close_matches(value, choices, 1)
        raise ValueError(
            f"{key}: {value!r} is none of {', '.join(choices)}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return choices[value]
