"""State dicts and live networks: cut, combine, convert, extract."""

import itertools

import pytest
import torch
from diffusers import UNet2DConditionModel

from asdm_core import surgery
from asdm_core.addresses import LAYOUTS, keys, walk
from asdm_core.architecture import NUMBERINGS, PRESETS, Architecture
from asdm_core.surgery import ADDRESSED, Form, Mismatch
from tests.core.narrow import CONFIGS, SD, equal, weights

FORMS = [Form(*form) for form in itertools.product(LAYOUTS, NUMBERINGS)]
KEY = "input_blocks.1.0.in_layers.2.weight"


def preset(name):
    return Architecture.preset(name, CONFIGS[PRESETS[name].family])


@pytest.mark.parametrize("name", PRESETS)
def test_every_conversion_can_be_undone(name):
    chosen = preset(name)
    sd, _ = surgery.cut(weights(chosen.config), chosen)
    for first, second in itertools.permutations(FORMS, 2):
        there = surgery.convert(surgery.convert(sd, chosen, ADDRESSED, first), chosen, first, second)
        assert equal(surgery.convert(there, chosen, second, ADDRESSED), sd), (first, second)


def test_conversion_copies_nothing():
    chosen = preset("base")
    sd, _ = surgery.cut(weights(SD), chosen)
    converted = surgery.convert(sd, chosen, ADDRESSED, Form("diffusers", "renumbered"))
    assert {t.data_ptr() for t in converted.values()} == {t.data_ptr() for t in sd.values()}


def test_cut_keeps_and_drops_by_unit():
    chosen = preset("m2")
    kept, dropped = surgery.cut(weights(SD), chosen)
    assert set(kept) | set(dropped) == set(weights(SD)) and not set(kept) & set(dropped)
    assert {keys(SD)[k].unit.address for k in dropped} == chosen.cut
    assert all(kept[k] is weights(SD)[k] for k in kept)


def test_cut_of_nothing_is_everything():
    kept, dropped = surgery.cut(weights(SD), Architecture.full(SD))
    assert equal(kept, weights(SD)) and not dropped


def test_combine_takes_each_unit_from_its_owner():
    chosen = preset("m2")
    combined = surgery.combine(weights(SD, 0), weights(SD, 1), chosen)
    for key, slot in chosen.keys().items():
        assert combined[key] is weights(SD, int(slot.unit.address in chosen.own))[key]
    assert set(combined) == set(chosen.keys())


def test_combine_needs_no_more_than_it_takes():
    chosen = preset("m2")
    units = chosen.pack_units()
    pack = surgery.extract(weights(SD, 1), chosen, units)
    trunk = {k: v for k, v in weights(SD).items() if keys(SD)[k].unit.address not in units}
    assert equal(
        surgery.combine(trunk, pack, chosen, units), surgery.combine(weights(SD), weights(SD, 1), chosen, units)
    )
    del pack[KEY]
    with pytest.raises(Mismatch, match=rf"student: {KEY} is missing \(down.0.0.resnet, wanted shape \[8, 8, 3, 3\]\)"):
        surgery.combine(trunk, pack, chosen, units)


def test_extract_and_put_back():
    chosen = preset("m2")
    units = chosen.pack_units()
    pack = surgery.extract(weights(SD, 1), chosen, units)
    assert {keys(SD)[k].unit.address for k in pack} == set(units)
    with pytest.raises(ValueError, match="down.0.1.resnet is cut or unknown"):
        surgery.extract(weights(SD), chosen, ["down.0.1.resnet"])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda sd: sd.pop(KEY), rf"{KEY} is missing \(down.0.0.resnet, wanted shape \[8, 8, 3, 3\]\)"),
        (
            lambda sd: sd.update({KEY: torch.zeros(8, 8)}),
            rf"{KEY} \(down.0.0.resnet\) has shape \[8, 8\], wanted \[8, 8, 3, 3\]",
        ),
        (lambda sd: sd.update(more=torch.zeros(1)), "unknown tensor more"),
    ],
    ids=["missing", "shape", "unknown"],
)
@pytest.mark.parametrize(
    "run",
    [
        lambda sd: surgery.cut(sd, preset("base")),
        lambda sd: surgery.convert(sd, Architecture.full(SD), ADDRESSED, Form("diffusers", "addressed")),
    ],
    ids=["cut", "convert"],
)
def test_a_state_dict_that_does_not_fit_is_refused(run, change, message):
    sd = dict(weights(SD))
    change(sd)
    with pytest.raises(Mismatch, match=message):
        run(sd)


def test_conversion_without_a_renumbered_form_is_refused():
    chosen = Architecture.choose(SD, "down.1.1")
    sd, _ = surgery.cut(weights(SD), chosen)
    with pytest.raises(ValueError, match="has no renumbered form"):
        surgery.convert(sd, chosen, ADDRESSED, Form("ldm", "renumbered"))


# Live networks (that a cut one computes what the renumbered one does: test_architecture.py) -----------


def network(config):
    with torch.device("meta"):
        # 8 channels are narrower than the usual 32 groups.
        return UNet2DConditionModel(**config.to_diffusers(), norm_num_groups=4).eval()


def test_pass_through_copies_in_the_encoder_and_takes_the_first_channels_in_the_decoder():
    units = {u.address: u for u in walk(SD)}
    h = torch.randn(1, 8, 4, 4)
    out = surgery.pass_through(units["down.0.1.resnet"], h)
    assert torch.equal(out, h) and out.data_ptr() != h.data_ptr()
    both = torch.randn(1, 16, 4, 4)
    assert torch.equal(surgery.pass_through(units["up.3.1.resnet"], both), both[:, :8])


def test_load_units_copies_what_it_is_given_and_nothing_else():
    chosen = preset("m2")
    unet = network(SD).to_empty(device="cpu")
    for p in unet.parameters():
        p.data.zero_()
    surgery.cut_diffusers(unet, chosen)
    pack = surgery.extract(weights(SD), chosen, chosen.pack_units())
    surgery.load_units(unet, "diffusers", chosen, pack)
    found = surgery.convert(unet.state_dict(), chosen, Form("diffusers", "addressed"), ADDRESSED)
    assert all(torch.equal(found[k], pack[k]) if k in pack else not found[k].any() for k in found)
    for bad, message in (({"more": torch.zeros(1)}, "unknown tensor more"), ({KEY: torch.zeros(1)}, "has shape")):
        with pytest.raises(Mismatch, match=message):
            surgery.load_units(unet, "diffusers", chosen, bad)


def test_only_unpruned_networks_can_be_cut():
    small = network(preset("small").renumbered.config)
    with pytest.raises(Mismatch, match="UNet2DConditionModel has no module .*wanted an unpruned narrow-sd UNet"):
        surgery.cut_diffusers(small, preset("base"))
