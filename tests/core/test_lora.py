"""The LoRA report: every module is kept, dropped with its unit, for a text encoder or unknown, and none is counted
twice.
"""

import json

import pytest
import torch
from safetensors.torch import save_file

from asdm_core import lora
from asdm_core.__main__ import main
from asdm_core.addresses import keys, lora_names, walk
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
    module = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    peft = [f"{p}{module}.to_{q}" for p in ("unet.", "base_model.model.", "base_model.model.unet.") for q in ("q", "k")]
    names = [f"{n}.lora_A.weight" for n in peft] + [f"{KOHYA}.alpha", "somebody.else.alpha"]
    result = lora.report(names, Architecture.preset("base"))
    assert (len(result.kept), result.peft, result.unknown) == (7, tuple(peft), ("somebody.else",))


# Whose layers -----------------------------------------------------------------------------------------


def file_for(config, chosen=lambda name: True, rank=4, prefix="lora_unet_", layout="diffusers"):
    """Shapes of a LoRA over a network with this config, which was trained on that."""
    found = {}
    for slot in keys(config, layout).values():
        name = slot.unit.key(slot.tensor, layout).removesuffix(".weight")
        if len(slot.shape) > 1 and chosen(name):
            spelled = name.replace(".", "_") if prefix.endswith("_") else name
            found[f"{prefix}{spelled}.lora_up.weight"] = (slot.shape[0], rank)
            found[f"{prefix}{spelled}.lora_down.weight"] = (rank, *slot.shape[1:])
    return found


def attention(name):
    return "attn" in name


CHOICES = {
    "everything": lambda name: True,
    "attention": attention,
    "values of the cross-attention": lambda name: "attn2.to_v" in name,
    "the decoder's attention": lambda name: attention(name) and name.startswith(("up_blocks", "output_blocks")),
}
MATCHED = "down.2.*.transformer.0|3|6|9, up.0.0-1.transformer.0|3|6|9"


def pruned(name):
    if name == "ssd-1b, matched":
        return Architecture.preset("ssd-1b").keeping(MATCHED)
    return Architecture.preset(name)


@pytest.mark.parametrize("layout, prefix", [("diffusers", "lora_unet_"), ("ldm", "lora_unet_")])
@pytest.mark.parametrize("chosen", CHOICES)
@pytest.mark.parametrize("name", [*PRESETS, "ssd-1b, matched"])
def test_loras_of_the_original_and_of_the_pruned_unet_are_told_apart(name, chosen, layout, prefix):
    """The right layer by way of the renumbered network's own table of keys and the origin of its units."""
    architecture = pruned(name)
    small, chosen = architecture.renumbered, CHOICES[chosen]
    theirs = file_for(architecture.config, chosen, prefix=prefix, layout=layout)
    ours = file_for(small.config, chosen, prefix=prefix, layout=layout)
    assert lora.meant(theirs, architecture) == "original"
    result = lora.report(ours, architecture)
    assert not result.dropped and not result.misfits and not result.unknown
    assert len(result.kept) == len(set(result.kept)) == len(ours) // 2
    wanted = []
    for slot in keys(small.config, layout).values():
        if len(slot.shape) > 1 and chosen(slot.unit.key(slot.tensor, layout).removesuffix(".weight")):
            home = small.origin[slot.unit.address]
            name = slot.tensor.ldm
            if slot.tensor.block is not None:
                block = small.origin[slot.owner].rpartition(".")[2]
                name = name.replace(f"transformer_blocks.{slot.tensor.block}.", f"transformer_blocks.{block}.")
            unit = next(u for u in walk(architecture.config) if u.address == home)
            wanted.append(f"{unit.ldm}.{name}".removesuffix(".weight"))
    assert list(result.kept) == wanted


def test_shapes_tell_where_names_do_not():
    """The second resnet of Base's last decoder block is the third of SD1.5's, with fewer channels in."""
    architecture = Architecture.preset("base")
    name = "lora_unet_up_blocks_2_resnets_1_conv1"
    shapes = {
        slot.shape[1]: reading for reading in lora.READINGS for slot in [lora.targets(architecture, reading)[name]]
    }
    assert len(shapes) == 2
    for c_in, reading in shapes.items():
        file = {f"{name}.lora_up.weight": (640, 4), f"{name}.lora_down.weight": (4, c_in, 3, 3)}
        assert lora.meant(file, architecture) == reading
        file = {f"{name}.hada_w1_a": (640, 4), f"{name}.hada_w1_b": (4, 9 * c_in)}
        assert lora.meant(file, architecture) == reading
        file = {f"{name}.lokr_w1": (2, 5), f"{name}.lokr_w2": (320, c_in // 5, 3, 3)}
        assert lora.meant(file, architecture) == reading


def test_where_nothing_tells_it_is_said_and_the_person_can_say_it():
    architecture = Architecture.preset("ssd-1b")
    one = {"lora_unet_down_blocks_2_attentions_0_transformer_blocks_1_attn1_to_q.lora_up.weight": (1280, 4)}
    matched = architecture.keeping(MATCHED)
    assert lora.meant(one, matched) is None
    assert lora.report(one, matched).told is False
    blocks = {r: lora.report(one, matched, r) for r in lora.READINGS}
    assert blocks["own"].kept == ("input_blocks.7.1.transformer_blocks.3.attn1.to_q",)
    assert blocks["original"].kept == () and list(blocks["original"].dropped) == ["down.2.0.transformer.1"]


def test_modules_of_another_shape_are_told():
    misfit = {f"{KOHYA}.lora_up.weight": (640, 4), f"{KOHYA}.lora_down.weight": (4, 639)}
    right = {f"{KOHYA.replace('to_out_0', 'to_q')}.lora_up.weight": (640, 4)}
    result = lora.report(misfit | right, Architecture.preset("base"))
    assert (len(result.kept), result.misfits) == (1, (KOHYA,))
    with pytest.raises(ValueError, match="1 have another shape"):
        lora.report(misfit, Architecture.preset("base"))


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
        {f"{m}.{e}": torch.zeros(640, 1) for m in (KOHYA, cut) for e in ("hada_w1_a", "alpha")},
        tmp_path / "x.safetensors",
    )
    assert main(["lora", str(tmp_path / "x.safetensors"), "--onto", "base"]) == 0
    out = capsys.readouterr().out
    assert "1 of 2 modules act" in out and "2 LoHa" in out and "down.1.1.transformer is cut: 1 dropped" in out
    assert main(["lora", str(tmp_path / "x.safetensors"), "--onto", "base", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (len(result["kept"]), list(result["dropped"]), result["kinds"]) == (1, ["down.1.1.transformer"], {"LoHa": 2})
