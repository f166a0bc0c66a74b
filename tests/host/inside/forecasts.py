"""Whole-step forecasts in the host's sampling: against an Euler loop of our own, and what must not change."""

import gc
import types
import weakref

import comfy.controlnet
import comfy.hooks
import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.sd
import pytest
import reference as stock
import small
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras import (
    nodes_apg,
    nodes_cfg,
    nodes_context_windows,
    nodes_custom_sampler,
    nodes_hooks,
    nodes_model_advanced,
    nodes_pag,
    nodes_perpneg,
    nodes_sag,
    nodes_slg,
    nodes_tcfg,
)
from in_host import module

SD, SDXL = small.SD, small.SDXL
forecast, forecasts, speed_up = (
    module(name) for name in ("asdm_core.forecast", "nodes.engine.forecasts", "nodes.speed_up")
)
switch, switching = module("nodes.engine.switch"), module("asdm_core.switching")
inheritance = module("asdm_core.inheritance")
Action, ForecastPlan, every = forecast.Action, forecast.ForecastPlan, forecast.every
FULL, RESULT, COND, UNGUIDED = forecast.FULL, forecast.RESULT, forecast.COND, forecast.UNGUIDED
STEPS = 8


class Carried:
    """A MODEL that carries a plan: `model`, and the report of its last run."""

    def __init__(self, model, plan):
        self.kept = forecasts.Forecasts(plan)
        self.model = small.with_technique(model, self.kept)

    @property
    def report(self):
        return self.kept.log.last


def plan_of(letters, positions=()):
    kinds = {"F": FULL, "r": RESULT, "c": COND, "u": UNGUIDED}
    return ForecastPlan(tuple(Action(kinds[letter]) for letter in letters), positions)


# An Euler loop that is nobody else's ------------------------------------------------------------------


def by_hand(plan, cfg):
    """A sampler that asks the host for the results of both prompts and forecasts by itself, in eps and v of the
    textbook.
    """

    def last_two(known):
        return list(known)[-2:]

    def extended(known, s):
        points = last_two(known)
        if len(points) == 1:
            return known[points[0]]
        p, q = points
        return known[q] + (known[q] - known[p]) * ((s - q) / (q - p))

    def loop(model, x, sigmas, extra_args=None, callback=None, disable=None):
        guider, options = model.inner_model, extra_args["model_options"]
        lists = [guider.conds["positive"], guider.conds["negative"]]
        v_cond, v_uncond = {}, {}  # by step, where computed

        def results(which, x, sigma):
            asked = [c if i in which else None for i, c in enumerate(lists)]
            return comfy.samplers.calc_cond_batch(guider.inner_model, asked, x, sigma.expand(len(x)), options)

        for s, (sigma, lower) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
            alpha = 1 / (1 + sigma**2) ** 0.5

            def to_v(x0, x=x, sigma=sigma, alpha=alpha):
                eps = (x - x0) / sigma
                return alpha * eps - alpha * sigma * x0

            def to_x0(v, x=x, sigma=sigma, alpha=alpha):
                return alpha * (alpha * x) - alpha * sigma * v

            action = plan.actions[s]
            if action.kind == FULL:
                cond, uncond = results((0, 1), x, sigma)
                v_cond[s], v_uncond[s] = to_v(cond), to_v(uncond)
                if action.weights:
                    cond = to_x0(sum(w * v_cond[q] for q, w in action.weights))
                    low = sum(w * (v_cond[q] - v_uncond[q]) for q, w in action.difference or action.weights)
                    uncond = to_x0(to_v(cond) - low)
            elif action.kind == UNGUIDED:
                uncond = cond = results((0,), x, sigma)[0]
            elif action.kind == COND:
                cond = results((0,), x, sigma)[0]
                v_cond[s] = to_v(cond)
                differences = {q: v_cond[q] - v_uncond[q] for q in v_uncond}
                given = sum(w * differences[q] for q, w in action.difference)
                uncond = to_x0(to_v(cond) - (given if action.difference else extended(differences, s)))
            elif action.weights:
                at = sum(w * v_cond[q] for q, w in action.weights)
                if action.difference:
                    low = at - sum(w * (v_cond[q] - v_uncond[q]) for q, w in action.difference)
                else:
                    low = sum(w * v_uncond[q] for q, w in action.weights)
                cond, uncond = to_x0(at), to_x0(low)
            else:
                cond = to_x0(extended({q: v_cond[q] for q in v_uncond}, s))
                uncond = to_x0(extended(v_uncond, s))
            denoised = uncond + cfg * (cond - uncond)
            x = x + (x - denoised) / sigma * (lower - sigma)
        return x

    return loop


