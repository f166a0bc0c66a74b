"""How a run must be set up for weights that were trained for a few steps without guidance: data in a file's metadata.

The field `few_step` of a pack's training, and the metadata key `asdm_few_step` of a LoRA file, hold the same table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .text import read_json

KEY = "few_step"  # of a pack's training
METADATA_KEY = "asdm_few_step"  # of a LoRA file's metadata


@dataclass(frozen=True)
class FewStep:
    """steps: evaluations of the UNet in a run; sampler, scheduler: the host's names; cfg: the guidance to set, 1 for
    none. times: the time steps of the evaluations, for other hosts. A sampler of "" and a cfg of 0 are any.
    """

    steps: int
    sampler: str
    scheduler: str
    cfg: float
    times: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"times": list(self.times)}

    @classmethod
    def from_dict(cls, data: object) -> FewStep:
        """Raises ValueError where the table is not one of these."""
        wanted: dict[str, type | tuple[type, ...]] = {
            "steps": int,
            "sampler": str,
            "scheduler": str,
            "cfg": (int, float),
            "times": list,
        }
        if not isinstance(data, Mapping) or any(not isinstance(data.get(k), kind) for k, kind in wanted.items()):
            raise ValueError(f"few_step: wanted {', '.join(wanted)}, got {data!r}")
        if not all(isinstance(t, int) for t in data["times"]):
            raise ValueError(f"few_step: times must be whole numbers, got {data['times']!r}")
        return cls(data["steps"], data["sampler"], data["scheduler"], float(data["cfg"]), tuple(data["times"]))


def of_pack(training: Mapping[str, Any]) -> FewStep | None:
    """What a pack's training says; None where it was trained for no number of steps. Raises ValueError."""
    return FewStep.from_dict(training[KEY]) if KEY in training else None


def of_fit(training: Mapping[str, Any]) -> FewStep | None:
    """What a pack was fitted for, where that is runs of one number of steps."""
    told = training.get("fit")
    steps = told.get("steps") if isinstance(told, Mapping) else None
    return FewStep(steps, "", "simple", 0.0, ()) if isinstance(steps, int) and steps > 0 else None


def of_lora(metadata: Mapping[str, str]) -> FewStep | None:
    """What the metadata of a LoRA file say; None where they say nothing. Raises ValueError."""
    if METADATA_KEY not in metadata:
        return None
    try:
        data = read_json(metadata[METADATA_KEY])
    except ValueError as e:
        raise ValueError(f"few_step: not valid JSON ({e})") from None
    return FewStep.from_dict(data)
