"""Telling whether a run is set up as the weights in it were trained for: so many steps, a sampler, a guidance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import comfy.samplers
import torch

from ...asdm_core import few_step
from ...asdm_core.few_step import FewStep
from ...asdm_core.packs import Description
from .on_model import with_technique
from .technique import MEASURING, InRun, Say, Start, Technique


@dataclass(frozen=True)
class FewSteps(Technique):
    """Weights on a MODEL that were trained for one way to sample. name: of their file; lora: of the LoRA they play
    beneath, if any.
    """

    wanted: FewStep
    name: str
    lora: str = ""

    key: ClassVar[str] = "few_steps"
    order: ClassVar[int] = MEASURING
    speaks_only: ClassVar[bool] = True

    def bind(self, start: Start, say: Say) -> InRun | None:
        others = list(_otherwise(self.wanted, start))
        if others:
            say(
                f"{self.name} was trained for {_in_words(self.wanted)}. This run has {', '.join(others)}, for which it "
                "was not made: set the sampler as it was trained."
            )
        model = start.model
        if self.lora and not (model.patches or model.hook_patches or model.injections):
            say(
                f"{self.name} was trained beneath the LoRA {self.lora}, and no LoRA is on this MODEL: put Load LoRA "
                "before or after Apply Pack, unless the checkpoint has it merged."
            )
        return None

    def tells(self, model) -> list[str]:
        return [f"{self.name}: made for {_in_words(self.wanted)}"]


def with_few_steps(model, description: Description, name: str):
    """A clone of MODEL that compares its runs with what a pack or UNet file was trained or fitted for; MODEL itself
    where the file says nothing of it. Raises ValueError.
    """
    training = description.training
    wanted = few_step.of_pack(training) or few_step.of_fit(training)
    return model if wanted is None else with_technique(model, FewSteps(wanted, name, str(training.get("lora", ""))))


def _in_words(wanted: FewStep) -> str:
    steps = f"{wanted.steps} step{'s' if wanted.steps > 1 else ''}"
    sampler = f" of {wanted.sampler}" if wanted.sampler else ""
    cfg = f", CFG {wanted.cfg:g}" if wanted.cfg else ""
    return f"{steps}{sampler}, scheduler {wanted.scheduler}{cfg}"


def _otherwise(wanted: FewStep, start: Start) -> Iterator[str]:
    """What of a run is otherwise, in words."""
    steps = len(start.sigmas) - 1
    if steps != wanted.steps:
        yield f"{steps} steps"
    elif wanted.scheduler in comfy.samplers.SCHEDULER_NAMES:
        sampling = start.model.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, wanted.scheduler, steps).to(start.sigmas)
        if not torch.allclose(start.sigmas, sigmas, rtol=1e-2):
            yield "other noise levels (scheduler, denoise or start)"
    function = getattr(start.sampler, "sampler_function", None)
    if wanted.sampler in comfy.samplers.SAMPLER_NAMES:
        its = comfy.samplers.sampler_object(wanted.sampler).sampler_function
        if function is not its:
            yield getattr(function, "__name__", type(start.sampler).__name__).removeprefix("sample_")
    cfg = getattr(start.guider, "cfg", None)
    if wanted.cfg and cfg is not None and abs(cfg - wanted.cfg) > 1e-3:
        yield f"CFG {cfg:g}"
