"""What every training script here shares: the optimiser with its average, checkpoints, the time box."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from asdm_core.tensor_file import write_file

from ..optimisation import Average, trapezoid

Network = TypeVar("Network", bound=nn.Module)

CHECKPOINT_SECONDS = 150
COOLDOWN = 0.4  # last part of a run, in which the learning rate falls to zero: short runs want a long one
WARMUP = 50  # steps


# Optimiser ------------------------------------------------------------------------------------------


class Optimiser:
    """AdamW on float32 master weights, with an exponential average of them.

    The network itself may be in bfloat16: gradients come from it, updates go to the master and are
    copied back.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        weight_decay: float = 0.01,
        ema: float = 0.999,
        clip: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.99),
    ):
        self.live = dict(parameters)
        self.master = {k: p.detach().float().clone() for k, p in self.live.items()}
        self.average = Average(self.master, ema)
        self.clip = clip
        decay = [p for p in self.master.values() if p.dim() > 1]
        rest = [p for p in self.master.values() if p.dim() <= 1]
        self.adamw = torch.optim.AdamW(
            [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=0.0,
            betas=betas,
            fused=True,
        )
        self.steps = 0

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """One update from the gradients of the live parameters. Returns the gradient norm before clipping."""
        for key, p in self.live.items():
            self.master[key].grad = None if p.grad is None else p.grad.float()
            p.grad = None
        norm = float(nn.utils.clip_grad_norm_(self.master.values(), self.clip))
        if not np.isfinite(norm):
            raise ValueError(f"the gradient is not finite at step {self.steps}; resume with a smaller --lr")
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.steps += 1
        torch._foreach_copy_(list(self.live.values()), list(self.master.values()))
        self.average.update(self.master, self.steps)
        return norm

    def state(self) -> dict[str, Tensor]:
        tensors = {f"master.{k}": v for k, v in self.master.items()} | {
            f"average.{k}": v for k, v in self.average.weights.items()
        }
        for key, p in self.master.items():
            for name, value in self.adamw.state.get(p, {}).items():
                tensors[f"{name}.{key}"] = torch.as_tensor(value)
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        for key, p in self.master.items():
            p.copy_(tensors[f"master.{key}"])
            self.average.weights[key].copy_(tensors[f"average.{key}"])
            self.live[key].copy_(p)
            if f"exp_avg.{key}" in tensors:
                self.adamw.state[p] = {
                    n: tensors[f"{n}.{key}"].clone().to(p.device if n != "step" else "cpu")
                    for n in ("step", "exp_avg", "exp_avg_sq")
                }
        self.steps = steps

    @torch.no_grad()
    def averaged(self, module: Network, prefix: str = "") -> Network:
        """Put the averaged weights into another copy of the network (or of the part under `prefix`)."""
        own = dict(module.named_parameters())
        for key, value in self.average.weights.items():
            if key.startswith(prefix):
                own[key.removeprefix(prefix)].copy_(value)
        return module.eval()


# The run --------------------------------------------------------------------------------------------


@dataclass
class TrainingState:
    """Where a run stands: everything a resumed run must know besides tensors.

    The learning rate is a trapezoid: warm-up, constant, linear cooldown to zero. With `steps` the
    cooldown starts at a known step; in a time box it starts when COOLDOWN of the time is left, and its
    length is estimated then and recorded, so that resumed runs follow it.
    """

    minutes: float
    total: int | None = None  # steps, where they are fixed
    step: int = 0
    samples: int = 0
    seconds: float = 0.0  # of training, over all sessions
    cooldown_from: int | None = None
    cooldown_steps: int = 0
    curve: list = field(default_factory=list)  # (step, samples, seconds, value)
    _recent: list = field(default_factory=list, repr=False)

    def rate(self, lr: float) -> float:
        """Learning rate of the coming step; decides when the cooldown begins."""
        if self.cooldown_from is None:
            if self.total is not None:
                if self.step >= int(self.total * (1 - COOLDOWN)):
                    self.cooldown_from = self.step
                    self.cooldown_steps = self.total - self.step
            elif self.seconds >= 60 * self.minutes * (1 - COOLDOWN) and len(self._recent) >= 20:
                per_step = sum(self._recent) / len(self._recent)
                self.cooldown_from = self.step
                self.cooldown_steps = max(1, int((60 * self.minutes - self.seconds) / per_step))
        left = None if self.cooldown_from is None else self.cooldown_from + self.cooldown_steps - self.step
        return lr * trapezoid(self.step, WARMUP, left, max(1, self.cooldown_steps))

    def advance(self, samples: int, value: float, started: float) -> None:
        took = time.perf_counter() - started
        self.step += 1
        self.samples += samples
        self.seconds += took
        self._recent = (self._recent + [took])[-50:]
        if not self.curve or self.step % 10 == 0:
            self.curve.append((self.step, self.samples, round(self.seconds, 1), round(value, 5)))

    @property
    def done(self) -> bool:
        if self.cooldown_from is not None:
            return self.step >= self.cooldown_from + self.cooldown_steps
        return self.total is not None and self.step >= self.total

    def status(self) -> str:
        return f"{self.samples / max(self.seconds, 1e-9):.0f}/s, {self.seconds / 60:.1f} of {self.minutes:g} min"


class Checkpoint:
    """A training state in one safetensors file: tensors, and the rest as JSON in the metadata. Written whole or not at
    all.
    """

    def __init__(self, path: Path):
        self.path = path
        self.last = time.monotonic()

    def load(self, optimiser: Optimiser, run: TrainingState) -> TrainingState:
        """The TrainingState to go on with, and the optimiser filled; `run` itself where there is no checkpoint yet."""
        if not self.path.exists():
            return run
        with safe_open(self.path, framework="pt") as f:
            saved = json.loads(f.metadata()["run"])
            optimiser.load({k: f.get_tensor(k) for k in f.keys()}, saved["step"])
        if (saved["minutes"], saved["total"]) != (run.minutes, run.total):
            # Another time box than before: its cooldown is planned anew.
            saved |= {
                "minutes": run.minutes,
                "total": run.total,
                "cooldown_from": None,
                "cooldown_steps": 0,
                "_recent": [],
            }
        resumed = TrainingState(**saved)
        print(f"resuming at step {resumed.step} after {resumed.seconds / 60:.1f} min")
        return resumed

    def due(self) -> bool:
        return time.monotonic() - self.last > CHECKPOINT_SECONDS

    def save(self, optimiser: Optimiser, run: TrainingState) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.path, optimiser.state(), {"run": json.dumps(asdict(run))})
        self.last = time.monotonic()


# The command line -----------------------------------------------------------------------------------


def add_common_arguments(parser: argparse.ArgumentParser, training: bool = True) -> None:
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/emoji"), help="folder for caches, checkpoints and pictures"
    )
    parser.add_argument("--models", type=Path, default=Path("models/emoji"), help="folder of the finished weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads; two processes of one thread beat one of two, and waiting threads collapse",
    )
    if training:
        parser.add_argument(
            "--minutes", type=float, default=10, help="training time in all, over resumed calls as well"
        )
        parser.add_argument("--steps", type=int, help="train for this many steps instead")
        parser.add_argument("--fresh", action="store_true", help="start anew instead of resuming")


def start(args: argparse.Namespace) -> None:
    """Settings every script makes first."""
    torch.set_num_threads(args.threads)
    args.runs.mkdir(parents=True, exist_ok=True)
    args.models.mkdir(parents=True, exist_ok=True)
