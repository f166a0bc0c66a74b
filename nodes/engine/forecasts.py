"""Whole-step forecasts in a run: which calls of the network are made, and what is returned in place of the others.

Everything stands around the host's calc_cond_batch, which gives one denoised result for each list of conds, with areas,
masks and ControlNets already in it. What is remembered is v of such a result (see `asdm_core.forecast`). A result is
forecast only if for every list that is asked for the evaluations that the plan draws on are remembered, made under the
circumstances of now; in any other case the call is made in full.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import torch
from comfy.model_sampling import CONST
from torch import Tensor

from ...asdm_core.forecast import (
    COND,
    FEATURES,
    FULL,
    RESULT,
    TOLERANCE,
    UNGUIDED,
    Action,
    ForecastPlan,
    Weights,
    denoised_of,
    line,
    v_of,
)
from ...asdm_core.forecast_fit import Recording, Response, Statistics, gram_of, response, tried
from ...asdm_core.steps import Moment
from . import feature_cache
from .circumstances import adds_noise, draws_noise, of_call
from .inheritance import FORECASTS, Inheritance
from .network import architecture_of, blends
from .technique import InRun, Log, Measured, Say, Start, Technique, technique_of

FORECAST = "forecast"  # of evaluations of which something was not computed, in measurements


@dataclass
class ForecastReport:
    """What one run did. letters: one for each evaluation (see `ForecastPlan.letters`; "F" also where a forecast was
    planned and everything had to be computed). asked, computed: results of lists of conds. peak: bytes remembered at
    most. notes: what kept the plan from being carried out.
    """

    letters: str
    asked: int
    computed: int
    peak: int
    notes: tuple[str, ...] = ()

    @property
    def saving(self) -> float:
        """Share of the results that were not computed."""
        return 1 - self.computed / self.asked if self.asked else 0.0


@dataclass(frozen=True)
class Forecasts(Technique):
    """A forecast plan on a MODEL."""

    plan: ForecastPlan
    log: Log[ForecastReport] = field(default_factory=Log, compare=False)

    key: ClassVar[str] = FORECASTS

    def device_bytes(self, model, shape: Sequence[int], conds: Mapping[str, list]) -> int:
        inherits = features_of(self.plan, model)
        features = inherits.device_bytes(model, shape, conds) if inherits else 0
        return bytes_of(self.plan.remembered, shape, len(conds)) + features

    def bind(self, start: Start, say: Say) -> InRun | None:
        if len(start.sigmas) < 2:  # a run of no steps
            self.log.last = None
            return None
        return forecaster(self.plan, self.log, start, say)

    def label(self) -> str:
        return "forecasts"

    def tells(self, model) -> list[str]:
        return ["Whole steps are forecast by a fixed plan."]

    def saved(self, measured: Measured) -> list[tuple[str, float, str]]:
        seconds = measured.shorter(FORECAST)
        return [] if seconds is None else [("forecasts", seconds, "measured")]


def bytes_of(kept: int, shape: Sequence[int], conds: int) -> int:
    """Bytes that a run on latents of a shape (B, C, H, W) remembers with so many lists of conds, of which `kept`
    evaluations each are kept.
    """
    return kept * conds * math.prod(shape) * 4  # float32


def features_of(plan: ForecastPlan, model) -> Inheritance | None:
    """What inherits the features of a plan's evaluations on a MODEL; None where it has no such evaluations."""
    if not any(action.kind == FEATURES for action in plan.actions):
        return None
    features = plan.features(architecture_of(model).config)
    return Inheritance(features) if features else None


def forecaster(plan: ForecastPlan, log: Log[ForecastReport], start: Start, say: Say) -> Forecaster:
    """A plan in a run, with the features that it inherits."""
    found = Forecaster(plan, log, start.sigmas.tolist(), positives(start.guider), say)
    inherits = features_of(found.plan, start.model)
    if inherits and technique_of(start.model, Inheritance):
        found.note("the MODEL has Feature Inheritance, whose plan stands; the features of this one are left out")
    elif inherits:
        found.brings = (inherits,)
        full = inherits.plan.schedule.steps
        if any(
            a.kind == FEATURES and int(p) in full for a, p in zip(found.plan.actions, found.plan.positions, strict=True)
        ):
            found.note("features are not kept in steps of which another evaluation is computed in full")
    return found


