"""The node that puts feature inheritance on a MODEL."""

from __future__ import annotations

import math

from comfy_api.latest import io

from ..asdm_core import inheritance
from ..asdm_core.inheritance import DIALS, MODES, PARTS, REUSE, Plan, Rule, Schedule
from ..asdm_core.text import printable
from .common import CATEGORY
from .engine.inheritance import Inheritance
from .engine.network import architecture_of
from .engine.on_model import with_technique

WHAT = ("deepcache", "shallow-only", "encoder", "attention", "attn1", "attn2", "targets")


def numbers(text: str, name: str) -> list[float]:
    """Numbers of a comma-separated list. Raises ValueError."""
    try:
        found = [float(part) for part in text.replace(";", ",").split(",") if part.strip()]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise ValueError(f"{name}: wanted numbers separated by commas, got {printable(repr(text))}.")
    return found


def whole(number: float, name: str) -> int:
    """A number that counts steps. Raises ValueError."""
    if number != int(number):
        raise ValueError(f"{name}: steps are counted in whole numbers, got {number:g}.")
    return int(number)


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
        windows=tuple(
            (a, b, whole(n, "windows")) for a, b, n in zip(bounds[::3], bounds[1::3], bounds[2::3], strict=True)
        ),
        steps=tuple(whole(n, "steps") for n in numbers(steps, "steps")) if when == "explicit" else (),
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
                "the plan is empty. Paste a plan that was kept or shared, connect the `plan` output of another Feature "
                "Inheritance, or choose another preset."
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
                                    tooltip="A plan as JSON: one that this node gave, or that somebody shared.",
                                )
                            ],
                        ),
                        io.DynamicCombo.Option("custom", custom_inputs()),
                    ],
                    tooltip="faithful, balanced, fast: every other step inherits from 0.8, 0.66 or 0.6 of the run on; "
                    "all three stay close to the full run, and Speed Up saves more. plan: one that was kept or shared. "
                    "custom: all settings.",
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
            not_idempotent=True,  # it speaks in runs: what another node like it has made would speak there
        )

    @classmethod
    def execute(cls, model, preset, memory_limit_mb, keep_on_cpu):
        plan = chosen_plan(architecture_of(model).config, preset)
        technique = Inheritance(plan, memory_limit_mb, keep_on_cpu)
        return io.NodeOutput(with_technique(model, technique), plan.to_json())