def reference(model, plan, config=SD, steps=STEPS, cfg=3.0, batch=1, size=(16, 16), positive=None, negative=None):
    noise = torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(0))
    return comfy.sample.sample_custom(
        model,
        noise,
        cfg,
        comfy.samplers.KSAMPLER(by_hand(plan, cfg)),
        small.sigmas_of(model, steps),
        positive or small.cond(config, 1),
        negative or small.cond(config, 2),
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=0,
    )


WEIGHTED = ForecastPlan(
    (
        Action(),
        Action(),
        Action(RESULT, ((1, 1.7), (0, -0.7))),
        Action(RESULT, ((1, 2.4), (0, -1.4)), ((1, 1.0),)),
        Action(),
        Action(COND, difference=((4, 1.5), (1, -0.3), (0, -0.2))),
        Action(RESULT, ((5, 1.2), (4, -0.2)), ((4, 1.3), (1, -0.3))),
        Action(RESULT),
    )
)
MADE_GOOD = ForecastPlan(
    (
        Action(),
        Action(),
        Action(RESULT, ((1, 1.7), (0, -0.7))),
        Action(FULL, ((3, 1.4), (1, -0.6), (0, 0.2))),
        Action(RESULT, ((3, 1.5), (1, -0.5))),
        Action(COND, difference=((3, 1.5), (1, -0.5))),
        Action(FULL, ((6, 1.3), (5, 0.1), (3, -0.4)), ((6, 1.2), (3, -0.1), (1, -0.1))),
        Action(FULL, ((7, 0.8), (6, 0.2))),
    )
)
PLANS = {
    "made good": MADE_GOOD,
    "made good at once": ForecastPlan((*MADE_GOOD.actions[:5], Action(), Action(RESULT), Action(FULL, ((7, 1.0),)))),
    "every other": every(STEPS, 2),
    "every third, two first": every(STEPS, 3, first=2),
    "cond": plan_of("FFcFcccF"),
    "guidance in an interval": forecast.guided_within(every(STEPS, 1), 0.3, 0.8),
    "all kinds": plan_of("FFrcrFuu"),
    "weighted": WEIGHTED,
}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", PLANS)
def test_a_run_equals_a_loop_by_hand(model, name):
    carried = Carried(model, PLANS[name])
    made = small.sample(carried.model, steps=STEPS)
    assert small.difference(made, reference(model, PLANS[name])) < 2e-5
    assert small.difference(made, small.sample(model, steps=STEPS)) > 1e-3
    assert carried.report.letters == PLANS[name].letters()
    assert carried.report.saving == pytest.approx(PLANS[name].saving()) and not carried.report.notes


def mixed(branch=1):
    kinds = [FULL, FULL, forecast.FEATURES, RESULT, FULL, forecast.FEATURES, RESULT, forecast.FEATURES]
    return ForecastPlan(tuple(Action(kind, branch=branch if kind == forecast.FEATURES else 0) for kind in kinds))


def test_full_steps_features_and_results_in_one_plan(model):
    plan = mixed()
    features, carried = plan.features(SD), Carried(model, plan)
    made = small.sample(carried.model, steps=STEPS)
    assert carried.report.letters == plan.letters() == "FFfrFfrf" and carried.report.saving == 0.25
    # The filter and Feature Inheritance know nothing of each other.
    apart = small.sample(small.with_plan(stock.filtered(model, plan), features), steps=STEPS)
    assert small.difference(made, apart) < 2e-5
    for part in (small.with_plan(model, features), stock.filtered(model, plan)):
        assert small.difference(made, small.sample(part, steps=STEPS)) > 1e-4
    kept, shape, conds = carried.kept, (1, 4, 16, 16), {"positive": [1], "negative": [1]}
    alone = small.inheritance.Inheritance(features).device_bytes(model, shape, conds)
    assert alone > 0 and kept.device_bytes(model, shape, conds) == alone + forecasts.bytes_of(
        plan.remembered, shape, len(conds)
    )


def test_features_in_a_step_that_is_computed_in_full_as_well_are_said(model):
    kinds = [FULL, FULL, FULL, forecast.FEATURES, FULL, FULL, FULL]
    plan = ForecastPlan(tuple(Action(kind) for kind in kinds), (0, 1, 1, 2, 2, 3, 3))
    carried = Carried(model, plan)
    assert torch.equal(
        small.sample(carried.model, steps=4, sampler="heun"), small.sample(model, steps=4, sampler="heun")
    )
    assert any("another evaluation is computed in full" in note for note in carried.report.notes)


def test_features_of_a_plan_leave_those_of_the_node_alone(model, caplog):
    plan, never = mixed(), inheritance.deepcache(SD, 0, inheritance.Schedule(interval=1))
    carried = Carried(small.with_plan(model, never), plan)
    made = small.sample(carried.model, steps=STEPS)
    assert small.difference(made, small.sample(stock.filtered(model, plan), steps=STEPS)) < 2e-5
    assert caplog.text.count("the features of this one are left out") == 1
    assert carried.report.letters == "FFFrFFrF"


