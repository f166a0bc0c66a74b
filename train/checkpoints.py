"""The states of a run on the disk: what a training goes on from (train/loop.py)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from asdm_core.tensor_file import BadFile, TensorFile, write_file

from . import sharding
from .config import Config
from .optimisation import Average, moments, restore_moments
from .provenance import NETWORK, contents, difference

# Settings that may change between the sessions of one run.
FREE = (
    "steps",
    "micro_batch",
    "workers",
    "shard",
    "offload",
    "compile",
    "checkpoint_gradients",
    "save_every",
    "keep",
    "log_every",
    "picture_every",
    "tensorboard",
    "trackers",
    "folder",
    "stored",
)


@dataclass
class State:
    """Where a run stands. skipped: steps whose loss or gradient was not finite; in_a_row: of these, the latest.

    left_out: pictures that could not be read. source: where the data stand (data.Source.state). bank_seconds: those of
    `seconds` in which the teacher drew trajectories (train/rollout.py). waited: those in which there were no data.
    scaler: of the gradients in fp16 (torch.amp.GradScaler.state_dict).
    """

    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    in_a_row: list[int] = field(default_factory=list)
    left_out: int = 0
    source: dict = field(default_factory=dict)
    bank_seconds: float = 0.0
    waited: float = 0.0
    scaler: dict = field(default_factory=dict)


class Checkpoints:
    """The newest few states of a run, each one safetensors file, written whole or not at all."""

    def __init__(self, config: Config):
        self.config = config
        self.folder = config.folder
        # What must not change: everything but how the work is cut up, saved and shown.
        fixed = config.to_dict()
        free = set(FREE) - ({"steps"} if len(config.rollout.steps) > 1 else set())
        fixed["run"] = {k: v for k, v in fixed["run"].items() if k not in free}
        self.fixed = json.loads(json.dumps(fixed))
        # A stage before that was trained anew under its old name is another start.
        began = {
            "network.teacher": (config.network.teacher, NETWORK),
            "student.start": (config.student.start, ()),
            "lora.start": (config.lora.start, ()),
        }
        self.files = {name: contents(path, folders) for name, (path, folders) in began.items() if path}

    def paths(self) -> list[Path]:
        return sorted(
            p for p in self.folder.glob("checkpoint-*.safetensors") if re.fullmatch(r"checkpoint-\d{8}", p.stem)
        )

    def save(self, state: State, tensors: Mapping[str, Tensor]) -> None:
        path = self.folder / f"checkpoint-{state.step:08d}.safetensors"
        said = {"state": asdict(state), "config": self.fixed, "files": self.files}
        try:
            write_file(path, tensors, {name: json.dumps(value) for name, value in said.items()})
        except OSError as e:
            last = self.paths()
            before = f"{last[-1].name} is whole" if last else "There is none before it"
            raise OSError(
                f"{path} cannot be written ({e.strerror or e}). {before}; make room, or see to the disk, and give "
                "the same "
                "command again"
            ) from None
        upto = [p for p in self.paths() if p <= path]  # a later one is broken, or `load` would have taken it
        for old in {*self.paths()} - {*upto[-self.config.run.keep :]}:
            old.unlink()

    def load(self) -> tuple[State, dict[str, Tensor]] | None:
        """The newest state that can be read; None where there is none.

        Raises ValueError where the folder belongs to other settings, or none of its states can be read.
        """
        for path in reversed(self.paths()):
            with open(path, "rb"):  # a disk that cannot read now may well do so later: that ends the run
                pass
            try:
                file = TensorFile(path)
            except BadFile as e:  # as some disks leave what was written last when the power goes
                print(f"left out: {e}", flush=True)
                continue
            if not file.metadata.keys() >= {"state", "config"}:
                raise ValueError(f"{path} is no checkpoint of a training; move it out of run.folder")
            instead = "Choose another name or run.folder, or delete its checkpoints to start anew"
            if changed := difference(_completed(json.loads(file.metadata["config"])), self.fixed):
                raise ValueError(f"{self.folder} holds a run with other settings ({changed}). {instead}")
            its = json.loads(file.metadata.get("files", "{}"))  # those of older runs say nothing of it
            if anew := [name for name in self.files if its.get(name, self.files[name]) != self.files[name]]:
                raise ValueError(f"{self.folder} holds a run that began with another file as {anew[0]}. {instead}")
            return State(**json.loads(file.metadata["state"])), dict(file)
        if self.paths():
            raise ValueError(f"{self.folder}: none of its checkpoints can be read; delete them to start anew")
        return None


def _completed(saved: dict) -> dict:
    """The settings of a run, with those added since it began at their defaults."""
    defaults = {
        f.name: asdict(f.default_factory())
        for f in fields(Config)
        if f.default_factory is not MISSING and f.name != "run"
    }
    return saved | {name: values | saved.get(name, {}) for name, values in defaults.items()}


def tensors_of(
    parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer, average: Average
) -> dict[str, Tensor]:
    tensors = {f"weights.{k}": p for k, p in parameters.items()} | {
        f"average.{k}": v for k, v in average.weights.items()
    }
    for key, p in parameters.items():
        tensors |= {f"{name}.{key}": value for name, value in moments(optimiser, p).items()}
    return tensors


@torch.no_grad()
def restore(
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    average: Average,
) -> None:
    saved: dict[str, dict[str, Tensor]] = {key: {} for key in parameters}
    for full, value in tensors.items():
        name, _, key = full.partition(".")  # no name of a moment has a dot
        if key in saved and name not in ("weights", "average"):
            saved[key][name] = value
    restore_moments(
        optimiser,
        [
            (
                p,
                {
                    name: sharding.like(value, p) if value.shape == p.shape else value
                    for name, value in saved[key].items()
                },
            )
            for key, p in parameters.items()
        ],
    )
    for key, p in parameters.items():
        p.copy_(sharding.like(tensors[f"weights.{key}"], p))
        average.weights[key].copy_(sharding.like(tensors[f"average.{key}"], p))
