"""Names and shapes of UNets: against diffusers' own networks, and the range expressions."""

import itertools
import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from asdm_core.addresses import (
    LAYOUTS,
    NO_MID,
    UNetConfig,
    in_order,
    keys,
    lora_names,
    peft_names,
    select,
    unit,
    walk,
)
from asdm_core.architecture import FAMILIES

SD, SDXL = FAMILIES["sd15"], FAMILIES["sdxl"]

# What differs from diffusers' defaults in the published config.json of each.
_SD_BLOCKS = {
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
PUBLISHED = {
    "sd15": _SD_BLOCKS | {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": _SD_BLOCKS
    | {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "emoji": _SD_BLOCKS
    | {"block_out_channels": (64, 64, 128, 128), "cross_attention_dim": 128, "attention_head_dim": 4},
}
PARAMS = {"sd15": 859_520_964, "sd21": 865_910_724, "sdxl": 2_567_463_684}


def diffusers_shapes(config):
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in UNet2DConditionModel(**config).state_dict().items()}


def shapes(table):
    return {k: slot.shape for k, slot in table.items()}


@st.composite
def configs(draw):
    """UNets of any number of levels and layers, mixed blocks included."""
    depth = st.integers(0, 3)
    down = draw(st.lists(st.lists(depth, max_size=3).map(tuple), min_size=1, max_size=4).map(tuple))
    up = tuple(draw(st.lists(depth, min_size=len(d) + 1, max_size=len(d) + 1).map(tuple)) for d in reversed(down))
    mult = draw(st.lists(st.integers(1, 4), min_size=len(down), max_size=len(down)).map(tuple))
    heads = draw(st.sampled_from([{"num_heads": 4}, {"head_channels": 8}]))
    return UNetConfig(
        "any",
        32,
        mult,
        down,
        draw(st.integers(NO_MID, 3)),
        up,
        context_dim=24,
        use_linear=draw(st.booleans()),
        adm_channels=draw(st.sampled_from([None, 40])),
        **heads,
    )


def addresses(config):
    return [a for u in walk(config) for a in (u.address, *u.blocks)]


# Names and shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", PUBLISHED)
def test_keys_are_those_of_diffusers(family):
    assert shapes(keys(FAMILIES[family], "diffusers")) == diffusers_shapes(PUBLISHED[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_to_diffusers_builds_the_same_network(family):
    assert diffusers_shapes(FAMILIES[family].to_diffusers()) == shapes(keys(FAMILIES[family], "diffusers"))


@pytest.mark.parametrize("family", PARAMS)
def test_parameters(family):
    assert sum(u.params for u in walk(FAMILIES[family])) == PARAMS[family]


def translate(config, source, target):
    """Map of every state-dict key from one layout to the other."""
    return {s.unit.key(s.tensor, source): s.unit.key(s.tensor, target) for s in keys(config, source).values()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_translates_and_comes_back(family):
    there, back = translate(FAMILIES[family], "diffusers", "ldm"), translate(FAMILIES[family], "ldm", "diffusers")
    assert there.keys() == set(back.values()) and back.keys() == set(there.values())
    assert all(back[there[k]] == k for k in there)


def diffusers_names(family):
    """LDM key -> diffusers key, by diffusers' own converter of checkpoints."""
    checkpoint = {f"model.diffusion_model.{k}": k for k in keys(FAMILIES[family], "ldm")}
    return {ldm: key for key, ldm in convert_ldm_unet_checkpoint(checkpoint, PUBLISHED[family]).items()}


@pytest.mark.parametrize("family", PUBLISHED)
def test_every_key_translates_as_diffusers_converts_it(family):
    assert translate(FAMILIES[family], "ldm", "diffusers") == diffusers_names(family)
    ldm, diffusers = keys(FAMILIES[family], "ldm"), keys(FAMILIES[family], "diffusers")
    assert all(ldm[k] == diffusers[other] for k, other in diffusers_names(family).items())


@pytest.mark.parametrize(
    "family, depths, depths_out, middle",
    [
        ("sd15", [1] * 6 + [0] * 2, [1] * 9 + [0] * 3, 1),
        ("emoji", [1] * 6 + [0] * 2, [1] * 9 + [0] * 3, 1),
        ("sdxl", [0, 0, 2, 2, 10, 10], [0, 0, 0, 2, 2, 2, 10, 10, 10], 10),
    ],
)
def test_host_config_by_hand(family, depths, depths_out, middle):
    config = FAMILIES[family].to_host()
    assert (config["transformer_depth"], config["transformer_depth_output"], config["transformer_depth_middle"]) == (
        depths,
        depths_out,
        middle,
    )
    assert config["num_res_blocks"] == [2] * FAMILIES[family].levels
    assert config.get("num_classes") == ("sequential" if family == "sdxl" else None)


# From the LDM code and ComfyUI's unet_to_diffusers, written out by hand.
@pytest.mark.parametrize(
    "diffusers, ldm, shape",
    [
        ("conv_in.weight", "input_blocks.0.0.weight", (320, 4, 3, 3)),
        ("time_embedding.linear_2.bias", "time_embed.2.bias", (1280,)),
        ("down_blocks.0.resnets.1.time_emb_proj.weight", "input_blocks.2.0.emb_layers.1.weight", (320, 1280)),
        ("down_blocks.1.resnets.0.conv_shortcut.weight", "input_blocks.4.0.skip_connection.weight", (640, 320, 1, 1)),
        ("down_blocks.2.downsamplers.0.conv.weight", "input_blocks.9.0.op.weight", (1280, 1280, 3, 3)),
        ("down_blocks.3.resnets.1.norm2.weight", "input_blocks.11.0.out_layers.0.weight", (1280,)),
        ("mid_block.resnets.1.conv2.weight", "middle_block.2.out_layers.3.weight", (1280, 1280, 3, 3)),
        ("mid_block.attentions.0.proj_out.weight", "middle_block.1.proj_out.weight", (1280, 1280, 1, 1)),
        ("up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.1.conv.weight", (1280, 1280, 3, 3)),
        ("up_blocks.1.upsamplers.0.conv.bias", "output_blocks.5.2.conv.bias", (1280,)),
        ("up_blocks.2.resnets.0.conv1.weight", "output_blocks.6.0.in_layers.2.weight", (640, 1920, 3, 3)),
        (
            "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_k.weight",
            "output_blocks.11.1.transformer_blocks.0.attn2.to_k.weight",
            (320, 768),
        ),
        (
            "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj.weight",
            "output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight",
            (2560, 320),
        ),
        ("conv_norm_out.bias", "out.0.bias", (320,)),
        ("conv_out.weight", "out.2.weight", (4, 320, 3, 3)),
    ],
)
def test_names_by_hand(diffusers, ldm, shape):
    assert translate(SD, "diffusers", "ldm")[diffusers] == ldm
    assert keys(SD, "ldm")[ldm].shape == shape


@pytest.mark.parametrize(
    "address, ldm, skip",
    [
        ("up.0.0.resnet", "output_blocks.0.0", "down.3.1"),
        ("up.0.2.resnet", "output_blocks.2.0", "down.2.sampler"),
        ("up.1.0.resnet", "output_blocks.3.0", "down.2.1"),
        ("up.2.2.resnet", "output_blocks.8.0", "down.0.sampler"),
        ("up.3.2.resnet", "output_blocks.11.0", "stem.conv_in"),
        ("down.0.0.resnet", "input_blocks.1.0", None),
    ],
)
def test_skips(address, ldm, skip):
    assert (unit(SD, address).ldm, unit(SD, address).skip) == (ldm, skip)


def test_scales():
    assert {u.address: u.scale for u in walk(SD) if u.kind in ("downsampler", "upsampler")} == {
        "down.0.sampler": 2,
        "down.1.sampler": 4,
        "down.2.sampler": 8,
        "up.0.sampler": 4,
        "up.1.sampler": 2,
        "up.2.sampler": 1,
    }


@given(configs())
def test_names_are_unique_in_any_config(config):
    n = sum(len(u.tensors) for u in walk(config))
    assert all(len(keys(config, layout)) == n for layout in LAYOUTS)
    listed = addresses(config)
    assert len(set(listed)) == len(listed)
    assert all(
        unit(config, a).address == (a if a in {u.address for u in walk(config)} else a.rpartition(".")[0])
        for a in listed
    )


@given(configs())
def test_every_push_is_popped_once(config):
    layers = {u.layer for u in walk(config) if u.side == "down"} | {"stem.conv_in"}
    popped = [u.skip for u in walk(config) if u.skip]
    assert sorted(popped) == sorted(layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_of_a_unet_in_the_order_of_execution(family):
    config = FAMILIES[family]
    assert [block for block, _ in itertools.groupby(u.block for u in walk(config))] == [
        "stem",
        *(f"down.{n}" for n in range(config.levels)),
        *["mid"] * (config.mid != NO_MID),
        *(f"up.{n}" for n in range(config.levels)),
        "stem",
    ]


@given(configs())
def test_config_round_trips(config):
    assert UNetConfig.from_host(config.to_host(), "any") == config
    assert UNetConfig.from_dict(config.to_dict()) == config


def test_unknown_layout():
    with pytest.raises(ValueError, match="'hf'"):
        keys(SD, "hf")


def test_mixed_blocks_are_not_for_diffusers():
    mixed = UNetConfig("mixed", 32, (1,), ((1, 0),), 0, ((0, 0, 0),), context_dim=8, num_heads=4)
    with pytest.raises(ValueError, match=r"down\.0"):
        mixed.to_diffusers()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"down": ((1, 1),)}, "one entry per level"),
        ({"up": ((0, 0),) * 4}, "level 0"),
        ({"num_heads": None}, "num_heads or head_channels"),
        ({"head_channels": 64}, "num_heads or head_channels"),
        ({"num_heads": 0}, "num_heads"),
        ({"model_channels": 0}, "model_channels"),
        ({"model_channels": 320.0}, "model_channels"),
        ({"context_dim": True}, "context_dim"),
        ({"context_dim": "768"}, "context_dim"),
        ({"channel_mult": (1, 2, 4, 0)}, "channel_mult"),
        ({"channel_mult": (1, 2, 4, 1.5)}, "channel_mult"),
        ({"channel_mult": "1244"}, "channel_mult"),
        ({"down": ((1, 1), (1, -1), (1, 1), (0, 0))}, "down"),
        ({"down": ((1, 1), (1, 10**9), (1, 1), (0, 0))}, "down"),
        ({"down": 3}, "down"),
        ({"down": ((0,) * 60,), "up": ((0,) * 61,), "channel_mult": (1,)}, "at most 16 levels of 40 layers"),
        (
            {"down": ((99,) * 8,) * 4, "up": ((99,) * 9,) * 4},
            "1000 transformer blocks in all, got 4 levels of up to 9 layers with 6732 blocks",
        ),
        ({"mid": -3}, "mid"),
        ({"use_linear": "no"}, "use_linear"),
        ({"family": 15}, "family"),
        ({"num_heads": 7}, "heads"),
        ({"wings": 2}, "wings"),
    ],
)
def test_bad_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig.from_dict(SD.to_dict() | change)


@pytest.mark.parametrize("data", [None, 5, "sd15", [["family"]]])
def test_config_that_is_no_table(data):
    with pytest.raises(ValueError, match="UNet config"):
        UNetConfig.from_dict(data)


def test_missing_field():
    with pytest.raises(ValueError, match="context_dim"):
        UNetConfig.from_dict({k: v for k, v in SD.to_dict().items() if k != "context_dim"})


# LoRA -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_names_reach_every_matrix_in_every_dialect(family):
    names = lora_names(FAMILIES[family])
    matrices = {k.removesuffix(".weight") for k, s in keys(FAMILIES[family]).items() if len(s.shape) > 1}
    assert set(names.values()) == matrices
    for dialect in (
        r"lora_unet_(input|middle|output)_block",
        r"lora_unet_(down|mid|up)_block",
        r"unet\.",
        r"diffusion_model\.",
    ):
        reached = [target for name, target in names.items() if re.match(dialect, name)]
        assert len(reached) == len(set(reached))
        assert set(reached) >= {
            m for m in matrices if "_blocks." in m and m != "input_blocks.0.0" or m.startswith("middle")
        }


@pytest.mark.parametrize("family", PUBLISHED)
def test_lora_names_point_at_the_module_that_diffusers_means(family):
    with torch.device("meta"):
        modules = dict(UNet2DConditionModel(**PUBLISHED[family]).named_modules())
    targets = {name for name, m in modules.items() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    ldm = {
        diffusers.removesuffix(".weight"): key.removesuffix(".weight")
        for key, diffusers in diffusers_names(family).items()
    }
    wanted = {}
    for name in targets:
        spelled = name.replace(".to_", ".processor.to_")
        spelled = spelled[:-2] if spelled.endswith(".to_out.0") else spelled
        for there in (
            spelled,
            f"unet.{spelled}",
            f"lora_unet_{name.replace('.', '_')}",
            f"lycoris_{name.replace('.', '_')}",
        ):
            wanted[there] = ldm[name]
        wanted[f"diffusion_model.{ldm[name]}"] = wanted[f"lora_unet_{ldm[name].replace('.', '_')}"] = ldm[name]
    assert lora_names(FAMILIES[family]) == wanted
    assert len(wanted) == 6 * len(targets)


@given(configs())
def test_lora_names_of_different_modules_never_meet(config):
    spelled = [
        name
        for slot in keys(config).values()
        if len(slot.shape) > 1
        for name in {slot.unit.key(slot.tensor, layout).removesuffix(".weight").replace(".", "_") for layout in LAYOUTS}
    ]
    assert len(set(spelled)) == len(spelled)


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0",
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out",
        "lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0",
        "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_out.0",
    ],
)
def test_lora_dialects_by_hand(name):
    assert lora_names(SD)[name] == "input_blocks.4.1.transformer_blocks.0.attn1.to_out.0"
    assert peft_names(SD)["unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"] == lora_names(SD)[name]


# Addresses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address, found",
    [
        ("down.2.0.transformer", "down.2.0.transformer"),
        ("down.2.0.transformer.9", "down.2.0.transformer"),
        ("down.2.0.transformer.9.attn2", "down.2.0.transformer"),
        ("mid.0.transformer.0.ff", "mid.0.transformer"),
        ("stem.label_embed", "stem.label_embed"),
    ],
)
def test_unit_of_an_address(address, found):
    assert unit(SDXL, address).address == found


