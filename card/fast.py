"""Time and memory of every technique, in turn, on networks of random weights.

A run has seven steps; the time of a step is the mean of the last six, which hold as many inherited steps as a long run
of the dial's plans does, and for a switch three of each model. Where steps are left out a run has twenty, of which the
first, which cannot be, counts as the slowest of the others. Ratios are medians over rounds of the ratio within one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection

import comfy.model_management as management
import torch

from ..asdm_core import measure
from ..asdm_core.architecture import Architecture
from .techniques import NONE, Network, Technique, context, of

STEPS = 7
PIXELS = 8


class Clock:
    """Marks in the card's queue of work, read when all is done: CUDA events where there are any."""

    def __init__(self, device: torch.device):
        self.events = device.type == "cuda"
        self.marks: list = []

    def mark(self) -> None:
        if self.events:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            if management.get_torch_device().type != "cpu":
                management.synchronize()
            self.marks.append(time.perf_counter())

    def steps(self) -> list[float]:
        """Seconds between the marks."""
        if self.events:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1000 for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]


def run(n: Network, model, pixels: int, batch: int, steps: int = 0) -> tuple[float, bool]:
    """Seconds of a step, and whether all latents are numbers."""
    clock = Clock(management.get_torch_device())
    latents = n.sample(
        model,
        (pixels // PIXELS, pixels // PIXELS),
        batch=batch,
        steps=steps or STEPS,
        cfg=7.0,
        callback=lambda *_: clock.mark(),
        **context(n.config, n.full),
    )
    seconds = clock.steps()
    if steps:
        seconds.append(max(seconds))
    return statistics.mean(seconds), bool(latents.isfinite().all())


def peak_mb() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None


def limit(dtype: torch.dtype, size: int) -> float:
    """Multiplications with an addition each, a second, of the quickest of ten products of two square matrices."""
    device = management.get_torch_device()
    a = torch.randn(size, size, device=device).to(dtype)
    a @ a
    best = float("inf")
    for _ in range(10):
        clock = Clock(device)
        clock.mark()
        a @ a
        clock.mark()
        best = min(best, *clock.steps())
    return size**3 / best


def work(n: Network, technique: Technique, pixels: int, batch: int) -> float | None:
    """Multiplications of a step, with guidance; None where a technique decides as it goes."""
    if technique is not NONE and not technique.preset:
        return None
    chosen = Architecture.preset(technique.preset, n.config) if technique.preset else Architecture.full(n.config)
    side = pixels // PIXELS
    return 2 * batch * measure.total(measure.costs(chosen, side, side, 77 if n.full else 7)).total


def times(
    n: Network,
    pixels: int,
    batch: int,
    most: float,
    rounds: int,
    until: Callable[[], float],
    only: Collection[str] = (),
) -> list[dict]:
    """A row for each technique. most: multiplications a second of the card. until: seconds that are left. only: names
    of the techniques beside none; empty for all.
    """
    techniques = [t for t in of(n) if not only or t is NONE or t.name in only]
    base = {"kind": "time", "network": n.name, "pixels": pixels, "batch": batch}
    models: dict[str, object] = {}
    rows: dict[str, dict] = {}
    peaks: dict[str, float | None] = {}
    found: dict[str, list[float]] = {}
    for t in techniques:
        try:
            models[t.name] = t.make(n)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            _, finite = run(n, models[t.name], pixels, batch, t.steps)  # warms up
            peaks[t.name], found[t.name] = peak_mb(), []
            rows[t.name] = base | {"technique": t.name, "finite": finite, "headline": t.headline}
        except (torch.OutOfMemoryError, management.OOM_EXCEPTION):
            management.unload_all_models()
            management.soft_empty_cache()
            models.pop(t.name, None)
            rows[t.name] = base | {"technique": t.name, "why": "out of memory"}
            if t is NONE:
                return [rows[t.name]]
    began = time.monotonic()
    for done in range(rounds):
        # Another round only where it fits.
        if done and until() < 1.5 * (time.monotonic() - began) / done:
            break
        for t in techniques:
            if t.name in models:
                found[t.name].append(run(n, models[t.name], pixels, batch, t.steps)[0])
    for t in techniques:
        if t.name in models:
            seconds = statistics.median(found[t.name])
            macs = work(n, t, pixels, batch)
            rows[t.name] |= {
                "seconds": seconds,
                "speedup": measure.ratio(found, NONE.name, t.name),
                "rounds": len(found[t.name]),
                "peak_mb": peaks[t.name],
                "share": macs and macs / seconds / most,
            }
    return list(rows.values())
