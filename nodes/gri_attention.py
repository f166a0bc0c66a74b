"""The node that makes self-attention linear in the size of the picture."""

from __future__ import annotations

from itertools import count

from comfy_api.latest import io

from ..asdm_core.addresses import UNetConfig, walk
from ..asdm_core.assignment import Window
from .common import CATEGORY, PIXELS, SHOWS_WORDS
from .engine.network import architecture_of
from .engine.on_model import with_technique
from .engine.regional import Regional


def plays_from(regional: Regional, config: UNetConfig) -> str:
    """From which size of square picture on it plays at all, in words."""
    tokens = next(n for n in count(1) if regional.on(n, n, False))
    side = tokens * PIXELS * min(u.scale for u in walk(config) if u.kind == "transformer")
    return f"plays in pictures of {side} x {side} and more, does nothing in smaller ones"


class ASDMGRIAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ASDMGRIAttention",
            display_name="GRI Attention",
            category=CATEGORY,
            description="Makes large pictures faster without any training: in the shallow layers each part of the "
            "picture attends to "
            "itself in full and to the rest in summary. Does nothing below 512 x 512 on SD1.5 and 1024 x 1024 on SDXL, "
            "where it would not pay. Gains grow with the size of the picture.",
            search_aliases=[
                "global regional attention",
                "window attention",
                "hypertile",
                "tome",
                "token merging",
                "tiled attention",
                "high resolution",
                "hires fix",
                "4k",
                "upscale",
                "large picture",
                "large image",
                "faster",
                "speed up",
                "accelerate",
                "optimize",
                "performance",
                "memory",
            ],
            inputs=[
                io.Model.Input("model", extra_dict=SHOWS_WORDS),
                io.Int.Input(
                    "window",
                    default=0,
                    min=0,
                    max=1024,
                    advanced=True,
                    tooltip="Side of the regions that attend to themselves in full, in tokens (of the first level: 8 "
                    "pixels each). "
                    "Larger is more faithful and slower. 0: chosen by the size of the picture, and off where it "
                    "would not pay.",
                ),
                io.Int.Input(
                    "pool",
                    default=0,
                    min=0,
                    max=256,
                    advanced=True,
                    tooltip="Side of the cells in which a region sees the rest of the picture, in tokens. Smaller is "
                    "more faithful "
                    "and slower. The window must be a multiple of it. 0: chosen by the size of the picture.",
                ),
                io.Int.Input(
                    "stages",
                    default=2,
                    min=1,
                    max=4,
                    advanced=True,
                    tooltip="So many levels of the UNet, from the shallowest that has attention, as far as their "
                    "maps are large enough.",
                ),
                io.Boolean.Input(
                    "shifted",
                    default=False,
                    advanced=True,
                    tooltip="Every other layer's windows lie half a window further, so that their borders differ.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Where in the sampling run it begins; 0 is the first step.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Where in the sampling run full attention takes over again; 1 is the end.",
                ),
            ],
            outputs=[io.Model.Output()],
            not_idempotent=True,  # it speaks in runs: what another node like it has made would speak there
        )

    @classmethod
    def execute(cls, model, window, pool, stages, shifted, start_percent, end_percent):
        if start_percent == end_percent:
            return io.NodeOutput(model)
        regional = Regional(window, pool, stages, shifted, Window(start_percent, end_percent))
        return io.NodeOutput(
            with_technique(model, regional),
            ui={"text": (plays_from(regional, architecture_of(model).config),)},
        )
