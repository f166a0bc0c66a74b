"""UNet and checkpoint files as the host's MODEL, CLIP and VAE."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import comfy.controlnet
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor

from ...asdm_core import differences, packs, tensor_file, text_encoder
from ...asdm_core.addresses import UNetConfig
from ...asdm_core.architecture import Architecture
from ...asdm_core.packs import Description
from ...asdm_core.tensor_file import BadFile, TensorFile
from ...asdm_core.surgery import ADDRESSED, cut_modules
from ...asdm_core.text import TEXT, printable
from . import lora_keys, narrow_vae, units
from .network import PREDICTIONS
from .unpatched import Unpatched

WEIGHT_DTYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}


# UNets ----------------------------------------------------------------------------------------------


LATENTS, PIX2PIX, INPAINTING = 4, 8, 9  # input channels: latents alone, with an image, with a mask and an image


def _base_class(config: UNetConfig):
    if config.adm_channels is not None:
        return comfy.supported_models.SDXL
    return comfy.supported_models.SD20 if config.use_linear else comfy.supported_models.SD15


def _pix2pix_class(config: UNetConfig):
    if config.adm_channels is not None:
        return comfy.model_base.SDXL_instructpix2pix
    return comfy.model_base.SD15_instructpix2pix


def model_config(architecture: Architecture, prediction: str | None = None, lora_names: str = lora_keys.AUTO):
    """The host's model config for an architecture: the unpruned skeleton, cut while the network is built.

    prediction: "eps" or "v"; None asks the host's own rule for the family. lora_names: whose layers LoRAs name, one of
    lora.READINGS, or "auto".
    """
    base: Any = _base_class(architecture.config)
    host = architecture.config.to_host()

    class AddressedUNet(base):
        # The host copies these over the given config: keep what else the family sets (attention precision).
        unet_extra_config = {**base.unet_extra_config, **{k: host[k] for k in ("num_heads", "num_head_channels")}}

        def inpaint_model(self):
            # The host takes whatever has more channels than latents for one.
            return self.unet_config["in_channels"] == INPAINTING

        def model_type(self, state_dict, prefix=""):
            ruled = super().model_type(state_dict, prefix)  # which also takes settings of the schedule from the file
            kind = PREDICTIONS[prediction] if prediction else ruled
            if kind == PREDICTIONS["v"] and packs.ZERO_SNR_MARKER in state_dict:  # the host asks so for SDXL alone
                self.sampling_settings["zsnr"] = True
            return kind

        def get_model(self, state_dict, prefix="", device=None):
            if architecture.config.in_channels == PIX2PIX:
                model = _pix2pix_class(architecture.config)(self, self.model_type(state_dict, prefix), device=device)
            else:
                model = super().get_model(state_dict, prefix, device)
            cut_modules(
                model.diffusion_model, architecture, "ldm", partial(units.stand_in, heads=architecture.config.heads)
            )
            return model

        def process_unet_state_dict_for_saving(self, state_dict):
            return super().process_unet_state_dict_for_saving(_standalone_names(state_dict, architecture))

    AddressedUNet.__name__ = AddressedUNet.__qualname__ = base.__name__  # by which other nodes tell families
    config = AddressedUNet(host)
    config.asdm_architecture, config.asdm_lora_names = architecture, lora_names
    return config


def _standalone_names(state_dict: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """What stock ComfyUI should find in a saved file: the renumbered network, which it can load."""
    form = packs.standalone_form(architecture)
    if form == ADDRESSED and architecture.cut:
        raise ValueError(
            "this choice of cut units has no form that stock ComfyUI can load; use Save UNet (asdm) instead"
        )
    # By module, not by tensor: quantised weights have more tensors than the tables know.
    modules = {
        slot.unit.key(slot.tensor).rpartition(".")[0]: key.rpartition(".")[0]
        for key, slot in architecture.keys(*form).items()
    }
    renamed = {}
    for key, tensor in state_dict.items():
        module, _, leaf = key.rpartition(".")
        renamed[f"{modules[module]}.{leaf}"] = tensor
    return renamed


def load_unet(
    path: str,
    weight_dtype: str = "default",
    prediction: str | None = None,
    lora_names: str = lora_keys.AUTO,
    disable_dynamic: bool = False,
):
    """MODEL from a UNet file of any known form (also inside a checkpoint), in addressed form.

    Tensors that belong to no layer are left out with a word in the log. Raises tensor_file.BadFile. Follows
    comfy.sd.load_diffusion_model_state_dict in the choice of dtypes.
    """
    loaded = packs.open_unet(path, drop_unknown=True, prediction=prediction)
    if loaded.unknown:
        logging.warning(
            f"asdm: {loaded.path.name}: no layer of this UNet has {tensor_file.some(loaded.unknown)}, which is ignored."
        )
    channels = loaded.description.architecture.config.in_channels
    if channels not in (LATENTS, PIX2PIX, INPAINTING):
        logging.warning(
            f"asdm: {loaded.path.name} takes {channels} channels. ComfyUI itself gives a UNet {LATENTS}, {PIX2PIX} "
            f"(an image beside it) or {INPAINTING} (inpainting), so another node must add the rest."
        )
    options = WEIGHT_DTYPES[weight_dtype]
    weights = dict(loaded.tensors)
    parameters = comfy.utils.calculate_parameters(weights)
    management = comfy.model_management
    lora_keys.install()
    config = model_config(loaded.description.architecture, loaded.description.prediction, lora_names)

    dtype = options.get("dtype") or management.unet_dtype(
        model_params=parameters,
        supported_dtypes=list(config.supported_inference_dtypes),
        weight_dtype=comfy.utils.weight_dtype(weights),
    )
    device = management.get_torch_device()
    config.set_inference_dtype(
        dtype, management.unet_manual_cast(dtype, device, config.supported_inference_dtypes), device=device
    )
    config.optimizations["fp8"] = options.get("fp8", False)

    model = config.get_model({**weights, **loaded.markers}, "")
    # Looked up at call time: main.py replaces the class at start.
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(model, load_device=device, offload_device=management.unet_offload_device())
    if not management.is_device_cpu(patcher.offload_device):
        model.to(patcher.offload_device)
    model.load_model_weights(weights, "", assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (load_unet, (path, weight_dtype, prediction, lora_names))
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "asdm_pruned", _refuse_control_lora)
    return patcher


def _refuse_control_lora(executor, *args, **kwargs):
    """A Control-LoRA takes all of its network from the UNet but a low-rank difference; without these units it
    cannot.
    """
    model = executor.class_obj.model_patcher
    cut = [a for a in model.model.model_config.asdm_architecture.cut_units if not a.startswith("up.")]
    for cond in (cond for conds in executor.class_obj.conds.values() for cond in conds) if cut else ():
        control = cond.get("control")
        while control is not None:
            if isinstance(control, comfy.controlnet.ControlLora):
                raise ValueError(
                    f"A Control-LoRA is built from the UNet's own encoder, and of this UNet's {', '.join(cut)} are "
                    "cut. "
                    "Use an ordinary ControlNet, or a pack on the unpruned checkpoint."
                )
            control = control.previous_controlnet
    return executor(*args, **kwargs)


# Checkpoints ----------------------------------------------------------------------------------------


def load_checkpoint(path: Path):
    """MODEL, CLIP and VAE of a checkpoint with a pruned UNet, or of the embedded family. Raises tensor_file.BadFile."""
    file = TensorFile(path)
    description = packs.describe(file)
    if description is not None and description.companions:
        return load_unet(str(path)), _companion_clip(path, description), _companion_vae(path, description)
    model = load_unet(str(path))
    clip = load_checkpoint_clip(str(path))
    vae = load_checkpoint_vae(str(path))
    return model, clip, vae


def _beside_unet(path: str, prefixes: list[str]):
    """The host's config for the UNet of a checkpoint, and the tensors of another part of it."""
    file = TensorFile(path)
    description, _ = packs.identify_unet(file)
    return model_config(description.architecture), {k: file[k] for k in file if k.startswith(tuple(prefixes))}


