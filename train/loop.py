"""The training loop, its average of the weights and its checkpoints.

Resuming is the same command again. What a step does depends on the seed and the step alone, and a
checkpoint holds everything else, so on a CPU, with the same number of threads, the resumed run equals
the unbroken one bit for bit.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers, get_available_trackers
from torch import Tensor, nn

from asdm_core.tensor_file import BadFile, TensorFile, write_file

from . import losses, networks, rollout, sharding, taps
from .ahead import Ahead
from .config import Config
from .sections import PRECISIONS
from .data import Batch, Batches, Source, cast_added
from .diffusion import STEPS, as_v, coefficients
from .held_out import HeldOut
from .optimisation import Average, OnCPU, course, make_optimiser, moments, restore_moments, trapezoid
from .progress import Progress
from .attention import BmmAttention
from .teacher_outputs import TeacherOutputs
from .provenance import difference
from .show import Show, decoder, predictor, write_card
from .sources import Drawn, open_source
from .styles import Style, StyleSet
from .vgg import load_vgg

BAD_STEPS = 3  # in a row that stop a run
T_BINS = 4
# Settings that may change between the sessions of one run.
FREE = (
    "steps",
    "micro_batch",
    "workers",
    "shard",
    "offload",
    "compile",
    "checkpoint_gradients",
    "save_every",
    "keep",
    "log_every",
    "picture_every",
    "tensorboard",
    "trackers",
    "folder",
    "stored",
)


@dataclass
class State:
    """Where a run stands. skipped: steps whose loss or gradient was not finite; in_a_row: of these, the latest.

    left_out: pictures that could not be read. source: where the data stand (data.Source.state). bank_seconds: those of
    `seconds` in which the teacher drew trajectories (train/rollout.py). waited: those in which there were no data.
    """

    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    in_a_row: list[int] = field(default_factory=list)
    left_out: int = 0
    source: dict = field(default_factory=dict)
    bank_seconds: float = 0.0
    waited: float = 0.0


Classifier = Callable[[Path], losses.PerceptualNetwork]


# Losses of a batch ----------------------------------------------------------------------------------


class Criterion:
    """The losses a recipe asks for, per sample, and their weights.

    classifier: what makes a perceptual network of the folder in loss.classifier.
    """

    def __init__(self, config: Config, device: torch.device, classifier: Classifier | None = None):
        self.config = config
        self.taps = config.taps
        self.weights = config.loss.weights
        self.net: nn.Module | None = None
        self.picture: Callable[[Tensor], Tensor] = partial(losses.latent_rgb, family=config.network.family)
        if config.loss.perceptual and config.loss.classifier:
            if classifier is None:
                raise ValueError(
                    "loss.classifier belongs to the emoji family alone: start the recipe with `python -m train.emoji`"
                )
            net = classifier(Path(config.loss.classifier)).to(device)
            self.net = net
            self.picture = net.pictures
        elif config.loss.perceptual:
            self.net = load_vgg(config.loss.vgg).to(device)

    @property
    def student_paths(self) -> list[str]:
        return [tap.student for kind in self.taps.values() for tap in kind]

    @property
    def teacher_paths(self) -> list[str]:
        return [tap.teacher for kind in self.taps.values() for tap in kind]

    @property
    def needs_teacher(self) -> bool:
        """For each batch. A rollout needs it for the bank alone."""
        return any(losses.LOSSES[name].teacher for name in self.weights)

    def __call__(self, batch: Batch, x: Tensor, student: losses.Outputs, teacher: losses.Outputs | None) -> Tensor:
        """(losses, B), in the order of `weights`."""
        a, s = coefficients(batch.t, self.config.network.alphas)
        given = losses.Compared(self, batch, x, a, s, student, teacher)
        return torch.stack([losses.LOSSES[name].value(given) for name in self.weights])

    def factors(self, step: int) -> list[float]:
        """The weights at a step: that of the perceptual loss rises first."""
        rise = min(1.0, (step + 1) / max(1, self.config.loss.perceptual_warmup))
        return [w * rise if name == "perceptual" else w for name, w in self.weights.items()]


def learning_rate(config: Config, step: int) -> float:
    """That of a step: a trapezoid that ends at zero, or one of diffusers' schedules."""
    o = config.optimiser
    if o.schedule != "trapezoid":
        return o.lr * course(o.schedule, o.warmup, config.run.steps)(step)
    return o.lr * trapezoid(step, o.warmup, config.run.steps - step, o.cooldown)


