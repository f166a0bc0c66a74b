"""Loading checkpoints with a pruned UNet, and the embedded family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from comfy_api.latest import io

from .common import CATEGORY, PIXELS
from .engine import files, models
from .engine.network import architecture_of
from .engine.on_model import with_technique
from .engine.technique import InRun, Say, Start, Technique

EMBEDDED, SIDE = "emoji", 128  # the family, and the pixels of the pictures it was trained on


@dataclass(frozen=True)
class MadeFor(Technique):
    """Changes nothing, and says so where a model meets latents of another size than the one it was trained on.

    side: of the pictures it was trained on, in pixels.
    """

    side: int

    key: ClassVar[str] = "size"
    speaks_only: ClassVar[bool] = True

    def bind(self, start: Start, say: Say) -> InRun | None:
        height, width = (PIXELS * n for n in start.shape[-2:])
        if (height, width) != (self.side, self.side):
            say(
                f"this small model paints {self.side} x {self.side} pixels and nothing useful at {width} x {height}. "
                f"Set the size of the latent to {self.side} x {self.side}, or load a checkpoint of your own."
            )
        return None


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
            not_idempotent=True,  # it speaks in runs: what another node like it has made would speak there
        )

    @classmethod
    def fingerprint_inputs(cls, ckpt_name=None):
        return files.changed(files.checkpoint_path, ckpt_name)

    @classmethod
    def execute(cls, ckpt_name):
        model, *others = models.load_checkpoint(files.checkpoint_path(ckpt_name))
        if architecture_of(model).config.family == EMBEDDED:
            model = with_technique(model, MadeFor(SIDE))
        return io.NodeOutput(model, *others)
