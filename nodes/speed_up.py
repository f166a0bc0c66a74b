"""Speed Up: leaves out evaluations of the network that the run can do without, chosen for the run that is coming."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import safetensors.numpy
import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.samplers import CFGGuider
from comfy_api.latest import io
from torch import Tensor

from ..asdm_core.forecast import Action, Adaptive, ForecastPlan, guided_within
from ..asdm_core.forecast_fit import Response, Statistics, cheapest, fits_of, tried
from ..asdm_core.profile import Circumstances, Profile, nearest
from ..asdm_core.steps import Steps
from .common import CATEGORY
from .engine import files
from .engine.adaptive import AdaptiveForecaster, probe_elements
from .engine.circumstances import adds_noise, draws_noise
from .engine.fingerprint import fingerprint, plain
from .engine.forecasts import (
    FORECAST,
    ForecastReport,
    Forecasts,
    bytes_of,
    features_of,
    forecaster,
    positives,
    response_of,
)
from .engine.network import architecture_of, blends
from .engine.on_model import with_technique
from .engine.regional import Regional
from .engine.technique import MEASURING, InRun, Log, Measured, Say, Start, Technique, technique_of

TABLE = Path(__file__).parent.parent / "models" / "forecasts.safetensors"
# Predicted error of the result, as a share of its size, that each position allows: about 43, 33 and 30 dB of PSNR to
# the full run on the emoji family with euler, 20 steps, CFG 7 (bench/results/inheritance.json).
LIKENESS = {"same to the eye": 0.015, "close": 0.0345, "same motif": 0.055}
CAREFUL = next(iter(LIKENESS))
AUTOMATIC, NO_PROFILE = "automatic", "none"
ADAPTIVE = Adaptive(threshold=0.1, max_run=1)  # where nothing is known of the run
KEPT = 6  # evaluations that a run remembers at most, whatever plan is chosen


@lru_cache(maxsize=1)
def shipped() -> Mapping[str, tuple[Statistics, ...]]:
    """What was measured on the emoji family, by the kind of sampler (see `kind_of`), then by guidance."""
    tensors = safetensors.numpy.load_file(TABLE)
    found: dict[str, tuple[Statistics, ...]] = {}
    for name in sorted({key.split(".")[0] for key in tensors}):
        kind = name.partition("-")[0]
        guidance, size = tensors[f"{name}.run"]
        sigmas, half = tensors[f"{name}.sigmas"].astype(float), tensors[f"{name}.factor"].astype(float)
        beside = tensors[f"{name}.beside"].astype(bool)
        statistics = Statistics(sigmas, half @ half.T, float(guidance), float(size), beside)
        found[kind] = (*found.get(kind, ()), statistics)
    return found


def noise_of(sampler) -> str:
    """What a sampler does on its way: adds no noise ("none"), some ("some"), or draws all of it anew ("all")."""
    if not draws_noise(sampler):
        return "none"
    return "all" if sampler.sampler_function.__name__ == "sample_lcm" else "some"


def kind_of(sampler, positions: Sequence[float]) -> str:
    """Which part of the table a sampler is like: by its noise, and whether it tries states beside its path.

    positions: of its evaluations, in steps.
    """
    noise = noise_of(sampler)
    beside = f"{noise} beside"
    return beside if tried(positions).any() and beside in shipped() else noise


def statistics_for(sampler, guidance: float, positions: Sequence[float]) -> Statistics:
    """The part of the table that a run is most like. positions: of its evaluations, in steps."""
    found = shipped()[kind_of(sampler, positions)]
    return min(found, key=lambda s: abs(np.log(max(guidance, 1e-3) / s.guidance)))


def positions_of(response: Response, sigmas: Tensor) -> list[float]:
    """Where the evaluations of a sampler lie in a run at these noise levels, in steps."""
    steps = Steps(sigmas.tolist())
    return [steps.at(float(sigma)).place for sigma in response.sigmas]


_plans: dict[tuple, ForecastPlan] = {}


def plan_for(likeness: str, sampler, sigmas: Tensor, guidance: float, model) -> ForecastPlan:
    """The plan for a run of one of the host's samplers. Raises ValueError where none can be found."""
    key = likeness, sampler_name(sampler), tuple(sigmas.tolist()), guidance, blends(model)
    if key not in _plans:
        found = response_of(sampler, sigmas, model)
        positions = positions_of(found, sigmas)
        recording = statistics_for(sampler, guidance, positions).recording(found, guidance, positions)
        fits = fits_of(recording, throw_exception_if_processing_interrupted)
        best = cheapest(fits, LIKENESS[likeness])
        if len(_plans) >= 64:
            _plans.clear()
        _plans[key] = replace(best.plan, steps=len(sigmas) - 1)
    return _plans[key]


