"""Training over many styles: the draw, each network against surgery by hand, the ride, whole runs."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from asdm_core.architecture import Architecture
from asdm_core.differences import to_absolute, to_difference
from asdm_core.packs import Description, open_pack, open_unet, write_unet
from tests.train.recipes import NARROW
from train import loop, networks
from train import styles as styles_of_a_run
from train.recipe import load
from train.sections import Styles
from train.lora import LoraFile, file_names, merge_file
from train.loop import train
from train.sources import Drawn, draw
from train.data import Batches, Random
from train.show import predictor
from train.styles import RANDOM, Style, StyleSet, style_of

NAMES = ("teacher", "one", "two")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A teacher, two finetunes of it, and a LoRA."""
    folder = tmp_path_factory.mktemp("set")
    recipe = load(NARROW)
    full = Architecture.full(recipe.network.config)
    whole = networks.load_teacher(recipe)
    generator = torch.Generator().manual_seed(5)
    for name in NAMES:
        tensors = networks.addressed(whole, full)
        write_unet(folder / f"{name}.safetensors", tensors, Description("unet", full, prediction="v"))
        with torch.no_grad():
            for p in whole.parameters():
                p += 0.02 * torch.randn(p.shape, generator=generator)
    lora = {}
    names = file_names(recipe.network.config)
    for layer in ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "up_blocks.3.resnets.0.conv1"):
        weight = whole.get_parameter(f"{layer}.weight")
        lora[f"{names[layer]}.lora_up.weight"] = torch.randn(
            weight.shape[0], 3, *[1] * (weight.dim() - 2), generator=generator
        )
        lora[f"{names[layer]}.lora_down.weight"] = torch.randn(3, *weight.shape[1:], generator=generator)
        lora[f"{names[layer]}.alpha"] = torch.tensor(1.5)
    lora["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] = torch.zeros(4, 3)
    lora["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.zeros(3, 4)
    save_file(lora, folder / "lora.safetensors")
    return folder


def settings(files, folder, *changes):
    return load(
        NARROW,
        [
            f"run.folder={folder}",
            f"network.teacher={files / 'teacher.safetensors'}",
            f'styles.checkpoints=["{files / "one.safetensors"}", "{files / "two.safetensors"}"]',
            f'styles.loras=["{files / "lora.safetensors"}"]',
            "styles.teacher=0.2",
            "run.stored=float32",
            "run.picture_every=0",
            *changes,
        ],
    )


def style_set(recipe):
    teacher = networks.load_teacher(recipe)
    student = networks.make_student(teacher, recipe)
    torch.nn.Module.to(teacher, torch.float32)
    return teacher, student, StyleSet(recipe, teacher, student)


def run(recipe):
    train(recipe, Accelerator(cpu=True))
    return recipe


def newest(recipe):
    return load_file(max(recipe.folder.glob("checkpoint-*.safetensors")))


def assert_same(one, two):
    assert one.keys() == two.keys()
    for key in one:
        assert torch.equal(one[key], two[key]), key


def whole_of(files, name):
    """A network of the set as anybody would load it."""
    return networks.load_teacher(load(NARROW, [f"network.teacher={files / f'{name}.safetensors'}"]))


# The draw -------------------------------------------------------------------------------------------


def test_a_draw_follows_from_seed_and_turn_and_keeps_to_its_shares():
    wanted = Styles(("a", "b", "c"), ("x", "y"), teacher=0.25, merged=0.4, lora=0.5, random=0.3, strength=0.2)
    drawn = [style_of(wanted, 3, turn) for turn in range(4000)]
    assert drawn == [style_of(wanted, 3, turn) for turn in range(4000)]
    assert drawn != [style_of(wanted, 4, turn) for turn in range(4000)]
    others = [style for style in drawn if style != Style()]
    worn = [style for style in others if style.lora is not None]
    given = [style for style in worn if style.lora != RANDOM]
    assert abs(len(others) / 4000 - 0.75) < 0.03
    assert abs(sum(len(style.parts) > 1 for style in others) / len(others) - 0.4) < 0.04
    assert abs(len(worn) / len(others) - 0.5) < 0.04 and abs(len(given) / len(worn) - 0.7) < 0.04
    assert {style.lora for style in given} == {0, 1} and {n for style in others for n, _ in style.parts} == {0, 1, 2, 3}
    for style in others:
        assert abs(sum(share for _, share in style.parts) - 1) < 1e-9
        assert len({n for n, _ in style.parts}) == len(style.parts)
        assert style.parts != ((0, 1.0),) or style.lora is not None  # else it would be the teacher
    assert all(0.5 <= style.strength <= 1 for style in given)
    assert all(0 <= style.strength <= 0.2 for style in worn if style.lora == RANDOM)
    assert max(Counter(style.turn for style in worn if style.lora == RANDOM).values()) == 1


def test_a_turn_lasts_as_many_steps_as_the_recipe_says(files, tmp_path):
    _, _, found = style_set(settings(files, tmp_path, "styles.every=3"))
    drawn = [found.drawn(step) for step in range(30)]
    assert all(drawn[step] == drawn[step - step % 3] for step in range(30)) and len(set(drawn)) > 3


# Each network ---------------------------------------------------------------------------------------


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    "style",
    [
        Style(((2, 1.0),)),
        Style(((1, 0.3), (2, 0.7))),
        Style(((0, 0.6), (1, 0.4))),
        Style(((0, -0.5), (1, 1.0), (2, 0.5))),
        Style(lora=0, strength=0.8),
        Style(((1, 1.0),), 0, 0.5),
    ],
)
def test_what_teaches_is_what_surgery_by_hand_gives(files, tmp_path, style):
    teacher, student, found = style_set(settings(files, tmp_path))
    whole = [dict(whole_of(files, name).named_parameters()) for name in NAMES]
    found.take(Style(((1, 1.0),)))  # another one before it leaves nothing behind
    found.take(style)
    file = load_file(files / "lora.safetensors")
    names = file_names(settings(files, tmp_path).network.config)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    mine = dict(student.named_parameters())
    changed = 0
    for name, p in teacher.named_parameters():
        wanted = sum(share * whole[n][name].data for n, share in style.parts)
        module = names.get(name.removesuffix(".weight"), "")
        if style.lora is not None and f"{module}.lora_up.weight" in file:
            up, down = (file[f"{module}.lora_{part}.weight"].flatten(1) for part in ("up", "down"))
            torch.testing.assert_close(p.data, wanted + style.strength * 0.5 * (up @ down).view_as(wanted))
            changed += 1
        else:
            assert torch.equal(p.data, wanted), name
        if name in mine and name not in trained:
            assert torch.equal(mine[name].data, p.data), name
    assert changed == (2 if style.lora is not None else 0)
    found.take(Style())
    for name, p in teacher.named_parameters():
        assert torch.equal(p.data, whole[0][name].data), name


def test_a_random_lora_is_one_of_its_rank_and_strength_and_another_in_each_turn(files, tmp_path):
    teacher, _, found = style_set(settings(files, tmp_path, "styles.rank=2"))
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    changes = []
    for turn in (7, 8, 7):
        found.take(Style(lora=RANDOM, strength=0.1, turn=turn))
        changes.append({name: p - before[name] for name, p in teacher.named_parameters()})
        found.take(Style())
    for name, change in changes[0].items():
        if change.dim() < 2:
            assert not change.any()
            continue
        assert torch.linalg.matrix_rank(change.flatten(1), rtol=1e-3) <= 2
        assert abs(float(change.norm() / before[name].norm()) - 0.1) < 1e-3
        assert not torch.allclose(change, changes[1][name], rtol=0.1) and torch.equal(change, changes[2][name])


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_matrices_that_are_not_trained_are_held_once(files, tmp_path, precision):
    recipe = settings(files, tmp_path, f"run.precision={precision}")
    teacher = networks.load_teacher(recipe)
    student = networks.make_student(teacher, recipe)
    torch.nn.Module.to(teacher, torch.bfloat16 if precision == "bf16" else torch.float32)
    found = StyleSet(recipe, teacher, student)
    its = {name: p.data_ptr() for name, p in teacher.named_parameters()}
    for style in (Style(), Style(((1, 0.5), (2, 0.5)))):
        found.take(style)
        for name, p in student.named_parameters():
            assert (p.data_ptr() == its[name]) == (p.dim() > 1 and not p.requires_grad), name
    for name, vectors in found.frozen.items():
        for p in vectors:
            assert torch.equal(p, found.weight(found.style, name)) and p.dtype == torch.float32


# The ride -------------------------------------------------------------------------------------------


def test_the_student_plays_the_pack_as_a_difference_and_learns_its_own_weights(files, tmp_path):
    recipe = settings(files, tmp_path)
    teacher, student, found = style_set(recipe)
    generator = torch.Generator().manual_seed(2)
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in trained.values():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    plain = {name: p.detach().clone() for name, p in trained.items()}
    its, merged = dict(whole_of(files, "teacher").named_parameters()), Style(((1, 0.25), (2, 0.75)))
    found.take(merged)
    # By hand: a network of its own with the merged weights, cut, with the sums in it.
    by_hand = whole_of(files, "one")
    other = dict(whole_of(files, "two").named_parameters())
    with torch.no_grad():
        for name, p in by_hand.named_parameters():
            p.copy_(0.25 * p + 0.75 * other[name])
    alone = networks.make_student(by_hand, recipe)
    with torch.no_grad():
        for name, p in alone.named_parameters():
            if name in plain:
                p.add_(plain[name] - its[name])
    x, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([900, 300])
    context = torch.randn(2, 8, 32, generator=generator)
    with found.ridden():
        mine = student(x, t, context).sample
        mine.square().mean().backward()
    wanted = alone(x, t, context).sample
    wanted.square().mean().backward()
    torch.testing.assert_close(mine, wanted)
    for name, p in alone.named_parameters():
        if name in trained:
            torch.testing.assert_close(trained[name].grad, p.grad)
            assert torch.equal(trained[name].data, plain[name])  # put back to the bit
    assert not any(p.grad is not None for p in teacher.parameters())


def test_the_product_rides_on_any_network_of_the_set(files, tmp_path):
    recipe = run(settings(files, tmp_path))
    product = open_pack(recipe.product)
    assert product.description.difference_of.name == "teacher.safetensors"
    assert product.description.training["styles"]["checkpoints"] == ["one.safetensors", "two.safetensors"]
    weights = newest(recipe)
    for name in NAMES:
        host = whole_of(files, name)
        assembled = networks.assembled(host, recipe.product)
        teacher = dict(whole_of(files, "teacher").named_parameters())
        for key, p in assembled.named_parameters():
            wanted = host.get_parameter(key).data
            if f"average.{key}" in weights:
                wanted = wanted + (weights[f"average.{key}"] - teacher[key].data)
            torch.testing.assert_close(p.data, wanted)


# What is carried over -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def started(files, tmp_path_factory):
    """A pack trained on the teacher, from which a carry goes on."""
    path = tmp_path_factory.mktemp("started")
    return run(load(NARROW, [f"run.folder={path}", f"network.teacher={files / 'teacher.safetensors'}"])).product


def carrying(files, folder, started, *changes):
    return settings(files, folder, "styles.carry=4", "styles.teacher=0", f"student.start={started}", *changes)


def test_units_take_over_what_a_style_changes_and_matrices_get_the_gradient(files, tmp_path, started):
    recipe = carrying(files, tmp_path, started)
    teacher = networks.load_teacher(recipe)
    student = networks.make_student(teacher, recipe)
    torch.nn.Module.to(teacher, torch.float32)
    matrices = styles_of_a_run.new_matrices(recipe, torch.device("cpu"))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for matrix in matrices.values():
            matrix += 0.1 * torch.randn(matrix.shape, generator=generator)
    found = StyleSet(recipe, teacher, student, matrices)
    plain = {name: p.detach().clone() for name, p in found.trained.items()}
    merged = Style(((1, 0.25), (2, 0.75)))
    found.take(merged)
    # By hand: a student of the merged network in which autograd itself goes through the sums.
    whole = [dict(whole_of(files, name).named_parameters()) for name in NAMES]
    change = {name: 0.25 * (whole[1][name] - p) + 0.75 * (whole[2][name] - p) for name, p in whole[0].items()}
    merge = whole_of(files, "teacher")
    with torch.no_grad():
        for name, p in merge.named_parameters():
            p += change[name]
    alone = networks.make_student(merge, recipe)
    names = {key: name for name, key in found.keys.items()}
    own = {name: matrix.detach().clone().requires_grad_() for name, matrix in matrices.items()}
    sums = {name: tensor + change[name] for name, tensor in plain.items()}
    for key, links in recipe.carry.links(recipe.architecture).items():
        for link in links:
            sums[names[key]] = sums[names[key]] + link(change[names[link.source]], own)
    x, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([900, 300])
    context = torch.randn(2, 8, 32, generator=generator)
    with found.ridden():
        mine = student(x, t, context).sample
        mine.square().mean().backward()
    wanted = torch.func.functional_call(alone, sums, (x, t, context)).sample
    wanted.square().mean().backward()
    torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)
    assert all(matrix.grad.any() for name, matrix in own.items() if name.endswith(".gain"))
    for name, matrix in own.items():
        torch.testing.assert_close(matrices[name].grad, matrix.grad, rtol=1e-3, atol=1e-5)
    for name, p in found.trained.items():
        assert torch.equal(p.data, plain[name]) and p.grad is None


