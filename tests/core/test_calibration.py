"""The exact choice of full steps, against trying all of them."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asdm_core.architecture import FAMILIES
from asdm_core.calibration import Candidate, best_steps, choices, choose
from asdm_core.inheritance import Schedule, deepcache

SD = FAMILIES["sd15"]


def errors_of(seed, n, longest):
    return np.random.default_rng(seed).random((n, longest + 1, longest + 2))


def total(errors, steps):
    """The error of a set of full steps, from the definition; inf where too many steps in a row inherit."""
    longest = errors.shape[1] - 1
    error = 0.0
    before = None
    for last, following in itertools.pairwise([*steps, len(errors)]):
        gap = 0 if before is None else last - before
        if following - last - 1 > longest:
            return math.inf
        error += sum(errors[s, s - last, gap] for s in range(last + 1, following))
        before = last
    return error


@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(1, 4), st.data())
def test_no_other_choice_has_a_smaller_error(seed, n, longest, data):
    full = data.draw(st.integers(1, n))
    errors = errors_of(seed, n, longest)
    steps, error = best_steps(errors, full)
    others = [total(errors, (0, *rest)) for rest in itertools.combinations(range(1, n), full - 1)]
    if not steps:
        assert min(others) == math.inf == error
    else:
        assert (
            steps[0] == 0
            and len(steps) == full
            and error == pytest.approx(total(errors, steps)) == pytest.approx(min(others))
        )


def test_all_steps_full_is_no_error():
    assert best_steps(errors_of(0, 6, 2), 6) == (tuple(range(6)), 0)


def candidates():
    return [
        Candidate(deepcache(SD, b), saved, errors_of(b, 8, 3) * scale)
        for b, saved, scale in ((0, 0.9, 1.0), (3, 0.5, 0.1))
    ]


def test_the_least_error_for_a_saving_and_the_most_saving_for_an_error():
    found = choices(candidates())
    for saving in (0.1, 0.3, 0.5):
        best = choose(found, saving=saving)
        assert best.saving >= saving and not [c for c in found if c.saving >= saving and c.error < best.error]
    best = choose(found, error=0.3)
    assert best.error <= 0.3 and not [c for c in found if c.error <= 0.3 and c.saving > best.saving]
    assert choose(found, error=0.0).saving == 0
    with pytest.raises(ValueError, match="no plan saves 95% of the work; the most"):
        choose(found, saving=0.95)


def test_chosen_steps_move_with_the_length_of_the_run():
    schedule = Schedule("explicit", steps=(0, 1, 5), of=10)
    assert [s for s, full in enumerate(schedule.computed(10)) if full] == [0, 1, 5]
    assert [s for s, full in enumerate(schedule.computed(20)) if full] == [0, 2, 10]