def sampler_name(sampler) -> str:
    """What a sampler is called: its function, with its options where it has any."""
    function = getattr(sampler, "sampler_function", None)
    name = str(getattr(function, "__name__", type(sampler).__name__)).removeprefix("sample_")
    options = getattr(sampler, "extra_options", None)
    return f"{name} {plain(options)}" if options else name


def guidance_of(guider) -> float | None:
    """The CFG of a guider; None for one that has none, or several."""
    cfg = getattr(guider, "cfg", None)
    if not isinstance(cfg, int | float):
        return None
    # Those with a way of their own leave the 1 in place that it begins with.
    own = getattr(type(guider), "set_cfg", None) is not CFGGuider.set_cfg
    return None if own and cfg == 1 else float(cfg)


def circumstances(model, sampler, sigmas: Tensor, cfg: float, shape: Sequence[int]) -> Circumstances:
    """What a run is, as profiles know it. GRI and what is only measured do not change which plan is best."""

    def without(technique: Technique) -> bool:
        return technique.key in (Forecasts.key, Regional.key) or technique.order == MEASURING

    made = fingerprint(model, without)
    return Circumstances(made, sampler_name(sampler), tuple(sigmas.tolist()), cfg, (shape[-2], shape[-1]))


def known_profiles(say: Say) -> dict[str, Profile]:
    """All profiles by name; of files that are none it is said so."""
    found = {}
    for name in files.profiles():
        try:
            found[name] = files.read_profile(name)
        except ValueError as e:
            say(f"Speed Up: {e}", report=True)
    return found


