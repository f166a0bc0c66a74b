"""LoRAs on a MODEL of Load Pruned UNet: those trained on the original, and those trained on the pruned UNet itself.

The host makes its table of names from the MODEL alone, before it looks at a file, so one name can mean one layer only.
Of a pruned UNet the same name can mean two, and the file tells which. So the host's two functions are wrapped: the
table that the first makes for a pruned UNet knows its architecture, and the second asks it what this file means. Every
other MODEL passes through untouched.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import wraps

import comfy.lora

from ...asdm_core import lora
from ...asdm_core.architecture import Architecture

AUTO = "auto"
_UNET = "diffusion_model."


class LoraKeys(dict):
    """The host's table of a pruned UNet (name in a file -> key of the MODEL, addressed), with what it takes to read a
    file made for that UNet itself.
    """

    def __init__(self, table: Mapping, architecture: Architecture, names: str):
        super().__init__(table)
        self.architecture, self.names = architecture, names

    def of(self, file: Mapping) -> dict:
        """The table for one LoRA file."""
        reading = self.names
        if reading == AUTO:
            shapes = {k: tuple(v.shape) for k, v in file.items() if hasattr(v, "shape")}
            reading = lora.meant(shapes, self.architecture)
        if reading is None:
            reading = lora.ORIGINAL
            logging.warning(
                "asdm: the names in this LoRA could mean layers of the original UNet or of the pruned one "
                f"({self.architecture.name or 'a choice of its own'}). It is taken to be made for the original; if it "
                "was trained on the pruned UNet, set lora_names of Load Pruned UNet to own."
            )
        # Of the original's names the host knows all spellings; cut layers stay in its table, so that it reports them.
        table = self if reading == lora.ORIGINAL else {k: v for k, v in self.items() if not _of_unet(v)}
        meant = lora.targets(self.architecture, reading)
        return {name: f"{_UNET}{lora.module_of(slot)}.weight" for name, slot in meant.items()} | dict(table)


def _of_unet(target) -> bool:
    return (target if isinstance(target, str) else target[0]).startswith(_UNET)


def install() -> None:
    """Wrap the host's two functions, once."""
    if hasattr(comfy.lora.load_lora, "asdm"):
        return
    comfy.lora.model_lora_keys_unet = _with_architecture(comfy.lora.model_lora_keys_unet)
    comfy.lora.load_lora = _reading(comfy.lora.load_lora)


def _with_architecture(make):
    @wraps(make)
    def model_lora_keys_unet(model, *args, **kwargs):
        table = make(model, *args, **kwargs)
        ours = vars(model.model_config)  # asked for an attribute it has not, the host's config warns
        architecture = ours.get("asdm_architecture")
        if architecture is None or not architecture.cut:
            return table
        return LoraKeys(table, architecture, ours["asdm_lora_names"])

    return model_lora_keys_unet


def _reading(load):
    @wraps(load)
    def load_lora(file, table, *args, **kwargs):
        return load(file, table.of(file) if isinstance(table, LoraKeys) else table, *args, **kwargs)

    load_lora.asdm = True
    return load_lora
