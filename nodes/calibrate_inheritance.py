"""Measuring how a user's own model takes feature inheritance, and the plan that follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import comfy.sample
import comfy.samplers
from comfy_api.latest import io

from ..asdm_core.calibration import Choice, choices, choose
from ..asdm_core.inheritance import Plan, deepcache
from .common import CATEGORY, PIXELS, SHOWS_PICTURE
from .engine.inheritance import Inheritance
from .engine.assigned import network_of
from .engine.network import architecture_of
from .engine.on_model import with_technique
from .engine.picture import draw_plan, preview, to_image
from .engine.progress import Progress
from .engine.survey import Survey
from .inheritance_plan import describe, summary

SAVINGS = (0.2, 0.3, 0.4, 0.5, 0.6)  # that are told beside the one chosen


def plans_for(config) -> list[Plan]:
    """What a survey tries: branches of DeepCache, as they are and with forecasts."""
    return [deepcache(config, branch).reusing(reuse) for branch in (0, 1, 3) for reuse in ("output", "forecast")]


def calibrate(model, sample, longest: int, height: int, width: int) -> tuple[list[Choice], object]:
    """All choices for a MODEL, by saving, and what sample(MODEL) returned: one run of it is measured."""
    architecture = architecture_of(model)
    survey = Survey(tuple(plans_for(architecture.config)), longest)
    result = sample(with_technique(model, survey))
    return choices(survey.candidates(architecture, height, width)), result


def for_savings(found: Sequence[Choice]) -> str:
    """The least error for round savings, as far as they can be had, in words."""
    most = max(choice.saving for choice in found)
    return ", ".join(f"{saving:.0%} for {choose(found, saving).error:.1%}" for saving in SAVINGS if saving <= most)


class ASDMCalibrateInheritance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ASDMCalibrateInheritance",
            display_name="Calibrate Inheritance",
            category=CATEGORY,
            description="Finds the best plan of feature inheritance for your own model, sampler, number of steps and "
            "prompt: one run "
            "measures how much each step changes, then the steps that compute in full are chosen so that the error "
            "is as "
            "small as it can be. Keep the plan and use it with Feature Inheritance.",
            search_aliases=[
                "feature inheritance",
                "deepcache",
                "optimal steps",
                "auto tune",
                "optimise my model",
                "optimize my model",
            ],
            inputs=[
                io.Model.Input("model", extra_dict=SHOWS_PICTURE),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Latent.Input(
                    "latent_image", tooltip="The size and the number of pictures; several pictures make a better plan."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Of the noise. While nothing changes, the plan is kept and nothing is measured again.",
                ),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=2,
                    max=200,
                    tooltip="As in the runs the plan is for. The plan scales to other numbers.",
                ),
                io.Float.Input(
                    "cfg", default=7.0, min=0.0, max=100.0, step=0.1, tooltip="As in the runs the plan is for."
                ),
                io.Combo.Input(
                    "sampler_name", options=comfy.samplers.KSampler.SAMPLERS, tooltip="As in the runs the plan is for."
                ),
                io.Combo.Input(
                    "scheduler", options=comfy.samplers.KSampler.SCHEDULERS, tooltip="As in the runs the plan is for."
                ),
                io.DynamicCombo.Input(
                    "goal",
                    tooltip="saving: the most faithful plan that saves so much. error: the fastest plan that stays "
                    "so close.",
                    options=[
                        io.DynamicCombo.Option(
                            "saving",
                            [
                                io.Float.Input(
                                    "saving",
                                    default=0.35,
                                    min=0.0,
                                    max=0.95,
                                    step=0.01,
                                    tooltip="Share of the UNet's work to be saved at least.",
                                )
                            ],
                        ),
                        io.DynamicCombo.Option(
                            "error",
                            [
                                io.Float.Input(
                                    "error",
                                    default=0.05,
                                    min=0.0,
                                    max=10.0,
                                    step=0.005,
                                    tooltip="How far the result may be from the full run: the predicted difference "
                                    "as a share of the result's own size.",
                                )
                            ],
                        ),
                    ],
                ),
                io.Int.Input(
                    "longest", default=2, min=1, max=6, advanced=True, tooltip="At most so many steps in a row inherit."
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="With the plan."),
                io.String.Output(display_name="plan", tooltip="The plan as JSON, to keep or share."),
                io.Image.Output(display_name="picture"),
                io.Latent.Output(
                    display_name="full_run", tooltip="The result of the measured run, in which every step computed."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, positive, negative, latent_image, seed, steps, cfg, sampler_name, scheduler, goal, longest):
        samples = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
        noise = comfy.sample.prepare_noise(samples, seed, latent_image.get("batch_index"))

        def sample(m):
            progress = Progress(m, 1, steps)
            result = comfy.sample.sample(
                m,
                noise,
                steps,
                cfg,
                sampler_name,
                scheduler,
                positive,
                negative,
                samples,
                seed=seed,
                noise_mask=latent_image.get("noise_mask"),
                callback=progress.callback,
            )
            progress.run_done()
            return result

        height, width = samples.shape[-2:]
        found, result = calibrate(model, sample, longest, height, width)
        wanted = {"saving": goal["saving"]} if goal["goal"] == "saving" else {"error": goal["error"]}
        best = choose(found, **wanted)
        best = replace(best, plan=replace(best.plan, name="calibrated"))
        chosen = with_technique(model, Inheritance(best.plan))
        facts = describe(chosen, steps, width * PIXELS, height * PIXELS, samples.shape[0])
        text = (
            summary(facts) + f"\npredicted difference to the full run: {best.error:.1%} of the result"
            f"\nother savings, and their difference: {for_savings(found)}"
        )
        picture = to_image(draw_plan(network_of(model), best.plan, facts, text))
        return io.NodeOutput(
            chosen, best.plan.to_json(), picture, {**latent_image, "samples": result}, ui=preview(cls, picture, text)
        )
