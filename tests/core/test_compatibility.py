"""docs/compatibility.md shows the table that is tested in the host, cell by cell."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "compatibility.md").read_text("utf-8")
_spec = importlib.util.spec_from_file_location("matrix", ROOT / "tests" / "host" / "scripts" / "matrix.py")
assert _spec and _spec.loader
matrix = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(matrix)


def rows_after(text):
    """The cells of the table that begins with a line of the page."""
    lines = PAGE[PAGE.index(text) :].splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))
    return [[c.strip() for c in line.strip("|").split("|")] for line in lines[:end]]


def test_every_cell_is_the_declared_one():
    head, _, *rows = rows_after("|  | Pruned UNet |")
    assert head[1:] == list(matrix.TECHNIQUES)
    shown = {
        (row[0], technique): text for row in rows for technique, text in zip(matrix.TECHNIQUES, row[1:], strict=True)
    }
    declared = {
        (title, technique): matrix.cell(feature, technique)
        for feature, title in matrix.FEATURES.items()
        for technique in matrix.TECHNIQUES
    }
    assert shown == declared


def test_every_note_is_on_the_page():
    assert f"\n{matrix.notes()}\n" in PAGE
    assert {technique for _, technique in matrix.NOTES} <= set(matrix.TECHNIQUES) and {
        feature for feature, _ in matrix.NOTES
    } <= set(matrix.FEATURES)


def test_the_graphs_are_the_counted_ones():
    _, _, *rows = rows_after("|  | first run of 4 steps |")
    assert {name: tuple(counts) for name, *counts in rows} == {
        name: tuple(map(str, counts)) for name, counts in matrix.GRAPHS.items()
    }
    assert set(matrix.GRAPHS) == {matrix.ALONE, *matrix.TECHNIQUES}


def test_the_page_says_what_was_never_run():
    assert "Nothing on this page was run on a graphics card" in PAGE
