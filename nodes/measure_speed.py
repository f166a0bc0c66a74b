"""The node that has the runs of a MODEL timed."""

from __future__ import annotations

from comfy_api.latest import io

from .common import CATEGORY
from .engine.layer_times import Timed
from .engine.on_model import with_technique
from .engine.switch import on_each


class ASDMMeasureSpeed(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ASDMMeasureSpeed",
            display_name="Measure Speed",
            category=CATEGORY,
            description="Times every step and every layer of the runs of this MODEL, for Speed Readout. The pictures "
            "stay the same, bit by bit. "
            "Put it last, right before the sampler; bypass it and nothing is measured.",
            search_aliases=["profile", "profiler", "timing", "benchmark", "time per step"],
            inputs=[io.Model.Input("model")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model):
        return io.NodeOutput(on_each(model, lambda m: with_technique(m, Timed())))
