"""Switching within one run: each model plays its stretch as it would alone, and nothing is left behind."""

import types

import comfy.controlnet
import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import pytest
import small
import torch
from comfy.patcher_extension import PatcherInjection, WrappersMP
from comfy_extras import nodes_differential_diffusion, nodes_model_advanced, nodes_pag
from in_host import module
from nodes import ControlNetApplyAdvanced  # type: ignore[attr-defined]  # ComfyUI's nodes.py

switch = module("nodes.engine.switch")
switching = module("asdm_core.switching")
assigned, engine_run = small.assigned, module("nodes.engine.run")
SD = small.SD
STEPS = 4


@pytest.fixture(scope="module")
def loaded(folder):
    return small.model(folder), small.model(folder, seed=1), small.model(folder, seed=2)


@pytest.fixture(scope="module")
def fresh_samples(loaded):
    return [small.sample(m, steps=1) for m in loaded]


@pytest.fixture
def models(loaded, fresh_samples):
    """Three stock MODELs of different weights, which must be the same after the test as before."""
    before = [state(m) for m in loaded]
    yield loaded
    for m, was, sample in zip(loaded, before, fresh_samples, strict=True):
        assert state(m) == was
        assert torch.equal(small.sample(m, steps=1), sample)


@pytest.fixture
def first(models):
    return models[0]


@pytest.fixture
def second(models):
    return models[1]


@pytest.fixture(scope="module")
def m2(folder):
    return small.write_pack(folder / "m2.safetensors", seed=3)


def state(m):
    return (
        id(m.model),
        repr(m.model_options),
        dict(m.patches),
        m.patches_uuid,
        dict(m.object_patches),
        repr(m.wrappers),
        repr(m.callbacks),
        dict(m.attachments),
        repr(m.additional_models),
        m.hook_mode,
        m.hook_patches_backup,
        m.model.current_patcher,
    )


def at(first, second, where, unit="step", crossfade=0):
    return switch.with_switch(first, second, switching.SwitchPoint(where, unit), crossfade)


def sample(m, **more):
    return small.sample(m, **{"steps": STEPS, **more})


def v_prediction(m):
    return nodes_model_advanced.ModelSamplingDiscrete().patch(m, "v_prediction", False)[0]


def sigmas():
    return torch.tensor([10.0, 5.0, 2.0, 0.7, 0.0])  # below where the prediction type changes how noise is added


def one_evaluation(m, x, timestep, positive=None, negative=None):
    """What a model alone makes of one noisy latent: the denoised of a run of one Euler step to sigma 0."""
    found = []

    def function(model, x_, s, extra_args, **_):
        found.append(model(x, timestep, **extra_args))
        return x_

    comfy.sample.sample_custom(
        m,
        torch.zeros_like(x),
        3.0,
        comfy.samplers.KSAMPLER(function),
        torch.tensor([1.0, 0.0]),
        positive or small.cond(SD, 1),
        negative or small.cond(SD, 2),
        torch.zeros_like(x),
        disable_pbar=True,
    )
    return found[0]


def reference(models, plays, sampler, **more):
    """The same run by a sampler whose model function swaps whole models, each in a guider of its own."""

    class Guider(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options={}, seed=None):
            return one_evaluation(models[plays(float(timestep.flatten()[0]))], x, timestep, **more)

    guider = Guider(models[0])
    guider.set_conds(more.get("positive") or small.cond(SD, 1), more.get("negative") or small.cond(SD, 2))
    guider.set_cfg(3.0)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return guider.sample(
        noise, torch.zeros(1, 4, 16, 16), comfy.samplers.sampler_object(sampler), sigmas(), seed=0, disable_pbar=True
    )


def run(m, sampler="euler", **more):
    return sample(m, sigmas=sigmas(), sampler=sampler, **more)


# The two ends ---------------------------------------------------------------------------------------


def test_at_either_end_one_of_the_models_is_the_result(first, second):
    assert (
        at(first, second, 0) is at(first, second, 0.0, "percent") is at(first, second, 0.0, "share of steps") is second
    )
    assert at(first, second, 1.0, "percent") is at(first, second, 0.0, "sigma") is first