@pytest.mark.sweep(1)
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_both_predictions_of_a_batch(folder, prediction):
    m = small.model(folder)
    if prediction == "v":
        m = nodes_model_advanced.ModelSamplingDiscrete().patch(m, "v_prediction", False)[0]
        assert isinstance(m.get_model_object("model_sampling"), comfy.model_sampling.V_PREDICTION)
    made = small.sample(Carried(m, WEIGHTED).model, steps=STEPS, batch=3, size=(12, 20))
    assert small.difference(made, reference(m, WEIGHTED, batch=3, size=(12, 20))) < 2e-5


def test_sdxl(folder):
    m, plan = small.model(folder, SDXL), plan_of("FFrc")
    made = small.sample(Carried(m, plan).model, SDXL, steps=4)
    assert small.difference(made, reference(m, plan, SDXL, steps=4)) < 2e-5


def test_prompts_in_areas_with_masks_and_times_equal_the_loop(model):
    positive = small.cond(SD, 1) + small.cond(SD, 3, area=(8, 8, 0, 8), strength=0.7)
    positive += small.cond(SD, 4, mask=torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(1)))
    plan = every(STEPS, 2)
    made = small.sample(Carried(model, plan).model, steps=STEPS, positive=positive)
    assert small.difference(made, reference(model, plan, positive=positive)) < 2e-5


@pytest.mark.sweep(1)
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "uni_pc", "dpmpp_sde", "dpm_2"])
def test_a_plan_of_full_steps_is_bit_identical_to_none(model, sampler):
    carried = Carried(model, every(4, 1))
    torch.manual_seed(0)
    plain = small.sample(model, steps=4, sampler=sampler)
    torch.manual_seed(0)
    assert torch.equal(small.sample(carried.model, steps=4, sampler=sampler), plain)
    assert carried.report.peak == 0 and carried.report.saving == 0


def test_where_nothing_could_be_forecast_nothing_is_made_good(model, monkeypatch):
    actions = [Action(), Action(RESULT), Action(RESULT)]
    actions += [Action(FULL, weights=((k, 1.5), (0 if k == 3 else k - 1, -0.5))) for k in range(3, STEPS)]
    carried = Carried(model, ForecastPlan(tuple(actions)))
    plain = small.sample(model, steps=STEPS)
    assert small.difference(small.sample(carried.model, steps=STEPS), plain) > 1e-3 and carried.report.saving == 0.25
    # As where what is sampled shows something else at each step.
    monkeypatch.setattr(forecasts.Forecaster, "_forecast", lambda *_: None)
    assert torch.equal(small.sample(carried.model, steps=STEPS), plain) and carried.report.saving == 0


def test_what_is_computed_before_the_first_forecast_is_bit_identical(model):
    seen = {}
    plan = plan_of("FFFFFFFr")
    for name, m in (("plain", model), ("plan", Carried(model, plan).model)):
        small.sample(
            m, steps=STEPS, callback=lambda i, x0, x, n, name=name: seen.setdefault(name, []).append(x0.clone())
        )
    equal = [torch.equal(a, b) for a, b in zip(seen["plain"], seen["plan"], strict=True)]
    assert equal == [True] * 7 + [False]


def test_a_rerun_another_size_and_an_error_change_nothing(model):
    carried = Carried(model, every(STEPS, 2))
    first = small.sample(carried.model, steps=STEPS)
    small.sample(carried.model, steps=STEPS, size=(24, 16), batch=2)

    def stop(i, x0, x, n):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        small.sample(carried.model, steps=STEPS, callback=stop)
    assert torch.equal(small.sample(carried.model, steps=STEPS), first)


def test_nothing_is_left_after_a_run(model, monkeypatch):
    made = []
    create = forecasts.Point.__init__
    monkeypatch.setattr(
        forecasts.Point, "__init__", lambda self, *args: (made.append(weakref.ref(self)), create(self, *args))[1]
    )
    small.sample(Carried(model, every(STEPS, 2)).model, steps=STEPS)
    gc.collect()
    assert made and all(point() is None for point in made)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("name", ["every other", "weighted", "cond", "made good at once"])
def test_the_memory_is_known_before_the_run(model, name):
    carried = Carried(model, PLANS[name])
    small.sample(carried.model, steps=STEPS, size=(12, 20), batch=2)
    assert carried.report.peak == carried.kept.device_bytes(None, (2, 4, 12, 20), {"positive": [], "negative": []})