# Checkpoints ----------------------------------------------------------------------------------------


class Checkpoints:
    """The newest few states of a run, each one safetensors file, written whole or not at all."""

    def __init__(self, config: Config):
        self.config = config
        self.folder = config.folder
        # What must not change: everything but how the work is cut up, saved and shown.
        fixed = config.to_dict()
        free = set(FREE) - ({"steps"} if len(config.rollout.steps) > 1 else set())
        fixed["run"] = {k: v for k, v in fixed["run"].items() if k not in free}
        self.fixed = json.loads(json.dumps(fixed))

    def paths(self) -> list[Path]:
        return sorted(
            p for p in self.folder.glob("checkpoint-*.safetensors") if re.fullmatch(r"checkpoint-\d{8}", p.stem)
        )

    def save(self, state: State, tensors: Mapping[str, Tensor]) -> None:
        path = self.folder / f"checkpoint-{state.step:08d}.safetensors"
        try:
            write_file(path, tensors, {"state": json.dumps(asdict(state)), "config": json.dumps(self.fixed)})
        except OSError as e:
            last = self.paths()
            before = f"{last[-1].name} is whole" if last else "There is none before it"
            raise OSError(
                f"{path} cannot be written ({e.strerror or e}). {before}; make room, or see to the disk, and give "
                "the same "
                "command again"
            ) from None
        upto = [p for p in self.paths() if p <= path]  # a later one is broken, or `load` would have taken it
        for old in {*self.paths()} - {*upto[-self.config.run.keep :]}:
            old.unlink()

    def load(self) -> tuple[State, dict[str, Tensor]] | None:
        """The newest state that can be read; None where there is none.

        Raises ValueError where the folder belongs to other settings, or none of its states can be read.
        """
        for path in reversed(self.paths()):
            with open(path, "rb"):  # a disk that cannot read now may well do so later: that ends the run
                pass
            try:
                file = TensorFile(path)
            except BadFile as e:  # as some disks leave what was written last when the power goes
                print(f"left out: {e}", flush=True)
                continue
            if changed := difference(_completed(json.loads(file.metadata["config"])), self.fixed):
                raise ValueError(
                    f"{self.folder} holds a run with other settings ({changed}). Choose another name or "
                    "run.folder, or delete its checkpoints to start anew"
                )
            return State(**json.loads(file.metadata["state"])), dict(file)
        if self.paths():
            raise ValueError(f"{self.folder}: none of its checkpoints can be read; delete them to start anew")
        return None


def _completed(saved: dict) -> dict:
    """The settings of a run, with those added since it began at their defaults."""
    defaults = {
        f.name: asdict(f.default_factory())
        for f in fields(Config)
        if f.default_factory is not MISSING and f.name != "run"
    }
    return saved | {name: values | saved.get(name, {}) for name, values in defaults.items()}


@contextmanager
@torch.no_grad()
def averaged(parameters: Mapping[str, nn.Parameter], average: Average) -> Iterator[None]:
    """The average in the place of the weights, which are put back exactly."""

    def exchange() -> None:
        for key, p in parameters.items():
            held = p.clone()
            p.copy_(average.weights[key])
            average.weights[key].copy_(held)

    exchange()
    try:
        yield
    finally:
        exchange()


def _tensors(
    parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer, average: Average
) -> dict[str, Tensor]:
    tensors = {f"weights.{k}": p for k, p in parameters.items()} | {
        f"average.{k}": v for k, v in average.weights.items()
    }
    for key, p in parameters.items():
        tensors |= {f"{name}.{key}": value for name, value in moments(optimiser, p).items()}
    return tensors


@torch.no_grad()
def _restore(
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    average: Average,
) -> None:
    saved: dict[str, dict[str, Tensor]] = {key: {} for key in parameters}
    for full, value in tensors.items():
        name, _, key = full.partition(".")  # no name of a moment has a dot
        if key in saved and name not in ("weights", "average"):
            saved[key][name] = value
    restore_moments(
        optimiser,
        [
            (
                p,
                {
                    name: sharding.like(value, p) if value.shape == p.shape else value
                    for name, value in saved[key].items()
                },
            )
            for key, p in parameters.items()
        ],
    )
    for key, p in parameters.items():
        p.copy_(sharding.like(tensors[f"weights.{key}"], p))
        average.weights[key].copy_(sharding.like(tensors[f"average.{key}"], p))


