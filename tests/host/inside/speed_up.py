"""Speed Up and Calibrate: profiles, what is chosen where, and whole steps left out as the run itself decides."""

import gc
import json
import logging
import weakref
from dataclasses import replace
from pathlib import Path

import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import folder_paths
import pytest
import small
import torch
from comfy.patcher_extension import PatcherInjection
from comfy_extras import nodes_custom_sampler, nodes_model_advanced
from in_host import execute, module

SD = small.SD
forecast, forecast_fit, forecasts, speed_up = (
    module(name)
    for name in ("asdm_core.forecast", "asdm_core.forecast_fit", "nodes.engine.forecasts", "nodes.speed_up")
)
adaptive, calibrate, files, prints = (
    module(f"nodes.{name}") for name in ("engine.adaptive", "calibrate", "engine.files", "engine.fingerprint")
)
profiles, regional, technique = (
    module(name) for name in ("asdm_core.profile", "nodes.engine.regional", "nodes.engine.technique")
)
xy_plot, switch_unet = module("nodes.xy_plot"), module("nodes.switch_unet")
STEPS = 10


@pytest.fixture(autouse=True)
def heard(caplog):
    """Reports are heard too, not warnings alone."""
    caplog.set_level(logging.INFO)


@pytest.fixture(scope="module")
def model(folder):
    return small.model(folder)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder of profiles, empty."""
    files.register_folders()
    paths, extensions = folder_paths.folder_names_and_paths[files.PROFILE_FOLDER]
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, files.PROFILE_FOLDER, ([str(tmp_path / "profiles")], extensions)
    )
    folder_paths.filename_list_cache.pop(files.PROFILE_FOLDER, None)
    return tmp_path / "profiles"


def listed():
    folder_paths.filename_list_cache.pop(files.PROFILE_FOLDER, None)
    return files.profiles()


def calibrated(model, name="mine", **more):
    settings = {"steps": STEPS, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    settings |= {"pictures": 4, "likeness": "same motif", "try_fewer_steps": False, "seed": 0}
    latent = {"samples": torch.zeros(2, 4, 16, 16)}
    found = execute(
        "ASDMCalibrate",
        model=model,
        positive=small.cond(SD, 1),
        negative=small.cond(SD, 2),
        latent_image=latent,
        name=name,
        **settings | more,
    )
    listed()
    return found


def run(model, likeness="same motif", profile="automatic", **more):
    """(the report of a run with Speed Up, its latents)."""
    m = execute("ASDMSpeedUp", model=model, likeness=likeness, profile=profile)[0]
    made = small.sample(m, **{"steps": STEPS} | more)
    return technique.technique_of(m, speed_up.SpeedUp).log.last, made


# What a MODEL is ----------------------------------------------------------------------------------------


def sampled_by_hand(model, sigmas, noise):
    """The latents of euler at these noise levels."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(small.cond(SD, 1), small.cond(SD, 2))
    guider.set_cfg(3.0)
    return guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, seed=1)


def of(model):
    return prints.fingerprint(model, lambda technique: False)


def test_a_fingerprint_is_of_the_weights_and_of_what_stands_on_them(folder, model):
    wanted = of(model)
    assert of(small.model(folder)) == wanted  # read again, as after a restart
    others = {
        "weights": small.model(folder, seed=3),
        "LoRA": small.add_lora(model, small.lora()),
        "LoRA, weaker": small.add_lora(model, small.lora(), 0.5),
        "another LoRA": small.add_lora(model, small.lora(seed=1)),
        "v": nodes_model_advanced.ModelSamplingDiscrete().patch(model, "v_prediction", False)[0],
        "eps, said so": nodes_model_advanced.ModelSamplingDiscrete().patch(model, "eps", False)[0],
        "GRI": small.with_technique(model, regional.Regional()),
        "larger GRI": small.with_technique(model, regional.Regional(window=32)),
    }
    found = {name: of(m) for name, m in others.items()}
    assert len({wanted, *found.values()}) == len(found) + 1


def test_loras_in_bypass_count_as_in_the_weights(model):
    """They paint the same; and what others inject between the layers counts as well."""
    load = small.comfy.sd.load_bypass_lora_for_models
    bypassed = {strength: load(model, None, small.lora(), strength, 0)[0] for strength in (1.0, 0.5)}
    for strength, m in bypassed.items():
        assert of(m) == of(small.add_lora(model, small.lora(), strength))
    asked, watched = set(), bypassed[1.0].clone()
    watched.set_model_sampler_post_cfg_function(lambda args: asked.add(of(watched)) or args["denoised"])
    painted = small.sample(watched, steps=2)
    assert asked == {of(watched)} and torch.equal(painted, small.sample(bypassed[1.0], steps=2))
    moved = model.clone()
    moved.set_injections("motion", [PatcherInjection(inject=lambda _: None, eject=lambda _: None)])
    assert of(moved) != of(model)