def test_what_was_learned_to_be_carried_over_is_in_the_product_and_nothing_in_the_teacher(files, tmp_path, started):
    recipe = run(carrying(files, tmp_path, started, "optimiser.lr=0.05"))
    product, before = open_pack(recipe.product), open_pack(started)
    assert product.description.carry == recipe.carry and product.description.training["trained"] > 0
    matrices = {k: v for k, v in newest(recipe).items() if k.startswith("average.")}
    assert set(product.description.carry_keys) == {k.removeprefix("average.") for k in matrices}
    assert any(v.any() for k, v in matrices.items() if k.endswith(".gain"))
    teacher = open_unet(files / "teacher.safetensors").tensors
    for key, tensor in to_absolute(product, teacher, "teacher.safetensors")[1].items():
        torch.testing.assert_close(tensor, before.tensors[key].float(), rtol=1e-4, atol=1e-5)
    # In a finetune it is what the units took over in the run.
    one = open_unet(files / "one.safetensors").tensors
    played = to_absolute(product, one, "one.safetensors")[1]
    moved = 0
    for key, links in recipe.carry.links(recipe.architecture).items():
        wanted = before.tensors[key].float() + one[key] - teacher[key]
        plain = wanted
        for link in links:
            held = {name: matrices[f"average.{name}"] for name in link.matrices}
            wanted = wanted + link(one[link.source] - teacher[link.source], held)
        torch.testing.assert_close(played[key], wanted, rtol=1e-4, atol=1e-4)
        moved += not torch.allclose(wanted, plain, rtol=1e-3, atol=1e-3)
    assert moved