def test_evaluations_of_heun_are_found_by_their_noise_level(model):
    # Steps 0 1, 1 2, 2 3, 3.
    plan = plan_of("FFFrrrF", (0, 1, 1, 2, 2, 3, 3))
    carried = Carried(model, plan)
    small.sample(carried.model, steps=4, sampler="heun")
    assert carried.report.letters == "FFFrrrF"
    by_steps = Carried(model, every(4, 2))
    small.sample(by_steps.model, steps=4, sampler="heun")
    assert by_steps.report.letters == "FrrFFrr"


def test_evaluations_between_steps_do_as_their_step(model):
    carried = Carried(model, every(6, 2))
    small.sample(carried.model, steps=6, sampler="dpm_2")
    assert carried.report.letters == "FFrrFFrrFFr"


def test_cfg_1_and_a_guider_without_negative_are_left_alone_by_cond(model):
    plan = plan_of("FFcc" * 2)
    carried = Carried(model, plan)
    assert torch.equal(small.sample(carried.model, steps=STEPS, cfg=1.0), small.sample(model, steps=STEPS, cfg=1.0))
    assert carried.report.letters == "F" * STEPS and carried.report.saving == 0


def test_nothing_is_made_good_that_was_not_forecast(model):
    # With CFG 1 an evaluation for the positive prompt alone is a full one.
    plan = ForecastPlan((Action(), Action(), Action(COND), Action(FULL, ((3, 1.4), (1, -0.6), (0, 0.2)))))
    assert small.difference(small.sample(Carried(model, plan).model, steps=4), small.sample(model, steps=4)) > 1e-3
    carried = Carried(model, plan)
    assert torch.equal(small.sample(carried.model, steps=4, cfg=1.0), small.sample(model, steps=4, cfg=1.0))
    # A prompt joins in at the third of four steps: nothing before it is of use.
    plan = ForecastPlan((Action(), Action(), Action(RESULT), Action(FULL, ((3, 1.4), (1, -0.6), (0, 0.2)))))
    sampling = model.get_model_object("model_sampling")
    begins = small.sigmas_of(model, 4)[2]
    percent = float(1 - sampling.timestep(begins) / 999) - 1e-4
    positive = small.cond(SD, 1) + small.cond(SD, 3, start_percent=percent, end_percent=1.0)
    carried = Carried(model, plan)
    made = small.sample(carried.model, steps=4, positive=positive)
    assert carried.report.letters == "FFFF"
    assert torch.equal(made, small.sample(model, steps=4, positive=positive))


def test_a_plan_for_other_steps_is_scaled_and_it_is_said(model, caplog):
    carried = Carried(model, every(4, 2))
    small.sample(carried.model, steps=STEPS)
    assert carried.report.letters == "FrrrFrrr" and "for 4 steps" in caplog.text


# What others do -----------------------------------------------------------------------------------------


def test_pag_is_forecast_from_its_own_results(model):
    # Its second pass has the list and the latent of the first and other patches.
    def pag(m):
        return nodes_pag.PerturbedAttentionGuidance.execute(m, 3.0)[0]

    plan, calls = plan_of("FFrFrFrF"), []
    carried = Carried(model, plan)
    made = small.sample(pag(carried.model), steps=STEPS)
    assert carried.report.letters == plan.letters() and carried.report.asked == 3 * STEPS

    # The same by a filter that knows nothing of forecasts but the calls' order.
    from itertools import count

    def filtered(executor, base, conds, x, timestep, options):
        k = next(numbers)
        s, n = divmod(k, 2)
        sigma = timestep[0]
        alpha = 1 / (1 + sigma**2) ** 0.5
        if plan.actions[s].kind == FULL:
            out = executor(base, conds, x, timestep, options)
            kept[n] = [*kept.get(n, [])[-1:], (s, [alpha * (x - o) / sigma - alpha * sigma * o for o in out])]
            return out
        (p, old), (q, new) = kept[n]
        return [alpha**2 * x - alpha * sigma * (b + (b - a) * (s - q) / (q - p)) for a, b in zip(old, new, strict=True)]

    numbers, kept = count(), {}
    m = model.clone()
    m.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "filter", filtered)
    assert small.difference(made, small.sample(pag(m), steps=STEPS)) < 2e-5
    assert small.difference(made, small.sample(carried.model, steps=STEPS)) > 1e-4
    assert not calls


def masked(m, **more):
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 4:12] = 1
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(8))
    return small.sample(m, steps=STEPS, latent=latent, noise_mask=mask, **more)