@dataclass(frozen=True)
class SpeedUp(Technique):
    """Forecasts whose plan is chosen when the run is known: from a profile, the table that ships, or step by step.

    profile: name of one, AUTOMATIC or NO_PROFILE. start, end: guidance acts between them only, in 0..1 of the run.
    """

    likeness: str
    profile: str = "automatic"
    start: float = 0.0
    end: float = 1.0
    log: Log[ForecastReport] = field(default_factory=Log, compare=False)

    key: ClassVar[str] = Forecasts.key

    def check(self, model) -> None:
        architecture_of(model)  # not for other kinds of model

    def device_bytes(self, model, shape: Sequence[int], conds: Mapping[str, list]) -> int:
        itemsize = torch.empty((), dtype=model.model.get_dtype_inference()).element_size()
        watched = probe_elements(architecture_of(model), shape) * len(conds) * itemsize  # where the run itself decides
        return bytes_of(KEPT, shape, len(conds)) + watched + self._features_bytes(model, shape, conds)

    def _features_bytes(self, model, shape: Sequence[int], conds: Mapping[str, list]) -> int:
        """Of the features that the plans of profiles inherit at most."""
        profiles = {} if self.profile == NO_PROFILE else known_profiles(lambda *_, **__: None)
        most = 0
        for plan in (offer.plan for p in profiles.values() for offer in p.offers if offer.plan is not None):
            try:
                inherits = features_of(plan, model)
            except ValueError:  # for another kind of network; not used then
                continue
            most = max(most, inherits.device_bytes(model, shape, conds) if inherits else 0)
        return most

    def bind(self, start: Start, say: Say) -> InRun | None:
        if len(start.sigmas) < 2:  # a run of no steps, as one half of SplitSigmas may be
            self.log.last = None
            return None
        likeness, notes, sigmas = self.likeness, [], start.sigmas
        guidance = guidance_of(start.guider)
        if guidance is None:
            likeness, guidance = CAREFUL, 7.0
            notes.append(f"the guider has no single CFG to go by, so the run is kept {likeness}")
        plan, source, why = self._from_profile(start, guidance, likeness, notes, say), "a profile", ""
        if plan is None:
            source = "the plans that ship"
            try:
                plan = plan_for(likeness, start.sampler, sigmas, guidance, start.model)
            except ValueError as e:
                function = getattr(start.sampler, "sampler_function", None)
                if function is None or not adds_noise(start.sampler):
                    say(
                        f"Speed Up: {e}, so each step is left out or made by how little the network's first layer has "
                        "changed, which is careful.",
                        report=True,
                    )
                    own = sigmas.tolist(), positives(start.guider), say, (self.start, self.end)
                    return AdaptiveForecaster(ADAPTIVE, self.log, *own)
                plan, why = ForecastPlan((Action(),) * max(len(sigmas) - 1, 1)), str(e)
        if set(plan.letters()) == {"F"}:
            why = why or f"none can be left out of this run that stays {likeness}"
            notes.append(f"every step is computed: {why}")
        if (self.start, self.end) != (0, 1):
            plan = guided_within(plan, self.start, self.end)
        part = forecaster(plan, self.log, start, say)
        for note in notes:
            part.note(note)
        say(f"Speed Up, {likeness}, by {source}: {plan.letters()}", report=True)
        return part

    def _from_profile(self, start: Start, guidance: float, likeness: str, notes: list[str], say: Say):
        """The plan of the profile that fits or was chosen; None where there is none."""
        if self.profile == NO_PROFILE:
            return None
        profiles = known_profiles(say)
        chosen = self.profile if self.profile in profiles else None
        if self.profile != AUTOMATIC and chosen is None:
            notes.append(f"the profile {self.profile} is not used: it is not there any more, or cannot be read")
        if chosen is None and not profiles:
            return None
        try:
            run = circumstances(start.model, start.sampler, start.sigmas, guidance, start.shape)
        except ValueError as e:  # no profile can be for such a run
            if chosen is not None:
                notes.append(f"the profile {chosen} is not used: {e}")
            return None
        alike = [name for name, p in profiles.items() if p.made_for.same_steps(run)]
        if self.profile == AUTOMATIC:
            chosen = nearest(profiles, run)
            if chosen is None and alike:
                closest = min(alike, key=lambda name: profiles[name].made_for.distance(run))
                say(
                    f"Speed Up: the profile {closest} was made {profiles[closest].made_for.differences(run)[0]}, so "
                    "it is not used; choose it on the node to use it all the same.",
                    report=True,
                )
        if chosen is None:
            return None
        profile, differences = profiles[chosen], profiles[chosen].made_for.differences(run)
        if chosen not in alike:
            notes.append(f"the profile {chosen} is not used: it was made {differences[0]}")
            return None
        if differences:
            notes.append(f"the profile {chosen} was made {'; '.join(differences)}, so the likeness may be another")
        fewer = profile.fewer_steps(LIKENESS[likeness])
        if fewer is not None:
            say(
                f"Speed Up: {fewer.steps} steps are as good here as leaving steps out, says the profile {chosen}.",
                report=True,
            )
        offer = profile.plan(LIKENESS[likeness])
        plan = offer.plan if offer and offer.plan else ForecastPlan((Action(),) * profile.made_for.steps)
        try:
            features_of(plan, start.model)
        except ValueError as e:
            notes.append(f"the profile {chosen} is not used, it is for another kind of network: {e}")
            return None
        say(f"Speed Up: profile {chosen}, learned from {profile.pictures} pictures.", report=True)
        return plan

    def label(self) -> str:
        return f"Speed Up ({self.likeness})"

    def saved(self, measured: Measured) -> list[tuple[str, float, str]]:
        seconds = measured.shorter(FORECAST)
        return [] if seconds is None else [("Speed Up", seconds, "measured")]

    def tells(self, model) -> list[str]:
        return [
            f"Speed Up is on ({self.likeness}): steps that can be foretold are not computed; bypass it to leave it off."
        ]


