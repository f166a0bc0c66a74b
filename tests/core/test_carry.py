"""What a pack of differences carries over from other units: against the formula by hand, in files, refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from asdm_core import differences, packs, surgery
from asdm_core.__main__ import main
from asdm_core.architecture import Architecture
from asdm_core.carry import Carry
from asdm_core.identity import Checkpoint
from asdm_core.packs import Description, Loaded, open_pack
from asdm_core.tensor_file import BadFile
from tests.core.narrow import SD, SDXL, weights

pytestmark = pytest.mark.usefixtures("known")

M2 = Architecture.preset("m2", SD)
UNITS = M2.pack_units()


def matrices(carry, architecture=M2, seed=0):
    """Random ones, none of them silent."""
    generator = torch.Generator().manual_seed(seed)
    slots = carry.keys(architecture)
    return {k: 0.2 * torch.randn(s.shape, generator=generator) for k, s in slots.items()}


def own(seed=1):
    return surgery.extract(weights(SD, seed), M2, UNITS)


def carrying(rank=4, seed=1):
    """A pack that carries over what others in its blocks have, as one holds it that was trained in weights(SD)."""
    carry = Carry.within_blocks(M2, UNITS, rank)
    loaded = Loaded(Path("p.safetensors"), Description("pack", M2, UNITS), own(seed) | matrices(carry))
    description, tensors = differences.to_difference(loaded, weights(SD), "teacher", carry)
    return Loaded(loaded.path, description, tensors)


def by_hand(key, layer, spaces, sources, found, theirs):
    """What a tensor takes over, summed up with plain products, tap by tap of a kernel.

    spaces: that it writes into and reads from, with their path in the unit; None where that is outside.
    """
    path, leaf = key.removesuffix(f"{layer}.{key.rpartition('.')[2]}"), key.rpartition(".")[2]
    total = torch.zeros_like(weights(SD)[key], dtype=torch.float64)
    for unit, its_path in sources:
        stem = f"{path}carry.{unit}."

        def product(space, side, size, stem=stem):
            names = sorted(k for k in found if k.startswith(f"{stem}{space}.{side}"))
            whole = found[names[0]].double() if names else torch.eye(size).double()  # spaces of one width are one
            return whole @ found[names[1]].double() if len(names) > 1 else whole

        other = f"{its_path}.{layer}.{leaf}"
        change = (theirs[other] - weights(SD)[other]).double()
        gain = found[f"{stem}{layer}.gain"].double()
        taps = change.flatten(2).unbind(2) if change.dim() > 2 else [change]
        moved = []
        for tap in taps:
            left = product(spaces[0], "left", len(tap))
            if layer.endswith("ff.net.0.proj"):
                left = torch.block_diag(left, left)
            tap = left @ tap
            if tap.dim() > 1:
                tap = tap @ product(spaces[1], "right", tap.shape[1])
            moved.append(gain.view(-1, *[1] * (tap.dim() - 1)) * tap)
        total += (torch.stack(moved, 2) if change.dim() > 2 else moved[0]).reshape(total.shape)
    return total.float()


DOWN = [("down.1.0.transformer", "input_blocks.4.1"), ("down.1.1.transformer", "input_blocks.5.1")]
UP = [(f"up.3.{i}.resnet", f"output_blocks.{9 + i}.0") for i in range(3)]
BLOCK = "transformer_blocks.0."


@pytest.mark.parametrize("rank", [2, 4, 64])
@pytest.mark.parametrize(
    ("key", "layer", "spaces", "sources"),
    [
        ("output_blocks.9.0.in_layers.2.weight", "in_layers.2", ("hidden", "input"), UP),
        ("output_blocks.9.0.in_layers.2.bias", "in_layers.2", ("hidden", "input"), UP),
        ("output_blocks.9.0.emb_layers.1.weight", "emb_layers.1", ("hidden", None), UP),
        ("output_blocks.11.0.out_layers.3.weight", "out_layers.3", (None, "hidden"), UP),
        ("output_blocks.11.0.out_layers.3.bias", "out_layers.3", (None, "hidden"), UP),
        ("input_blocks.4.1.proj_in.weight", "proj_in", ("inner", None), DOWN),
        (
            f"input_blocks.4.1.{BLOCK}attn1.to_q.weight",
            f"{BLOCK}attn1.to_q",
            (f"{BLOCK}attn1.match", "inner"),
            DOWN,
        ),
        (
            f"input_blocks.4.1.{BLOCK}attn2.to_v.weight",
            f"{BLOCK}attn2.to_v",
            (f"{BLOCK}attn2.values", None),
            DOWN,
        ),
        (
            f"input_blocks.4.1.{BLOCK}ff.net.0.proj.weight",
            f"{BLOCK}ff.net.0.proj",
            (f"{BLOCK}ff", "inner"),
            DOWN,
        ),
        (f"input_blocks.4.1.{BLOCK}ff.net.0.proj.bias", f"{BLOCK}ff.net.0.proj", (f"{BLOCK}ff", "inner"), DOWN),
        (f"input_blocks.4.1.{BLOCK}ff.net.2.weight", f"{BLOCK}ff.net.2", ("inner", f"{BLOCK}ff"), DOWN),
    ],
)
def test_a_layer_takes_over_what_its_likes_have_changed(rank, key, layer, spaces, sources):
    pack = carrying(rank)
    other = weights(SD, 5)
    played = differences.played_in(pack, other, "other").tensors[key]
    plain = other[key] + (weights(SD, 1)[key] - weights(SD)[key])
    found = matrices(pack.description.carry)
    wanted = plain + by_hand(key, layer, spaces, sources, found, other)
    assert torch.allclose(played, wanted, rtol=1e-4, atol=1e-4) and not torch.allclose(played, plain, atol=1e-2)


def test_in_the_teacher_nothing_is_taken_over():
    played = differences.played_in(carrying(), weights(SD), "teacher").tensors
    assert set(played) == set(own())
    for key, tensor in own().items():
        assert torch.allclose(played[key], tensor, rtol=1e-4, atol=1e-4), key


def test_silent_matrices_are_no_carry_at_all():
    carry = Carry.within_blocks(M2, UNITS, 4)
    start = carry.start(M2, torch.Generator().manual_seed(0))
    assert {k: tuple(t.shape) for k, t in start.items()} == {k: s.shape for k, s in carry.keys(M2).items()}
    loaded = Loaded(Path("p.safetensors"), Description("pack", M2, UNITS), own() | start)
    description, tensors = differences.to_difference(loaded, weights(SD), "teacher", carry)
    plain, changed = differences.to_difference(Loaded(loaded.path, loaded.description, own()), weights(SD), "teacher")
    assert all(torch.equal(tensors[k], changed[k]) for k in changed)
    played = differences.played_in(Loaded(loaded.path, description, tensors), weights(SD, 5), "other").tensors
    wanted = differences.played_in(Loaded(loaded.path, plain, changed), weights(SD, 5), "other").tensors
    assert all(torch.equal(played[k], wanted[k]) for k in wanted)


def test_as_it_starts_a_change_reaches_its_likes_in_full_once_it_is_let_through():
    """L and R begin as 1: with a gain of 1 the whole change comes over."""
    carry = Carry.within_blocks(M2, UNITS, 64)
    start = carry.start(M2, torch.Generator().manual_seed(0))
    key = "input_blocks.1.0.out_layers.3.weight"
    (link,) = (one for one in carry.links(M2)[key] if one.source.startswith("input_blocks.2"))
    change = weights(SD, 2)[link.source]
    assert torch.equal(link(change, start | {link.gain: torch.ones(8)}), change)


def test_a_file_says_so_and_is_played_as_before(tmp_path, capsys):
    pack = carrying()
    path = tmp_path / "c.safetensors"
    packs.write_pack(path, pack.tensors, pack.description, None)
    found = open_pack(path)
    assert found.description == pack.description and found.description.carry.rank == 4
    assert json.loads(found.description.to_json())["format"] == 4
    assert differences.unchanged(found.description, found.tensors) == frozenset()
    other = weights(SD, 5)
    mine, wanted = (differences.played_in(p, other, "other") for p in (found, pack))
    assert mine.description.carry is None and mine.description.made_for.name == "other"
    assert all(torch.equal(mine.tensors[k], wanted.tensors[k]) for k in wanted.tensors)
    main(["inspect", str(path)])
    assert "take over what a finetune has changed in 23 units" in capsys.readouterr().out


def test_the_command_adds_up_what_is_carried(tmp_path):
    pack = carrying()
    packs.write_pack(tmp_path / "c.safetensors", pack.tensors, pack.description, None)
    full = Description("unet", Architecture.full(SD))
    packs.write_unet(tmp_path / "other.safetensors", weights(SD, 2), full)
    wanted = differences.played_in(pack, weights(SD, 2), "other").tensors
    arguments = [str(tmp_path / f"{name}.safetensors") for name in ("other", "c", "whole")]
    assert main(["assemble", *arguments, "--dtype", "fp32"]) == 0
    whole = packs.open_unet(tmp_path / "whole.safetensors").tensors
    assert all(torch.equal(whole[k], wanted.get(k, weights(SD, 2)[k])) for k in M2.keys())
    arguments = [str(tmp_path / f"{name}.safetensors") for name in ("c", "other", "absolute")]
    assert main(["to-absolute", *arguments, "--dtype", "fp32"]) == 0
    absolute = open_pack(tmp_path / "absolute.safetensors")
    assert absolute.description.carry is None and set(absolute.tensors) == set(wanted)
    assert all(torch.equal(absolute.tensors[k], wanted[k]) for k in wanted)


def test_the_mean_of_packs_that_carry_something_is_refused(tmp_path, capsys):
    pack = carrying()
    for name in "ab":
        packs.write_pack(tmp_path / f"{name}.safetensors", pack.tensors, pack.description, None)
    assert main(["mean-pack", *(str(tmp_path / f"{name}.safetensors") for name in "abc")]) != 0
    assert (
        "whose mean is not that of the matrices" in capsys.readouterr().err
        and not (tmp_path / "c.safetensors").exists()
    )


def test_a_checkpoint_that_lacks_what_is_carried_over_is_refused():
    less = {k: v for k, v in weights(SD).items() if not k.startswith("input_blocks.2.0.")}
    with pytest.raises(BadFile, match=r"input_blocks.2.0.*it is not there"):
        differences.played_in(carrying(), less, "pruned")


def test_layers_share_the_matrices_of_a_space_and_norms_take_over_nothing():
    links = Carry.within_blocks(M2, UNITS, 64).links(M2)
    assert not any(".norm" in key or ".in_layers.0" in key or ".out_layers.0" in key for key in links)

    def of(layer):
        return next(one for one in links[f"input_blocks.1.{layer}"] if "input_blocks.2." in one.source)

    block = "1.transformer_blocks.0."
    assert of("0.in_layers.2.weight").left == of("0.in_layers.2.bias").left == of("0.emb_layers.1.weight").left
    assert of(f"{block}attn1.to_q.weight").left == of(f"{block}attn1.to_k.weight").left
    assert of(f"{block}attn1.to_q.weight").left != of(f"{block}attn2.to_q.weight").left
    assert (
        of(f"{block}attn1.to_q.weight").right
        == of("1.proj_out.weight").right
        == of(f"{block}ff.net.0.proj.weight").right
    )
    assert of("1.proj_in.weight").left == of(f"{block}attn2.to_out.0.weight").left == of(f"{block}ff.net.2.bias").left
    assert not of("0.out_layers.3.weight").left and not of("1.proj_in.weight").right  # outside they are 1


def test_blocks_that_a_transformer_has_lost_take_over_nothing():
    cut = Architecture(SDXL, frozenset({"down.2.0.transformer.3"}))
    carry = Carry.within_blocks(cut, ["down.2.0.transformer"], 4)
    keys = carry.keys(cut)
    assert keys and not any("transformer_blocks.3." in key for key in keys)


@pytest.mark.parametrize(
    "broken",
    [
        7,
        {"rank": 4},
        {"rank": 4, "pairs": []},
        {"rank": 0, "pairs": [["down.0.0.resnet", "down.0.1.resnet"]]},
        {"rank": True, "pairs": [["down.0.0.resnet", "down.0.1.resnet"]]},
        {"rank": 10**9, "pairs": [["down.0.0.resnet", "down.0.1.resnet"]]},
        {"rank": 4, "pairs": [["down.0.0.resnet"]]},
        {"rank": 4, "pairs": [["down.0.0.resnet", 3]]},
        {"rank": 4, "pairs": [["down.0.0.resnet", "down.0.1.transformer"]]},
        {"rank": 4, "pairs": [["down.0.1.resnet", "down.0.0.resnet"]]},  # cut
        {"rank": 4, "pairs": [["mid.0.resnet", "mid.1.resnet"]]},  # not played
        {"rank": 4, "pairs": [["down.0.0.transformer", "down.0.1.transformer.0"]]},
        {"rank": 4, "pairs": [["down.0.0.resnet", "nowhere"]]},
        {"rank": 4, "pairs": 2 * [["down.0.0.resnet", "down.0.1.resnet"]]},
    ],
)
def test_a_broken_carry_is_refused(broken):
    told = json.loads(carrying().description.to_json())
    with pytest.raises(ValueError):
        Description.from_json(json.dumps(told | {"carry": broken}))


def test_only_differences_carry_anything():
    carry = Carry.within_blocks(M2, UNITS, 4)
    with pytest.raises(ValueError, match="only differences"):
        Description("pack", M2, UNITS, carry=carry)
    described = Description("pack", M2, UNITS, difference_of=Checkpoint.of("t", weights(SD), SD), carry=carry)
    with pytest.raises(ValueError, match="only units that a pack plays"):
        replace(described, units=UNITS[1:])