def test_switched_at_the_first_step_equals_the_second(first, second, caplog):
    switched = at(first, second, 1000.0, "sigma")
    assert switched is not second
    assert torch.equal(run(switched), run(second))
    assert torch.equal(sample(switched), sample(second))
    assert "model 1 of 2 plays in none of the" in caplog.text and "model 2 of 2" not in caplog.text


@pytest.mark.parametrize("steps", [STEPS, 100])
def test_switched_after_the_last_step_equals_the_first(first, second, steps, caplog):
    assert torch.equal(sample(at(first, second, steps)), sample(first))
    assert "model 2 of 2 plays in none of the" in caplog.text and "model 1 of 2" not in caplog.text
    caplog.clear()
    sample(at(first, second, 1))
    assert "plays in none" not in caplog.text


@pytest.mark.sweep(1)
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun"])
def test_a_model_switched_to_its_equal_equals_the_run_without(first, folder, sampler):
    plain = sample(first, sampler=sampler)
    assert torch.equal(sample(at(first, first, 2), sampler=sampler), plain)
    assert torch.equal(sample(at(first, small.model(folder), 2), sampler=sampler), plain)


# Between them ---------------------------------------------------------------------------------------


@pytest.mark.sweep(2)
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "euler_ancestral", "lms"])
@pytest.mark.parametrize(("where", "unit"), [(2, "step"), (3.0, "sigma")])
def test_the_sampler_keeps_its_history(first, second, sampler, where, unit):
    torch.manual_seed(0)
    switched = run(at(first, second, where, unit), sampler)
    torch.manual_seed(0)
    assert torch.equal(switched, reference((first, second), lambda sigma: int(sigma <= 3), sampler))
    assert small.difference(switched, run(first, sampler)) > 0.01


def test_percent_is_counted_as_the_host_counts(first, second):
    percent = 0.6
    sigma = first.get_model_object("model_sampling").percent_to_sigma(percent)
    assert torch.equal(sample(at(first, second, percent, "percent")), sample(at(first, second, sigma, "sigma")))
    assert small.difference(sample(at(first, second, percent, "percent")), sample(first)) > 0.01


def test_steps_are_those_of_the_run(first, second):
    # KSamplerAdvanced, from step 2 to the end.
    more = {"steps": 6, "start_step": 2, "last_step": 6}
    assert torch.equal(sample(at(first, second, 4), **more), sample(first, **more))
    assert small.difference(sample(at(first, second, 3), **more), sample(first, **more)) > 0.001


@pytest.mark.sweep(1)
@pytest.mark.parametrize("more", [{"steps": 5}, {"steps": 7, "start_step": 2, "last_step": 7}], ids=str)
def test_a_share_of_the_steps_counts_those_of_the_run(first, second, more):
    # 40% of 5 steps: the first two are the first model's.
    assert torch.equal(sample(at(first, second, 0.4, "share of steps"), **more), sample(at(first, second, 2), **more))
    assert torch.equal(sample(at(first, second, 1.0, "share of steps"), **more), sample(first, **more))


def test_presets_are_the_papers(first, second):
    for (name, preset), steps in zip(switching.PRESETS.items(), (2, 3, 2), strict=True):
        a, b = (second, first) if preset.small_first else (first, second)
        assert torch.equal(sample(switch.with_switch(a, b, preset.at), steps=5), sample(at(a, b, steps), steps=5)), name


def test_three_in_a_chain_either_way(models):
    a, b, c = models
    wanted = reference(models, lambda sigma: 0 if sigma > 5 else 1 if sigma > 2 else 2, "dpmpp_2m")
    assert torch.equal(run(at(at(a, b, 1), c, 2), "dpmpp_2m"), wanted)
    assert torch.equal(run(at(a, at(b, c, 2), 1), "dpmpp_2m"), wanted)
    assert torch.equal(run(at(a, at(b, c, 1), 2)), run(at(a, c, 2)))


def test_back_to_the_first(first, second):
    wanted = reference((first, second), lambda sigma: int(2 < sigma <= 5), "dpmpp_2m")
    assert torch.equal(run(at(at(first, second, 1), first, 2), "dpmpp_2m"), wanted)


