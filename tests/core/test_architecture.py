"""Architectures: the presets against their papers, what is refused and why, and random choices of units."""

import json
import re
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from asdm_core import surgery
from asdm_core.addresses import LAYOUTS, NO_MID, RESNET_MID, UNetConfig, keys, unit, walk
from asdm_core.architecture import FAMILIES, FORMAT, NUMBERINGS, PRESETS, Architecture

SD, SDXL = FAMILIES["sd15"], FAMILIES["sdxl"]
LDM = surgery.Form("ldm", "renumbered")

# Narrow skeletons with the block structure of SD1.5 and SDXL, quick to run.
_SD: dict[str, Any] = {"down": SD.down, "mid": 1, "up": SD.up}
NARROW = UNetConfig("narrow", 32, (1, 2, 4, 4), **_SD, context_dim=24, num_heads=4)
NARROW_XL = UNetConfig(
    "narrow-xl",
    32,
    (1, 2, 4),
    SDXL.down,
    10,
    SDXL.up,
    context_dim=24,
    head_channels=16,
    use_linear=True,
    adm_channels=6 * 256 + 16,
)
# The same in few blocks, with a deepest level that can go.
SHALLOW = UNetConfig(
    "shallow",
    32,
    (1, 2, 2),
    ((0, 0), (1, 1), (2, 2)),
    2,
    ((2, 2, 2), (1, 1, 1), (0, 0, 0)),
    context_dim=24,
    head_channels=16,
    use_linear=True,
)
# Every layer keeps its width: whatever the skips allow can be cut.
FLAT = UNetConfig(
    "flat", 32, (1, 1, 1), ((2, 0), (1, 3), (0, 1)), 2, ((1, 0, 2), (1, 1, 1), (0, 2, 0)), context_dim=24, num_heads=4
)


def shapes(table):
    return {k: slot.shape for k, slot in table.items()}


def addresses(config):
    return [a for u in walk(config) for a in (u.address, *u.blocks)]


# Presets --------------------------------------------------------------------------------------------

# LDM blocks of the student, in order, and the skeleton's blocks they came from: the re-index tables of
# BK-SDM's and A-SDM's training code. None: the student has no mid block.
_MID = True
RENUMBERED = {
    "base": ([0, 1, 3, 4, 6, 7, 9, 10], [0, 2, 3, 5, 6, 8, 9, 11], _MID),
    "small": ([0, 1, 3, 4, 6, 7, 9, 10], [0, 2, 3, 5, 6, 8, 9, 11], None),
    "tiny": ([0, 1, 3, 4, 6, 7], [3, 5, 6, 8, 9, 11], None),
    "m1": ([0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11], _MID),
    "m2": ([0, 1, 3, 4, 6, 7, 8, 9, 10, 11], [0, 1, 2, 3, 4, 5, 6, 8, 9, 11], _MID),
    "m3": ([0, 1, 3, 4, 6, 7, 9, 10, 11], [0, 1, 2, 3, 5, 6, 8, 9, 11], _MID),
}

# The depths ComfyUI knows of each (comfy/supported_models.py, model_detection.py).
HOST = {
    "base": ([1, 1, 1, 1], [1, 1, 1, 0], [1] * 6 + [0, 0], 1),
    "small": ([1, 1, 1, 1], [1, 1, 1, 0], [1] * 6 + [0, 0], NO_MID),
    "tiny": ([1, 1, 1], [1, 1, 1], [1] * 6, NO_MID),
    "m1": ([1, 2, 2, 2], [1] * 5 + [0, 0], [1] * 8 + [0] * 3, 1),
    "m2": ([1, 1, 2, 2], [1] * 4 + [0, 0], [1] * 7 + [0] * 3, 1),
    "m3": ([1, 1, 1, 2], [1] * 3 + [0, 0], [1] * 6 + [0] * 3, 1),
    "ssd-1b": ([2, 2, 2], [0, 0, 2, 2, 4, 4], [0, 0, 0, 1, 1, 2, 10, 4, 4], RESNET_MID),
    "vega": ([2, 2, 2], [0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1, 2, 2, 2], RESNET_MID),
    "koala-1b": ([1, 1, 1], [0, 2, 6], [0, 0, 2, 2, 6, 6], 6),
    "koala-700m": ([1, 1, 1], [0, 2, 5], [0, 0, 2, 2, 5, 5], NO_MID),
}