def state_of_profiles(profile: str = AUTOMATIC) -> list:
    """What changes with the files that runs may take their plans from: which of them is known when a run begins."""
    read = files.profiles() if profile == AUTOMATIC else [] if profile == NO_PROFILE else [profile]
    return [[name, *files.changed(files.profile_path, name)] for name in read]


def with_speed_up(model, technique: SpeedUp, large_pictures: bool = True):
    """A clone of MODEL with Speed Up; with GRI attention for large pictures, unless somebody has set that already or
    the picture is to stay the same.
    """
    model = with_technique(model, technique)
    if large_pictures and technique.likeness != CAREFUL and technique_of(model, Regional) is None:
        return with_technique(model, Regional())
    return model


class ASDMSpeedUp(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ASDMSpeedUp",
            display_name="Speed Up",
            category=CATEGORY,
            description="Makes any SD1.5, SD2 or SDXL model faster without training: steps that can be foretold from "
            "those before are not computed. Put it between the model and the sampler. It looks at the sampler, the "
            "noise levels and the CFG of the run and leaves out as much as stays alike. A profile made by Calibrate "
            "that fits is taken by itself.",
            search_aliases=[
                "faster",
                "accelerate",
                "optimize",
                "optimise",
                "performance",
                "quick",
                "cache",
                "skip steps",
                "easycache",
                "deepcache",
                "spectrum",
            ],
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input(
                    "likeness",
                    options=list(LIKENESS),
                    default="close",
                    tooltip="How like the picture of all steps the result is to be. Samplers that add noise at every "
                    "step (ancestral and SDE) can leave out less.",
                ),
                io.Combo.Input(
                    "profile",
                    options=[AUTOMATIC, NO_PROFILE, *files.profiles()],
                    default=AUTOMATIC,
                    optional=True,
                    advanced=True,
                    tooltip="automatic: one from models/asdm_profiles that was made by Calibrate for this model, "
                    "sampler, noise levels and about this CFG, if there is one; of several, one for about this size. "
                    "none: the plans that ship. Or one of your own.",
                ),
                io.Boolean.Input(
                    "large_pictures",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Also plays GRI Attention in pictures that are large enough for it to pay, except at same "
                    "to the eye.",
                ),
                io.Float.Input(
                    "guidance_start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="Before this part of the run there is no guidance: only the positive prompt is computed. "
                    "Changes the picture.",
                ),
                io.Float.Input(
                    "guidance_end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="From this part of the run on there is no guidance: only the positive prompt is computed. "
                    "Changes the picture.",
                ),
            ],
            outputs=[io.Model.Output()],
            not_idempotent=True,  # it speaks in runs: what another node like it has made would speak there
        )

    @classmethod
    def fingerprint_inputs(cls, profile=AUTOMATIC, **_):
        return state_of_profiles(profile)

    @classmethod
    def execute(cls, model, likeness, profile=AUTOMATIC, large_pictures=True, guidance_start=0.0, guidance_end=1.0):
        if guidance_end < guidance_start:
            raise ValueError(
                f"guidance_end is {guidance_end:g} and guidance_start {guidance_start:g}; the end comes after the "
                "start."
            )
        if profile not in (AUTOMATIC, NO_PROFILE):
            files.read_profile(profile)  # what is no profile ends here, in a sentence
        technique = SpeedUp(likeness, profile, guidance_start, guidance_end)
        return io.NodeOutput(with_speed_up(model, technique, large_pictures))