AROUND = {
    "APG": lambda m: small.sample(nodes_apg.APG.execute(m, 0.8, 5.0, -0.3)[0], steps=STEPS),
    "RescaleCFG": lambda m: small.sample(nodes_model_advanced.RescaleCFG().patch(m, 0.7)[0], steps=STEPS),
    "TCFG": lambda m: small.sample(nodes_tcfg.TCFG.execute(m)[0], steps=STEPS),
    "CFG-Zero star": lambda m: small.sample(nodes_cfg.CFGZeroStar.execute(m)[0], steps=STEPS),
    "SAG": lambda m: small.sample(sag(m), steps=STEPS),
    "PerpNeg": lambda m: small.sample(perpneg(m), steps=STEPS),
    "DualCFG": lambda m: guided(dual_cfg(m), m),
    "inpaint masks": masked,
    "dpmpp_2m with masks": lambda m: masked(m, sampler="dpmpp_2m"),
    "a window of steps": lambda m: small.sample(
        m, steps=STEPS + 4, start_step=2, last_step=STEPS + 2, force_full_denoise=True
    ),
}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", AROUND)
def test_beside_others_a_run_equals_one_with_a_filter(model, name):
    plan = plan_of("FFrFrrFr")
    carried = Carried(model, plan)
    made = AROUND[name](carried.model)
    assert carried.report.letters == plan.letters() and not carried.report.notes
    assert small.difference(made, AROUND[name](stock.filtered(model, plan))) < 5e-5
    assert small.difference(made, AROUND[name](model)) > 1e-5
    assert torch.equal(AROUND[name](Carried(model, every(STEPS, 1)).model), AROUND[name](model))


def test_a_run_that_is_interrupted_leaves_nothing(model, monkeypatch):
    made = []
    create = forecasts.Point.__init__
    monkeypatch.setattr(
        forecasts.Point, "__init__", lambda self, *args: (made.append(weakref.ref(self)), create(self, *args))[1]
    )
    carried = Carried(model, every(STEPS, 2))
    first = small.sample(carried.model, steps=STEPS)

    def cancel(i, x0, x, n):
        if i == 3:
            comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        small.sample(carried.model, steps=STEPS, callback=cancel)
    gc.collect()
    assert made and all(point() is None for point in made)
    assert torch.equal(small.sample(carried.model, steps=STEPS), first)


def test_in_a_switched_run_a_model_is_forecast_while_it_plays(model, folder):
    other = small.model(folder, seed=7)
    carried, short = Carried(model, plan_of("FFrFFFFF")), Carried(model, plan_of("FFrF"))
    made = small.sample(switch.with_switch(carried.model, other, switching.SwitchPoint(4, "step")), steps=STEPS)
    half = small.sample(short.model, steps=STEPS, last_step=4)
    wanted = small.run(other, torch.zeros_like(half), half, steps=STEPS, start_step=4, seed=0)
    assert carried.report.letters.startswith("FFr") and small.difference(made, wanted) < 2e-5
    assert (
        small.difference(
            made, small.sample(switch.with_switch(model, other, switching.SwitchPoint(4, "step")), steps=STEPS)
        )
        > 1e-5
    )


def test_a_compiled_model_gets_no_further_graph(folder, graphs):
    model = small.models.load_unet(small.write_unet(folder / "two-levels.safetensors", small.TWO_LEVELS))
    compiled, carried = small.compiled(model), Carried(model, every(4, 2))
    wanted = small.sample(carried.model, small.TWO_LEVELS, steps=4)
    small.sample(compiled, small.TWO_LEVELS, steps=4)
    count = len(graphs)
    assert count
    for m in (small.compiled(carried.model), small.with_technique(compiled, forecasts.Forecasts(every(4, 2)))):
        assert small.difference(small.sample(m, small.TWO_LEVELS, steps=4), wanted) < 1e-4
    assert len(graphs) == count


graphs = pytest.fixture(small.fresh_graphs)


def sag(m):
    return nodes_sag.SelfAttentionGuidance.execute(m, 0.5, 2.0)[0]


def slg(m):
    return nodes_slg.SkipLayerGuidanceDiTSimple.execute(m, 0.3, 0.8, "1", "1")[0]


def perpneg(m):
    return nodes_perpneg.PerpNeg.execute(m, small.cond(SD, 5), 1.0)[0]


@pytest.mark.sweep(1)
@pytest.mark.parametrize("apply, asked", [(sag, 3), (slg, 2), (perpneg, 3)], ids=["SAG", "SLG", "PerpNeg"])
def test_further_passes_are_kept_apart(model, apply, asked):
    full, plan = small.sample(apply(model), steps=STEPS), every(STEPS, 2, first=2)
    carried = Carried(model, plan)
    made = small.sample(apply(carried.model), steps=STEPS)
    assert carried.report.asked == asked * STEPS
    assert made.isfinite().all() and small.difference(made, full) > 1e-4
    assert torch.equal(small.sample(apply(carried.model), steps=STEPS), made)
    never = Carried(model, every(STEPS, 1))
    assert torch.equal(small.sample(apply(never.model), steps=STEPS), full)


