"""Who plays each unit of a MODEL, what it costs, and a picture of it."""

from __future__ import annotations

import json

from comfy_api.latest import io

from ..asdm_core.architecture import Architecture
from ..asdm_core.assignment import CHECKPOINT, JOINING, Provider
from ..asdm_core.measure import costs, total
from .common import CATEGORY, PIXELS, SHOWS_PICTURE
from .engine import host, switch
from .engine.picture import UnitView, draw_levels, draw_unet, preview, to_image


def providers_at(model, percent: float) -> tuple[dict[str, Provider], dict[str, dict[str, Provider]]]:
    """Unit address -> who plays it at a point of the run (0..1), for every unit but the host's own; and
    for "experts" and "log_gains": unit address -> whose join it."""
    assignment = host.setup_of(model).assignment
    active = [w for w in assignment.windows if w.start <= percent < w.end or w.end == percent == 1.0]
    providers = dict.fromkeys(host.architecture_of(model).cut_units, Provider("cut"))
    return providers | assignment.providers(active), {role: assignment.joining(role, active) for role in JOINING}


def playing(model, providers: dict[str, Provider]) -> Architecture:
    """The network that plays at one point: its kept units and transformer blocks."""
    architecture = host.architecture_of(model)
    cut = {a for a, p in providers.items() if p.role == "cut"}
    cut |= {a for a in architecture.cut if a not in providers and a.rpartition(".")[0] not in providers}
    for address, provider in providers.items():
        if provider.role == "pack":
            blocks = host.pack_architecture(model, provider.source).cut
            cut |= {b for b in blocks if b.rpartition(".")[0] == address}
    return Architecture(architecture.config, frozenset(cut)).named()


def describe(model, width: int, height: int, percent: float) -> tuple[dict, dict[str, UnitView]]:
    """Facts about a MODEL's UNet as a table for JSON, and how to draw each unit."""
    providers, joining = providers_at(model, percent)
    now = playing(model, providers)
    full = Architecture.full(now.config)
    cost = costs(now, height // PIXELS, width // PIXELS)
    work, whole = total(cost), total(costs(full, height // PIXELS, width // PIXELS))
    views, rows = {}, []
    for u in full.kept:
        role = providers.get(u.address, CHECKPOINT)
        share = cost[u.address].total / work.total if u.address in cost else 0.0
        views[u.address] = UnitView(role.role, share)
        joined = {
            f"{kind}_of": found[u.address].source.rpartition("@")[0]
            for kind, found in joining.items()
            if u.address in found
        }
        rows.append(
            {
                "unit": u.address,
                "played_by": role.source.rpartition("@")[0] or role.role,
                **joined,
                "params": cost[u.address].params if u.address in cost else 0,
                "macs": cost[u.address].total if u.address in cost else 0,
                "share": round(share, 5),
            }
        )
    everybody = [*providers.values(), *(provider for found in joining.values() for provider in found.values())]
    facts = {
        "family": now.config.family,
        "architecture": now.name or "custom",
        "width": width,
        "height": height,
        "params": work.params,
        "macs": work.total,
        "unpruned_params": whole.params,
        "unpruned_macs": whole.total,
        "packs": [p.rpartition("@")[0] for p in dict.fromkeys(p.source for p in everybody if p.source)],
        "cut": [a for a in providers if providers[a].role == "cut"],
        "on": in_runs(model),
        "units": rows,
    }
    return facts, views


def in_runs(model) -> list[str]:
    """What else asdm does in the runs of a MODEL, and where it is changed: a sentence for each."""
    setup, said = host.setup_of(model), []
    if setup.inheritance:
        name = setup.inheritance.plan.name or "a custom plan"
        said.append(
            f"Feature Inheritance is on ({name}): Inheritance Plan shows its steps; bypass its node to leave it off."
        )
    if setup.regional:
        said.append("GRI Attention is on, in pictures as large as its node says; bypass that node for full attention.")
    points = ", ".join(f"{point.at:g} ({point.unit})" for one in switch.switches_of(model) for point in one.points)
    if points:
        said.append(f"Switch UNet: another model takes over at {points}; connect its MODEL here to inspect it.")
    return said


def summary(facts: dict) -> tuple[str, str]:
    """Title and subtitle of the picture."""
    title = facts["family"] or "UNet"
    if facts["packs"]:
        title += " with " + ", ".join(facts["packs"])
    if facts["architecture"] not in ("full", "custom"):
        title += f"  ({facts['architecture']})"

    def change(now: int, before: int) -> str:
        return "" if now == before else f" ({now / before - 1:+.1%})"

    return title, (
        f"{facts['params'] / 1e6:.1f} M parameters{change(facts['params'], facts['unpruned_params'])},  "
        f"{facts['macs'] / 1e9:.1f} G MACs per step and picture at {facts['width']} x {facts['height']}"
        f"{change(facts['macs'], facts['unpruned_macs'])}"
    )


class ASDMInspectModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ASDMInspectModel",
            display_name="Inspect Model",
            category=CATEGORY,
            description="Who plays each layer of a MODEL's UNet (the checkpoint, a pack, nobody), with parameters, "
            "multiplications and each layer's share of the work, as text and as a picture.",
            search_aliases=["model info", "unet picture", "macs", "parameters", "profile"],
            inputs=[
                io.Model.Input("model", extra_dict=SHOWS_PICTURE),
                io.Int.Input("width", default=512, min=64, max=8192, step=8, tooltip="Of the picture, in pixels."),
                io.Int.Input("height", default=512, min=64, max=8192, step=8, tooltip="Of the picture, in pixels."),
                io.Float.Input(
                    "at_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Which point of the sampling run to show; matters for packs with a step window.",
                ),
                io.Boolean.Input(
                    "layers",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Draws every layer instead of the levels of the UNet; to be looked at in full size.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="All numbers, as JSON."),
                io.Image.Output(display_name="picture"),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, width, height, at_percent, layers=False):
        facts, views = describe(model, width, height, at_percent)
        title, subtitle = summary(facts)
        config, lines = host.architecture_of(model).config, [subtitle, *facts["on"]]
        drawn = draw_unet(config, views, title, subtitle) if layers else draw_levels(config, views, title, lines)
        picture = to_image(drawn)
        return io.NodeOutput(json.dumps(facts, indent=1), picture, ui=preview(cls, picture, "\n".join([title, *lines])))
