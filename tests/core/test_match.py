"""The search by nearest weights: a student made by known cuts is laid over its original again."""

import random
from collections.abc import Mapping

import pytest
import torch

from asdm_core import surgery
from asdm_core.addresses import unit, walk
from asdm_core.architecture import FAMILIES, Architecture
from asdm_core.match import NoMatch, match
from asdm_core.recognise import recognise
from tests.core.narrow import SD, SDXL, weights

PRESETS = ("ssd-1b", "vega", "koala-1b", "koala-700m")


def student_of(sd, chosen, noise=0.05, seed=0):
    """A pruned UNet trained a little, as it is read from a file that says nothing: its tensors, its architecture by
    convention.
    """
    generator = torch.Generator().manual_seed(seed)
    small = surgery.convert(surgery.cut(sd, chosen)[0], chosen, surgery.ADDRESSED, surgery.Form("ldm", "renumbered"))
    small = {
        k: t + noise * t.std() * torch.randn(t.shape, generator=generator) if t.dim() > 1 else t
        for k, t in small.items()
    }
    read = recognise(surgery.shapes_of(small), [chosen.config])
    return {slot.unit.key(slot.tensor): small[key] for key, slot in read.keys().items()}, read.architecture


def other_blocks(preset, seed):
    """A preset of SDXL with as many transformer blocks at each place, but others."""
    chosen = Architecture.preset(preset, SDXL)
    rng = random.Random(seed)
    return chosen.keeping(
        ", ".join(block for u in chosen.kept if u.depth for block in rng.sample(u.blocks, len(chosen.kept_blocks(u))))
    )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("seed", range(2))
def test_the_blocks_that_were_kept_are_found(preset, seed):
    chosen = other_blocks(preset, seed)
    original = weights(SDXL)
    student, read = student_of(original, chosen)
    assert read.cut == Architecture.preset(preset, SDXL).cut != chosen.cut
    found = match(student, read, original)
    assert found.architecture.cut == chosen.cut
    assert max(pair.distance for pair in found.pairs) < 0.01
    assert min(pair.next for pair in found.pairs if pair.next is not None) > 0.8
    kept = [block for u in chosen.kept for block in u.blocks if block not in chosen.cut]
    assert [pair.original for pair in found.pairs if ".transformer." in pair.original] == kept


@pytest.mark.parametrize("preset", PRESETS)
def test_a_student_that_follows_the_convention_stays_as_it_was_read(preset):
    student, read = student_of(weights(SDXL), Architecture.preset(preset, SDXL))
    assert match(student, read, weights(SDXL)).architecture == read


@pytest.mark.parametrize("config", [SD, SDXL], ids=lambda c: c.family)
def test_layers_are_found_too_where_their_shapes_leave_a_choice(config):
    # The first level does not change the number of channels, so its first layer can be the one that is cut.
    top = "up.3.1" if config is SD else "up.2.1"
    chosen = Architecture.choose(config, f"down.0.0, {top}")
    student, read = student_of(weights(config), chosen)
    assert "down.0.1.resnet" in read.cut
    assert match(student, read, weights(config)).architecture.cut == chosen.cut


@pytest.mark.parametrize("preset", ["base", "small", "tiny", "m2"])
def test_students_of_sd15_are_where_the_convention_puts_them(preset):
    student, read = student_of(weights(SD), Architecture.preset(preset, SD))
    assert match(student, read, weights(SD)).architecture.name == preset


def test_a_finetune_of_the_original_will_do():
    chosen = other_blocks("koala-1b", 3)
    original = weights(SDXL)
    student, read = student_of(original, chosen)
    finetune = {}
    noise = torch.Generator().manual_seed(9)
    for k, t in original.items():
        finetune[k] = t + 0.5 * torch.randn(t.shape, generator=noise)
    assert match(student, read, finetune).architecture.cut == chosen.cut


def test_one_block_that_was_trained_from_scratch_is_placed_by_its_order():
    chosen = other_blocks("koala-700m", 1)
    original = weights(SDXL)
    student, read = student_of(original, chosen)
    new = read.kept_blocks(unit(SDXL, "up.0.2.transformer"))[2]
    block = f"up.0.2.transformer.{new}"
    for key, slot in read.keys().items():
        if slot.owner == block:
            student[key] = torch.randn(slot.shape, generator=torch.Generator().manual_seed(4))
    found = match(student, read, original)
    (alone,) = [pair for pair in found.pairs if pair.distance > 0.8]
    assert alone.student == block
    assert len(found.architecture.cut ^ chosen.cut) <= 2, "only that block can be elsewhere"


