"""Packs in the assignment of a MODEL: who plays when, and that nothing is left behind."""

import copy
import gc
import os
import weakref

import comfy.model_management
import comfy.samplers
import pytest
import small
import torch
from comfy_extras import nodes_custom_sampler
from in_host import execute, module

SD, SDXL, assigned = small.SD, small.SDXL, small.assigned
engine_run, wrappers = module("nodes.engine.run"), module("nodes.engine.wrappers")
switch, switching = module("nodes.engine.switch"), module("asdm_core.switching")


@pytest.fixture
def model(loaded, plain_samples):
    """A stock MODEL, which must be the same after the test as before."""
    before = state(loaded)
    yield loaded
    assert state(loaded) == before
    assert torch.equal(small.sample(loaded), plain_samples)


@pytest.fixture(scope="module")
def m1(folder):
    return small.write_pack(folder / "m1.safetensors", preset="m1", seed=2)


def state(model):
    return {
        "model": id(model.model),
        "options": repr(model.model_options),
        "patches": len(model.patches),
        "uuid": model.patches_uuid,
        "objects": dict(model.object_patches),
        "wrappers": repr(model.wrappers),
        "callbacks": repr(model.callbacks),
        "attachments": dict(model.attachments),
        "additional": repr(model.additional_models),
        "injections": dict(model.injections),
    }


@pytest.fixture
def dispatched(monkeypatch):
    """How many layers somebody stood in for, by the end of the test."""
    counts = []
    forward = engine_run.BoundUNet._dispatch

    def dispatch(stage, layer, *args):
        if id(layer) in stage._players:
            counts.append(type(stage._players[id(layer)]).__name__)
        return forward(stage, layer, *args)

    monkeypatch.setattr(engine_run.BoundUNet, "_dispatch", dispatch)
    return counts


def test_pack_with_the_hosts_own_weights_is_bit_equal(model, folder, plain_samples, dispatched):
    chosen = small.Architecture.full(SD)
    units = tuple(u.address for u in chosen.kept if not u.address.startswith("stem."))
    small.packs.write_pack(
        folder / "own.safetensors",
        small.surgery.extract(small.weights(SD), chosen, units),
        small.packs.Description("pack", chosen, units),
        None,
    )
    assert torch.equal(small.sample(small.with_pack(model, folder / "own.safetensors")), plain_samples)
    assert len(dispatched) == len(units) * 2  # cond and uncond go together


@pytest.mark.sweep(1)
@pytest.mark.parametrize("preset", ["m1", "m2", "m3", "base", "small", "tiny"])
def test_pack_plays_what_the_combined_file_plays(model, folder, plain_samples, preset):
    path = small.write_pack(folder / f"{preset}-1.safetensors", preset=preset, seed=1)
    played = small.sample(small.with_pack(model, path))
    assert torch.equal(played, small.sample(small.combined(folder, preset=preset)))
    assert small.difference(played, plain_samples) > 0.01


@pytest.mark.sweep(1)
@pytest.mark.parametrize("preset", ["ssd-1b", "vega", "koala-1b", "koala-700m"])
def test_pack_for_sdxl_plays_what_the_combined_file_plays(folder, preset):
    path = small.write_pack(folder / f"{preset}.safetensors", SDXL, preset=preset, seed=1)
    played = small.with_pack(small.model(folder, SDXL), path)
    wanted = small.combined(folder, SDXL, preset)
    for size in ((16, 16), (13, 19)):
        assert torch.equal(small.sample(played, SDXL, size=size), small.sample(wanted, SDXL, size=size))


def test_pack_for_sd2_plays_what_the_combined_file_plays(folder):
    # v-prediction, by the stock loader's rule for this family.
    path = small.write_pack(folder / "sd2.safetensors", small.SD2, seed=1)
    played = small.with_pack(small.model(folder, small.SD2), path)
    assert torch.equal(
        small.sample(played, small.SD2), small.sample(small.combined(folder, small.SD2, prediction="v"), small.SD2)
    )


def test_pack_in_fp16_plays_in_the_hosts_dtype(model, folder):
    path = small.write_pack(folder / "half.safetensors", seed=1, dtype=torch.float16)
    played = small.with_pack(model, path)
    assert {p.dtype for pack in assigned.packs_of(played).values() for p in pack.model.parameters()} == {torch.float32}
    assert small.difference(small.sample(played), small.sample(small.combined(folder))) < 0.02