# The loop -------------------------------------------------------------------------------------------


def train(
    config: Config,
    accelerator: Accelerator,
    clock: Callable[[], float] = time.perf_counter,
    classifier: Classifier | None = None,
) -> Path:
    """Train, or go on training, and write the product. Every process calls it. Returns the product's path.

    Raises ValueError for files and settings that do not fit, FloatingPointError where the loss is not
    finite BAD_STEPS times in a row. clock: what a step's time is taken with. classifier: see Criterion.
    """
    device, main = accelerator.device, accelerator.is_main_process
    accumulation = config.accumulation(accelerator.num_processes)
    criterion = Criterion(config, device, classifier)
    alphas = config.network.alphas
    original = networks.load_teacher(config)
    student = networks.make_student(original, config)
    half = PRECISIONS[config.run.precision]
    computed = (
        TeacherOutputs(config, criterion.teacher_paths)
        if config.network.teacher_outputs and criterion.needs_teacher
        else None
    )
    teacher = taps.Tapped(original, criterion.teacher_paths) if criterion.needs_teacher and not computed else None
    teaches = teacher is not None or config.data.source == "prompts" or config.rollout.steps
    if teaches:
        nn.Module.to(original, device, half)  # diffusers' own `to` warns about dtypes, without need here
    if half != torch.float32 and not config.run.shard:  # which wants weights of one dtype
        networks.hold_frozen(student, original if teaches else None, half)
    nn.Module.to(student, device)
    student.train()
    if config.run.shard:
        sharding.shard(student, accelerator)
    if device.type == "cpu":  # fused attention is slow to train through on a CPU
        networks.set_attention(original, BmmAttention())
        networks.set_attention(student, BmmAttention())
    if config.run.compile:
        for net in (original, student):
            networks.compile_parts(net, config.run.compile)
    if config.run.checkpoint_gradients:
        student.enable_gradient_checkpointing()

    config.folder.mkdir(parents=True, exist_ok=True)
    source = open_source(
        config,
        predictor(original, half),
        device,
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.wait_for_everyone,
    )
    if config.styles.draws:
        source = Drawn(config, source, predictor(original, half), device)
    batches = Batches(source, config)
    rollouts: rollout.Rollouts | None = None
    if config.rollout.steps:
        bank = rollout.Bank(
            config,
            source,
            predictor(original, half),
            device,
            accelerator.process_index,
            accelerator.num_processes,
            accelerator.wait_for_everyone,
        )
        rollouts = rollout.Rollouts(config, bank, device)

    parameters = {k: p for k, p in student.named_parameters() if p.requires_grad}
    o = config.optimiser
    make = partial(make_optimiser, o.kind, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay)
    plain = OnCPU(parameters.values(), make) if config.run.offload else make(parameters.values())
    average = Average(parameters, o.ema, torch.device("cpu") if config.run.offload else None)
    checkpoints = Checkpoints(config)
    state = State()
    if loaded := checkpoints.load():
        state, tensors = loaded
        _restore(tensors, parameters, plain, average)
        if state.source:
            source.restore(state.source)
        if rollouts:
            rollouts.x.copy_(tensors["rollout.x"])
        accelerator.print(f"going on at step {state.step}")
    steps = accelerator.gather(torch.tensor([state.step], device=device))
    if steps.min() != steps.max():
        raise ValueError(
            f"the processes found different checkpoints (steps {', '.join(map(str, steps.tolist()))}); all need the "
            "same run.folder"
        )
    if main:
        for left in config.folder.glob(".checkpoint-*.part"):  # left behind where a run was killed while it saved
            left.unlink()
    log = Log(config, state, list(criterion.weights)) if main else None
    track(config, accelerator)
    tapped = taps.Tapped(student, criterion.student_paths)
    model = accelerator.prepare_model(tapped, evaluation_mode=config.run.shard)  # else: DDP
    optimiser = accelerator.prepare_optimizer(plain)
    # A sharded student draws with all processes.
    show = (
        _show(config, source, original, half, device)
        if config.run.picture_every and (main or config.run.shard)
        else None
    )

    def held_out_losses(batch: Batch) -> Tensor:
        a, s = coefficients(batch.t, alphas)
        x = a * batch.x0 + s * batch.noise
        wanted = (
            teacher(x.to(half), batch.t, batch.context.to(half), cast_added(batch.added, half)) if teacher else None
        )
        with accelerator.autocast():
            mine = tapped(x, batch.t, batch.context, batch.added)
        mine = mine[0].float(), {path: value.float() for path, value in mine[1].items()}
        return criterion(batch, x, mine, wanted)

    held_out = (
        HeldOut(
            config,
            accelerator,
            lambda its: open_source(its, predictor(original, half), device),
            held_out_losses,
            list(criterion.weights),
        )
        if config.data.held_out
        else None
    )
    styles = StyleSet(config, original, student) if config.styles.many else None
    progress = Progress(config.name, config.run.steps)
    parts = (
        _numbers(config, accelerator, step, part)
        for step in range(state.step, config.run.steps)
        for part in range(accumulation)
    )
    ahead = Ahead(batches, parts, config.run.workers, clock)
    waited_before = state.waited

    while state.step < config.run.steps:
        began = clock()
        if rollouts:
            rollouts.prepare(state.step)
            state.bank_seconds += clock() - began
        if styles:
            styles.take(styles.drawn(state.step))

        # Forward and backward, in as many parts as the batch takes.
        factors = torch.tensor(criterion.factors(state.step), device=device)
        values = []
        for part in range(accumulation):
            numbers = _numbers(config, accelerator, state.step, part)
            if rollouts:
                slots = [n - state.step * config.run.batch for n in numbers]
                batch = rollouts.batch(state.step, slots)
                assert batch.x is not None
                x = batch.x
            else:
                batch = ahead.next().to(device)
                state.waited = waited_before + ahead.waited
                a, s = coefficients(batch.t, alphas)
                x = a * batch.x0 + s * batch.noise
            wanted = computed(numbers, device) if computed else None
            if teacher is not None:
                with torch.no_grad():
                    wanted = teacher(x.to(half), batch.t, batch.context.to(half), cast_added(batch.added, half))
            last = part == accumulation - 1
            if config.run.shard:
                sharding.synchronise(student, last)
            with (
                styles.ridden() if styles else nullcontext(),
                nullcontext() if last or config.run.shard else accelerator.no_sync(model),
            ):
                mine = model(x, batch.t, batch.context, batch.added)
                value = criterion(batch, x, mine, wanted)
                accelerator.backward((factors @ value).mean() / accumulation)
            if rollouts:
                v = as_v(mine[0].detach(), x, *coefficients(batch.t, alphas), config.network.prediction)
                rollouts.advance(state.step, slots, x, v)
            assert batch.left_out is not None
            values.append(torch.cat([value.detach(), batch.t[None].float(), batch.left_out[None].float()]))
        norm = accelerator.clip_grad_norm_(parameters.values(), config.optimiser.clip or math.inf)
        norm = float(sharding.gathered({"norm": norm}, keep=True)["norm"])
        value = accelerator.gather(torch.cat(values, 1).T.contiguous()).cpu()  # (B, losses + 2)
        state.left_out += int(value[:, -1].sum())
        value = value[:, :-1]  # the last column is t

        # Update. All processes see the same values, so all decide alike.
        lr = learning_rate(config, state.step)
        finite = bool(value.isfinite().all())
        good = finite and norm < float("inf")
        state.step += 1
        if good:
            for group in optimiser.param_groups:
                group["lr"] = lr
            optimiser.step()
            average.update(parameters, state.step - state.skipped)
            state.in_a_row = []
        else:
            state.skipped += 1
            # fp16's first scales are too large for the gradient by design: that does not count.
            if not (finite and accelerator.scaler):
                state.in_a_row = [*state.in_a_row, state.step]
            if accelerator.scaler:  # it halves its scale; else `step` does that
                accelerator.scaler.update()
        optimiser.zero_grad()
        state.seconds += clock() - began

        # Status and checkpoint.
        shows = bool(config.run.picture_every) and state.step % config.run.picture_every == 0
        shows = shows or state.step == config.run.steps
        if styles and shows:  # on network.teacher, as the product will be
            styles.take(Style())
        if held_out and shows:
            with averaged(parameters, average):
                measured = held_out()
            if log:
                log.held_out(state.step, measured)
            accelerator.log({f"held_out/{name}": value for name, value in measured.items()}, state.step)
        if log:
            if log.add(state, value if good else None, lr, norm):
                accelerator.log(log.scalars(), state.step)
            progress.show(state.step, log.status(state))
        if show and shows:
            with averaged(parameters, average), accelerator.autocast():
                rows = show.rows(predictor(student, torch.float32))
            if log:
                show.save(state.step, rows)
                log.picture(state.step, rows)
        if len(state.in_a_row) == BAD_STEPS:
            saved = checkpoints.paths()
            raise FloatingPointError(
                f"{config.name}: the loss or its gradient was not finite in steps "
                f"{', '.join(map(str, state.in_a_row))}, so the run "
                f"stops. {f'The last good state is {saved[-1].name}. ' if saved else ''}Lower optimiser.lr, use bf16 "
                "instead of "
                f"fp16, or look at the data of these steps"
            )
        saves = not state.in_a_row and (state.step % config.run.save_every == 0 or state.step == config.run.steps)
        states = rollouts.gathered(accelerator) if rollouts and saves else None
        stand = gather_object([source.state(state.step * config.run.batch)]) if saves else []
        if saves and (main or config.run.shard):
            tensors = sharding.gathered(_tensors(parameters, plain, average), keep=main)
            if states is not None:
                tensors["rollout.x"] = states
            if main:
                state.source = source.together(stand)
                checkpoints.save(state, tensors)

    ahead.close()
    with torch.no_grad():
        for key, p in parameters.items():
            p.copy_(average.weights[key])
    with sharding.put_together(student):
        if log:
            progress.end()
            training = provenance(config, state, log) | {"trained": sum(p.numel() for p in parameters.values())}
            networks.write_product(student, config, training)
            write_card(config, training)
    accelerator.wait_for_everyone()
    sharding.let_gloo_end(accelerator)
    accelerator.end_training()
    return config.product