def test_a_fingerprint_does_not_change_while_loras_are_written_into_the_weights(model):
    patched = small.add_lora(model, small.lora())
    wanted, plain = of(patched), of(model)
    small.sample(patched, steps=1)
    assert of(patched) == wanted and of(model) == plain
    small.sample(model, steps=1)
    assert of(patched) == wanted and of(model) == plain


# Profiles -----------------------------------------------------------------------------------------------


def test_a_profile_is_written_and_speed_up_takes_it_by_itself(model, kept, caplog):
    chosen, text, picture, full = calibrated(model)
    assert listed() == ["mine.json"] and (kept / "mine.json").read_text("utf-8") == text
    profile = profiles.read_profile(kept / "mine.json")
    assert profile.pictures == 4 and profile.made_for.steps == STEPS and picture.shape[-1] == 3
    assert full["samples"].shape == (4, 4, 16, 16)
    plan = profile.plan(speed_up.LIKENESS["same motif"]).plan
    report, made = run(model)
    assert report.letters == plan.letters() and not report.notes and "profile mine.json" in caplog.text
    small.sample(chosen, steps=STEPS)
    assert technique.technique_of(chosen, speed_up.SpeedUp).log.last.letters == plan.letters()
    # It carries the plan out, weights and all.
    carried = small.with_technique(model, forecasts.Forecasts(plan))
    assert torch.equal(small.sample(carried, steps=STEPS), made)


def test_the_host_notices_profiles_that_come_change_and_go(model, kept):
    told = speed_up.ASDMSpeedUp.fingerprint_inputs

    def now():
        listed()
        return told(profile="automatic"), told(profile="mine.json"), told(profile="none"), told()

    found = [now()]
    kept.mkdir()
    for text in ("{}", "{ }"):
        (kept / "mine.json").write_text(text)
        found.append(now())
        assert now() == found[-1]
    (kept / "other.json").write_text("{}")
    found.append(now())
    automatic, chosen, none, left_out = zip(*found, strict=True)
    assert automatic == left_out and all(a != b for a, b in zip(automatic, automatic[1:], strict=False))
    assert chosen[0] != chosen[1] != chosen[2] == chosen[3] and none == ([],) * 4
    assert told(profile=None) == [[None]]  # comes by a link, and is not known yet
    plot = xy_plot.ASDMXYPlot.fingerprint_inputs
    assert plot(x={"x": "speed up"}) == automatic[-1] and plot(x={"x": "inheritance"}) == []
    (kept / "mine.json").unlink()
    assert now()[1] == chosen[0]


def test_where_the_played_part_of_a_run_leaves_nothing_out_the_reason_is_said(model, folder, caplog):
    """The first model plays the steps that every plan computes."""
    fast = speed_up.with_speed_up(model, technique_of := speed_up.SpeedUp("same to the eye"))
    switched = switch_unet.ASDMSwitchUNet.execute(fast, small.model(folder, seed=2), 0.2, "share of steps", 0).args[0]
    small.sample(switched, steps=STEPS)
    report = technique_of.log.last
    assert report.saving == 0 and len(report.notes) == 1
    assert "the steps that its plan leaves out are not played by this model" in caplog.text


def test_a_profile_may_hold_steps_of_features(model, kept):
    calibrated(model)
    path = kept / "mine.json"
    kinds = ["full", "full", "features", "result", "full", "features", "full", "features", "result", "full"]
    actions = tuple(forecast.Action(kind, branch=1 if kind == "features" else 0) for kind in kinds)
    plan = forecast.ForecastPlan(actions)
    before = speed_up.SpeedUp("same motif").device_bytes(model, (1, 4, 16, 16), {"positive": [1], "negative": [1]})
    offer = forecast_fit.Offer(plan.saving(shared={1: 0.5}), 0.01, STEPS, plan)
    path.write_text(replace(profiles.read_profile(path), offers=(offer,)).to_json())
    listed()
    report, made = run(model)
    assert report.letters == plan.letters() == "FFfrFfFfrF" and not report.notes
    wanted = small.sample(small.with_technique(model, forecasts.Forecasts(plan)), steps=STEPS)
    assert torch.equal(made, wanted) and not torch.equal(made, small.sample(model, steps=STEPS))
    after = speed_up.SpeedUp("same motif").device_bytes(model, (1, 4, 16, 16), {"positive": [1], "negative": [1]})
    assert after > before


