"""Rollout distillation: a student of few steps without guidance learns on its own states where the teacher goes.

The teacher walks from noise to a picture with guidance w in N steps; its states x*_0 (noise) to x*_N (picture) are one
trajectory of the bank. A student of K steps (K divides N) walks from the same noise over every N/K-th of these time
steps. At its own state x, with a, s the coefficients of its step and a', s' those of the next (1 and 0 at the end), a
step without guidance is a rotation,

    x' = cos x - sin v,    cos = a a' + s s',    sin = a' s - a s',

so the v that lands exactly on the trajectory, and the loss, are

    v* = (cos x - x*') / sin,    (sin / mean sin) || v - v* ||^2    ( = || x' - x*' ||^2 / (sin mean sin) ).

x = a x_0 + s noise with a^2 + s^2 = 1, v = a noise - s x_0. A network that predicts the noise has v = (eps - s x) / a:
the loss is the same for the same denoiser.

The states of all samples move on with the very forward pass that is trained, so being on its own states costs nothing.
Everything but these states follows from the seed and the number of the step; they are in the checkpoint.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import Tensor

from asdm_core.few_step import FewStep
from asdm_core.tensor_file import write_file

from .config import Config
from .sections import Rollout
from .data import Batch, Source
from .diffusion import ALPHAS, as_v
from .encoders import Text, conditions, guided, joined, whole
from .provenance import NETWORK, contents, digest, made, same_file
from .seeds import seeded
from .sources import Predict, Prompts, text_settings

SHARE = 32  # trajectories the teacher draws at once


# The formulas ---------------------------------------------------------------------------------------


def table(times: Sequence[int], alphas: Tensor = ALPHAS) -> Tensor:
    """a and s at each time step and at the end, (len(times) + 1, 2)."""
    a2 = torch.cat([alphas.double()[list(times)], torch.ones(1, dtype=torch.float64)])
    return torch.stack([a2.sqrt(), (1 - a2).sqrt()], 1).float()


def rotations(points: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the steps between points (K + 1, 2) of `table`, each (K,)."""
    a, s = points[:-1].T
    a2, s2 = points[1:].T
    return a * a2 + s * s2, a2 * s - a * s2