PARAMS = {  # the totals of the published files, and those of the A-SDM tables for the combined UNets
    "base": 579_384_964,
    "small": 482_346_884,
    "tiny": 323_384_964,
    "m1": 848_791_044,
    "m2": 809_513_604,
    "m3": 659_688_324,
    "ssd-1b": 1_331_334_404,
    "vega": 745_225_604,
    "koala-1b": 1_161_184_324,
    "koala-700m": 782_822_724,
}


def block_origin(preset, side):
    """LDM blocks of one side in the student's order, as numbers of the skeleton."""
    origins = {}
    for key, slot in Architecture.preset(preset).keys("ldm", "renumbered").items():
        if key.startswith(side):
            origins.setdefault(int(key.split(".")[1]), set()).add(int(slot.unit.ldm.split(".")[1]))
    assert list(origins) == list(range(len(origins))) and all(len(o) == 1 for o in origins.values())
    return [o.pop() for o in origins.values()]


def test_tables_are_complete():
    assert HOST.keys() == PARAMS.keys() == PRESETS.keys()


@pytest.mark.parametrize("preset", RENUMBERED)
def test_blocks_come_from_where_the_papers_say(preset):
    inputs, outputs, mid = RENUMBERED[preset]
    assert block_origin(preset, "input_blocks") == inputs
    assert block_origin(preset, "output_blocks") == outputs
    assert bool(mid) == any(k.startswith("middle_block") for k in Architecture.preset(preset).keys("ldm", "renumbered"))


@pytest.mark.parametrize("family", ["sd15", "sd21", "emoji"])
@pytest.mark.parametrize("preset", RENUMBERED)
def test_keys_are_renumbered_as_the_papers_say(preset, family):
    blocks = dict(zip(("input_blocks", "output_blocks"), RENUMBERED[preset], strict=False))
    chosen = Architecture.preset(preset, FAMILIES[family])
    wanted = {}
    for key, slot in chosen.keys("ldm", "renumbered").items():
        root, number, rest = key.split(".", 2)
        wanted[f"{root}.{blocks[root][int(number)] if root in blocks else number}.{rest}"] = slot
    assert wanted == chosen.keys()


# Blocks of the skeleton, in LDM numbers, that a combined UNet takes from base; conv_in (input block 0) stays the
# host's.
FROM_BASE = {
    "m1": ([1, 3], [9, 11]),
    "m2": ([1, 3, 4, 6], [6, 8, 9, 11]),
    "m3": ([1, 3, 4, 6, 7, 9], [3, 5, 6, 8, 9, 11]),
}


@pytest.mark.parametrize("preset", FROM_BASE)
def test_combined_unets_own_the_blocks_of_base(preset):
    paths = [unit(SD, a).ldm.split(".") for a in Architecture.preset(preset).own]
    for root, numbers in zip(("input_blocks", "output_blocks"), FROM_BASE[preset], strict=True):
        assert sorted({int(p[1]) for p in paths if p[0] == root}) == numbers
    assert {p[0] for p in paths} == {"input_blocks", "output_blocks"}


@pytest.mark.parametrize(
    "preset, layers, mid",
    [
        ("base", (1, 1, 1, 1), "UNetMidBlock2DCrossAttn"),
        ("small", (1, 1, 1, 1), None),
        ("tiny", (1, 1, 1), None),
        ("m1", (1, 2, 2, 2), "UNetMidBlock2DCrossAttn"),
        ("m2", (1, 1, 2, 2), "UNetMidBlock2DCrossAttn"),
        ("m3", (1, 1, 1, 2), "UNetMidBlock2DCrossAttn"),
        ("ssd-1b", (2, 2, 2), "UNetMidBlock2D"),
    ],
)
def test_diffusers_config_of_the_renumbered_network(preset, layers, mid):
    config = Architecture.preset(preset).renumbered.config.to_diffusers()
    assert (config["layers_per_block"], config["mid_block_type"]) == (layers, mid)
    if preset == "ssd-1b":  # the depths in Segmind's own config.json
        assert config["transformer_layers_per_block"][1:] == [[2, 2], [4, 4]]
        assert config["reverse_transformer_layers_per_block"][:2] == [[4, 4, 10], [2, 1, 1]]


