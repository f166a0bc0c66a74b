"""Taps, freeze masks, starts of a stage and products, on narrow networks."""

import pytest
import torch

from asdm_core.architecture import Architecture
from asdm_core.identity import Checkpoint
from asdm_core.packs import Description, open_model, open_pack, open_unet, write_unet
from tests.train.recipes import CONFIGS, NARROW, RECIPES
from train import networks, taps
from train.recipe import load
from train.sections import Regional
from train.attention import BmmAttention
from train.dry_run import activations, meta_student, report
from train.taps import Tap, Tapped, caught


def paths(found):
    return [tap.student if tap.student == tap.teacher else (tap.student, tap.teacher) for tap in found]


# Taps -----------------------------------------------------------------------------------------------


def test_block_taps_are_those_of_bk_sdm():
    down, up = [f"down_blocks.{n}" for n in range(4)], [f"up_blocks.{n}" for n in range(4)]
    for preset in ("base", "small"):
        assert paths(taps.blocks(Architecture.preset(preset))) == down + up
    tiny = taps.blocks(Architecture.preset("tiny"))
    assert paths(tiny) == [
        *down[:2],
        ("down_blocks.2.attentions.0.proj_out", "down_blocks.2.attentions.1.proj_out"),
        *up[1:],
    ]
    assert paths(taps.blocks(Architecture.preset("m2"))) == [*down[:2], *up[2:]]
    assert all(tap.weight == 1 for tap in tiny)


def test_layer_and_attention_taps_of_a_block_share_a_weight_of_one():
    architecture = Architecture.preset("koala-700m")
    found = taps.layers(architecture)
    assert paths(found)[:4] == [
        "down_blocks.0.resnets.0",
        "down_blocks.1.resnets.0",
        "down_blocks.1.attentions.0",
        "down_blocks.2.resnets.0",
    ]
    for kind in (found, taps.attention(architecture)):
        for block in {tap.name[: tap.name.index(".") + 2] for tap in kind}:
            assert sum(tap.weight for tap in kind if tap.name.startswith(block)) == pytest.approx(1)
    # Five of ten transformer blocks are kept; each is compared with the one it was.
    deep = [p for p in paths(taps.attention(architecture)) if p.startswith("down_blocks.2")]
    assert deep == [f"down_blocks.2.attentions.0.transformer_blocks.{i}.attn1" for i in range(5)]
    assert taps.attention(Architecture.preset("m1"))[0] == Tap(
        "down.0.0.transformer.0.attn1", *["down_blocks.0.attentions.0.transformer_blocks.0.attn1"] * 2, 1.0
    )


def test_units_with_experts_or_gains_are_compared_as_well():
    full = ["student.preset=full", "loss.mid=0"]
    assert paths(load(NARROW, [*full, "gri.on=down.0, up.3", "gri.window=4", "gri.pool=2"]).taps["blocks"]) == [
        "down_blocks.0",
        "up_blocks.3",
    ]
    assert paths(load(NARROW, [*full, "experts.on=down.1"]).taps["blocks"]) == ["down_blocks.1"]
    assert paths(load(NARROW, ["student.preset=m2", "loss.mid=0", "experts.on=down.0"]).taps["blocks"]) == paths(
        taps.blocks(Architecture.preset("m2"))
    )
    with pytest.raises(ValueError, match=r"loss\.blocks has nothing to compare"):
        load(NARROW, [*full, "student.trained=all"])


def test_a_mid_tap_needs_a_mid_block():
    assert paths(taps.mid(Architecture.preset("m3"))) == ["mid_block"]
    with pytest.raises(ValueError, match="small has no mid block"):
        taps.mid(Architecture.preset("small"))


