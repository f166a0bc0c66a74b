"""Family, cut units and layout of a UNet, read off its names and shapes."""

import contextlib
import re
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asdm_core.addresses import keys, walk
from asdm_core.architecture import FAMILIES, PRESETS, Architecture
from asdm_core.recognise import Unrecognised, recognise, unet_prefix
from tests.core.narrow import SD

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "unet.")
FORMS = [("ldm", "renumbered"), ("diffusers", "renumbered"), ("ldm", "addressed")]
OTHERS = {
    "first_stage_model.encoder.conv_in.weight": (1,),
    "cond_stage_model.transformer.text_model.final_layer_norm.bias": (768,),
    "vae.decoder.conv_in.weight": (1,),
    "v_pred": (0,),
}


def shapes(chosen, layout="ldm", numbering="renumbered", prefix=""):
    return {prefix + k: s.shape for k, s in chosen.keys(layout, numbering).items()}


@pytest.mark.parametrize("layout, numbering", FORMS)
@pytest.mark.parametrize("name", PRESETS)
def test_presets_in_every_form(name, layout, numbering):
    chosen = Architecture.preset(name)
    found = recognise(shapes(chosen, layout, numbering))
    assert (found.architecture.cut, found.architecture.config) == (chosen.cut, chosen.config)
    assert found.architecture.name == name
    assert (found.prefix, found.layout) == ("", layout)
    assert shapes(found.architecture, found.layout, found.numbering) == shapes(chosen, layout, numbering)


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_unpruned_families(family, layout):
    found = recognise(shapes(Architecture.full(FAMILIES[family]), layout))
    assert found.architecture.name == "full" and found.architecture.config.family == family


@pytest.mark.parametrize("family", ["sd15", "sd21"])
@pytest.mark.parametrize("name", ["base", "small", "tiny"])
def test_students_of_both_sd_families(family, name):
    chosen = Architecture.preset(name, FAMILIES[family])
    assert recognise(shapes(chosen, "diffusers")).architecture.cut == chosen.cut


@pytest.mark.parametrize("prefix", PREFIXES)
def test_unets_inside_a_whole_checkpoint(prefix):
    chosen = Architecture.preset("base")
    layout = "diffusers" if prefix == "unet." else "ldm"
    found = recognise(shapes(chosen, layout, prefix=prefix) | OTHERS)
    assert (found.architecture.cut, found.prefix, found.layout) == (chosen.cut, prefix, layout)
    assert set(found.keys()) == set(shapes(chosen, layout, prefix=prefix))


def test_every_unit_of_a_recognised_file_is_its_own():
    found = recognise(shapes(Architecture.preset("m2")))
    assert found.architecture.own == tuple(u.address for u in found.architecture.kept)


def test_inpainting_unets_have_more_input_channels():
    config = replace(FAMILIES["sd15"], in_channels=9)
    found = recognise(shapes(Architecture.preset("base", config)))
    assert found.architecture.config == config


def test_m1_in_diffusers_names_is_not_a_network_that_lacks_its_last_layer():
    assert recognise(shapes(Architecture.preset("m1"), "diffusers")).architecture.name == "m1"


def units_of(config):
    return [u.address for u in walk(config) if u.side != "stem" and u.kind in ("resnet", "transformer")]


@settings(max_examples=40)
@given(st.sets(st.sampled_from(units_of(SD)), max_size=12))
def test_whatever_is_cut_is_recognised_in_addressed_names(cut):
    try:
        chosen = Architecture(SD, frozenset(cut))
    except ValueError:
        return  # no network at all
    found = recognise(shapes(chosen, "ldm", "addressed"), [SD])
    # A choice that is also the renumbered form of another one is read as that; then the names are the same.
    assert shapes(found.architecture, found.layout, found.numbering) == shapes(chosen, "ldm", "addressed")


LCM = {"ldm": "time_embed.cond_proj.weight", "diffusers": "time_embedding.cond_proj.weight"}


@pytest.mark.parametrize(
    "chosen, layout, numbering, prefix",
    [
        (Architecture.full(FAMILIES["sd15"]), "ldm", "renumbered", "model.diffusion_model."),
        (Architecture.preset("m1"), "diffusers", "renumbered", "unet."),
        (Architecture.preset("base"), "ldm", "addressed", ""),
    ],
    ids=["checkpoint", "pipeline", "bare"],
)
def test_tensors_that_no_layer_has_are_told(chosen, layout, numbering, prefix):
    more = {prefix + key: (320, 256) for key in (LCM[layout], f"{LCM[layout]}_scale")}
    plain = recognise(shapes(chosen, layout, numbering, prefix))
    assert recognise(shapes(chosen, layout, numbering, prefix) | more | OTHERS) == replace(
        plain, unknown=tuple(sorted(more))
    )
    assert plain.unknown == ()


# Refusals -------------------------------------------------------------------------------------------

