"""What every training here shares about its steps: the learning rate's course and the average of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
from torch import Tensor


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

    def __init__(self, parameters: Mapping[str, Tensor], ema: float):
        self.weights = {k: p.detach().clone() for k, p in parameters.items()}
        self.ema = ema

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], updates: int) -> None:
        """Take in the weights after so many updates."""
        weight = 1 - min(self.ema, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(list(self.weights.values()), [parameters[k].detach() for k in self.weights], weight)
