"""Many styles: the teacher of a step is drawn from a set, and what is trained rides on it as a difference.

The set is network.teacher, finetunes of it, merges of these (a weighted sum of two; or one and what another has
learned, added or taken away: the "add difference" of checkpoint mergers), and each of them with a LoRA, given or
random. With
T the weights of network.teacher, W those of the network drawn and P the trained ones, the student computes with

    W + (P - T)    where it is trained, and W everywhere else,

so that what it learns is the change which a pack of differences (asdm_core/differences.py) makes in any of them. The
gradient of P is that of the sum. Where network.teacher itself is drawn nothing is added: P is what it was.

With styles.carry P stays, and what is learned are the matrices by which the trained units take over what W - T is in
others (asdm_core/carry.py); their gradient comes from that of the sum as well.

The draw follows from the seed and the step. Of all these networks one is in memory; the others stay in their files.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from asdm_core.addresses import keys
from asdm_core.carry import Links, sources, taken_over
from asdm_core.packs import open_unet

from . import schedules
from .config import Config
from .sections import PRECISIONS, Styles
from .lora import MERGED, LoraFile
from .networks import hold_frozen, teachers_weights
from .seeds import seeded

RANDOM = -1  # in place of a LoRA's number
WEAKEST = 0.5  # strength of a given LoRA: from this to 1


@dataclass(frozen=True)
class Style:
    """One network of the set. parts: number (0: network.teacher, then styles.checkpoints) and share of each that is
    merged. lora: number among styles.loras, or RANDOM; None for none. strength: of a LoRA that is given; of a random
    one how large its change of each weight is, in proportion to the weight. turn: of the draw, whose random LoRA is one
    of its own.
    """

    parts: tuple[tuple[int, float], ...] = ((0, 1.0),)
    lora: int | None = None
    strength: float = 0.0
    turn: int = 0


def style_of(settings: Styles, seed: int, turn: int) -> Style:
    """What teaches in one turn, of `styles.every` steps."""
    drawn = random.Random(f"{seed}/style/{turn}")
    if drawn.random() < settings.teacher:
        return Style()
    count = 1 + len(settings.checkpoints)
    merges = drawn.random() < settings.merged and count > 1
    wears = drawn.random() < settings.lora or count == 1  # a style it must be
    if merges:
        one, other = drawn.sample(range(count), 2)
        if drawn.random() < 0.5:  # a weighted sum
            shares = {one: (share := drawn.random()), other: 1 - share}
        else:  # what the other has learned, added or taken away
            one, other, amount = min(one, other), max(one, other), drawn.uniform(-1, 1)
            shares = {0: -amount, other: amount}
            shares[one] = shares.get(one, 0.0) + 1
        parts = tuple((n, share) for n, share in sorted(shares.items()) if share)
    else:
        parts = ((drawn.randrange(0 if wears else 1, count), 1.0),)
    if not wears:
        return Style(parts)
    if not settings.loras or drawn.random() < settings.random:
        return Style(parts, RANDOM, settings.strength * drawn.random(), turn)
    return Style(parts, drawn.randrange(len(settings.loras)), WEAKEST + (1 - WEAKEST) * drawn.random())


@torch.no_grad()
def random_change(weight: Tensor, rank: int, strength: float, generator: torch.Generator) -> Tensor:
    """A change of this rank and of `strength` times the weight's norm, of its shape, float32."""
    rank = min(rank, weight.shape[0], weight[0].numel())
    up = torch.randn(weight.shape[0], rank, generator=generator)
    down = torch.randn(rank, weight[0].numel(), generator=generator)
    change = (up.to(weight.device) @ down.to(weight.device)).view_as(weight)
    return change * (strength * weight.norm() / change.norm().clamp_min(1e-12))


def new_matrices(config: Config, device: torch.device) -> dict[str, nn.Parameter]:
    """What a recipe with styles.carry trains, by name in its product; nothing for others."""
    if config.carry is None:
        return {}
    start = config.carry.start(config.architecture, seeded(config.seed, 20))
    return {name: nn.Parameter(matrix.to(device)) for name, matrix in start.items()}


