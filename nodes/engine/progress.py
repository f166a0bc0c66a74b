"""One progress bar over all sampling runs of a node, with the time left."""

from __future__ import annotations

import time

import comfy.utils
import latent_preview
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ...asdm_core.pictures import duration

PAUSE = 0.5  # seconds between two words about the time left


def time_left(seconds: float) -> str:
    """A time for people who wait: "about 40 s left", "about 3 min left"."""
    return f"about {seconds:.0f} s left" if seconds < 100 else f"about {seconds / 60:.0f} min left"


def say_progress(words: str) -> None:
    """Show words on the node that is executed, beside its bar."""
    context = get_executing_context()
    host = getattr(PromptServer, "instance", None)
    if context is not None and host is not None:
        host.send_progress_text(words, context.node_id, host.client_id)


class Progress:
    """Counts the steps of so many runs on the bar of the node that is executed; never runs backwards."""

    def __init__(self, model, runs: int, steps: int):
        self._steps = steps
        self._total = runs * steps
        self._run = 0
        self._bar = comfy.utils.ProgressBar(self._total)
        self._previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
        self._begun: tuple[float, float] | None = None  # when the first step ended, and where on the bar
        self._said = 0.0
        self._made = time.monotonic()

    def callback(self, step: int, x0, x, total_steps: int) -> None:
        """For a sampler: a step of the present run is done."""
        done = self._run * self._steps + self._steps * (step + 1) / max(total_steps, step + 1)
        preview = self._previewer.decode_latent_to_preview_image("JPEG", x0) if self._previewer else None
        self._bar.update_absolute(int(done), self._total, preview)
        self._say(done)

    def run_done(self) -> None:
        """The present run is over, whether or not its sampler said all of its steps."""
        self._run += 1
        self._bar.update_absolute(self._run * self._steps, self._total)
        if self._run * self._steps == self._total:
            say_progress(f"took {duration(time.monotonic() - self._made)}")

    def _say(self, done: float) -> None:
        now = time.monotonic()
        if self._begun is None:
            self._begun = now, done
        start, first = self._begun
        if done > first and now - self._said > PAUSE:
            self._said = now
            say_progress(time_left((now - start) / (done - first) * (self._total - done)))
