"""Feature inheritance on a MODEL and in its runs; what is remembered lies in a `FeatureCache` for each UNet."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ...asdm_core.inheritance import COMPUTED, DIALS, INHERITED, PARTLY, Plan, cache_elements
from ...asdm_core.steps import Moment
from .feature_cache import REPLAY, FeatureCache
from .network import architecture_of
from .technique import (
    LEFT_OUT,
    REMEMBERING,
    InRun,
    Log,
    Measured,
    Say,
    Start,
    Technique,
    UNetInRun,
    spared,
    techniques_of,
)
from .timing import Recorder

FORECASTS = "forecasts"  # the key of techniques that leave out whole steps
FEW_STEPS = 8  # with fewer, each step changes too much for the next one to inherit


@dataclass
class InheritanceReport:
    """What one run did.

    counts: forwards by (step, mode). replayed: for each evaluation, whether all its forwards played from memory.
    seconds: (step, time) of each evaluation, with what the sampler does until the next. peak: bytes remembered at most.
    played: see `FeatureCache`; () where all was.
    """

    steps: int
    counts: Counter
    replayed: list[bool]
    seconds: list[tuple[int, float]]
    peak: int
    played: Sequence[bool | None] = ()

    def roles(self) -> tuple[str, ...]:
        """For each step, whether its forwards COMPUTED, INHERITED, or did so PARTLY; LEFT_OUT where it had none."""
        modes = [{mode for (step, mode), n in self.counts.items() if step == s and n} for s in range(self.steps)]
        return tuple(
            LEFT_OUT if not m else COMPUTED if REPLAY not in m else INHERITED if m == {REPLAY} else PARTLY
            for m in modes
        )

    def saving(self) -> float | None:
        """Measured share of time that was saved. None where nothing was inherited, or nothing else was measured. The
        first evaluation, in which the host still moves weights, is left out, and so is what others left out; where they
        did, only evaluations that were seen to play are full ones.
        """
        played = self.played or [True] * len(self.seconds)
        timed = list(zip(self.seconds, self.replayed, played, strict=False))[1:]
        short = [t for (_, t), replayed, _ in timed if replayed]
        full = [t for (_, t), replayed, ran in timed if not replayed and (ran or ran is None and False not in played)]
        less = spared(full, short)
        return None if less is None else less / (sum(t for (_, t), *_ in timed) + less)


@dataclass(frozen=True)
class Inheritance(Technique):
    """A plan on a MODEL, and how its features are kept: at most limit_mb of them (0: any number), on the CPU
    if asked.
    """

    plan: Plan
    limit_mb: int = 0
    on_cpu: bool = False
    log: Log[InheritanceReport] = field(default_factory=Log, compare=False)

    key: ClassVar[str] = "inheritance"
    order: ClassVar[int] = REMEMBERING
    role: ClassVar[str] = INHERITED

    def check(self, model) -> None:
        architecture = architecture_of(model)
        self.plan.reuse(architecture.config, architecture.cut)

    def cache_bytes(self, model, shape: Sequence[int], conds: int) -> int:
        """Bytes that it remembers in a run on latents of a shape (B, C, H, W), with so many conditionings."""
        itemsize = torch.empty((), dtype=model.model.get_dtype_inference()).element_size()
        return cache_elements(self.plan, architecture_of(model), *shape[-2:]) * shape[0] * conds * itemsize

    def device_bytes(self, model, shape: Sequence[int], conds: Mapping[str, list]) -> int:
        return 0 if self.on_cpu else self.cache_bytes(model, shape, sum(map(len, conds.values())))

    def bind(self, start: Start, say: Say) -> InRun | None:
        size = self.cache_bytes(start.model, start.shape, sum(map(len, start.conds.values())))
        if self.limit_mb and size > self.limit_mb * 2**20:
            say(
                f"feature inheritance is off in this run: it would remember {math.ceil(size / 2**20)} MB and the limit "
                f"is {self.limit_mb} MB. Raise the limit, or choose a plan that reuses less."
            )
            self.log.last = None
            return None
        steps = len(start.sigmas) - 1
        if steps > 0 and all(source == step for step, source in enumerate(self.plan.sources(steps))):
            say(f"feature inheritance does nothing in a run of {steps} steps: by its plan all of them are computed.")
        elif 0 < steps < FEW_STEPS:
            say(
                f"feature inheritance in a run of {steps} steps: with fewer than {FEW_STEPS}, "
                "neighbouring steps differ so much that the picture suffers."
            )
        forecast = any(technique.key == FORECASTS for technique in techniques_of(start.model))
        return _InRun(self, start.sigmas.tolist(), Recorder(start.model.load_device), say, forecast)

    def label(self) -> str:
        return f"{_title(self.plan)} inheritance"

    def tells(self, model) -> list[str]:
        return [
            f"Feature Inheritance is on ({_title(self.plan)}): Inheritance Plan shows its steps; "
            "bypass its node to leave it off."
        ]

    def saved(self, measured: Measured) -> list[tuple[str, float, str]]:
        seconds = measured.shorter(INHERITED)
        return [] if seconds is None else [("feature inheritance", seconds, "measured")]


def _title(plan: Plan) -> str:
    """What a plan is called on nodes: a dial's position, or what a custom plan does."""
    if plan.name in DIALS:
        return plan.name
    does = re.sub(r"deepcache-(\d+)", r"DeepCache branch \1", plan.name)
    return f"custom ({does})" if does else "custom"