def test_what_is_learned_is_the_mean_over_the_pictures(model, kept):
    profile = profiles.Profile.from_json(calibrated(model)[1])
    sampler, sigmas = comfy.samplers.sampler_object("euler"), small.sigmas_of(model, STEPS)
    response = forecasts.response_of(sampler, sigmas, model)
    noise = torch.cat([torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)])
    recorded = forecasts.Recorded()
    made = small.run(small.with_technique(model, recorded), noise, torch.zeros_like(noise), steps=STEPS)
    size = float(model.model.process_latent_in(made).square().mean() ** 0.5)
    wanted = calibrate.plans(recorded.results.recording(response, 3.0, size), STEPS)
    got = [offer for offer in profile.offers if offer.plan is not None]
    assert [o.plan.letters() for o in got] == [o.plan.letters() for o in wanted]
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.error == pytest.approx(theirs.error, rel=1e-2)


def test_fewer_steps_are_measured(model, kept):
    profile = profiles.Profile.from_json(calibrated(model, try_fewer_steps=True)[1])
    offers = [offer for offer in profile.offers if offer.plan is None]
    assert [offer.steps for offer in offers] == [8, 6, 4]
    off, size = 0.0, 0.0
    for seed in (0, 1):
        few, full = (small.sample(model, steps=steps, batch=2, seed=seed) for steps in (6, STEPS))
        off += float((few - full).square().sum())
        size += float(full.square().sum())
    assert offers[1].error == pytest.approx((off / size) ** 0.5, rel=1e-3)


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    "more, taken, said",
    [
        ({"cfg": 3.2}, True, "made for CFG 3"),
        ({"size": (48, 48)}, True, "made for latents of 16 x 16"),
        ({"scheduler": "karras"}, False, ""),
        ({"sampler": "heun"}, False, ""),
        ({"steps": 12}, False, ""),
    ],
)
def test_a_profile_that_was_made_for_something_else(model, kept, caplog, more, taken, said):
    calibrated(model)
    caplog.clear()
    report, _ = run(model, **more)
    assert ("profile mine.json, learned" in caplog.text) == taken
    assert any(said in note for note in report.notes) if said else not any("profile" in n for n in report.notes)
    if not taken:  # asked for by name, it is said why not
        report, _ = run(model, profile="mine.json", **more)
        assert any("is not used: it was made for" in note for note in report.notes)


@pytest.mark.parametrize("letters", [None, "Fr"])
def test_in_a_run_of_no_steps_there_is_nothing_to_do_or_to_say(model, kept, caplog, letters):
    """As one half of SplitSigmas may be."""
    calibrated(model)
    sigmas, noise = small.sigmas_of(model, 4)[:1], torch.zeros(1, 4, 16, 16)
    if letters is None:
        m = execute("ASDMSpeedUp", model=model, likeness="close")[0]
    else:
        m = small.with_technique(model, forecasts.Forecasts(forecast.every(2, 2)))
    caplog.clear()
    wanted, made = (sampled_by_hand(each, sigmas, noise) for each in (model, m))
    assert torch.equal(made, wanted) and "asdm" not in caplog.text


@pytest.mark.parametrize("profile", ["automatic", "mine.json"])
def test_a_run_that_no_profile_can_be_for_goes_by_the_plans_that_ship(model, kept, caplog, monkeypatch, profile):
    calibrated(model)
    monkeypatch.setattr(profiles, "_MOST", 11)
    report, _ = run(model, profile=profile, steps=12)
    assert report.letters == run(model, profile="none", steps=12)[0].letters
    assert report.notes == (
        ("the profile mine.json is not used: profiles are for 1 to 11 steps, with finite noise levels of at least 0",)
        if profile == "mine.json"
        else ()
    )


def test_a_profile_of_another_cfg_is_used_when_chosen(model, kept, caplog):
    calibrated(model)
    report, _ = run(model, cfg=7.0)
    wanted, _ = run(model, cfg=7.0, profile="none")
    assert report == wanted and not report.notes
    assert "mine.json was made for CFG 3, and this run has 7, so it is not used; choose it on the node" in caplog.text
    report, _ = run(model, cfg=7.0, profile="mine.json")
    plan = profiles.read_profile(kept / "mine.json").plan(speed_up.LIKENESS["same motif"]).plan
    assert report.letters == plan.letters() and any("made for CFG 3" in note for note in report.notes)


