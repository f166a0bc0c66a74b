"""The training loop.

Resuming is the same command again. What a step does depends on the seed and the step alone, and a
checkpoint holds everything else, so on a CPU, with the same number of threads, the resumed run equals
the unbroken one bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from . import networks, rollout, sharding, taps
from .ahead import Ahead
from .attention import BmmAttention
from .checkpoints import Checkpoints, State, restore, tensors_of
from .config import Config
from .criterion import Classifier, Criterion, Outputs
from .data import Batch, Batches, Source, cast_added
from .diffusion import as_v, coefficients
from .held_out import HeldOut
from .log import Log, provenance, track
from .optimisation import Average, OnCPU, averaged, course, make_optimiser, prepared, trapezoid
from .progress import Progress
from .sections import PRECISIONS
from .show import Show, decoder, predictor, write_card
from .sources import Drawn, open_source
from .styles import StyleSet, new_matrices
from .teacher_outputs import TeacherOutputs

BAD_STEPS = 3  # in a row that stop a run


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
    run = Run(config, accelerator, clock, classifier)
    while run.state.step < config.run.steps:
        run.step()
    return run.finish()


def learning_rate(config: Config, step: int) -> float:
    """That of a step: a trapezoid that ends at zero, or one of diffusers' schedules."""
    o = config.optimiser
    if o.schedule != "trapezoid":
        return o.lr * course(o.schedule, o.warmup, config.run.steps)(step)
    return o.lr * trapezoid(step, o.warmup, config.run.steps - step, o.cooldown)


