"""The losses on pictures that are not trained on, always the same samples, noises and time steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor

from .config import Config
from .data import Batch, Batches, Source


class HeldOut:
    """open: the source of a recipe. losses: the values (losses, B) of a batch, in the order of `names`.

    Every process makes its share. Numbers of samples are counted up to whole parts of all processes.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        open_: Callable[[Config], Source],
        losses: Callable[[Batch], Tensor],
        names: Sequence[str],
    ):
        self.accelerator = accelerator
        self.losses = losses
        self.names = names
        data = replace(config.data, path=config.data.held_out, caption_dropout=0.0, flip=False)
        its = replace(config, data=data, run=replace(config.run, workers=0))
        self.batches = Batches(open_(its), its)
        self.size = config.run.micro_batch
        each = self.size * accelerator.num_processes
        self.parts = -(-config.data.held_out_count // each)

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """The mean of each loss. Every process must call it."""
        found = []
        for part in range(self.parts):
            first = (part * self.accelerator.num_processes + self.accelerator.process_index) * self.size
            batch = self.batches(range(first, first + self.size)).to(self.accelerator.device)
            found.append(self.losses(batch))
        values = self.accelerator.gather(torch.cat(found, 1).T.contiguous()).double().mean(0)
        return {name: float(f"{value:.6g}") for name, value in zip(self.names, values.tolist(), strict=True)}
