"""Sheets of pictures: heat-maps and labelled grids."""

import numpy as np
import pytest
from PIL import Image

from asdm_core import pictures
from asdm_core.pictures import Row, grid, heat_map, shown


def test_heat_map_is_black_for_equal_pictures_symmetric_and_saturates():
    a, b = Image.new("RGB", (4, 4), (0, 200, 10)), Image.new("RGB", (4, 4), (10, 0, 0))
    assert not np.asarray(heat_map(a, a)).any()
    assert heat_map(a, b).getpixel((0, 0)) == tuple(pictures.HEAT[-1])
    assert heat_map(a, b).tobytes() == heat_map(b, a).tobytes()


def test_heat_grows_with_the_difference():
    assert (np.diff(pictures.HEAT.astype(int).sum(1)) >= 0).all()


def test_long_texts_are_shortened_not_painted_over():
    rows = [Row([Image.new("RGB", (512, 512))] * 3, "a very long prompt " * 8, "note", ["note " * 20] * 3)]
    sheet = np.asarray(grid("title " * 20, "subtitle " * 20, ["A" * 40] * 3, rows))
    assert (sheet[:, -5:] == 255).all()


class Counting:
    """A drawing that counts the letters it was asked to measure, and knows each to be 10 wide."""

    letters = 0

    def textlength(self, text, font):
        self.letters += len(text)
        return 10 * len(text)


@pytest.mark.parametrize("length", [5, 100, 10_000, 1_000_000])
def test_a_text_is_fitted_with_a_bounded_effort(length):
    drawing = Counting()
    fitting = pictures.fitted(drawing, "W" * length, 20, 505)
    assert fitting == ("W" * 5 if length == 5 else "W" * 47 + "...")
    assert drawing.letters < 5000


def test_texts_of_any_content_are_drawn():
    picture = Image.new("RGB", (64, 64))
    for text in ("two\nlines", "\r\n\t\x1b[31m\0", "\ud800", "\u202ertl", "", "\n" * 10_000):
        sheet = grid(text, text, [text, text], [Row((picture, picture), text, text, [text, text])])
        assert sheet.height < 2000


@pytest.mark.parametrize("size", [(100, 50), (50, 100), (1000, 10)])
def test_proportions_are_kept(size):
    cell = np.asarray(shown(Image.new("RGB", size, (255, 0, 0)), (64, 64)))
    red = (cell == (255, 0, 0)).all(2)
    scale = min(64 / size[0], 64 / size[1])
    assert (red.any(0).sum(), red.any(1).sum()) == (round(size[0] * scale), max(1, round(size[1] * scale)))


def test_every_picture_is_in_its_place():
    colours = [[(10, 20, 30), (40, 50, 60)], [(70, 80, 90), (100, 110, 120)], [(130, 140, 150), (160, 170, 180)]]
    rows = [Row([Image.new("RGB", (8, 8), c) for c in row]) for row in colours]
    sheet = grid("t", "one\ntwo", ["A", "B"], rows, cell=(40, 40))
    bottom = sheet.height - pictures.MARGIN
    for i, row in enumerate(reversed(colours)):
        for j, colour in enumerate(row):
            at = pictures.MARGIN + j * (40 + pictures.GAP) + 5, bottom - i * (40 + pictures.GAP) - 5
            assert sheet.getpixel(at) == colour
