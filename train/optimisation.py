"""What every training here shares about its steps: the optimiser, the learning rate's course and the average of the
weights.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from asdm_core.muon import Muon


class Kind(NamedTuple):
    """An optimiser: the class, its module, and what is installed where that is missing.

    moments: bytes it keeps for each number of a tensor of this shape.
    """

    module: str
    name: str
    package: str
    moments: Callable[[Sequence[int]], float]


def _eight_bit(shape: Sequence[int]) -> float:
    """Two numbers of a byte each, and what scales every 256 of them; small tensors stay whole."""
    return 2 * (1 + 4 / 256) if math.prod(shape) >= 4096 else 8.0


def _factored(shape: Sequence[int]) -> float:
    """A row and a column for the last two dimensions (torch.optim.Adafactor); without those, all."""
    if len(shape) < 2:
        return 4.0
    count = math.prod(shape)
    return 4 * (count // shape[-1] + count // shape[-2]) / count


def _matrices(shape: Sequence[int]) -> float:
    """One number for each of a matrix, two for the rest (Muon)."""
    return 4.0 if len(shape) > 1 else 8.0


KINDS = {
    "adamw": Kind("torch.optim", "AdamW", "torch", lambda shape: 8.0),
    "adamw-8bit": Kind("bitsandbytes.optim", "AdamW8bit", "bitsandbytes", _eight_bit),
    "adamw-8bit-torchao": Kind("torchao.optim", "AdamW8bit", "torchao", _eight_bit),
    "adafactor": Kind("torch.optim", "Adafactor", "torch", _factored),
    "muon": Kind("torch.optim", "Muon", "'torch>=2.9'", _matrices),
}


def make_optimiser(
    kind: str, parameters: Iterable[Tensor], lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """Raises ValueError where its library is not installed."""
    found = KINDS[kind]
    try:
        made: Any = getattr(importlib.import_module(found.module), found.name)
    except (ImportError, AttributeError):
        raise ValueError(
            f"optimiser.kind: {kind!r} needs the library {found.package}: pip install {found.package}; or take another "
            f"of {', '.join(KINDS)}"
        ) from None
    made = Muon if kind == "muon" else made  # torch's takes matrices alone
    arguments: dict[str, Any] = {"betas": betas} if kind != "adafactor" else {}
    if kind == "adamw":
        arguments["fused"] = True
    return made(list(parameters), lr=lr, weight_decay=weight_decay, **arguments)


def moments(optimiser: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    """What an optimiser keeps for a parameter, as plain tensors by name; those of tensors made of several have a slash
    in their names.
    """
    found: dict[str, Tensor] = {}
    for name, value in optimiser.state.get(p, {}).items():
        if hasattr(value, "__tensor_flatten__") and not isinstance(value, DTensor):  # which is put together later
            found |= {f"{name}/{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]}
        elif value is not None:
            found[name] = torch.as_tensor(value)
    return found


@torch.no_grad()
def restore_moments(optimiser: torch.optim.Optimizer, saved: Sequence[tuple[Tensor, Mapping[str, Tensor]]]) -> None:
    """Give an optimiser what it kept for each parameter. This may round weights: set them afterwards."""
    if not any(its for _, its in saved):
        return
    # Whatever it is made of, it makes it itself: in a step of no length.
    rates = [group["lr"] for group in optimiser.param_groups]
    for group in optimiser.param_groups:
        group["lr"] = 0.0
    for p, _ in saved:
        p.grad = torch.zeros_like(p)
    optimiser.step()
    optimiser.zero_grad()
    for group, lr in zip(optimiser.param_groups, rates, strict=True):
        group["lr"] = lr
    for p, its in saved:
        state = optimiser.state[p]
        for name, value in its.items():
            outer, _, inner = name.partition("/")
            held = getattr(state[outer], inner) if inner else state[outer]
            if isinstance(held, Tensor):
                held.copy_(value)
            else:
                state[outer] = type(held)(value.item())


class OnCPU(torch.optim.Optimizer):
    """An optimiser whose moments and steps are on the CPU, for parameters that may be on a card: 16 bytes a number
    there, none here. Gradients go over and weights come back with each step.

    make: the optimiser of the copies.
    """

    def __init__(self, parameters: Iterable[Tensor], make: Callable[[Sequence[Tensor]], torch.optim.Optimizer]):
        given = list(parameters)
        pinned = any(p.is_cuda for p in given)
        self.pairs = [(p, torch.nn.Parameter(torch.empty_like(p, device="cpu", pin_memory=pinned))) for p in given]
        self.gradients = [torch.empty_like(mine, pin_memory=pinned) for _, mine in self.pairs]
        self.inner = make([mine for _, mine in self.pairs])
        super().__init__(given, self.inner.defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        mine: Any
        for mine, its in zip(self.param_groups, self.inner.param_groups, strict=True):
            its.update({k: v for k, v in mine.items() if k != "params"})
        for (p, mine), gradient in zip(self.pairs, self.gradients, strict=True):
            mine.copy_(p, non_blocking=True)
            mine.grad = gradient.copy_(p.grad, non_blocking=True) if p.grad is not None else None
            if p in self.state:
                self.inner.state[mine] = self.state[p]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.inner.step()
        for p, mine in self.pairs:
            p.copy_(mine, non_blocking=True)
            self.state[p] = self.inner.state[mine]


def prepared(accelerator: Accelerator, optimiser: torch.optim.Optimizer) -> Any:
    """An optimiser as accelerate wants it. Its state stays where it is: accelerate would put it beside the weights."""
    return accelerator.prepare_optimizer(optimiser, device_placement=False)


def trapezoid(step: int, warmup: int = 0, left: int | None = None, cooldown: int = 0) -> float:
    """Share of the learning rate at a step: warm-up, constant, linear cooldown to zero.

    left: steps still to do, this one included; None where the end is not known yet. A length of 0 leaves its part out.
    """
    rise = (step + 1) / warmup if warmup else 1.0
    fall = left / cooldown if cooldown and left is not None else 1.0
    return min(1.0, rise, fall)


@lru_cache(maxsize=8)
def course(name: str, warmup: int, steps: int) -> Callable[[int], float]:
    """Share of the learning rate by step of a schedule of diffusers, over so many steps."""
    from diffusers.optimization import get_scheduler

    unused = torch.optim.SGD([torch.zeros((), requires_grad=True)], lr=1.0)
    scheduler = get_scheduler(name, unused, num_warmup_steps=warmup, num_training_steps=steps)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
    return scheduler.lr_lambdas[0]


class Average:
    """Exponential average of weights. It warms up, so early steps are forgotten: decay = min(ema, (1+n)/(10+n))."""

    def __init__(self, parameters: Mapping[str, Tensor], ema: float, device: torch.device | None = None):
        """device: where it is kept; None: beside the weights."""
        self.weights = {k: p.detach().to(device or p.device, copy=True) for k, p in parameters.items()}
        self.ema = ema

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], updates: int) -> None:
        """Take in the weights after so many updates."""
        weight = 1 - min(self.ema, (1 + updates) / (10 + updates))
        new = [parameters[k].detach().to(mine.device) for k, mine in self.weights.items()]
        torch._foreach_lerp_(list(self.weights.values()), new, weight)


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