def load_checkpoint_clip(path: str):
    prefixes = ["cond_stage_model.", "conditioner."]
    config, weights = _beside_unet(path, prefixes)
    weights = config.process_clip_state_dict(weights)
    if not weights:
        raise BadFile(
            f"{Path(path).name}: there is no text encoder in this file (wanted keys under {' or '.join(prefixes)}). "
            "If it is a UNet alone, use Load Pruned UNet and load CLIP and VAE by their own nodes."
        )
    clip = comfy.sd.CLIP(
        config.clip_target(state_dict=weights),
        tokenizer_data=weights,
        state_dict=weights,
        parameters=comfy.utils.calculate_parameters(weights),
    )
    clip.patcher.cached_patcher_init = (_patcher_of, (load_checkpoint_clip, path))
    return clip


def load_checkpoint_vae(path: str):
    prefixes = comfy.supported_models_base.BASE.vae_key_prefix
    _, weights = _beside_unet(path, prefixes)
    weights = comfy.utils.state_dict_prefix_replace(weights, {p: "" for p in prefixes}, filter_keys=True)
    if not weights:
        raise BadFile(
            f"{Path(path).name}: there is no VAE in this file (wanted keys under {' or '.join(prefixes)}). "
            "If it is a UNet alone, use Load Pruned UNet and load CLIP and VAE by their own nodes."
        )
    return _vae(weights, (load_checkpoint_vae, path))