def test_a_crossfade_mixes_the_predictions(first, second):
    faded = []
    switched = at(first, second, 1, crossfade=1)
    plain = {i: [] for i in (0, 1)}

    def collect(out):
        def function(model, x, s, extra_args, **_):
            out.extend(model(torch.ones_like(x), sigma[None], **extra_args) for sigma in s[:-1])
            return x

        return comfy.samplers.KSAMPLER(function)

    for m, out in ((switched, faded), (first, plain[0]), (second, plain[1])):
        comfy.sample.sample_custom(
            m,
            torch.zeros(1, 4, 16, 16),
            3.0,
            collect(out),
            sigmas(),
            small.cond(SD, 1),
            small.cond(SD, 2),
            torch.zeros(1, 4, 16, 16),
            disable_pbar=True,
        )
    assert torch.equal(faded[0], plain[0][0])
    assert torch.equal(faded[1], plain[0][1] * 0.5 + plain[1][1] * 0.5)
    assert torch.equal(faded[2], plain[1][2])


def test_cfg_plus_plus_samplers_see_the_guidance_of_both(first, second, folder):
    assert torch.equal(
        sample(at(first, small.model(folder), 2), sampler="euler_cfg_pp"), sample(first, sampler="euler_cfg_pp")
    )
    assert torch.equal(run(at(first, second, 1000.0, "sigma"), "euler_cfg_pp"), run(second, "euler_cfg_pp"))


def test_in_a_crossfade_cfg_plus_plus_samplers_see_the_mixed_guidance_once(first, second):
    """CFG++ samplers keep what their function saw last."""

    def looking(seen):
        def function(model, x, s, extra_args, **_):
            def look(args):
                seen.append((args["denoised"], args["uncond_denoised"]))
                return args["denoised"] + 1

            options = comfy.model_patcher.set_model_options_post_cfg_function(
                dict(extra_args["model_options"]), look, True
            )
            seen.append(model(torch.ones_like(x), s[1][None], **{**extra_args, "model_options": options}))
            return x

        return comfy.samplers.KSAMPLER(function)

    found = {}
    for name, m in (("a", first), ("b", second), ("both", at(first, second, 1, crossfade=1))):
        comfy.sample.sample_custom(
            m,
            torch.zeros(1, 4, 16, 16),
            3.0,
            looking(found.setdefault(name, [])),
            sigmas(),
            small.cond(SD, 1),
            small.cond(SD, 2),
            torch.zeros(1, 4, 16, 16),
            disable_pbar=True,
        )
    ((denoised, uncond), out), (a, _), (b, _) = found["both"], found["a"], found["b"]
    assert torch.equal(denoised, 0.5 * a[0] + 0.5 * b[0]) and torch.equal(out, denoised + 1)
    assert torch.equal(uncond, 0.5 * a[1] + 0.5 * b[1])


# What each model brings -----------------------------------------------------------------------------


def test_each_keeps_its_own_guidance(first, second):
    pag = nodes_pag.PerturbedAttentionGuidance.execute(second, 3.0).args[0]
    assert torch.equal(run(at(first, pag, 1000.0, "sigma")), run(pag))
    assert torch.equal(run(at(pag, first, 1000.0, "sigma")), run(first))
    assert torch.equal(run(at(first, pag, 2)), reference((first, pag), lambda sigma: int(sigma <= 2), "euler"))


@pytest.mark.sweep(1)
@pytest.mark.parametrize("shared", [False, True])
def test_v_prediction_with_eps(first, second, shared):
    v = v_prediction(first if shared else second)
    assert torch.equal(run(at(first, v, 2)), reference((first, v), lambda sigma: int(sigma <= 2), "euler"))
    assert torch.equal(run(at(v, first, 2)), reference((v, first), lambda sigma: int(sigma <= 2), "euler"))


@pytest.mark.parametrize("shared", [False, True])
def test_each_keeps_its_own_lora(first, second, shared):
    a = small.add_lora(first, small.lora(seed=0))
    b = small.add_lora(first if shared else second, small.lora(seed=1))
    assert (a.model is b.model) == shared
    assert torch.equal(run(at(a, b, 2)), reference((a, b), lambda sigma: int(sigma <= 2), "euler"))
    assert torch.equal(run(at(a, b, 1000.0, "sigma")), run(b))


RESNET = "diffusion_model.input_blocks.1.0"


def on_forward(m, change):
    """MODEL with a patch that calls the forward of a layer, which it holds, and changes what it gives."""
    m, theirs = m.clone(), m.get_model_object(f"{RESNET}.forward")
    m.add_object_patch(f"{RESNET}.forward", lambda *args, **kwargs: change(theirs(*args, **kwargs)))
    return m


