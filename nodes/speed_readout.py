"""Where the time of a run goes, layer by layer, and what each technique saved of it."""

from __future__ import annotations

import json
from collections import Counter, defaultdict

from comfy_api.latest import io

from ..asdm_core.addresses import UNetConfig, unit
from ..asdm_core.inheritance import INHERITED
from ..asdm_core.pictures import duration
from .common import CATEGORY, SHOWS_PICTURE
from .engine.assigned import Assigned, assigned_of
from .engine.forecasts import FORECAST
from .engine.layer_times import MeasuredRun, Timed, LayerTimes
from .engine.network import architecture_of
from .engine.picture import draw_speed, preview, to_image
from .engine.switch import others_of
from .engine.technique import LEFT_OUT, technique_of, techniques_of


def times_of(model) -> dict[int, LayerTimes]:
    """What was measured in the last run of a MODEL from Measure Speed, by the number of the model that played: 0, and
    more where it is switched. Raises ValueError without a finished run.
    """
    models = [model, *others_of(model)]
    timed = [technique_of(m, Timed) for m in models]
    if timed[0] is None:
        raise ValueError(
            "this MODEL is not measured. Put Measure Speed between it and the sampler, and connect its MODEL here too."
        )
    last = {number: technique.log.last for number, technique in enumerate(timed) if technique is not None}
    found = {number: times for number, times in last.items() if times is not None and times.evaluations}
    if not found:
        raise ValueError(
            "there is no finished run of this MODEL. Connect the sampler's LATENT to `after`, so that this node "
            "waits for it."
        )
    return found


def by_group(config: UNetConfig, times: LayerTimes) -> dict[str, dict[str, float]]:
    """Seconds in the layers of each block ("down.0", "mid"), by kind of layer."""
    groups: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for (address, _), (seconds, _) in times.layers.items():
        u = unit(config, address)
        groups[u.block][u.kind if u.kind in ("resnet", "transformer") else "sampler"] += seconds
    return groups


def describe(model) -> dict:
    """What was measured of the last run of a MODEL from Measure Speed, as a table for JSON. Raises ValueError without
    one.

    Of a switched MODEL, all models together; in `played` by which of them each step began.
    """
    models, found = [model, *others_of(model)], times_of(model)
    seconds: dict[int, float] = defaultdict(float)  # by step
    players: dict[int, set[int]] = defaultdict(set)
    groups: dict[str, Counter[str]] = {}
    shorter: dict[str, set[int]] = {INHERITED: set(), FORECAST: set(), LEFT_OUT: set()}
    saved = []
    for number, times in found.items():
        for step, t, roles in times.evaluations:
            seconds[step] += t
            players[step].add(number)
            for role in roles:
                shorter.setdefault(role, set()).add(step)
        for block, kinds in by_group(architecture_of(models[number]).config, times).items():
            groups.setdefault(block, Counter()).update(kinds)
        prefix = f"model {number + 1}: " if len(models) > 1 else ""
        saved += [
            {"technique": f"{prefix}{name}", "seconds": round(t, 4), "how": how}
            for name, t, how in savings(models[number], times)
        ]
    total, steps = sum(seconds.values()), sorted(seconds)
    in_layers = sum(sum(kinds.values()) for kinds in groups.values())
    return {
        "steps": len(steps),
        "evaluations": sum(len(times.evaluations) for times in found.values()),
        "seconds": round(total, 4),
        "seconds_per_step": round(total / len(steps), 5),
        "step_seconds": [[step, round(seconds[step], 5)] for step in steps],
        "inherited_steps": sorted(shorter[INHERITED]),
        "forecast_steps": sorted(shorter[FORECAST]),
        "left_out_steps": sorted(shorter[LEFT_OUT]),
        "played": [min(players[step]) + 1 for step in steps],
        "groups": {block: {kind: round(t, 5) for kind, t in kinds.items()} for block, kinds in groups.items()},
        "outside_layers": round(max(0.0, total - in_layers), 5) if groups else None,
        "saved": saved,
    }


def savings(model, times: LayerTimes) -> list[tuple[str, float, str]]:
    """(technique, seconds saved, how that is known) of all that plays in a MODEL.

    What is done in fewer evaluations is measured, against the full ones. Work that was never done cannot be: layers
    that are cut and attention that GRI left out are taken to need as long for each multiplication as their kind needed
    in this run.
    """
    # A pruned network has cut layers though nothing says so on its MODEL.
    others = [technique for technique in techniques_of(model) if not isinstance(technique, Assigned)]
    techniques = [assigned_of(model), *others]
    run = MeasuredRun(times, architecture_of(model), techniques)
    return [saved for technique in reversed(techniques) for saved in technique.saved(run)]


def summary(facts: dict) -> list[str]:
    """A headline and a line for people."""
    saved = sum(entry["seconds"] for entry in facts["saved"])
    head = f"{facts['steps']} steps in {duration(facts['seconds'])}, {duration(facts['seconds_per_step'])} each"
    share = saved / (saved + facts["seconds"])
    return [
        head,
        f"about {duration(saved)} saved, {share:.0%} of what it would have been"
        if facts["saved"]
        else "no technique of asdm saved time in this run",
    ]


class ASDMSpeedReadout(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ASDMSpeedReadout",
            display_name="Speed Readout",
            category=CATEGORY,
            description="Draws where the time of the last run went: each step, each group of layers, and what each "
            "technique saved. "
            "Needs the MODEL of Measure Speed, and the sampler's result to wait for.",
            search_aliases=["profile", "profiler", "timing", "time per step", "saved time"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="From Measure Speed; the same that goes into the sampler.",
                    extra_dict=SHOWS_PICTURE,
                ),
                io.AnyType.Input(
                    "after",
                    optional=True,
                    tooltip="Anything the run makes (the sampler's latent), so that this node waits for it.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="picture"),
                io.String.Output(display_name="text", tooltip="All numbers, as JSON."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        return float("nan")  # a run leaves its record on the MODEL, which the host's cache does not see

    @classmethod
    def execute(cls, model, after=None):
        facts = describe(model)
        lines = summary(facts)
        picture = to_image(draw_speed(facts, *lines))
        return io.NodeOutput(picture, json.dumps(facts, indent=1), ui=preview(cls, picture, "\n".join(lines)))