def positives(guider) -> frozenset:
    """The uuids of the conds that guidance is towards."""
    return frozenset(cond["uuid"] for cond in guider.conds.get("positive") or ())


def signal_at(sigma: float, model) -> float:
    """How much of the picture the latents of a network in a run hold at a noise level: x = signal x0 + sigma n."""
    return 1 - sigma if isinstance(model.model_sampling, CONST) else 1.0


def _controls(cond: Mapping) -> Iterator:
    """The ControlNets of a cond, the last one first."""
    control = cond.get("control")
    while control is not None:
        yield control
        control = control.previous_controlnet


class Same:
    """A thing that equals itself, and tensors that equal its own. Keeps it alive: a bare id may come to mean others."""

    __slots__ = ("thing",)

    def __init__(self, thing):
        self.thing = thing

    def __eq__(self, other) -> bool:
        a, b = self.thing, other.thing
        if a is b:
            return True
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            return False
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)

    __hash__ = None  # type: ignore[assignment]  # found by comparing alone


@dataclass
class Point:
    """v of one list of conds at one evaluation, and the circumstances it was made under.

    whole: whether all lists of the call were computed.
    """

    position: float
    v: Tensor
    circumstances: tuple
    whole: bool


@dataclass
class Track:
    """What is remembered of one list of conds: points by the number of their evaluation, the oldest first."""

    points: dict[int, Point] = field(default_factory=dict)

    def usable(self, circumstances: tuple) -> dict[int, Point]:
        return {k: point for k, point in self.points.items() if point.circumstances == circumstances}


