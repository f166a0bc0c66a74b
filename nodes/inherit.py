"""Feature inheritance on a MODEL, and a picture of its plan before and after a run."""

from __future__ import annotations

import json

from comfy_api.latest import io

from ..asdm_core import inheritance
from ..asdm_core.inheritance import DIALS, MODES, PARTS, REUSE, Plan, Rule, Schedule, saving
from . import host
from .inspect_model import PIXELS
from .load import CATEGORY, SHOWS_PICTURE
from .picture import draw_plan, preview, to_image
from .feature_cache import FEW_STEPS

WHAT = ("deepcache", "shallow-only", "encoder", "attention", "attn1", "attn2", "targets")


def numbers(text: str, name: str) -> list[float]:
    """Numbers of a comma-separated list. Raises ValueError."""
    try:
        return [float(part) for part in text.replace(";", ",").split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"{name}: wanted numbers separated by commas, got {text!r}.") from None


def custom_plan(
    config,
    what,
    branch,
    targets,
    reuse,
    when,
    interval,
    power,
    centre,
    windows,
    steps,
    threshold,
    max_run,
    first_steps,
    last_steps,
) -> Plan:
    """A plan from the single settings of the node. Raises ValueError."""
    bounds = numbers(windows, "windows") if when == "windows" else []
    if len(bounds) % 3:
        raise ValueError(f"windows: wanted start, end, interval for each window (0.2, 0.8, 3), got {windows!r}.")
    schedule = Schedule(
        when,
        interval,
        power,
        centre,
        windows=tuple((a, b, int(n)) for a, b, n in zip(bounds[::3], bounds[1::3], bounds[2::3], strict=True)),
        steps=tuple(int(n) for n in numbers(steps, "steps")) if when == "explicit" else (),
        threshold=threshold,
        max_run=max_run,
        first=first_steps,
        last=last_steps,
    )
    if what == "targets":
        return Plan((Rule(targets, reuse),), schedule, "custom")
    if what == "deepcache":
        plan = inheritance.deepcache(config, branch, schedule)
    elif what in PARTS or what == "attention":
        return inheritance.attention(config, "attn1|attn2" if what == "attention" else what, schedule)
    else:
        plan = {"shallow-only": inheritance.shallow_only, "encoder": inheritance.encoder}[what](config, schedule)
    return plan.reusing(reuse)


def chosen_plan(config, settings: dict) -> Plan:
    """The plan that the node's `preset` asks for."""
    settings = dict(settings)
    preset = settings.pop("preset")
    if preset == "plan":
        if not settings["plan"].strip():
            raise ValueError(
                "the plan is empty. Connect the `plan` output of Calibrate Inheritance, paste a plan that was kept or "
                "shared, or choose another preset."
            )
        return Plan.from_json(settings["plan"])
    return custom_plan(config, **settings) if preset == "custom" else inheritance.dial(config, preset)


def custom_inputs() -> list[io.Input]:
    """The settings behind the preset "custom"."""
    return [
        io.Combo.Input(
            "what",
            options=list(WHAT),
            default="deepcache",
            tooltip="What is inherited: everything beneath a skip branch (deepcache), beneath the first layer "
            "(shallow-only), "
            "encoder and mid block (encoder), attention outputs, or the targets you name.",
        ),
        io.Int.Input(
            "branch",
            default=0,
            min=0,
            max=11,
            tooltip="deepcache: the skip branch, counted from the shallowest. Higher is more faithful and slower.",
        ),
        io.String.Input(
            "targets",
            default="mid, up.0, up.1",
            tooltip="targets: layers by address, with ranges and parts: down.2-3, up.1.*.transformer.*.attn1|ff, "
            "!up.1.2",
        ),
        io.Combo.Input(
            "reuse",
            options=list(REUSE),
            default="forecast",
            tooltip="output: the features as they were. forecast: drawn on in a straight line from the last two "
            "computed steps. "
            "residual: only what a layer adds to its input.",
        ),
        io.Combo.Input("when", options=list(MODES), default="uniform", tooltip="Which steps compute in full."),
        io.Int.Input(
            "interval",
            default=2,
            min=1,
            max=20,
            tooltip="uniform, early-dense, late-dense, quadratic: one step in so many computes in full. 1 is off.",
        ),
        io.Float.Input(
            "power",
            default=1.4,
            min=1.0,
            max=5.0,
            step=0.1,
            tooltip="early-dense, late-dense, quadratic: how unevenly the full steps lie.",
        ),
        io.Float.Input(
            "centre",
            default=0.3,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="quadratic: where in the run the full steps lie closest.",
        ),
        io.String.Input(
            "windows",
            default="0.2, 0.8, 3",
            tooltip="windows: start, end, interval, in 0..1 of the run; more windows follow. Outside of them every "
            "step computes in full.",
        ),
        io.String.Input(
            "steps", default="0, 1, 3, 6, 10, 15", tooltip="explicit: the steps that compute in full, counted from 0."
        ),
        io.Float.Input(
            "threshold",
            default=0.1,
            min=0.0,
            max=10.0,
            step=0.005,
            tooltip="adaptive: a step inherits while the first layer's features have changed by less than this share "
            "since the last full step.",
        ),
        io.Int.Input(
            "max_run", default=4, min=1, max=50, tooltip="adaptive: at most so many inherited steps in a row."
        ),
        io.Int.Input(
            "first_steps", default=1, min=1, max=100, tooltip="So many steps at the beginning always compute in full."
        ),
        io.Int.Input(
            "last_steps", default=0, min=0, max=100, tooltip="So many steps at the end always compute in full."
        ),
    ]