def test_a_profile_of_another_model_is_used_when_chosen(model, folder, kept, caplog):
    calibrated(model)
    other = small.add_lora(model, small.lora())
    report, _ = run(other)
    assert "choose it on the node to use it all the same" in caplog.text and not report.notes
    report, _ = run(other, profile="mine.json")
    assert any("made for another model" in note for note in report.notes)
    plan = profiles.read_profile(kept / "mine.json").plan(speed_up.LIKENESS["same motif"]).plan
    assert report.letters == plan.letters()


def test_a_file_that_is_no_profile_is_said_and_refused(model, kept, caplog):
    kept.mkdir()
    (kept / "broken.json").write_text(json.dumps({"technique": "profile", "format": 7}))
    assert listed() == ["broken.json"]
    run(model)
    assert caplog.text.count("broken.json is no profile") == 1
    with pytest.raises(ValueError, match="broken.json is no profile that can be used: a profile of format 7"):
        execute("ASDMSpeedUp", model=model, likeness="close", profile="broken.json")


def test_calibrating_can_be_cancelled_and_leaves_no_file(model, kept, monkeypatch):
    asked = []

    def cancelled():
        asked.append(1)
        raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(calibrate.comfy.model_management, "throw_exception_if_processing_interrupted", cancelled)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        calibrated(model)
    assert asked and not Path(kept).exists()


def test_looking_for_a_plan_can_be_cancelled_and_the_next_run_finds_it(model, kept, monkeypatch):
    monkeypatch.setattr(speed_up, "_plans", {})
    m = execute("ASDMSpeedUp", model=model, likeness="close")[0]
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        small.sample(m)
    assert not speed_up._plans
    small.sample(m)
    assert len(speed_up._plans) == 1


@pytest.mark.parametrize("name", ["../up", "", "a/b"])
def test_a_bad_name_is_refused_before_anything_is_made(model, kept, name, monkeypatch):
    monkeypatch.setattr(calibrate, "calibrate", None)
    with pytest.raises(ValueError, match="profile"):
        calibrated(model, name=name)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"sampler_name": "euler_cfg_pp"},
            "cannot learn from runs of euler_cfg_pp: euler_cfg_pp wants more of a model",
        ),
        (
            {"sampler_name": "dpm_adaptive"},
            "dpm_adaptive: this sampler chooses its noise levels .* Take another sampler",
        ),
        ({"sampler_name": "dpm_fast"}, "dpm_fast evaluates the network at noise levels of its own"),
        ({"steps": 1}, "in a run of one step there is nothing to leave out"),
        ({"steps": 1001}, "profiles are for 1 to 1000 steps"),
    ],
    ids=lambda given: "-".join(map(str, given.values())) if isinstance(given, dict) else "",
)
def test_a_run_that_cannot_be_foretold_is_refused_before_anything_is_made(model, kept, monkeypatch, more, message):
    monkeypatch.setattr(calibrate.Batches, "sample", None)
    with pytest.raises(ValueError, match=message):
        calibrated(model, **more)
    assert not Path(kept).exists()


def test_the_largest_seed_counts_on_from_zero(model, kept):
    calibrated(model, seed=2**64 - 1)
    assert listed() == ["mine.json"]


@pytest.mark.parametrize("sampler", sorted(comfy.samplers.SAMPLER_NAMES))
def test_noise_levels_are_asked_about_and_stay_as_they_are(model, sampler):
    """UniPC writes into those it is given. They are the output of another node, and what profiles are known by."""
    sigmas = small.sigmas_of(model, STEPS)
    before = sigmas.clone()
    try:
        forecasts.response_of(comfy.samplers.sampler_object(sampler), sigmas, model)
    except ValueError as e:
        assert "cfg_pp" in sampler or sampler in ("dpm_fast", "dpm_adaptive"), e
    assert torch.equal(sigmas, before)


def test_a_profile_of_uni_pc_is_taken(model, kept, caplog):
    calibrated(model, sampler_name="uni_pc", name="pc")
    report, _ = run(model, sampler="uni_pc")
    assert "profile pc.json, learned from" in caplog.text and not report.notes


def flow_matching(model):
    """x = (1 - sigma) x_0 + sigma n, as with finetunes of SDXL that were trained so."""
    return nodes_model_advanced.ModelSamplingSD3().patch(model, 3.0)[0]


