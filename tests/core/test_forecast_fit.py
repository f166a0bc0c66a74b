"""The fit, against runs of a toy network in which its prediction is exact, and samplers written out."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from asdm_core import forecast_fit
from asdm_core.forecast import COND, FULL, RESULT, ForecastPlan, denoised_of, v_of
from asdm_core.forecast_fit import (
    PlanFit,
    Offer,
    Recording,
    Statistics,
    best_of,
    cheapest,
    fits_of,
    gram_of,
    response,
    transfer,
    tried,
)

SIGMAS = np.array([14.6, 9.0, 5.7, 3.7, 2.4, 1.5, 0.95, 0.55, 0.25, 0.0])


def euler(denoise, x, sigmas):
    for a, b in itertools.pairwise(sigmas):
        x = x + (x - denoise(x, a)) / a * (b - a)
    return x


def heun(denoise, x, sigmas):
    for a, b in itertools.pairwise(sigmas):
        d = (x - denoise(x, a)) / a
        if b == 0:
            return x + d * (b - a)
        ahead = x + d * (b - a)
        x = x + (d + (ahead - denoise(ahead, b)) / b) / 2 * (b - a)
    return x


def dpmpp_2m(denoise, x, sigmas):
    old = before = None
    for a, b in itertools.pairwise(sigmas):
        now = denoise(x, a)
        if old is None or b == 0:
            mixed = now
        else:
            r = np.log(before / a) / np.log(a / b)
            mixed = (1 + 1 / (2 * r)) * now - old / (2 * r)
        x = b / a * x + (1 - b / a) * mixed
        old, before = now, a
    return x


SAMPLERS = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}
# Where the evaluations of each lie, in steps.
POSITIONS = {
    "euler": tuple(range(9)),
    "dpmpp_2m": tuple(range(9)),
    "heun": tuple(p for s in range(8) for p in (s, s + 1)) + (8,),
}


def response_of(sampler):
    return response(lambda denoise, rows: SAMPLERS[sampler](denoise, np.zeros(rows), SIGMAS))


def test_the_response_of_euler_is_its_algebra():
    # x_{i+1} = (b/a) x_i + (1 - b/a) D_i, so D_s moves x_m by (1 - b/a) times the product of the ratios between.
    found = response_of("euler")
    n = len(SIGMAS) - 1
    wanted = np.zeros((n, n + 1))
    for s in range(n):
        for m in range(s + 1, n + 1):
            wanted[s, m] = (1 - SIGMAS[s + 1] / SIGMAS[s]) * SIGMAS[m] / SIGMAS[s + 1] if SIGMAS[s + 1] else 1.0
    assert found.matrix == pytest.approx(wanted) and list(found.sigmas) == list(SIGMAS[:-1])


@pytest.mark.parametrize("sampler", SAMPLERS)
@given(seed=st.integers(0, 1000))
def test_a_run_is_the_sum_of_its_responses(sampler, seed):
    rng = np.random.default_rng(seed)
    found = response_of(sampler)
    given_, moved = rng.standard_normal((2, len(found)))
    start = rng.standard_normal()

    def run(values):
        left = iter(values)
        return float(SAMPLERS[sampler](lambda x, sigma: next(left), start, SIGMAS))

    assert run(given_ + moved) - run(given_) == pytest.approx(moved @ found.matrix[:, -1], abs=1e-8)


def test_a_sampler_that_is_not_linear_is_refused():
    with pytest.raises(ValueError, match="not linear"):
        response(lambda denoise, rows: np.tanh(euler(denoise, np.zeros(rows), SIGMAS)))

    def choosy(denoise, rows):
        x = np.zeros(rows)
        for a in (3.0, 2.0):
            d = denoise(x, a)
            x = x + d
        return denoise(x, 1.0) if np.abs(d).max() > 0 else x

    with pytest.raises(ValueError, match="chooses its noise levels"):
        response(choosy)


# A network whose v does not depend on the latent ------------------------------------------------------


class Toy:
    """v of the positive and negative prompt at each evaluation, smooth over the run; the error of a run with forecasts
    is then linear in theirs, and nothing of the prediction is approximate.
    """

    def __init__(self, sampler, guidance, seed=0, size=64):
        rng = np.random.default_rng(seed)
        self.sampler, self.guidance = sampler, guidance
        self.at = POSITIONS[sampler]
        shape = rng.standard_normal((2, 4, size))
        waves = [np.array([1, np.cos(p / 3), np.sin(p / 2), (p / 5) ** 2]) for p in self.at]
        self.cond, self.difference = ([wave @ part for wave in waves] for part in shape)
        self.start = SIGMAS[0] * rng.standard_normal(size)

    def run(self, plan=None):
        """The sampler over the full model, or with what the plan leaves out drawn on, straight from its weights."""
        n, w = itertools.count(), self.guidance
        cond, difference = {}, {}

        def denoise(x, sigma):
            k = next(n)
            action = plan.actions[k] if plan else None
            if plan and action.kind == RESULT:
                c = sum(weight * cond[q] for q, weight in action.weights)
                d = sum(weight * difference[q] for q, weight in action.difference or action.weights)
            else:
                c = cond[k] = self.cond[k]
                d = self.difference[k]
                if plan and action.kind == COND:
                    d = sum(weight * difference[q] for q, weight in action.difference)
                else:
                    difference[k] = d
                    if plan and action.weights:
                        c = sum(weight * cond[q] for q, weight in action.weights)
                        d = sum(weight * difference[q] for q, weight in action.difference or action.weights)
            positive, negative = denoised_of(x, c, sigma), denoised_of(x, c - d, sigma)
            assert v_of(x, positive, sigma) == pytest.approx(c)
            return negative + w * (positive - negative)

        return SAMPLERS[self.sampler](denoise, self.start, SIGMAS)

    def recording(self):
        size = float((self.run() ** 2).mean() ** 0.5)
        gram = gram_of(self.cond, self.difference)
        return Recording(response_of(self.sampler), gram, self.guidance, self.at, size)


def kinds_of(letters):
    return [{"F": FULL, "r": RESULT, "c": COND}[letter] for letter in letters]


CASES = [
    ("euler", "FFrrFrrFr"),
    ("euler", "Frrcrcccr"),
    ("dpmpp_2m", "FFrFrrFrF"),
    ("dpmpp_2m", "FcFrrcrcr"),
    ("heun", "FFrrFFrrFrFrrrFrr"),
]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("sampler, letters", CASES)
def test_the_predicted_error_is_the_error_of_the_run(sampler, letters, apart, fitted):
    toy = Toy(sampler, 3.5)
    fit = PlanFit(toy.recording(), apart=apart, power=1.0)
    found = fit.weights(kinds_of(letters), fitted)
    full, skipped = toy.run(), toy.run(found.plan)
    actual = ((skipped - full) ** 2).mean() ** 0.5 / (full**2).mean() ** 0.5
    assert actual > 1e-4
    system = fit._system(tuple(kinds_of(letters)), fitted, corrects=True)
    errors = system.t @ system.flat(system.truth - system.forecasts())
    assert (errors @ system.gram @ errors) ** 0.5 / fit.recording.size == pytest.approx(actual, rel=1e-3)
    assert found.plan.letters() == letters


@pytest.mark.parametrize("corrects", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_no_other_weights_have_a_smaller_objective(apart, corrects):
    recording = Toy("dpmpp_2m", 5.0).recording()
    kinds = kinds_of("FFrFrrFrr" if not apart else "FFcFrcFrr")
    fit = PlanFit(recording, apart=apart, corrects=corrects)
    its = forecast_fit.strain(recording.response, fit.weights(kinds).saving, recording.guidance)
    best, straight = ((fit.weights(kinds, fitted).error / its * recording.size) ** 2 for fitted in (True, False))
    assert best < straight
    assert corrects or fit.objective(kinds) == pytest.approx(best)
    n, w = len(recording), recording.guidance - 1
    acting = range(2, n) if corrects else [s for s in range(n) if kinds[s] != FULL]
    t = transfer(recording.response, [kind != RESULT for kind in kinds])[acting]
    alone = [forecast_fit.OWN if kinds[s] == FULL else forecast_fit.LAMBDA for s in acting]
    counts = np.outer(t, t) + np.diag(alone * t**2)

    def rows_of(plan):
        rows = np.zeros((len(acting), 2, n))
        for i, s in enumerate(acting):
            action = plan.actions[s]
            for row, weights in enumerate((action.weights, action.difference or action.weights)):
                for q, weight in weights or (((s, 1.0),) if kinds[s] == FULL else ()):
                    rows[i, row, q] = weight
        return rows

    def objective(rows):
        truth = np.zeros_like(rows)
        for i, s in enumerate(acting):
            truth[i, :, s] = (kinds[s] != COND, 1)
        errors = truth - rows
        total = np.concatenate([errors[:, 0], w * errors[:, 1]], axis=1)
        return float((counts * (total @ recording.gram @ total.T)).sum())

    found = rows_of(fit.weights(kinds).plan)
    assert objective(found) == pytest.approx(best, rel=1e-6)
    # The ridge keeps it from the very minimum: moving single weights gains next to nothing.
    plain = objective(rows_of(fit.weights(kinds, fitted=False).plan))
    for i, s in enumerate(acting):
        full = [q for q in range(s + 1) if kinds[q] == FULL]
        for newer, older in itertools.pairwise(full[-3:]):
            for amount in (-0.03, 0.03):
                moved = found.copy()
                rows = slice(1, 2) if kinds[s] == COND else slice(None)
                moved[i, rows, newer] += amount
                moved[i, rows, older] -= amount
                assert objective(moved) > best - 0.02 * plain


def test_what_a_full_evaluation_makes_good_lessens_the_error_of_the_run():
    toy = Toy("dpmpp_2m", 5.0)
    kinds = kinds_of("FFrFrFFrF")
    plans = [PlanFit(toy.recording(), corrects=corrects).weights(kinds) for corrects in (False, True)]
    assert [[plan.plan.corrects(k) for k in range(9)] for plan in plans] == [
        [False] * 9,
        [corrected and kind == FULL for corrected, kind in zip([False] * 3 + [True] * 6, kinds, strict=True)],
    ]
    without, with_ = (np.abs(toy.run(plan.plan) - toy.run()).max() for plan in plans)
    assert with_ < without / 2
    assert ForecastPlan.from_dict(plans[1].plan.to_dict()) == plans[1].plan


def test_weights_of_a_forecast_sum_to_one():
    plan = PlanFit(Toy("euler", 4.0).recording(), apart=True).weights(kinds_of("FFFrcrFrr")).plan
    for action in plan.actions:
        for weights in (action.weights, action.difference):
            assert not weights or sum(w for _, w in weights) == pytest.approx(1)


@pytest.mark.parametrize("full", [3, 5])
def test_the_search_comes_close_to_trying_everything(full):
    fit = PlanFit(Toy("dpmpp_2m", 3.0, seed=3).recording())
    found = fit.search(full)
    objectives = [
        fit.objective([FULL if s in (0, *rest) else RESULT for s in range(9)])
        for rest in itertools.combinations(range(1, 9), full - 1)
    ]
    assert found.plan.letters().count("F") == full and found.saving == pytest.approx(1 - full / 9)
    kinds = [a.kind for a in found.plan.actions]
    assert sorted(objectives).index(fit.objective(kinds)) <= len(objectives) // 10


def test_evaluations_for_the_prompt_alone_are_taken_where_they_help():
    # Nearly all that changes is the positive prompt's result, so its difference is cheap to forecast.
    toy = Toy("euler", 3.0, seed=1)
    toy.difference = [0.1 * d / (1 + p) for d, p in zip(toy.difference, toy.at, strict=True)]
    recording = toy.recording()
    alone, together = (PlanFit(recording, apart=True).search(5, conds=conds) for conds in (False, True))
    assert together.error < alone.error and COND in [a.kind for a in together.plan.actions]
    assert together.saving == pytest.approx(alone.saving)


def test_plans_for_blended_noise_are_those_for_noise_on_top():
    """Euler with flow matching takes the steps that it takes with noise on top at the levels sigma / (1 - sigma), its
    latents in proportion to the picture; so all that is fitted must be the same.
    """
    toy, mixed = Toy("euler", 4.0), SIGMAS / (1 + SIGMAS)
    found = response(lambda denoise, rows: euler(denoise, np.zeros(rows), mixed))
    on_top, blended = toy.recording(), replace(toy.recording(), response=replace(found, blends=True))
    assert blended.response.levels == pytest.approx(on_top.response.levels)
    computed = [letter == "F" for letter in "FFrFrFrrF"]
    for power in (None, 0.0, 1.0):
        assert transfer(blended.response, computed, power) == pytest.approx(transfer(on_top.response, computed, power))
    plans = [PlanFit(recording, apart=True).search(5) for recording in (on_top, blended)]
    assert plans[0].plan.letters() == plans[1].plan.letters() and plans[0].error == pytest.approx(plans[1].error)
    table = Statistics(SIGMAS[:-1], toy.recording().gram, 4.0, 1.0)
    assert table.recording(blended.response, 4.0, range(9)).gram == pytest.approx(on_top.gram)


def test_a_run_of_blended_noise_may_begin_at_noise_alone():
    sigmas = np.linspace(1.0, 0.0, 9)
    found = replace(response(lambda denoise, rows: euler(denoise, np.zeros(rows), sigmas)), blends=True)
    assert np.isfinite(transfer(found, [True, True, *[False] * 6])).all()
    recording = table_of("none").recording(found, 7.0, range(8))
    assert np.isfinite(recording.gram).all() and PlanFit(recording).search(4).saving == pytest.approx(0.5)


def test_above_what_is_known_v_goes_on_and_is_less_sure():
    rng = np.random.default_rng(0)
    cond, difference = rng.standard_normal((2, 2, 30))

    def gram(levels):  # v in a straight line over the angle
        angles = np.stack([np.ones(len(levels)), np.arctan(levels)], axis=1)
        return gram_of(angles @ cond, angles @ difference)

    known, wanted = np.geomspace(14.6, 0.03, 40), np.array([1e9, 60.0, 14.6, 3.0])
    answer = forecast_fit.Response(wanted, np.zeros((4, 5)))
    found = Statistics(known, gram(known), 7.0, 1.0).recording(answer, 7.0, range(4)).gram
    off = found - gram(wanted)
    went = np.diag([np.arctan(level) - np.arctan(14.6) for level in (1e9, 60.0)]) ** 2
    for one, its in ((0, cond), (4, difference)):
        for other, theirs in ((0, cond), (4, difference)):
            block = off[one : one + 4, other : other + 4]
            assert block[:2, :2] == pytest.approx(went * (its[1] @ theirs[1]) / 30, abs=1e-6)
            assert block[2:] == pytest.approx(0, abs=1e-4) and block[:, 2:] == pytest.approx(0, abs=1e-4)


def test_a_search_ends_where_nothing_is_missed():
    """v that stays is forecast without an error, and rounding makes some schedules better than that."""
    sigmas = np.append(np.geomspace(14, 0.03, 20), 0.0)
    answer = response(lambda denoise, rows: euler(denoise, np.zeros(rows), sigmas))
    for seed in range(4):
        v = np.random.default_rng(seed).standard_normal((2, 3)).repeat(20, 0)
        recording = Recording(answer, v @ v.T, 7.0, tuple(range(20)), 1.0)
        objective, asked = PlanFit.objective, itertools.count()

        def counted(self, kinds, objective=objective, asked=asked):
            assert next(asked) < 100_000
            return objective(self, kinds)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(PlanFit, "objective", counted)
            assert best_of(fits_of(recording), 6).error < 1e-6


def dpm_2(denoise, x, sigmas):
    for a, b in itertools.pairwise(sigmas):
        d = (x - denoise(x, a)) / a
        if b == 0:
            return x + d * (b - a)
        middle = (a * b) ** 0.5
        ahead = x + d * (middle - a)
        x = x + (ahead - denoise(ahead, middle)) / middle * (b - a)
    return x


def test_what_a_sampler_only_looks_ahead_by_is_not_thrown_away(monkeypatch):
    """To first order an error there may be next to nothing in the result, and large ones would make others good."""
    sigmas = np.append(np.geomspace(14.6, 0.03, 20), 0.0)
    answer = response(lambda denoise, rows: dpm_2(denoise, np.zeros(rows), sigmas))
    assert np.abs(transfer(answer, [True] * 39))[::2][-4:-1].max() < 0.01 * answer.reach[::2][-4:-1].min()
    recording = table_of("none").recording(answer, 7.0, [s / 2 for s in range(39)])

    def greatest():
        plan = PlanFit(recording).search(14, lots=2, far=False).plan
        return max(abs(weight) for action in plan.actions for _, weight in action.weights)

    assert greatest() < 12
    monkeypatch.setattr(forecast_fit, "LEAST", 0.0)
    assert greatest() > 50


def table_of(kind):
    tensors = load_file(Path(forecast_fit.__file__).parents[1] / "models" / "forecasts.safetensors")
    factor, (guidance, size) = tensors[f"{kind}-cfg7.factor"].astype(float), tensors[f"{kind}-cfg7.run"]
    return Statistics(tensors[f"{kind}-cfg7.sigmas"].astype(float), factor @ factor.T, float(guidance), float(size))


def table_run(steps, kind="none", sampler=euler):
    """A recording of a sampler with noise levels as karras spaces them, from the table that ships."""
    sigmas = np.append(np.linspace(14.6 ** (1 / 7), 0.03 ** (1 / 7), steps) ** 7, 0.0)
    found = response(lambda denoise, rows: sampler(denoise, np.zeros(rows), sigmas))
    return table_of(kind).recording(found, 7.0, range(steps))


@pytest.mark.parametrize(("steps", "differs"), [(30, False), (40, True), (65, False)])
def test_patience_finds_better_schedules_of_long_runs_and_is_not_needed_for_short_ones(steps, differs):
    fits = fits_of(table_run(steps))
    quick, patient = (best_of(fits, 0.3 * steps, patient) for patient in (False, True))
    assert (patient.plan != quick.plan) == differs and (patient.error < quick.error) == differs
    assert patient.saving == quick.saving


@pytest.mark.parametrize("search", [lambda fits: best_of(fits, 5), lambda fits: cheapest(fits, 0.05)])
def test_a_search_ends_where_what_is_called_on_its_way_raises(search):
    class Cancelled(Exception):
        pass

    asked = []

    def cancel():
        asked.append(1)
        if len(asked) == 10:
            raise Cancelled

    with pytest.raises(Cancelled):
        search(fits_of(Toy("euler", 3.0).recording(), cancel))
    assert len(asked) == 10


def ancestral(denoise, x, sigmas):
    """Without its noise, which moves nothing."""
    for a, b in itertools.pairwise(sigmas):
        down = b * b / a
        x = x + (x - denoise(x, a)) / a * (down - a)
    return x


def test_where_noise_is_drawn_errors_of_early_evaluations_last():
    plain = table_run(20, "some", ancestral)
    noisy = replace(plain, response=replace(plain.response, noisy=True))
    computed = [True] * 20
    quiet, loud = (np.abs(transfer(r.response, computed)) for r in (plain, noisy))
    assert quiet[-1] == pytest.approx(loud[-1]) and (loud[:-1] >= quiet[:-1]).all() and loud[0] > 1.5 * quiet[0]
    assert loud == pytest.approx(np.abs(transfer(plain.response, computed, forecast_fit.POWER_NOISY)))
    kinds = kinds_of("F" * 16 + "rFrr")
    errors = [
        PlanFit(r, power=0.25).weights(kinds).error * times
        for r, times in ((plain, 1), (noisy, forecast_fit.OVERRATED))
    ]
    assert errors[0] == pytest.approx(errors[1])
    first = [best_of(fits_of(r), 16).plan.letters().index("r") for r in (plain, noisy)]
    assert first[0] < first[1]


def test_errors_strain_with_long_gaps_guidance_and_trial_states():
    strain, euler = forecast_fit.strain, response_of("euler")
    beside, noisy = replace(euler, beside=True), replace(euler, noisy=True)
    assert strain(euler, 0.2, 7) == strain(euler, 0.5, 7) == 1 and strain(euler, 0.8, 7) == pytest.approx(1.33)
    assert strain(euler, 0.5, 3) == pytest.approx((3 / 7) ** 0.3) and strain(euler, 0.5, 0) == strain(euler, 0.5, 1)
    assert strain(beside, 0.5, 7) == forecast_fit.UNDERRATED and strain(noisy, 0.5, 7) == 1 / forecast_fit.OVERRATED
    assert strain(noisy, 0.5, 3) == strain(noisy, 0.5, 7)
    recording = Toy("euler", 5.0).recording()
    trial = replace(recording, response=replace(recording.response, beside=True))
    kinds = kinds_of("FFrFrrFrr")
    assert PlanFit(trial).weights(kinds).error == pytest.approx(1.6 * PlanFit(recording).weights(kinds).error)
    assert PlanFit(trial).weights(kinds).plan == PlanFit(recording).weights(kinds).plan


def test_transfer_of_the_last_euler_step_is_its_own():
    # What the last step denoises is the result: T = kappa.
    t = transfer(response_of("euler"), [True] * 9)
    assert t[-1] == pytest.approx(-0.25 / (1 + 0.25**2) ** 0.5)


def test_the_best_plan_of_all_fits_is_taken_and_the_cheapest_that_is_good_enough():
    recording = Toy("euler", 3.0).recording()
    fits = fits_of(recording)
    assert len(fits) == 2 and len(fits_of(Toy("euler", 1.0).recording())) == 1
    third = best_of(fits, 3)
    letters = third.plan.letters()
    assert letters.count("F") + letters.count("c") / 2 <= 3
    assert third.error in [fit.search(3, conds=fit.apart).error for fit in fits]
    # No dearer plan is taken than one that is good enough, and what is taken is good enough.
    for cost in range(2, 9):
        error = best_of(fits, cost).error * 1.0001
        found = cheapest(fits, error)
        assert found.error <= error and found.saving >= 1 - cost / 9 - 1e-9
    offered = Offer(third.saving, third.error, 9, third.plan)
    assert str(offered) == f"{letters}: {third.saving:.0%} of the work saved, {third.error:.1%} off"
    assert str(Offer(0.4, 0.0123, 12)) == "12 steps are as good here: 40% of the work saved, 1.2% off"


@pytest.mark.parametrize("pays", [0.5, 2.0])
def test_prompts_are_told_apart_where_that_lowers_the_error_enough(pays, monkeypatch):
    fits = fits_of(Toy("euler", 3.0).recording())
    for cost in range(2, 9):
        alike, apart = (fit.search(cost, conds=fit.apart) for fit in fits)
        monkeypatch.setattr(forecast_fit, "APART_PAYS", pays * apart.error / alike.error)
        assert best_of(fits, cost) == (apart if pays > 1 else alike)


def test_statistics_give_the_recording_of_a_run_at_other_noise_levels():
    # v as smooth functions of the noise level, known at many of them; the run is at nine of its own.
    parts = np.random.default_rng(2).standard_normal((2, 3, 40))

    def v(sigma):
        waves = np.array([1 / (1 + sigma), np.cos(np.log(sigma)), np.sin(0.7 * np.log(sigma))])
        return waves @ parts[0], waves @ parts[1]

    known = np.geomspace(20, 0.02, 60)
    statistics = Statistics(known, gram_of(*zip(*map(v, known), strict=True)), 4.0, 1.0)
    found = statistics.recording(response_of("euler"), 6.0, POSITIONS["euler"])
    wanted = gram_of(*zip(*map(v, SIGMAS[:-1]), strict=True))
    assert found.gram == pytest.approx(wanted, abs=1e-4) and found.guidance == 6.0
    # Differences between steps, which all forecasts are made of, are right too.
    step = np.zeros(18)
    step[[3, 4, 5]] = 1, -2, 1
    assert step @ found.gram @ step == pytest.approx(step @ wanted @ step, rel=0.01)


def test_tried_states_are_those_between_steps_and_all_but_the_last_at_one():
    assert not tried(POSITIONS["euler"]).any()
    assert tried(POSITIONS["heun"]).tolist() == [False, *([True, False] * 8)]
    assert tried((0, 0.5, 1, 1.5, 2)).tolist() == [False, True, False, True, False]
    # Three evaluations a step, two of them ahead of it.
    assert tried((0, 1, 2, 1, 2, 3, 2, 3)).tolist() == [False, True, True, False, True, True, False, False]


def test_what_is_tried_is_off_the_path_by_the_length_of_the_step():
    parts = np.random.default_rng(3).standard_normal((4, 3, 30))

    def waves(sigma):
        return np.array([1 / (1 + sigma), np.cos(np.log(sigma)), np.sin(0.7 * np.log(sigma))])

    def gram(sigmas, positions):
        """Of v along a run, off by something smooth at states that are tried, the further the longer the step."""
        rows = []
        for k, (sigma, beside) in enumerate(zip(sigmas, tried(positions), strict=True)):
            off = np.log(sigmas[k - 1] / sigma) * (1 - sigma / sigmas[k - 1]) if beside else 0.0
            cond, difference, its, other = (waves(sigma) @ part for part in parts)
            rows.append((cond + off * its, difference + off * other))
        return gram_of(*zip(*rows, strict=True))

    steps = np.geomspace(20, 0.02, 24)
    known = np.repeat(steps, 2)[1:]  # each level tried, then reached
    places = [0.0, *(p for s in range(23) for p in (s + 1, s + 1))]
    statistics = Statistics(known, gram(known, places), 4.0, 1.0, tried(places))
    for sampler in ("heun", "euler"):
        answer = response_of(sampler)
        found = statistics.recording(answer, 4.0, POSITIONS[sampler])
        assert found.gram == pytest.approx(gram(answer.sigmas, POSITIONS[sampler]), abs=2e-3)
    # Where nothing is known of states beside the path, they are taken for it.
    alone = replace(statistics, beside=np.zeros(47, bool), sigmas=known - 1e-9 * np.arange(47))
    assert alone.recording(response_of("heun"), 4.0, POSITIONS["heun"]).gram != pytest.approx(found.gram[0, 0])


def test_what_is_tried_is_never_thought_far_from_v():
    # Recorded in many short steps, so that what noise there is off the path would be stretched beyond all measure.
    rng = np.random.default_rng(4)
    known = np.repeat(np.geomspace(20, 0.02, 150), 2)[1:]
    places = [0.0, *(p for s in range(149) for p in (s + 1, s + 1))]
    v, noise = rng.standard_normal((2, 40)), 0.05 * rng.standard_normal((2, 299, 40))
    rows = [v[:, None] + noise * tried(places)[:, None]]
    statistics = Statistics(known, gram_of(*rows[0]), 4.0, 1.0, tried(places))
    answer, positions = response_of("heun"), POSITIONS["heun"]
    found = PlanFit(statistics.recording(answer, 4.0, positions))._guided
    size = found[0, 0] ** 0.5
    gone = np.sqrt(np.diag(found) + found[0, 0] - 2 * found[0]) / size
    assert gone[~tried(positions)] == pytest.approx(0, abs=1e-6)
    assert 0.4 < gone[tried(positions)].max() <= 0.5 + 1e-6


def test_the_first_state_of_a_run_is_on_its_path():
    statistics = Statistics(np.geomspace(20, 0.02, 20), np.eye(40), 4.0, 1.0, np.arange(20) % 2 == 1)
    answer = replace(response_of("euler"), sigmas=np.array([14.6, 14.6, *SIGMAS[1:8]]))
    found = statistics.recording(answer, 4.0, (0, 0, *range(1, 8)))
    assert tried((0, 0, *range(1, 8)))[0] and found.gram[0] == pytest.approx(found.gram[1])


def test_a_recording_is_checked():
    recording = Toy("euler", 3.0).recording()
    with pytest.raises(ValueError, match="18 x 18"):
        Recording(recording.response, recording.gram[:9, :9], 3.0, recording.positions, 1.0)
    with pytest.raises(ValueError, match="not finite"):
        Recording(recording.response, recording.gram * np.nan, 3.0, recording.positions, 1.0)
