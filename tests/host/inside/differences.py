"""Packs of differences: the checkpoint's own weights and what training changed, whatever is on the MODEL besides."""

import functools
import gc
import weakref

import comfy.hooks
import comfy.lora
import comfy.model_management
import comfy.sd
import pytest
import small
import torch
from comfy_extras import nodes_hooks, nodes_model_advanced, nodes_model_merging
from in_host import execute, module

SD, assigned = small.SD, small.assigned
differences, identity = module("asdm_core.differences"), module("asdm_core.identity")
packs, notes = small.packs, module("nodes.engine.notes")
M2 = small.Architecture.preset("m2", SD)


@pytest.fixture(scope="module")
def lora():
    return small.lora()


@functools.cache
def changed():
    """Differences for the units of M2."""
    tensors = small.surgery.extract(small.weights(SD, 7), M2, M2.pack_units())
    return {k: t * 0.05 for k, t in tensors.items()}


def write(path, tensors, dtype=None, **more):
    teacher = identity.Checkpoint.of("teacher", small.weights(SD), SD)
    description = packs.Description("pack", M2, M2.pack_units(), difference_of=teacher, **more)
    packs.write_pack(path, tensors, description, dtype)
    return path


@pytest.fixture(scope="module")
def pack(folder):
    return write(folder / "difference.safetensors", changed())


@pytest.fixture(scope="module")
def nothing(folder):
    """The pack of the teacher's own units, none of them cut."""
    full = small.Architecture.full(SD)
    units = M2.pack_units()
    tensors = small.surgery.extract(small.weights(SD), full, units)
    absolute = folder / "own.safetensors"
    packs.write_pack(absolute, tensors, packs.Description("pack", full, units), None)
    description, zero = differences.to_difference(packs.open_pack(absolute), small.weights(SD), "teacher")
    path = folder / "zero.safetensors"
    packs.write_pack(path, zero, description, None)
    return path


def added(folder, seed=0, dtype=None):
    """The file of the sums, as a MODEL."""
    whole = small.weights(SD, seed)
    sums = {k: whole[k] + changed()[k] if k in changed() else whole[k] for k in M2.keys()}
    path = folder / f"sums-{seed}.safetensors"
    packs.write_unet(path, sums, packs.Description("unet", M2, prediction="eps"), dtype)
    return small.models.load_unet(str(path))


@pytest.mark.sweep(1)
@pytest.mark.parametrize("seed", [0, 3])
def test_it_plays_the_sum_with_the_checkpoints_own_weights(folder, pack, seed):
    played = small.with_pack(small.model(folder, seed=seed), pack)
    assert torch.equal(small.sample(played), small.sample(added(folder, seed)))


def test_patches_that_another_node_reads_itself_act_on_the_sum(folder, model, pack, monkeypatch):
    """As those of Fooocus inpaint: read before all others, in place of the host's own reading."""
    read = comfy.lora.calculate_weight

    def theirs(patches, weight, key, intermediate_dtype=torch.float32, original_weights=None):
        mine = [p for p in patches if isinstance(p[1], tuple) and p[1][0] == "theirs"]
        for strength, (_, (tensor,)), *_ in mine:
            weight += strength * tensor.to(weight)
        rest = [p for p in patches if not any(p is one for one in mine)]
        return read(rest, weight, key, intermediate_dtype, original_weights) if rest else weight

    monkeypatch.setattr(comfy.lora, "calculate_weight", theirs)
    generator = torch.Generator().manual_seed(5)
    keys = [key for key in M2.keys() if key.endswith(".weight") and M2.keys()[key].unit.address in M2.pack_units()][:9]
    change = {f"diffusion_model.{k}": 0.1 * torch.randn(M2.keys()[k].shape, generator=generator) for k in keys}

    def patched(m, kind):
        clone = m.clone()
        clone.add_patches({key: (kind, (tensor,)) for key, tensor in change.items()}, 0.7)
        return clone

    wanted = small.sample(patched(added(folder), "theirs"))
    assert small.difference(wanted, small.sample(added(folder))) > 1e-3
    for m in (small.with_pack(patched(model, "theirs"), pack), patched(small.with_pack(model, pack), "theirs")):
        assert small.difference(small.sample(m), wanted) < 1e-5
    lora = small.lora(seed=4)
    both = small.sample(small.add_lora(small.with_pack(patched(model, "theirs"), pack), lora))
    assert small.difference(both, small.sample(small.add_lora(patched(added(folder), "theirs"), lora))) < 1e-5