class Blending(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    """Flow matching on the outside, and inside a network that was trained with noise on top."""

    def __init__(self, its):
        super().__init__()
        self.its = its

    def timestep(self, sigma):
        return self.its.timestep(sigma / (1 - sigma))

    def calculate_input(self, sigma, noise):
        return self.its.calculate_input(sigma / (1 - sigma), noise / (1 - sigma.view(-1, 1, 1, 1)))

    def calculate_denoised(self, sigma, model_output, model_input):
        part = 1 - sigma
        return self.its.calculate_denoised(sigma / part, model_output, model_input / part.view(-1, 1, 1, 1))


def blending(model):
    m = model.clone()
    m.add_object_patch("model_sampling", Blending(model.get_model_object("model_sampling")))
    return m


@pytest.mark.parametrize("technique_of_it", ["straight", "fitted", "guided", "Speed Up"])
def test_a_model_that_blends_its_noise_is_forecast_as_one_that_adds_it(folder, technique_of_it):
    """Euler takes the same steps in both, so the same network must give the same picture."""
    model = small.model(folder, prediction="v")
    levels = small.sigmas_of(model, 14)[2:]  # the first two would begin at the greatest noise, which the host scales
    sampler = comfy.samplers.sampler_object("euler")
    answer = forecasts.response_of(sampler, levels, model)
    table = speed_up.statistics_for(sampler, 3.0, range(12))
    fit = forecast_fit.PlanFit(table.recording(answer, 3.0, range(12)), apart=True)
    kinds = {"F": forecast.FULL, "r": forecast.RESULT, "c": forecast.COND}

    def plan(letters, fitted):
        return fit.weights([kinds[letter] for letter in letters], fitted).plan

    its = {
        "straight": forecasts.Forecasts(plan("FFrFrrFrFrrr", False)),
        "fitted": forecasts.Forecasts(plan("FFrFrrFrFcrr", True)),
        "guided": forecasts.Forecasts(forecast.guided_within(plan("FFrFrrFrFrrr", True), 0.1, 0.8)),
        "Speed Up": speed_up.SpeedUp("same motif", "none"),
    }[technique_of_it]
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    made, letters = [], []
    for m, sigmas in ((model, levels), (blending(model), levels / (1 + levels))):
        on = small.with_technique(m, its)
        for each in (m, on):
            conds = small.cond(SD, 1), small.cond(SD, 2)
            made.append(comfy.sample.sample_custom(each, noise, 3.0, sampler, sigmas, *conds, torch.zeros_like(noise)))
        letters.append(its.log.last.letters)
    full, forecast_, flow_full, flow_forecast = made
    assert letters[0] == letters[1] and "r" in letters[0]
    assert small.difference(flow_full, full) < 1e-3 < 10 * small.difference(forecast_, full)
    assert small.difference(flow_forecast, forecast_) < 1e-3


def test_a_model_that_blends_its_noise_has_profiles_of_its_own(model, kept, caplog):
    flow = flow_matching(model)
    report, _ = run(flow)  # begins at noise alone, of which no picture is left
    assert "by the plans that ship" in caplog.text and "r" in report.letters and not report.notes
    calibrated(flow, name="flow")
    caplog.clear()
    report, made = run(flow)
    assert "profile flow.json, learned from" in caplog.text and not report.notes
    again = small.sample(small.with_technique(flow, forecasts.Forecasts(forecast.every(STEPS, 1))), steps=STEPS)
    assert torch.equal(again, small.sample(flow, steps=STEPS)) and made.isfinite().all()


def test_a_sampler_is_asked_with_the_sampling_of_the_run(model):
    """Ancestral samplers take steps of their own where noise is blended."""
    sampler, flow = comfy.samplers.sampler_object("euler_ancestral"), flow_matching(model)
    sigmas = small.sigmas_of(flow, STEPS)
    answer = forecasts.response_of(sampler, sigmas, flow)

    seen = []

    def one(x, sigma):  # every result is 1
        seen.append(x.item())
        return 1 + 0 * x

    nodes_custom_sampler.comfy.k_diffusion.sampling.sample_euler_ancestral_RF(
        forecasts._Denoiser(one, flow),
        torch.zeros(1, 1, 1, 1),
        sigmas.clone(),
        extra_args={},
        disable=True,
        noise_sampler=lambda *_: 0.0,
    )
    assert answer.matrix.sum(0)[:-1] == pytest.approx(seen, rel=1e-4, abs=1e-6)


def test_asking_about_a_sampler_keeps_no_model(folder):
    model, sigmas = small.model(folder), torch.tensor([3.0, 1.0, 0.0])
    clone = model.clone()
    gone = weakref.ref(clone)
    gc.collect()
    gc.disable()
    try:
        forecasts.response_of(comfy.samplers.sampler_object("euler"), sigmas, clone)
        del clone
        assert gone() is None
    finally:
        gc.enable()


# What is chosen where nothing was learned ---------------------------------------------------------------


def test_gri_is_added_where_it_is_not_and_the_picture_may_differ(model):
    def on(likeness, model=model, **more):
        m = execute("ASDMSpeedUp", model=model, likeness=likeness, **more)[0]
        return technique.technique_of(m, regional.Regional)

    assert on("close") == regional.Regional() == on("same motif")
    assert on("same to the eye") is None and on("close", large_pictures=False) is None
    mine = regional.Regional(window=32)
    assert on("close", small.with_technique(model, mine)) == mine


def test_guidance_between_two_points_only(model):
    m = execute("ASDMSpeedUp", model=model, likeness="close", guidance_start=0.2, guidance_end=0.6)[0]
    made = small.sample(m, steps=STEPS)
    letters = technique.technique_of(m, speed_up.SpeedUp).log.last.letters
    assert letters[:2] == "uu" and letters[6:] == "uuuu" and letters[2] == "F" and "u" not in letters[2:6]
    assert made.isfinite().all()
    whole = execute("ASDMSpeedUp", model=model, likeness="close", guidance_start=0.0, guidance_end=1.0)[0]
    assert torch.equal(small.sample(whole, steps=STEPS), run(model, "close")[1])
    with pytest.raises(ValueError, match="the end comes after the start"):
        execute("ASDMSpeedUp", model=model, likeness="close", guidance_start=0.7, guidance_end=0.6)


def test_guidance_between_two_points_where_the_run_decides(model):
    m = execute("ASDMSpeedUp", model=model, likeness="close", guidance_start=0.2, guidance_end=0.6)[0]
    small.sample(m, steps=STEPS, sampler="euler_cfg_pp", cfg=1.5)
    letters = technique.technique_of(m, speed_up.SpeedUp).log.last.letters
    assert letters[:2] == "uu" and letters[6:] == "uuuu" and letters[2] == "F" and "u" not in letters[2:6]


def test_a_plan_is_for_as_many_steps_as_the_run_has(model):
    """Noise levels that end with one twice: the last step is never evaluated at a place of its own."""
    sigmas = torch.tensor([14.6, 12, 10, 8, 6, 4, 3, 2, 1, 1, 0.0])
    chosen = comfy.samplers.sampler_object("euler")
    plan = speed_up.plan_for("same motif", chosen, sigmas, 3.0, model)
    assert plan.steps == 10 and int(max(plan.positions)) == 8
    m = execute("ASDMSpeedUp", model=model, likeness="same motif", profile="none")[0]
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    conds = small.cond(SD, 1), small.cond(SD, 2)
    comfy.sample.sample_custom(
        m, noise, 3.0, chosen, sigmas, *conds, torch.zeros_like(noise), disable_pbar=True, seed=0
    )
    report = technique.technique_of(m, speed_up.SpeedUp).log.last
    assert report.letters == plan.letters() and not report.notes and "r" in report.letters


def test_a_run_past_the_hosts_way_of_asking_is_told(model):
    def past(args):
        asked = (args["model"], args["conds"], args["input"], args["sigma"], args["model_options"])
        return comfy.samplers._calc_cond_batch(*asked)

    m = execute("ASDMSpeedUp", model=model, likeness="same motif", profile="none")[0].clone()
    m.set_model_sampler_calc_cond_batch_function(past)
    small.sample(m, steps=STEPS)
    report = technique.technique_of(m, speed_up.SpeedUp).log.last
    assert any("past ComfyUI's, so every step was computed. Bypass that node" in note for note in report.notes)


def test_a_profile_for_another_kind_of_network_is_told_where_it_fits_and_left_elsewhere(model, kept, caplog):
    calibrated(model)
    path = kept / "mine.json"
    profile = profiles.read_profile(path)
    actions = [forecast.Action()] * STEPS
    actions[5] = forecast.Action("features", branch=40)
    offer = replace(profile.offers[0], saving=0.9, error=0.0, plan=forecast.ForecastPlan(tuple(actions)))
    path.write_text(replace(profile, offers=(offer,)).to_json(), "utf-8")
    report, _ = run(model, sampler="heun")
    assert not any("mine.json" in note for note in report.notes)
    report, made = run(model)
    assert any("mine.json is not used, it is for another kind of network" in note for note in report.notes)
    assert torch.equal(made, run(model, profile="none")[1])


@pytest.mark.sweep(1)
@pytest.mark.parametrize("sampler", ["dpmpp_sde", "dpmpp_2m_sde", "euler_ancestral", "lcm"])
def test_of_samplers_that_add_noise_what_is_foretold_is_what_the_table_says(model, sampler):
    chosen, sigmas = comfy.samplers.sampler_object(sampler), small.sigmas_of(model, STEPS)
    found = forecasts.response_of(chosen, sigmas, model)
    noise = {"lcm": "all"}.get(sampler, "some")
    assert speed_up.noise_of(chosen) == noise and found.noisy
    plan = speed_up.plan_for("same motif", chosen, sigmas, 3.0, model)
    assert len(plan.actions) == len(found) and plan.saving() < 0.8
    report, made = run(model, sampler=sampler)
    assert report.letters == plan.letters()
    plain = small.sample(model, steps=STEPS, sampler=sampler)
    assert torch.equal(made, plain) == (plan.saving() == 0)
    if not plan.saving():
        assert any("every step is computed" in note for note in report.notes)


def test_samplers_that_try_states_beside_their_path_are_known(model):
    sigmas = small.sigmas_of(model, STEPS)
    found = {
        name: forecasts.response_of(comfy.samplers.sampler_object(name), sigmas, model).beside
        for name in ("euler", "dpmpp_2m", "res_multistep", "heun", "dpm_2", "uni_pc", "uni_pc_bh2")
    }
    assert [name for name, beside in found.items() if beside] == ["heun", "dpm_2", "uni_pc", "uni_pc_bh2"]


def test_a_sampler_whose_noise_is_turned_off_is_one_without(model):
    quiet, sigmas = comfy.samplers.ksampler("euler_ancestral", {"eta": 0}), small.sigmas_of(model, STEPS)
    plain = comfy.samplers.ksampler("euler")
    found, wanted = (forecasts.response_of(sampler, sigmas, model) for sampler in (quiet, plain))
    assert speed_up.noise_of(quiet) == "none" and not found.noisy and not wanted.noisy
    assert found.matrix == pytest.approx(wanted.matrix, abs=1e-5)
    assert speed_up.plan_for("close", quiet, sigmas, 3.0, model) == speed_up.plan_for(
        "close", plain, sigmas, 3.0, model
    )


def test_a_guider_without_a_single_cfg_keeps_the_run_the_same_to_the_eye(model):
    guider = nodes_custom_sampler.Guider_DualCFG(model)
    guider.set_cfg(4.0, 2.0)
    assert speed_up.guidance_of(guider) is None
    plain = comfy.samplers.CFGGuider(model)
    assert speed_up.guidance_of(plain) == 1.0
    plain.set_cfg(5.0)
    assert speed_up.guidance_of(plain) == 5.0
    m = execute("ASDMSpeedUp", model=model, likeness="same motif")[0]
    guider = nodes_custom_sampler.Guider_DualCFG(m)
    guider.set_conds(small.cond(SD, 1), small.cond(SD, 3), small.cond(SD, 2))
    guider.set_cfg(4.0, 2.0)
    noise, sigmas = torch.randn(1, 4, 16, 16), small.sigmas_of(model, STEPS)
    guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True)
    report = technique.technique_of(m, speed_up.SpeedUp).log.last
    careful = speed_up.plan_for("same to the eye", comfy.samplers.sampler_object("euler"), sigmas, 7.0, model)
    assert report.letters == careful.letters() and any("no single CFG" in note for note in report.notes)


