"""Which evaluations to leave out, and the weights that stand for them, from a recorded run of the user's own model.

Errors of forecasts that are small one by one can add up along a run, so weights and schedule are chosen together, for
the error in the *result*: how far the result moves by an error of one evaluation is known from the sampler alone,
which is linear in the denoised results it is given (`Response`).

With e_s the error of v at a left-out evaluation s and T_s what becomes of it in the result, all weights of a run
minimise |sum_s T_s e_s|^2 + lambda sum_s T_s^2 |e_s|^2, one linear system over the Gram matrix of the recorded v.
The schedule is found by local search, since joint errors cannot be taken apart by steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .forecast import COND, FULL, RESULT, Action, ForecastPlan, line

LAMBDA = 0.2  # how much each error counts by itself, beside their sum
POWER = 0.7  # of 1 / (1 + sigma^2): how much a computed result follows its latent
POINTS = 3  # earlier evaluations that a forecast is a sum of
MOST_APART = 24  # evaluations of a run in which prompts are told apart, and every search is thorough
RIDGE = 3e-3
BETTER = 0.999  # a move is made where the objective falls below this share
_AT_ONCE = 2**16  # numbers of a row that are in double precision at once


# The sampler ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Response:
    """How a sampler answers to the denoised results it is given, one evaluation at a time.

    sigmas: (N,) noise level of each evaluation. matrix: (N, N + 1); matrix[s, m] is how far the latent at evaluation m
    (N: the result) moves if the denoised result of evaluation s moves by 1 and all others stay.
    """

    sigmas: np.ndarray
    matrix: np.ndarray

    def __len__(self) -> int:
        return len(self.sigmas)


def response(sample: Callable[[Callable[[Any, Any], np.ndarray], int], Any], tolerance: float = 1e-3) -> Response:
    """The response of a sampler, by running it on numbers.

    sample: called as sample(denoise, rows), it runs the sampler from x = 0 of `rows` numbers at the noise levels of
    the run, asks denoise(x, sigma) for each denoised result, and returns the result; x are arrays (rows,).
    Raises ValueError for a sampler that is not linear, or whose evaluations depend on what it is given.
    """
    sigmas: list[float] = []

    def count(x: Any, sigma: Any) -> np.ndarray:
        sigmas.append(float(sigma))
        return np.zeros_like(x)

    sample(count, 1)
    n = len(sigmas)
    # One row for each evaluation whose result moves; the last two hold everything at 0 and move all at once.
    moves = np.concatenate([np.eye(n), np.zeros((1, n)), np.random.default_rng(0).standard_normal((1, n))])
    seen: list[np.ndarray] = []

    def denoise(x: Any, sigma: Any) -> np.ndarray:
        k = len(seen)
        if k >= n or abs(float(sigma) - sigmas[k]) > 1e-4 * max(abs(sigmas[k]), 1e-8):
            raise ValueError("this sampler chooses its noise levels by what it sees, so its response is not one table")
        seen.append(np.array(x, dtype=float))
        return np.array(moves[:, k])

    result = np.array(sample(denoise, n + 2), dtype=float)
    if len(seen) != n:
        raise ValueError("this sampler chooses its noise levels by what it sees, so its response is not one table")
    table = np.stack([*seen, result], axis=1)  # (n + 2, n + 1)
    matrix = table[:n] - table[n]
    off = np.abs(moves[-1] @ matrix - (table[-1] - table[n])).max()
    if not off <= tolerance * max(1.0, np.abs(table[-1]).max()):
        raise ValueError(f"this sampler is not linear in the denoised results: {off:.2g} off their sum")
    return Response(np.array(sigmas), matrix)


def transfer(response: Response, computed: Sequence[bool], power: float = POWER) -> np.ndarray:
    """T (N,): what becomes in the result of an error of 1 in v at each evaluation.

    The latents after it move as the sampler answers, and what is denoised from them moves along: of a left-out
    evaluation by 1 / (1 + sigma^2), as v is drawn on whatever the latent; of a computed one by that to a power.
    """
    s2 = response.sigmas**2
    gain = np.where(np.asarray(computed, bool), (1 + s2) ** -power, 1 / (1 + s2))
    n = len(response)
    carried = np.zeros(len(response))
    for s in range(n - 1, -1, -1):
        carried[s] = response.matrix[s, n] + response.matrix[s, s + 1 : n] @ (gain[s + 1 :] * carried[s + 1 :])
    return np.asarray(-response.sigmas / np.sqrt(1 + s2) * carried)


# The recorded run -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recording:
    """What a run in full told: of its v only the inner products.

    gram: (2N, 2N), the mean over all numbers of the products of [v of the positive prompt at each evaluation, its
    difference to the negative one at each]. guidance: CFG scale. positions: (N,), of the evaluations, in steps.
    size: root mean square of the result. pictures: so many were recorded.
    """

    response: Response
    gram: np.ndarray
    guidance: float
    positions: tuple[float, ...]
    size: float
    pictures: int = 1

    def __post_init__(self) -> None:
        n = len(self.response)
        if self.gram.shape != (2 * n, 2 * n) or len(self.positions) != n:
            raise ValueError(
                f"forecast: a run of {n} evaluations has a Gram matrix of {2 * n} x {2 * n} and {n} positions, got "
                f"{self.gram.shape} and {len(self.positions)}"
            )
        if not np.isfinite(self.gram).all():
            raise ValueError("forecast: the recorded run holds numbers that are not finite; its pictures are broken")

    def __len__(self) -> int:
        return len(self.response)


def gram_of(cond: Sequence[Any], difference: Sequence[Any]) -> np.ndarray:
    """The Gram matrix of a recording from flat arrays (numbers of a latent,), one for each evaluation."""
    rows = np.stack([np.asarray(row, dtype=np.float32).ravel() for row in (*cond, *difference)])
    # What forecasts miss is a small difference of large products, so these are summed up in double precision.
    parts = (rows[:, at : at + _AT_ONCE].astype(float) for at in range(0, rows.shape[1], _AT_ONCE))
    return np.asarray(sum(part @ part.T for part in parts) / rows.shape[1])


@dataclass(frozen=True)
class Statistics:
    """What v of one model does over the noise levels, on the way of a run with guidance: enough to fit any run like it.

    sigmas: (M,) falling, close together. gram: (2M, 2M) as in `Recording`. guidance: of the runs recorded.
    size: root mean square of their results.
    """

    sigmas: np.ndarray
    gram: np.ndarray
    guidance: float
    size: float

    def recording(self, response: Response, guidance: float, positions: Sequence[float]) -> Recording:
        """A recording of a run at other noise levels, with v between those of the statistics; beyond them it stays."""
        ways = _between(np.log(self.sigmas), np.log(np.maximum(response.sigmas, 1e-6)))
        both = np.kron(np.eye(2), ways)
        return Recording(response, both @ self.gram @ both.T, guidance, tuple(positions), self.size)


def _between(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Weights (N, M) of cubic interpolation (Lagrange, four points) at `wanted` between falling points `known`."""
    rows = np.zeros((len(wanted), len(known)))
    for row, at in zip(rows, np.clip(wanted, known[-1], known[0]), strict=True):
        first = int(np.clip(np.searchsorted(-known, -at) - 2, 0, len(known) - 4))
        points = known[first : first + 4]
        for j, p in enumerate(points):
            others = np.delete(points, j)
            row[first + j] = np.prod((at - others) / (p - others))
    return rows