@pytest.mark.parametrize(
    "address",
    [
        "",
        "down",
        "down.2.0",
        "down.7.0.resnet",
        "down.2.0.resnet.0",
        "down.2.0.resnet.attn1",
        "down.2.0.transformer.10",
        "down.2.0.transformer.attn1",
        "down.2.0.transformer.0.attn3",
        "down.2.0.transformer.0.attn1.ff",
        "down.2.0.transformer.00",
        "down.0.0.transformer",
        "Down.2.0.resnet",
        "down.2.0.transformer.-1",
    ],
)
def test_addresses_that_are_none(address):
    with pytest.raises(ValueError, match=re.escape(repr(address))):
        unit(SDXL, address)


@pytest.mark.parametrize(
    "expression, wanted",
    [
        ("", ""),
        ("down.0.1.resnet", "down.0.1.resnet"),
        ("down.0.1", "down.0.1.resnet down.0.1.transformer"),
        ("down.0-1.1", "down.0.1.resnet down.0.1.transformer down.1.1.resnet down.1.1.transformer"),
        ("up.3.1.resnet|transformer", "up.3.1.resnet up.3.1.transformer"),
        ("up.0", "up.0.0.resnet up.0.1.resnet up.0.2.resnet up.0.sampler"),
        ("up.0|2.sampler", "up.0.sampler up.2.sampler"),
        ("*.*.sampler", "down.0.sampler down.1.sampler down.2.sampler up.0.sampler up.1.sampler up.2.sampler"),
        ("mid, down.3", "mid.0.resnet mid.0.transformer mid.1.resnet down.3.0.resnet down.3.1.resnet"),
        ("mid\n down.3.0", "mid.0.resnet mid.0.transformer mid.1.resnet down.3.0.resnet"),
        ("mid, !mid.0", "mid.1.resnet"),
        ("mid, !mid.0, mid.0.resnet", "mid.0.resnet mid.1.resnet"),
        ("mid.0.transformer.0", "mid.0.transformer.0"),
        ("stem.conv_in|conv_out", "stem.conv_in stem.conv_out"),
        (["down.0.0", "!*.*.*.transformer"], "down.0.0.resnet"),
    ],
)
def test_select(expression, wanted):
    assert select(SD, expression) == set(wanted.split())


