"""Switch points, cross-fades and their composition."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asdm_core.switching import NEVER, PRESETS, Switch, SwitchPoint, shares

SIGMAS = [14.0, 7.0, 3.0, 1.0, 0.0]


def percent_to_sigma(percent):
    return 14.0 * (1 - percent)


def weights(switch, sigmas=SIGMAS):
    threshold = switch.sigma(sigmas, percent_to_sigma)
    return [switch.weight(s, i, threshold, sigmas) for i, s in enumerate(sigmas[:-1])]


@pytest.mark.parametrize(
    ("at", "unit", "sigma"),
    [
        (0, "percent", math.inf),
        (0.5, "percent", 7.0),
        (1, "percent", NEVER),
        (0, "step", math.inf),
        (1, "step", 7.0),
        (3, "step", 1.0),
        (4, "step", NEVER),
        (40, "step", NEVER),
        (0, "share of steps", math.inf),
        (0.25, "share of steps", 7.0),
        (0.6, "share of steps", 3.0),
        (0.7, "share of steps", 1.0),
        (0.9, "share of steps", NEVER),
        (1, "share of steps", NEVER),
        (0, "sigma", NEVER),
        (2.5, "sigma", 2.5),
        (20, "sigma", 20),
    ],
)
def test_a_point_is_a_noise_level(at, unit, sigma):
    assert SwitchPoint(at, unit).sigma(SIGMAS, percent_to_sigma) == sigma


@pytest.mark.parametrize(
    ("at", "unit", "message"),
    [
        (0.5, "step", "whole number of steps, got 0.5"),
        (2, "percent", "from 0 to 1, got 2"),
        (-0.1, "share of steps", "from 0 to 1, got -0.1"),
        (1, "seconds", "got 'seconds'"),
        *((at, unit, "wanted a number") for at in (math.nan, math.inf) for unit in ("step", "percent", "sigma")),
    ],
)
def test_points_that_cannot_be_meant_are_refused(at, unit, message):
    with pytest.raises(ValueError, match=message):
        SwitchPoint(at, unit)


@pytest.mark.parametrize(
    ("name", "small_first", "steps", "of"),
    [("S1", True, 10, 25), ("S2", False, 15, 25), ("S3", False, 10, 25), ("S1", True, 8, 20), ("S2", False, 30, 50)],
)
def test_presets_are_the_papers_whatever_the_number_of_steps(name, small_first, steps, of):
    sigmas = [float(of - i) for i in range(of + 1)]
    found = weights(Switch((PRESETS[name].at,)), sigmas)
    assert found == [float(i >= steps) for i in range(of)]
    assert PRESETS[name].small_first == small_first


@pytest.mark.parametrize("step", range(5))
def test_a_switch_at_a_step_gives_the_rest_of_the_run_to_the_next_model(step):
    assert weights(Switch((SwitchPoint(step, "step"),))) == [float(i >= step) for i in range(4)]


def test_the_last_step_of_the_first_model_leaves_even_sigma_zero_to_it():
    switch = Switch((SwitchPoint(4, "step"),))
    assert switch.weight(0.0, 3, switch.sigma(SIGMAS, percent_to_sigma), SIGMAS) == 0


def test_a_node_computed_in_single_precision_is_the_node():
    switch = Switch((SwitchPoint(1, "step"),))
    assert switch.weight(7.0000005, 1, switch.sigma(SIGMAS, percent_to_sigma), SIGMAS) == 1


def test_a_crossfade_rises_in_equal_parts():
    assert weights(Switch((SwitchPoint(1, "step"),), 2)) == [0, 1 / 3, 2 / 3, 1]
    assert weights(Switch((SwitchPoint(0, "step"),), 1)) == [1 / 2, 1, 1, 1]


def test_a_switch_within_another_is_never_before_it():
    early, late = SwitchPoint(1, "step"), SwitchPoint(3, "step")
    assert weights(Switch((early,)).within(late)) == weights(Switch((late,)).within(early)) == [0, 0, 0, 1]


def test_the_last_model_that_plays_in_full_plays_alone():
    assert shares([]) == shares([0, 0]) == {0: 1}
    assert shares([1, 0]) == {1: 1}
    assert shares([1, 1]) == shares([0.5, 1]) == {2: 1}
    assert shares([0.25, 0.5]) == {0: 0.375, 1: 0.125, 2: 0.5}


@given(st.lists(st.sampled_from([0, 0.25, 0.5, 1]), max_size=5))
def test_shares_sum_to_one(given):
    found = shares(given)
    assert sum(found.values()) == 1
    assert all(0 < share <= 1 for share in found.values())
