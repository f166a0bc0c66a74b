"""Loading pruned UNets."""

from __future__ import annotations

from comfy_api.latest import io

from ..asdm_core.lora import READINGS
from .common import CATEGORY, SHOWS_WORDS
from .engine import files, lora_keys, models
from .engine.network import PREDICTIONS, architecture_of


def found_text(model, name: str) -> str:
    """One paragraph on what a loaded UNet is."""
    architecture = architecture_of(model)
    full = type(architecture).full(architecture.config)
    saved = 1 - architecture.params / full.params
    what = architecture.name if architecture.cut else "unpruned"
    lines = [
        f"{name}: {architecture.config.family} {what or 'custom'}, {architecture.params / 1e6:.1f} M parameters"
        + (f" ({saved:.0%} fewer than the unpruned {full.params / 1e6:.1f} M)" if architecture.cut else "")
    ]
    lines.append(f"prediction: {model.model.model_type.name.lower()}")
    if architecture.cut:
        lines.append("cut: " + ", ".join(u for u in sorted(architecture.cut)))
    return "\n".join(lines)


class ASDMLoadPrunedUNet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ASDMLoadPrunedUNet",
            display_name="Load Pruned UNet",
            category=CATEGORY,
            description="Loads a pruned or combined UNet in which every layer keeps its place, so that LoRAs, "
            "ControlNets and "
            "attention patches made for the unpruned model go on working: BK-SDM base, small and tiny (v1 and v2), "
            "small-sd, tiny-sd, A-SDM M1 to M3, SSD-1B, Segmind Vega, KOALA. Files in the LDM or the diffusers "
            "layout, or a diffusers folder, from models/diffusion_models, models/unet or models/diffusers.",
            search_aliases=[
                "bk-sdm",
                "small-sd",
                "tiny-sd",
                "ssd-1b",
                "vega",
                "koala",
                "distilled",
                "smaller model",
                "less memory",
                "sd1.5",
                "load diffusion model",
                "unet loader",
            ],
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    extra_dict=SHOWS_WORDS,
                    options=files.unets(),
                    tooltip="A folder in diffusers form ends in a slash.",
                ),
                io.Combo.Input(
                    "prediction",
                    options=["auto", *PREDICTIONS],
                    default="auto",
                    advanced=True,
                    tooltip="What the network predicts. auto reads it from the file or its folder, or follows the "
                    "rule of the family.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(models.WEIGHT_DTYPES),
                    default="default",
                    advanced=True,
                    tooltip="As in Load Diffusion Model: fp8 halves the memory and costs some quality.",
                ),
                io.Combo.Input(
                    "lora_names",
                    options=[lora_keys.AUTO, *READINGS],
                    default=lora_keys.AUTO,
                    optional=True,
                    advanced=True,
                    tooltip="Whose layers LoRAs name: those of the original UNet, or of this pruned one itself, on "
                    "which they were trained. auto tells by names and shapes, and says so in the log where it cannot.",
                ),
            ],
            outputs=[io.Model.Output(), io.String.Output(display_name="found", tooltip="What this file is.")],
        )

    @classmethod
    def fingerprint_inputs(cls, unet_name=None, **_):
        return files.changed(files.unet_path, unet_name)

    @classmethod
    def execute(cls, unet_name, prediction, weight_dtype, lora_names=lora_keys.AUTO):
        path = files.unet_path(unet_name)
        model = models.load_unet(str(path), weight_dtype, None if prediction == "auto" else prediction, lora_names)
        found = found_text(model, unet_name)
        return io.NodeOutput(model, found, ui={"text": (found,)})