class Forecaster(InRun):
    """Carries a plan out in one run. Holds no model."""

    def __init__(
        self, plan: ForecastPlan, log: Log[ForecastReport], sigmas: Sequence[float], positive: frozenset, say: Say
    ):
        self._log, self._positive, self._say = log, positive, say
        steps = max(len(sigmas) - 1, 1)
        self._notes: list[str] = []
        if plan.steps != steps:
            self.note(f"the plan is for {plan.steps} steps and was fitted to {steps}")
            plan = plan.for_steps(steps)
        self.plan = plan
        self._next = 0
        self._sigma, self._signal, self._position, self._number = 0.0, 1.0, 0.0, 0
        self._action = Action()
        self._unplanned = 0
        self._made_anyway: set[int] = set()  # evaluations that the plan forecasts
        self._forced: list[int] = []  # the last of them
        self._wanted = 1  # points of a straight line
        self._ordinals: Counter = Counter()
        self._tracks: dict[tuple, Track] = {}
        self._done: list[set[str]] = []
        self._asked = self._computed = self.peak = 0
        self._called = self._changed = False

    def note(self, text: str) -> None:
        """Something that a person should know about this run; once in the log and in the report."""
        if text not in self._notes:
            self._notes.append(text)
            self._say(f"whole-step forecasts: {text}.")

    # once per evaluation ----------------------------------------------------------------------------

    def begin_evaluation(self, moment: Moment) -> None:
        """An evaluation begins; it may come in several calls."""
        self._sigma, self._position = moment.sigma, moment.place
        self._number, action = self._decide(moment)
        self._action = action if self._sigma > 0 else Action()  # there is no v at 0
        self._ordinals.clear()
        self._done.append(set())
        points = {p for a, p in zip(self.plan.actions, self.plan.positions, strict=True) if a.computes}
        self._wanted = min(2, max(1, sum(p < self._position - TOLERANCE for p in points)))

    def _decide(self, moment: Moment) -> tuple[int, Action]:
        """Number of the evaluation that begins, and what is to become of it. Those that the plan has not count down
        from -1.
        """
        found = self.plan.find(self._position, self._next)
        if found is not None:
            self._next = found + 1
            return found, self.plan.actions[found]
        # A sampler that looks between the steps, or comes back: as its step does, in straight lines.
        before = [k for k, p in enumerate(self.plan.positions) if p <= self._position + TOLERANCE]
        kind = self.plan.actions[before[-1]].kind if before else FULL
        self._unplanned -= 1
        return self._unplanned, Action(kind if kind in (RESULT, COND, UNGUIDED) else FULL)

    @property
    def _planned(self) -> bool:
        return self._number >= 0

    @property
    def action(self) -> Action:
        """What the plan wants of this evaluation."""
        return self._action

    def evaluation_role(self) -> str:
        return FORECAST if self._done[-1] and "F" not in self._done[-1] else ""

    # once per call ----------------------------------------------------------------------------------

    def calc_cond_batch(self, executor, model, conds, x: Tensor, timestep: Tensor, model_options: dict) -> list[Tensor]:
        """The host's calc_cond_batch, or forecasts of what it would give."""
        self._called = True
        if not self._draws:
            return executor(model, conds, x, timestep, model_options)
        self._signal = signal_at(self._sigma, model)
        live = [i for i, cond in enumerate(conds) if cond and any(self._active(c) for c in cond)]
        for i in live:
            self._next_keyframes(model, conds[i], timestep, model_options)
        called = of_call(model_options.get("transformer_options", {}), self.around.gates, self._sigma)
        keys = {i: self._key(model, conds[i], x, called) for i in live}
        around = self.around.circumstances, called
        shown = {i: self.around.content.shown(keys[i], x) for i in live}
        now = {i: (*self._circumstances(conds[i]), around, shown[i]) for i in live}
        first = next((i for i in live if conds[i][0]["uuid"] in self._positive), None)
        self._asked += len(live)
        results = self._forecast(executor, model, conds, x, timestep, model_options, keys, now, first)
        if results is None:
            if self._action.kind != FULL and self._has_moved(keys, now):
                self.note(
                    "what is sampled shows something else from step to step (parts that move, or noise drawn anew, as "
                    "LCM does), and those steps are computed"
                )
            self._changed |= self._action.kind in (RESULT, COND) and self._was_made_otherwise(keys, now)
            results = executor(model, conds, x, timestep, model_options)
            self._computed += len(live)
            self._done[-1].add("f" if self._action.kind == FEATURES and self.brings else "F")
            self._remember(live, keys, now, x, results)
            results = self._corrected(keys, now, first, x, results)
        self.peak = max(self.peak, self.bytes())
        return results

    @property
    def _draws(self) -> bool:
        return any(action.kind in (RESULT, COND, UNGUIDED) for action in self.plan.actions)

    def _forecast(self, executor, model, conds, x, timestep, options, keys, now, first) -> list[Tensor] | None:
        """The results of a call of which some or all are not computed; None if all must be."""
        kind = self._action.kind
        others = [i for i in keys if i != first]
        if kind in (COND, UNGUIDED):
            if first is None or not others:
                return None  # nothing that could be left out
            differences: dict[int, Tensor | None] = dict.fromkeys(others)
            if kind == COND:
                differences = {i: self._difference(keys, now, first, i) for i in others}
                if any(d is None for d in differences.values()):
                    return None
            alone = [cond if i == first else None for i, cond in enumerate(conds)]
            results = executor(model, alone, x, timestep, options)
            self._computed += 1
            self._done[-1].add("c" if kind == COND else "u")
            v = self._v(x, results[first])
            for i in others:
                difference, its = differences[i], results[first]
                results[i] = its.clone() if difference is None else self._denoised(x, v - difference).to(its.dtype)
            self._remember([first], keys, now, x, results)
            return results
        if kind != RESULT:
            return None
        found = self._results(keys, now, first)
        if found is None:
            return None
        self._done[-1].add("r")
        return [
            self._denoised(x, found[i]).to(x.dtype) if i in found else torch.zeros_like(x) for i in range(len(conds))
        ]

    def _corrected(self, keys, now, first, x, results) -> list[Tensor]:
        """The results of a call that was made, with what the plan makes good in it; as they are where a forecast that
        the plan has before it was not one here, and in a run that has been computed in full so far: there is nothing to
        make good in it.
        """
        if not (self._planned and self._sigma > 0 and self.plan.corrects(self._number)):
            return results
        if all(done <= {"F"} for done in self._done):
            return results
        oldest = min(self.plan.sources(self._number), default=self._number)
        if any(oldest < k < self._number for k in self._made_anyway):
            return results
        found = self._results(keys, now, first)
        if found is None:
            return results
        return [
            self._denoised(x, found[i]).to(result.dtype) if i in found else result for i, result in enumerate(results)
        ]

    def _results(self, keys, now, first) -> dict[int, Tensor] | None:
        """v of each list as a sum of what is remembered; None where some of that is missing."""
        found: dict[int, Tensor | None] = {}
        apart, v = self._action.difference and first is not None, None
        if apart:
            found[first] = v = self._sum(self._tracks.get(keys[first]), now[first], self._action.weights)
        for i in keys:
            if i == first and apart:
                continue
            if apart:
                difference = self._difference(keys, now, first, i)
                found[i] = None if difference is None or v is None else v - difference
            else:
                weights = () if self._action.difference else self._action.weights
                found[i] = self._sum(self._tracks.get(keys[i]), now[i], weights)
        complete = {i: v for i, v in found.items() if v is not None}
        return complete if len(complete) == len(found) else None

    def _sum(self, track: Track | None, circumstances: tuple, weights: Weights) -> Tensor | None:
        usable = track.usable(circumstances) if track else {}
        weights = weights or self._straight(usable)
        if not weights or any(k not in usable for k, _ in weights):
            return None
        return sum(w * usable[k].v for k, w in weights)

    def _difference(self, keys, now, first: int, other: int) -> Tensor | None:
        """v of the positive list less that of another, as forecast for now."""
        mine, its = (self._tracks.get(keys[i]) for i in (first, other))
        if mine is None or its is None:
            return None
        usable, against = mine.usable(now[first]), its.usable(now[other])
        both = {k: point for k, point in usable.items() if k in against}
        weights = self._action.difference or self._straight(both)
        if not weights or any(k not in both for k, _ in weights):
            return None
        return sum(w * (usable[k].v - against[k].v) for k, w in weights)

    def _straight(self, points: dict[int, Point]) -> Weights:
        """The straight line through what is remembered; none where the plan would have had more points for it."""
        newest = [(k, point.position) for k, point in reversed(points.items()) if point.whole]
        weights = line(self._position, newest) if newest else ()
        return weights if len(weights) >= self._wanted else ()

    def _remember(self, computed, keys, now, x, results) -> None:
        if not self._sigma > 0:
            return
        needed = self.plan.live(self._next - 1) if self._next else frozenset()
        if not self._planned or len(computed) == len(keys) and self._action.kind not in (FULL, FEATURES):
            # Made though the plan knows nothing of it: the next straight lines start here.
            self._made_anyway.add(self._number)
            self._forced = [*[k for k in self._forced if k != self._number][-1:], self._number]
        if self._planned and self.plan.corrects(self._number):
            needed |= {self._number, *self.plan.sources(self._number)}
        keep, whole = {*needed, *self._forced}, len(computed) == len(keys)
        for i in computed:
            track = self._tracks.setdefault(keys[i], Track())
            if self._number in keep:
                track.points[self._number] = Point(self._position, self._v(x, results[i]), now[i], whole)
            track.points = {k: point for k, point in track.points.items() if k in keep}

    def _v(self, x: Tensor, denoised: Tensor) -> Tensor:
        return v_of(x, denoised, self._sigma, self._signal)

    def _denoised(self, x: Tensor, v: Tensor) -> Tensor:
        return denoised_of(x, v, self._sigma, self._signal)

    # circumstances ----------------------------------------------------------------------------------

    def _key(self, model, cond, x: Tensor, called: tuple) -> tuple:
        """What must be the same for two results to be of one list: the list (context windows and others make it anew,
        its conds keep their uuids), the model, the size, what is patched, the frames, and, as all that may be asked for
        more than once in an evaluation, how often it was.
        """
        patched, replaced, window, _ = called
        uuids = tuple(c["uuid"] for c in cond)
        base = (model, uuids, tuple(x.shape), x.dtype, replaced, patched, window)
        self._ordinals[base] += 1
        return (*base, self._ordinals[base])

    def _active(self, cond: dict) -> bool:
        """Whether the host would use a cond at this noise level."""
        return not (self._sigma > cond.get("timestep_start", math.inf) or self._sigma < cond.get("timestep_end", 0.0))

    def _circumstances(self, cond) -> tuple:
        """What must be as it was: which conds are active with which content, weight, area and mask, where control acts,
        the strengths of hook LoRAs.
        """
        found: list[tuple | None] = []
        for c in cond:
            if not self._active(c):
                found.append(None)
                continue
            content = [(name, Same(getattr(value, "cond", value))) for name, value in c.get("model_conds", {}).items()]
            controls = []
            for control in _controls(c):
                high, low = control.timestep_range or (math.inf, -math.inf)
                keyframe = getattr(control, "_current_timestep_keyframe", None)
                acts = low <= self._sigma <= high and bool(getattr(keyframe, "strength", 1))
                controls.append((Same(control), acts, control.strength))
            hooks = c.get("hooks")
            found.append(
                (
                    content,
                    controls,
                    c.get("strength", 1.0),
                    c.get("mask_strength", 1.0),
                    tuple(c.get("area") or ()),
                    Same(c.get("mask")),
                    tuple(hook.strength for hook in hooks.hooks) if hooks else (),
                )
            )
        return tuple(found)

    def _next_keyframes(self, model, cond, timestep, model_options) -> None:
        # The host counts evaluations by the first of these calls, and Advanced-ControlNet by the second, each noise
        # level once; a forecast one would be missing.
        for c in cond:
            if not self._active(c):
                continue
            if c.get("hooks") is not None:
                model.current_patcher.prepare_hook_patches_current_keyframe(timestep, c["hooks"], model_options)
            for control in _controls(c):
                if callable(advance := getattr(control, "prepare_current_timestep", None)):
                    advance(timestep, model_options.get("transformer_options", {}))

    def _was_made_otherwise(self, keys, now) -> bool:
        """Whether something that is asked for is remembered under other circumstances alone."""
        known = [(self._tracks[keys[i]], now[i]) for i in keys if keys[i] in self._tracks]
        return any(track.points and not track.usable(circumstances) for track, circumstances in known)

    def _has_moved(self, keys, now) -> bool:
        """Whether something remembered would be of use if it showed the same part of the latent: windows that move."""
        return any(
            point.circumstances[:-1] == now[i][:-1] and point.circumstances[-1] != now[i][-1]
            for i in keys
            if keys[i] in self._tracks
            for point in self._tracks[keys[i]].points.values()
        )

    # the sheet --------------------------------------------------------------------------------------

    def bytes(self) -> int:
        """Bytes held at the moment."""
        return feature_cache.bytes_of(point.v for track in self._tracks.values() for point in track.points.values())

    def sample(self, call: Callable):
        out = call()
        if self._asked:
            saved = 1 - self._computed / self._asked
            self._say(
                f"{self._computed} of {self._asked} evaluations of the network were made, {saved:.0%} left out.",
                report=True,
            )
            if not saved and not self._notes and self._changed:
                self.note(
                    "prompts, controls or what another node patches change from step to step, and of a step before "
                    "such a change nothing is forecast, so every step was computed"
                )
            elif not saved and not self._notes and any(action.kind == RESULT for action in self.plan.actions):
                self.note(
                    "the steps that its plan leaves out are not played by this model, or draw on steps from before it, "
                    "or a pack on it, began to play, so every step was computed"
                )
        elif self._draws and self._done and not self._called:
            self.note(
                "another node on this MODEL asks the network for its results by a way of its own, past ComfyUI's, so "
                "every step was computed. Bypass that node"
            )
        return out

    def close(self) -> None:
        letters = "".join("F" if "F" in done or not done else min(done) for done in self._done)
        self._log.last = ForecastReport(letters, self._asked, self._computed, self.peak, tuple(self._notes))
        self._tracks.clear()