def in_a_wrapper(m, change):
    """The same by a function round the network, which holds the layer."""
    m, layer = m.clone(), m.get_model_object(RESNET)

    def wrapper(apply, args):
        hook = layer.register_forward_hook(lambda module, inputs, out: change(out))
        try:
            return apply(args["input"], args["timestep"], **args["c"])
        finally:
            hook.remove()

    m.set_model_unet_function_wrapper(wrapper)
    return m


def by_injection(m, change):
    """The same by an injection, which holds the layer."""
    m, layer, hooks = m.clone(), m.get_model_object(RESNET), []

    def inject(patcher):
        hooks.append(layer.register_forward_hook(lambda module, inputs, out: change(out)))

    def eject(patcher):
        hooks.pop().remove()

    m.set_injections("theirs", [PatcherInjection(inject, eject)])
    return m


@pytest.mark.parametrize("patch", [on_forward, in_a_wrapper, by_injection])
def test_what_holds_layers_acts_on_those_of_its_model(first, folder, patch):
    """The second model is the first with a LoRA, so it gets a network of its own."""
    second, lora = small.model(folder), small.lora(seed=1)  # the same weights, read once more

    def halved(out):
        return 0.5 * out

    wanted = run(at(first, patch(small.add_lora(second, lora), halved), 2))
    assert torch.equal(run(at(first, patch(small.add_lora(first, lora), halved), 2)), wanted)
    run(patch(first, halved))  # loaded, with the patch on it
    wanted = run(at(patch(first, halved), patch(small.add_lora(second, lora), halved), 2))
    assert torch.equal(run(at(patch(first, halved), patch(small.add_lora(first, lora), halved), 2)), wanted)


def test_what_holds_layers_for_good_is_refused_on_a_second_network(first):
    class Around(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, *args):
            return self.layer(*args)

    second = small.add_lora(first, small.lora())
    second.add_object_patch(RESNET, Around(second.get_model_object(RESNET)))
    with pytest.raises(ValueError, match=f"holds the layers of the other's .object_patches.{RESNET}.*Save that model"):
        at(first, second, 2)
    third = small.add_lora(first, small.lora())
    third.model_options["transformer_options"]["theirs"] = types.SimpleNamespace(
        table={"layer": third.get_model_object(RESNET)}
    )
    with pytest.raises(ValueError, match="holds the layers of the other's .model_options.transformer_options.theirs"):
        at(first, third, 2)


def test_pack_on_the_second_shares_the_trunk(first, m2, monkeypatch):
    packed = small.with_pack(first, m2)
    listed = []
    load = comfy.model_management.load_models_gpu
    monkeypatch.setattr(
        comfy.model_management,
        "load_models_gpu",
        lambda models, *a, **k: listed.append(list(models)) or load(models, *a, **k),
    )
    switched = at(first, packed, 2)
    assert torch.equal(run(switched), reference((first, packed), lambda sigma: int(sigma <= 2), "euler"))
    pack = next(iter(assigned.packs_of(packed).values())).model
    assert [id(m.model) for m in listed[0]] == [id(first.model), id(pack)]


def test_packs_and_loras_on_both(first, second, m2, folder):
    other = small.write_pack(folder / "m1.safetensors", preset="m1", seed=4)
    a = small.add_lora(small.with_pack(first, m2), small.lora(seed=0))
    for b in (
        small.add_lora(small.with_pack(second, m2), small.lora(seed=1)),
        small.add_lora(small.with_pack(first, m2), small.lora(seed=1)),
        small.with_pack(a, other),
    ):
        assert torch.equal(run(at(a, b, 2)), reference((a, b), lambda sigma: int(sigma <= 2), "euler"))


def test_a_pack_after_the_switch_plays_in_the_first(first, second, m2):
    assert torch.equal(run(small.with_pack(at(first, second, 2), m2)), run(at(small.with_pack(first, m2), second, 2)))


def test_a_control_net_is_mapped_to_each(first, second):
    net = small.control_net()
    v = v_prediction(second)
    positive, negative = ControlNetApplyAdvanced().apply_controlnet(
        small.cond(SD, 1), small.cond(SD, 2), net, torch.rand(1, 128, 128, 3), 0.8, 0.0, 0.9
    )
    more = {"positive": positive, "negative": negative}
    found = run(at(first, v, 2), **more)
    assert torch.equal(found, reference((first, v), lambda sigma: int(sigma <= 2), "euler", **more))
    assert small.difference(found, run(at(first, v, 2))) > 0.001