def test_shortened_transformers_keep_their_first_blocks():
    chosen = Architecture.preset("koala-1b")
    assert [chosen.renumbered.origin[f"up.0.1.transformer.{i}"] for i in range(6)] == [
        f"up.0.2.transformer.{i}" for i in range(6)
    ]
    assert chosen.kept_blocks(unit(SDXL, "mid.0.transformer")) == tuple(range(6))


def test_blocks_are_renumbered_over_a_gap():
    chosen = Architecture(SDXL, {"mid.0.transformer.0", "mid.0.transformer.4"})
    table = chosen.keys("ldm", "renumbered")
    homes = [table[f"middle_block.1.transformer_blocks.{i}.ff.net.2.weight"].tensor.block for i in range(8)]
    assert chosen.renumbered.config.mid == 8 and homes == [1, 2, 3, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    "preset, family", [("tiny", "sdxl"), ("m1", "sdxl"), ("ssd-1b", "sd15"), ("koala-1b", "emoji")]
)
def test_presets_of_another_block_structure_are_refused(preset, family):
    with pytest.raises(ValueError, match=f"matches no unit of this {family} UNet"):
        Architecture.preset(preset, FAMILIES[family])


def test_full_cuts_and_owns_nothing():
    full = Architecture.full(SD)
    assert (full.cut, full.own, full.name, full.kept) == (frozenset(), (), "full", walk(SD))
    assert full.renumbered.config == SD and all(a == b for a, b in full.renumbered.origin.items())
    assert full.keys() == full.keys("ldm", "renumbered") == keys(SD)


def test_choose_cuts_and_trains_only_inside_the_blocks():
    chosen = Architecture.choose(SD, "down.*.1, up.*.1", on="down.0")
    assert chosen.cut_units == ("down.0.1.resnet", "down.0.1.transformer") and chosen.cut == set(chosen.cut_units)
    assert chosen.own == ("down.0.0.resnet", "down.0.0.transformer", "down.0.sampler")
    deep = Architecture.choose(SDXL, "down.2.*.transformer.3-9", on="down.2.0")
    assert deep.cut == {f"down.2.0.transformer.{i}" for i in range(3, 10)} and deep.cut_units == ()
    assert Architecture.choose(SD, on="up.3.2").own == ("up.3.2.resnet", "up.3.2.transformer")
    assert Architecture.choose(SD).own == ()


def test_what_is_cut_of_some_units_is_they_and_their_blocks():
    chosen = Architecture(SDXL, {"down.1.0.transformer.1", "down.2.0.transformer", "mid.1.resnet"})
    assert chosen.cut_in({"down.1.0.transformer", "mid.1.resnet"}) == {"down.1.0.transformer.1", "mid.1.resnet"}
    assert chosen.cut_in({"down.1.0.transformer.1"}) == {"down.1.0.transformer.1"}
    assert chosen.cut_in({"down.1.0.resnet"}) == chosen.cut_in(()) == frozenset()


def test_has_tells_cut_tensors_from_kept_ones():
    chosen, table = Architecture(SDXL, {"down.1.0.transformer.1", "mid.0.transformer", "mid.1.resnet"}), keys(SDXL)
    assert not chosen.has(table["input_blocks.4.1.transformer_blocks.1.norm1.weight"])
    assert chosen.has(table["input_blocks.4.1.transformer_blocks.0.norm1.weight"])
    assert chosen.has(table["input_blocks.4.1.proj_in.weight"])
    assert not chosen.has(table["middle_block.1.transformer_blocks.9.norm1.weight"])