def test_pack_in_int8_plays(model, folder):
    path = small.write_pack(folder / "int8.safetensors", seed=1, dtype="int8")
    assert small.difference(small.sample(small.with_pack(model, path)), small.sample(small.combined(folder))) < 0.2


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    "run",
    [
        {"batch": 1},
        {"batch": 2},
        {"batch": 4},
        {"cfg": 1.0},
        {"sampler": "heun", "steps": 3},
        {"sampler": "dpmpp_2m", "scheduler": "karras"},
        {"sampler": "dpmpp_2m_sde", "scheduler": "karras"},
        {"sampler": "uni_pc"},
        {"steps": 4, "start_step": 1, "last_step": 3},
    ],
    ids=str,
)
def test_ways_of_sampling(model, folder, m2, run):
    assert torch.equal(small.sample(small.with_pack(model, m2), **run), small.sample(small.combined(folder), **run))


def test_image_to_image(model, folder, m2):
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    run = {"latent": latent, "denoise": 0.5}
    assert torch.equal(small.sample(small.with_pack(model, m2), **run), small.sample(small.combined(folder), **run))


def test_sizes_change_between_runs(model, folder, m2):
    played = small.with_pack(model, m2)
    wanted = small.combined(folder)
    for size in ((16, 16), (24, 16), (13, 19), (16, 16)):
        assert torch.equal(small.sample(played, size=size), small.sample(wanted, size=size)), size


def test_uncond_and_cond_of_other_lengths(model, folder, m2):
    run = {"positive": small.cond(tokens=14), "negative": small.cond(tokens=7, seed=3)}
    assert torch.equal(small.sample(small.with_pack(model, m2), **run), small.sample(small.combined(folder), **run))


# Windows and several packs --------------------------------------------------------------------------


def in_two_halves(first, second, **more):
    """Steps 0 and 1 by one MODEL, 2 and 3 by another; euler has no memory, so this is what a switch must give."""
    halfway = small.sample(first, steps=4, last_step=2, **more)
    return small.run(second, torch.zeros_like(halfway), halfway, steps=4, start_step=2, disable_noise=True, **more)


def close(model, wanted):
    # Between the halves the latents were scaled out of the sampler and back in.
    return small.difference(small.sample(model, steps=4), wanted) < 1e-5


def test_window_plays_its_steps_only(model, folder, m2):
    combined = small.combined(folder)
    early, late = small.with_pack(model, m2, 0.0, 0.4), small.with_pack(model, m2, 0.4, 1.0)
    assert close(early, in_two_halves(combined, model))
    assert close(late, in_two_halves(model, combined))
    assert not close(early, small.sample(combined, steps=4))


def test_packs_with_windows_that_meet(model, folder, m1, m2):
    played = small.with_pack(small.with_pack(model, m1, 0.0, 0.4), m2, 0.4, 1.0)
    wanted = in_two_halves(small.combined(folder, preset="m1", student=2), small.combined(folder))
    assert close(played, wanted)


def test_of_overlapping_packs_the_later_one_holds(model, folder, m1, m2):
    both = small.with_pack(small.with_pack(model, m2), m1, 0.0, 0.4)
    # Where m1 says nothing, m2 goes on playing: its units lie in down.0-1 and up.2-3, those of m1 in down.0 and up.3.
    chosen = small.Architecture.preset("m2", SD)
    m1_units = set(small.Architecture.preset("m1", SD).pack_units())
    weights = small.surgery.combine(small.weights(SD, 0), small.weights(SD, 1), chosen, chosen.pack_units())
    weights |= {k: small.weights(SD, 2)[k] for k, s in chosen.keys().items() if s.unit.address in m1_units}
    small.packs.write_unet(
        folder / "both.safetensors", weights, small.packs.Description("unet", chosen, prediction="eps")
    )
    mixed = small.models.load_unet(str(folder / "both.safetensors"))
    assert close(both, in_two_halves(mixed, small.combined(folder)))


def test_pack_applied_twice_is_applied_once(model, m2):
    once = small.with_pack(model, m2)
    twice = small.with_pack(once, m2)
    assert len(assigned.pack_patchers(twice)) == 1
    assert torch.equal(small.sample(twice), small.sample(once))


def test_empty_window_gives_the_model_back(model, m2, monkeypatch):
    monkeypatch.setattr(small.apply_pack.files, "pack_path", lambda name: m2)
    for at in (0.0, 0.5, 1.0):
        (given,) = execute(
            "ASDMApplyPack", model=model, pack_name=m2.name, start_percent=at, end_percent=at, strength=1.0
        )
        assert given is model


