"""Plans of whole-step forecasts, against the definition of v and straight lines written out."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asdm_core import forecast
from asdm_core.architecture import FAMILIES
from asdm_core.forecast import (
    COND,
    FEATURES,
    RESULT,
    UNGUIDED,
    Action,
    Adaptive,
    ForecastPlan,
    denoised_of,
    line,
    relative_change,
    v_of,
)


@given(st.floats(0.03, 15), st.integers(0, 100))
def test_v_is_what_a_v_network_predicts_and_eps_gives_the_same(sigma, seed):
    # x0 from either parametrisation, by the formulas of k-diffusion's wrappers.
    rng = np.random.default_rng(seed)
    x0, noise = rng.standard_normal((2, 3, 5))
    x = x0 + sigma * noise
    alpha = 1 / (1 + sigma**2) ** 0.5
    v = alpha * noise - alpha * sigma * x0  # Salimans and Ho, with alpha_t = alpha, sigma_t = alpha sigma
    from_v = x / (sigma**2 + 1) - v * sigma / (sigma**2 + 1) ** 0.5
    from_eps = x - noise * sigma
    assert from_v == pytest.approx(from_eps, abs=1e-9)
    for denoised in (from_v, from_eps):
        assert v_of(x, denoised, sigma) == pytest.approx(v, abs=1e-6)
    assert denoised_of(x, v_of(x, x0, sigma), sigma) == pytest.approx(x0, abs=1e-9)


@given(sigma=st.floats(1e-3, 1.0), seed=st.integers(0, 1000))
def test_v_is_that_of_the_latent_in_proportion_whatever_its_form(sigma, seed):
    x0, noise = np.random.default_rng(seed).standard_normal((2, 3, 5))
    # Flow matching: x = (1 - sigma) x0 + sigma n, so its velocity n - x0 and v are both linear in x0 and n.
    x = (1 - sigma) * x0 + sigma * noise
    size = (sigma**2 + (1 - sigma) ** 2) ** 0.5
    v = ((1 - sigma) * noise - sigma * x0) / size
    assert v_of(x, x0, sigma, 1 - sigma) == pytest.approx(v, abs=1e-9)
    assert denoised_of(x, v, sigma, 1 - sigma) == pytest.approx(x0, abs=1e-9)


def test_tensors_keep_their_type():
    x = torch.randn(2, 4, 8, 8)
    sigma = torch.tensor(2.0)
    v = v_of(x, x * 0.5, sigma)
    assert v.dtype == x.dtype and torch.allclose(denoised_of(x, v, sigma), x * 0.5, atol=1e-6)


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(3, 30))
def test_a_line_goes_on_straight(offset, slope, position):
    def value(p):
        return offset + slope * p

    points = [(7, 2.5), (6, 2.5), (4, 1.0), (0, 0.0)]  # 7 and 6 are at one noise level
    at = dict(points)
    weights = line(position, points)
    assert [q for q, _ in weights] == [7, 4]
    assert sum(w * value(at[q]) for q, w in weights) == pytest.approx(value(position), abs=1e-6)


def test_a_line_from_one_point_holds_and_from_none_is_an_error():
    assert line(3, [(2, 1.0)]) == ((2, 1.0),) == line(3, [(2, 1.0), (1, 1.0)])
    with pytest.raises(ValueError, match="must be made first"):
        line(3, [])


PLAN = ForecastPlan(
    (
        Action(),
        Action(),
        Action(RESULT, ((1, 1.5), (0, -0.5)), ((1, 1.0),)),
        Action(COND, difference=((1, 2.0), (0, -1.0))),
        Action(FEATURES, branch=3),
        Action(RESULT, ((3, 1.0),), ((0, 1.0),)),
        Action(),
        Action(UNGUIDED),
    ),
    name="mixed",
)


def again(plan):
    return ForecastPlan.from_dict(json.loads(json.dumps(plan.to_dict())))


def test_a_plan_is_the_same_after_json():
    assert again(PLAN) == PLAN
    heun = ForecastPlan((Action(), Action(), Action(RESULT)), (0.0, 1.0, 1.0))
    assert again(heun) == heun
    assert PLAN.letters() == "FFrcfrFu"


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("[]", "technique 'forecast'"),
        ('{"technique": "forecast", "format": 2, "evaluations": []}', "format 1"),
        ('{"technique": "forecast", "format": 1}', "evaluations"),
        ('{"technique": "forecast", "format": 1, "evaluations": []}', "at least one"),
        (
            '{"technique": "forecast", "format": 1, "evaluations": [{"kind": "result", "at": 0}]}',
            "no evaluation before",
        ),
        ('{"technique": "forecast", "format": 1, "evaluations": [{"kind": "half", "at": 0}]}', "must be one of"),
        ('{"technique": "forecast", "format": 1, "evaluations": [{"kind": "full", "at": 1e999}]}', "positions"),
        ('{"technique": "forecast", "format": 1, "evaluations": [3]}', "forecast plan"),
        (
            json.dumps({"technique": "forecast", "format": 1, "evaluations": [{"kind": "full", "at": 0}] * 5001}),
            "5001 evaluations, and a plan has at most 5000",
        ),
    ],
)
def test_what_is_no_plan_is_one_sentence(text, wanted):
    with pytest.raises(ValueError, match=wanted) as e:
        ForecastPlan.from_dict(json.loads(text))
    assert len(str(e.value)) < 400


def test_a_long_plan_is_checked_in_a_time_that_grows_with_it():
    """And so is what becomes of it in a run: files of others may hold thousands of evaluations."""
    asked = []

    class Counted(Action):
        @property
        def computes(self):
            asked.append(self)
            return super().computes

    n = 200
    for kind in (UNGUIDED, "full"):
        asked.clear()
        first = (Counted(kind),) * (n // 2)
        plan = ForecastPlan((*first, Counted(), *(Counted(RESULT),) * (n // 2)))
        assert len(asked) < 10 * n
        assert plan.live(n // 2) == ({n // 2} if kind == UNGUIDED else {n // 2 - 1, n // 2})
        assert plan.remembered == len(plan.live(n // 2)) and len(asked) < n**2


@pytest.mark.parametrize(
    "actions",
    [
        (Action(), Action(RESULT, ((1, 1.0),))),  # from itself
        (Action(), Action(RESULT), Action(RESULT, ((1, 1.0),))),  # from a forecast
        (Action(), Action(COND), Action(RESULT, ((1, 1.0),))),  # the negative prompt was not computed there
        (Action(), Action(UNGUIDED), Action(RESULT, ((1, 1.0),), ((1, 1.0),))),
        (Action(), Action(weights=((2, 1.0),)), Action()),  # from a later one
        (Action(), Action(RESULT), Action(weights=((2, 2.0), (1, -1.0)))),
    ],
)
def test_a_plan_draws_only_on_what_was_computed(actions):
    with pytest.raises(ValueError, match="earlier one that is full"):
        ForecastPlan(actions)


def test_what_is_remembered_is_what_somebody_still_needs():
    assert [sorted(PLAN.live(k)) for k in range(8)] == [[0], [0, 1], [0, 1], [0, 3], [0, 3], [], [], []]
    assert PLAN.remembered == 2
    long = forecast.every(20, 3)
    assert long.remembered == 2 and sorted(long.live(10)) == [6, 9]
    assert forecast.every(5, 1).remembered == 0


def test_the_saving_counts_evaluations():
    assert PLAN.saving(shared={3: 0.4}) == pytest.approx(1 - (3 + 2 * 0.5 + 0.4) / 8)
    assert forecast.every(20, 4).saving() == 0.75
    assert forecast.every(10, 1).saving() == 0


def test_a_plan_scales_to_another_number_of_steps():
    scaled = forecast.every(10, 5).for_steps(20)
    assert scaled.letters() == "F" + "r" * 9 + "F" + "r" * 9
    weighted = ForecastPlan((Action(), Action(weights=((1, 2.0), (0, -1.0))), Action(RESULT, ((1, 3.0), (0, -2.0)))))
    assert weighted.corrects(1) and weighted.remembered == 2
    assert weighted.for_steps(3) is weighted
    assert all(not a.weights and not a.difference for a in weighted.for_steps(6).actions)
    assert weighted.for_steps(6).letters() == "FrFrrr"
    assert weighted.for_steps(1).letters() == "F"


def test_guidance_in_an_interval():
    plan = forecast.guided_within(forecast.every(10, 1), 0.2, 0.7)
    assert plan.letters() == "uuFFFFFuuu"
    assert plan.saving() == pytest.approx(0.25)
    # What is left out inside is drawn on from inside, and what is left out outside is not.
    mixed = forecast.guided_within(forecast.every(10, 2), 0.1, 0.7)
    assert mixed.letters() == "uFFrFrFuuu" and mixed.sources(3) == {1, 2} and mixed.sources(5) == {2, 4}
    weighted = ForecastPlan((Action(), Action(), Action(), Action(RESULT, ((2, 2.0), (0, -1.0)))))
    assert forecast.guided_within(weighted, 0.25, 1.0).actions[3] == Action(RESULT)
    assert forecast.guided_within(weighted, 0.0, 1.0) == weighted
    # What a full evaluation makes good is made good where all that it looks at is as it was planned.
    makes_good = ForecastPlan(
        (
            Action(),
            Action(),
            Action(RESULT),
            Action(weights=((3, 1.5), (1, -0.5))),
            Action(weights=((4, 2.0), (3, -1.0))),
        )
    )
    assert forecast.guided_within(makes_good, 0.0, 1.0) == makes_good
    assert forecast.guided_within(makes_good, 0.2, 1.0).actions[3:] == makes_good.actions[3:]
    assert forecast.guided_within(makes_good, 0.6, 1.0).actions[3:] == (Action(), Action())
    with pytest.raises(ValueError, match="0 <= start <= end <= 1"):
        forecast.guided_within(plan, 0.7, 0.2)


def test_evaluations_are_found_by_where_they_lie():
    plan = ForecastPlan((Action(), Action(), Action(), Action(RESULT)), (0.0, 1.0, 1.0, 2.5))
    assert [plan.find(1.0, k) for k in range(5)] == [1, 1, 2, None, None]
    assert plan.find(2.5, 0) == 3 and plan.find(1.5, 0) is None


def test_features_of_a_mixed_plan_are_a_plan_of_inheritance():
    sd = FAMILIES["sd15"]
    plan = PLAN.features(sd)
    # The network is not called at 2 and 5, so these are no steps to inherit from.
    assert PLAN.letters()[2] == PLAN.letters()[5] == "r"
    assert [s for s, full in enumerate(plan.schedule.computed(8)) if not full] == [2, 4, 5]
    assert plan.rules[0].reuse == "forecast" and plan.name.startswith("deepcache-3")
    assert forecast.every(10, 2).features(sd) is None


def decided(adaptive, changes):
    """The letters of a run of one evaluation a step, by the change of each step to the one before: a change since the
    last full step is their sum.
    """
    made, run, letters = [], 0, ""
    for step, _ in enumerate(changes):
        action = Action()
        if adaptive.asks(len(changes), step, run):
            action = adaptive.action(made[::-1], float(step), sum(changes[made[-1][0] + 1 : step + 1]))
        if action.kind == RESULT:
            run += 1
            assert [q for q, _ in action.weights] == [number for number, _ in made[::-1][:2]]
        else:
            run = 0
            made.append((step, float(step)))
        letters += "r" if action.kind == RESULT else "F"
    return letters


def test_a_run_decides_by_how_much_its_first_layer_changed():
    even = [0.04] * 12
    assert decided(Adaptive(0.1, max_run=9), even) == "FFrrFrrFrrFF"
    assert decided(Adaptive(0.1, max_run=1), even) == "FFrFrFrFrFrF"
    assert decided(Adaptive(0.1, max_run=9, first=4, last=3), even) == "FFFFrrFrrFFF"
    assert decided(Adaptive(0.0), even) == "F" * 12
    assert decided(Adaptive(0.1, max_run=9), [0.0, 0.0, 0.0, 0.2, 0.0, 0.09, 0.02, 0.0]) == "FFrFrrFF"


def test_every_picture_and_every_call_counts_and_what_is_no_number_is_computed():
    adaptive = Adaptive(0.1)
    made = [(3, 3.0), (2, 2.0)]
    assert adaptive.action(made, 4.0, 0.05) == Action(RESULT, ((3, 2.0), (2, -1.0)))
    for change in (0.2, float("nan"), float("inf")):
        assert adaptive.action(made, 4.0, change) == Action()
    assert adaptive.action([], 0.0, 0.0) == Action()
    before = torch.ones(3, 2, 4, 4)
    now = before.clone()
    now[1, 0] += 0.5  # one picture, half of its numbers
    assert relative_change(now, before) == pytest.approx(0.25)
    assert not relative_change(before, torch.zeros_like(before)) < 1e9


def test_adaptive_settings_are_checked():
    for wrong in ({"threshold": -1}, {"threshold": "a"}, {"max_run": 0}, {"first": 0}, {"last": 1.5}):
        with pytest.raises(ValueError, match=f"forecast: {next(iter(wrong))} must be"):
            Adaptive(**wrong)
    with pytest.raises(ValueError, match="must be finite"):
        Adaptive(float("inf"))


def test_a_plan_may_be_for_more_steps_than_its_last_evaluation_tells():
    """A run that ends with a noise level twice is never evaluated at the place of its last step."""
    actions = tuple(Action(kind) for kind in ("full", "full", "result", "full"))
    plan = ForecastPlan(actions, (0.0, 1.0, 2.0, 2.0), steps=4)
    assert plan.for_steps(4) is plan and again(plan) == plan
    assert ForecastPlan(actions).steps == 4 and "steps" not in ForecastPlan(actions).to_dict()
    assert forecast.guided_within(plan, 0.0, 0.5).letters() == "FFuu"
    for steps in (2, True, 4.0):
        with pytest.raises(ValueError, match="a run with evaluations up to 2 has no"):
            ForecastPlan(actions, (0.0, 1.0, 2.0, 2.0), steps=steps)
