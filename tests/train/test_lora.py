"""LoRAs: the merged layer against the two-layer form, names, files, and what a LoRA goes on from."""

import pytest
import torch
from torch.nn import functional as F

from asdm_core.addresses import keys, lora_names
from asdm_core.architecture import FAMILIES
from asdm_core.lora import report
from asdm_core.packs import open_pack
from asdm_core.tensor_file import TensorFile
from tests.train.recipes import NARROW
from train import lora, networks
from train.recipe import load
from train.lora import changes, file_names, merge_file, tensors_of, write_lora

LORA = ("student.preset=full", "student.trained=none", "lora.rank=4", "loss.blocks=0", "loss.mid=0")


def settings(*given):
    return load(NARROW, [*LORA, *given])


def student(recipe, filled=True):
    net = networks.make_student(networks.load_teacher(recipe), recipe)
    if filled:
        g = torch.Generator().manual_seed(0)
        for change in changes(net).values():
            change.up.data = 0.1 * torch.randn(change.up.shape, generator=g)
    return net.eval()


def inputs(recipe):
    g = torch.Generator().manual_seed(1)
    unet, side = recipe.network.config, recipe.data.side
    return (
        torch.randn(2, 4, side, side, generator=g),
        torch.tensor([900, 20]),
        torch.randn(2, 5, unet.context_dim, generator=g),
    )


@pytest.mark.parametrize(
    "given", [(), ("lora.alpha=2", "lora.rank=3"), ("lora.convolutions=false",), ("lora.on=up.2-3",)]
)
def test_merged_weights_compute_what_lora_modules_compute(given):
    """The reference adds up(down(x)) to the output of each original layer, as LoRA modules do."""
    recipe = settings(*given)
    net, original = student(recipe), networks.load_teacher(recipe)
    found = changes(net)
    convolutions = 0

    def beside(change, layer):
        def hook(module, args, output):
            x = args[0]
            if isinstance(layer, torch.nn.Conv2d):
                down = change.down.view(-1, *layer.weight.shape[1:])
                return output + change.scale * F.conv2d(
                    F.conv2d(x, down, None, layer.stride, layer.padding), change.up[..., None, None]
                )
            return output + change.scale * F.linear(F.linear(x, change.down), change.up)

        return hook

    for name, change in found.items():
        layer = original.get_submodule(name)
        convolutions += isinstance(layer, torch.nn.Conv2d)
        layer.register_forward_hook(beside(change, layer))
    assert bool(convolutions) == recipe.lora.convolutions
    with torch.no_grad():
        mine, its = net(*inputs(recipe)).sample, original(*inputs(recipe)).sample
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-4)
        plain = networks.load_teacher(recipe)(*inputs(recipe)).sample
        assert (mine - plain).abs().max() > 0.01


def test_gradients_reach_both_factors_and_nothing_else():
    recipe = settings()
    net = student(recipe)
    net(*inputs(recipe)).sample.square().mean().backward()
    got = {name for name, p in net.named_parameters() if p.grad is not None}
    assert got == {f"{layer}.{lora.MERGED}.0.{part}" for layer in changes(net) for part in ("down", "up")}


def test_it_starts_as_nothing_and_in_an_order_of_its_own():
    recipe = settings()
    net, original = student(recipe, filled=False), networks.load_teacher(recipe)
    with torch.no_grad():
        assert torch.equal(net(*inputs(recipe)).sample, original.eval()(*inputs(recipe)).sample)
    again = changes(student(recipe, filled=False))
    assert all(torch.equal(c.down, again[n].down) and c.down.std() > 0 for n, c in changes(net).items())


def test_no_layer_gets_more_than_its_own_rank():
    net = student(settings("lora.rank=64"))
    assert all(c.down.shape[0] == min(64, c.up.shape[0], c.down.shape[1]) for c in changes(net).values())
    assert changes(net)["conv_out"].down.shape[0] == 4


@pytest.mark.parametrize("family", ["sd15", "sdxl", "emoji"])
def test_files_have_names_the_host_reads(family):
    config = FAMILIES[family]
    layers = {t.removesuffix(".weight"): s for t, s in keys(config, "diffusers").items() if len(s.shape) > 1}
    names, known = file_names(config), lora_names(config)
    assert len({names[layer] for layer in layers}) == len(layers)
    for layer, slot in layers.items():
        assert known[names[layer]] == slot.unit.key(slot.tensor).removesuffix(".weight")
    # kohya's own scripts name the layers of SD1.5 as diffusers does and those of SDXL as LDM does.
    wanted = (
        "lora_unet_input_blocks_4_1_proj_in" if family == "sdxl" else "lora_unet_down_blocks_0_attentions_0_proj_in"
    )
    assert wanted in names.values()


