"""What forecasts and inherited features are drawn from: one cast, the same patches, the same part of the picture."""

from dataclasses import replace

import comfy.hooks
import comfy.samplers
import pytest
import small
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_hooks
from in_host import module

SD = small.SD
inheritance = module("asdm_core.inheritance")
forecast, forecasts = module("asdm_core.forecast"), module("nodes.engine.forecasts")
Schedule = inheritance.Schedule
STEPS, CHANGE = 8, 4


# Forecasts across a change ------------------------------------------------------------------------------


def percent_of(model, step=CHANGE):
    """A share of the run that begins at a step, not before."""
    sigmas, to_sigma = small.sigmas_of(model, STEPS), model.get_model_object("model_sampling").percent_to_sigma
    return next(p / 1000 for p in range(1000) if sigmas[step] <= to_sigma(p / 1000) < sigmas[step - 1])


class Begins:
    """A patch that begins by itself at a noise level, as those of IP-Adapters do."""

    def __init__(self, level):
        self.settings = [{"sigma_start": level, "weight": 0.9}]

    def __call__(self, n, options):
        begun = float(options["sigmas"][0]) <= self.settings[0]["sigma_start"]
        return n * (1 + begun * self.settings[0]["weight"])


def begins(model):
    patch = Begins(model.get_model_object("model_sampling").percent_to_sigma(percent_of(model)))
    clone = model.clone()
    clone.set_model_attn2_output_patch(patch)
    return clone


def hooked(*keyframes, seed=1):
    hooks = comfy.hooks.create_hook_lora(lora=small.lora(SD, seed=5), strength_model=1.0, strength_clip=0.0)
    group = None
    for strength, start in keyframes:
        (group,) = nodes_hooks.CreateHookKeyframe().create_hook_keyframe(strength, start, prev_hook_kf=group)
    (hooks,) = nodes_hooks.SetHookKeyframes().set_hook_keyframes(hooks, group)
    return nodes_hooks.SetModelHooksOnCond().attach_hook(small.cond(seed=seed), hooks)[0]


def control_ends(model):
    hint = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(3))
    net = small.control_net().set_cond_hint(hint, 1.0, (0.0, percent_of(model)))
    return small.cond(SD, 1, control=net, control_apply_to_uncond=True)


@pytest.fixture
def changes(m2):
    """name -> (what changes a MODEL at the step, its two prompts, these as they are from then on)."""
    plain = small.cond(seed=1), small.cond(seed=2)

    def lora(m):
        frames = (0.2, 0.0), (1.5, percent_of(m))
        return m, [hooked(*frames, seed=s) for s in (1, 2)], [hooked((1.5, 0.0), seed=s) for s in (1, 2)]

    def control(m):
        return control_ends(m), small.cond(seed=2)

    return {
        "a pack begins": lambda m: (small.with_pack(m, m2, start=percent_of(m)), plain, plain),
        "a pack ends": lambda m: (small.with_pack(m, m2, end=percent_of(m)), plain, plain),
        "control ends": lambda m: (m, control(m), control(m)),
        "a LoRA changes": lora,
        "a patch begins": lambda m: (begins(m), plain, plain),
    }


CHANGES = ["a pack begins", "a pack ends", "control ends", "a LoRA changes", "a patch begins"]


def guided(model, prompts, sigmas, latent, noise):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*prompts)
    guider.set_cfg(3.0)
    seen = []
    sampler = comfy.samplers.sampler_object("euler")
    out = guider.sample(
        noise, latent, sampler, sigmas, callback=lambda i, x0, x, n: seen.append(x.clone()), disable_pbar=True, seed=0
    )
    return out, seen


@pytest.mark.sweep(1)
@pytest.mark.parametrize("name", CHANGES)
def test_forecast_features_come_from_the_same_circumstances(model, changes, name):
    plan = replace(inheritance.dial(SD, "balanced"), schedule=Schedule("explicit", steps=(0, 2, CHANGE)))
    changed, prompts, then = changes[name](model)
    sigmas = small.sigmas_of(model, STEPS)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    kept = small.with_plan(changed, plan)
    made, latents = guided(kept, prompts, sigmas, torch.zeros_like(noise), noise)
    # The same from the change on, by a run that knows of nothing before.
    alone = small.with_plan(changed, replace(plan, schedule=Schedule("explicit", steps=(0,))))
    latent = model.model.latent_format.process_out(latents[CHANGE])
    wanted, _ = guided(alone, then, sigmas[CHANGE:], latent, torch.zeros_like(noise))
    assert small.difference(made, wanted) < 1e-4
    assert small.last_run(kept).roles()[CHANGE:] == ("computed", *["inherited"] * (STEPS - CHANGE - 1))
    # And it matters: a line through the features of before leads elsewhere.
    full, _ = guided(changed, changes[name](model)[1], sigmas, torch.zeros_like(noise), noise)
    assert small.difference(made, full) > 1e-4