def _vae(weights: dict[str, Tensor], source):
    vae = comfy.sd.VAE(sd=weights)
    vae.throw_exception_if_invalid()
    narrow_vae.narrow(vae.first_stage_model)
    vae.patcher.cached_patcher_init = (_patcher_of, source)
    return vae


def _patcher_of(load, path: str, disable_dynamic: bool = False):
    """The host's factory for a fresh CLIP or VAE patcher (other devices)."""
    return load(path).patcher


def _companion_path(path: Path, description: Description, role: str) -> Path:
    name = description.companions.get(role)
    if name is None:
        raise BadFile(f"{path.name}: its description names no {role.replace('_', ' ')}")
    companion = path.parent / Path(name).name
    if not companion.is_file():
        raise BadFile(
            f"{path.name}: its {role.replace('_', ' ')} {name} is not beside it ({path.parent}). Put it back."
        )
    return companion


def _companion_vae(path: Path, description: Description):
    return _load_companion_vae(str(_companion_path(path, description, "vae")))


def _load_companion_vae(path: str):
    file = TensorFile(path)
    weights = {k: file[k] for k in file}
    try:
        vae = _vae(weights, (_load_companion_vae, path))
    except (RuntimeError, ValueError, TypeError, LookupError) as e:
        raise BadFile(f"{file.path.name}: this is no VAE that ComfyUI reads ({printable(e, TEXT)})") from None
    # The host takes a file that lacks some of its tensors, with a word in its log, and plays random numbers there.
    missing = sorted(vae.first_stage_model.state_dict().keys() - weights.keys() - {"vae_scale", "vae_shift"})
    if missing:
        raise BadFile(f"{file.path.name}: this VAE lacks {tensor_file.some(missing)}. Download or export it again.")
    return vae


def _companion_clip(path: Path, description: Description):
    return load_small_clip(str(_companion_path(path, description, "text_encoder")))