def test_a_wrong_original_is_refused():
    student, read = student_of(weights(SDXL), other_blocks("vega", 0))
    with pytest.raises(
        NoMatch, match=r"(\d+) of the student's (\d+) layers and transformer blocks resemble none .* pruned from"
    ):
        match(student, read, weights(SDXL, 1))


def test_state_dicts_must_be_whole():
    student, read = student_of(weights(SDXL), Architecture.preset("vega", SDXL))
    with pytest.raises(surgery.Mismatch, match="original: .* is missing"):
        match(student, read, student)
    with pytest.raises(surgery.Mismatch, match="student: .* is missing"):
        match({}, read, weights(SDXL))


def test_a_student_without_a_renumbered_form_needs_no_search():
    chosen = Architecture.choose(SDXL, "down.1.1.transformer, mid.0.transformer, mid.1")
    sd, _ = surgery.cut(weights(SDXL), Architecture.choose(SDXL, "mid.1"))
    with pytest.raises(ValueError, match="can only be kept addressed"):
        match(sd, Architecture.choose(SDXL, "mid.1"), weights(SDXL))
    assert match(*student_of(weights(SDXL), chosen), weights(SDXL)).architecture.cut == chosen.cut


def test_tensors_are_read_when_they_are_compared_and_vectors_not_at_all():
    class Read(Mapping):
        def __init__(self, tensors):
            self.tensors = tensors
            self.shapes = surgery.shapes_of(tensors)
            self.seen = []

        def __getitem__(self, key):
            self.seen.append(key)
            return self.tensors[key]

        def __iter__(self):
            return iter(self.tensors)

        def __len__(self):
            return len(self.tensors)

    student, read = student_of(weights(SDXL), Architecture.preset("ssd-1b", SDXL))
    student, original = Read(student), Read(weights(SDXL))
    match(student, read, original)
    for side in (student, original):
        assert len(side.seen) == len(set(side.seen)), "each is read once"
        assert all(len(side.shapes[key]) > 1 for key in side.seen)


# The list of kept blocks ----------------------------------------------------------------------------


def test_a_keep_list_says_which_blocks_they_are():
    config = FAMILIES["sdxl"]
    koala = Architecture.preset("koala-1b", config)
    chosen = koala.keeping("mid.0.transformer.0|2|4|6|8|9, down.2.0.transformer.4-9")
    assert chosen.kept_blocks(unit(config, "mid.0.transformer")) == (0, 2, 4, 6, 8, 9)
    assert chosen.kept_blocks(unit(config, "down.2.0.transformer")) == (4, 5, 6, 7, 8, 9)
    assert chosen.kept_blocks(unit(config, "up.0.0.transformer")) == (0, 1, 2, 3, 4, 5), "what is not named stays"
    assert chosen.renumbered.config == koala.renumbered.config
    assert (chosen.own, chosen.name) == (koala.own, "")
    assert chosen.keeping("mid.0.transformer.0-5, down.2.0.transformer.0-5") == koala


@pytest.mark.parametrize(
    "blocks, message",
    [
        (
            "mid.0.transformer.0-4",
            "mid.0.transformer has 6 transformer blocks in this UNet, and the list names 5; name 6",
        ),
        ("mid.0.transformer", "the list names it as a whole"),
        ("down.2.1.transformer.0", "down.2.1.transformer has no transformer blocks"),
        ("mid.0.transformer.10", "matches no unit"),
    ],
)
def test_a_keep_list_must_fit(blocks, message):
    with pytest.raises(ValueError, match=message):
        Architecture.preset("koala-1b").keeping(blocks)


@pytest.mark.parametrize("preset", PRESETS)
def test_full_size_students_take_other_addresses(preset):
    chosen = Architecture.preset(preset)
    last = chosen.keeping(", ".join(b for u in chosen.kept if u.depth for b in u.blocks[-len(chosen.kept_blocks(u)) :]))
    names = surgery.readdressed(chosen, last)
    assert names.keys() == last.keys().keys() and set(names.values()) == chosen.keys().keys()
    slots, before = last.keys(), chosen.keys()
    assert all(slots[new].shape == before[old].shape for new, old in names.items())
    assert last.params == chosen.params
    assert sum(u.depth > 0 for u in walk(last.config)) and last.cut != chosen.cut


def test_another_network_takes_no_addresses():
    with pytest.raises(ValueError, match="vega is another network than ssd-1b"):
        surgery.readdressed(Architecture.preset("ssd-1b"), Architecture.preset("vega"))