# Decided in the run -------------------------------------------------------------------------------------


def first_layer(model):
    return model.model.diffusion_model.input_blocks[1][0]


def by_hand(model, settings, cfg=3.0):
    """(decisions, sampler): an Euler loop that computes everything, and looks at the first layer itself whether it
    would have had to.
    """
    decisions = []

    def loop(denoise, x, sigmas, extra_args=None, callback=None, disable=None):
        guider, options = denoise.inner_model, extra_args["model_options"]
        lists = [guider.conds["positive"], guider.conds["negative"]]
        seen = []
        handle = first_layer(model).register_forward_hook(lambda module, inputs, out: seen.append(out.clone()))
        kept, known, row = None, [], 0
        steps = len(sigmas) - 1
        for s, (sigma, lower) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
            seen.clear()
            found = comfy.samplers.calc_cond_batch(guider.inner_model, lists, x, sigma.expand(len(x)), options)
            v = [(x / (sigma**2 + 1) - f) * (sigma**2 + 1) ** 0.5 / sigma for f in found]
            change = (
                None
                if kept is None
                else max(float((a - b).abs().mean() / b.abs().mean()) for a, b in zip(seen[0], kept, strict=True))
            )
            inside = settings.first <= s < steps - settings.last and row < settings.max_run
            if inside and change < settings.threshold:
                (p, old), (q, new) = known[-2:]
                v = [b + (b - a) * (s - q) / (q - p) for a, b in zip(old, new, strict=True)]
                found = [x / (sigma**2 + 1) - w * sigma / (sigma**2 + 1) ** 0.5 for w in v]
                row += 1
            else:
                kept, row = seen[0], 0
                known.append((s, v))
            decisions.append("F" if row == 0 else "r")
            cond, uncond = found
            x = x + (x - (uncond + cfg * (cond - uncond))) / sigma * (lower - sigma)
        handle.remove()
        return x

    return decisions, comfy.samplers.KSAMPLER(loop)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("threshold, max_run", [(0.3, 2), (0.12, 1)])