# Weights --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """A plan with its weights. error: predicted, of the result, as a share of its size; accumulated: the same without
    what each error counts by itself, which is the error of the result to first order.
    """

    plan: ForecastPlan
    saving: float
    error: float
    accumulated: float


class Fit:
    """Fits weights and schedules to a recording.

    apart: the difference between prompts has weights of its own.
    """

    def __init__(self, recording: Recording, apart: bool = False, strength: float = LAMBDA, power: float = POWER):
        self.recording, self.apart, self._strength, self._power = recording, apart, strength, power
        self._n = len(recording)
        n, w = self._n, recording.guidance - 1
        # With weights alike only the sum matters: v of the guided result.
        both = np.concatenate([np.eye(n), w * np.eye(n)], axis=1)
        self._guided = both @ recording.gram @ both.T
        self._known: dict[tuple[str, bool], float] = {}

    def weights(self, kinds: Sequence[str], fitted: bool = True) -> Fitted:
        """The plan that has these kinds of evaluation (full, result, cond), with its weights.

        fitted: otherwise all are straight lines.
        """
        left_out, forecasts, _, objective, accumulated = self._solve(tuple(kinds), fitted)
        actions = [Action(kind) for kind in kinds]
        for i, s in enumerate(left_out):
            rows = [_pairs(row) for row in forecasts[i]]
            if kinds[s] == COND:
                actions[s] = Action(COND, difference=rows[1])
            else:
                actions[s] = Action(RESULT, rows[0], rows[1] if self.apart else ())
        plan = ForecastPlan(tuple(actions), self.recording.positions)
        size = self.recording.size or 1.0
        return Fitted(plan, plan.saving(), max(objective, 0.0) ** 0.5 / size, max(accumulated, 0.0) ** 0.5 / size)

    def objective(self, kinds: Sequence[str], fitted: bool = True) -> float:
        """What the weights of these kinds of evaluation minimise, at its minimum."""
        key = "".join(kind[0] for kind in kinds), fitted
        if key not in self._known:
            self._known[key] = self._solve(tuple(kinds), fitted)[3]
        return self._known[key]

    def _solve(self, kinds: tuple[str, ...], fitted: bool) -> tuple[list[int], np.ndarray, np.ndarray, float, float]:
        """(left-out evaluations, their forecasts (S, 2, N) of cond and difference, T, objective, accumulated)."""
        n = self._n
        left_out = [s for s in range(n) if kinds[s] != FULL]
        t = transfer(self.recording.response, [kind != RESULT for kind in kinds], self._power)[left_out]
        if not left_out:
            return left_out, np.zeros((0, 2, n)), t, 0.0, 0.0
        bases, directions, owners = [], [], []
        for i, s in enumerate(left_out):
            base, found = self._forecast(kinds, s)
            bases.append(base)
            if fitted:
                directions += found
                owners += [i] * len(found)
        forecasts = np.stack(bases)  # (S, 2, N)
        mixed = self.apart or COND in kinds
        gram, flat = (self.recording.gram, self._flat_apart) if mixed else (self._guided, self._flat_alike)
        truth = np.stack([self._truth(kinds, s) for s in left_out])
        errors = flat(truth - forecasts)  # (S, nodes)
        counts = np.outer(t, t) + self._strength * np.diag(t**2)
        if directions:
            ways = np.stack(directions)
            owner = np.array(owners)
            flat_ways = flat(ways)
            products = flat_ways @ gram
            system = counts[np.ix_(owner, owner)] * (products @ flat_ways.T)
            wanted = (counts[owner] * (products @ errors.T)).sum(1)
            ridge = RIDGE * np.diag(np.diag(system)) + 1e-14 * np.eye(len(system))
            steps = np.linalg.solve(system + ridge, wanted)
            np.add.at(forecasts, owner, steps[:, None, None] * ways)
            errors = flat(truth - forecasts)
        products = errors @ gram @ errors.T
        return (
            left_out,
            forecasts,
            t,
            float((counts * products).sum()),
            float(t @ products @ t),
        )

    def _flat_apart(self, rows: np.ndarray) -> np.ndarray:
        """(S, 2, N) as errors of the guided v over the nodes of the recording, (S, 2N)."""
        return np.concatenate([rows[:, 0], (self.recording.guidance - 1) * rows[:, 1]], axis=1)

    @staticmethod
    def _flat_alike(rows: np.ndarray) -> np.ndarray:
        return rows[:, 0]

    def _truth(self, kinds: Sequence[str], s: int) -> np.ndarray:
        truth = np.zeros((2, self._n))
        truth[1, s] = 1
        if kinds[s] == RESULT:
            truth[0, s] = 1
        return truth

    def _forecast(self, kinds: Sequence[str], s: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """The straight lines of a left-out evaluation, (2, N), and the directions in which they may be moved."""
        both = [q for q in range(s - 1, -1, -1) if kinds[q] == FULL][:POINTS]
        cond = [q for q in range(s - 1, -1, -1) if kinds[q] in (FULL, COND)][:POINTS] if self.apart else both
        base = np.zeros((2, self._n))
        directions: list[np.ndarray] = []
        where = self.recording.positions
        if kinds[s] == RESULT:
            for q, weight in line(where[s], [(q, where[q]) for q in cond]):
                base[0, q] = weight
        for q, weight in line(where[s], [(q, where[q]) for q in both]):
            base[1, q] = weight

        def move(row: int | slice, points: Sequence[int]) -> Iterator[np.ndarray]:
            for newer, older in zip(points, points[1:], strict=False):
                way = np.zeros((2, self._n))
                way[row, newer], way[row, older] = 1, -1
                yield way

        if kinds[s] == COND:
            directions += move(1, both)
        elif self.apart:
            directions += [*move(0, cond), *move(1, both)]
        else:
            directions += move(slice(None), both)
        return base, directions

    # the schedule ------------------------------------------------------------------------------------

    def search(self, cost: float, conds: bool = False, fitted: bool = True, thorough: bool = True) -> Fitted:
        """The best plan that costs at most as much as `cost` full evaluations.

        conds: also with evaluations for the positive prompt alone, which cost half of one. thorough: otherwise from two
        beginnings only, and by near moves, in a fifth of the time. Raises ValueError for less than one evaluation.
        """
        if cost < 1:
            raise ValueError(f"forecast: at least one evaluation must be made, got {cost:g}")
        full = min(int(cost), self._n)
        powers = (1.3, 1.0, 0.8, 2.0) if thorough else (1.3,)
        starts = [self._late(full), *(self._spread(full, power) for power in powers)]
        best = min((self._descend(start, conds, fitted) for start in starts), key=lambda k: self.objective(k, fitted))
        return self.weights(self._descend(best, conds, fitted, far=True) if thorough else best, fitted)

    def _late(self, full: int) -> tuple[str, ...]:
        """All full at first, then by turns; where that leaves too many, from the end on."""
        left_out = list(range(self._n - 1, 0, -2)) + list(range(self._n - 2, 0, -2))
        chosen = set(left_out[: self._n - full])
        return tuple(RESULT if s in chosen else FULL for s in range(self._n))

    def _spread(self, full: int, power: float) -> tuple[str, ...]:
        places = [min(int(self._n * (j / full) ** power), self._n - 1) for j in range(full)]
        chosen = set(places)
        free = [s for s in range(self._n) if s not in places]
        chosen.update(free[: full - len(chosen)])
        return tuple(FULL if s in chosen else RESULT for s in range(self._n))

    def _descend(self, kinds: tuple[str, ...], conds: bool, fitted: bool, far: bool = False) -> tuple[str, ...]:
        value = self.objective(kinds, fitted)
        moved = True
        while moved:
            moved = False
            for s in range(1, self._n):  # goes on after a move: the next one is likely to be near
                for other in self._moves(kinds, s, conds, far):
                    new = self.objective(other, fitted)
                    if new < BETTER * value:
                        kinds, value, moved = other, new, True
                        break
        return kinds

    @staticmethod
    def _moves(kinds: tuple[str, ...], s: int, conds: bool, far: bool) -> Iterator[tuple[str, ...]]:
        """Plans of the same cost that differ in one move of evaluation s, by one or two or to anywhere. The first
        evaluation stays full.
        """

        def with_(*changes: tuple[int, str]) -> tuple[str, ...]:
            changed = dict(changes)
            return tuple(changed.get(k, kind) for k, kind in enumerate(kinds))

        if kinds[s] != RESULT:
            for other in range(1, len(kinds)) if far else (s - 2, s - 1, s + 1, s + 2):
                if 1 <= other < len(kinds) and kinds[other] != kinds[s]:
                    yield with_((s, kinds[other]), (other, kinds[s]))
        for other in range(1, len(kinds)) if conds else ():
            if kinds[s] == FULL and kinds[other] == RESULT:
                yield with_((s, COND), (other, COND))
            elif kinds[s] == kinds[other] == COND and s != other:
                yield with_((s, FULL), (other, RESULT))


def _pairs(row: np.ndarray) -> tuple[tuple[int, float], ...]:
    return tuple((int(q), float(row[q])) for q in np.flatnonzero(row))


# The offer ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Offer:
    """One way of saving work: a plan, or (plan None) the same sampler in `steps` steps. error: of the result, as a
    share of its size; predicted for a plan, measured for fewer steps.
    """

    saving: float
    error: float
    steps: int
    plan: ForecastPlan | None = None

    def __str__(self) -> str:
        what = f"{self.steps} steps are as good here" if self.plan is None else self.plan.letters()
        return f"{what}: {self.saving:.0%} of the work saved, {self.error:.1%} off"


def fits_of(recording: Recording) -> list[Fit]:
    """Fits to be tried: with weights alike for all prompts, and where that takes no more than a second or two, with the
    difference between prompts apart and steps for the positive prompt alone.
    """
    apart = recording.guidance != 1 and len(recording) <= MOST_APART
    return [Fit(recording), *([Fit(recording, apart=True)] if apart else [])]


def best_of(fits: Sequence[Fit], cost: float) -> Fitted:
    """The plan with the least predicted error that costs at most so many full evaluations."""
    return min((fit.search(cost, conds=fit.apart) for fit in fits), key=lambda found: found.error)


def cheapest(fits: Sequence[Fit], error: float) -> Fitted:
    """The plan with the fewest full evaluations whose predicted error is at most so large. The first fit, which is
    quick, says how many; the others may do with fewer.
    """
    low, high = 1, len(fits[0].recording)
    thorough = high <= MOST_APART  # the run waits for it
    best = fits[0].search(high, thorough=thorough)  # the error falls as the cost rises
    while low < high:
        cost = (low + high) // 2
        found = fits[0].search(cost, thorough=thorough)
        if found.error <= error:
            high, best = cost, found
        else:
            low = cost + 1
    for fit in fits[1:]:
        while high > 1 and (found := fit.search(high - 1, conds=fit.apart)).error <= error:
            high, best = high - 1, found
    return best