def test_window_that_ends_before_it_starts_is_refused(model, m2, monkeypatch):
    monkeypatch.setattr(small.apply_pack.files, "pack_path", lambda name: m2)
    with pytest.raises(ValueError, match="start before it ends"):
        execute("ASDMApplyPack", model=model, pack_name=m2.name, start_percent=0.6, end_percent=0.2, strength=1.0)


def test_plain_branch_beside_a_branch_with_a_pack(model, m2, plain_samples):
    played = small.with_pack(model, m2)
    first = small.sample(played)
    assert torch.equal(small.sample(model), plain_samples)
    assert torch.equal(small.sample(played), first)


# Nothing is left behind -----------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch):
    """Weak references to all runs of the test."""
    found = []

    class Watched(engine_run.Run):
        def __init__(self, *args):
            super().__init__(*args)
            found.append(weakref.ref(self))

    monkeypatch.setattr(wrappers, "Run", Watched)
    return found


def test_rerun_with_another_seed_and_back(model, m2, runs):
    played = small.with_pack(model, m2)
    first, second = small.sample(played, seed=1), small.sample(played, seed=2)
    assert not torch.equal(first, second)
    assert torch.equal(small.sample(played, seed=1), first)
    gc.collect()
    assert len(runs) == 3 and not any(ref() for ref in runs)


@pytest.mark.parametrize("error", [comfy.model_management.InterruptProcessingException, RuntimeError])
def test_stopped_run_leaves_nothing(model, m2, runs, error):
    played = small.with_pack(model, m2)
    whole = small.sample(played)
    before = state(played)

    def stop(step, *_):
        if step == 1:
            raise error("stop")

    with pytest.raises(error):
        small.sample(played, callback=stop)
    gc.collect()
    assert len(runs) == 2 and not any(ref() for ref in runs)
    assert state(played) == before
    assert torch.equal(small.sample(played), whole)


def test_memory_stays_flat_over_runs(model, m2):
    def tensors():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    counts = []
    for seed in range(4):
        small.sample(small.with_pack(model, m2), seed=seed)
        counts.append(tensors())
    assert counts[1] == counts[2] == counts[3]


def dead_entries():
    """Models in the host's list of loaded ones whose MODEL is gone while their weights are not."""
    return [entry for entry in comfy.model_management.current_loaded_models if entry.is_dead()]


def test_a_model_that_only_the_collector_finds_leaves_no_dead_entry(model, folder, m2):
    """As after an error, whose traceback holds the MODEL in a circle."""
    small.sample(small.with_pack(model, m2))
    other = small.with_pack(small.model(folder, seed=1), m2).clone().clone()
    small.sample(other)
    held = [other]
    held.append(held)
    del other, held
    gc.collect()
    assert not dead_entries()


def test_a_network_goes_with_its_last_model(folder, m2):
    """Without Python's search for circles, which may not come before the next is loaded."""
    model = small.with_pack(small.model(folder, seed=9), m2)
    small.sample(model, steps=1)
    gc.collect()
    gc.disable()
    try:
        small.sample(model, steps=1)
        gone = weakref.ref(model.model.diffusion_model)
        del model
        comfy.model_management.cleanup_models()
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("made", ["pack", "plan", "switch"])
def test_options_of_a_run_may_be_copied_whole(model, folder, m2, made):
    """As packs do that evaluate the network with other options."""
    on = {
        "pack": lambda: small.with_pack(model, m2),
        "plan": lambda: small.with_plan(model, small.module("asdm_core.inheritance").dial(SD, "fast")),
        "switch": lambda: switch.with_switch(model, small.with_pack(model, m2), switching.SwitchPoint(1, "step")),
    }[made]()

    def copies(args):
        options = copy.deepcopy(args["model_options"])
        again = comfy.samplers.calc_cond_batch(args["model"], args["conds"], args["input"], args["sigma"], options)
        assert all(a.shape == b.shape for a, b in zip(again, args["conds_out"], strict=True))
        return args["conds_out"]

    clone = on.clone()
    clone.set_model_sampler_pre_cfg_function(copies)
    assert small.sample(clone, steps=3).isfinite().all()


def test_a_switched_run_leaves_its_models_to_nobody(model, folder, m2):
    point = switching.SwitchPoint(0.5)
    switched = switch.with_switch(model.clone(), small.with_pack(small.model(folder, seed=1), m2), point)
    gc.collect()
    gc.disable()
    try:
        small.sample(switched)
        gone = weakref.ref(switched)
        del switched
        assert gone() is None  # not by the collector, before which the host would report a leak
    finally:
        gc.enable()
    assert not dead_entries()