@torch.no_grad()
def test_features_are_caught_and_no_hook_stays():
    recipe = load(NARROW, ["student.preset=tiny", "loss.mid=0"])
    teacher = networks.load_teacher(recipe)
    student = networks.make_student(teacher, recipe)
    found = [*taps.blocks(recipe.architecture), *taps.layers(recipe.architecture), *taps.attention(recipe.architecture)]
    x = torch.randn(2, 4, 8, 8)
    t = torch.tensor([1, 999])
    context = torch.randn(2, 5, 32)
    predicted, mine = Tapped(student, [tap.student for tap in found])(x, t, context)
    _, its = Tapped(teacher, [tap.teacher for tap in found])(x, t, context)
    for tap in found:
        assert mine[tap.student].shape == its[tap.teacher].shape, tap
    assert torch.equal(predicted, student(x, t, context).sample)
    assert not any(m._forward_hooks for m in student.modules())
    with pytest.raises(RuntimeError), caught(student, ["conv_in"]):
        student(x[:, :3], t, context)
    assert not any(m._forward_hooks for m in student.modules())


# Freeze masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "blocks"),
    [
        (["student.preset=m1"], {"down_blocks.0", "up_blocks.3"}),
        (["student.preset=m2"], {"down_blocks.0", "down_blocks.1", "up_blocks.2", "up_blocks.3"}),
        (
            ["student.preset=m3"],
            {"down_blocks.0", "down_blocks.1", "down_blocks.2", "up_blocks.1", "up_blocks.2", "up_blocks.3"},
        ),
        (
            ["student.preset=m1", "student.stem=true"],
            {"down_blocks.0", "up_blocks.3", "conv_in", "conv_norm_out", "conv_out"},
        ),
        (["student.preset=m2", "student.trained=all"], None),
        (["student.preset=base"], None),
        (["student.preset=tiny"], None),
    ],
)
def test_only_the_blocks_of_the_student_have_gradients(changes, blocks):
    student = meta_student(load(NARROW, [*changes, "loss.mid=0"]))
    trained = {k for k, p in student.named_parameters() if p.requires_grad}
    if blocks is None:
        assert trained == set(dict(student.named_parameters()))
    else:
        assert trained == {k for k, _ in student.named_parameters() if k.startswith(tuple(f"{b}." for b in blocks))}


def test_the_trained_part_of_sd15_has_the_sizes_of_the_paper():
    millions = {}
    for name in ("m1", "m2", "m3", "m5", "tiny"):
        student = meta_student(load(CONFIGS / f"sd15-{name}.toml"))
        millions[name] = round(sum(p.numel() for p in student.parameters() if p.requires_grad) / 1e6, 1)
    assert millions == {"m1": 18.6, "m2": 87.6, "m3": 336.1, "m5": 809.5, "tiny": 323.4}


# Starts ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The product of a stage 1 whose weights are not the teacher's."""
    recipe = load(
        NARROW,
        [
            "student.preset=base",
            "seed=99",
            "loss.mid=0",
            f"run.folder={tmp_path_factory.mktemp('base')}",
            "run.stored=float32",
        ],
    )
    networks.write_product(networks.make_student(networks.load_teacher(recipe), recipe), recipe, {})
    return recipe.product


@pytest.mark.parametrize("preset", ["m1", "m2"])
def test_stage_two_takes_its_own_units_from_stage_one_and_the_rest_from_the_teacher(base, preset):
    recipe = load(NARROW, [f"student.preset={preset}", f"student.start={base}"])
    teacher = networks.load_teacher(recipe)
    start = open_unet(base).tensors
    mine = networks.addressed(networks.make_student(teacher, recipe), recipe.architecture)
    original = networks.addressed(teacher, Architecture.full(recipe.network.config))
    own = set(recipe.architecture.own)
    for key, slot in recipe.architecture.keys().items():
        assert torch.equal(mine[key], start[key] if slot.unit.address in own else original[key]), key
    assert any(not torch.equal(start[key], original[key]) for key in start)


def test_a_start_that_does_not_fit_is_named(base, tmp_path):
    with pytest.raises(ValueError, match="none.safetensors.*Train the stage before"):
        networks.make_student(
            networks.load_teacher(load(NARROW)), load(NARROW, [f"student.start={tmp_path / 'none.safetensors'}"])
        )
    wide = load(NARROW, ["student.preset=", "student.cut=down.0.1", "student.on=down.0-1", f"student.start={base}"])
    with pytest.raises(ValueError, match=r"does not have down.1.1.resnet, which narrow trains"):
        networks.make_student(networks.load_teacher(wide), wide)