@pytest.mark.sweep(1)
def test_a_stored_carry_is_rounded_before_its_differences_are_taken(files, tmp_path, started):
    recipe = run(carrying(files, tmp_path, started, "run.stored=float16", "optimiser.lr=0.05"))
    product, before = open_pack(recipe.product), open_pack(started)
    assert any(k.endswith(".left.0.scale") for k in load_file(recipe.product))
    teacher = open_unet(files / "teacher.safetensors").tensors
    for key, tensor in to_absolute(product, teacher, "teacher.safetensors")[1].items():
        torch.testing.assert_close(tensor, before.tensors[key].float(), rtol=2**-9, atol=2**-9)


# Whole runs -----------------------------------------------------------------------------------------


def test_a_set_with_the_teacher_alone_trains_as_always(files, tmp_path, monkeypatch):
    plain = run(load(NARROW, [f"run.folder={tmp_path / 'plain'}", f"network.teacher={files / 'teacher.safetensors'}"]))
    # The same file under another name: everything is put in and added that a style puts in and adds.
    again = f'styles.checkpoints=["{files / "teacher.safetensors"}"]'
    alone = run(
        settings(
            files, tmp_path / "a", again, "styles.loras=[]", "styles.merged=0", "styles.lora=0", "styles.teacher=0"
        )
    )
    assert_same(newest(plain), newest(alone))
    drawn = []
    monkeypatch.setattr(styles_of_a_run, "style_of", lambda *of: drawn.append(of) or Style())
    always = run(settings(files, tmp_path / "b"))
    assert_same(newest(plain), newest(always))
    assert len(drawn) == plain.run.steps
    # What they end in is the same pack, once as it is and once as differences.
    product, teacher = open_pack(alone.product), open_unet(files / "teacher.safetensors")
    _, back = to_absolute(product, teacher.tensors, "teacher.safetensors")
    for key, tensor in load_file(plain.product).items():
        torch.testing.assert_close(back[key], tensor.float(), rtol=2**-10, atol=1e-5)


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    "more",
    [(), ("styles.draws=true", "styles.uses=2", "samples.steps=2", "styles.every=2"), ("styles.carry=4",)],
)
def test_a_run_that_was_stopped_equals_an_unbroken_one(files, tmp_path, monkeypatch, more, started):
    if "styles.carry=4" in more:
        more = (*more, f"student.start={started}")

    class Stop(Exception):
        pass

    numbers = loop._numbers

    def until_five(config, accelerator, step, part):
        if step == 5:
            raise Stop
        return numbers(config, accelerator, step, part)

    whole = run(settings(files, tmp_path / "whole", *more))
    with monkeypatch.context() as m, pytest.raises(Stop):
        m.setattr(loop, "_numbers", until_five)
        run(settings(files, tmp_path / "stopped", *more))
    stopped = run(settings(files, tmp_path / "stopped", *more))
    assert_same(newest(whole), newest(stopped))
    assert_same(load_file(whole.product), load_file(stopped.product))


