"""Loading checkpoints with a pruned UNet, and the embedded family."""

from __future__ import annotations

from comfy_api.latest import io

from .common import CATEGORY
from .engine import files, models


class ASDMCheckpointLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ASDMCheckpointLoader",
            display_name="Load Checkpoint (asdm)",
            category=CATEGORY,
            description="Loads a whole checkpoint whose UNet is pruned, or a member of the small emoji family that "
            "ships with "
            "asdm (128 x 128 pixels, made for trying things out). For an ordinary checkpoint use the stock node.",
            search_aliases=["emoji", "pruned checkpoint", "distilled checkpoint"],
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=files.checkpoints(),
                    tooltip="The embedded family (emoji, 128 x 128 pixels) first, then models/checkpoints.",
                )
            ],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, ckpt_name=None):
        return files.changed(files.checkpoint_path, ckpt_name)

    @classmethod
    def execute(cls, ckpt_name):
        return io.NodeOutput(*models.load_checkpoint(files.checkpoint_path(ckpt_name)))