@pytest.mark.parametrize("preset", HOST)
def test_host_config_of_the_renumbered_network(preset):
    config = Architecture.preset(preset).renumbered.config.to_host()
    assert (
        config["num_res_blocks"],
        config["transformer_depth"],
        config["transformer_depth_output"],
        config["transformer_depth_middle"],
    ) == HOST[preset]


@pytest.mark.parametrize("preset", PARAMS)
def test_parameters(preset):
    chosen = Architecture.preset(preset)
    assert chosen.params == PARAMS[preset]
    for layout in LAYOUTS:
        for numbering in NUMBERINGS:
            assert sum(s.tensor.numel for s in chosen.keys(layout, numbering).values()) == PARAMS[preset]


# The tables print 18.60 and 87.55, sums of rounded numbers.
@pytest.mark.parametrize("preset, own", [("m1", 18.605120), ("m2", 87.559360), ("m3", 336.057280)])
def test_own_parameters_of_combined_unets(preset, own):
    chosen = Architecture.preset(preset)
    assert sum(slot.tensor.numel for slot in chosen.keys().values() if slot.unit.address in chosen.own) == own * 1e6
    assert not any(a.startswith(("stem.", "mid.")) for a in chosen.own)


@pytest.mark.parametrize("preset", PRESETS)
def test_diffusers_builds_the_renumbered_network(preset):
    chosen = Architecture.preset(preset)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**chosen.renumbered.config.to_diffusers())
    assert {k: tuple(v.shape) for k, v in unet.state_dict().items()} == shapes(chosen.keys("diffusers", "renumbered"))


@pytest.mark.parametrize(
    "name, blocks", [("m1", "down.0, up.3"), ("m2", "down.0-1, up.2-3"), ("m3", "down.0-2, up.1-3")]
)
def test_combined_unets_are_base_over_the_original(name, blocks):
    assert Architecture.preset("base").over(blocks) == Architecture.preset(name)


@pytest.mark.parametrize("preset", PRESETS)
def test_over_everything_is_the_student(preset):
    student = Architecture.preset(preset)
    assert student.over("*") == student


def test_over_invents_no_weights():
    # down.1 of M1 is the host's, so M1 has nothing to play there.
    assert Architecture.preset("m1").over("down.1") == Architecture.full(SD)


@pytest.mark.parametrize("preset", PRESETS)
def test_named_finds_the_preset(preset):
    chosen = Architecture.preset(preset)
    assert Architecture(chosen.config, chosen.cut, chosen.own).named() == chosen
    assert Architecture.full(chosen.config).named().name == "full"
    assert Architecture(chosen.config, frozenset({"mid.0.resnet"})).named().name == ""


def test_presets_stand_on_other_widths():
    small = Architecture.preset("m2", FAMILIES["emoji"])
    assert small.cut == Architecture.preset("m2").cut and small.config is FAMILIES["emoji"]


def test_packs_leave_the_stem_to_the_host():
    base = Architecture.preset("base")
    assert (
        set(base.pack_units(stem=True)) - set(base.pack_units())
        == {a for a in base.own if a.startswith("stem.")}
        != set()
    )
    assert Architecture.preset("m2").pack_units() == Architecture.preset("m2").own


@pytest.mark.parametrize("name", ["", "m4", "M2"])
def test_unknown_preset(name):
    with pytest.raises(ValueError, match=f"no preset {name!r}; presets are base, small, tiny, m1"):
        Architecture.preset(name)