class ASDMFeatureInheritance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ASDMFeatureInheritance",
            display_name="Feature Inheritance",
            category=CATEGORY,
            description="Makes any SD1.5, SD2 or SDXL model faster without any training: on some steps the deep "
            "layers keep the features of "
            "an earlier step and only the shallow layers compute. Best from 15 steps on; below 8 it hurts the picture.",
            search_aliases=[
                "faster",
                "speed up",
                "accelerate",
                "optimize",
                "optimise",
                "performance",
                "quick",
                "deepcache",
                "easycache",
                "teacache",
                "cache",
                "freeze",
                "t-gate",
                "faster diffusion",
                "skip steps",
                "sd1.5",
                "sdxl",
            ],
            inputs=[
                io.Model.Input("model"),
                io.DynamicCombo.Input(
                    "preset",
                    options=[
                        *(io.DynamicCombo.Option(name, []) for name in DIALS),
                        io.DynamicCombo.Option(
                            "plan",
                            [
                                io.String.Input(
                                    "plan",
                                    multiline=True,
                                    default="",
                                    tooltip="A plan as JSON: from Calibrate Inheritance, or one that somebody shared.",
                                )
                            ],
                        ),
                        io.DynamicCombo.Option("custom", custom_inputs()),
                    ],
                    tooltip="faithful: hardly visible. balanced: small differences. fast: the same motif, details "
                    "may differ. "
                    "plan: one made by Calibrate Inheritance. custom: all settings.",
                ),
                io.Int.Input(
                    "memory_limit_mb",
                    default=0,
                    min=0,
                    max=1_000_000,
                    advanced=True,
                    tooltip="Where the remembered features would be more than this, the run computes in full and "
                    "says so. 0: no limit.",
                ),
                io.Boolean.Input(
                    "keep_on_cpu",
                    default=False,
                    advanced=True,
                    tooltip="Keeps the features in main memory instead of the graphics card's. Slower, saves its "
                    "memory.",
                ),
            ],
            outputs=[
                io.Model.Output(),
                io.String.Output(display_name="plan", tooltip="The plan as JSON, to keep or share."),
            ],
        )

    @classmethod
    def execute(cls, model, preset, memory_limit_mb, keep_on_cpu):
        plan = chosen_plan(host.architecture_of(model).config, preset)
        return io.NodeOutput(host.with_plan(model, plan, limit_mb=memory_limit_mb, on_cpu=keep_on_cpu), plan.to_json())


# The picture ----------------------------------------------------------------------------------------


def describe(model, steps: int, width: int, height: int, batch: int) -> dict:
    """Facts about a MODEL's plan and its last run, as a table for JSON. Raises ValueError where it has no plan."""
    kept = host.setup_of(model).inheritance
    if kept is None:
        raise ValueError("this MODEL inherits no features. Put Feature Inheritance before this node.")
    architecture, report = host.architecture_of(model), kept.log.last
    size = (height // PIXELS, width // PIXELS)
    adaptive = kept.plan.schedule.mode == "adaptive"
    facts = {
        "plan": kept.plan.name or "custom",
        "steps": steps,
        "computed": [s for s, full in enumerate(kept.plan.schedule.computed(steps)) if full],
        "reuse": kept.plan.reuse(architecture.config, architecture.cut),
        "predicted_saving": None if adaptive else round(saving(kept.plan, architecture, steps, *size), 4),
        "cache_mb": round(host.cache_bytes(model, (batch, 4, *size), 2) / 2**20, 1),
    }
    if report is not None:
        measured = report.saving()
        facts["last_run"] = {
            "steps": report.steps,
            "roles": report.roles(),
            "evaluations": len(report.replayed),
            "inherited": sum(report.replayed),
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
            + ("" if run["measured_saving"] is None else f", {run['measured_saving']:.0%} less time")
            + f", {run['cache_mb']:g} MB remembered"
        )
    return "\n".join(text)


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
        picture = to_image(draw_plan(host.architecture_of(model), facts, text, layers))
        return io.NodeOutput(json.dumps(facts, indent=1), picture, ui=preview(cls, picture, text))


NODES = [ASDMFeatureInheritance, ASDMInheritancePlan]
