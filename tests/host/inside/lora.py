"""LoRAs and merges on a MODEL with a pack: they act as on a MODEL of one file with the same weights."""

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import pytest
import small
import torch
from comfy_extras import nodes_hooks, nodes_model_merging

SD, assigned = small.SD, small.assigned


@pytest.fixture(scope="module")
def lora():
    return small.lora()


def test_lora_before_and_after_the_pack(model, m2, combined, lora):
    wanted = small.sample(small.add_lora(combined, lora))
    before = small.with_pack(small.add_lora(model, lora), m2)
    after = small.add_lora(small.with_pack(model, m2), lora)
    assert torch.equal(small.sample(before), wanted)
    assert torch.equal(small.sample(after), wanted)
    assert small.difference(wanted, small.sample(combined)) > 0.01


# LoRAs trained on a pruned UNet itself --------------------------------------------------------------------

MATCHED = "down.2.*.transformer.0|3|6|9, up.0.0-1.transformer.0|3|6|9"
PRUNED = {
    "base": (SD, lambda: small.Architecture.preset("base", SD)),
    "small": (SD, lambda: small.Architecture.preset("small", SD)),
    "ssd-1b": (small.SDXL, lambda: small.Architecture.preset("ssd-1b", small.SDXL)),
    "koala-700m": (small.SDXL, lambda: small.Architecture.preset("koala-700m", small.SDXL)),
    "ssd-1b, matched": (small.SDXL, lambda: small.Architecture.preset("ssd-1b", small.SDXL).keeping(MATCHED)),
}


def spelled_by_peft(lora, config):
    """A LoRA of kohya's under the names of PEFT, by way of diffusers' own names."""
    modules = {
        "lora_unet_" + (name := slot.unit.key(slot.tensor, "diffusers").removesuffix(".weight")).replace(".", "_"): name
        for slot in small.addresses.keys(config, "diffusers").values()
    }
    endings = {"lora_up.weight": "lora_B.weight", "lora_down.weight": "lora_A.weight", "alpha": "alpha"}
    return {
        f"base_model.model.{modules[module]}.{endings[ending]}": tensor
        for (module, _, ending), tensor in ((key.partition("."), tensor) for key, tensor in lora.items())
    }


@pytest.mark.sweep(1)
@pytest.mark.parametrize("name", PRUNED)
def test_a_lora_of_the_pruned_unet_acts_as_with_the_stock_loader(folder, caplog, name):
    config, chosen = PRUNED[name][0], PRUNED[name][1]()
    path = folder / f"{name}-with-its-own-lora.safetensors"
    description = small.packs.Description("unet", chosen, prediction="eps")
    small.packs.write_unet(path, small.surgery.cut(small.weights(config), chosen)[0], description)
    own = small.lora(chosen.renumbered.config)
    stock = small.sample(small.add_lora(comfy.sd.load_diffusion_model(str(path)), own), config)
    loaded = small.models.load_unet(str(path))
    caplog.clear()
    ours = small.sample(small.add_lora(loaded, own), config)
    assert "ot loaded" not in caplog.text and "NOT LOADED" not in caplog.text
    assert small.difference(ours, stock) < 1e-5 < 0.01 < small.difference(ours, small.sample(loaded, config))
    by_peft = small.sample(small.add_lora(loaded, spelled_by_peft(own, chosen.renumbered.config)), config)
    assert torch.equal(by_peft, ours)
    # One of the original still lands at its own addresses: what it does to the layers that are left.
    of_original = small.lora(config)
    here = chosen.keys()
    names = small.addresses.lora_names(config)
    left = {k: v for k, v in of_original.items() if f"{names[k.split('.')[0]]}.weight" in here}
    both = [
        small.sample(small.add_lora(small.models.load_unet(str(path), lora_names=how), file), config)
        for how, file in (("auto", of_original), ("original", left))
    ]
    assert torch.equal(*both) and not torch.equal(both[0], ours)


def test_a_lora_that_could_be_either_is_told(folder, caplog):
    path = small.write_unet(folder / "base-either.safetensors", cut="down.0-2.1, up.1-3.1")
    loaded = small.models.load_unet(path)
    name = "lora_unet_up_blocks_1_attentions_1_proj_out"
    one = {k: v for k, v in small.lora().items() if k.startswith(f"{name}.")}
    small.add_lora(loaded, one)
    assert "set lora_names of Load Pruned UNet to own" in caplog.text


