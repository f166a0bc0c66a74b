"""Which evaluations to leave out, and the weights that stand for them, from a recorded run of the user's own model.

Errors of forecasts that are small one by one can add up along a run, so weights and schedule are chosen together, for
the error in the *result*: how far the result moves by an error of one evaluation is known from the sampler alone,
which is linear in the denoised results it is given (`Response`).

With e_s the error of v at a left-out evaluation s and T_s what becomes of it in the result, all weights of a run
minimise |sum_s T_s e_s|^2 + lambda sum_s T_s^2 |e_s|^2, one linear system over the Gram matrix of the recorded v.
A full evaluation after the first forecast has weights as well: it hands on its own v moved by earlier differences, so
that what the forecasts missed is made good once it is known better. The schedule is found by local search from many
beginnings, since joint errors cannot be taken apart by steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from .forecast import COND, FULL, RESULT, TOLERANCE, Action, ForecastPlan, line

LINEAR = 1e-3  # how far a result may be off the sum of what moves it, relative
LAMBDA = 0.2  # how much each error counts by itself, beside their sum
OWN = 0.5  # likewise each correction
# An error counts at least as this share of the farthest that it moves a latent. Where a sampler only looks ahead by a
# result (dpm_2), next to nothing of it comes to the end to first order; but the network is asked at that state.
LEAST = 0.05
POWER, POWER_NOISY = 0.4, 0.1  # of 1 / (1 + sigma^2): how much a computed result follows its latent; in noisy runs
# What errors come out as beside what is predicted of them, in the runs of bench/inheritance.py (see `strain`).
OVERRATED = 1.5  # so many times too large are those predicted of noisy runs, beside those of others
UNDERRATED = 1.6  # so many times too small are those of samplers that evaluate beside their path
LONG_GAPS = 1.1  # by so much of the prediction errors grow with the share that is left out, from a half on
GUIDED = 0.3  # exponent by which they grow with the guidance
LEAST_SIGNAL = 1e-4  # that latents are taken to hold of the picture
POINTS = 3  # earlier evaluations that a forecast is a sum of
# Prompts are told apart where that is predicted to lower the error to this share. Where it promises less, weights alike
# were mostly the better ones in the run: twice as many weights are the easier fitted to the recorded pictures alone.
APART_PAYS = 0.9
MOST_APART = 24  # evaluations of a run in which prompts are told apart
MOST_FAR, MOST_FAR_PATIENT = 32, 64  # of one in which searches begin from many schedules and move to anywhere
RIDGE = 3e-3
LOTS, FEW_LOTS = 12, 2  # schedules drawn by lot that a search begins from
KEPT = 3  # of what the descents from there have found
BETTER = 0.999  # a move is made where the objective falls below this share
SLOPE = 0.5  # logarithm of noise levels over which it is seen how v comes to the highest that is known
FARTHEST = 0.5  # what v is off at a state that is tried is thought to be at most this share of v
_AT_ONCE = 2**16  # numbers of a row that are in double precision at once


# The sampler ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Response:
    """How a sampler answers to the denoised results it is given, one evaluation at a time.

    sigmas: (N,) noise level of each evaluation. matrix: (N, N + 1); matrix[s, m] is how far the latent at evaluation m
    (N: the result) moves if the denoised result of evaluation s moves by 1 and all others stay. noisy: whether the
    sampler draws noise on its way. beside: whether it evaluates beside its path as well, at states it tries (two
    evaluations a step, or a corrector), whose results are less smooth from one evaluation to the next. blends: whether
    noise takes the place of the picture, x = (1 - sigma) x0 + sigma n (flow matching), instead of lying on it.
    """

    sigmas: np.ndarray
    matrix: np.ndarray
    noisy: bool = False
    beside: bool = False
    blends: bool = False

    def __len__(self) -> int:
        return len(self.sigmas)

    @property
    def signals(self) -> np.ndarray:
        """(N,) how much of the picture the latent of each evaluation holds, as in `forecast.v_of`."""
        # A latent of noise alone is the first of its run: nothing moves it, so that it is not quite 0 changes nothing.
        return np.maximum(1 - self.sigmas, LEAST_SIGNAL) if self.blends else np.ones(len(self))

    @property
    def levels(self) -> np.ndarray:
        """(N,) noise in proportion to the picture, which tells what v is at an evaluation."""
        return np.asarray(self.sigmas / self.signals)

    @cached_property
    def reach(self) -> np.ndarray:
        """(N,) how far the latent that an evaluation moves most goes, or the result, with an error of 1 in its v."""
        levels = self.levels
        return np.asarray(levels / np.sqrt(1 + levels**2) * np.abs(np.triu(self.matrix, 1)).max(1))


def response(sample: Callable[[Callable[[Any, Any], np.ndarray], int], Any]) -> Response:
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
            raise ValueError("this sampler chooses its noise levels by what it sees, so no plan can be made beforehand")
        seen.append(np.array(x, dtype=float))
        return np.array(moves[:, k])

    result = np.array(sample(denoise, n + 2), dtype=float)
    if len(seen) != n:
        raise ValueError("this sampler chooses its noise levels by what it sees, so no plan can be made beforehand")
    table = np.stack([*seen, result], axis=1)  # (n + 2, n + 1)
    matrix = table[:n] - table[n]
    off = np.abs(moves[-1] @ matrix - (table[-1] - table[n])).max()
    if not off <= LINEAR * max(1.0, np.abs(table[-1]).max()):
        raise ValueError(f"this sampler is not linear in the denoised results: {off:.2g} off their sum")
    return Response(np.array(sigmas), matrix)


def transfer(response: Response, computed: Sequence[bool], power: float | None = None) -> np.ndarray:
    """T (N,): what becomes in the result of an error of 1 in v at each evaluation.

    The latents after it move as the sampler answers, and what is denoised from them moves along: in proportion to the
    picture that they hold, of a left-out evaluation by 1 / (1 + level^2), as v is drawn on whatever the latent; of a
    computed one by that to a power (None: POWER, or POWER_NOISY). Where fresh noise is mixed in, an error of an early
    step was seen to stay and to make some pictures others, so there computed results follow nearly as far as it goes.
    """
    if power is None:
        power = POWER_NOISY if response.noisy else POWER
    levels = response.levels
    s2 = levels**2
    gain = np.where(np.asarray(computed, bool), (1 + s2) ** -power, 1 / (1 + s2)) / response.signals
    n = len(response)
    # carried[s] = matrix[s, n] + the sum over m > s of matrix[s, m] gain[m] carried[m]
    later = np.triu(response.matrix[:, :n], 1) * gain
    carried = np.linalg.solve(np.eye(n) - later, response.matrix[:, n])
    return np.asarray(-levels / np.sqrt(1 + s2) * carried)


def strain(response: Response, saving: float, guidance: float) -> float:
    """How many times as large as the sum of its forecasts' errors the error of a result is, beside that of a plan which
    leaves out half of a run at guidance 7.

    To first order it is that sum. Long gaps lead away from the recorded path, guidance magnifies what the network makes
    of a moved latent, and a sampler that tries states beside its path has results that no smooth line holds.
    """
    gaps = max(1.0, 1 + LONG_GAPS * (saving - 0.5))
    if response.noisy:  # single pictures go another way there whatever the guidance
        return gaps / OVERRATED
    return float(gaps * (UNDERRATED if response.beside else 1.0) * (max(guidance, 1.0) / 7) ** GUIDED)


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


def tried(positions: Sequence[float]) -> np.ndarray:
    """(N,) which evaluations are made at states that a sampler tries beside its path: those between two steps, and all
    but the last one at a step. positions: of the evaluations, in steps.
    """
    steps = [round(p) if abs(p - round(p)) < TOLERANCE else None for p in positions]
    last = {step: k for k, step in enumerate(steps)}
    return np.array([step is None or last[step] != k for k, step in enumerate(steps)])


@dataclass(frozen=True)
class Statistics:
    """What v of one model does over the noise levels, on the way of a run with guidance: enough to fit any run like it.

    sigmas: (M,) in the order of the run, close together. gram: (2M, 2M) as in `Recording`. guidance: of the runs
    recorded. size: root mean square of their results. beside: (M,) which of them a sampler tried beside its path (see
    `tried`); empty: none. Those of the path fall, and so do the others.
    """

    sigmas: np.ndarray
    gram: np.ndarray
    guidance: float
    size: float
    beside: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))

    def recording(self, response: Response, guidance: float, positions: Sequence[float]) -> Recording:
        """A recording of a run at other noise levels, with v between those of the statistics. Beneath them it stays;
        above them it is thought to go on as it came, and to be off from that by as much again, by chance (see
        `_above`).

        A state that a sampler tries is where one step with the denoised result held leads, so off the path it is by
        about the square of that step (see `_astray`): what v is off there, beside v of the path, is stretched by how
        much longer the run's step is than the recorded one.
        """
        known = np.log(self.sigmas)
        wanted = np.log(np.maximum(response.levels, 1e-6))
        off = self.beside if len(self.beside) else np.zeros(len(known), bool)
        ways = np.zeros((len(wanted), len(known)))
        ways[:, ~off] = _between(known[~off], wanted)
        if off.any():
            self._lead_off(ways, known, off, wanted, positions)
        above = _above(known[~off], wanted)
        farther = np.zeros_like(ways)
        farther[:, ~off] = above
        ways += farther
        both, beyond = np.kron(np.eye(2), ways), np.kron(np.eye(2), farther)
        unsure = np.kron(np.ones((2, 2)), np.eye(len(wanted))) * (beyond @ self.gram @ beyond.T)
        return Recording(response, both @ self.gram @ both.T + unsure, guidance, tuple(positions), self.size)

    def _lead_off(
        self, ways: np.ndarray, known: np.ndarray, off: np.ndarray, wanted: np.ndarray, positions: Sequence[float]
    ) -> None:
        """Move the rows (N, M) of states that are tried off the path."""
        both = np.kron([1, self.guidance - 1], np.eye(len(known)))
        guided = both @ self.gram @ both.T
        jumps = (known[:-1] - known[1:])[off[1:]]
        begin = wanted[0]
        for k, beside in enumerate(tried(positions)):
            if not beside:
                begin = wanted[k]
                continue
            path, way = ways[k].copy(), -ways[k]
            way[off] += _between(known[off], wanted[k : k + 1])[0]
            jump = np.interp(-wanted[k], -known[off], jumps)
            farthest = FARTHEST * (path @ guided @ path / max(way @ guided @ way, 1e-12)) ** 0.5
            ways[k] += min(_astray(max(begin - wanted[k], 0.0)) / _astray(jump), farthest) * way


def _above(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Weights (N, M) of what v has changed by since the first of falling points `known`, logarithms of noise levels, at
    those `wanted` that lie above it; 0 at others. A straight line over the angle whose tangent the level is: at much
    noise the denoised result changes with the reciprocal of the level.
    """
    rows = np.zeros((len(wanted), len(known)))
    angles, at = (np.arctan(np.exp(np.minimum(levels, 50))) for levels in (known, wanted))
    second = min(int(np.searchsorted(-known, SLOPE - known[0])), len(known) - 1)
    rows[:, 0] = np.maximum(at - angles[0], 0) / (angles[0] - angles[second])
    rows[:, second] = -rows[:, 0]
    return rows