def test_a_run_that_decides_equals_a_loop_by_hand(model, threshold, max_run):
    settings = forecast.Adaptive(threshold, max_run)
    noise = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    # One picture of the batch changes more than the others: it counts.
    latent = torch.cat([torch.zeros(2, 4, 16, 16), 20 * torch.randn(1, 4, 16, 16)])
    decisions, loop = by_hand(model, settings)
    sigmas = small.sigmas_of(model, 12)

    def sampled(m, sampler):
        return comfy.sample.sample_custom(
            m, noise, 3.0, sampler, sigmas, small.cond(SD, 1), small.cond(SD, 2), latent, disable_pbar=True, seed=0
        )

    wanted = sampled(model, loop)

    class Decided(speed_up.SpeedUp):
        def bind(self, start, say):
            positive = forecasts.positives(start.guider)
            return adaptive.AdaptiveForecaster(settings, self.log, start.sigmas.tolist(), positive, say)

    kept = Decided("close")
    m = small.with_technique(model, kept)
    made = sampled(m, comfy.samplers.sampler_object("euler"))
    assert kept.log.last.letters == "".join(decisions)
    assert "r" in decisions and small.difference(made, wanted) < 2e-5
    assert kept.log.last.peak <= kept.device_bytes(m, noise.shape, {"positive": [], "negative": []})
    assert torch.equal(sampled(m, comfy.samplers.sampler_object("euler")), made)


