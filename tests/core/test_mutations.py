"""The short form of bench/mutations.py: damaged and crafted files are read or refused, whatever was done to them."""

import random
from collections import Counter

import pytest

from bench import mutations
from bench.mutations import Outcome, Source


def test_some_hundred_damaged_files_are_read_or_refused(tmp_path):
    found = list(mutations.outcomes(7, range(300), tmp_path))
    assert [(o.number, o.of, o.came) for o in found if o.came not in ("read", "refused")] == []
    kinds = Counter(o.came for o in found)
    assert kinds["refused"] > 200 and kinds["read"] > 20
    assert len({o.of for o in found}) == 10


def test_what_a_number_stands_for_does_not_change(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    alone = list(mutations.outcomes(7, range(41, 44), tmp_path / "a"))
    (again,) = mutations.outcomes(7, range(43, 44), tmp_path / "b")
    assert (again.number, again.of, again.came) == (alone[-1].number, alone[-1].of, alone[-1].came)
    assert mutations.damaged_json({"a": [1, {"b": 2}]}, random.Random(3)) == mutations.damaged_json(
        {"a": [1, {"b": 2}]}, random.Random(3)
    )


@pytest.mark.parametrize(
    "read, came",
    [
        (lambda path: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda path: [][1], "IndexError: list index out of range"),
        (lambda path: path.name, "read"),
    ],
)
def test_what_should_not_be_is_told_from_what_may(tmp_path, read, came):
    outcome = mutations.attempt(Source("a test", tmp_path, read), tmp_path, 3)
    assert (outcome.number, outcome.of, outcome.came) == (3, "a test", came)
    assert outcome.sound == (came == "read")
    assert not Outcome(3, "a test", "read", mutations.BOUND_SECONDS + 1).sound