@pytest.mark.parametrize(
    "expression, wanted",
    [
        ("down.1.0.transformer.*, !down.1.0.transformer.0", "down.1.0.transformer.1"),
        ("down.1.0.transformer.1, !down.1.0.transformer", ""),
        ("down.1.0.transformer.1, !down.1", ""),
        ("down.1.0, !down.1.0.transformer.0", "down.1.0.resnet down.1.0.transformer.1"),
        (
            "down.2.*.transformer.8-9",
            "down.2.0.transformer.8 down.2.0.transformer.9 down.2.1.transformer.8 down.2.1.transformer.9",
        ),
    ],
)
def test_select_transformer_blocks(expression, wanted):
    assert select(SDXL, expression) == set(wanted.split())


@pytest.mark.parametrize(
    "expression, message",
    [
        ("down.4", "'down.4' matches no unit of this sd15 UNet; its units are: down.0.0.resnet, "),
        ("down.0.2", "'down.0.2' matches no unit"),
        ("mid, up.0.0.transformer", "'up.0.0.transformer' matches no unit"),
        ("down.0.0.transformer.1", "'down.0.0.transformer.1' matches no unit"),
        ("down.0.0.transformer.0.attn1", "'down.0.0.transformer.0.attn1' matches no unit"),
        ("down.2-0", "the range '2-0' in 'down.2-0' runs backwards"),
        ("down..1", "cannot read '' in 'down..1'"),
        ("!", "cannot read '' in '!'"),
        ("down.0;up.0", "cannot read '0;up' in 'down.0;up.0'"),
        ("DOWN.0", "cannot read 'DOWN'"),
        ("down.0-", "cannot read '0-'"),
        ("!down.9", "'!down.9' matches no unit"),
    ],
)
def test_select_refuses(expression, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        select(SD, expression)


@given(st.data())
def test_addresses_select_themselves(data):
    config = data.draw(configs())
    chosen = data.draw(st.sets(st.sampled_from(addresses(config))))
    assert select(config, sorted(chosen)) == chosen
    assert select(config, ", ".join(sorted(chosen))) == chosen
    assert select(config, ["*", *(f"!{a}" for a in addresses(config))]) == set()


@given(st.data())
def test_what_is_taken_out_is_out_and_nothing_else(data):
    config = data.draw(configs())
    out = data.draw(st.sampled_from(addresses(config)))
    units = {u.address: set(u.blocks) for u in walk(config)}
    left = select(config, ["*", f"!{out}"])
    covered = {b for a in left for b in units.get(a, {a}) or {a}}
    everything = {b for a, blocks in units.items() for b in blocks or {a}}
    assert covered == everything - (units.get(out, {out}) or {out})


@given(st.data())
def test_in_order_is_the_order_of_execution(data):
    config = data.draw(configs())
    listed = addresses(config)
    chosen = data.draw(st.lists(st.sampled_from(listed)))
    assert list(in_order(config, chosen)) == [a for a in listed if a in chosen]


def test_in_order_refuses_unknown_addresses():
    with pytest.raises(ValueError, match=r"'mid\.2\.resnet'"):
        in_order(SD, ["mid.0.resnet", "mid.2.resnet"])
