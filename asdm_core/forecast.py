"""Whole-step forecasts: evaluations of the network that are not made, and what stands for their results.

What is drawn on from earlier evaluations is v, whatever the network predicts, over the numbers of the steps: for
x = signal x0 + sigma n and a variance of data of 1, v is the prediction of Salimans and Ho (arXiv 2202.00512), of the
latent in proportion to its norm, and changes least from step to step. The signal is 1 in the k-diffusion form, and
1 - sigma with flow matching. The denoised result then follows from v and the latent of now, so a forecast goes on
answering to the sampler.

A plan is plain, frozen data: for each evaluation of a run whether it is made in full, inherits features, is made for
the prompt alone, or not at all, and with which weights earlier evaluations stand for what is missing. `forecast_fit`
finds plans and weights for a recorded run; `nodes/` carries them out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from . import inheritance
from .addresses import UNetConfig

FORMAT = 1
TECHNIQUE = "forecast"
FULL, FEATURES, RESULT, COND, UNGUIDED = KINDS = ("full", "features", "result", "cond", "unguided")
MOST = 5000  # evaluations of a plan in a file
TOLERANCE = 1e-3  # of positions: two evaluations this close, in steps, are at the same noise level

Weights = tuple[tuple[int, float], ...]


# The variable ---------------------------------------------------------------------------------------


def v_of(x: Any, denoised: Any, sigma: Any, signal: Any = 1.0) -> Any:
    """v from a latent x = signal x0 + sigma n, its denoised result and the noise level sigma > 0. Numbers, arrays or
    tensors of any shape.
    """
    size = sigma**2 + signal**2
    return (signal * x / size - denoised) * (size**0.5 / sigma)


def denoised_of(x: Any, v: Any, sigma: Any, signal: Any = 1.0) -> Any:
    """The denoised result from a latent x, v, the noise level and the signal; the inverse of `v_of`."""
    size = sigma**2 + signal**2
    return signal * x / size - v * (sigma / size**0.5)


def line(position: float, points: Iterable[tuple[int, float]]) -> Weights:
    """Weights of the straight line at `position` through evaluations, given as (number, position), the newest first.

    It runs through the newest and the next at another position; a single one is held. Raises ValueError without any.
    """
    points = iter(points)
    newest, at = next(points, (None, 0.0))
    if newest is None:
        raise ValueError("forecast: there is nothing to draw on from; an evaluation must be made first")
    older = next(((q, p) for q, p in points if abs(p - at) >= TOLERANCE), None)
    if older is None:
        return ((newest, 1.0),)
    slope = (position - at) / (at - older[1])
    return ((newest, 1 + slope), (older[0], -slope))


# The plan -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Action:
    """What happens at one evaluation.

    kind:
      full      the network computes everything.
      features  it computes the shallow layers and inherits what lies beneath skip branch `branch` (see `inheritance`).
      result    the network is not called: every result is a forecast.
      cond      only the positive prompt is computed; its difference to the others is a forecast.
      unguided  only the positive prompt is computed and stands for the others too: guidance is off.
    weights: (evaluation, weight) of the earlier evaluations that v is a sum of; empty: the straight line through the
             last two that were made. With weights a full evaluation is a sum as well, its own result among them: once
             it is known, what the forecasts before it missed is known better, and is made good here, as the corrector
             of a multistep method does (UniPC, arXiv 2302.04867). Empty: its own result as it is.
    difference: the same for the difference between the positive prompt and each of the others. Empty for a result or a
             full evaluation: everything takes `weights`.
    """

    kind: str = FULL
    weights: Weights = ()
    difference: Weights = ()
    branch: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"forecast: an evaluation must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.weights and self.kind not in (FULL, RESULT):
            raise ValueError(f"forecast: {self.kind!r} is no sum of results")
        if self.difference and self.kind not in (FULL, RESULT, COND):
            raise ValueError(f"forecast: {self.kind!r} has no difference to forecast")
        if isinstance(self.branch, bool) or not isinstance(self.branch, int) or self.branch < 0:
            raise ValueError(f"forecast: branch must be a whole number of at least 0, got {self.branch!r}")
        for name, weights in (("weights", self.weights), ("difference", self.difference)):
            for pair in weights:
                if len(pair) != 2 or not isinstance(pair[0], int) or not math.isfinite(pair[1]):
                    raise ValueError(f"forecast: {name} must be (evaluation, finite number) pairs, got {pair!r}")

    @property
    def computes(self) -> bool:
        """Whether the network computes everything, so that later evaluations can be drawn on from this one."""
        return self.kind == FULL

    @property
    def knows_cond(self) -> bool:
        """Whether the positive prompt is computed in full."""
        return self.kind in (FULL, COND, UNGUIDED)


@dataclass(frozen=True)
class ForecastPlan:
    """What happens at each evaluation of a run. Data for JSON both ways. Raises ValueError.

    positions: where in the run each evaluation lies, in steps; empty: one evaluation for each step. A sampler that
    comes back to a noise level has several with the same position. steps: of the run; 0: up to the last evaluation. A
    run that has its last noise level twice, or is not evaluated at it, has more.
    """

    actions: tuple[Action, ...]
    positions: tuple[float, ...] = ()
    name: str = ""
    steps: int = 0

    def __post_init__(self) -> None:
        if not self.actions:
            raise ValueError("forecast: a plan needs at least one evaluation")
        if not self.positions:
            object.__setattr__(self, "positions", tuple(float(i) for i in range(len(self.actions))))
        if len(self.positions) != len(self.actions):
            raise ValueError(f"forecast: {len(self.actions)} evaluations need as many positions, got {self.positions}")
        if not all(math.isfinite(p) and p >= 0 for p in self.positions):
            raise ValueError(f"forecast: positions are steps from 0 on, got {self.positions}")
        if not self.steps:
            object.__setattr__(self, "steps", self._seen)
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < self._seen:
            raise ValueError(
                f"forecast: a run with evaluations up to {max(self.positions):g} has no {self.steps!r} steps"
            )
        branches = {a.branch for a in self.actions if a.kind == FEATURES}
        if len(branches) > 1:
            raise ValueError(f"forecast: one plan inherits at one branch, got {sorted(branches)}")
        first = next((k for k, action in enumerate(self.actions) if action.computes), len(self.actions))
        for k, action in enumerate(self.actions):
            self._check(k, action, first)

    @property
    def _seen(self) -> int:
        return int(max(self.positions)) + 1

    def _check(self, k: int, action: Action, first: int) -> None:
        """first: the first evaluation that computes everything."""
        if action.kind == UNGUIDED:
            return
        if action.kind != FULL and k < first:
            raise ValueError(f"forecast: evaluation {k} is {action.kind!r}, and no evaluation before it is full")
        apart = bool(action.difference)
        for weights, usable in ((action.weights, _knows_cond if apart else _computes), (action.difference, _computes)):
            for source, _ in weights:
                latest = k if action.kind == FULL else k - 1
                if not 0 <= source <= latest or not usable(self.actions[source]):
                    raise ValueError(
                        f"forecast: evaluation {k} draws on {source}, which must be an earlier one that is full"
                    )

    def corrects(self, k: int) -> bool:
        """Whether evaluation k is made and handed on with a correction."""
        action = self.actions[k]
        return action.kind == FULL and bool(action.weights or action.difference)

    def sources(self, k: int) -> frozenset[int]:
        """The earlier evaluations that evaluation k is made from."""
        action = self.actions[k]
        if action.kind == FULL:
            return frozenset(q for q, _ in (*action.weights, *action.difference) if q != k)
        if action.kind not in (RESULT, COND):
            return frozenset()
        given = action.difference if action.kind == COND else (*action.weights, *action.difference)
        found = {source for source, _ in given}
        if not action.difference and not action.weights or action.kind == RESULT and not action.weights:
            points = ((q, self.positions[q]) for q in range(k - 1, -1, -1) if self.actions[q].computes)
            found.update(q for q, _ in line(self.positions[k], points))
        return frozenset(found)

    def live(self, k: int) -> frozenset[int]:
        """Evaluations up to k that a later one is made from."""
        return frozenset(q for q, last in self._last_use.items() if q <= k < last)

    @cached_property
    def _last_use(self) -> dict[int, int]:
        """The last evaluation that each one is drawn on for."""
        return {q: k for k in range(len(self.actions)) for q in self.sources(k)}

    @property
    def remembered(self) -> int:
        """So many evaluations are remembered at most, for each prompt."""
        n = range(len(self.actions))
        return max(len(self.live(k) | ({k, *self.sources(k)} if self.corrects(k) else set())) for k in n)

    def find(self, position: float, after: int) -> int | None:
        """Number of the evaluation at a position, the first one from `after` on; None where the plan has none."""
        return next(
            (k for k in range(after, len(self.positions)) if abs(self.positions[k] - position) < TOLERANCE), None
        )

    def for_steps(self, n: int) -> ForecastPlan:
        """The plan for a run of n steps, one evaluation each: full and shared ones at the same place of the run.

        In another run than its own, weights mean nothing and become straight lines.
        """
        if self.steps == n:
            return self
        actions = [Action(RESULT)] * n
        for action, position in zip(reversed(self.actions), reversed(self.positions), strict=True):
            if action.kind != RESULT:
                actions[min(round(position * n / self.steps), n - 1)] = replace(action, weights=(), difference=())
        actions[0] = actions[0] if actions[0].kind in (FULL, UNGUIDED) else Action()
        return ForecastPlan(tuple(actions), name=self.name)

    def saving(self, conds: int = 2, shared: Mapping[int, float] = {}) -> float:
        """Share of the network's multiplications that the plan saves, 0..1.

        conds: prompts of a run (2 with guidance). shared: skip branch -> share of a full evaluation that one which
        inherits there still costs.
        """
        cost = {FULL: 1.0, RESULT: 0.0, COND: 1 / conds, UNGUIDED: 1 / conds}
        return 1 - sum(shared[a.branch] if a.kind == FEATURES else cost[a.kind] for a in self.actions) / len(
            self.actions
        )

    def features(self, config: UNetConfig) -> inheritance.Plan | None:
        """The plan of feature inheritance for the evaluations that inherit features; None where there are none.

        What is a result is none of its full steps: the network is not called there, so there is nothing to inherit.
        """
        branch = next((a.branch for a in self.actions if a.kind == FEATURES), None)
        if branch is None:
            return None
        steps = {int(p) for a, p in zip(self.actions, self.positions, strict=True) if a.kind not in (FEATURES, RESULT)}
        schedule = inheritance.Schedule("explicit", steps=tuple(sorted(steps)), of=self.steps)
        return inheritance.deepcache(config, branch, schedule).reusing("forecast")

    def letters(self) -> str:
        """One letter for each evaluation: F full, f features, r result, c cond, u unguided."""
        letter = {FULL: "F", FEATURES: "f", RESULT: "r", COND: "c", UNGUIDED: "u"}
        return "".join(letter[a.kind] for a in self.actions)

    def to_dict(self) -> dict[str, Any]:
        def entry(action: Action, position: float) -> dict[str, Any]:
            found: dict[str, Any] = {"kind": action.kind, "at": position}
            if action.weights:
                found["weights"] = [list(pair) for pair in action.weights]
            if action.difference:
                found["difference"] = [list(pair) for pair in action.difference]
            return found | ({"branch": action.branch} if action.kind == FEATURES else {})

        entries = [entry(a, p) for a, p in zip(self.actions, self.positions, strict=True)]
        more = {} if self.steps == self._seen else {"steps": self.steps}
        return {"technique": TECHNIQUE, "format": FORMAT, "name": self.name, "evaluations": entries} | more

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ForecastPlan:
        if not isinstance(data, Mapping) or (data.get("technique"), data.get("format")) != (TECHNIQUE, FORMAT):
            raise ValueError(
                f"forecast plan: wanted a JSON object with technique {TECHNIQUE!r} and format {FORMAT}, "
                f"got {str(data)[:80]}"
            )

        def pairs(value: Any) -> Weights:
            return tuple((int(source), float(weight)) for source, weight in value)

        try:
            entries = data["evaluations"]
            if len(entries) > MOST:
                raise ValueError(f"forecast plan: {len(entries)} evaluations, and a plan has at most {MOST}")
            actions = tuple(
                Action(e["kind"], pairs(e.get("weights", ())), pairs(e.get("difference", ())), int(e.get("branch", 0)))
                for e in entries
            )
            positions = tuple(float(e["at"]) for e in entries)
            return cls(actions, positions, str(data.get("name", "")), data.get("steps", 0))
        except (KeyError, TypeError, AttributeError, OverflowError) as e:
            raise ValueError(f"forecast plan: {e}") from None


def _computes(action: Action) -> bool:
    return action.computes


def _knows_cond(action: Action) -> bool:
    return action.knows_cond


# Plans that need no measuring -----------------------------------------------------------------------


def every(n: int, interval: int, first: int = 1) -> ForecastPlan:
    """Every `interval`-th of n steps is full, and the first ones; all others are results."""
    if interval < 1 or first < 1:
        raise ValueError(f"forecast: interval and first must be at least 1, got {interval} and {first}")
    full = {s for s in range(n) if s % interval == 0 or s < first}
    return ForecastPlan(tuple(Action(FULL if s in full else RESULT) for s in range(n)), name=f"every {interval}")


@dataclass(frozen=True)
class Adaptive:
    """Whole steps left out as the run itself decides, where no plan was fitted: while the first layer that the network
    computes has changed little since the last evaluation that was made. Raises ValueError.

    threshold: relative change, of the picture of a batch that changed most, below which a result is forecast.
    max_run: so many forecasts in a row, at most. first, last: so many steps at the ends of the run are made.
    """

    threshold: float = 0.1
    max_run: int = 3
    first: int = 2
    last: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, int | float) or not 0 <= self.threshold:
            raise ValueError(f"forecast: threshold must be a number of at least 0, got {self.threshold!r}")
        if not math.isfinite(self.threshold):
            raise ValueError(f"forecast: threshold must be finite, got {self.threshold!r}")
        for name, least in (("max_run", 1), ("first", 1), ("last", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"forecast: {name} must be a whole number of at least {least}, got {value!r}")

    def asks(self, n: int, step: int, run: int) -> bool:
        """Whether a step of n may be left out, so that the change of the first layer must be known; run: so many
        evaluations before it were not made.
        """
        return self.first <= step < n - self.last and run < self.max_run

    def action(self, made: Sequence[tuple[int, float]], position: float, change: float) -> Action:
        """What becomes of an evaluation that `asks` allows to leave out.

        made: (number, position) of the evaluations that were made, the newest first. change: `relative_change` since
        the newest; one that is no number is no small one.
        """
        return Action(RESULT, line(position, made)) if made and change < self.threshold else Action()


def relative_change(now: Any, before: Any) -> float:
    """The largest relative change of any picture of a batch, in the mean of absolute numbers. Tensors (B, ...)."""
    now, before = now.float(), before.float()
    of_each = (now - before).abs().flatten(1).mean(1) / before.abs().flatten(1).mean(1)
    return float(of_each.max())


def guided_within(plan: ForecastPlan, start: float, end: float) -> ForecastPlan:
    """The plan with guidance only from `start` to `end` of the run, both in 0..1 (Kynkaanniemi et al. 2024).

    Whatever lies outside is computed for the positive prompt alone. What lies inside and was drawn on from there is
    drawn on in straight lines from what is computed inside, and the first one inside is computed. Raises ValueError.
    """
    if not 0 <= start <= end <= 1:
        raise ValueError(f"forecast: guidance needs 0 <= start <= end <= 1, got {start} and {end}")
    actions: list[Action] = []
    for k, (action, position) in enumerate(zip(plan.actions, plan.positions, strict=True)):
        full = {q for q, earlier in enumerate(actions) if earlier.computes}
        sources = {q for q, _ in (*action.weights, *action.difference)}
        if not start <= position / plan.steps < end:
            action = Action(UNGUIDED)
        elif action.kind != FULL and not full:
            action = Action()
        elif action.kind != FULL and not sources <= full:
            action = replace(action, weights=(), difference=())
        elif plan.corrects(k) and actions[min(sources) : k] != list(plan.actions[min(sources) : k]):
            action = Action()  # what it would make good did not happen
        actions.append(action)
    return replace(plan, actions=tuple(actions))