@pytest.mark.sweep(1)
@pytest.mark.parametrize("letters", ["FFrFFrrr", "FFcFFccc"])
@pytest.mark.parametrize("name", CHANGES)
def test_forecast_results_come_from_the_same_circumstances(model, changes, name, letters):
    kinds = {"F": forecast.FULL, "r": forecast.RESULT, "c": forecast.COND}
    carried = forecasts.Forecasts(forecast.ForecastPlan(tuple(forecast.Action(kinds[letter]) for letter in letters)))
    changed, (positive, negative), _ = changes[name](model)
    small.sample(small.with_technique(changed, carried), steps=STEPS, positive=positive, negative=negative)
    # Two points make a line; until there are two of the same circumstances again, everything is computed.
    assert carried.log.last.letters == letters[:5] + "F" + letters[6:]
    unchanged = forecasts.Forecasts(carried.plan)
    small.sample(small.with_technique(model, unchanged), steps=STEPS)
    assert unchanged.log.last.letters == letters


class Learns:
    """A patch that learns at its first call of a run where it begins, and keeps the noise level of now."""

    def __init__(self, level):
        self.level, self.sigma_start, self.curr_sigma, self.last_sigma = level, None, None, None

    def __call__(self, n, options):
        self.last_sigma, self.curr_sigma = self.curr_sigma, float(options["sigmas"][0])
        self.sigma_start = self.level
        return n * (1 + 0.9 * (self.curr_sigma <= self.sigma_start))