def test_zero_is_bit_identical_to_none(model, nothing, plain_samples, lora):
    played = small.with_pack(model, nothing)
    assert torch.equal(small.sample(played), plain_samples)
    wanted = small.sample(small.add_lora(model, lora))
    assert not torch.equal(wanted, plain_samples)
    # The LoRA lies in the live weights when the second pack is applied.
    assert torch.equal(small.sample(small.with_pack(small.add_lora(model, lora), nothing)), wanted)
    assert torch.equal(small.sample(small.add_lora(played, lora)), wanted)
    assert torch.equal(small.sample(model), plain_samples)


def test_zero_is_bit_identical_to_none_where_the_pack_plays_itself(model, nothing, plain_samples, lora, monkeypatch):
    """As before, but its units are not left to the checkpoint: it is the sum that must be exact."""
    monkeypatch.setattr(small.units.differences, "unchanged", lambda *_: frozenset())
    path = nothing.with_name("zero-played.safetensors")
    path.write_bytes(nothing.read_bytes())
    played = small.with_pack(model, path)
    assert len(assigned.providers_of(played)) == len(M2.pack_units())
    assert torch.equal(small.sample(played), plain_samples)
    wanted = small.sample(small.add_lora(model, lora))
    assert torch.equal(small.sample(small.add_lora(played, lora)), wanted)
    assert torch.equal(small.sample(small.with_pack(small.add_lora(model, lora), path)), wanted)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("dtype", ["fp8_e4m3fn", "fp8_e5m2"])
def test_checkpoints_in_fp8(folder, pack, nothing, lora, dtype):
    path = small.write_unet(folder / "for-fp8.safetensors")
    loaded = small.models.load_unet(path, dtype)
    plain = small.sample(loaded)
    assert torch.equal(small.sample(small.with_pack(loaded, nothing)), plain)
    with_lora = small.add_lora(loaded, lora)
    assert torch.equal(small.sample(small.with_pack(with_lora, nothing)), small.sample(with_lora))
    played = small.with_pack(loaded, pack)
    (patcher,) = assigned.packs_of(played).values()
    state = patcher.model.state_dict()
    rounded = getattr(torch, f"float8_{dtype.removeprefix('fp8_')}")
    for key, difference in changed().items():
        wanted = small.weights(SD)[key].to(rounded).float() + difference
        assert torch.equal(state[f"diffusion_model.{key}"], wanted), key
    assert small.difference(small.sample(played), plain) > 0.01


@pytest.mark.parametrize("form", ["comfy_quant", "scaled_fp8"])
def test_checkpoints_that_the_host_has_quantised(folder, pack, nothing, lora, form):
    held, numbers = small.quantised(small.weights(SD), form)
    loaded = comfy.sd.load_diffusion_model_state_dict(held)
    plain = small.sample(loaded)
    assert torch.equal(small.sample(small.with_pack(loaded, nothing)), plain)
    for played in (small.with_pack(loaded, pack), small.with_pack(small.add_lora(loaded, lora), pack)):
        (patcher,) = assigned.packs_of(played).values()
        state = patcher.model.state_dict()
        for key, difference in changed().items():
            wanted = numbers[key] + difference
            assert torch.allclose(state[f"diffusion_model.{key}"].float(), wanted, rtol=0, atol=1e-6), key
        assert small.difference(small.sample(played), plain) > 0.01


def test_half_precision_is_rounded_once(folder, pack):
    path = small.write_unet(folder / "half.safetensors", dtype=torch.float16)
    played = small.with_pack(small.models.load_unet(path), pack)
    (patcher,) = assigned.packs_of(played).values()
    for key, difference in changed().items():
        played_as = patcher.model.state_dict()[f"diffusion_model.{key}"]
        assert torch.equal(played_as, (small.weights(SD)[key].half().float() + difference).to(played_as.dtype)), key


def test_lora_before_and_after_acts_as_on_the_checkpoint(model, folder, pack, lora):
    wanted = small.sample(small.add_lora(added(folder), lora))
    before = small.sample(small.with_pack(small.add_lora(model, lora), pack))
    played = small.with_pack(model, pack)
    assert torch.equal(before, small.sample(small.add_lora(played, lora)))
    # The same sum in another order.
    assert small.difference(before, wanted) < 1e-5 < 0.01 < small.difference(before, small.sample(played))
    assert torch.equal(small.sample(small.with_pack(small.add_lora(model, lora), pack)), before)


