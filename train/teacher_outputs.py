"""The teacher's outputs for the first samples of a stream, computed once and shared by all runs on it.

What a run sees is fixed by its seed, its data and its teacher, so runs that agree in these need no teacher of
their own; and with the same samples in the same order, what differs between two runs is the runs themselves.
A folder of safetensors files, each of SHARD samples, with

    predicted   (N, 4, h, w)   the teacher's output, float32
    <path>      (N, ...)       its feature at a module, float16
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from asdm_core.tensor_file import read_header, write_file

from .config import Config
from .data import Batches
from .diffusion import coefficients
from .progress import Progress
from .provenance import NETWORK, contents, difference
from .attention import BmmAttention
from .sources import open_source
from .networks import load_teacher, set_attention
from .taps import Tapped

SHARD = 1024


def stream_of(config: Config) -> dict:
    """What fixes the samples of a run and the teacher's outputs for them."""
    return {
        "seed": config.seed,
        "family": config.network.family,
        "schedule": dict(config.network.noise.settings),
        "teacher": contents(config.network.teacher, NETWORK),
        "data": {**vars(config.data), "path": contents(config.data.path) if config.data.path else ""},
    }


@torch.no_grad()
def write_teacher_outputs(
    folder: Path, config: Config, paths: Iterable[str], count: int, device: torch.device, batch: int = 32
) -> None:
    """Compute the outputs for the first `count` samples of a recipe's stream, or what is missing of them.

    paths: modules of the teacher whose outputs (features) are kept as well. Raises ValueError for features too large
    for float16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob("*.safetensors")):
        _same_stream(path, config)
    first = [n for n in range(0, count, SHARD) if not (folder / f"{n // SHARD:05d}.safetensors").exists()]
    if not first:
        return
    original = load_teacher(config)
    nn.Module.to(original, device)
    batches = Batches(open_source(config), config)
    if device.type == "cpu":
        set_attention(original, BmmAttention())
    teacher = Tapped(original, sorted(set(paths)))
    progress = Progress("teacher's outputs", count)
    for start in first:
        parts: list[dict[str, Tensor]] = []
        for at in range(start, start + SHARD, batch):
            part = batches(range(at, at + batch)).to(device)
            a, s = coefficients(part.t, config.network.alphas)
            predicted, features = teacher(a * part.x0 + s * part.noise, part.t, part.context, part.added)
            parts.append({"predicted": predicted} | {path: feature.half() for path, feature in features.items()})
            progress.show(min(at + batch, count))
        whole = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
        for name, value in whole.items():
            if not value.isfinite().all():
                raise ValueError(
                    f"the teacher's {name} is not finite, or too large for float16; train without "
                    "network.teacher_outputs"
                )
        write_file(folder / f"{start // SHARD:05d}.safetensors", whole, {"stream": json.dumps(stream_of(config))})
    progress.end()


def _same_stream(path: Path, config: Config) -> None:
    saved = json.loads(read_header(path).metadata.get("stream", "{}"))
    if changed := difference(saved, json.loads(json.dumps(stream_of(config)))):
        raise ValueError(
            f"network.teacher_outputs: {path} was made for another stream ({changed}); delete it, or give another "
            "folder"
        )


class TeacherOutputs:
    """The outputs in a folder of `write_teacher_outputs`. Raises ValueError where they are not those of this recipe."""

    def __init__(self, config: Config, paths: Iterable[str]):
        folder = Path(config.network.teacher_outputs)
        self.paths = tuple(dict.fromkeys(paths))
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            raise ValueError(f"network.teacher_outputs: {folder} holds no .safetensors file")
        self.files = [safe_open(path, framework="pt") for path in found]
        for path in found:
            _same_stream(path, config)
        missing = set(self.paths) - set(self.files[0].keys())
        if missing:
            raise ValueError(
                f"network.teacher_outputs: {folder} does not hold {min(missing)}, with which {config.name} compares"
            )
        if config.run.steps * config.run.batch > len(found) * SHARD:
            raise ValueError(
                f"network.teacher_outputs: {folder} holds {len(found) * SHARD} samples, {config.name} takes "
                f"{config.run.steps * config.run.batch}"
            )

    def __call__(self, numbers: Sequence[int], device: torch.device) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Prediction and features by path for samples by number, as `Tapped` gives them."""

        def rows(name: str) -> Tensor:
            return torch.stack(
                [self.files[n // SHARD].get_slice(name)[n % SHARD : n % SHARD + 1][0] for n in numbers]
            ).to(device)

        return rows("predicted"), {path: rows(path) for path in self.paths}