def test_a_wrong_teacher_is_named(base, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"teacher: narrow.safetensors is a UNet of smoke, cut to base; wanted an unpruned one of smoke",
    ):
        networks.load_teacher(load(NARROW, [f"network.teacher={base}"]))
    recipe = load(NARROW)
    whole = networks.load_teacher(recipe)
    path = tmp_path / "whole.safetensors"
    full = Architecture.full(recipe.network.config)
    write_unet(path, networks.addressed(whole, full), Description("unet", full, prediction="eps"))
    with pytest.raises(ValueError, match="predicts eps, the recipe says network.prediction = 'v'"):
        networks.load_teacher(load(NARROW, [f"network.teacher={path}"]))
    again = networks.load_teacher(load(NARROW, [f"network.teacher={path}", "network.prediction=eps"]))
    for key, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    with pytest.raises(ValueError, match="give the file"):
        networks.load_teacher(load(NARROW, ["network.teacher="]))


def test_a_product_is_under_its_teachers_licence_and_a_unet_keeps_its_companions(tmp_path):
    recipe = load(NARROW)
    full = Architecture.full(recipe.network.config)
    path = tmp_path / "whole.safetensors"
    told = Description("unet", full, prediction="v", licence="CC-BY-4.0", companions={"vae": "its-vae.safetensors"})
    write_unet(path, networks.addressed(networks.load_teacher(recipe), full), told)
    for changes, has_companions in ((["student.preset=m2"], False), (["student.preset=base", "loss.mid=0"], True)):
        recipe = load(NARROW, [*changes, f"network.teacher={path}", f"run.folder={tmp_path}"])
        networks.write_product(networks.make_student(networks.load_teacher(recipe), recipe), recipe, {})
        description = open_model(recipe.product).description
        assert description.licence == told.licence and dict(description.companions) == (
            dict(told.companions) if has_companions else {}
        )


@pytest.mark.parametrize(
    ("changes", "value", "said"),
    [
        (["student.preset=base", "loss.mid=0"], float("nan"), "not finite, so nothing was written"),
        (["student.preset=m2", "run.stored=int8"], float("inf"), "not finite, so nothing was written"),
        (["student.preset=m2", "run.stored=float16"], 1e5, "too large for float16.*run.stored=bfloat16"),
        (["student.preset=m2", "lora.rank=2"], 1e5, "too large for float16"),
        (["student.preset=full", "student.trained=none", "lora.rank=2", "loss.mid=0", "loss.blocks=0"], 1e6, "float16"),
        (
            ["student.preset=full", "loss.mid=0", "loss.blocks=0", "gri.on=down.0", "gri.window=4", "gri.pool=2"],
            1e5,
            "gain",
        ),
        (["student.preset=tiny", "loss.mid=0", "experts.on=down.0.*.resnet"], float("nan"), "experts"),
    ],
)
def test_what_is_not_finite_is_never_written(changes, value, said, tmp_path):
    recipe = load(NARROW, [*changes, f"run.folder={tmp_path}"])
    student = networks.make_student(networks.load_teacher(recipe), recipe)
    trained = [(n, p) for n, p in student.named_parameters() if p.requires_grad]
    wanted = {"experts": ".experts.", "gain": "log_gain"}.get(said, "")
    with torch.no_grad():
        next(p for n, p in reversed(trained) if wanted in n).flatten()[0] = value
    with pytest.raises(ValueError, match=said):
        networks.write_product(student, recipe, {})
    assert not list(tmp_path.iterdir())


def test_what_is_too_large_for_half_precision_is_written_in_another(tmp_path):
    recipe = load(NARROW, ["student.preset=m2", "run.stored=bfloat16", f"run.folder={tmp_path}"])
    student = networks.make_student(networks.load_teacher(recipe), recipe)
    with torch.no_grad():
        next(p for p in student.parameters() if p.requires_grad).flatten()[0] = 1e5
    networks.write_product(student, recipe, {})
    assert max(float(t.abs().max()) for t in open_pack(recipe.product).tensors.values()) > 9e4


