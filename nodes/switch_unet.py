"""The node that gives a run over to another UNet."""

from __future__ import annotations

from comfy_api.latest import io

from ..asdm_core.switching import UNITS, SwitchPoint
from .common import CATEGORY
from .engine.switch import with_switch


class ASDMSwitchUNet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ASDMSwitchUNet",
            display_name="Switch UNet",
            category=CATEGORY,
            description="Samples with one model up to a point of the run and with another one from there on, inside "
            "one sampler run. "
            "Each keeps its own LoRAs, packs, patches and prediction type. A small UNet for the layout and a large "
            "one for "
            "the details, or the other way round. Chain it for more than two.",
            search_aliases=[
                "asdm",
                "multi unet",
                "model swap",
                "two models",
                "refiner",
                "handoff",
            ],
            inputs=[
                io.Model.Input("model_first"),
                io.Model.Input("model_second"),
                io.Float.Input(
                    "switch_at",
                    default=0.5,
                    min=0.0,
                    max=10000.0,
                    step=0.01,
                    tooltip="Where the second model takes over: 0.4 with percent or share of steps, 10 with step (10 "
                    "steps of the "
                    "first), a noise level with sigma.",
                ),
                io.Combo.Input(
                    "unit",
                    options=list(UNITS),
                    default="percent",
                    tooltip="percent: share of the noise schedule, 0 is its begin, 1 its end, as in other nodes. "
                    "share of steps: 0.4 is "
                    "after 40% of this run's steps. step: steps of this run. "
                    "sigma: a noise level. All mean a noise level: the second model plays at and below it.",
                ),
                io.Int.Input(
                    "crossfade_steps",
                    default=0,
                    min=0,
                    max=1000,
                    advanced=True,
                    tooltip="So many steps from the switch on both models play and their predictions are mixed. Each "
                    "costs as much "
                    "as both. 0: at once.",
                ),
            ],
            outputs=[io.Model.Output()],
            not_idempotent=True,  # it speaks in runs: what another node like it has made would speak there
        )

    @classmethod
    def execute(cls, model_first, model_second, switch_at, unit, crossfade_steps):
        return io.NodeOutput(with_switch(model_first, model_second, SwitchPoint(switch_at, unit), crossfade_steps))