@pytest.mark.sweep(1)
@pytest.mark.parametrize("shared", [False, True])
def test_hook_loras_act_on_both(first, second, m2, shared):
    other = small.with_pack(first if shared else second, m2)
    hooks = comfy.hooks.create_hook_lora(small.lora(), 1.0, 0.0)
    more = {"positive": small.cond(SD, 1, hooks=hooks)}
    found = run(at(first, other, 2), **more)
    # The host marks a MODEL as changed when it registers hooks, so not the original.
    assert torch.equal(found, reference((first.clone(), other), lambda sigma: int(sigma <= 2), "euler", **more))
    assert small.difference(found, run(at(first, other, 2))) > 0.001


@pytest.mark.sweep(2)
@pytest.mark.parametrize("crossfade", [0, 2])
@pytest.mark.parametrize("shared", [True, False])
def test_hooks_of_one_turn_are_off_the_packs_in_the_next(first, second, m2, folder, shared, crossfade):
    """Two UNets may share a pack, whose weights are hooked for the prompt that comes last."""

    def packed(trunk, number):
        return small.with_pack(trunk, m2), small.combined(folder, trunk=number, student=3)

    trunks = [packed(first, 0), packed(first if shared else second, 0 if shared else 1)]
    more = {"negative": small.cond(SD, 2, hooks=comfy.hooks.create_hook_lora(small.lora(), 1.0, 0.0))}
    found = []
    for one, other in zip(*trunks, strict=True):
        found.append(sample(at(one, other.clone(), 3, crossfade=crossfade), steps=6, **more))
    assert torch.equal(*found)


def test_differential_diffusion_of_the_second_acts_in_its_turn(first, second):
    """It changes the mask of an evaluation, of which the host asks the first model alone."""

    def differential(m):
        return nodes_differential_diffusion.DifferentialDiffusion.execute(m)[0]

    mask = torch.linspace(0, 1, 16 * 16).reshape(1, 1, 16, 16)
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    given = {"noise_mask": mask, "latent": latent, "steps": 6}
    calls = []

    def counted(m, name):
        m = differential(m)
        function = m.model_options["denoise_mask_function"]
        m.set_model_denoise_mask_function(lambda s, *args, **more: (calls.append(name), function(s, *args, **more))[1])
        return m

    none = sample(at(first, second, 3), **given)
    assert not torch.equal(sample(at(first, counted(second, "second"), 3), **given), none)
    assert calls == ["second"] * 3
    calls.clear()
    sample(at(counted(first, "first"), second, 3), **given)
    assert calls == ["first"] * 3
    assert torch.equal(
        sample(at(differential(first), differential(first), 3), **given), sample(differential(first), **given)
    )


def test_hook_loras_on_a_shared_trunk_in_run_after_run(first, m2):
    lora = small.add_lora(first, small.lora())
    switched = at(lora, small.with_pack(lora, m2), 2)
    hooks = comfy.hooks.create_hook_lora(small.lora(seed=1), 0.5, 0.0)
    once = run(switched, positive=small.cond(SD, 1, hooks=hooks))
    assert torch.equal(run(switched, positive=small.cond(SD, 1, hooks=hooks)), once)


def test_inpainting_from_a_latent(first, second):
    generator = torch.Generator().manual_seed(5)
    more = {
        "latent": torch.randn(1, 4, 16, 16, generator=generator),
        "noise_mask": (torch.rand(1, 1, 16, 16, generator=generator) > 0.5).float(),
    }
    assert torch.equal(run(at(first, second, 1000.0, "sigma"), **more), run(second, **more))
    found = run(at(first, second, 2), **more)
    assert small.difference(found, run(first, **more)) > 0.001
    assert small.difference(found, run(second, **more)) > 0.001


