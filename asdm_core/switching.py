"""Switching: several UNets take turns within one sampling run, as plain frozen data.

After A-SDM (arXiv 2312.15516), section 2.4: the early steps lay out a picture and the late ones draw it, and need
not be drawn by the same UNet. What its Table 3 tried is in PRESETS.

Players of a run are numbered: 0 is the first model, i + 1 the one that the i-th switch brings in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

UNITS = ("percent", "share of steps", "step", "sigma")
_SHARES = ("percent", "share of steps")
NEVER = -math.inf  # a noise level that no evaluation reaches, not even one at sigma 0


@dataclass(frozen=True)
class SwitchPoint:
    """Where in a sampling run the next model takes over.

    unit: "percent" of the schedule as the host counts it (0 = first step, 1 = end), "share of steps" (0.4 = after 40%
    of the run's steps, rounded to whole steps), "step" of the run, counted from 0, or "sigma", the noise level itself.
    Raises ValueError.
    """

    at: float
    unit: str = "percent"

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"unit must be one of {UNITS}, got {self.unit!r}")
        if not math.isfinite(self.at):
            raise ValueError(f"switch_at: wanted a number, got {self.at}")
        if self.unit == "step" and self.at != int(self.at):
            raise ValueError(
                f"switch_at: wanted a whole number of steps, got {self.at:g}. "
                "For a share of the run choose the unit share of steps."
            )
        if self.unit in _SHARES and not 0 <= self.at <= 1:
            raise ValueError(
                f"switch_at: wanted a share of the run from 0 to 1, got {self.at:g}. For a number of steps choose "
                "the unit step."
            )

    @property
    def before_all(self) -> bool:
        """Whether the next model plays whole runs, whatever their schedule."""
        return self.at <= 0 and self.unit != "sigma"

    @property
    def after_all(self) -> bool:
        """Whether the next model never plays, whatever the schedule."""
        return self.at <= 0 if self.unit == "sigma" else self.unit in _SHARES and self.at >= 1

    def sigma(self, sigmas: Sequence[float], percent_to_sigma: Callable[[float], float]) -> float:
        """The noise level at and below which the next model plays, in a run on `sigmas` (one more than steps)."""
        if self.before_all:
            return math.inf
        if self.after_all:
            return NEVER
        steps = len(sigmas) - 1
        if self.unit in ("step", "share of steps"):
            step = int(self.at) if self.unit == "step" else math.floor(self.at * steps + 0.5)
            return sigmas[step] if step < steps else NEVER
        return percent_to_sigma(self.at) if self.unit == "percent" else self.at


@dataclass(frozen=True)
class SwitchPreset:
    """A published switch between a large UNet and a smaller one. small_first: the small one begins."""

    small_first: bool
    at: SwitchPoint
    source: str


_TABLE = "A-SDM, arXiv 2312.15516, table 3"

# The paper's numbers of steps are those of runs of 25; here they are shares of any run.
PRESETS: dict[str, SwitchPreset] = {
    "S1": SwitchPreset(
        True,
        SwitchPoint(10 / 25, "share of steps"),
        f"{_TABLE}: BK-SDM Base for 10 steps, SD for 15; the best of the three",
    ),
    "S2": SwitchPreset(False, SwitchPoint(15 / 25, "share of steps"), f"{_TABLE}: SD for 15 steps, BK-SDM Base for 10"),
    "S3": SwitchPreset(False, SwitchPoint(10 / 25, "share of steps"), f"{_TABLE}: SD for 10 steps, BK-SDM Base for 15"),
}


@dataclass(frozen=True)
class Switch:
    """A change of models: once the run has passed all `points`, at once or by a cross-fade over so many steps."""

    points: tuple[SwitchPoint, ...]
    crossfade: int = 0

    def within(self, point: SwitchPoint) -> Switch:
        """This switch inside a model that itself plays only from `point` on."""
        return replace(self, points=(*self.points, point))

    def sigma(self, sigmas: Sequence[float], percent_to_sigma: Callable[[float], float]) -> float:
        return min(point.sigma(sigmas, percent_to_sigma) for point in self.points)

    def weight(self, sigma: float, step: int, threshold: float, sigmas: Sequence[float]) -> float:
        """Weight of the next model, 0..1, in an evaluation at a noise level that belongs to a step.

        threshold: what `sigma` gave for this run. During a cross-fade over k steps the weights are 1/(k+1) ... k/(k+1).
        """
        if not _reached(sigma, threshold):
            return 0.0
        begin = next((i for i, s in enumerate(sigmas) if _reached(s, threshold)), step)
        return min(1.0, max(1, step - begin + 1) / (self.crossfade + 1))


def _reached(sigma: float, threshold: float) -> bool:
    # Samplers compute noise levels anew, in single precision and through logarithms.
    return sigma <= threshold + 1e-4 * abs(threshold)


def shares(weights: Sequence[float]) -> dict[int, float]:
    """Player -> its share of an evaluation, from the weights of the switches in order. Players without a share are left
    out.
    """
    found = {0: 1.0}
    for player, weight in enumerate(weights, 1):
        if weight == 1:
            found = {}
        elif weight:
            found = {p: share * (1 - weight) for p, share in found.items()}
        if weight:
            found[player] = weight
    return found