class StyleSet:
    """The networks a recipe names, of which one at a time is put into a live teacher and its student."""

    def __init__(
        self,
        config: Config,
        teacher: nn.Module,
        student: nn.Module,
        matrices: Mapping[str, nn.Parameter] = MappingProxyType({}),
    ):
        """Both on their devices and in their precisions, with network.teacher in them; matrices: see `new_matrices`.
        Raises ValueError for files that are no finetunes of its family.
        """
        settings = config.styles
        self.settings, self.seed, self.unet = settings, config.seed, config.network.config
        # Name in a diffusers UNet -> addressed LDM name.
        self.keys = {slot.unit.key(slot.tensor, "diffusers"): key for key, slot in keys(self.unet).items()}
        self.places = {name: place for place, name in enumerate(self.keys)}
        self.networks = [teachers_weights(config)]
        self.networks += [_finetune(path, config) for path in settings.checkpoints]
        self.loras = [LoraFile(path, self.unet) for path in settings.loras]
        for file in self.loras:
            if file.text:
                print(f"{file.path.name}: {file.text} modules for the text encoder are left out", flush=True)
        hold_frozen(student, teacher, PRECISIONS[config.run.precision])
        self.into = dict(teacher.named_parameters())
        held = {p.data_ptr() for p in self.into.values()}
        # What the student holds itself; the rest is the teacher's.
        self.frozen: dict[str, list[nn.Parameter]] = {}
        self.trained: dict[str, nn.Parameter] = {}
        for name, p in student.named_parameters():
            name = name.replace(f"{MERGED}.original", "weight")
            if p.requires_grad and name in self.keys:
                self.trained[name] = p
            elif not p.requires_grad and p.data_ptr() not in held:
                self.frozen.setdefault(name, []).append(p)
        self.matrices = matrices
        self.links: Links = config.carry.links(config.architecture) if config.carry else {}
        self.sources = sources(self.links)
        self.style = Style()
        self.shifts: dict[str, Tensor] = {}  # W - T of the trained weights, by name
        self.changes: dict[str, Tensor] = {}  # and of those that something is taken over from, by addressed name

    @property
    def shown(self) -> Style:
        """What is looked at on the way: network.teacher, or the first of the others where something is carried over."""
        if not self.links:
            return Style()
        if self.settings.checkpoints:
            return Style(((1, 1.0),))
        return Style(lora=0, strength=1.0) if self.loras else Style(lora=RANDOM, strength=self.settings.strength)

    def drawn(self, step: int) -> Style:
        """What teaches at a step."""
        return style_of(self.settings, self.seed, step // self.settings.every)

    def weight(self, style: Style, name: str, device: torch.device | str = "cpu") -> Tensor:
        """A weight of a style by its name in a diffusers UNet, float32."""
        key = self.keys[name]
        first, *others = [(share, self.networks[n][key].to(device, torch.float32)) for n, share in style.parts]
        weight = first[1] if not others else first[0] * first[1]
        for share, other in others:
            weight = weight + share * other
        if style.lora == RANDOM and weight.dim() > 1:
            generator = seeded(self.seed, 16, style.turn, self.places[name])
            return weight + random_change(weight, self.settings.rank, style.strength, generator)
        if style.lora is not None and style.lora != RANDOM and key in self.loras[style.lora]:
            return weight + style.strength * self.loras[style.lora][key].to(device)
        return weight

    @torch.no_grad()
    def take(self, style: Style) -> None:
        """Put a style into teacher and student."""
        if style == self.style:
            return
        teacher = Style()
        self.shifts, self.changes = {}, {}
        for name, p in self.into.items():
            weight = self.weight(style, name, p.device)
            p.copy_(weight)
            for mine in self.frozen.get(name, ()):
                mine.copy_(weight)
            if style != teacher and (name in self.trained or self.keys[name] in self.sources):
                change = weight - self.weight(teacher, name, p.device)
                if name in self.trained:
                    self.shifts[name] = change.to(self.trained[name].device)
                if self.keys[name] in self.sources:
                    self.changes[self.keys[name]] = change
        self.style = style

    @contextmanager
    def ridden(self) -> Iterator[None]:
        """The trained weights as they ride on the style: what is computed inside has the gradient of the plain ones,
        which are put back exactly; with matrices, these get it.
        """
        held = {name: self.trained[name].data for name in self.shifts}
        taken = self._taken_over()
        for name, shift in self.shifts.items():
            self.trained[name].data = held[name] + shift
            if name in taken:
                self.trained[name].data += taken[name].detach()
        try:
            yield
            learned = [
                (change, grad) for name, change in taken.items() if (grad := self.trained[name].grad) is not None
            ]
            if learned:
                torch.autograd.backward([change for change, _ in learned], [grad for _, grad in learned])
        finally:
            for name, data in held.items():
                self.trained[name].data = data
            if self.matrices:
                for p in self.trained.values():
                    p.grad = None

    def _taken_over(self) -> dict[str, Tensor]:
        """What the trained weights take over of the style's changes, by name."""
        found = {}
        for name in self.shifts:
            taken = taken_over(self.links.get(self.keys[name], ()), self.changes, self.matrices)
            if taken is not None:
                found[name] = taken.to(self.trained[name].device)
        return found


def _finetune(path: str, config: Config) -> Mapping[str, Tensor]:
    try:
        found = open_unet(path)
        schedule = schedules.read_schedule(path, config.network.schedule)
    except ValueError as e:
        raise ValueError(f"styles.checkpoints: {e}") from None
    architecture, wanted = found.description.architecture, config.network
    name = Path(path).name
    if architecture.config != wanted.config or architecture.cut:
        raise ValueError(
            f"styles.checkpoints: {name} is a {'pruned ' if architecture.cut else ''}UNet of "
            f"{architecture.config.family}; wanted an unpruned one of {wanted.family}"
        )
    if found.description.prediction not in (None, wanted.prediction):
        raise ValueError(
            f"styles.checkpoints: {name} predicts {found.description.prediction}, and network.prediction is "
            f"{wanted.prediction!r}; a pack rides on networks that predict alike"
        )
    if not torch.equal(schedule.alphas, wanted.noise.alphas):
        raise ValueError(
            f"styles.checkpoints: {name} has another noise schedule than network.teacher; leave it out, or set "
            "network.schedule if it does not say its own rightly"
        )
    return found.tensors