def test_lists_that_are_none_stay_zeros(model):
    seen = []

    def look(args):
        seen.append([None if c is None else 1 for c in args["conds"]])
        x, options = args["input"], args["model_options"]
        cond, none = comfy.samplers.calc_cond_batch(args["model"], [args["conds"][0], None], x, args["sigma"], options)
        zero, uncond = comfy.samplers.calc_cond_batch(
            args["model"], [None, args["conds"][1]], x, args["sigma"], options
        )
        assert not none.any() and not zero.any()
        return [cond, uncond]

    carried = Carried(model, every(STEPS, 2))
    split = carried.model.clone()
    split.set_model_sampler_calc_cond_batch_function(look)
    made = small.sample(split, steps=STEPS)
    assert small.difference(made, small.sample(carried.model, steps=STEPS)) < 1e-4 and carried.report.letters[1] == "r"


def guided(guider, model, steps=STEPS):
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return guider.sample(
        noise,
        torch.zeros_like(noise),
        comfy.samplers.sampler_object("euler"),
        small.sigmas_of(model, steps),
        disable_pbar=True,
        seed=0,
    )


def dual_cfg(m):
    guider = nodes_custom_sampler.Guider_DualCFG(m)
    guider.set_conds(small.cond(SD, 1), small.cond(SD, 3), small.cond(SD, 2))
    guider.set_cfg(4.0, 2.0)
    return guider


def perpneg_guider(m):
    guider = nodes_perpneg.Guider_PerpNeg(m)
    guider.set_conds(small.cond(SD, 1), small.cond(SD, 2), small.cond(SD, 3))
    guider.set_cfg(4.0, 1.0)
    return guider


@pytest.mark.sweep(1)
@pytest.mark.parametrize("make", [dual_cfg, perpneg_guider])
def test_guiders_with_three_prompts_compute_the_positive_one_alone(model, make):
    plan = plan_of("FFcFcFcc")
    carried = Carried(model, plan)
    made = guided(make(carried.model), model)
    assert carried.report.letters == plan.letters() and carried.report.computed == 4 * 3 + 4
    full = guided(make(model), model)
    assert 1e-5 < small.difference(made, full) < 0.5
    assert torch.equal(guided(make(Carried(model, every(STEPS, 1)).model), model), full)


def test_two_models_of_a_guider_are_kept_apart(model, folder):
    other = small.model(folder, seed=7)

    def guider(m):
        made = nodes_custom_sampler.Guider_DualModel(m, other)
        made.set_conds(small.cond(SD, 1), small.cond(SD, 2))
        made.set_cfg(3.0)
        return made

    carried = Carried(model, every(STEPS, 2))
    made = guided(guider(carried.model), model)
    assert carried.report.asked == 2 * STEPS and carried.report.computed == STEPS
    assert small.difference(made, guided(guider(model), model)) > 1e-4 and made.isfinite().all()


def test_a_prompt_that_changes_is_computed(model):
    # The first prompt ends and the second begins in mid run; nothing of the one stands for the other.
    positive = small.cond(SD, 1, start_percent=0.0, end_percent=0.5) + small.cond(
        SD, 3, start_percent=0.5, end_percent=1.0
    )
    carried = Carried(model, plan_of("FFrrrrrr"))
    small.sample(carried.model, steps=STEPS, positive=positive)
    assert carried.report.letters == "FFrrFFrr"


def test_hook_keyframes_go_on_counting(model, monkeypatch):
    asked = comfy.hooks.HookKeyframeGroup.prepare_current_keyframe
    strengths = {}

    def watched(self, curr_t, transformer_options):
        changed = asked(self, curr_t, transformer_options)
        strengths[float(curr_t)] = self.strength
        return changed

    monkeypatch.setattr(comfy.hooks.HookKeyframeGroup, "prepare_current_keyframe", watched)

    def run(m):
        strengths.clear()
        group = comfy.hooks.create_hook_lora(lora=small.lora(SD, 3), strength_model=1.0, strength_clip=0.0)
        keyframes = comfy.hooks.HookKeyframeGroup()
        for strength, start, least in ((0.5, 0.0, 1), (1.0, 0.2, 3), (1.5, 0.25, 1)):
            keyframes.add(comfy.hooks.HookKeyframe(strength, start_percent=start, guarantee_steps=least))
        group.set_keyframes_on_hooks(keyframes)
        small.sample(
            m, steps=STEPS, positive=nodes_hooks.SetModelHooksOnCond().attach_hook(small.cond(SD, 1), group)[0]
        )
        return list(strengths.values())

    carried = Carried(model, every(STEPS, 2))
    assert run(carried.model) == run(model) == [0.5, 0.5, 1.0, 1.0, 1.0, 1.5, 1.5, 1.5]
    # Nothing made under one strength stands for the result under another.
    assert carried.report.letters == "FrFFFFFr"


