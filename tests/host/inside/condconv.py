"""Further experts on convolutions of a MODEL: the MODEL's own weights stay the first expert, whoever changes them."""

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import pytest
import small
import torch
from comfy_extras import nodes_hooks
from in_host import execute, module

SD, assigned = small.SD, small.assigned
inheritance = module("asdm_core.inheritance")
CondConv = small.condconv.CondConv
M2 = small.Architecture.preset("m2", SD)
# All 3x3 convolutions of M2's own layers.
SHALLOW = tuple(a for a, conv in small.condconv.convolutions(SD).items() if conv.unit.address in M2.own)


@pytest.fixture
def model(loaded, plain_samples):
    """A stock MODEL, which must play the same after the test as before."""
    yield loaded
    assert torch.equal(small.sample(loaded), plain_samples)


@pytest.fixture(scope="module")
def experts(folder):
    return small.write_experts(folder / "experts.safetensors", CondConv(dict.fromkeys(SHALLOW, 3)))


def with_reference(model, path, strength=1.0):
    """A deep copy of a MODEL whose convolutions compute the formula from their own weights, in plain torch."""
    loaded = small.packs.open_pack(path)
    clone = model.clone(force_deepcopy=True)
    for conv in loaded.description.convs:
        layer = clone.model.diffusion_model.get_submodule(conv.path("ldm"))
        tensors = {leaf: loaded.tensors[conv.key(leaf)] for leaf in loaded.description.condconv.shapes(conv)}

        def forward(x, layer=layer, tensors=tensors):
            out = []
            for sample in x:
                r = torch.sigmoid(tensors["router.weight"] @ sample.mean((1, 2)) + tensors["router.bias"])
                kernels = zip(
                    r, tensors["experts.weight"].chunk(len(r)), tensors["experts.bias"].chunk(len(r)), strict=True
                )
                weight, bias = layer.weight.clone(), layer.bias.clone()
                for r_k, w, b in kernels:
                    weight, bias = weight + strength * r_k * w, bias + strength * r_k * b
                out.append(torch.nn.functional.conv2d(sample[None], weight, bias, layer.stride, layer.padding))
            return torch.cat(out)

        layer.forward = forward
    return clone


# Exactness ------------------------------------------------------------------------------------------


def test_strength_zero_is_no_pack(model, experts, plain_samples, monkeypatch):
    assert small.with_pack(model, experts, strength=0.0) is model
    monkeypatch.setattr(small.apply_pack.files, "pack_path", lambda name: experts)
    (given,) = execute(
        "ASDMApplyPack", model=model, pack_name=experts.name, start_percent=0.0, end_percent=1.0, strength=0.0
    )
    assert given is model


def test_differences_of_zero_change_no_bit(model, folder, plain_samples):
    path = small.write_experts(folder / "zero.safetensors", CondConv(dict.fromkeys(SHALLOW, 3)), how="zero")
    assert torch.equal(small.sample(small.with_pack(model, path)), plain_samples)
    for batch in (1, 3):
        assert torch.equal(small.sample(small.with_pack(model, path), batch=batch), small.sample(model, batch=batch))


@pytest.mark.sweep(1)
@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("batch", [1, 2])
def test_equals_the_formula_on_the_models_own_weights(model, experts, plain_samples, strength, batch):
    played = small.sample(small.with_pack(model, experts, strength=strength), batch=batch)
    assert small.difference(played, small.sample(with_reference(model, experts, strength), batch=batch)) < 1e-4
    assert small.difference(played, small.sample(model, batch=batch)) > 0.01


def test_mixture_with_an_expert_that_is_the_model_itself(model, folder, plain_samples):
    # r_1 W_1 + r_2 W_1 = W_1 where the routes are 1/4 and 3/4.
    address = "up.3.2.resnet.conv2"
    settings = CondConv({address: 2}, "mixture")
    conv = small.condconv.convolution(SD, address)
    tensors = {conv.key(f"experts.{leaf}"): small.weights(SD)[conv.key(leaf)] for leaf in ("weight", "bias")}
    tensors |= {
        conv.key("router.weight"): torch.zeros(2, 32),
        conv.key("router.bias"): torch.logit(torch.tensor([0.25, 0.75])),
    }
    description = small.packs.Description("pack", small.Architecture.full(SD), condconv=settings)
    small.packs.write_pack(folder / "mixture.safetensors", tensors, description, None)
    assert small.difference(small.sample(small.with_pack(model, folder / "mixture.safetensors")), plain_samples) < 1e-5


