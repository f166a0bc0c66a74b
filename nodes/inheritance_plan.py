"""A picture of a plan of feature inheritance, before and after a run."""

from __future__ import annotations

import json

from comfy_api.latest import io

from ..asdm_core.inheritance import saving
from .common import CATEGORY, PIXELS, SHOWS_PICTURE
from .engine.assigned import network_of
from .engine.inheritance import FEW_STEPS, Inheritance
from .engine.picture import draw_plan, preview, to_image
from .engine.technique import technique_of


def describe(model, steps: int, width: int, height: int, batch: int) -> dict:
    """Facts about a MODEL's plan and its last run, as a table for JSON. Raises ValueError where it has no plan."""
    kept = technique_of(model, Inheritance)
    if kept is None:
        raise ValueError("this MODEL inherits no features. Put Feature Inheritance before this node.")
    # What a pack plays is what is left out on an inherited step.
    architecture, report = network_of(model), kept.log.last
    size = (height // PIXELS, width // PIXELS)
    adaptive = kept.plan.schedule.mode == "adaptive"
    facts = {
        "plan": kept.plan.name or "custom",
        "steps": steps,
        "computed": [s for s, full in enumerate(kept.plan.schedule.computed(steps)) if full],
        "reuse": kept.plan.reuse(architecture.config, architecture.cut),
        "predicted_saving": None if adaptive else round(saving(kept.plan, architecture, steps, *size), 4),
        "cache_mb": round(kept.cache_bytes(model, (batch, 4, *size), 2) / 2**20, 1),
    }
    if report is not None:
        measured = report.saving()
        facts["last_run"] = {
            "steps": report.steps,
            "roles": report.roles(),
            "evaluations": len(report.replayed),
            "inherited": sum(report.replayed),
            "left_out": sum(ran is False for ran in report.played),
            "measured_saving": None if measured is None else round(measured, 4),
            "seconds": [[step, round(t, 4)] for step, t in report.seconds],
            "cache_mb": round(report.peak / 2**20, 1),
        }
    return facts


def summary(facts: dict) -> str:
    """A few lines for people."""
    predicted = facts["predicted_saving"]
    text = [
        f"{facts['plan']}: "
        + (
            "as many steps inherit as the threshold allows"
            if predicted is None
            else f"{facts['steps'] - len(facts['computed'])} of {facts['steps']} steps inherit, {predicted:.0%} "
            "fewer multiplications"
        ),
        f"remembers {facts['cache_mb']:g} MB with a negative prompt",
    ]
    if facts["steps"] < FEW_STEPS:
        text.append(f"with fewer than {FEW_STEPS} steps neighbours differ so much that the picture suffers")
    run = facts.get("last_run")
    if run:
        what = "steps" if run["evaluations"] == run["steps"] else f"evaluations in {run['steps']} steps"
        text.append(
            f"last run: {run['inherited']} of {run['evaluations']} {what} inherited"
            + (f", {run['left_out']} were left out by others" if run["left_out"] else "")
            + less_time(run["measured_saving"])
            + f", {run['cache_mb']:g} MB remembered"
        )
    return "\n".join(text)


def less_time(saving: float | None) -> str:
    """What a measured share of time is called; steps that inherit need not be quicker (features kept on the CPU)."""
    if saving is None:
        return ""
    return f", {saving:.0%} less time" if saving >= 0.005 else ", no less time"


class ASDMInheritancePlan(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ASDMInheritancePlan",
            display_name="Inheritance Plan",
            category=CATEGORY,
            description="Shows which layers compute and which inherit at each step, what that saves and what it "
            "remembers. Connect the "
            "sampler's result as well to see what happened in the run and how much time it saved.",
            search_aliases=["inheritance picture", "saving", "deepcache plan"],
            inputs=[
                io.Model.Input("model", extra_dict=SHOWS_PICTURE),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Of the planned run."),
                io.Int.Input("width", default=512, min=64, max=8192, step=8, tooltip="Of the picture, in pixels."),
                io.Int.Input("height", default=512, min=64, max=8192, step=8, tooltip="Of the picture, in pixels."),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=4096,
                    advanced=True,
                    tooltip="Pictures at once; matters for the memory.",
                ),
                io.Boolean.Input(
                    "layers",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Draws every layer instead of the levels of the UNet; to be looked at in full size.",
                ),
                io.AnyType.Input(
                    "after",
                    optional=True,
                    tooltip="Anything the run makes (the sampler's latent), so that this node waits for it.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="All numbers, as JSON."),
                io.Image.Output(display_name="picture"),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        return float("nan")  # a run leaves its report on the MODEL, which the host's cache does not see

    @classmethod
    def execute(cls, model, steps, width, height, batch_size, layers=False, after=None):
        facts = describe(model, steps, width, height, batch_size)
        text = summary(facts)
        picture = to_image(draw_plan(network_of(model), technique_of(model, Inheritance).plan, facts, text, layers))
        return io.NodeOutput(json.dumps(facts, indent=1), picture, ui=preview(cls, picture, text))