# What cannot be -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cut, message",
    [
        ("down.1.0", "down.1.0.resnet cannot be cut: it turns 320 channels into 640"),
        ("down.2.0.resnet", "down.2.0.resnet cannot be cut: it turns 640 channels into 1280"),
        ("up.2.0", "up.2.0.resnet cannot be cut: it turns 1280 channels into 640"),
        ("up.3.0.resnet", "up.3.0.resnet cannot be cut: it turns 640 channels into 320"),
        ("down.0.sampler", "down.0.sampler cannot be cut alone: down.0.sampler and up.2.sampler are a pair"),
        ("up.0.sampler", "up.0.sampler cannot be cut alone: down.2.sampler and up.0.sampler are a pair"),
        (
            "down.2.sampler, up.0.sampler",
            "down.2.sampler can only be cut together with everything beneath it; down.3.0.resnet is kept",
        ),
        ("down.2.sampler, up.0.sampler, down.3", "everything beneath it; up.0.0.resnet is kept"),
        (
            "down.1.sampler, up.1.sampler, down.2-3.*.resnet|transformer, up.0-1.*.resnet|transformer",
            "down.1.sampler can only be cut together with everything beneath it; down.2.sampler is kept",
        ),
        ("stem.conv_in", "stem.conv_in cannot be cut; every network needs it"),
        ("stem.conv_out", "stem.conv_out cannot be cut; every network needs it"),
        ("stem.norm_out", "stem.norm_out cannot be cut; every network needs it"),
        ("stem.time_embed", "stem.time_embed cannot be cut; every network needs it"),
        ("mid.0.transformer.0", "every block of mid.0.transformer is cut; cut mid.0.transformer itself instead"),
    ],
)
def test_refused_cuts(cut, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Architecture.choose(SD, cut)


@pytest.mark.parametrize(
    "address", ["mid.2.resnet", "down.0.0", "down.2.0.transformer.1", "down.2.0.transformer.0.attn1", ""]
)
def test_unknown_addresses_are_named(address):
    with pytest.raises(ValueError, match=re.escape(f"no unit {address!r} in a sd15 UNet")):
        Architecture(SD, {"mid.1.resnet", address})


def test_all_blocks_of_a_transformer_are_the_transformer():
    u = unit(SDXL, "up.0.1.transformer")
    with pytest.raises(
        ValueError, match=r"every block of up\.0\.1\.transformer is cut; cut up\.0\.1\.transformer itself"
    ):
        Architecture(SDXL, u.blocks)
    assert Architecture(SDXL, u.blocks[1:]).kept_blocks(u) == (0,)


def test_pooled_conditioning_cannot_be_cut():
    with pytest.raises(ValueError, match=r"stem\.label_embed cannot be cut"):
        Architecture(SDXL, {"stem.label_embed"})


@pytest.mark.parametrize(
    "own, message",
    [
        (("down.0.1.resnet",), "down.0.1.resnet is both cut and trained"),
        (("down.9.1.resnet",), "no unit 'down.9.1.resnet'"),
        (
            ("up.3.0.transformer.0",),
            "up.3.0.transformer.0 is a transformer block; weights of its own has a whole unit, up.3.0.transformer",
        ),
    ],
)
def test_refused_own_units(own, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Architecture(SD, {"down.0.1.resnet"}, own)


@pytest.mark.parametrize(
    "cut, why",
    [
        ("down.0.1.resnet", "down.0.1 keeps its transformer without its resnet"),
        ("down.0.1", "level 0 keeps 1 down and 3 up layers; the up side needs one more"),
        ("down.3.0-1.resnet, up.0.1-2.resnet", "level 3 keeps no down layer"),
        ("down.0.1, up.3.1, mid.0.resnet", "the mid block keeps mid.0.transformer, mid.1.resnet"),
        ("mid.1", "the mid block keeps mid.0.resnet, mid.0.transformer"),
    ],
)
def test_no_renumbered_form(cut, why):
    chosen = Architecture.choose(SD, cut)
    with pytest.raises(
        ValueError,
        match=re.escape(f"this choice of units has no renumbered form ({why}); it can only be kept addressed"),
    ):
        _ = chosen.renumbered
    assert chosen.keys("ldm") and chosen.keys("diffusers")


def test_other_layers_than_the_presets_can_go():
    # The first layer of the deepest encoder block instead of the last: its neighbours' skips stay right.
    small = Architecture.choose(SD, "down.3.0, up.0.1").renumbered
    assert small.config == Architecture.choose(SD, "down.3.1, up.0.1").renumbered.config
    assert small.origin["down.3.0.resnet"] == "down.3.1.resnet" and small.origin["up.0.1.resnet"] == "up.0.2.resnet"
    # Without the last decoder layer the one before it would get the skip of the last.
    with pytest.raises(
        ValueError,
        match=r"up\.0\.1\.resnet takes its skip from down\.3\.0, the small network would give it down\.2\.sampler",
    ):
        _ = Architecture.choose(SD, "down.3.1, up.0.2").renumbered


def test_unknown_layout_and_numbering():
    with pytest.raises(ValueError, match="'hf'"):
        Architecture.full(SD).keys("hf")
    with pytest.raises(ValueError, match="'dense'"):
        Architecture.full(SD).keys("ldm", "dense")


def test_equal_choices_are_equal():
    # A block inside a cut transformer says nothing new.
    more = Architecture(SDXL, {"mid.0.transformer", "mid.0.transformer.3"})
    assert more == Architecture(SDXL, ["mid.0.transformer"]) and hash(more) == hash(
        Architecture(SDXL, {"mid.0.transformer"})
    )
    assert Architecture(SD, own=("up.3.1.resnet", "down.0.0.resnet")) == Architecture(
        SD, own=("down.0.0.resnet", "up.3.1.resnet")
    )


# Random choices -------------------------------------------------------------------------------------


@st.composite
def choices(draw, config):
    """Cut addresses: single units, whole layers and blocks, deep levels; often refused, often not."""
    layers = sorted({u.layer for u in walk(config) if u.side != "stem"})
    groups = [{a} for a in addresses(config)] + [
        {u.address for u in walk(config) if u.layer == layer} for layer in layers
    ] * 3
    deepest = config.levels - 2
    groups += [
        {
            u.address
            for u in walk(config)
            if u.address.startswith((f"down.{deepest + 1}.", "up.0.", f"down.{deepest}.sampler"))
        }
    ] * 10
    return frozenset().union(*draw(st.lists(st.sampled_from(groups), max_size=6)))


def architectures(config):
    """Those choices that are accepted."""

    @st.composite
    def build(draw):
        cut = draw(choices(config))
        try:
            return Architecture(config, cut)
        except ValueError:
            assume(False)

    return build()


SKELETONS = [pytest.param(c, id=c.family) for c in (SD, SDXL, FLAT)]


@pytest.mark.parametrize("config", SKELETONS)
def test_a_refusal_names_a_unit_of_the_choice(config):
    units = {u.address for u in walk(config)}

    @given(choices(config))
    def check(cut):
        try:
            Architecture(config, cut)
        except ValueError as e:
            assert {a.rstrip(".,;:") for a in re.findall(r"[a-z]+\.[\w.]+", str(e))} & (
                units | {u.rpartition(".")[0] for u in units}
            )

    check()


@pytest.mark.parametrize("config", SKELETONS)
def test_an_architecture_keeps_what_is_not_cut(config):
    @given(architectures(config))
    def check(chosen):
        kept, full = chosen.keys(), keys(config)
        assert shapes(kept).items() <= shapes(full).items()
        gone = {s.unit.address for k, s in full.items() if k not in kept} | {
            s.owner for k, s in full.items() if k not in kept
        }
        assert gone >= set(chosen.cut)
        assert all(s.unit.address not in chosen.cut and s.owner not in chosen.cut for s in kept.values())
        assert chosen.params == sum(s.tensor.numel for s in kept.values())
        assert {u.address for u in chosen.kept} == {u.address for u in walk(config)} - set(chosen.cut_units)

    check()


@pytest.mark.parametrize("config", SKELETONS)
def test_the_renumbered_network_has_the_same_tensors(config):
    @given(architectures(config))
    def check(chosen):
        try:
            small = chosen.renumbered
        except ValueError as e:
            assert "no renumbered form" in str(e)
            return
        for layout in LAYOUTS:
            table = chosen.keys(layout, "renumbered")
            assert shapes(table) == shapes(keys(small.config, layout))
            slots = [(s.unit.address, s.tensor.ldm) for s in table.values()]
            assert sorted(slots) == sorted((s.unit.address, s.tensor.ldm) for s in chosen.keys(layout).values())
        check_origin(chosen, small)

    check()


def check_origin(chosen, small):
    """The small config is one that every reader takes, and each of its units has one home among the kept ones."""
    assert UNetConfig.from_dict(small.config.to_dict()) == small.config
    assert UNetConfig.from_host(small.config.to_host(), small.config.family) == small.config
    assert set(small.origin) == set(addresses(small.config))
    kept = [a for u in chosen.kept for a in (u.address, *(u.blocks[i] for i in chosen.kept_blocks(u)))]
    assert sorted(small.origin.values()) == sorted(kept)


@pytest.mark.parametrize("config", SKELETONS[:2])
def test_what_both_sides_of_a_level_lose_renumbers(config):
    @given(st.data())
    def check(data):
        lost = data.draw(st.sets(st.integers(0, config.levels - 1)))
        mid = data.draw(st.sampled_from([(), ("mid",), ("mid.0.transformer", "mid.1")]))
        blocks = (
            data.draw(st.sets(st.sampled_from([b for u in walk(SDXL) for b in u.blocks[1:]]))) if config is SDXL else ()
        )
        cut = (*(f"down.{n}.1" for n in lost), *(f"up.{config.levels - 1 - n}.1" for n in lost), *mid, *sorted(blocks))
        chosen = Architecture.choose(config, ", ".join(cut))
        small = chosen.renumbered
        check_origin(chosen, small)
        assert [len(d) for d in small.config.down] == [1 if n in lost else 2 for n in range(config.levels)]
        assert not mid or small.config.mid == (NO_MID if mid == ("mid",) else RESNET_MID)

    check()


@pytest.mark.parametrize("config", SKELETONS)
def test_json_round_trip(config):
    @given(architectures(config), st.data())
    def check(chosen, data):
        own = data.draw(st.lists(st.sampled_from([u.address for u in chosen.kept])))
        whole = Architecture(config, chosen.cut, tuple(own), data.draw(st.text(max_size=5).filter(str.isprintable)))
        again = Architecture.from_dict(json.loads(json.dumps(whole.to_dict())))
        assert again == whole and again.to_dict() == whole.to_dict()

    check()


# Networks that run ----------------------------------------------------------------------------------


def network(config, seed=None):
    """A diffusers UNet: random weights for a seed, none (meta) without."""
    with torch.device("cpu" if seed is not None else "meta"):
        torch.manual_seed(seed or 0)
        return UNet2DConditionModel(**config.to_diffusers()).eval()


def run(unet, config, height, width, device="cpu"):
    generator = torch.Generator().manual_seed(height)
    x = torch.randn(2, 4, height, width, generator=generator).to(device)
    context = torch.randn(2, 5, config.context_dim, generator=generator).to(device)
    extra = None
    if config.adm_channels:
        extra = {
            "text_embeds": torch.randn(2, 16, generator=generator).to(device),
            "time_ids": torch.ones(2, 6, device=device),
        }
    with torch.no_grad():
        return unet(x, torch.tensor([900, 100], device=device), context, added_cond_kwargs=extra).sample


def weights_of(unet, architecture):
    """Addressed LDM state dict of a full diffusers UNet, cut to an architecture."""
    full = Architecture.full(architecture.config)
    sd = surgery.convert(unet.state_dict(), full, surgery.Form("diffusers"), surgery.ADDRESSED)
    return surgery.cut(sd, architecture)[0]


def renumbered_network(unet, chosen):
    small = network(chosen.renumbered.config)
    sd = surgery.convert(weights_of(unet, chosen), chosen, surgery.ADDRESSED, surgery.Form("diffusers", "renumbered"))
    small.load_state_dict(sd, assign=True)
    return small


@pytest.mark.sweep(2)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_compute_what_the_renumbered_network_computes(preset):
    config = NARROW_XL if PRESETS[preset].family == "sdxl" else NARROW
    chosen, full = Architecture.preset(preset, config), network(config, seed=0)
    small, whole = renumbered_network(full, chosen), run(full, config, 16, 16)
    surgery.cut_diffusers(full, chosen)
    for size in ((16, 16), (13, 19)):
        assert torch.equal(run(full, config, *size), run(small, config, *size)), size
    assert (run(full, config, 16, 16) - whole).abs().max() > 1e-3


# Each has a renumbered form that diffusers can express, and most of their unions have one too.
STEPS = (
    "down.0.1, up.3.1",
    "down.1.1, up.2.1",
    "down.2.1, up.1.1",
    "down.3.1, up.0.1",
    "down.3.0, up.0.1",
    "mid",
    "mid.0.transformer, mid.1",
    "down.2.*.transformer",
    "up.1-2.*.transformer",
    "down.2.sampler, down.3, up.0",
)


@pytest.mark.slow
@settings(max_examples=10)
@given(st.sets(st.sampled_from(STEPS), min_size=1))
def test_random_choices_compute_what_the_renumbered_network_computes(steps):
    chosen = Architecture.choose(NARROW, ", ".join(steps))
    try:
        _ = chosen.renumbered
    except ValueError:
        assume(False)
    full = network(NARROW, seed=1)
    small = renumbered_network(full, chosen)
    surgery.cut_diffusers(full, chosen)
    assert torch.equal(run(full, NARROW, 8, 13), run(small, NARROW, 8, 13))


@pytest.mark.slow
@settings(max_examples=5)
@given(architectures(SHALLOW))
def test_whatever_is_accepted_runs(chosen):
    unet = network(SHALLOW)
    surgery.cut_diffusers(unet, chosen)
    assert run(unet, SHALLOW, 8, 13, "meta").shape == (2, 4, 8, 13)
    assert sum(p.numel() for p in unet.parameters()) == chosen.params


# JSON -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_in_json(preset):
    chosen = Architecture.preset(preset)
    data = json.loads(json.dumps(chosen.to_dict()))
    assert Architecture.from_dict(data) == chosen
    assert "config" not in data and data["family"] == PRESETS[preset].family and data["format"] == FORMAT


def test_other_configs_are_written_out():
    chosen = Architecture.preset("m2", NARROW)
    data = json.loads(json.dumps(chosen.to_dict()))
    assert data["config"]["model_channels"] == 32
    assert Architecture.from_dict(data) == chosen


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": FORMAT + 1}, "update asdm"),
        ({"format": 0}, "format 0"),
        ({"format": True}, "format True"),
        ({"format": "1"}, "format '1'"),
        ({"format": None}, "format None"),
        ({"family": "sd4"}, "family 'sd4' is none of sd15, sd21, sdxl, emoji"),
        ({"family": ["sd15"]}, "family"),
        ({"cut": "down.0.1.resnet"}, "'cut' must be a list of addresses"),
        ({"cut": [1]}, "'cut' must be a list of addresses"),
        ({"own": {"down.0.0.resnet": 1}}, "'own' must be a list of addresses"),
        ({"cut": ["down.0.5.resnet"]}, "no unit 'down.0.5.resnet'"),
        ({"cut": ["up.2.0.resnet"], "own": []}, "up.2.0.resnet cannot be cut"),
        ({"name": 3}, "name"),
        ({"config": 5}, "UNet config"),
        ({"config": {"family": "x"}}, "UNet config"),
    ],
)
def test_bad_descriptions(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Architecture.from_dict(Architecture.preset("m2").to_dict() | change)


@pytest.mark.parametrize("data", [[], 3, None, "m2"])
def test_data_that_are_no_description(data):
    with pytest.raises(ValueError, match="architecture: "):
        Architecture.from_dict(data)


def test_units_know_their_layer():
    assert unit(SD, "down.0.1.transformer").layer == "down.0.1"
    assert unit(SD, "down.0.sampler").layer == "down.0.sampler"
