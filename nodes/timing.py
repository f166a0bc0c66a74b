"""Sampling runs that are measured: the sampler's time apart from loading and compiling, and peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP

KEY = "asdm_timing"


class Stopwatch:
    """Times the sampler of a run, from its start to its end on the device. Holds no MODEL, so that it may be its wrapper.

    peak: bytes that torch held at most during the run; None but on a CUDA device: what a process holds in main memory says
    nothing about one of two models that lie there together.

    settling: evaluate the network once instead of sampling, so that weights are loaded and patched when the next run begins.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.settling, self.seconds, self.peak = False, 0.0, None

    def sampler_sample(self, executor, guider, sigmas, extra_args, callback, noise, *args, **kwargs):
        if self.settling:
            options = {name: extra_args[name] for name in ("model_options", "seed")}
            guider(noise * sigmas[0], sigmas[0] * noise.new_ones(len(noise)), **options)
            comfy.model_management.synchronize()
            return noise
        cuda = self._device.type == "cuda"
        comfy.model_management.synchronize()
        if cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        start = time.perf_counter()
        out = executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)
        comfy.model_management.synchronize()
        self.seconds = time.perf_counter() - start
        self.peak = torch.cuda.max_memory_allocated(self._device) if cuda else None
        return out


@dataclass(frozen=True)
class Record:
    """What was measured of one run. Numbers only, so that it may outlive the run.

    shape: of the latents, (B, C, H, W). evaluations: (step, seconds) of each. replayed: for each, whether all of it was
    inherited; empty without feature inheritance. layers: (address, role) -> seconds in all and calls; role: "played", "cut" or "inherited".
    """

    shape: tuple[int, ...]
    evaluations: list[tuple[int, float]]
    replayed: list[bool]
    layers: dict[tuple[str, str], tuple[float, int]]


class Recorder:
    """Times of one run: each evaluation by its step, each layer by its address and role. On CUDA by events, so that nobody waits."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._evaluations: list[tuple[int, object, object]] = []
        self._layers: list[tuple[tuple[str, str], object, object]] = []

    def _now(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def evaluation(self, step: int):
        return self._during(self._evaluations, step)

    def layer(self, address: str, role: str):
        return self._during(self._layers, (address, role))

    @contextmanager
    def _during(self, to: list, what):
        start = self._now()
        yield
        to.append((what, start, self._now()))  # not of what an interrupt or an error ended

    def evaluations(self) -> list[tuple[int, float]]:
        """(step, seconds) of each evaluation, in order."""
        return self._seconds(self._evaluations)

    def layers(self) -> dict[tuple[str, str], tuple[float, int]]:
        """(address, role) -> seconds in all, and how many times it ran."""
        found: dict[tuple[str, str], tuple[float, int]] = {}
        for what, t in self._seconds(self._layers):
            seconds, calls = found.get(what, (0.0, 0))
            found[what] = seconds + t, calls + 1
        return found

    def _seconds(self, marks: list) -> list[tuple]:
        if self._cuda and marks:
            torch.cuda.synchronize()
        return [(what, a.elapsed_time(b) / 1000 if self._cuda else b - a) for what, a, b in marks]


@dataclass
class Side:
    """One MODEL under measurement, and what was measured.

    sample: makes a LATENT with a MODEL. seconds: of the sampler, one number a run. loading: seconds that the first run
    took longer than later ones (loading, patching, compiling). peak: see Stopwatch. repeats: whether every run gave the same latent.
    """

    label: str
    model: object
    sample: Callable
    seconds: list[float] = field(default_factory=list)
    loading: float = 0.0
    peak: int | None = None
    repeats: bool = True
    latent: dict | None = None

    def __post_init__(self):
        self._watch = Stopwatch(self.model.load_device)
        self._timed = self.model.clone()
        self._timed.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, self._watch.sampler_sample)

    def warm_up(self) -> None:
        """The first run, whose time tells what is paid only once."""
        start = time.perf_counter()
        self._settle()
        self.sample(self._timed)
        self.loading = time.perf_counter() - start

    def run(self) -> None:
        """One more run."""
        # The other side may have had its LoRAs on the same UNet, or its weights in the place of ours.
        self._settle()
        latent = self.sample(self._timed)
        self.repeats &= self.latent is None or torch.equal(latent["samples"], self.latent["samples"])
        self.latent = latent
        self.seconds.append(self._watch.seconds)
        self.peak = self._watch.peak and max(self.peak or 0, self._watch.peak)

    def _settle(self) -> None:
        self._watch.settling = True
        try:
            self.sample(self._timed)
        finally:
            self._watch.settling = False

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def paid_once(self) -> float:
        """Seconds that only the first run takes."""
        return max(0.0, self.loading - self.median)

    def facts(self, steps: int) -> dict:
        """What was measured, for JSON."""
        return {"label": self.label, "seconds": [round(s, 4) for s in self.seconds], "median_seconds": round(self.median, 4),
                "seconds_per_step": round(self.median / steps, 5), "load_and_compile_seconds": round(self.paid_once, 3),
                "peak_memory_mb": self.peak and round(self.peak / 2**20, 1), "every_run_alike": self.repeats}


def alternate(sides, rounds: int, warm=None) -> None:
    """A warm-up of each side (or of those in `warm`), then so many rounds in which they take turns, so that noise hits all alike."""
    for side in sides if warm is None else warm:
        side.warm_up()
    for _ in range(rounds):
        for side in sides:
            side.run()