def test_a_file_lands_whole_and_goes_on_exactly(tmp_path):
    recipe = settings()
    net, path = student(recipe), tmp_path / "a.safetensors"
    write_lora(path, net, recipe, {"steps": 1}, None, "CC0-1.0")
    file = TensorFile(path)
    found = report(file.shapes, recipe.architecture)
    assert len(found.kept) == len(changes(net)) and not (found.dropped or found.peft or found.unknown or found.text)
    assert not found.misfits
    assert file.metadata["ss_network_dim"] == "4" and file.metadata["modelspec.license"] == "CC0-1.0"
    conv = file["lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"]
    assert conv.shape[2:] == (3, 3) and file["lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight"].shape[2:] == (
        1,
        1,
    )
    merged = networks.load_teacher(recipe)
    merge_file(merged, recipe.network.config, path)
    for name in changes(net):
        mine, wanted = (unet.get_submodule(name).weight for unet in (merged, net))
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-3)
    again = networks.make_student(networks.load_teacher(recipe), settings(f"lora.start={path}"))
    for name, change in changes(again).items():
        wanted = changes(net)[name]
        assert torch.equal(change.down, wanted.down.half().float()) and torch.equal(change.up, wanted.up.half().float())
    # Another alpha only changes how the same weights are shared out.
    other = networks.make_student(networks.load_teacher(recipe), settings(f"lora.start={path}", "lora.alpha=2"))
    for name, layer in changes(other).items():
        zero = torch.zeros(layer.up.shape[0], layer.down.shape[1])
        torch.testing.assert_close(layer(zero), changes(again)[name](zero))
    # A larger rank goes on from the same change, with room that does nothing yet.
    wide = networks.make_student(networks.load_teacher(recipe), settings(f"lora.start={path}", "lora.rank=5"))
    for name, layer in changes(wide).items():
        zero = torch.zeros(layer.up.shape[0], layer.down.shape[1])
        torch.testing.assert_close(layer(zero), changes(again)[name](zero))
        rank = changes(again)[name].down.shape[0]
        assert len(layer.down) == rank or layer.down[rank:].any() and not layer.up[:, rank:].any()
    assert any(len(layer.down) > len(changes(again)[name].down) for name, layer in changes(wide).items())
    with pytest.raises(ValueError, match="a.safetensors does not fit at lora_unet_conv_in.lora_down.weight"):
        networks.make_student(networks.load_teacher(recipe), settings(f"lora.start={path}", "lora.rank=2"))
    with pytest.raises(ValueError, match="lora.start: .*Train the stage before this one first"):
        networks.make_student(networks.load_teacher(recipe), settings(f"lora.start={tmp_path / 'none.safetensors'}"))
    assert tensors_of(net, recipe.network.config).keys() == set(file)


def test_a_pack_learns_to_play_with_a_lora_that_stays_as_it_is(tmp_path):
    """What is trained is the pack in the original with the file merged into all of it, as the host plays the two."""
    first, path = settings(), tmp_path / "given.safetensors"
    write_lora(path, student(first), first, {"steps": 1}, None, "CC0-1.0")
    given = [f"lora.start={path}", "lora.rank=6", "lora.trained=false", "student.preset=m2", "student.trained=own"]
    recipe = settings(*given, f"run.folder={tmp_path}", "run.stored=float32")
    net = networks.make_student(networks.load_teacher(recipe), recipe).eval()
    out = net(*inputs(recipe)).sample
    out.square().mean().backward()
    own = set(recipe.architecture.own)
    got = {
        name.replace(f"{lora.MERGED}.original", "weight") for name, p in net.named_parameters() if p.grad is not None
    }
    slots = recipe.architecture.keys("diffusers").values()
    assert got == {s.unit.key(s.tensor, "diffusers") for s in slots if s.unit.address in own}
    networks.write_product(net, recipe, {"teacher": "random", "start": "", "steps": 1, "samples": 1})
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([path.name, recipe.product.name])
    assert open_pack(recipe.product).description.training["lora"] == path.name
    played = networks.assembled(networks.load_teacher(recipe), recipe.product)
    plain = played(*inputs(recipe)).sample
    merge_file(played, recipe.network.config, path)
    torch.testing.assert_close(out, played(*inputs(recipe)).sample, rtol=1e-3, atol=1e-4)
    assert (out - plain).abs().max() > 0.01


@pytest.mark.parametrize("given", [(), ("lora.start=a.safetensors",)])
def test_a_lora_that_does_not_learn_needs_a_file_and_a_pack_that_does(given):
    with pytest.raises(ValueError, match="is for a pack that learns to play with a LoRA"):
        settings("lora.trained=false", *given)