class _InRun(InRun):
    def __init__(self, inheritance: Inheritance, sigmas: list[float], recorder: Recorder, say: Say, forecast: bool):
        self._forecast = forecast  # whether whole steps are forecast beside it
        self._inheritance, self._sigmas, self._recorder, self._say = inheritance, sigmas, recorder, say
        self._caches: list[FeatureCache] = []
        self._step = 0

    def at(self, unet: UNetInRun, model) -> FeatureCache:
        inheritance = self._inheritance
        self._caches.append(
            FeatureCache(inheritance.plan, unet.config, unet.cut, self._sigmas, inheritance.on_cpu, self.around.content)
        )
        return self._caches[-1]

    def begin_evaluation(self, moment: Moment) -> None:
        self._step = moment.step

    def predict(self, call: Callable, x: Tensor, timestep: Tensor, options: dict, seed):
        with self._recorder.evaluation(self._step):
            out = call(x, timestep, options, seed)
        for cache in self._caches:
            cache.end_evaluation()
        return out

    def evaluation_role(self) -> str:
        return INHERITED if self._caches[0].replays() else ""

    def sample(self, call: Callable):
        out = call()
        if self._caches and not self.around.passed_by:
            self._compare_with_plan(self._caches[0])
        return out

    def _compare_with_plan(self, cache: FeatureCache) -> None:
        """Say so where a run that came to its end inherited much less than its plan wanted, whatever the cause."""
        if cache.several:
            self._say(
                "feature inheritance: another node runs the network more than once in each step (a reference), so all "
                "steps were computed in full. Use Speed Up, which leaves out whole steps."
            )
            return
        plan, ran = self._inheritance.plan, {step for (step, _), n in cache.counts.items() if n}
        if plan.schedule.mode == "adaptive" and not cache.moved:
            return
        planned = {step for step, source in enumerate(plan.sources(cache.steps)) if source < step}
        wanted = planned & ran
        if cache.moved:
            self._say(
                f"feature inheritance: {cache.moved} calls of the network showed another part of the picture than the "
                "same call a step before (windows of frames or tiles that move, latents that are shifted), and were "
                "computed in full."
            )
            return
        got = {step for (step, mode), n in cache.counts.items() if n and mode == REPLAY}
        if False in cache.played and len(planned & got) < len(planned) / 2:
            who, use = (
                ("Speed Up", "Use one of the two; Speed Up saves more.")
                if self._forecast
                else ("Another node (a cache, such as EasyCache)", "Use one of the two.")
            )
            self._say(
                f"feature inheritance: {len(planned & got)} of the {len(planned)} steps that the plan lets inherit "
                f"did. {who} leaves out such steps, or those whose features would be kept for them. {use}"
            )
            return
        if not wanted and cache.steps >= FEW_STEPS and (planned or plan.name in DIALS):  # of fewer it was warned
            self._say(
                f"feature inheritance had nothing to do in this run: of its {cache.steps} steps the plan lets "
                f"{len(planned)} inherit, and none of them was played by this model. Take more steps, another plan, or "
                "Speed Up."
            )
            return
        if wanted and cache.acts is False:
            self._say(
                "feature inheritance did nothing in this run: none of the layers that the plan names plays as it wants "
                "them (they are cut, attend to the text, or another node has changed them). Choose another plan."
            )
            return
        if len(wanted & got) < len(wanted) / 2:
            self._say(
                f"feature inheritance: {len(wanted & got)} of the {len(wanted)} steps that the plan lets inherit did. "
                "The calls of the network change from step to step in this run (parts of the picture that move, "
                "another node that patches layers or changes sizes), and then a step is computed in full."
            )

    def close(self) -> None:
        if not self._caches:
            self._inheritance.log.last = None
            return
        cache = self._caches[0]  # several where the work is split over devices; they do the same
        self._inheritance.log.last = InheritanceReport(
            cache.steps, cache.counts, cache.replayed(), self._recorder.until_next(), cache.peak, cache.played
        )
