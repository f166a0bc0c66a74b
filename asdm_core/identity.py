"""Which checkpoint is this? One number of each of its weights, which says so in any dtype and under any file name.

Of each weight matrix of the unpruned network, in the order of the walk, one number is kept, always from the same place.
A finetune changes nearly all of them, a merged LoRA those of the layers it has; storing the same checkpoint in another
dtype moves each by no more than that dtype rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .addresses import UNetConfig, keys
from .text import TEXT, printable

PLACE = 0.382  # of a tensor's numbers: away from its edges, where many networks start with the same ones
SAME = 0.02  # share of the numbers that may differ, for the odd one that a converter changed
# What a dtype rounds at most, relative and absolute (the step of its smallest numbers).
_ROUNDING = (
    (torch.float8_e5m2, 2**-3, 2**-17),
    (torch.float8_e4m3fn, 2**-4, 2**-10),
    (torch.bfloat16, 2**-8, 0.0),
    (torch.float16, 2**-11, 2**-25),
)
COARSE = (2**-4, 2**-10)  # of weights that are quantised layer by layer


def places(config: UNetConfig) -> dict[str, int]:
    """Addressed name of each weight matrix of an unpruned network, and which of its numbers is kept."""
    return {key: int(PLACE * math.prod(slot.shape)) for key, slot in keys(config).items() if len(slot.shape) > 1}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that a pack belongs to. name: of its file, for people. marks: in the order of `places`, None where
    the checkpoint lacks the weight.
    """

    name: str
    marks: tuple[float | None, ...]

    @classmethod
    def of(cls, name: str, weights: Mapping[str, Tensor], config: UNetConfig) -> Checkpoint:
        """weights: addressed LDM names; those of other layers are not looked at."""
        return cls.read(name, lambda key, at: float(weights[key].flatten()[at]) if key in weights else None, config)

    @classmethod
    def read(cls, name: str, number: Callable[[str, int], float | None], config: UNetConfig) -> Checkpoint:
        """number: gives one number of a weight by its addressed LDM name, None where there is none."""
        return cls(name, tuple(number(key, at) for key, at in places(config).items()))

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "marks": list(self.marks)}

    @classmethod
    def from_dict(cls, data: object, config: UNetConfig) -> Checkpoint:
        """Raises ValueError where this is not the table of a checkpoint of this family."""
        count = len(places(config))
        marks = data.get("marks") if isinstance(data, Mapping) else None
        if not isinstance(data, Mapping) or not isinstance(data.get("name"), str) or not isinstance(marks, list):
            raise ValueError(f"a checkpoint must have a name and marks, got {printable(repr(data), TEXT)}")
        if len(marks) != count or not all(
            m is None or isinstance(m, (int, float)) and not isinstance(m, bool) and math.isfinite(m) for m in marks
        ):
            raise ValueError(f"the marks of a checkpoint must be {count} finite numbers")
        return cls(data["name"], tuple(None if m is None else float(m) for m in marks))

    def is_other(self, than: Checkpoint, rounded: tuple[float, float] = (0.0, 0.0)) -> bool:
        """Whether two checkpoints hold other weights than storing in another dtype explains.

        rounded: what is known to have been rounded at least, relative and absolute. In fp8 a mild finetune lies within
        the rounding and is taken for the same.
        """
        pairs = [(a, b) for a, b in zip(self.marks, than.marks, strict=True) if a is not None and b is not None]
        bounds = [rounded, *(_rounding(side) for side in zip(*pairs, strict=True))] if pairs else []
        relative, absolute = (sum(part) for part in zip(*bounds, strict=True)) if bounds else (0.0, 0.0)
        relative += 2**-22  # sums in float32
        differing = sum(abs(a - b) > relative * max(abs(a), abs(b)) + absolute for a, b in pairs)
        return differing > SAME * len(pairs)


def _rounding(marks: Sequence[float]) -> tuple[float, float]:
    """What numbers were rounded by, told by the coarsest dtype that holds them all."""
    exact = torch.tensor(marks, dtype=torch.float64)
    for dtype, relative, absolute in _ROUNDING:
        if torch.equal(exact.float().to(dtype).double(), exact):
            return relative, absolute
    return 0.0, 0.0
