"""What a run tells: its losses as lines of a file, to trackers and TensorBoard, and in its product's metadata."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers, get_available_trackers
from torch import Tensor

from .checkpoints import State
from .config import Config
from .diffusion import STEPS

T_BINS = 4


def _read(line: str) -> dict:
    """A line of the log; nothing of one that is not whole."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) and "step" in found else {}


class Log:
    """Losses as JSON lines in log.jsonl: means since the last line, also by bins of t. A resumed run goes on with its
    own lines.
    """

    def __init__(self, config: Config, state: State, names: list[str]):
        self.config = config
        self.names = names
        self.path = config.folder / "log.jsonl"
        self.recent: list[Tensor] = []
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        # After a kill the log may be ahead of the checkpoint, and its last line incomplete.
        whole = [(line, found) for line in lines if (found := _read(line)) and found["step"] <= state.step]
        kept = [line for line, _ in whole]
        self.last: dict = next((found for _, found in reversed(whole) if "held_out" not in found), {})
        self.board = tensorboard(config.folder, state.step) if config.run.tensorboard else None
        temporary = self.path.with_suffix(".part")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def add(self, state: State, value: Tensor | None, lr: float, norm: float) -> bool:
        """value: (B, losses + 1), the last column t; None of a step that was skipped. Whether a line was written."""
        if value is None:
            print(f"step {state.step}: not finite, skipped", flush=True)
        else:
            self.recent.append(value)
        if not self.recent or state.step % self.config.run.log_every and state.step != self.config.run.steps:
            return False
        values = torch.cat(self.recent)
        bins = (values[:, -1] * T_BINS / STEPS).long()
        by_t = {
            f"{b * STEPS // T_BINS}-{(b + 1) * STEPS // T_BINS - 1}": self._means(values[bins == b])
            for b in range(T_BINS)
            if (bins == b).any()
        }
        self.last = {
            "step": state.step,
            "seconds": round(state.seconds, 4),
            "waited": round(state.waited, 4),
            "waited_for_data": self._share(state),
            **({"bank_seconds": round(state.bank_seconds, 4)} if self.config.rollout.steps else {}),
            "skipped": state.skipped,
            "left_out": state.left_out,
            "lr": lr,
            "gradient": norm,
            **self._means(values),
            "by_t": by_t,
        }
        self._append(self.last)
        self.recent = []
        if self.board:
            for name in ("lr", "gradient", *self.names):
                self.board.add_scalar(name if name not in self.names else f"loss/{name}", self.last[name], state.step)
            self.board.flush()
        return True

    def _append(self, entry: Mapping) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps(entry) + "\n")
        except OSError as e:
            raise OSError(
                f"{self.path} cannot be written ({e.strerror or e}); make room, or see to the disk, and give the same "
                "command again"
            ) from None

    def scalars(self) -> dict[str, float]:
        """The last line as single numbers."""
        return {name: self.last[name] for name in ("lr", "gradient", "waited_for_data", *self.names)}

    def held_out(self, step: int, losses: Mapping[str, float]) -> None:
        """Losses on pictures that are not trained on: a line of its own."""
        self._append({"step": step, "held_out": losses})
        if self.board:
            for name, value in losses.items():
                self.board.add_scalar(f"held_out/{name}", value, step)

    def picture(self, step: int, rows: Tensor) -> None:
        """rows: teacher's and student's pictures, (2, B, 3, H, W)."""
        if self.board:
            self.board.add_image(
                "teacher above student", torch.cat([torch.cat(list(row), -1) for row in rows], -2), step
            )

    def _means(self, values: Tensor) -> dict[str, float]:
        return {name: float(f"{m:.6g}") for name, m in zip(self.names, values[:, :-1].mean(0).tolist(), strict=True)}

    def _share(self, state: State) -> float:
        """The share of the time since the last line in which the run waited for data."""
        seconds = state.seconds - self.last.get("seconds", 0.0)
        return round((state.waited - self.last.get("waited", 0.0)) / max(seconds, 1e-9), 4)

    def status(self, state: State) -> str:
        rate = state.step * self.config.run.batch / max(state.seconds, 1e-9)
        left = (self.config.run.steps - state.step) * state.seconds / state.step
        parts = " ".join(f"{name} {self.last[name]:.4g}" for name in self.names if name in self.last)
        data = f", {self.last['waited_for_data']:.0%} of it for data" if self.last.get("waited_for_data") else ""
        return f"{parts} {rate:.1f}/s{data}, {left / 60:.1f} min left"


def track(config: Config, accelerator: Accelerator) -> None:
    """Open the recipe's trackers, with all its settings. Raises ValueError for those that are not there."""
    if not config.run.trackers:
        return
    known = {str(name) for name in LOGGER_TYPE_TO_CLASS}
    there = {str(tracker) for tracker in get_available_trackers()}
    for name in config.run.trackers:
        if name not in known:
            raise ValueError(f"run.trackers: {name!r} is none of {', '.join(sorted(known))}")
        if name not in there:
            raise ValueError(f"run.trackers: {name} is not installed: pip install {name}")
    accelerator.project_configuration.set_directories(str(config.folder))
    accelerator.log_with = filter_trackers(list(config.run.trackers), config.folder)
    accelerator.init_trackers(config.name, flat(config.to_dict()))


def flat(settings: Mapping, prefix: str = "") -> dict[str, int | float | str | bool]:
    """Settings as single values under dotted keys, as --set takes them."""
    found: dict[str, int | float | str | bool] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value if isinstance(value, int | float | str | bool) else json.dumps(value)
    return found


def tensorboard(folder: Path, step: int):
    """A writer into the run's folder; what an earlier session logged after `step` is dropped."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("run.tensorboard needs TensorBoard: pip install tensorboard") from None
    return SummaryWriter(folder / "tensorboard", purge_step=step + 1)


def styles_in_words(config: Config) -> dict:
    """The set that taught, with the names of its files."""
    files = {name: [Path(path).name for path in getattr(config.styles, name)] for name in ("checkpoints", "loras")}
    return asdict(config.styles) | files


def provenance(config: Config, state: State, log: Log) -> dict:
    """What a product's metadata say of its training."""
    return {
        "teacher": Path(config.network.teacher).name,
        "start": Path(config.student.start).name or "teacher",
        **({"styles": styles_in_words(config)} if config.styles.many else {}),
        "losses": config.loss.weights,
        "steps": state.step,
        "samples": state.step * config.run.batch,
        "skipped": state.skipped,
        "left_out": state.left_out,
        "minutes": round(state.seconds / 60, 1),
        **({"minutes_of_the_bank": round(state.bank_seconds / 60, 1)} if config.rollout.steps else {}),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "final": {k: log.last[k] for k in log.names if k in log.last},
    }