@pytest.fixture
def in_bf16():
    """An accelerator; accelerate keeps one precision for a process."""
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(True)


def test_what_draws_is_where_it_draws_whatever_the_loss(files, tmp_path, in_bf16):
    """With the denoising loss alone nobody asks the teacher for outputs, and it makes the pictures all the same."""
    alone = [f"loss.{name}={weight}" for name, weight in (("task", 1), ("output", 0), ("blocks", 0), ("mid", 0))]
    draws = ["styles.draws=true", "samples.steps=2", "run.precision=bf16", "run.steps=2"]
    recipe = settings(files, tmp_path, *alone, *draws)
    loop.train(recipe, in_bf16)
    assert recipe.product.exists()


def test_a_lora_learns_over_many_styles_too(files, tmp_path):
    recipe = run(
        settings(
            files,
            tmp_path,
            *("student.preset=full", "student.trained=none", "lora.rank=2", "loss.blocks=0", "loss.mid=0"),
        )
    )
    merged = whole_of(files, "one")
    before = {name: p.clone() for name, p in merged.named_parameters()}
    merge_file(merged, recipe.network.config, recipe.product)
    assert any(not torch.equal(p, before[name]) for name, p in merged.named_parameters())


def test_the_network_of_the_step_draws_its_pictures(files, tmp_path):
    recipe = settings(files, tmp_path, "styles.draws=true", "styles.uses=2", "samples.steps=2")
    teacher, _, found = style_set(recipe)
    inner = Random(recipe)
    source = Drawn(recipe, inner, predictor(teacher, torch.float32), torch.device("cpu"))
    batches = Batches(source, recipe)
    found.take(Style(((2, 1.0),)))
    batch = batches(range(8, 12))
    assert torch.equal(batch.x0[0], batch.x0[1]) and torch.equal(batch.x0[2], batch.x0[3])
    assert not torch.equal(batch.x0[0], batch.x0[2]) and len(set(batch.t.tolist())) > 1
    # The same noises and captions, drawn by the file itself.
    two = networks.load_teacher(load(NARROW, [f"network.teacher={files / 'two.safetensors'}"]))
    noise, calls = [], predictor(two, torch.float32)

    def seen(x, t, context, added):
        noise.append(x.chunk(2)[0])
        return calls(x, t, context, added)

    Drawn(recipe, inner, seen, torch.device("cpu")).encode(range(8, 12))
    text = source.encode(range(8, 12)).text._replace(pooled=None)
    text = text._replace(states=text.states[::2])
    torch.testing.assert_close(batch.x0[::2], draw(recipe, calls, noise[0], text, inner.empty))
    # In parts of one sample each, as gradient accumulation asks for them: the same, drawn once.
    count = len(noise)
    parts = Drawn(recipe, inner, seen, torch.device("cpu"))
    for i, n in enumerate(range(8, 12)):
        torch.testing.assert_close(Batches(parts, recipe)([n]).x0[0], batch.x0[i], rtol=0, atol=1e-2)
    assert len(noise) == count + 2 * recipe.samples.steps
    found.take(Style())
    other = Drawn(recipe, inner, predictor(teacher, torch.float32), torch.device("cpu"))
    assert not torch.allclose(Batches(other, recipe)(range(8, 12)).x0, batch.x0)