def _show(config: Config, source: Source, teacher: nn.Module, dtype: torch.dtype, device: torch.device) -> Show | None:
    """What draws the pictures on the way; None where nothing can decode the latents."""
    if not (found := decoder(config, device)):
        return None
    at = next(teacher.parameters())
    here, kept = at.device, at.dtype
    show = Show(config, source, predictor(nn.Module.to(teacher, device, dtype), dtype), *found, device)
    nn.Module.to(teacher, here, kept)
    return show


def _numbers(config: Config, accelerator: Accelerator, step: int, part: int) -> range:
    """Numbers of the samples this process takes for one part of a step."""
    first = (
        step * config.run.batch
        + (part * accelerator.num_processes + accelerator.process_index) * config.run.micro_batch
    )
    return range(first, first + config.run.micro_batch)


# The log --------------------------------------------------------------------------------------------


class Log:
    """Losses as JSON lines in log.jsonl: means since the last line, also by bins of t. A resumed run goes on with its
    own lines.
    """

    def __init__(self, config: Config, state: State, names: list[str]):
        self.config = config
        self.names = names
        self.path = config.folder / "log.jsonl"
        self.recent: list[Tensor] = []
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        # After a kill the log may be ahead of the checkpoint, and its last line incomplete.
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= state.step]
        self.last: dict = next((line for line in map(json.loads, reversed(kept)) if "held_out" not in line), {})
        self.board = tensorboard(config.folder, state.step) if config.run.tensorboard else None
        temporary = self.path.with_suffix(".part")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def add(self, state: State, value: Tensor | None, lr: float, norm: float) -> bool:
        """value: (B, losses + 1), the last column t; None of a step that was skipped. Whether a line was written."""
        if value is None:
            print(f"step {state.step}: not finite, skipped", flush=True)
        else:
            self.recent.append(value)
        if not self.recent or state.step % self.config.run.log_every and state.step != self.config.run.steps:
            return False
        values = torch.cat(self.recent)
        bins = (values[:, -1] * T_BINS / STEPS).long()
        by_t = {
            f"{b * STEPS // T_BINS}-{(b + 1) * STEPS // T_BINS - 1}": self._means(values[bins == b])
            for b in range(T_BINS)
            if (bins == b).any()
        }
        self.last = {
            "step": state.step,
            "seconds": round(state.seconds, 4),
            "waited": round(state.waited, 4),
            "waited_for_data": self._share(state),
            **({"bank_seconds": round(state.bank_seconds, 4)} if self.config.rollout.steps else {}),
            "skipped": state.skipped,
            "left_out": state.left_out,
            "lr": lr,
            "gradient": norm,
            **self._means(values),
            "by_t": by_t,
        }
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(self.last) + "\n")
        self.recent = []
        if self.board:
            for name in ("lr", "gradient", *self.names):
                self.board.add_scalar(name if name not in self.names else f"loss/{name}", self.last[name], state.step)
            self.board.flush()
        return True

    def scalars(self) -> dict[str, float]:
        """The last line as single numbers."""
        return {name: self.last[name] for name in ("lr", "gradient", "waited_for_data", *self.names)}

    def held_out(self, step: int, losses: Mapping[str, float]) -> None:
        """Losses on pictures that are not trained on: a line of its own."""
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps({"step": step, "held_out": losses}) + "\n")
        if self.board:
            for name, value in losses.items():
                self.board.add_scalar(f"held_out/{name}", value, step)

    def picture(self, step: int, rows: Tensor) -> None:
        """rows: teacher's and student's pictures, (2, B, 3, H, W)."""
        if self.board:
            self.board.add_image(
                "teacher above student", torch.cat([torch.cat(list(row), -1) for row in rows], -2), step
            )

    def _means(self, values: Tensor) -> dict[str, float]:
        return {name: float(f"{m:.6g}") for name, m in zip(self.names, values[:, :-1].mean(0).tolist(), strict=True)}

    def _share(self, state: State) -> float:
        """The share of the time since the last line in which the run waited for data."""
        seconds = state.seconds - self.last.get("seconds", 0.0)
        return round((state.waited - self.last.get("waited", 0.0)) / max(seconds, 1e-9), 4)

    def status(self, state: State) -> str:
        rate = state.step * self.config.run.batch / max(state.seconds, 1e-9)
        left = (self.config.run.steps - state.step) * state.seconds / state.step
        parts = " ".join(f"{name} {self.last[name]:.4g}" for name in self.names if name in self.last)
        data = f", {self.last['waited_for_data']:.0%} of it for data" if self.last.get("waited_for_data") else ""
        return f"{parts} {rate:.1f}/s{data}, {left / 60:.1f} min left"