# Measuring ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded(Technique):
    """Stands on a MODEL where its forecasts would: its next run computes everything and is recorded."""

    results: RecordedRun = field(default_factory=lambda: RecordedRun(), compare=False)

    key: ClassVar[str] = Forecasts.key

    def bind(self, start: Start, say: Say) -> InRun:
        self.results.begin(positives(start.guider))
        return self.results


class RecordedRun(InRun):
    """The results of all evaluations of one run, in main memory."""

    def __init__(self):
        self.begin(frozenset())

    def begin(self, positive: frozenset) -> None:
        self._positive, self._sigma = positive, 0.0
        self.cond: list[Tensor] = []
        self.difference: list[Tensor] = []
        self.sigmas: list[float] = []
        self.positions: list[float] = []

    def begin_evaluation(self, moment: Moment) -> None:
        self._sigma = moment.sigma
        self.sigmas.append(moment.sigma)
        self.positions.append(moment.place)

    def calc_cond_batch(self, executor, model, conds, x, timestep, model_options):
        results = executor(model, conds, x, timestep, model_options)
        first = next((i for i, c in enumerate(conds) if c and c[0]["uuid"] in self._positive), None)
        if first is not None and len(self.cond) < len(
            self.sigmas
        ):  # the first call of an evaluation; others are guidance
            signal = signal_at(self._sigma, model)
            cond = v_of(x, results[first], self._sigma, signal).float()
            other = next((i for i, c in enumerate(conds) if c and i != first), None)
            difference = torch.zeros_like(cond)
            if other is not None:
                difference = cond - v_of(x, results[other], self._sigma, signal).float()
            self.cond.append(cond.cpu())
            self.difference.append(difference.cpu())
        return results

    def statistics(self, guidance: float, size: float) -> Statistics:
        """What was recorded, for runs of other samplers and steps."""
        self._check()
        gram = gram_of(self.cond, self.difference)
        return Statistics(np.array(self.sigmas), gram, guidance, size, tried(self.positions))

    def recording(self, response: Response, guidance: float, size: float) -> Recording:
        """What was recorded, for runs like it; response: of its sampler."""
        self._check()
        gram = gram_of(self.cond, self.difference)
        return Recording(response, gram, guidance, tuple(self.positions), size, len(self.cond[0]))

    def _check(self) -> None:
        if not self.cond or len(self.cond) != len(self.sigmas):
            raise ValueError(
                "this run cannot be recorded: its guider does not ask for the positive prompt's result once in every "
                "evaluation. Calibrate with an ordinary guider."
            )


