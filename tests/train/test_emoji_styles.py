"""Styles that are drawn by number: what they do to glyphs."""

import math

import pytest
import torch

from train.emoji import styles
from train.emoji.data import Variant

WAYS = {
    "bent": lambda p: styles.bent(p, 0.1, 3),
    "recoloured": lambda p: styles.recoloured(p, 2.0, 1.4, False),
    "inverted": lambda p: styles.recoloured(p, 2.0, 1.4, True),
    "levelled": lambda p: styles.levelled(p, 2),
    "soft": lambda p: styles.soft(p, 5),
    "lined": lambda p: styles.lined(p, 3.0),
    "rimmed": lambda p: styles.rimmed(p, 5, (0.4, 0.1, 0.0), 0.5),
}


@pytest.fixture(scope="module")
def glyphs():
    """Discs of different sizes, each of two colours, premultiplied."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    made = []
    for radius in (0.4, 0.6, 0.8):
        alpha = (x**2 + y**2 < radius**2).float()
        colour = torch.stack([0.9 - 0.5 * (x > 0), 0.2 + 0.5 * (x > 0), torch.full_like(x, radius)])
        made.append(torch.cat([colour * alpha, alpha[None]]))
    return torch.stack(made)


@pytest.mark.parametrize("way", WAYS)
def test_what_comes_out_is_premultiplied_and_another_picture(glyphs, way):
    found = WAYS[way](glyphs)
    assert found.shape == glyphs.shape and not torch.allclose(found, glyphs, atol=0.01)
    assert found.min() >= -1e-6 and found[:, 3].max() <= 1 + 1e-6
    assert (found[:, :3] <= found[:, 3:] + 1e-5).all()


def test_hues_turn_about_grey_and_a_whole_turn_is_none(glyphs):
    torch.testing.assert_close(styles.recoloured(glyphs, 2 * math.pi, 1.0, False), glyphs, atol=1e-5, rtol=0)
    # A third of a turn hands red, green and blue on.
    third = styles.recoloured(glyphs, 2 * math.pi / 3, 1.0, False)
    torch.testing.assert_close(third[:, :3], glyphs[:, [2, 0, 1]], atol=1e-5, rtol=0)
    grey = styles.recoloured(glyphs, 1.0, 0.0, False)
    torch.testing.assert_close(grey, styles.grey(glyphs), atol=1e-5, rtol=0)


def test_a_rim_has_its_colour_and_its_width(glyphs):
    found = styles.rimmed(glyphs, 9, (0.0, 0.0, 0.5), 1.0)
    across = found[2, :, 32]  # a line through the middle of the largest disc
    first = int(across[3].nonzero()[0])
    assert torch.equal(across[:3, first : first + 4], torch.tensor([0.0, 0.0, 0.5])[:, None].expand(3, 4))
    assert torch.equal(across[:3, first + 4], torch.ones(3))


def test_a_glyph_is_bent_alike_in_any_company(glyphs):
    torch.testing.assert_close(styles.bent(glyphs, 0.1, 3)[1:2], styles.bent(glyphs[1:2], 0.1, 3))
    torch.testing.assert_close(styles.bent(glyphs, 0.0, 3), glyphs, atol=1e-4, rtol=0)
    assert not torch.equal(styles.bent(glyphs, 0.1, 3), styles.bent(glyphs, 0.1, 4))


def test_a_number_is_always_the_same_style(glyphs):
    made = [styles.style_of(f"drawn-{n}") for n in range(1, 25)]
    for n, (sets, change) in enumerate(made, 1):
        again = styles.drawn(n)
        assert sets == again[0] and "openmoji" not in sets
        assert torch.equal(change(glyphs), again[1](glyphs))
    pictures = [change(glyphs) for _, change in made]
    assert len({tuple(p.flatten()[::97].tolist()) for p in pictures}) == len(pictures)
    assert {sets for sets, _ in made} == {("noto", "twemoji"), ("noto",), ("twemoji",)}


def test_a_name_that_is_none_is_told():
    with pytest.raises(ValueError, match="drawn is no style; wanted one of noto, .*, or drawn-1, drawn-2"):
        styles.style_of("drawn")


def test_of_many_pictures_some_are_drawn_by_lot():
    all_of_them = [Variant(n, style, "white", 0) for style in ("noto", "twemoji") for n in range(50)]
    some = styles.by_lot(all_of_them, 20, "drawn-3")
    assert len(set(some)) == 20 and set(some) < set(all_of_them) and some == styles.by_lot(all_of_them, 20, "drawn-3")
    assert {v.style for v in some} == {"noto", "twemoji"} and some != styles.by_lot(all_of_them, 20, "drawn-4")
    assert (
        styles.by_lot(all_of_them, 0, "drawn-3")
        == all_of_them
        == sorted(styles.by_lot(all_of_them, 500, "drawn-3"), key=all_of_them.index)
    )
