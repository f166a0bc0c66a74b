"""Speed Up: leaves out evaluations of the network that the run can do without, chosen for the run that is coming."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import safetensors.numpy
from comfy_api.latest import io
from torch import Tensor

from ..asdm_core.forecast import Action, ForecastPlan
from ..asdm_core.forecast_fit import Fit, Fitted, Response, Statistics
from ..asdm_core.steps import Steps
from .common import CATEGORY
from .engine.forecasts import Forecaster, ForecastReport, Forecasts, bytes_of, positives, response_of
from .engine.network import architecture_of
from .engine.on_model import with_technique
from .engine.technique import InRun, Log, Say, Start, Technique

TABLE = Path(__file__).parent.parent / "models" / "forecasts.safetensors"
# Predicted error of the result, as a share of its size, that each position allows: about 40, 32 and 26 dB of PSNR to
# the full run on the emoji family at CFG 7 (bench/results/forecasts.json).
LIKENESS = {"same to the eye": 0.015, "close": 0.03, "same motif": 0.055}
KEPT = 4  # evaluations that a run remembers at most, whatever plan is chosen


@lru_cache(maxsize=1)
def shipped() -> tuple[Statistics, ...]:
    """What was measured on the emoji family, by guidance."""
    tensors = safetensors.numpy.load_file(TABLE)
    found = []
    for name in sorted({key.split(".")[0] for key in tensors}):
        guidance, size = tensors[f"{name}.run"]
        sigmas, half = tensors[f"{name}.sigmas"].astype(float), tensors[f"{name}.factor"].astype(float)
        found.append(Statistics(sigmas, half @ half.T, float(guidance), float(size)))
    return tuple(found)


def cheapest(fit: Fit, error: float) -> Fitted:
    """The plan with the fewest full evaluations whose predicted error is at most so large."""
    n = len(fit.recording)
    low, high, best = 1, n, fit.search(n)  # the error falls as the cost rises
    while low < high:
        cost = (low + high) // 2
        found = fit.search(cost)
        if found.error <= error:
            high, best = cost, found
        else:
            low = cost + 1
    return best


def positions_of(response: Response, sigmas: Tensor) -> list[float]:
    """Where the evaluations of a sampler lie in a run at these noise levels, in steps."""
    steps = Steps(sigmas.tolist())
    return [steps.at(float(sigma)).place for sigma in response.sigmas]


_plans: dict[tuple, tuple[ForecastPlan, float]] = {}


def plan_for(likeness: str, sampler, sigmas: Tensor, guidance: float, model) -> ForecastPlan:
    """The plan for a run of one of the host's samplers. Raises ValueError where none can be found."""
    key = likeness, sampler.sampler_function, tuple(sampler.extra_options.items()), tuple(sigmas.tolist()), guidance
    if key not in _plans:
        found = response_of(sampler, sigmas, model)
        nearest = min(shipped(), key=lambda s: abs(np.log(max(guidance, 1e-3) / s.guidance)))
        best = cheapest(Fit(nearest.recording(found, guidance, positions_of(found, sigmas))), LIKENESS[likeness])
        if len(_plans) >= 64:
            _plans.clear()
        _plans[key] = best.plan, best.error
    return _plans[key][0]


@dataclass(frozen=True)
class SpeedUp(Technique):
    """Forecasts whose plan is chosen when the run is known."""

    likeness: str
    log: Log[ForecastReport] = field(default_factory=Log, compare=False)

    key: ClassVar[str] = Forecasts.key

    def check(self, model) -> None:
        architecture_of(model)  # not for other kinds of model

    def device_bytes(self, model, shape: Sequence[int], conds: Mapping[str, list]) -> int:
        return bytes_of(KEPT, shape, len(conds))

    def bind(self, start: Start, say: Say) -> InRun:
        likeness, notes, sigmas = self.likeness, [], start.sigmas
        guidance = getattr(start.guider, "cfg", None)
        if guidance is None:
            likeness, guidance = next(iter(LIKENESS)), max(s.guidance for s in shipped())
            notes.append(f"the guider has no CFG to go by, so the run is kept {likeness}")
        try:
            plan = plan_for(likeness, start.sampler, sigmas, float(guidance), start.model)
        except ValueError as e:
            plan = ForecastPlan((Action(),) * max(len(sigmas) - 1, 1))
            notes.append(f"every step is computed: {e}")
        else:
            if not plan.saving():
                notes.append(f"every step is computed: none can be left out of this run that stays {likeness}")
        forecaster = Forecaster(plan, self.log, sigmas.tolist(), positives(start.guider), say)
        for note in notes:
            forecaster.note(note)
        logging.info(f"asdm: Speed Up, {likeness}: {plan.letters()}, {plan.saving():.0%} of the steps left out")
        return forecaster

    def label(self) -> str:
        return f"Speed Up ({self.likeness})"

    def tells(self, model) -> list[str]:
        return [
            f"Speed Up is on ({self.likeness}): steps that can be foretold are not computed; bypass it to leave it off."
        ]


class ASDMSpeedUp(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ASDMSpeedUp",
            display_name="Speed Up",
            category=CATEGORY,
            description="Makes any SD1.5, SD2 or SDXL model faster without training: steps that can be foretold from "
            "those before are not computed. Put it between the model and the sampler. It looks at the sampler, the "
            "noise levels and the CFG of the run and leaves out as much as stays alike.",
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
                    "step (ancestral and SDE) compute every step, whatever you choose.",
                ),
            ],
            outputs=[io.Model.Output()],
            not_idempotent=True,  # it speaks in runs: what another node like it has made would speak there
        )

    @classmethod
    def execute(cls, model, likeness):
        return io.NodeOutput(with_technique(model, SpeedUp(likeness)))