def response_of(sampler, sigmas: Tensor, model) -> Response:
    """The response of one of the host's samplers at these noise levels; model: the MODEL it samples.

    Noise that a sampler draws on its way moves nothing here: what is asked is how a result moves while the noise stays.
    Raises ValueError for samplers that are not the host's own, or are not linear.
    """
    function = getattr(sampler, "sampler_function", None)
    if function is None or not function.__module__.startswith("comfy."):
        raise ValueError(
            f"{getattr(function, '__name__', type(sampler).__name__)} is not one of ComfyUI's own samplers"
        )
    options = dict(sampler.extra_options)
    name = function.__name__.removeprefix("sample_").removesuffix("_function")

    def sample(denoise, rows):
        x = torch.zeros(rows, 1, 1, 1)
        if adds_noise(sampler):
            options["noise_sampler"] = lambda *_: torch.zeros_like(x)
        with torch.random.fork_rng(devices=[]):
            # Its own noise levels: some samplers change those they are given.
            given = _Denoiser(denoise, model), x, nodes.clone()
            try:
                out = function(*given, extra_args={}, callback=None, disable=True, **options)
            except (TypeError, AttributeError, IndexError, RuntimeError, KeyError) as error:
                raise ValueError(f"{name} wants more of a model than its results, as samplers of CFG++ do") from error
        return out.flatten().numpy()

    nodes = sigmas.detach().cpu().float()
    with torch.no_grad():
        found = response(sample)
    if any(np.abs(found.sigmas - s).min(initial=np.inf) > 1e-4 * s for s in nodes[:-1].tolist()):
        raise ValueError(f"{name} evaluates the network at noise levels of its own, which no plan foresees")
    beside = len(found) >= len(nodes) or function.__name__.startswith("sample_unipc")  # its corrector
    return replace(found, noisy=draws_noise(sampler), beside=beside, blends=blends(model))


class _Denoiser:
    """A function in the place of a model, as samplers call one."""

    def __init__(self, denoise, model):
        self.denoise = denoise
        # The sampling of the run: what is patched on the MODEL is not on its network yet.
        base = SimpleNamespace(model_sampling=model.get_model_object("model_sampling"))
        self.inner_model = SimpleNamespace(inner_model=base, model_patcher=model)

    def __call__(self, x, sigma, **_):
        found = self.denoise(x.flatten().numpy(), float(sigma.flatten()[0]))
        return torch.from_numpy(found).to(x).reshape(x.shape)
