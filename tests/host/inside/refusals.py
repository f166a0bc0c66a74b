"""What the nodes refuse, before anything is touched, with one clear message."""

import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import pytest
import small
import torch
from execution import full_type_name
from in_host import execute, module, node_classes
from safetensors.torch import load_file, save_file

SD, SDXL, packs, models = small.SD, small.SDXL, small.packs, small.models
tensor_file = module("asdm_core.tensor_file")


def test_errors_have_a_short_public_name(tmp_path):
    node_classes()
    (tmp_path / "broken.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(tensor_file.BadFile) as caught:
        models.load_unet(str(tmp_path / "broken.safetensors"))
    assert full_type_name(type(caught.value)) == "asdm.BadFile"
    recognise = module("asdm_core.recognise")
    assert full_type_name(recognise.Unrecognised) == "asdm.Unrecognised"


@pytest.fixture
def sd_model(tmp_path):
    return small.model(tmp_path)


@pytest.fixture
def m2(tmp_path):
    return small.write_pack(tmp_path / "m2.safetensors", seed=1)


def refused(model, pack, message):
    before = repr(model.model_options), repr(model.wrappers), model.attachments.copy()
    with pytest.raises(ValueError, match=message):
        small.with_pack(model, pack)
    assert (repr(model.model_options), repr(model.wrappers), model.attachments) == before


def test_pack_of_another_family(tmp_path, sd_model):
    pack = small.write_pack(tmp_path / "xl.safetensors", SDXL, "vega")
    refused(
        sd_model,
        pack,
        r"xl.safetensors is a pack for small-sdxl UNets \(32 channels, text width 48\); this MODEL is small-sd ",
    )
    refused(
        small.model(tmp_path, small.SD2),
        small.write_pack(tmp_path / "m2.safetensors"),
        "is a pack for small-sd .* this MODEL is small-sd2 ",
    )


def test_pack_on_a_pruned_unet_from_the_stock_loader(tmp_path, m2):
    path = small.write_unet(tmp_path / "base.safetensors", cut=small.architecture.PRESETS["base"].cut)
    refused(
        comfy.sd.load_diffusion_model(path), m2, "load it with Load Pruned UNet, which keeps every layer at its address"
    )


def test_pack_on_a_pruned_unet_from_our_loader_plays(tmp_path, m2):
    base = small.Architecture.preset("base", SD)
    model = models.load_unet(
        small.write_unet(tmp_path / "base.safetensors", cut=small.architecture.PRESETS["base"].cut)
    )
    weights = small.surgery.combine(
        small.weights(SD, 0), small.weights(SD, 1), base, small.Architecture.preset("m2", SD).pack_units()
    )
    packs.write_unet(tmp_path / "both.safetensors", weights, packs.Description("unet", base, prediction="eps"))
    assert torch.equal(
        small.sample(small.with_pack(model, m2)), small.sample(models.load_unet(str(tmp_path / "both.safetensors")))
    )


def test_model_without_a_unet(m2):
    class Transformer(torch.nn.Module):
        pass

    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.diffusion_model = Transformer()
            self.model_config = comfy.supported_models.Flux({"in_channels": 4})

    model = comfy.model_patcher.ModelPatcher(Other(), torch.device("cpu"), torch.device("cpu"))
    refused(model, m2, r"asdm works on Stable Diffusion UNets \(SD1.x, SD2.x, SDXL\); this MODEL is a Transformer")
    with pytest.raises(ValueError, match="this MODEL is a Transformer"):
        execute("ASDMSaveUNet", model=model, filename_prefix="x", dtype="fp16")


def test_pack_with_a_stem(tmp_path, sd_model):
    full = small.Architecture.full(SD)
    pack = small.write_pack(tmp_path / "stem.safetensors", chosen=full, units=("stem.conv_out", "mid.0.resnet"))
    refused(sd_model, pack, "stem.safetensors plays stem.conv_out, which only a whole UNet can carry")


def damage(pack, name, change):
    sd = load_file(pack)
    path = pack.with_name(f"{name}.safetensors")
    change(sd)
    save_file(sd, path, tensor_file.TensorFile(pack).metadata)
    return path


KEY = "input_blocks.1.0.in_layers.2.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda sd: sd.pop(KEY),
            rf"bad.safetensors: {KEY} is missing \(down.0.0.resnet, wanted shape \[32, 32, 3, 3\]\)",
        ),
        (lambda sd: sd.update(more=torch.zeros(1)), "bad.safetensors: unknown tensor more"),
        (
            lambda sd: sd.update({KEY: torch.zeros(32, 32, 1, 1)}),
            rf"{KEY} \(down.0.0.resnet\) has shape \[32, 32, 1, 1\], wanted \[32, 32, 3, 3\]",
        ),
        (
            lambda sd: sd[KEY].view(-1)[5:6].fill_(float("nan")),
            rf"bad.safetensors: tensor {KEY} holds numbers that are not finite",
        ),
        (lambda sd: sd.update({KEY: sd[KEY].to(torch.int32)}), rf"bad.safetensors: tensor {KEY} has dtype I32"),
        (
            lambda sd: sd.update({KEY: sd[KEY].to(torch.int8)}),
            rf"bad.safetensors: tensor {KEY} has dtype I8; .*int8 weights need {KEY}.scale",
        ),
    ],
    ids=["missing", "extra", "shape", "nan", "dtype", "int8 without scale"],
)
def test_damaged_pack(sd_model, m2, change, message):
    refused(sd_model, damage(m2, "bad", change), message)


def test_lora_and_transformer_files_are_told_apart(tmp_path):
    save_file(small.lora(), tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="lora.safetensors: no Stable Diffusion UNet in this file.*looks like a LoRA"):
        models.load_unet(str(tmp_path / "lora.safetensors"))
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}, tmp_path / "flux.safetensors")
    with pytest.raises(ValueError, match="flux.safetensors.*looks like a transformer model"):
        models.load_unet(str(tmp_path / "flux.safetensors"))


def test_checkpoint_without_its_other_parts(tmp_path):
    path = small.write_unet(tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match="unet.safetensors: there is no text encoder in this file.*Load Pruned UNet"):
        models.load_checkpoint(tmp_path / "unet.safetensors")
    full = small.Architecture.full(SD)
    packs.write_unet(
        path,
        small.weights(SD),
        packs.Description("unet", full, companions={"text_encoder": "gone.safetensors", "vae": "v.safetensors"}),
    )
    with pytest.raises(ValueError, match="its text encoder .*gone.safetensors is not beside it"):
        models.load_checkpoint(tmp_path / "unet.safetensors")