# What cannot be, and what is left -------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2])
def test_models_that_blend_their_noise_do_not_take_turns_with_those_that_add_it(first, second, number):
    flow = nodes_model_advanced.ModelSamplingSD3().patch(first if number == 1 else second, 3.0)[0]
    pair = (flow, second) if number == 1 else (first, flow)
    with pytest.raises(ValueError, match=f"number {number} blends its noise"):
        at(*pair, 2)
    both = at(flow, nodes_model_advanced.ModelSamplingSD3().patch(pair[number == 1], 3.0)[0], 2)
    assert small.sample(both, steps=STEPS).isfinite().all()
    # The node behind Switch UNet reaches the first model alone.
    behind = nodes_model_advanced.ModelSamplingSD3().patch(at(first, second, 2), 3.0)[0]
    with pytest.raises(ValueError, match="number 1 blends its noise"):
        small.sample(behind, steps=STEPS)


def test_models_on_different_devices_are_refused(first, second):
    """They need a device's own weights and latents; the second name of one device is no other."""
    there = second.clone()
    there.load_device = torch.device("cpu", 0)
    switched = at(first, there, 2)
    there.load_device = torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"on different devices \(cpu, cuda:1\).*Select Model Device"):
        at(first, there, 2)
    switch.others_of(switched)[0].load_device = torch.device("cuda", 1)  # as a node behind Switch UNet may do
    with pytest.raises(ValueError, match="on different devices"):
        small.sample(switched, steps=STEPS)


def test_another_family_is_refused(first, folder):
    with pytest.raises(ValueError, match="model_first is small-sd, model_second is small-sdxl"):
        at(first, small.model(folder, small.SDXL), 2)


def test_a_lora_after_the_switch_on_a_shared_unet_is_refused(first, m2):
    switched = small.add_lora(at(first, small.with_pack(first, m2), 2), small.lora())
    with pytest.raises(ValueError, match="Put the node before Switch UNet"):
        sample(switched)


def test_a_lora_after_the_switch_acts_on_the_first(first, second):
    lora = small.lora()
    assert torch.equal(run(small.add_lora(at(first, second, 2), lora)), run(at(small.add_lora(first, lora), second, 2)))


def test_a_unet_that_cannot_be_loaded_again_is_refused(first):
    a = small.add_lora(first, small.lora())
    b = first.clone()
    b.cached_patcher_init = None
    with pytest.raises(ValueError, match="cannot be loaded a second time"):
        at(a, b, 2)