def test_one_module_per_pack_file(model, m2):
    first, second = (next(iter(assigned.packs_of(small.with_pack(model, m2)).values())) for _ in range(2))
    assert first is not second and first.model is second.model


def test_changed_pack_file_is_read_again(model, folder):
    path = small.write_pack(folder / "changing.safetensors", seed=1)
    old = small.sample(small.with_pack(model, path))
    small.write_pack(path, seed=2)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 10**9))
    assert not torch.equal(small.sample(small.with_pack(model, path)), old)


# New UNet objects behind our back -------------------------------------------------------------------


def test_pack_plays_after_a_deep_copy(model, m2, dispatched):
    played = small.with_pack(model, m2)
    wanted = small.sample(played)
    count = len(dispatched)
    copy = played.clone(force_deepcopy=True)
    assert copy.model is not played.model
    assert torch.equal(small.sample(copy), wanted)
    assert len(dispatched) == 2 * count > 0


def test_pack_plays_on_a_clone_for_another_device(model, m2, dispatched):
    played = small.with_pack(model, m2)
    wanted = small.sample(played)
    count = len(dispatched)
    copy = played.deepclone_multigpu()
    own, theirs = (next(iter(assigned.packs_of(m).values())).model for m in (copy, played))
    assert own is not theirs
    assert torch.equal(small.sample(copy), wanted)
    assert len(dispatched) == 2 * count > 0


def test_a_pack_stands_where_its_model_does(model, m2):
    """As behind Select Model Device, whatever device is the host's default; there it has modules of its own."""
    here, there = model, model.clone()
    there.load_device, there.offload_device = torch.device("cpu", 1), torch.device("cpu", 2)
    (own,), (moved,) = (assigned.pack_patchers(small.with_pack(m, m2)) for m in (here, there))
    assert (own.load_device, own.offload_device) == (here.load_device, here.offload_device)
    assert (moved.load_device, moved.offload_device) == (there.load_device, there.offload_device)
    assert moved.model is not own.model
    copy = moved.clone(force_deepcopy=True)
    assert copy.load_device == there.load_device and copy.model is not moved.model


def on_two_devices(model):
    # The host cannot tell a second name of the CPU from a second device.
    second = model.deepclone_multigpu(new_load_device=torch.device("cpu", 0))
    second.is_multigpu_base_clone = True
    split = model.clone()
    split.set_additional_models("multigpu", [second])
    return split


@pytest.mark.sweep(1)
@pytest.mark.parametrize("split_first", [False, True])
def test_pack_plays_when_work_is_split_over_devices(model, m2, plain_samples, split_first):
    lora = small.lora()
    wanted = small.sample(small.add_lora(small.with_pack(model, m2), lora))
    played = small.with_pack(on_two_devices(model), m2) if split_first else on_two_devices(small.with_pack(model, m2))
    seen = set()
    forward = engine_run.BoundUNet._dispatch

    def dispatch(stage, *args):
        seen.add(id(stage))
        return forward(stage, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_run.BoundUNet, "_dispatch", dispatch)
        samples = small.sample(small.add_lora(played, lora))
    assert len(seen) == 2
    # Cond and uncond run in batches of one here and of two there.
    assert small.difference(samples, wanted) < 1e-4
    assert small.difference(wanted, plain_samples) > 0.01


def test_layers_are_timed_when_work_is_split_over_devices(model, m2):
    """Each device plays in a thread of its own."""
    played = small.with_speed(on_two_devices(small.with_pack(model, m2)))
    small.sample(played, steps=3)
    layers = small.last_times(played).layers
    whole = small.with_speed(small.with_pack(model, m2))
    small.sample(whole, steps=3)
    alone = small.last_times(whole).layers
    assert layers.keys() == alone.keys()
    assert all(calls == 2 * alone[what][1] for what, (_, calls) in layers.items())


def dual(model, negative_model):
    guider = nodes_custom_sampler.DualModelGuider.execute(
        model, small.cond(seed=1), 3.0, negative_model, small.cond(seed=2)
    ).args[0]
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 2)
    return guider.sample(
        noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True
    )


def test_pack_plays_in_its_own_model_only(model, folder, m2, dispatched):
    other = small.model(folder, seed=5)
    samples = dual(small.with_pack(model, m2), other)
    assert torch.equal(samples, dual(small.combined(folder), other))
    per_run = len(dispatched)
    dispatched.clear()
    small.sample(small.with_pack(model, m2), cfg=1.0)
    assert per_run == len(dispatched) > 0