@pytest.mark.sweep(2)
@pytest.mark.parametrize("before", ["nothing", "the same", "the upper part", "another window"])
@pytest.mark.parametrize("kind", ["features", "results"])
def test_what_a_run_leaves_on_a_patch_changes_no_other_run(model, kind, before):
    def learning():
        patch = Learns(model.get_model_object("model_sampling").percent_to_sigma(percent_of(model)))
        clone = model.clone()
        clone.set_model_attn2_output_patch(patch)
        return patch, clone

    patch, changed = learning()
    letters = "FFrFFrrr"
    kinds = {"F": forecast.FULL, "r": forecast.RESULT}
    carried = forecasts.Forecasts(forecast.ForecastPlan(tuple(forecast.Action(kinds[letter]) for letter in letters)))
    plan = inheritance.deepcache(SD, 1, Schedule(interval=2))
    m = small.with_plan(changed, plan) if kind == "features" else small.with_technique(changed, carried)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def run(model, steps=STEPS):
        return guided(
            model,
            (small.cond(seed=1), small.cond(seed=2)),
            small.sigmas_of(model, STEPS)[: steps + 1],
            0 * noise,
            noise,
        )[0]

    if before == "another window":
        patch.level, level = 2 * patch.level, patch.level
        run(m)
        patch.level = level
    elif before != "nothing":
        run(m, STEPS if before == "the same" else 3)
    first = run(m)
    assert torch.equal(run(m), first)
    if kind == "features":  # the fifth computes anyway
        assert small.last_run(m).roles() == ("computed", "inherited") * (STEPS // 2)
        assert torch.equal(run(small.with_plan(learning()[1], plan)), first)
    else:  # where there is a line again
        assert carried.log.last.letters == letters[:5] + "F" + letters[6:]
        assert torch.equal(run(small.with_technique(learning()[1], forecasts.Forecasts(carried.plan))), first)


def test_a_patch_that_acts_at_its_last_level_ends_behind_it(model):
    """As all do that compare with <= and >=; its level is that of a step."""
    sigmas = small.sigmas_of(model, STEPS)

    class Ends:
        sigma_end: float

        def __call__(self, n, options):
            return n * (1 + 0.9 * (float(options["sigmas"][0]) >= self.sigma_end))

    patch, changed = Ends(), model.clone()
    patch.sigma_end = float(sigmas[CHANGE])
    changed.set_model_attn2_output_patch(patch)
    kinds = {"F": forecast.FULL, "r": forecast.RESULT}
    plan = forecast.ForecastPlan(tuple(forecast.Action(kinds[letter]) for letter in "FFFFFrrr"))
    carried = forecasts.Forecasts(plan)
    small.sample(small.with_technique(changed, carried), steps=STEPS)
    assert carried.log.last.letters == "FFFFFFFr"


def test_where_every_step_has_other_prompts_it_is_said_that_nothing_was_forecast(model, caplog):
    """As nodes do that give the prompt anew for each noise level."""
    sigmas = small.sigmas_of(model, STEPS).tolist()
    percents = [1 - model.get_model_object("model_sampling").timestep(torch.tensor(s)) / 999 for s in sigmas[:-1]]

    def prompts(seed):
        ends = [*((float(a) + float(b)) / 2 for a, b in zip(percents, percents[1:], strict=False)), 1.0]
        starts = [0.0, *ends[:-1]]
        return [
            [*small.cond(seed=seed + 10 * i)[0][:1], {"start_percent": a, "end_percent": b}]
            for i, (a, b) in enumerate(zip(starts, ends, strict=True))
        ]

    carried = forecasts.Forecasts(forecast.every(STEPS, 2))
    small.sample(small.with_technique(model, carried), steps=STEPS, positive=prompts(1), negative=prompts(2))
    assert carried.log.last.letters == "F" * STEPS
    assert caplog.text.count("so every step was computed") == 1 and carried.log.last.notes


def test_at_cfg_1_there_is_nothing_to_say(model, caplog):
    """Of steps that leave out the other prompts nothing is left out there."""
    kinds = {"F": forecast.FULL, "c": forecast.COND, "u": forecast.UNGUIDED}
    carried = forecasts.Forecasts(forecast.ForecastPlan(tuple(forecast.Action(kinds[x]) for x in "FFFFcFuu")))
    small.sample(small.with_technique(model, carried), steps=STEPS, cfg=1.0)
    assert "so every step was computed" not in caplog.text


# What a call shows ----------------------------------------------------------------------------------------


class Moving:
    """Samples each evaluation in another arrangement of the latent and puts the result back: for the network, which is
    shown one picture of a batch at a time, that changes nothing. arrange: (latent, step) -> latent; back: its inverse.
    """

    def __init__(self, arrange, back, begins=0):
        self.arrange, self.back, self.begins = arrange, back, begins
        self.step, self.sigma = -1, None

    def count(self, sigma):
        sigma = float(sigma.flatten()[0])
        self.step += sigma != self.sigma
        self.sigma = sigma
        return max(0, self.step - self.begins)


def above(model, moving):
    """Round the evaluation, as nodes that wrap the whole guidance do."""

    def wrapper(executor, x, timestep, options, seed):
        n = moving.count(timestep)
        return moving.back(executor(moving.arrange(x, n), timestep, options, seed), n)

    clone = model.clone()
    kind = WrappersMP.PREDICT_NOISE
    clone.wrappers[kind] = {"moving": [wrapper], **clone.wrappers.get(kind, {})}
    return clone


def beneath(model, moving):
    """Round each call of the network, as Tiled Diffusion does."""

    def wrapper(apply_model, given):
        n = moving.count(given["timestep"])
        return moving.back(apply_model(moving.arrange(given["input"], n), given["timestep"], **given["c"]), n)

    clone = model.clone()
    clone.set_model_unet_function_wrapper(wrapper)
    return clone


def rolled(*dims):
    return lambda begins=0: Moving(
        lambda x, n: x.roll([n] * len(dims), dims), lambda x, n: x.roll([-n] * len(dims), dims), begins
    )


def shuffled(begins=0):
    def order(x, n):
        return torch.randperm(len(x), generator=torch.Generator().manual_seed(n))

    return Moving(lambda x, n: x[order(x, n)], lambda x, n: x[order(x, n).argsort()], begins)


PLAN = inheritance.deepcache(SD, 1, Schedule(interval=2))
KINDS = {"a row": rolled(2), "a column": rolled(3), "both": rolled(2, 3), "frames": rolled(0), "shuffled": shuffled}


def picture(model, batch=1, **more):
    noise = torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)  # of samplers with noise of their own
    return small.run(model, noise, torch.zeros_like(noise), steps=9, seed=7, **more)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("place", [above, beneath])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_inherited_from_another_part(model, kind, place, caplog):
    batch = 4 if kind in ("frames", "shuffled") else 1
    wanted = picture(place(model, KINDS[kind]()), batch)
    kept = small.with_plan(model, PLAN)
    assert torch.equal(picture(place(kept, KINDS[kind]()), batch), wanted)
    assert caplog.text.count("showed another part of the picture") == 1
    assert "steps that the plan lets inherit" not in caplog.text