def landing(x: Tensor, wanted: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The v with which a step from x lands on `wanted`."""
    return (cos * x - wanted) / sin


def _log_ratio(a: float, s: float) -> float:
    """log a/s; minus infinity at zero SNR, where the steps below have a limit."""
    return math.log(a / s) if a else -math.inf


class Solver:
    """The teacher's steps: DPM-Solver++(2M) (arXiv 2211.01095) or DDIM, over given time steps, in x of this module."""

    def __init__(self, times: Sequence[int], sampler: str, alphas: Tensor = ALPHAS):
        self.points = table(times, alphas).double()
        self.sampler = sampler
        self.previous: Tensor | None = None  # x_0 of the step before

    def step(self, k: int, x: Tensor, v: Tensor) -> Tensor:
        """From x (B, C, h, w) at step k to the next."""
        a, s = self.points[k].tolist()
        a2, s2 = self.points[k + 1].tolist()
        x0 = a * x - s * v
        before = self.previous
        self.previous = x0
        if s2 == 0:
            return x0
        h = _log_ratio(a2, s2) - _log_ratio(a, s)
        if self.sampler == "dpmpp_2m" and before is not None:
            a1, s1 = self.points[k - 1].tolist()
            r = (_log_ratio(a, s) - _log_ratio(a1, s1)) / h
            x0 = (1 + 1 / (2 * r)) * x0 - before / (2 * r)
        return (s2 / s) * x - a2 * math.expm1(-h) * x0


@torch.no_grad()
def guided_trajectory(
    predict: Predict,
    noise: Tensor,
    text: Text,
    empty: Text,
    times: Sequence[int],
    sampler: str,
    guidance: float,
    prediction: str,
    size: int,
    alphas: Tensor = ALPHAS,
) -> Tensor:
    """All states of a run from noise (B, C, h, w), (B, len(times) + 1, C, h, w), float32. guidance 1: none."""
    device = noise.device
    twice = 2 if guidance != 1 else 1
    context = guided(text.states, empty.states)[: twice * len(noise)].to(device)
    added = conditions(text, empty, twice, size, device)
    x = noise
    states = [noise]
    points = table(times, alphas)
    solver = Solver(times, sampler, alphas)
    for k, time in enumerate(times):
        t = torch.full((twice * len(noise),), time, device=device)
        a, s = points[k].tolist()
        v = as_v(predict(torch.cat([x] * twice), t, context, added), torch.cat([x] * twice), a, s, prediction)
        if twice == 2:
            mine, its = v.chunk(2)
            v = its + guidance * (mine - its)
        x = solver.step(k, x, v)
        states.append(x)
    return torch.stack(states, 1)


def few_steps(settings: Rollout) -> FewStep:
    """How a run of the finished student must be set up. Euler without guidance is the rotation above."""
    times = settings.student_times(settings.steps[-1])
    return FewStep(len(times), "euler", settings.scheduler, 1.0, times)


# The bank -------------------------------------------------------------------------------------------


class Trajectory(NamedTuple):
    """states: (B, N + 1, C, h, w) float32; the conditions of each."""

    states: Tensor
    text: Text


class Bank:
    """The teacher's trajectories by number, drawn when they are first needed and kept in a folder.

    A file holds `rollout.window` of them. What number n shows follows from the seed: another run with the same
    teacher, prompts and settings may share the folder.
    """

    def __init__(
        self,
        config: Config,
        source: Source,
        predict: Predict,
        device: torch.device,
        process: int = 0,
        processes: int = 1,
        wait: Callable[[], None] = lambda: None,
    ):
        self.config = config
        self.source = source
        self.predict = predict
        self.device = device
        self.process = process
        self.processes = processes
        self.wait = wait
        self.folder = Path(config.rollout.bank) if config.rollout.bank else config.folder / "bank"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.window = config.rollout.window
        self.upto = 0  # number of files that need no further look
        self.settings = {
            "network.teacher": contents(config.network.teacher, NETWORK),
            "network.prediction": config.network.prediction,
            "schedule": dict(config.network.noise.settings),
            "prompts": digest(source.prompts) if isinstance(source, Prompts) else len(source),
            "data.source": config.data.source,
            "data.path": Path(config.data.path).name,
            **_conditions(config, source),
            "data.size": config.data.size,
            "data.caption_dropout": config.data.caption_dropout,
            "seed": config.seed,
            "rollout.times": list(config.rollout.teacher_times),
            "rollout.sampler": config.rollout.sampler,
            "rollout.guidance": config.rollout.guidance,
            "rollout.window": config.rollout.window,
        }
        self.file = lru_cache(maxsize=4)(self._file)
        self.order = lru_cache(maxsize=2)(lambda epoch: source.order(seeded(config.seed, 14, epoch)))

    def path(self, n: int) -> Path:
        return self.folder / f"{n:06d}.safetensors"

    def reach(self, numbers: Iterable[int]) -> None:
        """Have these trajectories, and those between. All processes call it with the same numbers, which never go down.

        Each draws every so many-th file, and whole rounds of them: who draws what must not depend on who is faster.
        """
        windows = {n // self.window for n in numbers}
        first = max(self.upto, min(windows) // self.processes * self.processes)
        upto = (max(windows) // self.processes + 1) * self.processes
        if upto <= self.upto:
            return
        for n in range(first, upto):
            if n % self.processes == self.process and not self.path(n).exists():
                self._draw(n)
        self.wait()
        self.upto = upto

    def _draw(self, n: int) -> None:
        states, texts = [], []
        for first in range(n * self.window, (n + 1) * self.window, SHARE):
            part = range(first, min(first + SHARE, (n + 1) * self.window))
            text = self.text(part)
            side, channels = self.config.data.side, self.config.network.config.in_channels
            noise = torch.stack(
                [torch.randn(channels, side, side, generator=seeded(self.config.seed, 12, i)) for i in part]
            )
            rollout = self.config.rollout
            states.append(
                guided_trajectory(
                    self.predict,
                    noise.to(self.device),
                    text,
                    self.source.empty,
                    rollout.teacher_times,
                    rollout.sampler,
                    rollout.guidance,
                    self.config.network.prediction,
                    self.config.data.size,
                    self.config.network.alphas,
                ).cpu()
            )
            texts.append(text)
        text = joined(texts)
        tensors = {"x": torch.cat(states).half(), "states": text.states.half()}
        if text.pooled is not None:
            tensors["pooled"] = text.pooled.half()
        if not tensors["x"].isfinite().all():
            raise ValueError(
                "the teacher's trajectories are not finite; is network.prediction right, and rollout.guidance not too "
                "high?"
            )
        write_file(self.path(n), tensors, made(self.settings))

    def text(self, numbers: Sequence[int]) -> Text:
        """The conditions of trajectories by number: each epoch of the source gives every prompt once."""
        chosen, draws, dropped = [], [], []
        for n in numbers:
            epoch, at = divmod(n, len(self.source))
            drop, draw = torch.rand(2, generator=seeded(self.config.seed, 13, n), dtype=torch.float64).tolist()
            chosen.append(self.order(epoch)[at])
            draws.append(draw)
            dropped.append(drop < self.config.data.caption_dropout)
        return self.source.texts(chosen, draws).where_not(torch.tensor(dropped), self.source.empty)

    def _file(self, n: int):
        same_file(self.path(n), self.settings, f"delete {self.folder}, or give another rollout.bank")
        return safe_open(self.path(n), framework="pt")

    def __call__(self, numbers: Sequence[int]) -> Trajectory:
        """Trajectories by number, which `reach` has made."""

        def row(n: int, name: str) -> Tensor:
            return self.file(n // self.window).get_slice(name)[n % self.window : n % self.window + 1].float()

        wide = self.source.empty.pooled is not None
        texts = [Text(row(n, "states"), row(n, "pooled") if wide else None) for n in numbers]
        return Trajectory(torch.cat([row(n, "x") for n in numbers]), joined(texts))


def _conditions(config: Config, source: Source) -> dict[str, str | int]:
    """What the conditions of a trajectory depend on beside their prompts."""
    if isinstance(source, Prompts):
        return text_settings(config)
    return {"data": contents(config.data.path)} if config.data.source == "cache" else {}


# Who is where ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a sample of a batch stands: at step k of steps, in the walk of this number.

    fresh: whether its state is the teacher's (the noise; or, where the number of steps has just changed, any).
    """

    steps: int
    k: int
    walk: int
    fresh: bool


class Course:
    """Where each sample of each step of a run stands: from the recipe alone.

    Sample i of a batch begins at step i % K, so every batch holds all steps equally; a walk that has ended makes room
    for the next. The run gives each K of `rollout.steps` its share of steps, in order.
    """

    def __init__(self, config: Config):
        rollout = config.rollout
        total = config.run.steps
        self.batch = config.run.batch
        self.parts: list[tuple[int, int, int]] = []  # first step, K, first walk
        walks = 0
        count = len(rollout.steps)
        for number, steps in enumerate(rollout.steps):
            first = total * number // count
            end = total * (number + 1) // count
            self.parts.append((first, steps, walks))
            walks += self.batch * ((end - first + steps - 2) // steps + 1)
        self.uses = rollout.uses
        self.window = rollout.window
        self.seed = config.seed
        self.order = lru_cache(maxsize=4)(self._order)

    def place(self, step: int, sample: int) -> Place:
        first, steps, walks = next(part for part in reversed(self.parts) if part[0] <= step)
        turn, k = divmod(step - first + sample % steps, steps)
        return Place(steps, k, walks + turn * self.batch + sample, k == 0 or step == first)

    def trajectory(self, walk: int) -> int:
        """The trajectory of a walk: each window of them is walked `uses` times, shuffled, and never again."""
        window, at = divmod(walk, self.window * self.uses)
        return window * self.window + self.order(window)[at] % self.window

    def _order(self, window: int) -> list[int]:
        order = list(range(self.window * self.uses))
        random.Random(f"{self.seed}/{window}").shuffle(order)
        return order


class Rollouts:
    """Batches of a rollout run, and the states in between."""

    def __init__(self, config: Config, bank: Bank, device: torch.device):
        self.config = config
        self.bank = bank
        self.device = device
        self.course = Course(config)
        side, channels = config.data.side, config.network.config.in_channels
        self.x = torch.zeros(config.run.batch, channels, side, side)  # own states, those of this process

    def prepare(self, step: int) -> None:
        """Have the trajectories of a step. All processes call it."""
        places = [self.course.place(step, i) for i in range(self.config.run.batch)]
        self.bank.reach({self.course.trajectory(p.walk) for p in places})

    def batch(self, step: int, samples: Sequence[int]) -> Batch:
        """The batch of some samples (numbers within the batch of a step), on the device."""
        rollout = self.config.rollout
        places = [self.course.place(step, i) for i in samples]
        found = self.bank([self.course.trajectory(p.walk) for p in places])
        steps = places[0].steps
        times = rollout.student_times(steps)
        skip = len(rollout.teacher_times) // steps
        points = table(times, self.config.network.alphas)
        cos, sin = rotations(points)
        k = torch.tensor([p.k for p in places])
        rows = torch.arange(len(places))
        ends = found.states[:, -1], found.states[:, 0]
        wide = (slice(None), None, None, None)
        a = points[k, 0][wide]
        s = points[k, 1][wide]
        cos_k = cos[k][wide]
        sin_k = sin[k][wide]
        if rollout.states == "pairs":
            x = a * ends[0] + s * ends[1]
            wanted = a * ends[1] - s * ends[0]
        else:
            mine = self.x[list(samples)]
            # Where a prediction was not finite the walk goes on from the teacher's state.
            own = torch.tensor([rollout.states == "own" and not p.fresh for p in places]) & mine.isfinite().all(
                (1, 2, 3)
            )
            x = torch.where(own[wide], mine, found.states[rows, k * skip])
            wanted = landing(x, found.states[rows, (k + 1) * skip], cos_k, sin_k)
        sizes = None if found.text.pooled is None else whole(self.config.data.size).expand(len(places), -1)
        return Batch(
            ends[0],
            ends[1],
            torch.tensor(times)[k],
            found.text.states,
            found.text.pooled,
            sizes,
            torch.zeros(len(places), dtype=torch.long),
            x,
            wanted,
            sin[k] / sin.mean(),
        ).to(self.device)

    def advance(self, step: int, samples: Sequence[int], x: Tensor, v: Tensor) -> None:
        """Move the samples of a batch on from their states x with the v that was predicted there."""
        places = [self.course.place(step, i) for i in samples]
        cos, sin = rotations(table(self.config.rollout.student_times(places[0].steps), self.config.network.alphas))
        k = torch.tensor([p.k for p in places])
        wide = (slice(None), None, None, None)
        self.x[list(samples)] = cos[k][wide] * x.cpu() - sin[k][wide] * v.detach().cpu()

    def gathered(self, accelerator: Accelerator) -> Tensor:
        """The states of all processes, (batch, C, h, w). All processes call it."""
        mine = torch.zeros(len(self.x), dtype=torch.bool)
        size = self.config.run.micro_batch
        for first in range(accelerator.process_index * size, len(mine), size * accelerator.num_processes):
            mine[first : first + size] = True
        # Zeros are replaced, not multiplied: what is not finite must stay with its own process.
        x = torch.where(mine[:, None, None, None], self.x, 0.0).to(self.device)
        return accelerator.reduce(x, "sum").cpu() if accelerator.num_processes > 1 else x.cpu().clone()
