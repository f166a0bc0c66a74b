import random

import pytest
import torch

from train.emoji.captions import caption, held_out, own_tags, prompt, vocabulary
from train.emoji.data import Variant, draw, variants
from train.emoji.render import BACKGROUNDS, IDENTITY, compose, jitter
from train.emoji.sources import STYLES, _split_sprite, plain, read_groups
from train.seeds import seeded


def test_concepts_are_many_distinct_and_few_faces():
    groups = read_groups()
    codes = [code for part in groups.values() for code in part]
    assert len(codes) == len(set(codes)) and 320 <= len(codes) <= 420
    assert len(groups["faces"]) <= 25


def test_captions_come_from_the_state_of_the_generator_alone(concepts):
    tags = own_tags(concepts)

    def write(seed):
        return [caption(c, "noto", "blue", tags[c.code], random.Random(f"{seed}/{i}")) for i, c in enumerate(concepts)]

    assert write(1) == write(1)
    assert write(1) != write(2)


def test_style_and_background_are_left_out_of_some_captions(concepts):
    tags = own_tags(concepts)
    rng = random.Random(0)
    texts = [caption(concepts[0], "noto", "blue", tags[concepts[0].code], rng) for _ in range(2000)]
    named = [t for t in texts if t]
    assert 0.07 < texts.count("") / len(texts) < 0.13
    assert 0.55 < sum("noto" in t for t in named) / len(named) < 0.65
    assert 0.55 < sum("blue" in t for t in named) / len(named) < 0.65
    assert 0.25 < sum("noto" in t and "blue" in t for t in named) / len(named) < 0.47


def test_only_a_keyword_of_one_concept_stands_for_its_name(concepts):
    tags = own_tags(concepts)
    assert tags[concepts[3].code] == ("tag3",)


def test_the_vocabulary_holds_every_word_of_captions_and_prompts(concepts):
    known = set(" ".join(vocabulary(concepts)).replace(",", " ").split())
    tags = own_tags(concepts)
    rng = random.Random(0)
    for c in concepts:
        texts = [caption(c, s, b, tags[c.code], rng) for s in STYLES for b in BACKGROUNDS] + [
            prompt(c, "noto", "white")
        ]
        assert known.issuperset(" ".join(texts).replace(",", " ").split())


def test_held_out_pairs():
    codes = [code for part in read_groups().values() for code in part]
    styles = [[held_out(code, "style", s) for s in STYLES] for code in codes]
    assert all(sum(row) <= 1 for row in styles)  # no concept loses both styles
    assert not any(row[STYLES.index("openmoji")] for row in styles)
    share = sum(sum(row) for row in styles) / (2 * len(codes))
    assert 0.06 < share < 0.14
    share = sum(held_out(c, "background", b) for c in codes for b in BACKGROUNDS) / (6 * len(codes))
    assert 0.07 < share < 0.13


def test_training_pictures_leave_held_out_pairs_out(concepts):
    kept = variants(concepts, STYLES[:2])
    every = variants(concepts, STYLES[:2], everything=True)
    assert set(kept) < set(every)
    for v in set(every) - set(kept):
        code = concepts[v.concept].code
        assert held_out(code, "style", v.style) or held_out(code, "background", v.background)


def test_a_variant_is_always_the_same_picture(glyphs):
    chosen = variants(glyphs.concepts, STYLES)[:8]
    assert torch.equal(draw(glyphs, chosen), draw(glyphs, chosen))
    assert torch.equal(draw(glyphs, chosen[3:5]), draw(glyphs, chosen)[3:5])


def test_a_copy_has_one_geometry_on_all_backgrounds_and_the_first_is_upright(glyphs):
    chosen = [Variant(0, "noto", background, copy) for copy in range(2) for background in BACKGROUNDS]
    upright, moved = draw(glyphs, chosen).chunk(2)
    assert torch.equal(upright[0], glyphs.pictures("noto", [0])[0])
    for pictures in (upright, moved):
        inside = [p[:, 40:88, 40:88] for p in pictures]
        assert all(torch.equal(inside[0], p) for p in inside)
    assert not torch.equal(upright, moved)
    assert not torch.equal(moved, draw(glyphs, chosen[6:], seed=1)) and torch.equal(
        upright, draw(glyphs, chosen[:6], seed=1)
    )
    assert not torch.equal(upright, draw(glyphs, chosen[:6], wild=True))


def test_copies_come_one_after_the_other(concepts):
    """Fewer copies are the beginning of more, so that cached latents serve both."""
    for style in STYLES[:2]:
        two = variants(concepts, (style,), copies=2)
        assert two[: len(two) // 2] == variants(concepts, (style,))


def test_compose_blends_the_glyph_over_the_background():
    glyph = torch.zeros(1, 4, 256, 256)
    glyph[:, 0, 64:192, 64:192] = glyph[:, 3, 64:192, 64:192] = 0.5  # half transparent red, premultiplied
    picture = compose(glyph, IDENTITY, ["white"])[0]
    torch.testing.assert_close(picture[:, 5, 5], torch.ones(3))
    torch.testing.assert_close(picture[:, 64, 64], torch.tensor([1.0, 0.5, 0.5]))


@pytest.mark.parametrize("wild", [False, True])
def test_jitter_keeps_the_glyph_inside_the_picture(wild):
    glyph = torch.zeros(1, 4, 256, 256)
    glyph[:, 3, 8:248, 100:156] = 1  # as tall as a glyph can be
    maps = jitter(torch.Generator().manual_seed(0), 64, wild)
    pictures = compose(glyph.expand(64, -1, -1, -1), maps, ["white"] * 64)
    covered = (1 - pictures[:, 0]).sum((1, 2))
    scale = maps[:, :, :2].det().abs()  # of output area to input area
    torch.testing.assert_close(covered * scale, torch.full((64,), 240 * 56 / 4.0), rtol=0.03, atol=0)


def test_a_sprite_splits_into_documents():
    sprite = (
        '<svg><style>x</style><svg viewBox="0 0 8 8" id="1F436-FE0F"><g/><svg id="inner"></svg></svg>'
        '<svg id="2764"><path/></svg></svg>'
    )
    pieces = _split_sprite(sprite)
    assert set(pieces) == {"1F436", "2764"}
    assert pieces["1F436"].endswith('<svg id="inner"></svg></svg>')


@pytest.mark.parametrize("text, wanted", [("Piñata", "pinata"), ("woman’s hat", "womans hat"), ("T-Rex", "t rex")])
def test_names_become_plain_words(text, wanted):
    assert plain(text) == wanted


def test_seeds_depend_on_every_number():
    draws = {tuple(torch.randn(2, generator=seeded(*n)).tolist()) for n in ((0, 1), (1, 0), (0, 2), (0, 1, 0), (1, 1))}
    assert len(draws) == 5
