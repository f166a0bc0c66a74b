"""Who plays each unit of a MODEL, what it costs, and a picture of it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from comfy_api.latest import io

from ..asdm_core.architecture import Architecture
from ..asdm_core.assignment import CHECKPOINT, JOINING, Provider, Window
from ..asdm_core.measure import costs, total
from .common import CATEGORY, PIXELS, SHOWS_PICTURE
from .engine.assigned import active_at, assigned_of, name_of, network_of, providers_of
from .engine.network import architecture_of
from .engine.picture import UnitView, draw_levels, draw_unet, preview, to_image
from .engine.technique import techniques_of


def joining_at(model, active: Sequence[Window]) -> dict[str, dict[str, Provider]]:
    """For "experts" and "log_gains": unit address -> whose join it while these windows are open."""
    return {role: assigned_of(model).assignment.joining(role, active) for role in JOINING}


def describe(model, width: int, height: int, percent: float) -> tuple[dict, dict[str, UnitView]]:
    """Facts about a MODEL's UNet as a table for JSON, and how to draw each unit."""
    active = active_at(assigned_of(model).assignment, percent)
    providers, joining, now = providers_of(model, active), joining_at(model, active), network_of(model, active)
    full = Architecture.full(now.config)
    cost = costs(now, height // PIXELS, width // PIXELS)
    work, whole = total(cost), total(costs(full, height // PIXELS, width // PIXELS))
    views, rows = {}, []
    for u in full.kept:
        role = providers.get(u.address, CHECKPOINT)
        share = cost[u.address].total / work.total if u.address in cost else 0.0
        views[u.address] = UnitView(role.role, share)
        joined = {
            f"{kind}_of": name_of(found[u.address].source) for kind, found in joining.items() if u.address in found
        }
        rows.append(
            {
                "unit": u.address,
                "played_by": name_of(role.source) or role.role,
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
        "packs": [name_of(p) for p in dict.fromkeys(p.source for p in everybody if p.source)],
        "cut": [a for a in providers if providers[a].role == "cut"],
        "on": [sentence for technique in techniques_of(model) for sentence in technique.tells(model)],
        "units": rows,
    }
    return facts, views


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
        config, lines = architecture_of(model).config, [subtitle, *facts["on"]]
        drawn = draw_unet(config, views, title, subtitle) if layers else draw_levels(config, views, title, lines)
        picture = to_image(drawn)
        return io.NodeOutput(json.dumps(facts, indent=1), picture, ui=preview(cls, picture, "\n".join([title, *lines])))
