"""A run in which every step is played again from the features of the step before: what Calibrate measures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ...asdm_core.addresses import UNetConfig
from ...asdm_core.architecture import Architecture
from ...asdm_core.calibration import Candidate
from ...asdm_core.inheritance import Plan, step_macs
from ...asdm_core.steps import Moment
from .feature_cache import RECORD, REPLAY, Entry, FeatureCache
from .inheritance import Inheritance
from .technique import REMEMBERING, AtUNet, Forward, InRun, Say, Start, Technique, UNetInRun

SAMPLE = 65536  # numbers of a feature that stand for all of it when two steps are compared


@dataclass(frozen=True)
class Survey(Technique):
    """Stands on a MODEL where its inheritance would, for one run: every step computes in full and is then played again
    from the features of the step before, once for each plan.
    """

    plans: tuple[Plan, ...]
    longest: int
    found: Found = field(default_factory=lambda: Found(), compare=False)

    key: ClassVar[str] = Inheritance.key
    order: ClassVar[int] = REMEMBERING

    def device_bytes(self, model, shape: Sequence[int], conds: Mapping[str, list]) -> int:
        one = sum(Inheritance(plan).device_bytes(model, shape, conds) for plan in self.plans)
        return 3 * one

    def bind(self, start: Start, say: Say) -> InRun:
        return _InRun(self, start.sigmas.tolist())

    def candidates(self, architecture: Architecture, height: int, width: int) -> list[Candidate]:
        """What was measured, for latents of height x width."""
        found = []
        for track in self.found.tracks:
            full, inherited = step_macs(track.plan, architecture, height, width)
            found.append(Candidate(track.plan, 1 - inherited / full, track.errors(self.longest) / self.found.size))
        return found


@dataclass
class Found:
    """What a survey found. size: of the result, root mean square."""

    tracks: list[_Track] = field(default_factory=list)
    size: float = 1.0


class _Track(FeatureCache):
    """What one plan would remember, recorded at every step.

    How much the result suffers is measured where the features come from the step before (and the one before
    that, for forecasts). For older ones it is taken to grow with their distance from the true features.
    """

    def __init__(self, plan: Plan, config: UNetConfig, cut: frozenset[str], sigmas: Sequence[float]):
        super().__init__(plan, config, cut, sigmas)
        # key of a chunk -> its entries of the last steps before this one, the nearest first
        self._past: dict[tuple, list[Entry]] = defaultdict(list)
        self._samples: dict[tuple, dict[int, Tensor]] = defaultdict(dict)  # key -> step -> some numbers of its features
        self._sensitivity: dict[int, list[tuple[float, float]]] = defaultdict(
            list
        )  # step -> (change of the result, of the features)

    def _planned_mode(self) -> str:
        return RECORD

    def _start_recording(self) -> None:
        for key, entry in zip(self._keys, self.entries, strict=True):
            if entry is not None and entry.step < self.step:
                self._past[key] = [entry, *self._past[key][: 1 if self._forecasts else 0]]
        super()._start_recording()

    def _earlier(self, entry, shown):
        return None  # each entry stands alone here

    def finish(self) -> bool:
        """After the full forward: keep samples, and get ready to play the step before. False if there is none."""
        if not all(entry.tensors for entry in self.entries):  # another cache kept the network from running
            return False
        for key, entry in zip(self._keys, self.entries, strict=True):
            flat = torch.cat([t.flatten()[:: max(1, t.numel() // SAMPLE)] for _, t in sorted(entry.tensors.items())])
            self._samples[key][self.step] = flat.float().cpu()
        past = [self._past[k] for k in self._keys]
        self._distance = 2 if self._forecasts else 1
        if not all(
            len(p) == self._distance
            and all(e.circumstances == self._circumstances and e.step == self.step - 1 - i for i, e in enumerate(p))
            for p in past
        ):
            return False
        self.mode, self.entries = REPLAY, tuple(replace(p[0], before=p[1] if self._forecasts else None) for p in past)
        self._aim()
        return True

    def compare(self, out: Tensor, again: Tensor) -> None:
        """The result of the step in full and from the features of the step before."""
        changes = (self._off(self._samples[k], self.step, 1, self._distance - 1) for k in self._keys)
        moved = [change for change in changes if change is not None]
        self._sensitivity[self.step].append((float((out - again).square().mean()), sum(moved) / len(moved)))

    def errors(self, longest: int) -> np.ndarray:
        """Errors as `calibration.Candidate` wants them, of a latent in its own units."""
        table = np.full((self.steps, longest + 1, longest + 2), np.inf)
        for s in range(1, self.steps):
            # One Euler step moves the latent by this share of the way to the predicted result. Later steps then
            # take part of an error back: for Gaussian data of variance 1, 1 / sqrt(1 + sigma^2) of it would be
            # left in the end. Real networks keep more; the root of that predicts them well.
            weight = (self._sigmas[s] - self._sigmas[s + 1]) / self._sigmas[s] / (1 + self._sigmas[s + 1] ** 2) ** 0.25
            # A forecast needs two steps before it: the first step takes the measure of the next.
            pairs = self._sensitivity.get(s) or self._sensitivity.get(s + 1)
            if not pairs:
                continue
            result, features = np.mean(pairs, 0)
            per_feature = (result / features) ** 0.5 if features > 0 else 0.0
            for k in range(1, min(longest, s) + 1):
                for g in range(min(longest + 1, s - k) + 1):
                    distances = [d for steps in self._samples.values() if (d := self._off(steps, s, k, g)) is not None]
                    if distances:
                        table[s, k, g] = weight * per_feature * np.mean(distances) ** 0.5
        return table

    def _off(self, samples: dict[int, Tensor], s: int, k: int, g: int) -> float | None:
        """Mean square between the features of step s and what would stand for them; None where one is missing.

        They come from step s - k and, for a forecast, also from g steps before that.
        """
        if s not in samples or s - k not in samples:
            return None
        value = samples[s - k]
        if self._forecasts and g:
            if s - k - g not in samples:
                return None
            value = torch.lerp(samples[s - k - g], value, 1 + k / g)
        return float((samples[s] - value).square().mean())


class _InRun(InRun):
    def __init__(self, survey: Survey, sigmas: list[float]):
        self._survey, self._sigmas = survey, sigmas

    def at(self, unet: UNetInRun, model) -> AtUNet:
        found = self._survey.found
        found.tracks = [_Track(plan, unet.config, unet.cut, self._sigmas) for plan in self._survey.plans]
        return _Tracks(found)


class _Tracks(AtUNet):
    """Several tracks at one UNet: all record a forward, then one after the other plays it again."""

    def __init__(self, found: Found):
        self._found, self._tracks = found, found.tracks
        self._active: Any = None  # the track that plays
        self._recording = False

    @property
    def name(self) -> str:  # type: ignore[override]  # never written here
        if self._active:
            return self._active.name
        return "_".join(track.name for track in self._tracks) if self._recording else ""

    @property
    def held(self):
        if self._active:
            return self._active.held
        return tuple(track.held for track in self._tracks) if self._recording else None

    @held.setter
    def held(self, held) -> None:
        for track, entries in [(self._active, held)] if self._active else zip(self._tracks, held, strict=True):
            track.held = entries

    def begin_evaluation(self, moment: Moment) -> None:
        for track in self._tracks:
            track.begin_evaluation(moment)

    def begin_forward(self, forward: Forward) -> None:
        self._active = None
        for track in self._tracks:
            track.begin_forward(forward)
        # A forward that cannot be told from others is recorded by none: there is nothing to learn from it.
        self._recording = all(track.mode == RECORD for track in self._tracks)

    def defies_graphs(self, patches: Mapping[str, list]) -> bool:
        return any(track.defies_graphs(patches) for track in self._tracks)

    def trials(self) -> Iterator[Callable[[Tensor, Tensor], None]]:
        for track in self._tracks if self._recording else ():
            if track.finish():
                self._active = track
                yield self._compare
        self._active = None

    def _compare(self, out: Tensor, again: Tensor) -> None:
        self._found.size = float(out.float().square().mean()) ** 0.5
        self._active.compare(out, again)

    def player(self, address: str, current: nn.Module) -> nn.Module:
        return self._active.player(address, current) if self._active else current

    def end_layer(self, address: str, current: nn.Module, x: Tensor, out: Tensor) -> None:
        if self._active is None:
            for track in self._tracks:
                track.end_layer(address, current, x, out)

    def close(self) -> None:
        for track in self._tracks:
            track.close()