def test_lora_acts_on_the_packs_own_units(model, m2, lora):
    units = {u.ldm for u in small.addresses.walk(SD) if u.address in small.Architecture.preset("m2", SD).pack_units()}
    names = small.addresses.lora_names(SD)
    of_pack = {k: v for k, v in lora.items() if names[k.split(".")[0]].startswith(tuple(f"{u}." for u in units))}
    assert 0 < len(of_pack) < len(lora)
    played = small.with_pack(model, m2)
    assert small.difference(small.sample(small.add_lora(played, of_pack)), small.sample(played)) > 0.001


def test_strength_changes_and_removal_leave_no_trace(model, m2, combined, lora):
    played = small.with_pack(model, m2)
    without = small.sample(played)
    for strength in (1.0, -0.5, 0.3):
        assert torch.equal(
            small.sample(small.add_lora(played, lora, strength)), small.sample(small.add_lora(combined, lora, strength))
        )
    assert torch.equal(small.sample(played), without)


def test_two_loras_one_on_each_side_of_the_pack(model, m2, combined, lora):
    second = small.lora(seed=1)
    played = small.add_lora(small.with_pack(small.add_lora(model, lora), m2), second, 0.5)
    wanted = small.add_lora(small.add_lora(combined, lora), second, 0.5)
    assert torch.equal(small.sample(played), small.sample(wanted))


def test_same_stack_is_not_patched_again(model, m2, lora, monkeypatch):
    played = small.add_lora(small.with_pack(model, m2), lora)
    small.sample(played)
    patched = []
    patch = comfy.model_patcher.ModelPatcher.patch_weight_to_device
    monkeypatch.setattr(
        comfy.model_patcher.ModelPatcher,
        "patch_weight_to_device",
        lambda self, key, *a, **k: patched.append(key) or patch(self, key, *a, **k),
    )
    small.sample(played, seed=1)
    assert not patched
    small.sample(small.add_lora(small.with_pack(model, m2), lora, 0.7))
    assert patched


def test_lora_on_one_branch_only(model, m2, lora):
    played = small.with_pack(model, m2)
    with_lora = small.add_lora(played, lora)
    a, b = small.sample(played), small.sample(with_lora)
    assert not torch.equal(a, b)
    for _ in range(2):
        assert torch.equal(small.sample(played), a)
        assert torch.equal(small.sample(with_lora), b)


def test_merge_blends_the_checkpoint_and_not_the_pack(model, folder, m2):
    ratio = 0.5
    other = small.model(folder, seed=3)
    (merged,) = nodes_model_merging.ModelMergeSimple().merge(small.with_pack(model, m2), other, ratio)
    before = small.merged(model, other, ratio)
    samples = small.sample(merged)
    assert torch.equal(samples, small.sample(small.with_pack(before, m2)))

    chosen = small.Architecture.preset("m2", SD)
    first, second = small.weights(SD, 0), small.weights(SD, 3)
    blended = {k: ratio * first[k] + (1 - ratio) * second[k] for k in first}
    weights = small.surgery.combine(blended, small.weights(SD, 1), chosen, chosen.pack_units())
    path = folder / "blended.safetensors"
    small.packs.write_unet(path, weights, small.packs.Description("unet", chosen, prediction="eps"))
    assert small.difference(samples, small.sample(small.models.load_unet(str(path)))) < 1e-3


def test_lora_after_a_merge_acts_on_the_pack(model, folder, m2, lora):
    merged = small.merged(small.with_pack(model, m2), small.model(folder, seed=3), 0.5)
    samples = small.sample(small.add_lora(merged, lora))
    before = small.merged(model, small.model(folder, seed=3), 0.5)
    assert torch.equal(samples, small.sample(small.with_pack(small.add_lora(before, lora), m2)))
    assert not torch.equal(samples, small.sample(merged))


# LoRAs in hooks -------------------------------------------------------------------------------------


@pytest.fixture(params=list(comfy.hooks.EnumHookMode), ids=lambda mode: mode.name)
def mode(request):
    return request.param


