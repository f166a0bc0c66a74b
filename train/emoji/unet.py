"""The UNet: the SD1.5 topology with 64 base channels, as a diffusers network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from asdm_core.addresses import UNetConfig
from asdm_core.architecture import FAMILIES, Architecture
from asdm_core.packs import Description, dequantise, open_unet, quantise, write_unet
from asdm_core.surgery import ADDRESSED, Form, convert

CONFIG = FAMILIES["emoji"]
DIFFUSERS = Form("diffusers", "addressed")
COMPANIONS = {"vae": "emoji-vae.safetensors", "text_encoder": "emoji-text.safetensors"}


class BmmAttention:
    """Attention as two batched matrix products and a softmax.

    On a CPU and at 16x16 latents this is 1.7 times as fast to train through as fused attention, whose
    backward pass takes a third of the step. Computes what diffusers' own processors compute.
    """

    def __call__(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask=None,
        temb=None,
        **kwargs,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        b, n, _ = hidden_states.shape

        def heads(x: Tensor) -> Tensor:  # (B, N, H*D) -> (B*H, N, D)
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2).flatten(0, 1)

        q, k, v = heads(attn.to_q(hidden_states)), heads(attn.to_k(context)), heads(attn.to_v(context))
        weights = torch.bmm(q * attn.scale, k.transpose(1, 2)).softmax(-1)  # (B*H, N, M)
        out = torch.bmm(weights, v).unflatten(0, (b, attn.heads)).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


def build(config: UNetConfig = CONFIG) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_config(config.to_diffusers() | {"sample_size": 16})
    unet.set_attn_processor(BmmAttention())
    return unet


def addressed(unet: UNet2DConditionModel, config: UNetConfig = CONFIG) -> dict[str, Tensor]:
    """The network's tensors under addressed LDM names."""
    return convert(dict(unet.named_parameters()), Architecture.full(config), DIFFUSERS, ADDRESSED)


def as_stored(sd: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors after a round trip through int8 storage: the network everything later starts from."""
    return {k: v.detach().float() if v.dim() < 2 else dequantise(*quantise(v)) for k, v in sd.items()}


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