# Further experts ------------------------------------------------------------------------------------

E2 = ["student.preset=tiny", "loss.mid=0", "experts.on=down.0.*.resnet, up.3.*.resnet"]


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ([], 1e-4),
        (["experts.start=clme"], 0.05),
        (["experts.start=clme", "experts.form=mixture"], 0.05),
        (["student.preset=m2"], 1e-4),
    ],
)
@torch.no_grad()
def test_experts_change_nothing_at_first(changes, tolerance):
    recipe = load(NARROW, [*E2, *changes])
    plain = load(NARROW, [*E2[:2], *[c for c in changes if "preset" in c]])
    teacher = networks.load_teacher(recipe)
    x = torch.randn(2, 4, 8, 8)
    t = torch.tensor([1, 999])
    context = torch.randn(2, 5, 32)
    with_experts, without = (networks.make_student(teacher, r)(x, t, context).sample for r in (recipe, plain))
    assert (with_experts - without).norm() <= tolerance * without.norm()


@pytest.mark.parametrize("router", [True, False])
@pytest.mark.parametrize("preset", ["tiny", "m1"])
def test_experts_are_trained_wherever_they_are_and_routers_as_asked(preset, router):
    # Of m1, up.2 belongs to the frozen original.
    recipe = load(
        NARROW,
        [
            f"student.preset={preset}",
            "loss.mid=0",
            "experts.on=up.2-3.*.resnet",
            f"experts.router={str(router).lower()}",
        ],
    )
    student = meta_student(recipe)
    for name, p in student.named_parameters():
        part = name.split(".")[-2]
        if part in ("experts", "router"):
            assert p.requires_grad == (part == "experts" or router), name
        elif preset == "m1":
            assert p.requires_grad == name.startswith(("down_blocks.0.", "up_blocks.3.")), name
    assert sum(".experts." in name for name, _ in student.named_parameters()) == 2 * len(recipe.condconv.experts)


@pytest.mark.parametrize("changes", [[], ["experts.start=clme"], ["student.preset=m2", "experts.on=down.0-1.*.resnet"]])
@torch.no_grad()
def test_a_product_with_experts_plays_what_was_trained(changes, tmp_path):
    recipe = load(NARROW, [*E2, *changes, f"run.folder={tmp_path}", "run.stored=float32"])
    teacher = networks.load_teacher(recipe)
    student = networks.make_student(teacher, recipe)
    for p in student.parameters():
        if p.requires_grad:
            p.add_(0.05 * torch.randn_like(p))
    networks.write_product(student, recipe, {})
    # A pack cannot carry the stem of a student that was trained whole: there its experts are a pack of their own.
    whole = recipe.architecture.name == "tiny"
    pack = open_pack(networks.joining(recipe.product) if whole else recipe.product).description
    assert pack.condconv == recipe.condconv and pack.units == (() if whole else recipe.architecture.own)
    if whole:  # and say whose layers they join
        mine, other = (
            Checkpoint.of("", weights, recipe.network.config)
            for weights in (
                open_unet(recipe.product).tensors,
                networks.addressed(teacher, Architecture.full(recipe.network.config)),
            )
        )
        assert pack.made_for.name == recipe.product.name
        assert not pack.made_for.is_other(mine) and pack.made_for.is_other(other)
    x = torch.randn(2, 4, 8, 8)
    t = torch.tensor([1, 999])
    context = torch.randn(2, 5, 32)
    assert torch.equal(
        networks.assembled(teacher, recipe.product)(x, t, context).sample, student.eval()(x, t, context).sample
    )
    with pytest.raises(ValueError, match="has further experts or gains, which the next stage would lose"):
        networks.make_student(
            teacher, load(NARROW, [*E2[:2], *[c for c in changes if "preset" in c], f"student.start={recipe.product}"])
        )


# GRI -------------------------------------------------------------------------------------------------

