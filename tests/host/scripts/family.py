"""Writes a family of random weights in the form of the embedded one: checkpoint, pack, text encoder, VAE."""

import json
import sys
from pathlib import Path

import torch
from comfy.taesd.taesd import TAESD
from in_host import module

sys.path.append(str(Path(__file__).parent))
from small import weights  # noqa: E402

packs = module("asdm_core.packs")
tensor_file = module("asdm_core.tensor_file")
architecture = module("asdm_core.architecture")
Architecture, Description = architecture.Architecture, packs.Description

WIDTH, LAYERS = 128, 2
TEXT_CONFIG = {
    "vocab_size": 49408,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": WIDTH,
    "eos_token_id": 49407,
    "model_type": "clip_text_model",
}


def write_text_encoder(path):
    import comfy.clip_model
    import comfy.ops

    model = comfy.clip_model.CLIPTextModel(TEXT_CONFIG, torch.float32, "cpu", comfy.ops.disable_weight_init)
    torch.manual_seed(1)
    tensors = {
        k: torch.randn_like(t) * 0.1 + k.endswith("norm.weight")
        for k, t in model.state_dict().items()
        if "text_model." in k
    }
    name = "text_model.embeddings.token_embedding.weight"
    ids = torch.cat([torch.arange(1000), torch.tensor([49406, 49407])])
    tensors[name] = torch.randn(len(ids), WIDTH)
    tensor_file.write_file(
        path, {**tensors, "token_ids": ids.int()}, {"format": "pt", "text_config": json.dumps(TEXT_CONFIG)}
    )


def write_vae(path):
    torch.manual_seed(2)
    shapes = {k: t.shape for k, t in TAESD().state_dict().items()}
    tensors = {
        k: torch.randn(shape) / shape[1:].numel() ** 0.5 if len(shape) > 1 else torch.zeros(shape)
        for k, shape in shapes.items()
    }
    tensors |= {"vae_scale": torch.tensor(0.18215), "vae_shift": torch.tensor(0.0)}
    last = max(
        (k for k in tensors if k.startswith("taesd_decoder") and k.endswith("bias")), key=lambda k: int(k.split(".")[1])
    )
    tensors[last] += 0.5  # grey on average; without it all is black
    tensor_file.write_file(path, tensors, {"format": "pt"})


def main(folder):
    """checkpoints/random.safetensors with its companions, and asdm_packs/random-m2.safetensors."""
    checkpoints, pack_folder = Path(folder, "checkpoints"), Path(folder, "asdm_packs")
    checkpoints.mkdir(parents=True)
    pack_folder.mkdir()
    config = architecture.FAMILIES["emoji"]
    teacher = weights(config)
    companions = {"text_encoder": "random-text.safetensors", "vae": "random-vae.safetensors"}
    described = Description("unet", Architecture.full(config), prediction="v", companions=companions)
    packs.write_unet(checkpoints / "random.safetensors", teacher, described, torch.float16)
    m2 = Architecture.preset("m2", config)
    described = Description("pack", m2, units=m2.pack_units())
    packs.write_pack(
        pack_folder / "random-m2.safetensors", {k: teacher[k] for k in described.keys()}, described, "int8"
    )
    write_text_encoder(checkpoints / companions["text_encoder"])
    write_vae(checkpoints / companions["vae"])