def track(config: Config, accelerator: Accelerator) -> None:
    """Open the recipe's trackers, with all its settings. Raises ValueError for those that are not there."""
    if not config.run.trackers:
        return
    known = {str(name) for name in LOGGER_TYPE_TO_CLASS}
    there = {str(tracker) for tracker in get_available_trackers()}
    for name in config.run.trackers:
        if name not in known:
            raise ValueError(f"run.trackers: {name!r} is none of {', '.join(sorted(known))}")
        if name not in there:
            raise ValueError(f"run.trackers: {name} is not installed: pip install {name}")
    accelerator.project_configuration.set_directories(str(config.folder))
    accelerator.log_with = filter_trackers(list(config.run.trackers), config.folder)
    accelerator.init_trackers(config.name, flat(config.to_dict()))


def flat(settings: Mapping, prefix: str = "") -> dict[str, int | float | str | bool]:
    """Settings as single values under dotted keys, as --set takes them."""
    found: dict[str, int | float | str | bool] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value if isinstance(value, int | float | str | bool) else json.dumps(value)
    return found


def tensorboard(folder: Path, step: int):
    """A writer into the run's folder; what an earlier session logged after `step` is dropped."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("run.tensorboard needs TensorBoard: pip install tensorboard") from None
    return SummaryWriter(folder / "tensorboard", purge_step=step + 1)


def styles_in_words(config: Config) -> dict:
    """The set that taught, with the names of its files."""
    files = {name: [Path(path).name for path in getattr(config.styles, name)] for name in ("checkpoints", "loras")}
    return asdict(config.styles) | files


def provenance(config: Config, state: State, log: Log) -> dict:
    """What a product's metadata say of its training."""
    return {
        "teacher": Path(config.network.teacher).name,
        "start": Path(config.student.start).name or "teacher",
        **({"styles": styles_in_words(config)} if config.styles.many else {}),
        "losses": config.loss.weights,
        "steps": state.step,
        "samples": state.step * config.run.batch,
        "skipped": state.skipped,
        "left_out": state.left_out,
        "minutes": round(state.seconds / 60, 1),
        **({"minutes_of_the_bank": round(state.bank_seconds / 60, 1)} if config.rollout.steps else {}),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "final": {k: log.last[k] for k in log.names if k in log.last},
    }