def test_a_merge_acts_as_on_the_checkpoint(model, folder, pack, nothing, lora):
    ratio, other = 0.3, small.model(folder, seed=3)
    plain = small.merged(model, other, ratio)
    (merged,) = nodes_model_merging.ModelMergeSimple().merge(small.with_pack(model, pack), other, ratio)
    assert torch.equal(small.sample(merged), small.sample(small.with_pack(plain, pack)))
    first, second = small.weights(SD, 0), small.weights(SD, 3)
    blended = {k: ratio * first[k] + (1 - ratio) * second[k] for k in first}
    sums = {k: blended[k] + changed()[k] if k in changed() else blended[k] for k in M2.keys()}
    path = folder / "merged-sums.safetensors"
    packs.write_unet(path, sums, packs.Description("unet", M2, prediction="eps"))
    wanted = small.models.load_unet(str(path))
    assert small.difference(small.sample(merged), small.sample(wanted)) < 1e-3
    with_lora = small.add_lora(merged, lora)
    assert small.difference(small.sample(with_lora), small.sample(small.add_lora(wanted, lora))) < 1e-3
    assert torch.equal(small.sample(small.with_pack(plain, nothing)), small.sample(plain))


@pytest.mark.sweep(1)
@pytest.mark.parametrize("mode", list(comfy.hooks.EnumHookMode), ids=lambda mode: mode.name)
def test_hook_loras(model, folder, pack, nothing, lora, mode):
    def in_mode(model):
        model = model.clone()
        model.set_hook_mode(mode)
        return model

    hooks = comfy.hooks.create_hook_lora(lora=lora, strength_model=1.0, strength_clip=0.0)
    hooked = nodes_hooks.SetModelHooksOnCond().attach_hook(small.cond(seed=1), hooks)[0]
    run = {"positive": hooked, "negative": small.cond(seed=2)}
    played = small.sample(small.with_pack(in_mode(model), pack), **run)
    assert torch.equal(played, small.sample(in_mode(added(folder)), **run))
    plain = small.sample(in_mode(model), **run)
    assert torch.equal(small.sample(small.with_pack(in_mode(model), nothing), **run), plain)


@pytest.mark.parametrize("mode", list(comfy.hooks.EnumHookMode), ids=lambda mode: mode.name)
def test_a_checkpoint_as_hook_lora_acts_as_on_the_checkpoint(model, folder, pack, mode):
    """The host's Create Hook Model as LoRA. At strength 1 the prompts see the other checkpoint, with the difference."""
    other, played = small.model(folder, seed=3), small.with_pack(model, pack)
    played.set_hook_mode(mode)
    weights = comfy.hooks.get_patch_weights_from_model(other)
    hooks = comfy.hooks.create_hook_model_as_lora(weights, None, 1.0, 0.0)
    both = [nodes_hooks.SetModelHooksOnCond().attach_hook(small.cond(seed=seed), hooks)[0] for seed in (1, 2)]
    for _ in range(2):
        found = small.sample(played, positive=both[0], negative=both[1])
        assert small.difference(found, small.sample(small.with_pack(other, pack))) < 1e-3
    assert torch.equal(small.sample(played), small.sample(added(folder)))


def test_each_checkpoint_has_sums_of_its_own_made_once(folder, pack):
    first, second = small.model(folder), small.model(folder, seed=3)
    modules = [next(iter(assigned.packs_of(small.with_pack(m, pack)).values())).model for m in (first, first, second)]
    assert modules[0] is modules[1] is not modules[2]


def test_sums_stand_where_their_model_does(model, pack):
    there = model.clone()
    there.load_device = torch.device("cpu", 1)  # as Select Model Device sets it
    (own,), (moved,) = (small.assigned.pack_patchers(small.with_pack(m, pack)) for m in (model, there))
    assert moved.load_device == there.load_device != own.load_device and moved.model is not own.model


def test_sums_that_nobody_plays_are_given_back(folder, pack):
    model, kept = small.model(folder, seed=8), []
    for number in range(small.models.KEPT + 2):
        path = folder / f"sum-{number}.safetensors"
        path.write_bytes(pack.read_bytes())
        (patcher,) = assigned.packs_of(small.with_pack(model, path)).values()
        kept.append(weakref.ref(patcher.model))
        del patcher
    gc.collect()
    assert [there() is None for there in kept] == [True] * 2 + [False] * small.models.KEPT