def test_nothing_is_left_after_a_run_and_after_an_error(first, second, m2, monkeypatch):
    packed = small.with_pack(second, m2)
    switched = at(first, packed, 2)
    wanted = sample(switched)
    before = [state(m) for m in (switched, *switch.others_of(switched))]
    closed = []
    close = engine_run.Run.close
    monkeypatch.setattr(engine_run.Run, "close", lambda self: closed.append(self) or close(self))
    evaluate = switch.Turns._evaluate
    calls = []

    def fail_at_third(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("in the middle")
        return evaluate(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(switch.Turns, "_evaluate", fail_at_third)
        with pytest.raises(RuntimeError, match="in the middle"):
            sample(switched)
    assert len(closed) == 2  # of the switch, and of the pack's
    assert [state(m) for m in (switched, *switch.others_of(switched))] == before
    assert torch.equal(sample(switched), wanted)
    assert torch.equal(sample(packed), sample(at(first, packed, 1000.0, "sigma")))


# What other packs put on the models -----------------------------------------------------------------------


class Motion(torch.nn.Module):
    """A layer that a pack inserts, from an additional model of the MODEL, and that counts its calls."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, h):
        Motion.calls += 1
        return h * (1 + 0.05 * self.weight)


def with_motion(m):
    """As AnimateDiff-Evolved: its module is found among the additional models as the host loads the MODEL."""

    def inject(patcher):
        for extra in patcher.get_additional_models_with_key("theirs"):
            patcher.model.diffusion_model.input_blocks[1].append(extra.model)

    def eject(patcher):
        block = patcher.model.diffusion_model.input_blocks[1]
        for i in reversed([i for i, layer in enumerate(block) if isinstance(layer, Motion)]):
            block.pop(i)

    clone = m.clone()
    patcher = comfy.model_patcher.CoreModelPatcher(Motion(), load_device=m.load_device, offload_device=m.offload_device)
    clone.set_additional_models("theirs", [patcher])
    clone.set_injections("theirs", [PatcherInjection(inject, eject)])
    return clone


@pytest.mark.sweep(1)
@pytest.mark.parametrize("pack", [False, True])
def test_what_a_pack_inserts_is_in_both_models(first, second, m2, pack):
    def model_of(m):
        return with_motion(small.with_pack(m, m2) if pack else m)

    Motion.calls = 0
    wanted = reference((model_of(first), model_of(second)), lambda sigma: int(sigma <= 3), "euler")
    assert Motion.calls == STEPS
    for one, other in ((first, second), (first, first)):
        Motion.calls = 0
        made = run(at(model_of(one), model_of(other), 2))
        assert Motion.calls == STEPS
        if other is second:
            assert torch.equal(made, wanted)
    alone = run(model_of(first))
    assert torch.equal(run(at(model_of(first), model_of(first), 2)), alone)


def with_wrapper_hook(inserted):
    """A positive prompt with a wrapper round the run that inserts something into the network and takes it out again."""

    def wrapper(executor, *args, **more):
        guider = executor.class_obj
        unet = guider.model_patcher.model.diffusion_model
        inserted.append(id(unet))
        guider.model_options["transformer_options"]["theirs"] = 1.5
        handle = unet.input_blocks[1][0].register_forward_hook(lambda layer, inputs, out: 1.1 * out)
        try:
            return executor(*args, **more)
        finally:
            handle.remove()

    def factor(executor, *args, **more):
        # The options are the sixth argument of the network.
        options = more.get("transformer_options") or args[5]
        return options["theirs"] * executor(*args, **more)

    wrappers = {WrappersMP.OUTER_SAMPLE: {"t": [wrapper]}, WrappersMP.DIFFUSION_MODEL: {"t": [factor]}}
    hooks = comfy.hooks.HookGroup()
    hooks.add(comfy.hooks.TransformerOptionsHook({"wrappers": wrappers}))
    return [[small.cond(SD, 1)[0][0], {"hooks": hooks}]]


def test_a_wrapper_of_the_conditioning_goes_once_round_each_unet(first, second):
    inserted = []
    positive = with_wrapper_hook(inserted)
    alone = sample(first, positive=positive)
    assert len(inserted) == 1
    changed = small.with_technique(first, small.module("nodes.engine.regional").Regional(8, 4, 1))
    for other in (first, changed):
        inserted.clear()
        made = sample(at(first, other, 2), positive=positive)
        assert len(inserted) == 1
        if other is first:
            assert torch.equal(made, alone)
    inserted.clear()
    sample(at(first, second, 2), positive=positive)
    assert len(inserted) == len(set(inserted)) == 2


class Reads(comfy.controlnet.ControlBase):
    """A control that looks into the options of the run, as Advanced-ControlNet does beside AnimateDiff."""

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        self.seen.append(transformer_options["theirs"])

    def get_models(self):
        return []

    def copy(self):
        return self

    seen: list = []


def puts(m, value=1):
    """A node that puts something into the options of the run."""

    def wrapper(executor, *args, **more):
        executor.class_obj.model_options["transformer_options"]["theirs"] = value
        return executor(*args, **more)

    clone = m.clone()
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "theirs", wrapper)
    return clone


def test_options_of_one_model_only_end_in_a_sentence(first, second):
    positive = small.cond(SD, 1, control=Reads(), control_apply_to_uncond=True)
    for one, other, turn in ((puts(first), second, "second"), (first, puts(second), "first")):
        with pytest.raises(ValueError, match=rf"(?s)turn of model_{turn} .*theirs.*Put that node on both models"):
            sample(at(one, other, 2), positive=positive)
    Reads.seen.clear()
    sample(at(puts(first, 1), puts(second, 2), 2), positive=positive)
    assert Reads.seen == [1, 1, 2, 2]


def test_what_a_sampler_puts_into_the_run_reaches_both(first, second):
    def sampler(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i, (sigma, lower) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
            extra_args["model_options"]["transformer_options"]["theirs"] = i
            x = x + (x - model(x, sigma * x.new_ones(len(x)), **extra_args)) / sigma * (lower - sigma)
        return x

    Reads.seen.clear()
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    positive = small.cond(SD, 1, control=Reads(), control_apply_to_uncond=True)
    comfy.sample.sample_custom(
        at(first, second, 2),
        noise,
        3.0,
        comfy.samplers.KSAMPLER(sampler),
        sigmas(),
        positive,
        small.cond(SD, 2),
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=0,
    )
    assert Reads.seen == [0, 1, 2, 3]