GAINS = ["student.preset=full", "loss.mid=0", "loss.blocks=0", "gri.on=down.0, up.3", "gri.window=4", "gri.pool=2"]


def test_of_gri_only_the_gains_are_trained():
    student = meta_student(load(NARROW, GAINS))
    trained = {name: p.shape for name, p in student.named_parameters() if p.requires_grad}
    assert list(trained.values()) == [(4,)] * 5 and all(name.endswith(".attn1.processor.log_gain") for name in trained)
    with pytest.raises(ValueError, match=r"narrow trains nothing: student.preset = 'full'"):
        load(NARROW, GAINS[:3])
    with pytest.raises(ValueError, match="'down.3' holds no transformer"):
        load(NARROW, [*GAINS, "gri.on=down.3"])
    with pytest.raises(ValueError, match="window and shift must be multiples of pool"):
        load(NARROW, [*GAINS, "gri.pool=3"])
    with pytest.raises(
        ValueError,
        match=r"data.size = 64 the maps of down.0.0.transformer are 8 x 8 tokens, and a window of 8 covers them",
    ):
        load(NARROW, [*GAINS, "gri.window=8"])


@torch.no_grad()
def test_a_window_over_the_whole_map_is_the_teacher_whatever_the_gains(tmp_path):
    x = torch.randn(2, 4, 8, 8)
    t = torch.tensor([1, 999])
    context = torch.randn(2, 5, 32)
    recipe = load(NARROW, [*GAINS, f"run.folder={tmp_path}", "run.stored=float32"])
    teacher = networks.load_teacher(recipe)
    wanted = teacher(x, t, context).sample
    student = networks.make_student(teacher, recipe)
    for p in student.parameters():
        if p.requires_grad:
            p.add_(1.0)
    for same in (False, True):
        networks.set_attention(student, BmmAttention())  # leaves GRI where it is
        assert sum(isinstance(p, networks.RegionalAttention) for p in student.attn_processors.values()) == 5
        for p in student.attn_processors.values():
            if same and isinstance(p, networks.RegionalAttention):
                p.settings = Regional(window=8, pool=4)
        assert ((student(x, t, context).sample - wanted).norm() < 1e-3 * wanted.norm()) == same

    # A product plays the same gains in the same windows.
    again = networks.make_student(teacher, recipe)
    for p in again.parameters():
        if p.requires_grad:
            p.copy_(torch.randn(p.shape))
    networks.write_product(again, recipe, {})
    opened = open_pack(recipe.product)
    assert opened.description.units == () and set(opened.tensors) == set(recipe.gains.keys(recipe.network.config))
    assert torch.equal(
        networks.assembled(teacher, recipe.product)(x, t, context).sample, again.eval()(x, t, context).sample
    )


