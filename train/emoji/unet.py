"""The UNet: the SD1.5 topology with 64 base channels, as a diffusers network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from asdm_core.addresses import UNetConfig
from asdm_core.architecture import FAMILIES, Architecture
from asdm_core.packs import Description, open_unet, write_unet
from asdm_core.surgery import ADDRESSED, Form, convert

from ..attention import BmmAttention

CONFIG = FAMILIES["emoji"]
DIFFUSERS = Form("diffusers", "addressed")
COMPANIONS = {"vae": "emoji-vae.safetensors", "text_encoder": "emoji-text.safetensors"}


def build(config: UNetConfig = CONFIG) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_config(config.to_diffusers() | {"sample_size": 16})
    unet.set_attn_processor(BmmAttention())
    return unet


def addressed(unet: UNet2DConditionModel, config: UNetConfig = CONFIG) -> dict[str, Tensor]:
    """The network's tensors under addressed LDM names."""
    return convert(dict(unet.named_parameters()), Architecture.full(config), DIFFUSERS, ADDRESSED)


def save_unet(
    path: Path, unet: UNet2DConditionModel, licence: str, training: Mapping, config: UNetConfig = CONFIG
) -> None:
    """Write a whole UNet: int8 per output channel, vectors in float32."""
    description = Description(
        "unet", Architecture.full(config), prediction="v", licence=licence, training=training, companions=COMPANIONS
    )
    write_unet(path, {k: v.detach().float() for k, v in addressed(unet, config).items()}, description, "int8")


def load_unet(path: Path) -> UNet2DConditionModel:
    """The network in a file of `save_unet`, dequantised."""
    loaded = open_unet(path)
    config = loaded.description.architecture.config
    unet = build(config)
    sd = convert(dict(loaded.tensors), Architecture.full(config), ADDRESSED, DIFFUSERS)
    unet.load_state_dict({k: v.float() for k, v in sd.items()})
    return unet.eval()
