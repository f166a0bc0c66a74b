"""Sampling runs that are measured: the sampler's time apart from loading and compiling, and peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP

from .notes import silence
from .progress import Progress

KEY = "asdm_timing"


class _TimedSampler:
    """Times the sampler of a run, from its start to its end on the device. Holds no MODEL, so that it may be its
    wrapper.

    peak: bytes that torch held at most during the run; None but on a CUDA device: what a process holds in main memory
    says nothing about one of two models that lie there together.

    settling: evaluate the network once instead of sampling, so that weights are loaded and patched when the next run
    begins. progress: where the steps of a run are told instead of on a bar of its own.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.settling, self.seconds, self.peak = False, 0.0, None
        self.progress: Progress | None = None

    def sampler_sample(self, executor, guider, sigmas, extra_args, callback, noise, *args, **kwargs):
        if self.settling:
            options = {name: extra_args[name] for name in ("model_options", "seed")}
            guider(noise * sigmas[0], sigmas[0] * noise.new_ones(len(noise)), **options)
            comfy.model_management.synchronize()
            return noise
        if self.progress is not None:
            callback = self.progress.callback
        cuda = self._device.type == "cuda"
        comfy.model_management.synchronize()
        if cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        start = time.perf_counter()
        out = executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)
        comfy.model_management.synchronize()
        self.seconds = time.perf_counter() - start
        if self.progress is not None:
            self.progress.run_done()
        self.peak = torch.cuda.max_memory_allocated(self._device) if cuda else None
        return out


class Recorder:
    """Times of one run: each evaluation by its step, each layer by its address and role.

    On CUDA a moment is an event, so that nobody waits for the device meanwhile; whoever asks for seconds waits.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._evaluations: list[tuple[int, Any, Any]] = []
        self._layers: list[tuple[tuple[str, str], Any, Any]] = []

    def now(self) -> Any:
        """This moment in what the device does."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start, end) -> float:
        if not self._cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000

    @contextmanager
    def evaluation(self, step: int):
        start = self.now()
        yield
        self._evaluations.append((step, start, self.now()))  # not one that an interrupt or an error ended

    def layer(self, address: str, role: str, start: Any) -> None:
        """A layer has ended that began at a moment of `now`, in the same thread."""
        self._layers.append(((address, role), start, self.now()))

    def evaluations(self) -> list[tuple[int, float]]:
        """(step, seconds) of each evaluation, in order."""
        return [(step, self._seconds(start, end)) for step, start, end in self._evaluations]

    def until_next(self) -> list[tuple[int, float]]:
        """(step, seconds) of each evaluation until the next one begins, with what the sampler does between them; of the
        last until it ends.
        """
        ends = [start for _, start, _ in self._evaluations[1:]] + [end for _, _, end in self._evaluations[-1:]]
        return [
            (step, self._seconds(start, end)) for (step, start, _), end in zip(self._evaluations, ends, strict=True)
        ]

    def layers(self) -> dict[tuple[str, str], tuple[float, int]]:
        """(address, role) -> seconds in all, and how many times it ran."""
        found: dict[tuple[str, str], tuple[float, int]] = {}
        for what, start, end in self._layers:
            seconds, calls = found.get(what, (0.0, 0))
            found[what] = seconds + self._seconds(start, end), calls + 1
        return found


@dataclass
class TimedModel:
    """One MODEL under measurement, and what was measured.

    sample: makes a LATENT with a MODEL. seconds: of the sampler, one number a run. loading: seconds that the first run
    took longer than later ones (loading, patching, compiling). peak: see _TimedSampler. repeats: whether every run gave
    the same latent.
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
        self._watch = _TimedSampler(self.model.load_device)
        self._timed = self.model.clone()
        self._timed.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, self._watch.sampler_sample)

    def tell(self, progress: Progress) -> None:
        """From now on the steps of its runs are told there."""
        self._watch.progress = progress

    def warm_up(self) -> None:
        """The first run, whose time tells what is paid only once."""
        start = time.perf_counter()
        self._settle()
        self.sample(self._timed)
        self.loading = time.perf_counter() - start

    def run(self) -> None:
        """One more run."""
        # Another may have had its LoRAs on the same UNet, or its weights in the place of ours.
        self._settle()
        latent = self.sample(self._timed)
        self.repeats &= self.latent is None or torch.equal(latent["samples"], self.latent["samples"])
        self.latent = latent
        self.seconds.append(self._watch.seconds)
        self.peak = self._watch.peak and max(self.peak or 0, self._watch.peak)

    def _settle(self) -> None:
        self._watch.settling = True
        try:
            with silence():
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
        return {
            "label": self.label,
            "seconds": [round(s, 4) for s in self.seconds],
            "median_seconds": round(self.median, 4),
            "seconds_per_step": round(self.median / steps, 5),
            "load_and_compile_seconds": round(self.paid_once, 3),
            "peak_memory_mb": self.peak and round(self.peak / 2**20, 1),
            "every_run_alike": self.repeats,
        }


def alternate(models: Sequence[TimedModel], rounds: int, steps: int) -> None:
    """A warm-up of each model, then so many rounds in which they take turns, so that noise hits all alike.

    steps: of each run, for one progress bar over all of them.
    """
    progress = Progress(models[0].model, len(models) * (rounds + 1), steps)
    for model in models:
        model.tell(progress)
    for model in models:
        model.warm_up()
    for _ in range(rounds):
        for model in models:
            model.run()
