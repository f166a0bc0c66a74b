"""The plan of feature inheritance with the least error, from errors measured on a user's own model.

A candidate (what is inherited, and how) comes with the error that each step adds to the result if it
inherits, depending on how far back its features come from. Errors of a run are taken to add up; then
the best choice of full steps is found exactly, by dynamic programming over the last two of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .inheritance import Plan, Schedule


@dataclass(frozen=True)
class Candidate:
    """plan: what is inherited and how; its schedule is open. saved: share of a step's work that an inherited step
    saves.

    errors: (steps, longest + 1, longest + 2); errors[s, k, g] is what step s adds if its features come from
    step s - k, and g steps lie between that full step and the one before it (0: there was none before, or
    the candidate does not look further back). inf where it was not measured; errors[:, 0] is not read.
    """

    plan: Plan
    saved: float
    errors: np.ndarray

    @property
    def longest(self) -> int:
        """So many steps in a row may inherit."""
        return int(self.errors.shape[1] - 1)


def best_steps(errors: np.ndarray, full: int) -> tuple[tuple[int, ...], float]:
    """Full steps (the first always is) with the least sum of errors, exactly `full` of them; ((), inf) if none fit.

    errors: as in `Candidate`.
    """
    n = errors.shape[0]
    longest = errors.shape[1] - 1
    # States after the j-th full step: (where it is, its distance to the one before) -> (error so far, the way here).
    states: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 0): (0.0, (0,))}

    def skipped(last: int, gap: int, until: int) -> float:
        """Error of the steps between a full step and `until`, all inheriting from it."""
        return float(sum(errors[s, s - last, gap] for s in range(last + 1, until)))

    for _ in range(full - 1):
        following: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (last, gap), (error, way) in states.items():
            for step in range(last + 1, min(last + longest + 2, n)):
                total = error + skipped(last, gap, step)
                key = (step, step - last)
                if total < following.get(key, (math.inf,))[0]:
                    following[key] = (total, (*way, step))
        states = following
    ends = [
        (error + skipped(last, gap, n), way) for (last, gap), (error, way) in states.items() if n - 1 - last <= longest
    ]
    error, way = min(ends, default=(math.inf, ()))
    return (way, error) if math.isfinite(error) else ((), math.inf)


@dataclass(frozen=True)
class Choice:
    """A plan with its predicted saving (share of the work) and error (sum of the errors of its inherited steps)."""

    plan: Plan
    saving: float
    error: float


def choices(candidates: Sequence[Candidate]) -> list[Choice]:
    """The best choice of every candidate for every number of full steps."""
    found = []
    for candidate in candidates:
        n = len(candidate.errors)
        for full in range(1, n + 1):
            steps, error = best_steps(candidate.errors, full)
            if steps:
                schedule = Schedule("explicit", steps=steps, of=n)
                found.append(
                    Choice(replace(candidate.plan, schedule=schedule), candidate.saved * (n - full) / n, error)
                )
    return found


def choose(found: Sequence[Choice], saving: float | None = None, error: float | None = None) -> Choice:
    """The choice with the least error that saves at least `saving`, or with the largest saving below `error`.

    Raises ValueError where nothing saves as much.
    """
    if saving is not None:
        enough = [c for c in found if c.saving >= saving - 1e-9]
        if not enough:
            most = max((c.saving for c in found), default=0.0)
            raise ValueError(
                f"no plan saves {saving:.0%} of the work; the most that can be saved here is {most:.0%}. Ask for less, "
                "or allow more inherited steps in a row."
            )
        return min(enough, key=lambda c: (c.error, -c.saving))
    limit = math.inf if error is None else error
    return max((c for c in found if c.error <= limit), key=lambda c: (c.saving, -c.error))
