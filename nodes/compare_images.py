"""The view that compares pictures."""

from __future__ import annotations

from comfy_api.latest import io

from .common import CATEGORY, SHOWS_COMPARISON
from .engine.comparison import NAMES, draw, view
from .engine.picture import to_image


class ASDMCompareImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        slots = io.Autogrow.TemplateNames(io.Image.Input("image"), [name.lower() for name in NAMES], min=2)
        return io.Schema(
            node_id="ASDMCompareImages",
            display_name="Compare Images (asdm)",
            category=CATEGORY,
            description="Compares two or more pictures or batches: a slider, flipping on a click, the difference, "
            "zoom in step, one pair "
            "of the batch after the other. Also draws them side by side with labels, to be saved.",
            search_aliases=[
                "image compare",
                "slider",
                "before after",
                "difference",
                "grid",
                "side by side",
                "psnr",
                "ssim",
            ],
            inputs=[
                io.Autogrow.Input(
                    "images",
                    template=slots,
                    tooltip="Two to eight pictures or batches; the first of one batch meets the first of the others.",
                ),
                io.String.Input(
                    "labels", default="", tooltip="Names of the pictures, separated by commas. Empty: only A, B, ..."
                ),
                io.String.Input("title", default="", tooltip="Headline of the drawing.", extra_dict=SHOWS_COMPARISON),
            ],
            outputs=[
                io.Image.Output(
                    display_name="comparison", tooltip="All of them side by side, labelled, two with their difference."
                )
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images, labels, title):
        batches = [images[name.lower()] for name in NAMES if images.get(name.lower()) is not None]
        names = [name.strip() for name in labels.split(",")][: len(batches)]
        names += [""] * (len(batches) - len(names))
        picture = to_image(draw(title, "", names, batches))
        return io.NodeOutput(picture, ui=view(cls, title, names, batches))