# Products -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kind", "stored"),
    [
        (["student.preset=m2"], "pack", "float32"),
        (["student.preset=m2", "student.trained=all"], "unet", "float32"),
        (["student.preset=tiny", "loss.mid=0"], "unet", "float16"),
    ],
)
def test_products_hold_the_student(changes, kind, stored, tmp_path):
    recipe = load(NARROW, [*changes, f"run.folder={tmp_path}", f"run.stored={stored}"])
    student = networks.make_student(networks.load_teacher(recipe), recipe)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.25)
    networks.write_product(student, recipe, {"steps": 3})
    opened = (open_pack if kind == "pack" else open_unet)(recipe.product)
    description = opened.description
    assert (description.kind, description.prediction, description.training["steps"]) == (kind, "v", 3)
    assert description.architecture == recipe.architecture
    mine = networks.addressed(student, recipe.architecture)
    units = set(networks.trained_units(recipe))
    assert set(opened.tensors) == {k for k, s in recipe.architecture.keys().items() if s.unit.address in units}
    for key, value in opened.tensors.items():
        assert torch.equal(value, mine[key].to(value.dtype)), key


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    "changes",
    [
        ["student.preset=m2"],
        ["student.preset=tiny", "loss.mid=0"],
        ["student.preset=m1", "loss.mid=0", "experts.on=up.2-3.*.resnet"],
        ["student.preset=full", "loss.mid=0", "loss.blocks=0", "gri.on=down.0", "gri.window=4", "gri.pool=2"],
    ],
    ids=lambda c: c[-1],
)
@pytest.mark.parametrize("shared", [True, False])
def test_frozen_weights_are_held_once_and_change_nothing(changes, shared):
    """Bit for bit, output and gradients, against weights in float32 of which autocast makes copies."""
    recipe = load(NARROW, changes)
    half = torch.bfloat16
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([1, 999]), torch.randn(2, 5, 32)
    found = []
    for held in (False, True):
        teacher = networks.load_teacher(recipe)
        student = networks.make_student(teacher, recipe)
        if held:
            torch.nn.Module.to(teacher, half)
            names = networks.hold_frozen(student, teacher if shared else None, half)
            frozen = {n for n, p in student.named_parameters() if not p.requires_grad and p.dim() > 1}
            assert bool(names) == (shared and bool(frozen)) and all(
                student.get_parameter(n).data_ptr() == teacher.get_parameter(n).data_ptr() for n in names
            )
            assert {student.get_parameter(n).dtype for n in frozen if ".conv." not in n} <= {half}
            assert {p.dtype for p in student.parameters() if p.requires_grad} == {torch.float32}
        with torch.autocast("cpu", half):
            out = student(x, t, context).sample
        out.float().square().sum().backward()
        found.append([out, *(p.grad for p in student.parameters() if p.requires_grad)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_a_small_change_survives_a_weight_in_half_precision():
    """A LoRA far below the weight's own rounding still moves what is computed."""
    recipe = load(
        NARROW,
        ["student.preset=full", "student.trained=none", "lora.rank=2", "loss.mid=0", "loss.blocks=0"],
    )
    student = networks.make_student(networks.load_teacher(recipe), recipe)
    layer = student.get_submodule("mid_block.attentions.0.proj_in")
    before = layer.parametrizations.weight.original.to(torch.bfloat16).float()
    networks.hold_frozen(student, None, torch.bfloat16)
    with torch.no_grad():
        layer.parametrizations.weight[0].up.fill_(1e-6)
        change = layer.weight - before
    assert layer.parametrizations.weight.original.dtype == torch.bfloat16 and layer.weight.dtype == torch.float32
    wanted = layer.parametrizations.weight[0].down.sum(0) * 1e-6 * layer.parametrizations.weight[0].scale
    torch.testing.assert_close(change.flatten(1)[0], wanted, rtol=0.1, atol=1e-8)


# Plans ----------------------------------------------------------------------------------------------


@pytest.mark.sweep(3)
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_has_a_plan(path):
    recipe = load(path)
    text = report(recipe, 2 if recipe.run.batch > recipe.run.micro_batch else 1)
    whole = len(networks.trained_units(recipe)) == len(recipe.architecture.kept)
    made = f"{recipe.product} ({'unet' if whole else 'pack'})" if recipe.makes_network else f"{recipe.lora_file} (LoRA)"
    assert f"ends in {made}" in text
    further = sum(
        slot.tensor.numel
        for extra in (recipe.condconv, recipe.gains)
        if extra
        for slot in extra.keys(recipe.network.config).values()
    )
    further += recipe.lora.rank and sum(
        p.numel() for name, p in meta_student(recipe).named_parameters() if name.endswith((".down", ".up"))
    )
    assert f"{(recipe.architecture.params + further) / 1e6:.3f}" in text.split("all", 1)[1]
    assert "activations" in text


def test_the_plan_counts_what_the_backward_pass_keeps():
    one, two = (load(NARROW, [f"run.micro_batch={n}", "run.batch=4"]) for n in (1, 2))
    assert activations(meta_student(two), two)[0] == pytest.approx(2 * activations(meta_student(one), one)[0], rel=0.02)
    saved = load(NARROW, ["run.micro_batch=2", "run.batch=4", "run.checkpoint_gradients=true"])
    assert activations(meta_student(saved), saved)[0] < 0.5 * activations(meta_student(two), two)[0]
