"""Where the time of a run goes, layer by layer, and what each technique saved of it."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from itertools import chain, repeat

from comfy_api.latest import io

from ..asdm_core.addresses import unit
from ..asdm_core.architecture import Architecture
from ..asdm_core.measure import costs, sizes
from ..asdm_core.pictures import duration
from .common import CATEGORY, SHOWS_PICTURE
from .engine import host
from .engine.picture import draw_speed, preview, to_image
from .engine.switch import others_of
from .engine.timing import Record


def describe(model) -> dict:
    """What was measured of the last run of a MODEL from Measure Speed, as a table for JSON. Raises ValueError without
    one.

    Of a switched MODEL, all models together; in `played` by which of them each step began.
    """
    models = [model, *others_of(model)]
    logs = [host.setup_of(m).speed for m in models]
    if logs[0] is None:
        raise ValueError(
            "this MODEL is not measured. Put Measure Speed between it and the sampler, and connect its MODEL here too."
        )
    records = [
        (number, log.last)
        for number, log in enumerate(logs)
        if log is not None and log.last is not None and log.last.evaluations
    ]
    if not records:
        raise ValueError(
            "there is no finished run of this MODEL. Connect the sampler's LATENT to `after`, so that this node "
            "waits for it."
        )
    evaluations = sorted(
        (step, number, t, replayed)
        for number, record in records
        for (step, t), replayed in zip(record.evaluations, chain(record.replayed, repeat(False)), strict=False)
    )
    groups: dict[str, Counter] = {}
    for number, record in records:
        config = host.architecture_of(models[number]).config
        for (address, _), (seconds, _) in record.layers.items():
            u = unit(config, address)
            block = "mid" if u.side == "mid" else ".".join(address.split(".")[:2])
            groups.setdefault(block, Counter())[u.kind if u.kind in ("resnet", "transformer") else "sampler"] += seconds
    total = sum(t for _, _, t, _ in evaluations)
    layers = sum(sum(kinds.values()) for kinds in groups.values())
    saved = [
        (f"model {number + 1}: {name}" if len(models) > 1 else name, t, how)
        for number, record in records
        for name, t, how in savings(models[number], record)
    ]
    steps = sorted({step for step, *_ in evaluations})
    return {
        "steps": len(steps),
        "evaluations": len(evaluations),
        "seconds": round(total, 4),
        "seconds_per_step": round(total / len(steps), 5),
        "step_seconds": [[s, round(sum(t for step, _, t, _ in evaluations if step == s), 5)] for s in steps],
        "inherited_steps": sorted({step for step, _, _, replayed in evaluations if replayed}),
        "played": [min(number for step, number, *_ in evaluations if step == s) + 1 for s in steps],
        "groups": {block: {kind: round(t, 5) for kind, t in kinds.items()} for block, kinds in groups.items()},
        "outside_layers": round(max(0.0, total - layers), 5) if groups else None,
        "saved": [{"technique": name, "seconds": round(t, 4), "how": how} for name, t, how in saved],
    }


def savings(model, record: Record) -> list[tuple[str, float, str]]:
    """(technique, seconds saved, how that is known) of all that plays in a MODEL.

    Inheritance is measured: its steps against the median of the full ones. Work that was never done cannot be: layers
    that are cut and attention that GRI left out are taken to need as long for each multiplication as their kind needed
    in this run.
    """
    found, setup = [], host.setup_of(model)
    # The first evaluation, in which the host still moves weights, is left out.
    timed = list(zip((t for _, t in record.evaluations), record.replayed, strict=False))[1:]
    full = [t for t, replayed in timed if not replayed]
    inherited = [t for t, replayed in timed if replayed]
    if full and inherited:
        found.append(("feature inheritance", statistics.median(full) * len(inherited) - sum(inherited), "measured"))
    config = host.architecture_of(model).config
    whole, (height, width) = Architecture.full(config), record.shape[-2:]
    macs = {address: cost.total for address, cost in costs(whole, height, width).items()}
    left_out = attention_left_out(setup.regional, whole, height, width)
    regional = {a: both for (a, role), both in record.layers.items() if role == "regional"}

    def kind(address: str) -> str:
        return unit(config, address).kind

    time, work = Counter(), Counter()
    for (address, role), (seconds, calls) in record.layers.items():
        if role in ("played", "regional"):
            done = macs[address] - (left_out.get(address, 0) if role == "regional" else 0)
            for name in (kind(address), ""):
                time[name] += seconds
                work[name] += calls * done

    def needed(address: str, multiplications: float) -> float:
        name = kind(address) if work[kind(address)] else ""
        return multiplications * time[name] / work[name] if work[name] else 0.0

    cut = sum(
        needed(a, calls * macs[a]) - seconds for (a, role), (seconds, calls) in record.layers.items() if role == "cut"
    )
    if cut > 0:
        names = ", ".join(pack.rpartition("@")[0].removesuffix(".safetensors") for pack in setup.packs) or "pruned UNet"
        found.append((f"layers cut ({names})", cut, "estimated"))
    less = sum(needed(a, regional[a][1] * m) for a, m in left_out.items() if a in regional)
    if less > 0:
        found.append(("GRI attention", less, "estimated"))
    return found


def attention_left_out(regional, architecture: Architecture, height: int, width: int) -> dict[str, float]:
    """Transformer address -> multiplications of full self-attention that GRI attention leaves out, for latents of
    height x width.
    """
    if regional is None:
        return {}
    shapes, cost, found = sizes(architecture, height, width), costs(architecture, height, width), {}
    for address in regional.blocks(architecture.config).values():
        h, w = shapes[address]
        gri = regional.on(h, w, False)
        if gri is not None:
            own = gri.window**2
            seen = own + max(0, h * w - own) / gri.pool**2  # tokens of its own window, cells of the rest
            found[address] = max(0.0, 1 - seen / (h * w)) * cost[address].attention["attn1"]
    return found


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
            search_aliases=["profile", "profiler", "timing", "time per step", "saved time", "speed up"],
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