def test_an_unknown_sampler_decides_in_the_run_and_says_so(model, caplog):
    def mine(denoise, x, sigmas, extra_args=None, callback=None, disable=None):
        return comfy.k_diffusion.sampling.sample_euler(denoise, x, sigmas, extra_args, callback, disable)

    m = execute("ASDMSpeedUp", model=model, likeness="same motif")[0]
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    comfy.sample.sample_custom(
        m,
        noise,
        3.0,
        comfy.samplers.KSAMPLER(mine),
        small.sigmas_of(model, 20),
        small.cond(SD, 1),
        small.cond(SD, 2),
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=0,
    )
    assert "is not one of ComfyUI's own samplers, so each step is left out or made" in caplog.text
    letters = technique.technique_of(m, speed_up.SpeedUp).log.last.letters
    assert len(letters) == 20 and "rr" not in letters


def test_samplers_of_cfg_pp_decide_in_the_run(model, caplog):
    report, made = run(model, sampler="euler_cfg_pp", cfg=1.5, steps=20)
    assert "so each step is left out or made" in caplog.text and made.isfinite().all()
    assert len(report.letters) == 20 and set(report.letters) <= {"F", "r"}
    report, made = run(model, sampler="euler_ancestral_cfg_pp", cfg=1.5)
    assert report.saving == 0 and torch.equal(
        made, small.sample(model, steps=STEPS, sampler="euler_ancestral_cfg_pp", cfg=1.5)
    )


def test_a_run_that_decides_goes_on_where_no_prompt_acts(model):
    def half(seed):
        cond = small.cond(SD, seed)
        cond[0][1].update(start_percent=0.0, end_percent=0.5)
        return cond

    conds = {"positive": half(1), "negative": half(2)}
    report, made = run(model, sampler="euler_cfg_pp", cfg=1.5, **conds)
    assert made.isfinite().all() and len(report.letters) == STEPS


def test_a_compiled_model_that_decides_computes_the_same(model):
    settings = forecast.Adaptive(0.3, 1)

    class Decided(speed_up.SpeedUp):
        def bind(self, start, say):
            positive = forecasts.positives(start.guider)
            return adaptive.AdaptiveForecaster(settings, self.log, start.sigmas.tolist(), positive, say)

    kept = Decided("close")
    m = small.with_technique(model, kept)
    wanted = small.sample(m, steps=8)
    letters = kept.log.last.letters
    assert "r" in letters
    assert small.difference(small.sample(small.compiled(m), steps=8), wanted) < 1e-4
    assert kept.log.last.letters == letters