def test_layers_that_unpack_their_own_numbers_are_asked_for_them(model, experts):
    """As those of GGUF, whose weights are blocks of bytes."""
    wanted = small.sample(small.with_pack(model, experts))
    asked = []

    def unpacking(layer):
        def cast_bias_weight(x):
            asked.append(x.shape)
            return layer.weight, layer.bias

        return cast_bias_weight

    convs = [m for m in model.model.diffusion_model.modules() if isinstance(m, torch.nn.Conv2d)]
    for conv in convs:
        conv.cast_bias_weight = unpacking(conv)
    try:
        assert torch.equal(small.sample(small.with_pack(model, experts)), wanted) and asked
    finally:
        for conv in convs:
            del conv.cast_bias_weight


def test_samples_of_a_batch_are_as_alone(model, experts):
    played = small.with_pack(model, experts)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    together = small.run(played, noise, torch.zeros_like(noise))
    for i in range(2):
        alone = small.run(played, noise[i : i + 1], torch.zeros(1, 4, 16, 16))
        assert small.difference(together[i : i + 1], alone) < 1e-4
    assert small.difference(together[:1], together[1:]) > 0.1


def test_window_plays_its_steps_only(model, experts):
    early = small.sample(small.with_pack(model, experts, 0.0, 0.4), steps=4)
    whole = small.with_pack(model, experts)
    halfway = small.sample(whole, steps=4, last_step=2)
    wanted = small.run(model, torch.zeros_like(halfway), halfway, steps=4, start_step=2, disable_noise=True)
    assert small.difference(early, wanted) < 1e-5


# Whose convolutions ---------------------------------------------------------------------------------


def test_experts_join_the_units_of_another_pack(model, folder, m2, experts):
    wanted = small.sample(with_reference(small.combined(folder), experts))
    for played in (
        small.with_pack(small.with_pack(model, m2), experts),
        small.with_pack(small.with_pack(model, experts), m2),
    ):
        assert small.difference(small.sample(played), wanted) < 1e-4
    assert small.difference(wanted, small.sample(small.combined(folder))) > 0.01


def test_experts_and_their_own_units_in_one_pack(model, folder, experts):
    path = small.write_experts(folder / "both.safetensors", CondConv(dict.fromkeys(SHALLOW, 3)), units=M2.pack_units())
    both = small.sample(small.with_pack(model, path))
    assert small.difference(both, small.sample(with_reference(small.combined(folder), path))) < 1e-4
    assert torch.equal(small.sample(small.with_pack(model, path, strength=0.0)), small.sample(small.combined(folder)))


def test_experts_of_a_packs_own_units_join_no_other(model, folder, m2):
    path = small.write_experts(
        folder / "both-2.safetensors", CondConv(dict.fromkeys(SHALLOW, 2)), units=M2.pack_units(), student=2
    )
    assert torch.equal(
        small.sample(small.with_pack(small.with_pack(model, path), m2)), small.sample(small.with_pack(model, m2))
    )


def test_of_two_packs_of_experts_the_later_one_holds(model, folder, experts):
    other = small.write_experts(folder / "other.safetensors", CondConv(dict.fromkeys(SHALLOW, 2)), seed=7)
    assert torch.equal(
        small.sample(small.with_pack(small.with_pack(model, experts), other)),
        small.sample(small.with_pack(model, other)),
    )


def test_experts_join_a_pruned_unet(folder, experts):
    pruned = small.combined(folder)
    assert (
        small.difference(small.sample(small.with_pack(pruned, experts)), small.sample(with_reference(pruned, experts)))
        < 1e-4
    )


def test_inspect_model_names_the_pack_of_experts(model, experts):
    facts, _ = module("nodes.inspect_model").describe(small.with_pack(model, experts), 128, 128, 0.0)
    assert facts["packs"] == ["experts.safetensors"]
    assert [row["unit"] for row in facts["units"] if row.get("experts_of")] == list(
        small.packs.open_pack(experts).description.expert_units
    )


