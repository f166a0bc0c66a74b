"""Writing what a MODEL plays as one standalone UNet file."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io

from ..asdm_core.architecture import Architecture
from ..asdm_core import packs
from ..asdm_core.packs import ZERO_SNR_MARKER, Description, standalone_form, write_unet
from ..asdm_core.surgery import ADDRESSED
from ..asdm_core.text import printable
from .common import CATEGORY, SHOWS_WORDS
from .engine import models, pack_loras, switch
from .engine.assigned import assigned_of, network_of, packs_of, providers_of

DTYPES = {"as loaded": None, **packs.DTYPES}


def played_architecture(model) -> tuple[Architecture, dict[str, str]]:
    """The architecture a MODEL plays at every step, and which of its units come from which pack.

    Raises ValueError for what no single network is: a switch, a pack that plays within a window only, experts, gains.
    """
    assignment = assigned_of(model).assignment
    if switch.switches_of(model):
        raise ValueError(
            "this MODEL has a second UNet from Switch UNet, and a file holds one. Save each MODEL before Switch UNet."
        )
    for role, what in (("experts", "convolutions with several experts"), ("log_gains", "gains for GRI attention")):
        if any(o.provider.role == role for o in assignment.overrides):
            raise ValueError(
                f"a pack on this MODEL has {what}, which a UNet file of the ordinary form cannot hold. "
                "Save the MODEL before that pack is applied, and keep the pack beside it."
            )
    partial = [o for o in assignment.overrides if not o.window.whole]
    if partial:
        w = partial[0].window
        raise ValueError(
            f"a pack plays from {w.start:.0%} to {w.end:.0%} of the run only; a file holds one network for all steps. "
            "Set the window of Apply Pack to 0 and 1, or save before it."
        )
    sources = {a: provider.source for a, provider in providers_of(model).items() if provider.role == "pack"}
    kept = network_of(model)
    return Architecture(kept.config, kept.cut, tuple(u.address for u in kept.kept)).named(), sources


def played_weights(model, architecture: Architecture, sources: dict[str, str]) -> dict[str, torch.Tensor]:
    """Addressed weights of everything a MODEL plays, LoRAs and merges baked in. Raises ValueError for weights that the
    host quantised.
    """
    check_plain(model, architecture, sources)
    patchers = packs_of(model)
    pack_loras.sync(model, patchers.values())
    comfy.model_management.load_models_gpu([model, *patchers.values()])
    weights: dict[str | None, dict] = {
        None: model.model_state_dict_for_saving(model.model.diffusion_model, "diffusion_model.")
    }
    for pack_id, patcher in patchers.items():
        weights[pack_id] = patcher.model_state_dict_for_saving(patcher.model.diffusion_model, "diffusion_model.")
    if any(
        key.endswith(".comfy_quant") for key in weights[None]
    ):  # a layer has several tensors then: a scale beside the numbers
        raise ValueError(
            "the weights of this MODEL are quantised, layer by layer with scales (as in scaled fp8 files), which a "
            "UNet file of "
            "asdm cannot hold. Load the same checkpoint in fp16 or bf16 and save that."
        )
    return {key: _plain(weights[sources.get(slot.unit.address)][key]) for key, slot in architecture.keys().items()}


def check_plain(model, architecture: Architecture, sources: dict[str, str]) -> None:
    """Raise ValueError where a weight of the checkpoint is not the numbers themselves, but what somebody's own layers
    make them of (blocks of GGUF).
    """
    held = model.model.diffusion_model.state_dict()
    if any(key.endswith(".comfy_quant") for key in held):  # the host's own quantised layers: told below
        return
    for key, slot in architecture.keys().items():
        tensor = held.get(key)
        if slot.unit.address in sources or (
            type(tensor) in (torch.Tensor, torch.nn.Parameter)
            and tensor.is_floating_point()
            and tuple(tensor.shape) == slot.shape
        ):
            continue
        came = "missing" if tensor is None else f"{type(tensor).__name__}, {tensor.dtype}, {list(tensor.shape)}"
        raise ValueError(
            f"the weights of this MODEL are quantised or otherwise no plain numbers: {key} is "
            f"{printable(came)}, where a "
            f"UNet file holds floating-point numbers of shape {list(slot.shape)}. Load the same checkpoint in fp16 or "
            "bf16 and save that."
        )


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    # The host hands out parameters that are patched when somebody moves them to the CPU.
    return tensor.to("cpu").detach()


def unused_path(folder: Path, prefix: str) -> Path:
    number = 1
    while (path := folder / f"{prefix}_{number:05}.safetensors").exists():
        number += 1
    return path


class ASDMSaveUNet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ASDMSaveUNet",
            display_name="Save UNet (asdm)",
            category=CATEGORY,
            description="Saves the UNet of a MODEL with its packs and LoRAs as one file, in a form that stock "
            "ComfyUI loads too "
            "(Load Diffusion Model). Goes to the output folder.",
            search_aliases=["save model", "save diffusion model", "export", "merge pack", "assemble"],
            inputs=[
                io.Model.Input("model", extra_dict=SHOWS_WORDS),
                io.String.Input(
                    "filename_prefix",
                    default="diffusion_models/asdm",
                    tooltip="Folder and beginning of the file name, in the output folder; a number follows.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="fp16",
                    advanced=True,
                    tooltip="fp16 is what others share; fp32 keeps every digit for further training.",
                ),
            ],
            outputs=[io.String.Output(display_name="path")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, filename_prefix, dtype):
        architecture, sources = played_architecture(model)
        kind = model.model.model_type
        prediction = {t: name for name, t in models.PREDICTIONS.items()}.get(kind)
        if prediction is None:
            raise ValueError(
                f"this MODEL predicts {kind.name}; Save UNet writes models that predict EPS or V_PREDICTION."
            )
        folder, prefix, _, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        path = unused_path(Path(folder), prefix)
        zero_snr = getattr(model.get_model_object("model_sampling"), "zsnr", False)
        write_unet(
            path,
            played_weights(model, architecture, sources),
            Description("unet", architecture, prediction=prediction),
            DTYPES[dtype],
            {ZERO_SNR_MARKER: torch.zeros(0)} if zero_snr else {},
        )
        note = (
            ""
            if architecture.cut == frozenset() or standalone_form(architecture) != ADDRESSED
            else ("\nThis choice of units has no renumbered form, so only Load Pruned UNet can read the file.")
        )
        saved = Path("output", subfolder, path.name).as_posix()
        kind = f"{architecture.config.family} {architecture.name or 'custom'}"
        text = f"{saved}\n{kind}, {architecture.params / 1e6:.1f} M parameters{note}"
        return io.NodeOutput(str(path), ui={"text": (text,)})
