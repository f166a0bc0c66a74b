"""What a recipe's section [loss] asks for: the losses of a batch and their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import losses
from .config import Config
from .data import Batch
from .diffusion import as_v, coefficients
from .vgg import load_vgg

Outputs = tuple[Tensor, Mapping[str, Tensor]]  # a network's prediction, and its features by path
Classifier = Callable[[Path], losses.PerceptualNetwork]


class Compared(NamedTuple):
    """What a loss may look at: x_t and its coefficients, predictions and features of student and teacher."""

    batch: Batch
    x: Tensor
    a: Tensor
    s: Tensor
    student: Outputs
    its: Outputs | None

    @property
    def teacher(self) -> Outputs:
        assert self.its is not None, "a loss that compares with the teacher says so in losses.LOSSES"
        return self.its


class Criterion:
    """The losses a recipe asks for, per sample, and their weights.

    classifier: what makes a perceptual network of the folder in loss.classifier.
    """

    def __init__(self, config: Config, device: torch.device, classifier: Classifier | None = None):
        self.config = config
        self.prediction = config.network.prediction
        self.taps = config.taps
        self.weights = config.loss.weights
        self.values: dict[str, Callable[[Compared], Tensor]] = {  # (B,) each
            "task": self._task,
            "output": self._output,
            **{kind: partial(self._features, kind) for kind in self.taps},
            "perceptual": self._perceptual,
            "rollout": self._rollout,
        }
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
        return any(losses.LOSSES[name] for name in self.weights)

    def __call__(self, batch: Batch, x: Tensor, student: Outputs, teacher: Outputs | None) -> Tensor:
        """(losses, B), in the order of `weights`."""
        a, s = coefficients(batch.t, self.config.network.alphas)
        compared = Compared(batch, x, a, s, student, teacher)
        return torch.stack([self.values[name](compared) for name in self.weights])

    def factors(self, step: int) -> list[float]:
        """The weights at a step: that of the perceptual loss rises first."""
        rise = min(1.0, (step + 1) / max(1, self.config.loss.perceptual_warmup))
        return [w * rise if name == "perceptual" else w for name, w in self.weights.items()]

    def _task(self, c: Compared) -> Tensor:
        return losses.task(c.student[0], c.batch.x0, c.batch.noise, c.a, c.s, self.prediction)

    def _output(self, c: Compared) -> Tensor:
        return losses.output(c.student[0], c.teacher[0])

    def _features(self, kind: str, c: Compared) -> Tensor:
        chosen = self.taps[kind]
        return losses.features(
            {tap.name: c.student[1][tap.student] for tap in chosen},
            {tap.name: c.teacher[1][tap.teacher] for tap in chosen},
            {tap.name: tap.weight for tap in chosen},
            self.config.loss.relative,
        )

    def _perceptual(self, c: Compared) -> Tensor:
        mine, its = (
            self.picture(losses.denoised(c.x, predicted, c.a, c.s, self.prediction))
            for predicted in (c.student[0], c.teacher[0])
        )
        assert self.net is not None
        return losses.perceptual(mine, its, self.net, c.batch.t < self.config.loss.perceptual_until)

    def _rollout(self, c: Compared) -> Tensor:
        assert c.batch.v is not None and c.batch.weight is not None
        return losses.rollout(as_v(c.student[0], c.x, c.a, c.s, self.prediction), c.batch.v, c.batch.weight)
