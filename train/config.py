"""What a training run is: a whole recipe, checked, and what follows from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from asdm_core.addresses import in_order, select
from asdm_core.architecture import Architecture
from asdm_core.carry import Carry
from asdm_core.condconv import FORMS, CondConv, convolutions, sharing
from asdm_core.gri import GRI, LogGains
from asdm_core.packs import PREDICTIONS

from .buckets import STEP
from .diffusion import STEPS
from .optimisation import KINDS as KINDS_OF_OPTIMISERS
from .losses import LATENT_RGB, LOSSES
from .schedules import SCHEDULES
from .taps import KINDS, Tap

from .sections import (
    Data,
    Encoders,
    Experts,
    HELD_OUT,
    Lora,
    Loss,
    Network,
    Optimiser,
    PICTURED,
    PRECISIONS,
    RATES,
    Range,
    Regional,
    Rollout,
    RunSettings,
    SAMPLERS,
    SOURCES,
    STARTS,
    STATES,
    STORED,
    Samples,
    Student,
    Styles,
    TIMESTEPS,
    TRAINED,
    number,
    one_of,
)


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
            one_of(dict.fromkeys(allowed), getattr(getattr(self, section), name), key)
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
                f"run.offload goes with optimiser.kind = adamw and without run.shard, got {kind!r}"
                f"{' and run.shard' if run.shard else ''}; leave one of them out, as by --set run.offload=false"
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
        if styles.carry and (not styles.many or self.lora.rank or not self.student.start):
            raise ValueError(
                "styles.carry: what a pack carries over is learned with its units trained before (student.start), over "
                "many styles (styles.teacher below 1), and without a LoRA"
            )
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
    def carry(self) -> Carry | None:
        """What the trained units take over from others; None where the recipe asks for none."""
        if not self.styles.carry:
            return None
        return Carry.within_blocks(self.architecture, self.architecture.own, self.styles.carry)

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


def _inline(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_inline(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)
