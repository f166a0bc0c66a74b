"""A run in which every step is played again from the features of the step before: what Calibrate measures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ...asdm_core.architecture import Architecture
from ...asdm_core.calibration import Candidate
from ...asdm_core.inheritance import Plan, cache_elements, step_macs
from .feature_cache import RECORD, REPLAY, FeatureCache, Log

SAMPLE = 65536  # numbers of a feature that stand for all of it when two steps are compared


class Survey:
    """Stands in a MODEL's Setup where its inheritance would, for one run: every step computes in full and is
    then played again from the features of the step before, once for each plan."""

    on_cpu = False

    def __init__(self, plans: Sequence[Plan], longest: int):
        self.plans, self.longest = plans, longest
        self.log = Log()
        self.tracks: list[_Track] = []
        self.size = 1.0  # of the result, root mean square

    def bytes(self, architecture: Architecture, shape, conds: int, itemsize: int) -> int:
        one = sum(cache_elements(plan, architecture, *shape[-2:]) for plan in self.plans)
        return 3 * one * shape[0] * conds * itemsize

    def memory(self, architecture: Architecture, sigmas: Sequence[float], size: int) -> _SurveyCache:
        self.tracks = [_Track(plan, architecture.config, architecture.cut, sigmas) for plan in self.plans]
        return _SurveyCache(self, sigmas)

    def candidates(self, architecture: Architecture, height: int, width: int) -> list[Candidate]:
        """What was measured, for latents of height x width."""
        found = []
        for track in self.tracks:
            full, inherited = step_macs(track.plan, architecture, height, width)
            found.append(Candidate(track.plan, 1 - inherited / full, track.errors(self.longest) / self.size))
        return found


class _Track(FeatureCache):
    """What one plan would remember, recorded at every step.

    How much the result suffers is measured where the features come from the step before (and the one before
    that, for forecasts). For older ones it is taken to grow with their distance from the true features.
    """

    def __init__(self, plan, config, cut, sigmas):
        super().__init__(plan, config, cut, sigmas)
        self._past = defaultdict(
            list
        )  # key of a chunk -> its entries of the last steps before this one, the nearest first
        self._samples: dict[tuple, dict[int, Tensor]] = defaultdict(dict)  # key -> step -> some numbers of its features
        self._sensitivity: dict[int, list[tuple[float, float]]] = defaultdict(
            list
        )  # step -> (change of the result, of the features)

    def _planned_mode(self) -> str:
        return RECORD

    def _start_recording(self) -> None:
        for key, entry in zip(self._keys, self.held, strict=True):
            if entry is not None and entry.step < self.step:
                self._past[key] = [entry, *self._past[key][: 1 if self._forecasts else 0]]
        super()._start_recording()

    def _earlier(self, entry):
        return None  # each entry stands alone here

    def finish(self) -> bool:
        """After the full forward: keep samples, and get ready to play the step before. False if there is none."""
        if not all(entry.tensors for entry in self.held):  # another cache kept the network from running
            return False
        for key, entry in zip(self._keys, self.held, strict=True):
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
        self.mode, self.held = REPLAY, tuple(replace(p[0], before=p[1] if self._forecasts else None) for p in past)
        self._aim()
        return True

    def compare(self, out: Tensor, again: Tensor) -> None:
        """The result of the step in full and from the features of the step before."""
        moved = [self._off(self._samples[k], self.step, 1, self._distance - 1) for k in self._keys]
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


class _SurveyCache(FeatureCache):
    """Several tracks behind the interface of one memory."""

    def __init__(self, survey: Survey, sigmas: Sequence[float]):
        self._survey, self._tracks, self._sigmas = survey, survey.tracks, list(sigmas)
        self._active: _Track | None = None
        self.steps, self.step, self.peak, self.mode = self._tracks[0].steps, 0, 0, RECORD
        self.counts, self.evaluations = self._tracks[0].counts, self._tracks[0].evaluations

    @property
    def name(self):
        return self._active.name if self._active else "_".join(track.name for track in self._tracks)

    @property
    def held(self):
        return self._active.held if self._active else tuple(track.held for track in self._tracks)

    @held.setter
    def held(self, held):
        for track, entries in [(self._active, held)] if self._active else zip(self._tracks, held, strict=True):
            track.held = entries

    def begin_evaluation(self, sigma):
        for track in self._tracks:
            track.begin_evaluation(sigma)
        self.step = self._tracks[0].step
        self.peak = max(self.peak, self.size())

    def begin_forward(self, x, options, circumstances, playing):
        self._active = None
        self.mode = {track.begin_forward(x, options, circumstances, playing) for track in self._tracks}.pop()
        return self.mode

    def trials(self):
        if self.mode != RECORD:  # a forward that cannot be told from others: nothing to learn from it
            return
        for track in self._tracks:
            if track.finish():
                self._active = track
                yield self._compare
        self._active = None

    def _compare(self, out, again):
        self._survey.size = float(out.float().square().mean()) ** 0.5
        self._active.compare(out, again)

    def player(self, address, current):
        return self._active.player(address, current) if self._active else current

    def after(self, address, current, x, out):
        if self._active is None:
            for track in self._tracks:
                track.after(address, current, x, out)

    def size(self):
        return sum(track.size() for track in self._tracks)

    def close(self):
        for track in self._tracks:
            track.close()