KEY = "input_blocks.1.0.in_layers.2.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop(KEY), f"closest to sd15 base, but has 1 missing (first: {KEY})"),
        (
            lambda s: s.update({KEY: (320, 320, 1, 1)}),
            f"1 tensors of another shape (first: {KEY} is [320, 320, 1, 1], wanted [320, 320, 3, 3])",
        ),
        (lambda s: s.update({"input_blocks.0.0.weight": (320,)}), "the first convolution has shape (320,)"),
        (
            lambda s: s.update({"input_blocks.0.0.weight": (320, 0, 3, 3)}),
            "the first convolution has shape (320, 0, 3, 3)",
        ),
        (lambda s: s.update({"out.2.weight": ()}), "and the last (); wanted (out, in, 3, 3)"),
        (
            lambda s: s.update(
                {k: (s[k][0], 999) for k in s if k.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
            ),
            "320 base channels, text width 999 and pooled conditioning None belongs to none of the known families: "
            "sd15 (320, 768, None)",
        ),
    ],
    ids=["missing", "shape", "first convolution", "no channels", "last convolution", "text width"],
)
def test_the_nearest_network_is_named(change, message):
    found = shapes(Architecture.preset("base"))
    change(found)
    with pytest.raises(Unrecognised, match=re.escape(message)):
        recognise(found)


@pytest.mark.parametrize("layer", ["input_blocks.12.0", "output_blocks.0.1", "input_blocks.1.1.transformer_blocks.1"])
def test_a_further_layer_is_not_taken_for_an_unknown_tensor(layer):
    found = shapes(Architecture.full(SD)) | {f"{layer}.transformer_blocks.0.weight": (1,)}
    with pytest.raises(Unrecognised, match=re.escape(f"closest to narrow-sd full, but has 1 unknown (first: {layer}.")):
        recognise(found, [SD])


def test_a_renamed_key_is_a_missing_and_an_unknown_one():
    found = shapes(Architecture.preset("base"))
    found["input_blocks.1.0.in_layers.2.wieght"] = found.pop(KEY)
    with pytest.raises(Unrecognised, match="1 missing.*1 unknown"):
        recognise(found)


@pytest.mark.parametrize(
    "names, message",
    [
        ([], "found nothing"),
        (
            ["a", "b"],
            "wanted keys like 'input_blocks.0.0.weight' or 'down_blocks.0.resnets.0.conv1.weight', found a, b",
        ),
        (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "looks like a LoRA"),
        (["transformer_blocks.0.attn.to_q.weight"], "looks like a transformer model"),
        (["conv_in.weight"], "no Stable Diffusion UNet"),
    ],
)
def test_files_without_a_unet(names, message):
    with pytest.raises(Unrecognised, match=re.escape(message)):
        unet_prefix(names)


NAMES = st.sampled_from(
    [*keys(SD), *keys(SD, "diffusers"), "input_blocks.x", "up_blocks.0.resnets.", "", "label_emb.0.0.weight", "\0"]
)
DIMENSIONS = st.lists(st.integers(0, 2**40), max_size=4).map(tuple)


@settings(max_examples=60)
@given(
    st.dictionaries(NAMES, DIMENSIONS, max_size=8),
    st.dictionaries(NAMES, DIMENSIONS, max_size=4),
    st.sets(NAMES, max_size=4),
    st.booleans(),
)
def test_any_names_and_shapes_are_recognised_or_refused(other, changed, dropped, whole):
    found = shapes(Architecture.full(SD)) if whole else {}
    found = {k: v for k, v in (found | other | changed).items() if k not in dropped}
    try:
        recognised = recognise(found, [SD])
    except Unrecognised:
        return
    assert recognised.keys().keys() | set(recognised.unknown) <= found.keys()
    assert not recognised.keys().keys() & set(recognised.unknown)


@pytest.mark.parametrize(
    "name",
    [
        "output_blocks.{}.1.transformer_blocks.0.attn2.to_k.weight",
        "output_blocks.0.1.transformer_blocks.{}.attn2.to_k.weight",
        "input_blocks.{}.0.op.weight",
        "{}.transformer_blocks.0.attn2.to_k.weight",
        "output_blocks.0.1." + "a." * 500 + "{}",
    ],
)
def test_the_effort_grows_as_the_number_of_names(name):
    def effort(count):
        """Calls of functions, Python's and built-in ones."""
        shapes = {"input_blocks.0.0.weight": (320, 4, 3, 3)} | {name.format(i): (0, 768) for i in range(count)}
        calls = 0

        def count_call(frame, event, argument):
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(count_call)
        try:
            with contextlib.suppress(Unrecognised):
                recognise(shapes)
        finally:
            sys.setprofile(None)
        return calls

    effort(10)  # tables that are made once
    few, more = effort(1000), effort(3000)
    assert more < 4 * few
