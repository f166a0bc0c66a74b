"""The LoRA report: every module is kept, dropped with its unit, for a text encoder or unknown, and none is counted
twice.
"""

import json

import pytest
import torch
from safetensors.torch import save_file

from asdm_core import lora
from asdm_core.__main__ import main
from asdm_core.addresses import keys, lora_names
from asdm_core.architecture import FAMILIES, PRESETS, Architecture

ENDINGS = {
    "LoRA": [
        ("lora_up.weight", "lora_down.weight", "alpha"),
        ("lora_up.weight", "lora_mid.weight", "lora_down.weight"),
        ("lora_A.weight", "lora_B.weight"),
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora_linear_layer.up.weight", "lora_linear_layer.down.weight"),
        ("lora.up.weight", "lora.down.weight", "dora_scale"),
    ],
    "LoHa": [("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"), ("hada_t1", "hada_t2", "hada_w1_a")],
    "LoKr": [("lokr_w1", "lokr_w2", "alpha"), ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2")],
    "other": [("a1.weight", "a2.weight", "b1.weight", "b2.weight"), ("diff", "diff_b")],
}
KOHYA = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"


@pytest.mark.parametrize("kind, endings", [(k, e) for k, all_of in ENDINGS.items() for e in all_of])
@pytest.mark.parametrize("module", [KOHYA, "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"])
def test_module_names_and_kinds(module, kind, endings):
    assert lora.modules(f"{module}.{e}" for e in endings) == {module: kind}
    assert lora.modules(f"{module}.{e}" for e in reversed(endings)) == {module: kind}


@pytest.mark.parametrize("dialect", ["lora_unet_", "unet.", "diffusion_model."])
@pytest.mark.parametrize("preset", PRESETS)
def test_kept_and_dropped_share_out_all_modules_as_the_architecture_does(preset, dialect):
    architecture = Architecture.preset(preset)
    wanted = {n: ldm for n, ldm in lora_names(architecture.config).items() if n.startswith(dialect)}
    result = lora.report((f"{n}.lora_up.weight" for n in wanted), architecture)
    here = architecture.keys()
    assert set(result.kept) == {ldm for ldm in wanted.values() if f"{ldm}.weight" in here}
    lost = [ldm for modules in result.dropped.values() for ldm in modules]
    assert set(lost) == set(wanted.values()) - set(result.kept)
    assert set(result.dropped) <= architecture.cut and not result.unknown and not result.text
    slots = keys(architecture.config)
    for address, modules in result.dropped.items():
        assert all(
            slots[f"{m}.weight"].owner == address or slots[f"{m}.weight"].unit.address == address for m in modules
        )


def test_nothing_is_dropped_without_a_cut():
    config = FAMILIES["sd15"]
    result = lora.report((f"{n}.alpha" for n in lora_names(config)), Architecture.full(config))
    assert result.dropped == {} and set(result.kept) == set(lora_names(config).values())


def test_base_drops_exactly_the_cut_layer():
    """BK-SDM Base keeps the first of two layers in each down block."""
    names = [
        f"lora_unet_down_blocks_1_{u}.lora_up.weight"
        for u in ("attentions_0_proj_in", "attentions_1_proj_in", "resnets_1_conv1")
    ]
    result = lora.report(names, Architecture.preset("base"))
    assert result.kept == ("input_blocks.4.1.proj_in",)
    assert result.dropped == {
        "down.1.1.resnet": ("input_blocks.5.0.in_layers.2",),
        "down.1.1.transformer": ("input_blocks.5.1.proj_in",),
    }


def test_text_encoders_and_strangers_are_told_apart():
    names = [
        f"{KOHYA}.alpha",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
        "text_encoder.x.lora_A.weight",
        "somebody.else.alpha",
    ]
    result = lora.report(names, Architecture.preset("base"))
    assert (len(result.kept), result.text, result.unknown) == (1, 2, ("somebody.else",))


def test_names_of_peft_are_told_from_strangers():
    peft = [f"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_{p}.lora_A.weight" for p in ("q", "out.0")]
    result = lora.report([*peft, f"{KOHYA}.alpha", "somebody.else.alpha"], Architecture.preset("base"))
    assert (len(result.kept), len(result.unread), len(result.unknown)) == (1, 2, 1)
    with pytest.raises(ValueError, match="reads no module of this file: 2 are named as PEFT does"):
        lora.report(peft, Architecture.preset("base"))


def test_names_of_attention_processors_are_read():
    names = [
        f"unet.down_blocks.1.attentions.{i}.transformer_blocks.0.attn1.processor.to_out_lora.up.weight"
        for i in range(2)
    ]
    result = lora.report(names, Architecture.preset("base"))
    assert len(result.kept) == 1 and list(result.dropped) == ["down.1.1.transformer"]


def test_a_file_with_nothing_for_the_family_is_refused():
    with pytest.raises(ValueError, match=r"family sd15: 1 have unknown names, as transformer\.x"):
        lora.report(["transformer.x.lora_A.weight"], Architecture.preset("base"))


def test_command_line(tmp_path, capsys):
    cut = KOHYA.replace("attentions_0", "attentions_1")
    save_file(
        {f"{m}.{e}": torch.zeros(1, 1) for m in (KOHYA, cut) for e in ("hada_w1_a", "alpha")},
        tmp_path / "x.safetensors",
    )
    assert main(["lora", str(tmp_path / "x.safetensors"), "--onto", "base"]) == 0
    out = capsys.readouterr().out
    assert "1 of 2 modules act" in out and "2 LoHa" in out and "down.1.1.transformer is cut: 1 dropped" in out
    assert main(["lora", str(tmp_path / "x.safetensors"), "--onto", "base", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (len(result["kept"]), list(result["dropped"]), result["kinds"]) == (1, ["down.1.1.transformer"], {"LoHa": 2})