def frames(seed=0):
    return torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_context_windows_are_kept_apart(model):
    def windowed(m):
        return nodes_context_windows.ContextWindowsManualNode.execute(
            m, 4, 0, "standard_static", 1, False, "flat", 0, False
        )[0]

    noise, plan = frames(), every(STEPS, 2)
    carried = Carried(model, plan)
    # Frames are independent here: windows change nothing.
    alone = small.run(carried.model, noise, torch.zeros_like(noise), steps=STEPS)
    made = small.run(windowed(carried.model), noise, torch.zeros_like(noise), steps=STEPS)
    assert carried.report.letters == plan.letters() and carried.report.asked == 4 * STEPS
    assert small.difference(made, alone) < 1e-4


@pytest.mark.sweep(1)
@pytest.mark.parametrize("moving", [False, True])
def test_parts_that_move_are_computed_and_it_is_said_once(model, moving, caplog):
    def windowed(m):
        def calc(args):
            x, sigma, options = args["input"], args["sigma"], dict(args["model_options"])
            options.pop("sampler_calc_cond_batch_function")
            calc.step += float(sigma[0]) != calc.sigma
            calc.sigma = float(sigma[0])
            outs = [torch.zeros_like(x) for _ in args["conds"]]
            for start in (0, 4):
                at = [(i + start + moving * calc.step) % 8 for i in range(4)]
                parts = comfy.samplers.calc_cond_batch(args["model"], args["conds"], x[at], sigma[at], options)
                for out, part in zip(outs, parts, strict=True):
                    out[at] = part
            return outs

        calc.step, calc.sigma = -1, None
        clone = m.clone()
        clone.set_model_sampler_calc_cond_batch_function(calc)
        return clone

    noise = frames()
    carried = Carried(model, every(STEPS, 2))
    made = small.run(windowed(carried.model), noise, torch.zeros_like(noise), steps=STEPS)
    if moving:
        assert small.difference(made, small.run(model, noise, torch.zeros_like(noise), steps=STEPS)) < 1e-4
        assert carried.report.saving == 0 and caplog.text.count("parts that move") == 1
    else:
        alone = small.run(carried.model, noise, torch.zeros_like(noise), steps=STEPS)
        assert small.difference(made, alone) < 1e-4 and "move" not in caplog.text


def test_control_acts_on_every_result(model):
    net = small.control_net()
    hint = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(3))

    def controlled(strength):
        c = net.copy().set_cond_hint(hint, strength, (0.0, 0.5))
        return small.cond(SD, 1, control=c, control_apply_to_uncond=True)

    plan = plan_of("FFrrrrrr")
    carried = Carried(model, plan)
    made = small.sample(carried.model, steps=STEPS, positive=controlled(1.0))
    # Where control ends, what was made under it is not drawn on.
    letters = carried.report.letters
    assert letters[:3] == "FFr" and letters[2:].count("F") > 0
    assert small.difference(made, small.sample(carried.model, steps=STEPS, positive=controlled(0.0))) > 1e-4


class Keyframed(comfy.controlnet.ControlNet):
    """A ControlNet of Advanced-ControlNet's kind: a keyframe for each noise level, which it counts as it is asked."""

    _current_timestep_keyframe = None

    def prepare_current_timestep(self, t, transformer_options):
        assert len(transformer_options["sample_sigmas"]) == STEPS + 1
        if not self.seen or self.seen[-1] != float(t[0]):
            self.seen.append(float(t[0]))
            strength = 1.0 if len(self.seen) < 6 else 0.0
            self._current_timestep_keyframe = types.SimpleNamespace(strength=strength)

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        self.prepare_current_timestep(t, transformer_options)
        return super().get_control(x_noisy, t, cond, batched_number, transformer_options)


def test_keyframes_of_a_control_go_on_where_a_step_is_forecast(model):
    net = small.control_net()
    net.__class__, net.seen = Keyframed, []
    hint = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(3))
    carried = Carried(model, plan_of("FrFrFrrr"))
    positive = small.cond(SD, 1, control=net.set_cond_hint(hint, 1.0, (0.0, 1.0)), control_apply_to_uncond=True)
    small.sample(carried.model, steps=STEPS, positive=positive)
    assert net.seen == small.sigmas_of(model, STEPS).tolist()[:-1]
    assert carried.report.letters == "FrFrFFFr", "from the sixth keyframe on it does not act"


# The response of the host's samplers, recordings, and Speed Up ------------------------------------------


