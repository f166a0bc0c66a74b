"""Muon for the units of a UNet."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

AVAILABLE = hasattr(torch.optim, "Muon")  # from torch 2.9 on


class Muon(torch.optim.Optimizer):
    """torch's Muon (arXiv 2502.16982) for linear layers and convolutions, whose weights are matrices of outputs by all
    that an output sums over; AdamW, with these betas, for the rest. lr means what it does there: each number moves by
    about .2 lr in a step, as AdamW's often do.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, weight_decay: float, betas: tuple[float, float]):
        given = list(parameters)
        # One storage, so the step of the matrix is the step of the weight.
        self.pairs = [(p, torch.nn.Parameter(p.detach().flatten(1))) for p in given if p.dim() > 1]
        rest = [p for p in given if p.dim() < 2]
        self.inner: list[torch.optim.Optimizer] = []
        if self.pairs:
            matrices = [matrix for _, matrix in self.pairs]
            self.inner.append(torch.optim.Muon(matrices, lr, weight_decay, adjust_lr_fn="match_rms_adamw"))
        if rest:
            self.inner.append(torch.optim.AdamW(rest, lr, betas=betas, weight_decay=weight_decay))
        super().__init__(given, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for optimiser in self.inner:
            for group in optimiser.param_groups:
                group["lr"] = self.param_groups[0]["lr"]
        for p, matrix in self.pairs:
            assert p.data_ptr() == matrix.data_ptr(), "weights were replaced after the optimiser was made"
            matrix.grad = p.grad.flatten(1) if p.grad is not None else None
        for optimiser in self.inner:
            optimiser.step()
        for p, matrix in self.pairs:
            self.state[p] = self.inner[0].state[matrix]
        for optimiser in self.inner[bool(self.pairs) :]:
            self.state.update(optimiser.state)
