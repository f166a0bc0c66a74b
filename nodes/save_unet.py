"""Writing what a MODEL plays as one standalone UNet file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import comfy.model_detection
import comfy.model_management
import comfy.model_sampling
import folder_paths
import torch
from comfy.quant_ops import QuantizedTensor
from comfy_api.latest import io

from ..asdm_core.addresses import Slot, UNetConfig, keys
from ..asdm_core.architecture import Architecture
from ..asdm_core import tensor_file
from ..asdm_core.packs import Description, ZERO_SNR_MARKER, write_unet
from ..asdm_core.tensor_file import TensorFile
from ..asdm_core.text import printable
from .common import CATEGORY, SHOWS_WORDS
from .engine import bypass, pack_loras, quantised, switch
from .engine.assigned import assigned_of, network_of, packs_of, providers_of
from .engine.network import PREDICTIONS, ejected, prediction_of, without_self_attention
from .engine.unpatched import Unpatched

DTYPES = {"as loaded": None, **tensor_file.DTYPES}


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
    of_text = sorted(without_self_attention(model).difference(sources))
    if of_text:
        raise ValueError(
            f"the first attention of {of_text[0]} attends to the text in this MODEL, and a UNet file of asdm has a "
            "self-attention there. Save it with ComfyUI's own Save Diffusion Model."
        )
    kept = network_of(model)
    return Architecture(kept.config, kept.cut, tuple(u.address for u in kept.kept)).named(), sources


def played_sampling(model) -> tuple[str, bool]:
    """What the network of a MODEL predicts as it is sampled ("eps", "v"), and whether on a schedule with zero terminal
    SNR: all that a UNet file says of sampling.

    Raises ValueError for what it cannot say, such as noise levels of another table.
    """
    sampling = model.get_model_object("model_sampling")
    prediction, kind = prediction_of(model, derived=True)
    zero_snr = bool(getattr(sampling, "zsnr", False))
    refused = None
    if prediction is None:
        refused = f"is sampled as {printable(kind)}"
    elif zero_snr and prediction != "v":
        refused = "has a schedule with zero terminal SNR beside a prediction of the noise"
    elif not _in_table(sampling, zero_snr):
        refused = "has noise levels of its own"
    if prediction is None or refused:
        raise ValueError(
            f"this MODEL {refused}, and a UNet file can only say that a network predicts the noise, or v with or "
            "without zero terminal SNR, on the usual 1000 noise levels: save the MODEL before the node that changes "
            "its sampling, and put that node behind the file's loader."
        )
    return prediction, zero_snr


def _in_table(sampling, zero_snr: bool) -> bool:
    """Whether noise levels are among those that a loader gives to a UNet file."""
    if not isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete):
        return False
    usual = comfy.model_sampling.ModelSamplingDiscrete(zsnr=zero_snr).log_sigmas
    return bool(((sampling.log_sigmas.to(usual)[:, None] - usual).abs().amin(1) < 1e-3).all())


def played_weights(
    model, architecture: Architecture, sources: dict[str, str], dequantise: bool = False
) -> dict[str, torch.Tensor]:
    """Addressed weights of everything a MODEL plays, LoRAs and merges baked in.

    dequantise: take out what quantised layers compute with. Raises ValueError for them otherwise.
    """
    model = bypass.in_weights(model)
    unet = model.model.diffusion_model
    own = {key: slot for key, slot in architecture.keys().items() if slot.unit.address not in sources}
    patchers = packs_of(model)
    pack_loras.sync(model, patchers.values())
    # As they were before patches, which may be those of another clone.
    unpatched = Unpatched(model)
    with ejected(model):
        held = {key: unpatched.held(key) if key in unpatched else quantised.held(unet, key) for key in own}
    odd = {key: slot for key, slot in own.items() if not quantised.is_plain(held[key], slot.shape)}
    check_plain(held, odd, dequantise)
    if not all(isinstance(held[key], QuantizedTensor) for key in odd):
        odd = own  # of layers that are not its own the host cannot say what LoRAs make of them
    comfy.model_management.load_models_gpu([model, *patchers.values()])
    with ejected(model):
        weights = {key: quantised.played(unet, key, architecture.keys(), model.load_device) for key in odd}
        parts = [(own.keys() - odd.keys(), model, unet)]
        for pack_id, patcher in patchers.items():
            of_pack = {key for key, slot in architecture.keys().items() if sources.get(slot.unit.address) == pack_id}
            parts.append((of_pack, patcher, patcher.model.diffusion_model))
        for names, patcher, network in parts:
            saved = patcher.model_state_dict_for_saving(network, "diffusion_model.") if names else {}
            weights |= {key: _plain(saved[key]) for key in names}
    for key, slot in own.items():
        if tuple(weights[key].shape) != slot.shape:
            raise ValueError(
                f"a patch on this MODEL gives {key} the shape {list(weights[key].shape)}, where a UNet file of this "
                f"family has {list(slot.shape)} (as IC-Light, which widens the first layer). Save the MODEL before the "
                "node that does so."
            )
    return {key: weights[key] for key in architecture.keys()}


def check_plain(held: Mapping[str, torch.Tensor | None], odd: Mapping[str, Slot], dequantise: bool) -> None:
    """Raise ValueError where some weights of a checkpoint are no plain numbers and are not to be dequantised, or cannot
    be.
    """
    for key, slot in odd.items():
        tensor = held[key]
        if dequantise and tensor is not None:
            continue
        came = "missing" if tensor is None else f"{type(tensor).__name__}, {tensor.dtype}, {list(tensor.shape)}"
        raise ValueError(
            f"the weights of this MODEL are quantised or otherwise no plain numbers: {key} is {printable(came)}, where "
            f"a UNet file holds floating-point numbers of shape {list(slot.shape)}. Load the same checkpoint in fp16 "
            "or bf16 and save that" + ("." if dequantise else ", or switch on dequantise.")
        )


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    # The host hands out parameters that are patched when somebody moves them to the CPU.
    return tensor.to("cpu").detach()


def unused_path(folder: Path, prefix: str) -> Path:
    number = 1
    while (path := folder / f"{prefix}_{number:05}.safetensors").exists():
        number += 1
    return path


def stock_note(path: Path, prediction: str, zero_snr: bool) -> str:
    """What of a file stock ComfyUI does not find by itself, in a sentence: its network, layer by layer, or how it is
    sampled. "" where it finds all.
    """
    file = TensorFile(path)
    config = comfy.model_detection.model_config_from_unet({key: file[key] for key in file}, "")
    try:
        wanted = keys(UNetConfig.from_host(config.unet_config)) if config else {}
    except (KeyError, ValueError, RuntimeError):  # no UNet of the LDM kind
        wanted = {}
    if not wanted or any(key not in file or file.shapes[key] != slot.shape for key, slot in wanted.items()):
        return "Stock ComfyUI does not know this UNet: load it with Load Pruned UNet."
    found = config.model_type({key: file[key] for key in file}, "")
    if found == PREDICTIONS[prediction] and bool(config.sampling_settings.get("zsnr")) == zero_snr:
        return ""
    sampled = ("v_prediction" if prediction == "v" else prediction) + (" and zsnr" if zero_snr else "")
    return f"Stock ComfyUI does not see how it is sampled: put ModelSamplingDiscrete ({sampled}) behind its loader."


class ASDMSaveUNet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ASDMSaveUNet",
            display_name="Save UNet (asdm)",
            category=CATEGORY,
            description="Saves the UNet of a MODEL with its packs and LoRAs as one file. Stock ComfyUI (Load Diffusion "
            "Model) loads it too where it knows the family and the choice of units has a form of its own; where not, "
            "the node says so, and Load Pruned UNet loads it. Goes to the output folder.",
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
                io.Boolean.Input(
                    "dequantise",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="For a MODEL whose weights are quantised (GGUF, scaled fp8): save the numbers its layers "
                    "compute with. They are no better than the quantised ones, and the file is as large as any. Off: "
                    "such a MODEL is refused.",
                ),
            ],
            outputs=[io.String.Output(display_name="path")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, filename_prefix, dtype, dequantise=False):
        architecture, sources = played_architecture(model)
        prediction, zero_snr = played_sampling(model)
        folder, prefix, _, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        path = unused_path(Path(folder), prefix)
        write_unet(
            path,
            played_weights(model, architecture, sources, dequantise),
            Description("unet", architecture, prediction=prediction),
            DTYPES[dtype],
            {ZERO_SNR_MARKER: torch.zeros(0)} if zero_snr else {},
        )
        notes = [stock_note(path, prediction, zero_snr)]
        exactly, sampled = prediction_of(model)
        if exactly is None:  # a kind that a node has derived (LCM)
            notes.append(f"No file says that it is sampled as {sampled}: put the node that does so behind its loader.")
        saved = Path("output", subfolder, path.name).as_posix()
        kind = f"{architecture.config.family} {architecture.name or 'custom'}"
        text = f"{saved}\n{kind}, {architecture.params / 1e6:.1f} M parameters"
        return io.NodeOutput(str(path), ui={"text": ("\n".join(filter(None, (text, *notes))),)})
