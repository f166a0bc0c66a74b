"""Where in a sampling run an evaluation of the network lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Moment:
    """One evaluation of the network: its noise level, the step it belongs to, and where it lies, in steps (1.5: halfway
    between steps 1 and 2; None for a noise level outside of its step).
    """

    sigma: float
    step: int
    position: float | None

    @property
    def place(self) -> float:
        """Where it lies, in steps; at the beginning of its step where that is not known."""
        return float(self.step) if self.position is None else self.position


class Steps:
    """Follows one run on its noise levels: `sigmas`, one more than the run has steps."""

    def __init__(self, sigmas: Sequence[float]) -> None:
        self.sigmas = list(sigmas)
        self._step = 0

    def __len__(self) -> int:
        return max(len(self.sigmas) - 1, 1)

    def at(self, sigma: float) -> Moment:
        """The evaluation at a noise level that comes next in the run."""
        self._step = step_of(sigma, self.sigmas, self._step)
        return Moment(sigma, self._step, position_of(sigma, self.sigmas, self._step))


def step_of(sigma: float, sigmas: Sequence[float], last: int) -> int:
    """Index of the step that evaluates at `sigma`: an exact node (the first at or after the last step seen,
    for schedules that visit a noise level twice), else the interval that holds it, else the last step."""
    exact = [i for i, s in enumerate(sigmas[:-1]) if abs(s - sigma) <= 1e-4 * max(abs(s), 1e-8)]
    if exact:
        return next((i for i in exact if i >= last), exact[-1])
    for i, (high, low) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        if min(high, low) < sigma < max(high, low):
            return i
    return last


def position_of(sigma: float, sigmas: Sequence[float], step: int) -> float | None:
    """Where within the run `sigma` lies, in steps, if it belongs to `step` (1.5: halfway between steps 1 and 2); else
    None.
    """
    if step >= len(sigmas):
        return None
    high, low = sigmas[step], sigmas[step + 1] if step + 1 < len(sigmas) else sigmas[step]
    if abs(high - sigma) <= 1e-4 * max(abs(high), 1e-8):
        return float(step)
    return step + (high - sigma) / (high - low) if min(high, low) < sigma < max(high, low) else None