@pytest.mark.sweep(1)
@pytest.mark.parametrize("copied", [lambda m: m.clone(force_deepcopy=True), lambda m: m.deepclone_multigpu()])
def test_it_plays_on_deep_copies(model, pack, lora, copied):
    played = small.with_pack(model, pack)
    wanted = small.sample(small.add_lora(played, lora))
    assert torch.equal(small.sample(small.add_lora(copied(played), lora)), wanted)


def test_little_memory(model, pack, lora):
    played = small.add_lora(small.with_pack(model, pack), lora)
    wanted = small.sample(played)
    with small.little_memory():
        assert torch.equal(small.sample(played), wanted)


def test_saved_as_one_file(model, folder, pack):
    save = module("nodes.save_unet")
    played = small.with_pack(model, pack)
    architecture, sources = save.played_architecture(played)
    found = save.played_weights(played, architecture, sources)
    for key, difference in changed().items():
        assert torch.equal(found[key], small.weights(SD)[key] + difference), key


def test_a_model_without_the_units_is_refused(folder, pack):
    pruned = small.models.load_unet(small.write_unet(folder / "pruned.safetensors", cut="down.0-2.1, up.1-3.1"))
    whole = folder / "all-of-m1.safetensors"
    full = small.Architecture.full(SD)
    teacher = identity.Checkpoint.of("teacher", small.weights(SD), SD)
    tensors = small.surgery.extract(small.weights(SD), full, ("down.0.1.resnet",))
    packs.write_pack(whole, tensors, packs.Description("pack", full, ("down.0.1.resnet",), difference_of=teacher), None)
    with pytest.raises(ValueError, match="down.0.1.resnet.*it is not there.*Give an unpruned checkpoint"):
        small.with_pack(pruned, whole)


# What is carried over from other units ----------------------------------------------------------------------------


CARRY = module("asdm_core.carry").Carry.within_blocks(M2, M2.pack_units(), 4)
CUT = "input_blocks.2.0.in_layers.2"  # of a unit that M2 cuts


@functools.cache
def matrices():
    generator = torch.Generator().manual_seed(11)
    return {k: 0.2 * torch.randn(s.shape, generator=generator) for k, s in CARRY.keys(M2).items()}


@pytest.fixture(scope="module")
def carrying(folder):
    """A pack that carries over what other units of its blocks have, as it comes from a training on weights(SD)."""
    tensors = {k: small.weights(SD)[k] + t for k, t in changed().items()} | matrices()
    loaded = packs.Loaded(folder / "c", packs.Description("pack", M2, M2.pack_units()), tensors)
    description, tensors = differences.to_difference(loaded, small.weights(SD), "teacher", CARRY)
    path = folder / "carrying.safetensors"
    packs.write_pack(path, tensors, description, None)
    return path


def carried_into(whole):
    """A checkpoint with the pack's units in it, by the formula."""
    sums = {k: whole[k] + changed()[k] if k in changed() else whole[k] for k in M2.keys()}
    for key, links in CARRY.links(M2).items():
        for link in links:
            sums[key] = sums[key] + link(whole[link.source] - small.weights(SD)[link.source], matrices())
    return sums


def as_model(folder, weights, name):
    path = folder / f"{name}.safetensors"
    packs.write_unet(path, weights, packs.Description("unet", M2, prediction="eps"))
    return small.models.load_unet(str(path))


@pytest.mark.parametrize("seed", [0, 3])
def test_it_plays_what_units_take_over(folder, carrying, seed):
    played = small.sample(small.with_pack(small.model(folder, seed=seed), carrying))
    wanted = small.sample(as_model(folder, carried_into(small.weights(SD, seed)), f"carried-{seed}"))
    assert small.difference(played, wanted) < 1e-3
    plain = small.sample(added(folder, seed))
    assert (small.difference(played, plain) > 0.05) == (seed != 0)  # in the teacher it is the difference alone


def with_change(size=0.5):
    """weights(SD) with a change of one weight that the pack cuts, and that change."""
    change = size * torch.randn(small.weights(SD)[f"{CUT}.weight"].shape, generator=torch.Generator().manual_seed(2))
    return {**small.weights(SD), f"{CUT}.weight": small.weights(SD)[f"{CUT}.weight"] + change}, change


def cut_lora():
    """The same change as a LoRA of full rank."""
    change = with_change()[1]
    return {f"diffusion_model.{CUT}.weight": ("diff", (change,))}