def load_small_clip(path: str):
    """CLIP from a text encoder in CLIP layout with its own config and only the token rows in use."""
    config, weights = text_encoder.open_text_encoder(path)
    width = config["hidden_size"]
    # The host's class has a projection of the pooled output, which SD1.x does not use.
    weights.setdefault("text_projection.weight", torch.eye(width, dtype=weights[text_encoder.TOKEN_TABLE].dtype))

    class SmallTextModel(comfy.sd1_clip.SDClipModel):
        def __init__(self, device="cpu", dtype=None, model_options={}):
            super().__init__(
                device=device,
                dtype=dtype,
                textmodel_json_config=dict(config),
                return_projected_pooled=False,
                model_options=model_options,
            )

    target = comfy.supported_models_base.ClipTarget(
        partial(comfy.sd1_clip.SD1Tokenizer, tokenizer=partial(comfy.sd1_clip.SDTokenizer, embedding_size=width)),
        partial(comfy.sd1_clip.SD1ClipModel, clip_model=SmallTextModel),
    )
    clip = comfy.sd.CLIP(target, state_dict=[weights], parameters=comfy.utils.calculate_parameters(weights))
    clip.patcher.cached_patcher_init = (_patcher_of, (load_small_clip, path))
    return clip


# Packs ----------------------------------------------------------------------------------------------


Devices = tuple[torch.device, torch.device]  # where a MODEL plays and where it waits: its packs do so there
KEPT = 4  # packs in memory that nobody may be using; of those of differences for each network


@lru_cache(maxsize=KEPT)
def load_pack(path: str, modified: float, dtype: torch.dtype, attn_precision, devices: Devices):
    """Patcher of a pack's units, with weights as `dtype`. One per file, dtype and devices for the whole process.

    Every user clones it: a second patcher round the same module would lose the backup of patched
    weights, and a LoRA would stay in them for ever. modified: of the file, so that a new one is read.
    """
    return new_pack_patcher(path, dtype, attn_precision, devices)


# By the network that differences were added to, and as in `load_pack`.
_on_networks: WeakKeyDictionary[torch.nn.Module, OrderedDict[tuple, comfy.model_patcher.ModelPatcher]] = (
    WeakKeyDictionary()
)


def load_differences(model, path: str, modified: float, dtype: torch.dtype, attn_precision, devices: Devices):
    """Patcher of the units that a pack of differences plays in the checkpoint of a MODEL: its unpatched weights and
    what training changed, added once. One per file, dtype, devices and network, of the last KEPT; see `load_pack`.
    """
    known = _on_networks.setdefault(model.model, OrderedDict())
    key = path, modified, dtype, attn_precision, devices
    if key not in known:
        weights = Unpatched(model)
        wanted = differences.needed(packs.describe_pack(TensorFile(path)))
        own = {name: weights[name].to("cpu", dtype, copy=True) for name in wanted if name in weights}
        known[key] = new_pack_patcher(path, dtype, attn_precision, devices, own)
        while len(known) > KEPT:
            known.popitem(last=False)
    known.move_to_end(key)
    return known[key]


def new_pack_patcher(
    path: str,
    dtype: torch.dtype,
    attn_precision,
    devices: Devices,
    own: Mapping[str, Tensor] | None = None,
    disable_dynamic: bool = False,
):
    """A patcher round freshly read units; the host's factory for deep copies. own: see `units.PackModel.load`."""
    load_device, offload_device = devices
    model = units.PackModel.load(packs.open_pack(path), dtype, attn_precision, own)
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(model, load_device=load_device, offload_device=offload_device)
    patcher.cached_patcher_init = (new_pack_patcher, (path, dtype, attn_precision, devices, own))
    patcher.add_callback_with_key(CallbacksMP.ON_CLONE, "asdm_pack", _keep_parent)
    return patcher


def _keep_parent(old, new) -> None:
    """When a clone is gone, the host's list of loaded models goes on with its parent. Clones of clones all have the one
    that is kept above: the others can be gone in the same moment, and the host would report a leak for ever.
    """
    new.parent = old.parent or old