def hooked(lora, strength=1.0, keyframes=(), seed=1):
    """Conditioning with a LoRA of its own, whose strength follows keyframes (strength, start), by the stock nodes."""
    hooks = comfy.hooks.create_hook_lora(lora=lora, strength_model=strength, strength_clip=0.0)
    group = None
    for multiplier, start in keyframes:
        (group,) = nodes_hooks.CreateHookKeyframe().create_hook_keyframe(multiplier, start, prev_hook_kf=group)
    (hooks,) = nodes_hooks.SetHookKeyframes().set_hook_keyframes(hooks, group)
    return nodes_hooks.SetModelHooksOnCond().attach_hook(small.cond(seed=seed), hooks)[0]


def in_mode(model, mode):
    model = model.clone()
    model.set_hook_mode(mode)
    return model


def pack_weights(model):
    """The weights of a MODEL's pack as they lie in memory now."""
    (patcher,) = assigned.packs_of(model).values()
    return {k.removeprefix("diffusion_model."): v.clone() for k, v in patcher.model.state_dict().items()}


@pytest.mark.sweep(1)
def test_hook_lora_on_one_prompt(model, m2, combined, lora, mode):
    run = {"positive": hooked(lora), "negative": small.cond(seed=2)}
    played = small.with_pack(in_mode(model, mode), m2)
    samples = small.sample(played, **run)
    left = pack_weights(played)
    assert torch.equal(samples, small.sample(in_mode(combined, mode), **run))
    assert all(torch.equal(v, small.weights(SD, 1)[k]) for k, v in left.items())
    plain = small.sample(played)
    assert small.difference(samples, plain) > 0.01
    assert torch.equal(small.sample(small.with_pack(model, m2)), plain)


@pytest.mark.sweep(1)
def test_hook_lora_with_keyframes(model, m2, combined, lora, mode):
    run = {
        "positive": hooked(lora, keyframes=[(1.0, 0.0), (0.3, 0.3), (0.0, 0.6)]),
        "negative": hooked(lora, -0.5, seed=2),
        "steps": 4,
    }
    played = small.with_pack(in_mode(model, mode), m2)
    for _ in range(2):
        assert torch.equal(small.sample(played, **run), small.sample(in_mode(combined, mode), **run))


@pytest.mark.sweep(1)
def test_a_keyframe_takes_the_hooks_off_the_pack_as_well(model, m2, combined, lora, mode):
    """The host takes them off at each one, and a prompt without hooks that comes first is to see none."""
    keyframes = [(1.0, 0.0), (0.3, 0.3), (0.0, 0.6)]
    played = small.with_pack(in_mode(model, mode), m2)
    for run in (
        {"positive": small.cond(seed=1), "negative": hooked(lora, keyframes=keyframes, seed=2)},
        {"positive": small.cond(seed=1) + hooked(lora, keyframes=keyframes, seed=3), "negative": small.cond(seed=2)},
    ):
        found = [small.sample(m, steps=6, **run) for m in (played, in_mode(combined, mode))]
        assert torch.equal(*found)


@pytest.mark.sweep(1)
def test_hook_lora_over_an_ordinary_one(model, m2, combined, lora, mode):
    run = {"positive": hooked(small.lora(seed=1)), "negative": small.cond(seed=2)}
    played = small.with_pack(in_mode(small.add_lora(model, lora), mode), m2)
    assert torch.equal(small.sample(played, **run), small.sample(in_mode(small.add_lora(combined, lora), mode), **run))


def test_stopped_run_with_a_hook_lora_leaves_the_packs_weights(model, m2, lora, mode):
    played = small.with_pack(in_mode(model, mode), m2)
    plain = small.sample(played)

    def stop(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        small.sample(played, positive=hooked(lora), negative=small.cond(seed=2), callback=stop)
    assert all(torch.equal(v, small.weights(SD, 1)[k]) for k, v in pack_weights(played).items())
    assert torch.equal(small.sample(played), plain)


# Little memory --------------------------------------------------------------------------------------


def test_pack_with_lora_on_little_memory(model, m2, combined, lora):
    wanted = small.sample(small.add_lora(combined, lora))
    with small.little_memory():
        assert torch.equal(small.sample(small.add_lora(small.with_pack(model, m2), lora)), wanted)