def test_a_patch_of_a_unit_that_is_cut_is_taken_over(model, folder, carrying, pack):
    wanted = small.sample(as_model(folder, carried_into(with_change()[0]), "patched"))
    before, after = model.clone(), small.with_pack(model, carrying)
    before.add_patches(cut_lora())
    after.add_patches(cut_lora())
    plain = small.sample(small.with_pack(model, carrying))
    assert small.difference(plain, wanted) > 0.01
    for played in (small.with_pack(before, carrying), after):
        assert small.difference(small.sample(played), wanted) < 1e-3
    assert torch.equal(small.sample(small.with_pack(before, pack)), small.sample(small.with_pack(model, pack)))
    assert torch.equal(small.sample(small.with_pack(model, carrying)), plain)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("mode", list(comfy.hooks.EnumHookMode), ids=lambda mode: mode.name)
def test_a_hook_on_a_unit_that_is_cut_is_taken_over(model, folder, carrying, mode):
    shape = small.weights(SD)[f"{CUT}.weight"].shape
    up, down = 0.1 * torch.randn(shape[0], 2), torch.randn(2, *shape[1:])
    lora = {
        f"diffusion_model.{CUT}.lora_up.weight": up[..., None, None],
        f"diffusion_model.{CUT}.lora_down.weight": down,
    }
    strength = 0.7
    hooks = comfy.hooks.create_hook_lora(lora=lora, strength_model=strength, strength_clip=0.0)
    both = [nodes_hooks.SetModelHooksOnCond().attach_hook(small.cond(seed=seed), hooks)[0] for seed in (1, 2)]
    played = small.with_pack(model, carrying)
    played.set_hook_mode(mode)
    weights = dict(small.weights(SD))
    weights[f"{CUT}.weight"] = weights[f"{CUT}.weight"] + strength * (up @ down.flatten(1)).view(shape)
    wanted = small.sample(
        as_model(folder, carried_into(weights), "hooked"), positive=small.cond(seed=1), negative=small.cond(seed=2)
    )
    for _ in range(2):
        found = small.sample(played, positive=both[0], negative=both[1])
        assert small.difference(found, wanted) < 1e-3
    plain = small.sample(small.with_pack(model, carrying))
    assert torch.equal(small.sample(played), plain) and small.difference(plain, wanted) > 0.01


def test_merges_and_checkpoints_as_hooks_are_taken_over(model, folder, carrying):
    other = small.model(folder, seed=3)
    first, second = small.weights(SD, 0), small.weights(SD, 3)
    (merged,) = nodes_model_merging.ModelMergeSimple().merge(small.with_pack(model, carrying), other, 0.3)
    whole = as_model(folder, carried_into({k: 0.3 * first[k] + 0.7 * second[k] for k in first}), "merged-c")
    assert small.difference(small.sample(merged), small.sample(whole)) < 1e-3
    weights = comfy.hooks.get_patch_weights_from_model(other)
    hooks = comfy.hooks.create_hook_model_as_lora(weights, None, 1.0, 0.0)
    both = [nodes_hooks.SetModelHooksOnCond().attach_hook(small.cond(seed=seed), hooks)[0] for seed in (1, 2)]
    found = small.sample(small.with_pack(model, carrying), positive=both[0], negative=both[1])
    assert small.difference(found, small.sample(small.with_pack(other, carrying))) < 1e-3


def test_in_fp8_a_pack_that_carries_something_keeps_the_precision_of_its_units(folder, carrying):
    half = folder / "carrying-half.safetensors"
    pack = packs.open_pack(carrying)
    packs.write_pack(half, pack.tensors, pack.description, torch.float16)
    loaded = small.models.load_unet(small.write_unet(folder / "for-fp8-c.safetensors"), "fp8_e4m3fn")
    (patcher,) = assigned.packs_of(small.with_pack(loaded, half)).values()
    assert {p.dtype for p in patcher.model.parameters()} == {torch.float16}


def test_what_is_carried_over_is_in_what_is_saved(folder, carrying):
    save = module("nodes.save_unet")
    played = small.with_pack(small.model(folder, seed=3), carrying)
    architecture, sources = save.played_architecture(played)
    found = save.played_weights(played, architecture, sources)
    for key, tensor in carried_into(small.weights(SD, 3)).items():
        assert torch.allclose(found[key], tensor, rtol=1e-4, atol=1e-4), key