def _astray(jump: Any) -> Any:
    """How far off its path a step with the denoised result held leads, up to a factor; jump: the logarithm by which the
    noise level falls. The result changes with the logarithm, and counts by the share of the noise that is taken away.
    """
    return jump * (1 - np.exp(-jump))


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
    """A plan with its weights. error: predicted, of the result, as a share of its size (see `strain`)."""

    plan: ForecastPlan
    saving: float
    error: float


@dataclass(frozen=True)
class _System:
    """The weights of one schedule as a linear system.

    acting: (S,) the evaluations with weights. base, truth: (S, 2, N), what stands for them before anything is fitted
    and what they are, of the positive prompt and the difference. ways: (D, 2, N) by which a base may be moved; owner:
    (D,) which one. t: (S,) what an error of each is in the result. counts: (S, S) how much products of two errors
    count. gram: (nodes, nodes); flat: from (S, 2, N) to (S, nodes).
    """

    acting: list[int]
    base: np.ndarray
    truth: np.ndarray
    ways: np.ndarray
    owner: np.ndarray
    t: np.ndarray
    counts: np.ndarray
    gram: np.ndarray
    flat: Callable[[np.ndarray], np.ndarray]

    def _before(self) -> np.ndarray:
        """(S, S) products of the errors before anything is fitted."""
        errors = self.flat(self.truth - self.base)
        return np.asarray(errors @ self.gram @ errors.T)

    def _solved(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(steps (D,) along the ways, the system (D, D), what it is to give (D,))."""
        flat = self.flat(self.ways)
        products = flat @ self.gram
        counts = self.counts[self.owner]
        system = counts[:, self.owner] * (products @ flat.T)
        wanted = (counts * (products @ self.flat(self.truth - self.base).T)).sum(1)
        diagonal = np.diag(system)
        steps = np.linalg.solve(system + np.diag(RIDGE * diagonal + 1e-14), wanted)
        return steps, system, wanted

    def objective(self) -> float:
        if not self.acting:
            return 0.0
        before = float((self.counts * self._before()).sum())
        if not len(self.ways):
            return before
        steps, system, wanted = self._solved()
        return before + float(steps @ (system @ steps - 2 * wanted))

    def forecasts(self) -> np.ndarray:
        """(S, 2, N), with the fitted weights."""
        if not len(self.ways):
            return self.base
        moved = self._solved()[0][:, None, None] * self.ways
        return np.asarray(self.base + np.stack([moved[self.owner == i].sum(0) for i in range(len(self.acting))]))


class PlanFit:
    """Fits weights and schedules to a recording.

    apart: the difference between prompts has weights of its own. power: see `transfer`. corrects: full evaluations make
    good what forecasts missed. between: called over and over while schedules are searched, which takes seconds in long
    runs; what it raises ends the search.
    """

    def __init__(
        self,
        recording: Recording,
        apart: bool = False,
        power: float | None = None,
        corrects: bool = True,
        between: Callable[[], None] = lambda: None,
    ):
        self.recording, self.apart, self._power, self._corrects = recording, apart, power, corrects
        self._between = between
        self._n = len(recording)
        n, w = self._n, recording.guidance - 1
        # With weights alike only the sum matters: v of the guided result.
        both = np.concatenate([np.eye(n), w * np.eye(n)], axis=1)
        self._guided = both @ recording.gram @ both.T
        self._known: dict[str, float] = {}
        self._lines: dict[tuple[Any, ...], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def weights(self, kinds: Sequence[str], fitted: bool = True) -> Fitted:
        """The plan that has these kinds of evaluation (full, result, cond), with its weights.

        fitted: otherwise all are straight lines, and nothing is made good.
        """
        system = self._system(tuple(kinds), fitted, self._corrects)
        actions = [Action(kind) for kind in kinds]
        for s, rows in zip(system.acting, system.forecasts(), strict=True):
            cond, difference = (_pairs(row) for row in rows)
            if kinds[s] == COND:
                actions[s] = Action(COND, difference=difference)
            else:
                actions[s] = Action(kinds[s], cond, difference if self.apart else ())
        plan = ForecastPlan(tuple(actions), self.recording.positions)
        size = self.recording.size or 1.0
        saving = plan.saving()
        error = max(system.objective(), 0.0) ** 0.5 / size
        return Fitted(plan, saving, error * strain(self.recording.response, saving, self.recording.guidance))

    def objective(self, kinds: Sequence[str]) -> float:
        """What the weights of these kinds of evaluation minimise, at its minimum, before anything is made good: that
        would double the system, and moves all schedules nearly alike.
        """
        key = "".join(kind[0] for kind in kinds)
        if key not in self._known:
            self._between()
            # By rounding it may fall below 0 where nothing is missed; of two such ones each would be the better.
            self._known[key] = max(self._system(tuple(kinds), fitted=True, corrects=False).objective(), 0.0)
        return self._known[key]

    def _system(self, kinds: tuple[str, ...], fitted: bool, corrects: bool) -> _System:
        missing = [s for s in range(self._n) if kinds[s] != FULL]
        first = missing[0] if missing and fitted and corrects else self._n
        acting = [s for s in range(self._n) if kinds[s] != FULL or s > first]
        answer = self.recording.response
        t = transfer(answer, [kind != RESULT for kind in kinds], self._power)[acting]
        alone = np.array([OWN if kinds[s] == FULL else LAMBDA for s in acting])
        alone *= np.maximum(t**2, (LEAST * answer.reach[acting]) ** 2)
        mixed = self.apart or COND in kinds
        gram, flat = (self.recording.gram, self._flat_apart) if mixed else (self._guided, self._flat_alike)
        found = [self._forecast(kinds, s) for s in acting]
        return _System(
            acting,
            np.stack([base for base, _, _ in found]) if found else np.zeros((0, 2, self._n)),
            np.stack([truth for _, truth, _ in found]) if found else np.zeros((0, 2, self._n)),
            np.concatenate([ways for _, _, ways in found]) if fitted and found else np.zeros((0, 2, self._n)),
            np.repeat(np.arange(len(found)), [len(ways) for _, _, ways in found] if fitted else 0),
            t,
            np.outer(t, t) + np.diag(alone),
            gram,
            flat,
        )

    def _flat_apart(self, rows: np.ndarray) -> np.ndarray:
        """(S, 2, N) as errors of the guided v over the nodes of the recording, (S, 2N)."""
        return np.concatenate([rows[:, 0], (self.recording.guidance - 1) * rows[:, 1]], axis=1)

    @staticmethod
    def _flat_alike(rows: np.ndarray) -> np.ndarray:
        return rows[:, 0]

    def _forecast(self, kinds: Sequence[str], s: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of an evaluation: what stands for it before anything is fitted (2, N), the straight line or its own result;
        what it is in truth (2, N); and the directions in which the first may be moved (D, 2, N).
        """
        both = tuple([q for q in range(s - 1, -1, -1) if kinds[q] == FULL][:POINTS])
        cond = tuple([q for q in range(s - 1, -1, -1) if kinds[q] in (FULL, COND)][:POINTS]) if self.apart else both
        key = kinds[s], s, both, cond
        if key not in self._lines:
            self._lines[key] = self._drawn(*key)
        return self._lines[key]

    def _drawn(
        self, kind: str, s: int, both: tuple[int, ...], cond: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        truth, base = np.zeros((2, 2, self._n))
        truth[1 if kind == COND else slice(None), s] = 1
        where = self.recording.positions
        if kind == FULL:
            base[:, s] = 1
            both, cond = (s, *both), (s, *cond)
        else:
            for row, points in ((0, cond), (1, both))[kind == COND :]:
                for q, weight in line(where[s], [(q, where[q]) for q in points]):
                    base[row, q] = weight
        ways: list[np.ndarray] = []

        def move(row: int | slice, points: Sequence[int]) -> None:
            for newer, older in zip(points, points[1:], strict=False):
                way = np.zeros((2, self._n))
                way[row, newer], way[row, older] = 1, -1
                ways.append(way)

        if self.apart and kind != COND:
            move(0, cond)
        move(1 if self.apart or kind == COND else slice(None), both)
        return base, truth, np.stack(ways) if ways else np.zeros((0, 2, self._n))

    # the schedule ------------------------------------------------------------------------------------

    def search(self, cost: float, conds: bool = False, lots: int = LOTS, far: bool = True) -> Fitted:
        """The best plan that costs at most as much as `cost` full evaluations.

        conds: also with evaluations for the positive prompt alone, which cost half of one. lots: schedules drawn by
        lot that the search begins from, beside two others. far: the best of what was found may move to anywhere, which
        takes longer by the square of the evaluations. Raises ValueError for less than one evaluation.
        """
        if cost < 1:
            raise ValueError(f"forecast: at least one evaluation must be made, got {cost:g}")
        full = min(int(cost), self._n)
        starts = {self._spread(full), *self._drawn_by_lot(full, lots), *([self._late(full)] if far else [])}
        found = self._best({self._descend(start, False) for start in starts})
        if far:
            found = self._best({self._descend(kinds, conds, far=True) for kinds in found})
        return min((self.weights(kinds) for kinds in found), key=lambda plan: plan.error)

    def _best(self, found: set[tuple[str, ...]]) -> list[tuple[str, ...]]:
        return sorted(sorted(found), key=self.objective)[:KEPT]

    def _drawn_by_lot(self, full: int, count: int) -> Iterator[tuple[str, ...]]:
        """Schedules to begin from, the same ones each time: descents end in many places, the best of them far apart."""
        rng = np.random.default_rng(full)
        for _ in range(count):
            chosen = {0, *(1 + rng.permutation(self._n - 1)[: full - 1]).tolist()}
            yield tuple(FULL if s in chosen else RESULT for s in range(self._n))

    def _late(self, full: int) -> tuple[str, ...]:
        """All full at first, then by turns; where that leaves too many, from the end on."""
        left_out = list(range(self._n - 1, 0, -2)) + list(range(self._n - 2, 0, -2))
        chosen = set(left_out[: self._n - full])
        return tuple(RESULT if s in chosen else FULL for s in range(self._n))

    def _spread(self, full: int) -> tuple[str, ...]:
        places = [min(int(self._n * (j / full) ** 1.3), self._n - 1) for j in range(full)]
        chosen = set(places)
        free = [s for s in range(self._n) if s not in places]
        chosen.update(free[: full - len(chosen)])
        return tuple(FULL if s in chosen else RESULT for s in range(self._n))

    def _descend(self, kinds: tuple[str, ...], conds: bool, far: bool = False) -> tuple[str, ...]:
        value = self.objective(kinds)
        moved = True
        while moved:
            moved = False
            for s in range(1, self._n):  # goes on after a move: the next one is likely to be near
                for other in self._moves(kinds, s, conds, far):
                    new = self.objective(other)
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


def fits_of(recording: Recording, between: Callable[[], None] = lambda: None) -> list[PlanFit]:
    """Fits to be tried: with weights alike for all prompts, and where that takes no more than a second or two, with the
    difference between prompts apart and steps for the positive prompt alone. between: see `PlanFit`.
    """
    apart = recording.guidance != 1 and len(recording) <= MOST_APART
    alike = PlanFit(recording, between=between)
    return [alike, *([PlanFit(recording, apart=True, between=between)] if apart else [])]


def best_of(fits: Sequence[PlanFit], cost: float, patient: bool = False) -> Fitted:
    """The plan with the least predicted error that costs at most so many full evaluations; one that tells prompts apart
    only where that pays.

    patient: long runs are searched as well as short ones, for seconds; else a picture waits for it.
    """
    far = len(fits[0].recording) <= (MOST_FAR_PATIENT if patient else MOST_FAR)
    lots = LOTS if far else FEW_LOTS
    found = [fit.search(cost, fit.apart, lots=lots, far=far) for fit in fits]
    pays = [plan.error / (APART_PAYS if fit.apart else 1) for plan, fit in zip(found, fits, strict=True)]
    return found[int(np.argmin(pays))]


def cheapest(fits: Sequence[PlanFit], error: float) -> Fitted:
    """The plan with the fewest full evaluations whose predicted error is at most so large. A quick search says about
    how many; the best of so many may do with fewer.
    """
    low, high = 1, len(fits[0].recording)
    while low < high:
        cost = (low + high) // 2
        if fits[0].search(cost, lots=0, far=False).error <= error:
            high = cost
        else:
            low = cost + 1
    best = best_of(fits, high)
    while high > 1 and (found := best_of(fits, high - 1)).error <= error:
        high, best = high - 1, found
    return best
