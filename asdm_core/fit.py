"""Fitting a pack to a checkpoint: its units learn from the network they play in, from prompts alone.

The teacher is the checkpoint with all that is on it, LoRAs included; the student is the same network with the pack's
units in it. Both are evaluated at the same states, once with a prompt and once without. What the teacher predicts is
what the student learns, and the same evaluation moves the states on: none is made that nothing is learned from. Half of
the walks follow the teacher, the other half go where the student would, whose errors it learns to mend there.

States are x = a x_0 + s n with a^2 + s^2 = 1, and v = a n - s x_0. With guidance w the pictures follow
g = v_empty + w (v_prompt - v_empty), in which an error of the one weighs w and one of the other w - 1; so the loss is

    (|e_prompt|^2 + |e_empty|^2) / 2  +  |e_g|^2 / (w^2 + (w - 1)^2)  +  sum over levels of |f_S - f_T|^2 / |f_T|^2

with e the errors of the student's v, and f what the last unit of each level of the UNet puts out. Each |.|^2 is the
mean over the numbers of a sample.

Torch only: whoever fits brings the networks, the states of the prompts, and a clock.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import muon
from .architecture import Architecture

EMPTY = -1  # in place of a prompt's number
SIDES = (8, 16, 24)  # of the states on which a forward's memory is measured


@dataclass(frozen=True)
class Settings:
    """How a fit learns. walks: states in a batch, each evaluated with and without its prompt. steps: fewest and most
    evaluations of a walk. guidance: w. lr: at its highest; it rises over `warmup` steps, and falls to 0 over the last
    `cooldown` of the time. average: of the weights, what is kept at each step. features: weight of the levels.
    """

    walks: int = 4
    steps: tuple[int, int] = (3, 8)
    guidance: float = 3.0
    lr: float = 5e-4
    warmup: int = 20
    cooldown: float = 0.5
    average: float = 0.99
    clip: float = 1.0
    features: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.walks < 1 or not 1 <= self.steps[0] <= self.steps[1] or not 0 <= self.cooldown <= 1:
            raise ValueError(f"a fit needs walks, steps from fewest to most and a cooldown of 0 to 1, got {self}")
        if not (math.isfinite(self.guidance) and math.isfinite(self.lr)) or self.lr <= 0:
            raise ValueError(f"guidance and lr of a fit must be finite and lr above 0, got {self}")


def walks_for(steps: int) -> tuple[int, int]:
    """Fewest and most evaluations of a walk in a fit for runs of so many steps; 0: of any. What learns for few steps
    has few noise levels to learn.
    """
    return (steps, steps) if steps else Settings.steps


class Network(Protocol):
    """A network with its prompts: states x (B, C, h, w), time steps t (B,), numbers of prompts or EMPTY -> what it
    predicts, (B, C, h, w).
    """

    def __call__(self, x: Tensor, t: Tensor, prompts: Sequence[int]) -> Tensor: ...


@dataclass(frozen=True)
class Diffusion:
    """alphas: a^2 by time step, (T,). prediction: "eps" or "v"."""

    alphas: Tensor
    prediction: str

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a and s, (B, 1, 1, 1) float32. t: -1 stands for the end, where x is x_0."""
        a2 = self.alphas.to(t.device).double()[t.clamp_min(0)].where(t >= 0, 1.0)[:, None, None, None]
        return a2.sqrt().float(), (1 - a2).sqrt().float()

    def v(self, predicted: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The v a prediction stands for, float32."""
        if self.prediction == "v":
            return predicted.float()
        a, s = self.coefficients(t)
        return (predicted.float() - s * x) / a.clamp_min(1e-4)

    def step(
        self, x: Tensor, v: Tensor, t: Tensor, to: Tensor, before: Tensor | None, came: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One step of DPM-Solver++(2M) (arXiv 2211.01095) from t to `to` (-1: the end), and the x_0 it saw.

        before, came: that of the last step and the t it was made at, -1 in `came` where there was none.
        """
        (a, s), (a2, s2) = self.coefficients(t), self.coefficients(to)
        x0 = a * x - s * v
        lam, lam2 = (torch.log(p.clamp_min(1e-6) / q.clamp_min(1e-6)) for p, q in ((a, s), (a2, s2)))
        h = lam2 - lam
        drawn = x0
        if before is not None and came is not None:
            a1, s1 = self.coefficients(came)
            r = (lam - torch.log(a1.clamp_min(1e-6) / s1.clamp_min(1e-6))) / h
            again = (came >= 0)[:, None, None, None] & (r > 0)
            r = r.where(again, 1.0)
            drawn = torch.where(again, (1 + 1 / (2 * r)) * x0 - before / (2 * r), x0)
        moved = (s2 / s.clamp_min(1e-6)) * x - a2 * torch.expm1(-h) * drawn
        return torch.where((to < 0)[:, None, None, None], x0, moved), x0


def guided(v: Tensor, guidance: float) -> Tensor:
    """(2B, ...) with prompts and without -> (B, ...)."""
    mine, empty = v.chunk(2)
    return empty + guidance * (mine - empty)


def times_of(steps: int, count: int) -> list[int]:
    """Time steps of ComfyUI's scheduler `simple`, from count - 1 down, and -1 for the end."""
    return [count - 1 - k * count // steps for k in range(steps)] + [-1]


@torch.no_grad()
def draw(
    network: Network, diffusion: Diffusion, noise: Tensor, prompts: Sequence[int], steps: int, guidance: float
) -> Tensor:
    """Latents (B, C, h, w) of a run from noise, as DPM-Solver++(2M) and the scheduler `simple` make them."""
    x, before, came = noise, None, None
    line = times_of(steps, len(diffusion.alphas))
    for now, to in zip(line, line[1:], strict=False):
        t, then = (torch.full((len(x),), time, device=x.device) for time in (now, to))
        twice = torch.cat([x, x]), torch.cat([t, t])
        predicted = network(*twice, [*prompts, *[EMPTY] * len(prompts)])
        x, before = diffusion.step(x, guided(diffusion.v(predicted, *twice), guidance), t, then, before, came)
        came = t
    return x


# Features ---------------------------------------------------------------------------------------------------------


def levels(architecture: Architecture) -> tuple[str, ...]:
    """The last kept unit of each level of a UNet, in the order of execution."""
    last: dict[tuple[str, ...], str] = {}
    for unit in architecture.kept:
        side, *place = unit.address.split(".")
        if side != "stem":
            last[(side, place[0]) if side != "mid" else (side,)] = unit.address
    return tuple(last.values())


class Taps:
    """What some units of two networks put out. The networks may share modules: one is listened to at a time."""

    def __init__(self, teacher: Mapping[str, nn.Module], student: Mapping[str, nn.Module]):
        """Modules by address, the same addresses for both."""
        self._into: dict[str, Tensor] | None = None
        self._handles = [
            module.register_forward_hook(self._hook(address))
            for address in teacher
            for module in {id(m): m for m in (teacher[address], student[address])}.values()
        ]

    def _hook(self, address: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, inputs: Any, out: Any) -> None:
            if self._into is not None:
                self._into[address] = out[0] if isinstance(out, tuple) else out

        return keep

    @contextmanager
    def listening(self) -> Iterator[dict[str, Tensor]]:
        """Gives the features of one forward by address, as they come."""
        found: dict[str, Tensor] = {}
        self._into = found
        try:
            yield found
        finally:
            self._into = None

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


# The loop ---------------------------------------------------------------------------------------------------------


def mean_square(error: Tensor) -> Tensor:
    """Of each sample, (B,), float32."""
    return error.float().square().flatten(1).mean(1)


def loss_of(
    v: Tensor, wanted: Tensor, features: Mapping[str, Tensor], their: Mapping[str, Tensor], settings: Settings
) -> Tensor:
    """The loss of a batch (see above), a number. v, wanted: (2B, C, h, w), with prompts and without."""
    w = settings.guidance
    error = v - wanted
    loss = mean_square(error).mean() + mean_square(guided(error, w)).mean() / (w**2 + (w - 1) ** 2)
    for address in features if settings.features else ():
        f, g = features[address], their[address]
        loss = loss + settings.features * (mean_square(f.float() - g.float()) / mean_square(g).clamp_min(1e-6)).mean()
    return loss


@dataclass
class Told:
    """What a fit says after each step: steps and samples so far, share of the time that has passed, the loss (an
    average over the last ones).
    """

    steps: int
    samples: int
    share: float
    loss: float


class Fit:
    """One fit. parameters: those that learn, float32, by name; they hold the average when it ends, however it ends."""

    def __init__(
        self,
        teacher: Network,
        student: Network,
        taps: Taps,
        parameters: Mapping[str, nn.Parameter],
        diffusion: Diffusion,
        shape: tuple[int, int, int],
        prompts: int,
        settings: Settings = Settings(),
        half: torch.dtype | None = None,
    ):
        """shape: of a state, (C, h, w). prompts: how many there are. half: what the networks compute in, where float16
        needs its gradients scaled.
        """
        if prompts < 1:
            raise ValueError("a fit needs prompts, one a line, and none came")
        self.teacher, self.student, self.taps = teacher, student, taps
        self.parameters = dict(parameters)
        self.diffusion, self.settings = diffusion, settings
        self.device = next(iter(self.parameters.values())).device
        self.shape, self.count = shape, prompts
        self.told = Told(0, 0, 0.0, math.nan)
        make = muon.Muon if muon.AVAILABLE else torch.optim.AdamW
        self._optimiser = make(self.parameters.values(), lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0)
        self._average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=half == torch.float16)
        self._random = random.Random(settings.seed)
        self._noise = torch.Generator().manual_seed(settings.seed)
        self._order: list[int] = []
        n = settings.walks
        self._x = torch.zeros(n, *shape, device=self.device)
        self._before = torch.zeros_like(self._x)
        self._lines: list[list[int]] = [[] for _ in range(n)]  # time steps to come, the end included
        self._came = [-1] * n
        self._prompts = [0] * n
        self._begun = 0

    def run(self, seconds: float, clock: Callable[[], float], each: Callable[[Told], None] = lambda told: None) -> Told:
        """Learn for so many seconds of a clock. each: called after every step; what it takes counts as well, unless the
        clock stands still. Whatever it raises ends the fit.
        """
        began = clock()
        try:
            while (share := (clock() - began) / seconds) < 1 if seconds > 0 else False:
                self._step(share)
                each(self.told)
        finally:
            self._keep_average()
        return self.told

    def _keep_average(self) -> None:
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self._average[name])
                p.grad = None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The average in the place of the weights, for a look at it."""
        held = {name: p.detach().clone() for name, p in self.parameters.items()}
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self._average[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(held[name])

    def _begin_walks(self) -> None:
        fewest, most = self.settings.steps
        for i, line in enumerate(self._lines):
            if len(line) > 1:
                continue
            line[:] = times_of(self._random.randint(fewest, most), len(self.diffusion.alphas))
            if self._begun < self.settings.walks:  # the first ones begin anywhere, so that each batch has all noises
                del line[: i * (len(line) - 1) // self.settings.walks]
            self._begun += 1
            self._x[i] = torch.randn(self.shape, generator=self._noise).to(self.device)
            self._came[i] = -1
            self._order = self._order or self._random.sample(range(self.count), self.count)
            self._prompts[i] = self._order.pop()

    def _step(self, share: float) -> None:
        settings = self.settings
        self._begin_walks()
        t = torch.tensor([line[0] for line in self._lines], device=self.device)
        x, times = torch.cat([self._x, self._x]), torch.cat([t, t])
        prompts = [*self._prompts, *[EMPTY] * settings.walks]
        with torch.no_grad(), self.taps.listening() as their:
            wanted = self.diffusion.v(self.teacher(x, times, prompts), x, times)
        with self.taps.listening() as mine:
            v = self.diffusion.v(self.student(x, times, prompts), x, times)
        loss = loss_of(v, wanted, mine, their, settings)
        self._scaler.scale(loss).backward()
        rise = min(1.0, (self.told.steps + 1) / settings.warmup) if settings.warmup else 1.0
        fall = min(1.0, (1 - share) / settings.cooldown) if settings.cooldown else 1.0
        for group in self._optimiser.param_groups:
            group["lr"] = settings.lr * min(rise, fall)
        self._scaler.unscale_(self._optimiser)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), settings.clip)
        if self._scaler.is_enabled() or norm.isfinite():
            self._scaler.step(self._optimiser)
        self._scaler.update()
        self._optimiser.zero_grad()
        self._tell(share, float(loss.detach()))
        self._move(guided(wanted, settings.guidance), guided(v.detach(), settings.guidance), t)

    def _tell(self, share: float, loss: float) -> None:
        told = self.told
        if not math.isfinite(loss) and not self._scaler.is_enabled():
            raise FloatingPointError(
                "the networks gave numbers that are not finite, so the fit ended; what was learned until then is kept"
            )
        keep = 0.95 if told.steps else 0.0
        mean = loss if not math.isfinite(told.loss) else keep * told.loss + (1 - keep) * loss
        self.told = Told(told.steps + 1, told.samples + 2 * self.settings.walks, share, mean)
        weight = 1 - min(self.settings.average, (1 + told.steps) / (10 + told.steps))
        with torch.no_grad():
            torch._foreach_lerp_(list(self._average.values()), [p.detach() for p in self.parameters.values()], weight)

    def _move(self, teacher: Tensor, student: Tensor, t: Tensor) -> None:
        own = torch.arange(self.settings.walks, device=self.device)[:, None, None, None] % 2 == 1
        to = torch.tensor([line[1] for line in self._lines], device=self.device)
        came = torch.tensor(self._came, device=self.device)
        self._x, self._before = self.diffusion.step(
            self._x, torch.where(own, student, teacher), t, to, self._before, came
        )
        for i, line in enumerate(self._lines):
            self._came[i] = line.pop(0)


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps of a forward until its backward, weights not counted twice."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if type(tensor) is Tensor:  # of other classes are weights: parameters, and those that a host has quantised
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward()
    del out
    return sum(kept.values())


def foretold_bytes(forward: Callable[[int], Tensor], height: int, width: int) -> int:
    """Bytes that autograd will keep of a forward on states (height, width), from small square ones.

    forward: by the side of its states. What is kept has a part for the prompts, one that grows with the area, and where
    attention keeps its probabilities one that grows with the area's square.
    """
    areas = [float(side * side) for side in SIDES]
    kept = [float(saved_bytes(partial(forward, side))) for side in SIDES]
    powers = torch.tensor([[1.0, area, area**2] for area in areas], dtype=torch.float64)
    parts = torch.linalg.solve(powers, torch.tensor(kept, dtype=torch.float64)).clamp_min(0).tolist()
    area = height * width
    return int(parts[0] + parts[1] * area + parts[2] * area**2)


def learning_bytes(parameters: Iterable[Tensor]) -> int:
    """Bytes of the weights that learn: themselves, their gradients, up to two moments and the average, float32."""
    return 5 * 4 * sum(p.numel() for p in parameters)