def test_a_fit_begins_at_what_is_carried_over_loras_on_cut_units_included(folder, carrying):
    fitting = module("nodes.engine.fitting")
    model = small.model(folder, seed=3).clone()
    model.add_patches(cut_lora())
    whole = {**small.weights(SD, 3), f"{CUT}.weight": small.weights(SD, 3)[f"{CUT}.weight"] + with_change()[1]}
    wanted = carried_into(whole)
    with fitting.learning():
        copied = fitting.Copy(model, packs.open_pack(carrying))
        try:
            for key, p in copied.parameters.items():
                assert torch.allclose(p, wanted[key], rtol=1e-4, atol=1e-4), key
            description, _ = copied.learned({})
        finally:
            copied.close()
    assert description.carry is None and description.made_for


def test_a_model_that_lacks_what_is_carried_over_is_refused(folder, carrying):
    pruned = small.models.load_unet(small.write_unet(folder / "pruned-c.safetensors", cut="down.0.1.resnet"))
    with pytest.raises(ValueError, match="down.0.1.resnet.*it is not there.*Give an unpruned checkpoint"):
        small.with_pack(pruned, carrying)


# Made for another checkpoint --------------------------------------------------------------------------------------


@pytest.fixture
def said(monkeypatch):
    texts = []
    monkeypatch.setattr(notes, "speaker", lambda node_id="": lambda text, report=False: texts.append(text))
    return texts


@pytest.mark.sweep(1)
@pytest.mark.parametrize("dtype", ["default", "fp8_e4m3fn"])
def test_another_checkpoint_is_told_in_each_run(folder, said, dtype):
    mine, other = (
        small.models.load_unet(small.write_unet(folder / f"one-{seed}.safetensors", seed=seed), dtype)
        for seed in (0, 3)
    )
    made_for = identity.Checkpoint.of("one-0.safetensors", small.weights(SD), SD)
    path = write(folder / "bound.safetensors", changed(), made_for=made_for)
    small.sample(small.with_pack(mine, path))
    small.sample(small.with_pack(small.add_lora(mine, small.lora()), path))
    assert not said
    played = small.with_pack(other, path)
    for _ in range(2):
        said.clear()
        small.sample(played)
        (text,) = said
        assert "bound.safetensors was made for one-0.safetensors" in text and "Fit Pack" in text


def test_a_pack_of_weights_plays_where_the_checkpoint_is_no_plain_numbers(folder, said):
    """To be told apart, a checkpoint need not be read as a whole."""
    made_for = identity.Checkpoint.of("one.safetensors", small.weights(SD), SD)
    path = folder / "bound-weights.safetensors"
    tensors = small.surgery.extract(small.weights(SD, 1), M2, M2.pack_units())
    packs.write_pack(path, tensors, packs.Description("pack", M2, M2.pack_units(), made_for=made_for), None)
    model = small.models.load_unet(small.write_unet(folder / "blocks.safetensors"))
    (
        small.comfy.utils.get_attr(model.model.diffusion_model, "input_blocks.1.1.transformer_blocks.0.attn1.to_q")
    ).weight = torch.nn.Parameter(torch.zeros(10, dtype=torch.uint8).as_subclass(Blocks), requires_grad=False)
    played = small.with_pack(model, path)
    assert assigned.packs_of(played) and not assigned.assigned_of(played).words
    with pytest.raises(ValueError, match="held as Blocks.*in fp16, bf16 or fp8 by the stock nodes"):
        small.with_pack(model, write(folder / "d.safetensors", changed()))


class Blocks(torch.Tensor):
    """As GGUF's nodes hold weights: bytes, of which their layers make numbers."""


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_pack_for_another_prediction_is_told(model, folder, said, prediction):
    tensors = small.surgery.extract(small.weights(SD, 1), M2, M2.pack_units())
    path = folder / f"for-{prediction}.safetensors"
    packs.write_pack(path, tensors, packs.Description("pack", M2, M2.pack_units(), prediction), None)
    played = small.with_pack(model, path)
    small.sample(played)
    assert [("predicts v, and this MODEL's predicts the noise" in text) for text in said] == [True] * (
        prediction == "v"
    )
    said.clear()
    (as_v,) = nodes_model_advanced.ModelSamplingDiscrete().patch(played, "v_prediction", False)
    small.sample(as_v)
    assert [("predicts the noise, and this MODEL's predicts v" in text) for text in said] == [True] * (
        prediction == "eps"
    )


def test_the_node_plays_it(model, folder, pack, monkeypatch):
    monkeypatch.setattr(small.apply_pack.files, "pack_path", lambda name: pack)
    (played,) = execute(
        "ASDMApplyPack", model=model, pack_name=pack.name, start_percent=0.0, end_percent=1.0, strength=1.0
    )
    assert torch.equal(small.sample(played), small.sample(added(folder)))