# What is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, said",
    [
        (("styles.teacher=1",), "network.teacher teaches alone"),
        (("student.trained=all",), "ride on another network as a difference"),
        (("experts.on=down.0",), "ride on another network as a difference"),
        (("run.shard=true",), "styles does not go with run.shard"),
        (("styles.draws=true", "styles.uses=3"), "must be a multiple"),
        (("styles.draws=true", "data.flip=true", "data.source=cache"), "no pictures"),
        (("styles.merged=1.5",), "styles.merged must be between 0 and 1"),
        (("styles.carry=4",), "styles.carry: what a pack carries over is learned with its units trained before"),
    ],
)
def test_settings_that_cannot_work_are_refused(files, tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        settings(files, tmp_path, *changes)


def test_files_that_do_not_belong_are_refused(files, tmp_path):
    recipe = settings(files, tmp_path)
    loaded = open_unet(files / "one.safetensors")
    other = tmp_path / "eps.safetensors"
    write_unet(other, dict(loaded.tensors), replace(loaded.description, prediction="eps"))
    with pytest.raises(ValueError, match="eps.safetensors predicts eps, and network.prediction is 'v'"):
        style_set(settings(files, tmp_path, f'styles.checkpoints=["{other}"]'))
    architecture = Architecture.preset("base", recipe.network.config)
    cut = tmp_path / "cut.safetensors"
    write_unet(
        cut, {k: loaded.tensors[k] for k in architecture.keys()}, Description("unet", architecture, prediction="v")
    )
    with pytest.raises(ValueError, match="cut.safetensors is a pruned UNet"):
        style_set(settings(files, tmp_path, f'styles.checkpoints=["{cut}"]'))
    with pytest.raises(ValueError, match="styles.checkpoints: .*nothing.safetensors"):
        style_set(settings(files, tmp_path, f'styles.checkpoints=["{tmp_path / "nothing.safetensors"}"]'))


def test_a_lora_leaves_out_what_a_pack_has_cut(files, tmp_path):
    recipe = settings(files, tmp_path)
    one = whole_of(files, "one")
    student = networks.make_student(one, recipe)
    kept, cut = "down_blocks.0.attentions.0.proj_in", "down_blocks.0.attentions.1.proj_in"
    lora, names = {}, file_names(recipe.network.config)
    for layer in (kept, cut):
        lora |= {
            f"{names[layer]}.lora_up.weight": torch.ones(32, 1),
            f"{names[layer]}.lora_down.weight": torch.ones(1, 32),
        }
    save_file(lora, tmp_path / "both.safetensors")
    before = {name: p.clone() for name, p in student.named_parameters()}
    assert f"{kept}.weight" in before and f"{cut}.weight" not in before
    merge_file(student, recipe.network.config, tmp_path / "both.safetensors")
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {f"{kept}.weight"}


def test_loras_are_read_in_all_their_spellings_and_others_refused(files, tmp_path):
    unet = settings(files, tmp_path).network.config
    mine = LoraFile(files / "lora.safetensors", unet)
    assert len(mine) == 2 and mine.text == 1
    file = load_file(files / "lora.safetensors")
    kohya = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    up, down = file[f"{kohya}.lora_up.weight"], file[f"{kohya}.lora_down.weight"]
    peft = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{peft}.lora_B.weight": up, f"{peft}.lora_A.weight": down}, tmp_path / "peft.safetensors")
    (key,) = spelled = LoraFile(tmp_path / "peft.safetensors", unet)
    assert torch.equal(spelled[key], up @ down)
    torch.testing.assert_close(mine[key], 0.5 * (up @ down))
    for tensors, said in (
        ({f"{kohya}.hada_w1_a": up}, "otherwise than by a LoRA's two factors"),
        ({"lora_unet_nothing.lora_up.weight": up, "lora_unet_nothing.lora_down.weight": down}, "is no layer of a UNet"),
        ({f"{kohya}.lora_up.weight": up[:5], f"{kohya}.lora_down.weight": down}, "changes a layer of 5 outputs"),
    ):
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "bad.safetensors")
        with pytest.raises(ValueError, match=said):
            LoraFile(tmp_path / "bad.safetensors", unet)


def test_differences_of_the_product_are_those_of_the_core(files, tmp_path):
    recipe = run(settings(files, tmp_path, "run.steps=1"))
    weights = newest(recipe)
    teacher = open_unet(files / "teacher.safetensors").tensors
    product = open_pack(recipe.product)
    absolute = replace(
        product, description=replace(product.description, difference_of=None), tensors=dict(product.tensors)
    )
    names = {slot.unit.key(slot.tensor): name for name, slot in recipe.architecture.keys("diffusers").items()}
    plain = {key: weights[f"average.{names[key]}"] for key in product.description.unit_keys}
    _, changes = to_difference(replace(absolute, tensors=plain), teacher, "teacher.safetensors")
    assert_same(dict(changes), dict(product.tensors))
