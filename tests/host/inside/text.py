"""What training makes of captions and pictures, against the host's own CLIP Text Encode, CLIP Set Last Layer and VAE
Encode on the same checkpoint: SD1.5 and SDXL, narrow, in one file.
"""

import random
import sys
from pathlib import Path

import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.utils
import nodes as stock
import pytest
import torch
from comfy import model_management
from comfy.supported_models import SD15, SDXL
from comfy.supported_models_base import ClipTarget
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT))  # last: the host has its own `nodes`

from train.encoders import latents_of, load_text, load_vae  # noqa: E402
from train.prompts import emphasised  # noqa: E402

TOKENIZER = Path(comfy.sd1_clip.__file__).with_name("sd1_tokenizer")
LAYERS = 4
WIDTHS = {"l": 64, "g": 128}
PROMPTS = (
    "",
    "a cat",
    "1girl, (blue hair:1.3), ((smile)), [no], masterpiece",
    "a \\(plain\\) word, (nested (twice:0.5) and (again)), (:2), (x:y), (a:1.2:0.7)",
    "unbalanced ) ( and (open, (a) ) (b:1.1",
    "best quality, " * 40,
    "(" + "very long and strong, " * 30 + ":1.2) and plain",
    "supercalifragilisticexpialidocious " * 30,
    "x " * 74 + "(two words:1.4) of nine tokens that do not part",
    "embedding:nothing, and more embedding:other words",
    "早朝の街 \N{CAT FACE} café (été:1.5)",
    "(negative:-0.5) (zero:0)",
)


def tensors(kind, width, seed):
    """A text encoder by the host's names in a checkpoint."""
    torch.manual_seed(seed)
    config = {
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": width // 64,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu" if kind == "l" else "gelu",
        "eos_token_id": 49407,
    }
    g = torch.Generator().manual_seed(seed)
    net = comfy.clip_model.CLIPTextModel(config, torch.float32, "cpu", comfy.ops.disable_weight_init)
    sd = {k: torch.randn(v.shape, generator=g) * 0.2 for k, v in net.state_dict().items()}
    for key in sd:
        if "norm" in key and key.endswith("weight"):
            sd[key] += 1
    return config, sd


def open_clip(sd):
    """The second text encoder as SDXL's file has it: the host's own way back."""
    from comfy.diffusers_convert import convert_text_enc_state_dict_v20

    named = {f"clip_g.transformer.{k}": v for k, v in sd.items()}
    found = convert_text_enc_state_dict_v20(named, "clip_g")
    return {k.replace("clip_g.", "conditioner.embedders.1.model."): v for k, v in found.items()}


@pytest.fixture(scope="module")
def vae():
    """(32, 64) wide, with LDM's names: the host's own class, and the one of comfy.sd.VAE."""
    from comfy.ldm.models.autoencoder import AutoencoderKL

    torch.manual_seed(3)
    config = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    net = AutoencoderKL(ddconfig=config, embed_dim=4)
    return {
        k: 0.05 * torch.randn(v.shape) + (1.0 if "norm" in k and k.endswith("weight") else 0)
        for k, v in net.state_dict().items()
    }


@pytest.fixture(scope="module")
def checkpoints(folder, vae):
    """{family: (file, the host's CLIP)}."""
    configs = {kind: tensors(kind, width, i) for i, (kind, width) in enumerate(WIDTHS.items())}
    options = {f"clip_{kind}_model_config": config for kind, (config, _) in configs.items()}
    small = {k: v for k, v in vae.items()}
    first = {f"first_stage_model.{k}": v for k, v in small.items()}
    sd15 = {f"cond_stage_model.transformer.{k}": v for k, v in configs["l"][1].items()} | first
    sdxl = {f"conditioner.embedders.0.transformer.{k}": v for k, v in configs["l"][1].items()}
    sdxl |= open_clip(configs["g"][1]) | first
    found = {}
    for family, sd, model, tokenizer in (
        ("sd15", sd15, comfy.sd1_clip.SD1ClipModel, comfy.sd1_clip.SD1Tokenizer),
        ("sdxl", sdxl, comfy.sdxl_clip.SDXLClipModel, comfy.sdxl_clip.SDXLTokenizer),
    ):
        path = folder / f"{family}.safetensors"
        save_file({k: v.contiguous() for k, v in sd.items()}, path)
        supported = (SD15 if family == "sd15" else SDXL)({})
        # The checkpoint's text encoder by the host's own renaming, into its own class with these widths.
        its = supported.process_clip_state_dict(comfy.utils.load_torch_file(str(path)))
        clip = comfy.sd.CLIP(
            ClipTarget(tokenizer, model),
            embedding_directory=None,
            model_options=options | {"dtype": torch.float32},
            state_dict=its,
        )
        found[family] = path, clip
    return found