# Refusals -------------------------------------------------------------------------------------------


def test_experts_for_units_that_are_cut_are_refused(model, folder, m2):
    path = small.write_experts(folder / "whole.safetensors", CondConv({"down.0.1.resnet.conv1": 2}))
    for cut in (small.combined(folder), small.with_pack(model, m2)):
        with pytest.raises(
            ValueError, match="whole.safetensors has experts for down.0.1.resnet, which is cut in this MODEL"
        ):
            small.with_pack(cut, path)


def test_cut_later_the_experts_have_nothing_to_join(model, folder, m2):
    path = small.write_experts(folder / "whole.safetensors", CondConv({"down.0.1.resnet.conv1": 2}))
    assert torch.equal(
        small.sample(small.with_pack(small.with_pack(model, path), m2)), small.sample(small.with_pack(model, m2))
    )


def test_strength_of_a_pack_without_experts_is_refused(model, m2):
    with pytest.raises(
        ValueError, match="strength is 0.5, and m2.safetensors has nothing .* played in part.* Set strength to 1"
    ):
        small.with_pack(model, m2, strength=0.5)


def test_save_unet_refuses_experts(model, experts):
    with pytest.raises(ValueError, match="several experts, which a UNet file of the ordinary form cannot hold"):
        execute("ASDMSaveUNet", model=small.with_pack(model, experts), filename_prefix="test", dtype="fp32")


# LoRA, casts, little memory, new UNet objects, compile ----------------------------------------------


def test_lora_before_and_after_acts_on_the_first_expert(model, experts):
    lora = small.lora()
    before = small.sample(small.with_pack(small.add_lora(model, lora), experts))
    after = small.sample(small.add_lora(small.with_pack(model, experts), lora))
    assert torch.equal(before, after)
    assert small.difference(after, small.sample(with_reference(small.add_lora(model, lora), experts))) < 1e-4
    names = {f"lora_unet_{small.condconv.convolution(SD, a).path('diffusers')}".replace(".", "_") for a in SHALLOW}
    of_convs = {k: v for k, v in lora.items() if k.split(".")[0] in names}
    assert len(of_convs) == 3 * len(SHALLOW)
    played = small.with_pack(model, experts)
    assert small.difference(small.sample(small.add_lora(played, of_convs)), small.sample(played)) > 0.01


def test_lora_on_experts_of_a_pack(model, folder, m2, experts):
    lora = small.lora()
    played = small.sample(small.add_lora(small.with_pack(small.with_pack(model, m2), experts), lora))
    assert (
        small.difference(played, small.sample(with_reference(small.add_lora(small.combined(folder), lora), experts)))
        < 1e-4
    )


@pytest.mark.sweep(1)
@pytest.mark.parametrize("mode", list(comfy.hooks.EnumHookMode), ids=lambda mode: mode.name)
def test_hook_lora_acts_on_the_first_expert(model, experts, mode):
    hooks = comfy.hooks.create_hook_lora(lora=small.lora(), strength_model=1.0, strength_clip=0.0)
    run = {
        "positive": nodes_hooks.SetModelHooksOnCond().attach_hook(small.cond(seed=1), hooks)[0],
        "negative": small.cond(seed=2),
    }
    hooked = model.clone()
    hooked.set_hook_mode(mode)
    played = small.sample(small.with_pack(hooked, experts), **run)
    assert small.difference(played, small.sample(with_reference(hooked, experts), **run)) < 1e-4
    assert small.difference(played, small.sample(small.with_pack(model, experts))) > 0.01