RESPONDING = ["euler", "heun", "dpmpp_2m", "uni_pc", "dpm_2", "lms", "ddim", "ipndm", "deis"]
RESPONDING += ["euler_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "lcm"]  # while their noise stays


@pytest.mark.parametrize("sampler", RESPONDING)
def test_a_run_of_the_host_answers_as_its_response_says(model, sampler):
    # A network whose results are given: what moving one of them does to the latents of all later evaluations.
    sigmas = small.sigmas_of(model, 6)
    chosen = comfy.samplers.sampler_object(sampler)
    found = forecasts.response_of(chosen, sigmas, model)
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(len(found), 1, 4, 8, 8, generator=generator)
    moves = torch.randn(len(found), 1, 4, 8, 8, generator=generator)

    def run(results):
        left, latents = iter(results), []

        def instead(executor, x, timestep, *args, **kwargs):
            latents.append(x.clone())
            return next(left).clone()

        m = model.clone()
        m.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "given", instead)
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        out = comfy.sample.sample_custom(
            m,
            noise,
            1.0,
            chosen,
            sigmas,
            small.cond(SD, 1),
            small.cond(SD, 2),
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=0,
        )
        return torch.stack([*latents, model.model.process_latent_in(out)])

    actual = run(given + moves) - run(given)
    matrix = torch.from_numpy(found.matrix).float()
    wanted = torch.einsum("sm,s...->m...", matrix, moves)
    assert small.difference(actual, wanted) < 1e-3


def test_a_recorded_run_is_the_plain_run_and_tells_its_v(model):
    recorded = forecasts.Recorded()
    recorder = recorded.results
    latents = []
    m = small.with_technique(model, recorded)
    made = small.sample(m, steps=4, callback=lambda i, x0, x, n: latents.append((x.clone(), x0.clone())))
    assert torch.equal(made, small.sample(model, steps=4))
    sigmas = small.sigmas_of(model, 4)[:-1]
    for s, (x, guided) in enumerate(latents):
        v = recorder.cond[s] + (3.0 - 1) * recorder.difference[s]
        assert small.difference(forecast.denoised_of(x, v, sigmas[s]), guided) < 1e-4
    statistics = recorder.statistics(3.0, 1.0)
    assert statistics.gram[0, 0] == pytest.approx(float(recorder.cond[0].square().mean()), rel=1e-4)


@pytest.mark.parametrize(
    "sampler, kind",
    [
        ("euler", "none"),
        ("dpmpp_2m", "none"),
        ("uni_pc", "none"),
        ("heun", "none beside"),
        ("heunpp2", "none beside"),
        ("dpm_2", "none beside"),
        ("euler_ancestral", "some"),
        ("dpmpp_2m_sde", "some"),
        ("dpmpp_sde", "some beside"),
        ("dpmpp_2s_ancestral", "some beside"),
        ("lcm", "all"),
    ],
)
def test_the_table_knows_samplers_by_their_noise_and_by_what_they_try(model, sampler, kind):
    chosen = comfy.samplers.sampler_object(sampler)
    sigmas = small.sigmas_of(model, 12, "karras")
    positions = speed_up.positions_of(forecasts.response_of(chosen, sigmas, model), sigmas)
    assert speed_up.kind_of(chosen, positions) == kind
    found = speed_up.statistics_for(chosen, 6.0, positions)
    assert found.guidance == 7.0 and found.beside.any() == kind.endswith("beside")


@pytest.mark.sweep(0)
@pytest.mark.parametrize("sampler, scheduler", [("euler", "normal"), ("dpmpp_2m", "karras"), ("heun", "normal")])
def test_speed_up_leaves_out_more_the_less_alike_it_may_be(model, sampler, scheduler):
    found = {}
    for likeness in speed_up.LIKENESS:
        kept = speed_up.SpeedUp(likeness)
        m = small.with_technique(model, kept)
        made = small.sample(m, steps=20, sampler=sampler, scheduler=scheduler, cfg=7.0)
        planned = kept.device_bytes(m, (1, 4, 16, 16), {"positive": [], "negative": []})
        assert made.isfinite().all() and kept.log.last.peak <= planned
        assert torch.equal(small.sample(m, steps=20, sampler=sampler, scheduler=scheduler, cfg=7.0), made)
        found[likeness] = kept.log.last.saving
    assert 0 < found["same to the eye"] < found["close"] < found["same motif"] < 1


def test_speed_up_of_an_image_to_image_run_is_for_its_noise_levels(model):
    kept = speed_up.SpeedUp("same motif")
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    small.sample(small.with_technique(model, kept), steps=20, latent=latent, denoise=0.5)
    assert len(kept.log.last.letters) == 20 and kept.log.last.saving > 0 and not kept.log.last.notes