def encoded(clip, prompt):
    ((states, more),) = stock.CLIPTextEncode().encode(clip, prompt)[0]
    return states, more["pooled_output"]


@pytest.mark.sweep(1)
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_captions_are_what_clip_text_encode_makes_of_them(checkpoints, family):
    path, clip = checkpoints[family]
    to_text = load_text(path, TOKENIZER, rows=4)
    for prompt in PROMPTS:
        mine = to_text([prompt])
        states, pooled = encoded(clip, prompt)
        torch.testing.assert_close(
            mine.states, states.float()[:, : 4 * 77], rtol=1e-3, atol=1e-3, msg=lambda m, p=prompt: f"{p}: {m}"
        )
        if family == "sdxl":
            torch.testing.assert_close(mine.pooled, pooled.float(), rtol=1e-3, atol=1e-3)
    # Many at once are the same as one after the other: each as often as it takes.
    few = [p for p in PROMPTS if to_text([p]).states.shape[1] <= 2 * 77]
    together = to_text(few).states
    for row, prompt in zip(together, few, strict=True):
        alone = to_text([prompt]).states[0]
        torch.testing.assert_close(row, alone.repeat(len(row) // len(alone), 1), rtol=1e-4, atol=1e-4)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("skip", [1, 2, 3])
def test_clip_skip_is_clip_set_last_layer(checkpoints, family, skip):
    path, clip = checkpoints[family]
    (set_,) = stock.CLIPSetLastLayer().set_last_layer(clip, -skip)
    mine = load_text(path, TOKENIZER, clip_skip=skip)(["a (cat:1.2)"])
    states, pooled = encoded(set_, "a (cat:1.2)")
    torch.testing.assert_close(mine.states, states.float(), rtol=1e-3, atol=1e-3)
    other = load_text(path, TOKENIZER, clip_skip=skip + 1)(["a (cat:1.2)"])
    assert (other.states - states).abs().mean() > 1e-2
    if family == "sdxl":
        torch.testing.assert_close(mine.pooled, pooled.float(), rtol=1e-3, atol=1e-3)


def test_random_brackets_are_read_as_the_host_reads_them():
    draw = random.Random(0)
    for _ in range(3000):
        text = "".join(
            draw.choice(["(", ")", "\\(", "\\)", ":", "1.3", "a", "b ", "-", ","]) for _ in range(draw.randint(0, 14))
        )
        host = comfy.sd1_clip.token_weights(comfy.sd1_clip.escape_important(text), 1.0)
        assert emphasised(text) == [(comfy.sd1_clip.unescape_important(t), w) for t, w in host], text


@pytest.mark.sweep(1)
@pytest.mark.parametrize(("family", "factor"), [("sd15", 0.18215), ("sdxl", 0.13025)])
def test_the_vae_is_the_hosts(checkpoints, vae, family, factor):
    path, _ = checkpoints[family]
    pictures = torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    mine = latents_of(load_vae(path))(pictures * 2 - 1)
    host = comfy.sd.VAE(sd=dict(vae), dtype=torch.float32)
    wanted = host.encode(pictures.movedim(1, -1)) * factor
    assert model_management.vae_device().type == "cpu"
    torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-3)