@pytest.mark.sweep(1)
@pytest.mark.parametrize("dtype", ["fp8_e4m3fn", "fp8_e5m2"])
def test_models_in_fp8(folder, experts, dtype):
    path = small.write_unet(folder / "fp8.safetensors")
    eight = small.models.load_unet(path, dtype)
    lora = small.lora()
    for m in (eight, small.add_lora(eight, lora)):
        played = small.sample(small.with_pack(m, experts))
        stored = m.clone(force_deepcopy=True)
        comfy.model_management.load_models_gpu([stored])
        weights = {k: v.float() for k, v in stored.model.diffusion_model.state_dict().items()}
        description = small.packs.Description("unet", small.Architecture.full(SD), prediction="eps")
        small.packs.write_unet(folder / "rounded.safetensors", weights, description)
        rounded = small.models.load_unet(str(folder / "rounded.safetensors"))
        assert small.difference(played, small.sample(with_reference(rounded, experts))) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_packs_in_half_precision_stay_in_it_but_for_routers(experts, dtype):
    loaded = small.packs.open_pack(experts)
    pack = small.models.units.PackModel.load(loaded, dtype, None)
    found = {k.rsplit(".", 2)[1]: t.dtype for k, t in pack.state_dict().items()}
    assert found == {"experts": dtype, "router": torch.float32}


def test_little_memory(model, experts):
    lora = small.lora()
    wanted = small.sample(small.add_lora(small.with_pack(model, experts), lora))
    with small.little_memory():
        assert torch.equal(small.sample(small.add_lora(small.with_pack(model, experts), lora)), wanted)


def test_the_host_moves_every_weight_of_the_pack(model, experts):
    (patcher,) = assigned.packs_of(small.with_pack(model, experts)).values()
    movable = {f"{name}.{leaf}" for _, _, name, _, leaves in patcher._load_list() for leaf in leaves}
    assert movable == set(dict(patcher.model.named_parameters()))
    assert all(hasattr(patcher.model.get_submodule(name.rpartition(".")[0]), "comfy_cast_weights") for name in movable)


def test_experts_play_after_a_deep_copy_and_on_other_devices(model, experts, plain_samples):
    played = small.with_pack(model, experts)
    wanted = small.sample(played)
    assert torch.equal(small.sample(played.clone(force_deepcopy=True)), wanted)
    assert torch.equal(small.sample(played.deepclone_multigpu()), wanted)


def test_inherited_features_with_experts(model, experts):
    # Both kinds of reuse: whole outputs, and residuals, onto shortcuts that are computed afresh.
    plan = inheritance.Plan((inheritance.Rule("mid, up.0, up.1"), inheritance.Rule("down.1.0.resnet", "residual")))
    played = small.sample(small.with_plan(small.with_pack(model, experts), plan), steps=4)
    assert small.difference(played, small.sample(small.with_plan(with_reference(model, experts), plan), steps=4)) < 1e-4
    assert small.difference(played, small.sample(small.with_pack(model, experts), steps=4)) > 1e-3


TWO = small.TWO_LEVELS
graphs = pytest.fixture(small.fresh_graphs)


@pytest.mark.sweep(0)
def test_compiled_experts_have_a_graph_for_each_strength(folder, graphs):
    two = small.models.load_unet(small.write_unet(folder / "two-levels.safetensors", TWO))
    path = small.write_experts(
        folder / "two-experts.safetensors", CondConv(dict.fromkeys(small.condconv.convolutions(TWO), 2)), TWO
    )
    cases = [
        (m, small.sample(m, TWO)) for m in (two, small.with_pack(two, path), small.with_pack(two, path, strength=0.5))
    ]
    for m, wanted in cases:
        assert small.difference(small.sample(small.compiled(m), TWO), wanted) < 1e-5
    count = len(graphs)
    assert count >= 3
    for m, wanted in cases:  # a new run each: the graphs are found again
        assert small.difference(small.sample(small.compiled(m), TWO), wanted) < 1e-5
    lora = small.lora(TWO)
    with_lora = small.add_lora(cases[1][0], lora)
    assert small.difference(small.sample(small.compiled(with_lora), TWO), small.sample(with_lora, TWO)) < 1e-5
    assert len(graphs) == count
    assert small.difference(cases[1][1], cases[0][1]) > 0.01 and small.difference(cases[1][1], cases[2][1]) > 0.001


def test_plain_branch_beside_a_branch_with_experts(model, experts, plain_samples):
    played = small.with_pack(model, experts)
    first = small.sample(played)
    assert torch.equal(small.sample(model), plain_samples)
    assert torch.equal(small.sample(played), first)