class Run:
    """One process's part in a run, from the state its folder holds."""

    def __init__(
        self, config: Config, accelerator: Accelerator, clock: Callable[[], float], classifier: Classifier | None
    ):
        self.config, self.accelerator, self.clock = config, accelerator, clock
        self.device, self.main = accelerator.device, accelerator.is_main_process
        self.half = PRECISIONS[config.run.precision]
        self.accumulation = config.accumulation(accelerator.num_processes)
        self.criterion = Criterion(config, self.device, classifier)
        self._make_networks()
        config.folder.mkdir(parents=True, exist_ok=True)
        self._open_data()
        self._make_optimiser()
        self.checkpoints = Checkpoints(config)
        self.state = self._restored()
        self.log = Log(config, self.state, list(self.criterion.weights)) if self.main else None
        track(config, accelerator)
        self.tapped = taps.Tapped(self.student, self.criterion.student_paths)
        self.model = accelerator.prepare_model(self.tapped, evaluation_mode=config.run.shard)  # else: DDP
        self.optimiser = prepared(accelerator, self.plain)
        self._prepare_looks()
        self.styles = StyleSet(config, self.teacher, self.student, self.matrices) if config.styles.many else None
        self.progress = Progress(config.name, config.run.steps)
        parts = (
            _numbers(config, accelerator, step, part)
            for step in range(self.state.step, config.run.steps)
            for part in range(self.accumulation)
        )
        self.ahead = Ahead(self.batches, parts, config.run.workers, clock)
        self.waited_before = self.state.waited

    # What a run is made of --------------------------------------------------------------------------

    def _make_networks(self) -> None:
        """teacher, student; tapped_teacher: the teacher with its features, where a loss looks at them in each batch and
        `computed` does not hold them.
        """
        config, criterion, device = self.config, self.criterion, self.device
        self.teacher = networks.load_teacher(config)
        self.student = networks.make_student(self.teacher, config)
        self.computed = (
            TeacherOutputs(config, criterion.teacher_paths)
            if config.network.teacher_outputs and criterion.needs_teacher
            else None
        )
        self.tapped_teacher = (
            taps.Tapped(self.teacher, criterion.teacher_paths)
            if criterion.needs_teacher and not self.computed
            else None
        )
        styled = config.styles.many or config.styles.draws
        draws = config.data.source == "prompts" or config.rollout.steps or styled
        teaches = self.tapped_teacher is not None or draws
        if teaches:
            nn.Module.to(self.teacher, device, self.half)  # diffusers' own `to` warns about dtypes, without need here
        if self.half != torch.float32 and not config.run.shard:  # which wants weights of one dtype
            networks.hold_frozen(self.student, self.teacher if teaches else None, self.half)
        nn.Module.to(self.student, device)
        self.student.train()
        if config.run.shard:
            sharding.shard(self.student, self.accelerator)
        for net in (self.teacher, self.student):
            if device.type == "cpu":  # fused attention is slow to train through on a CPU
                networks.set_attention(net, BmmAttention())
            if config.run.compile:
                networks.compile_parts(net, config.run.compile)
        if config.run.checkpoint_gradients:
            self.student.enable_gradient_checkpointing()

    def _open_data(self) -> None:
        config, accelerator = self.config, self.accelerator
        predict = predictor(self.teacher, self.half)
        processes = accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone
        self.source: Source = open_source(config, predict, self.device, *processes)
        if config.styles.draws:
            self.source = Drawn(config, self.source, predict, self.device)
        self.batches = Batches(self.source, config)
        self.rollouts: rollout.Rollouts | None = None
        if config.rollout.steps:
            bank = rollout.Bank(config, self.source, predict, self.device, *processes)
            self.rollouts = rollout.Rollouts(config, bank, self.device)

    def _make_optimiser(self) -> None:
        o, offload = self.config.optimiser, self.config.run.offload
        self.matrices = new_matrices(self.config, self.device)
        units = {k: p for k, p in self.student.named_parameters() if p.requires_grad}
        self.parameters: dict[str, nn.Parameter] = self.matrices or units
        make = partial(make_optimiser, o.kind, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay)
        self.plain = OnCPU(self.parameters.values(), make) if offload else make(self.parameters.values())
        self.average = Average(self.parameters, o.ema, torch.device("cpu") if offload else None)

    def _restored(self) -> State:
        config, accelerator, state = self.config, self.accelerator, State()
        if loaded := self.checkpoints.load():
            state, tensors = loaded
            restore(tensors, self.parameters, self.plain, self.average)
            if state.source:
                self.source.restore(state.source)
            if self.rollouts:
                self.rollouts.x.copy_(tensors["rollout.x"])
            if state.scaler and accelerator.scaler:
                accelerator.scaler.load_state_dict(state.scaler)
            accelerator.print(f"going on at step {state.step}")
            if state.step > config.run.steps:
                accelerator.print(
                    f"that is beyond run.steps = {config.run.steps}: what is written has learned for more"
                )
        steps = accelerator.gather(torch.tensor([state.step], device=self.device))
        if steps.min() != steps.max():
            raise ValueError(
                f"the processes found different checkpoints (steps {', '.join(map(str, steps.tolist()))}); all need "
                "the same run.folder"
            )
        if self.main:
            for left in config.folder.glob(".checkpoint-*.part"):  # left behind where a run was killed while it saved
                left.unlink()
        return state

    def _prepare_looks(self) -> None:
        """What is looked at on the way: pictures, and the losses of pictures that are not trained on."""
        config = self.config
        # A sharded student draws with all processes.
        draws = config.run.picture_every and (self.main or config.run.shard)
        self.show = self._make_show() if draws else None
        self.held_out = (
            HeldOut(
                config,
                self.accelerator,
                lambda its: open_source(its, predictor(self.teacher, self.half), self.device),
                self._held_out_losses,
                list(self.criterion.weights),
            )
            if config.data.held_out
            else None
        )

    def _make_show(self) -> Show | None:
        """What draws the pictures on the way; None where nothing can decode the latents."""
        if not (found := decoder(self.config, self.device)):
            return None
        at = next(self.teacher.parameters())
        here, kept = at.device, at.dtype
        predict = predictor(nn.Module.to(self.teacher, self.device, self.half), self.half)
        show = Show(self.config, self.source, predict, *found, self.device)
        nn.Module.to(self.teacher, here, kept)
        return show

    def _held_out_losses(self, batch: Batch) -> Tensor:
        x = self._noised(batch)
        wanted = self._wanted(batch, x)
        with self.accelerator.autocast():
            mine = self.tapped(x, batch.t, batch.context, batch.added)
        return self.criterion(batch, x, (mine[0].float(), {k: v.float() for k, v in mine[1].items()}), wanted)

    def _noised(self, batch: Batch) -> Tensor:
        a, s = coefficients(batch.t, self.config.network.alphas)
        return a * batch.x0 + s * batch.noise

    @torch.no_grad()
    def _wanted(self, batch: Batch, x: Tensor) -> Outputs | None:
        """What the teacher makes of a batch, None where no loss looks at it."""
        if self.tapped_teacher is None:
            return None
        half = self.half
        return self.tapped_teacher(x.to(half), batch.t, batch.context.to(half), cast_added(batch.added, half))

    # A step -----------------------------------------------------------------------------------------

    def step(self) -> None:
        began = self.clock()
        if self.rollouts:
            self.rollouts.prepare(self.state.step)
            self.state.bank_seconds += self.clock() - began
        if self.styles:
            self.styles.take(self.styles.drawn(self.state.step))
        values, norm = self._learn()
        lr = learning_rate(self.config, self.state.step)
        # All processes see the same values, so all decide alike.
        finite = bool(values.isfinite().all())
        good = finite and norm < math.inf
        self.state.step += 1
        if good:
            for group in self.optimiser.param_groups:
                group["lr"] = lr
            self.optimiser.step()
            self.average.update(self.parameters, self.state.step - self.state.skipped)
            self.state.in_a_row = []
        else:
            self._skip(finite)
        self.optimiser.zero_grad()
        self.state.seconds += self.clock() - began
        self._tell(values if good else None, lr, norm)
        self._save()

    def _learn(self) -> tuple[Tensor, float]:
        """Forward and backward, in as many parts as the batch takes. Gives the losses of all processes and t,
        (B, losses + 1), and the norm of the gradient, which is clipped.
        """
        config, accelerator, state = self.config, self.accelerator, self.state
        factors = torch.tensor(self.criterion.factors(state.step), device=self.device)
        values = []
        with self._ridden():
            for part in range(self.accumulation):
                values.append(self._learn_part(part, factors))
        norm = accelerator.clip_grad_norm_(self.parameters.values(), config.optimiser.clip or math.inf)
        norm = float(sharding.gathered({"norm": norm}, keep=True)["norm"])
        found = accelerator.gather(torch.cat(values, 1).T.contiguous()).cpu()  # (B, losses + 2)
        state.left_out += int(found[:, -1].sum())
        return found[:, :-1], norm

    def _ridden(self) -> AbstractContextManager[None]:
        return self.styles.ridden() if self.styles else nullcontext()

    def _learn_part(self, part: int, factors: Tensor) -> Tensor:
        """Forward and backward of one part of a step: the losses of its samples, t, and which were left out."""
        config, accelerator, state = self.config, self.accelerator, self.state
        numbers = _numbers(config, accelerator, state.step, part)
        slots = [n - state.step * config.run.batch for n in numbers]
        if self.rollouts:
            batch = self.rollouts.batch(state.step, slots)
            assert batch.x is not None
            x = batch.x
        else:
            batch = self.ahead.next().to(self.device)
            state.waited = self.waited_before + self.ahead.waited
            x = self._noised(batch)
        wanted = self.computed(numbers, self.device) if self.computed else self._wanted(batch, x)
        last = part == self.accumulation - 1
        if config.run.shard:
            sharding.synchronise(self.student, last)
        with nullcontext() if last or config.run.shard else accelerator.no_sync(self.model):
            mine = self.model(x, batch.t, batch.context, batch.added)
            value = self.criterion(batch, x, mine, wanted)
            accelerator.backward((factors @ value).mean() / self.accumulation)
        if self.rollouts:
            a, s = coefficients(batch.t, config.network.alphas)
            self.rollouts.advance(state.step, slots, x, as_v(mine[0].detach(), x, a, s, config.network.prediction))
        assert batch.left_out is not None
        return torch.cat([value.detach(), batch.t[None].float(), batch.left_out[None].float()])

    def _skip(self, finite: bool) -> None:
        """A step whose losses or gradient are not finite. finite: the losses are."""
        state, scaler = self.state, self.accelerator.scaler
        state.skipped += 1
        # fp16's first scales are too large for the gradient by design: that does not count.
        if not (finite and scaler):
            state.in_a_row = [*state.in_a_row, state.step]
        if scaler:  # it halves its scale; else `step` does that
            scaler.update()

    # After it ---------------------------------------------------------------------------------------

    def _tell(self, values: Tensor | None, lr: float, norm: float) -> None:
        """Log, held-out losses, pictures. values: of the step, None where it was skipped. Raises FloatingPointError."""
        config, state, accelerator, log = self.config, self.state, self.accelerator, self.log
        shows = bool(config.run.picture_every) and state.step % config.run.picture_every == 0
        shows = shows or state.step == config.run.steps
        if self.styles and shows:
            self.styles.take(self.styles.shown)
        if self.held_out and shows:
            with averaged(self.parameters, self.average), self._ridden():
                measured = self.held_out()
            if log:
                log.held_out(state.step, measured)
            accelerator.log({f"held_out/{name}": value for name, value in measured.items()}, state.step)
        if log:
            if log.add(state, values, lr, norm):
                accelerator.log(log.scalars(), state.step)
            self.progress.show(state.step, log.status(state))
        if self.show and shows:
            its = predictor(self.teacher, self.half) if self.matrices else None
            with averaged(self.parameters, self.average), self._ridden(), accelerator.autocast():
                rows = self.show.rows(predictor(self.student, torch.float32), its)
            if log:
                self.show.save(state.step, rows)
                log.picture(state.step, rows)
        if len(state.in_a_row) == BAD_STEPS:
            saved = self.checkpoints.paths()
            raise FloatingPointError(
                f"{config.name}: the loss or its gradient was not finite in steps "
                f"{', '.join(map(str, state.in_a_row))}, so the run stops. "
                f"{f'The last good state is {saved[-1].name}. ' if saved else ''}Lower optimiser.lr, use bf16 instead "
                "of fp16, or look at the data of these steps"
            )

    def _save(self) -> None:
        config, state, accelerator = self.config, self.state, self.accelerator
        due = state.step % config.run.save_every == 0 or state.step == config.run.steps
        if state.in_a_row or not due:
            return
        states = self.rollouts.gathered(accelerator) if self.rollouts else None
        stand = gather_object([self.source.state(state.step * config.run.batch)])
        if not (self.main or config.run.shard):
            return
        tensors = sharding.gathered(tensors_of(self.parameters, self.plain, self.average), keep=self.main)
        if states is not None:
            tensors["rollout.x"] = states
        if self.main:
            state.source = self.source.together(stand)
            state.scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else {}
            self.checkpoints.save(state, tensors)

    @torch.no_grad()
    def finish(self) -> Path:
        """Write the product, of the averaged weights."""
        config = self.config
        self.ahead.close()
        for key, p in self.parameters.items():
            p.copy_(self.average.weights[key])
        with sharding.put_together(self.student):
            if self.log:
                self.progress.end()
                training = provenance(config, self.state, self.log)
                training |= {"trained": sum(p.numel() for p in self.parameters.values())}
                networks.write_product(self.student, config, training, self.matrices)
                write_card(config, training)
        self.accelerator.wait_for_everyone()
        sharding.let_gloo_end(self.accelerator)
        self.accelerator.end_training()
        return config.product


def _numbers(config: Config, accelerator: Accelerator, step: int, part: int) -> range:
    """Numbers of the samples this process takes for one part of a step."""
    first = (
        step * config.run.batch
        + (part * accelerator.num_processes + accelerator.process_index) * config.run.micro_batch
    )
    return range(first, first + config.run.micro_batch)