@pytest.mark.sweep(2)
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral", "dpmpp_2m_sde"])
@pytest.mark.parametrize("place", [above, beneath])
def test_a_shift_by_one_pixel_late_in_a_run_is_found(model, place, sampler, caplog):
    # From step 6 on of nine; the plan inherits at 1, 3, 5, 7.
    kept = small.with_plan(model, PLAN)
    picture(place(kept, KINDS["a column"](begins=5)), sampler=sampler)
    roles = small.last_run(kept).roles()
    assert roles == ("computed", "inherited") * 3 + ("computed",) * 3
    assert caplog.text.count("showed another part of the picture") == 1


@pytest.mark.sweep(3)
@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize(
    "sampler",
    ["euler", "euler_ancestral", "heun", "dpm_2", "dpmpp_2m", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "uni_pc"]
    + ["lcm", "ddpm", "lms", "ipndm", "res_multistep_ancestral", "er_sde", "sa_solver", "euler_cfg_pp", "seeds_2"],
)
def test_plain_runs_raise_no_alarm(model, sampler, steps, caplog):
    scheduler = "karras" if steps == 4 else "normal"
    kept = small.with_plan(model, PLAN)
    small.sample(kept, steps=steps, sampler=sampler, scheduler=scheduler)
    assert "another part" not in caplog.text and "lets inherit" not in caplog.text
    carried = forecasts.Forecasts(forecast.every(steps, 2))
    small.sample(small.with_technique(model, carried), steps=steps, sampler=sampler, scheduler=scheduler)
    assert "parts that move" not in caplog.text and carried.log.last.saving > 0


def windowed(model, moving):
    """Frames in windows, by a node that does not use the host's own, as AnimateDiff-Evolved's Uniform ones."""

    def calc(args):
        x, sigma, options = args["input"], args["sigma"], dict(args["model_options"])
        options.pop("sampler_calc_cond_batch_function")
        shift = counter.count(sigma) if moving else 0
        outs = [torch.zeros_like(x) for _ in args["conds"]]
        for start in (0, 4):
            at = [(i + start + shift) % len(x) for i in range(4)]
            parts = comfy.samplers.calc_cond_batch(args["model"], args["conds"], x[at], sigma[at], options)
            for out, part in zip(outs, parts, strict=True):
                out[at] = part
        return outs

    counter = Moving(None, None)
    clone = model.clone()
    clone.set_model_sampler_calc_cond_batch_function(calc)
    return clone


@pytest.mark.parametrize("moving", [False, True])
def test_windows_that_move(model, moving, caplog):
    # Frames are independent here: windows change nothing.
    kept = small.with_plan(model, inheritance.deepcache(SD, 1, Schedule(interval=2)).reusing("forecast"))
    wanted = picture(model if moving else kept, 8)
    assert small.difference(picture(windowed(kept, moving), 8), wanted) < 1e-4
    assert caplog.text.count("showed another part of the picture") == moving


def tiles(model, moving, altered=False):
    """The latent in tiles of 12 x 12 that overlap, each by itself; moving: in another order at each step."""
    counter = Moving(None, None)

    def wrapper(apply_model, given):
        x, t, n = given["input"], given["timestep"], counter.count(given["timestep"])
        out, count = torch.zeros_like(x), torch.zeros_like(x)
        for i in range(4):
            top, left = (4 * k for k in divmod((i + n * moving) % 4, 2))
            at = (..., slice(top, top + 12), slice(left, left + 12))
            part = x[at] + 0.01 * x[at].mean() if altered else x[at]
            out[at] += apply_model(part, t, **given["c"])
            count[at] += 1
        return out / count

    clone = model.clone()
    clone.set_model_unet_function_wrapper(wrapper)
    return clone


@pytest.mark.sweep(1)
@pytest.mark.parametrize("altered", [False, True])
def test_tiles(model, altered, caplog):
    kept = small.with_plan(model, PLAN)
    picture(tiles(kept, moving=False, altered=altered))
    assert small.last_run(kept).roles() == ("computed", "inherited") * 4 + ("computed",)
    assert "another part" not in caplog.text
    assert torch.equal(
        picture(tiles(kept, moving=True, altered=altered)), picture(tiles(model, moving=True, altered=altered))
    )
    assert caplog.text.count("showed another part of the picture") == 1


@pytest.mark.sweep(1)
@pytest.mark.parametrize("place", [above, beneath])
def test_results_are_not_forecast_from_another_part(model, place, caplog):
    carried = forecasts.Forecasts(forecast.every(9, 2))
    moved = place(small.with_technique(model, carried), KINDS["a column"]())
    out = picture(moved)
    if place is above:
        assert torch.equal(out, picture(place(model, KINDS["a column"]())))
        assert carried.log.last.saving == 0 and caplog.text.count("parts that move") == 1
    else:  # what a call rolls and rolls back is the same result
        assert carried.log.last.saving > 0 and "parts that move" not in caplog.text
