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


def by_hand(key, layer, sources, found, theirs):
    """What a tensor takes over, summed up with plain products, tap by tap of a kernel."""
    leaf = key.rpartition(".")[2]
    total = torch.zeros_like(weights(SD)[key], dtype=torch.float64)
    for unit, path in sources:
        other = f"{path}.{layer}.{leaf}"
        change = (theirs[other] - weights(SD)[other]).double()
        stem = f"{key.removesuffix(f'{layer}.{leaf}')}{layer}.carry.{unit}."

        def product(name, stem=stem):
            factors = [v.double() for k, v in sorted(found.items()) if k.startswith(f"{stem}{name}")]
            return torch.linalg.multi_dot(factors) if len(factors) > 1 else factors[0] if factors else None

        left, right = product("left"), product("right")
        if left is None:
            total += product("gain") * change
        elif change.dim() == 1:
            total += left @ change
        else:
            shape = total.shape
            taps = (
                [left @ tap if right is None else left @ tap @ right for tap in change.flatten(2).unbind(2)]
                if (change.dim() > 2)
                else [left @ change if right is None else left @ change @ right]
            )
            total += torch.stack(taps, 2).reshape(shape)
    return total.float()


@pytest.mark.parametrize("rank", [2, 4, 64])
@pytest.mark.parametrize(
    ("key", "layer", "sources"),
    [
        (
            "input_blocks.1.0.in_layers.2.weight",
            "in_layers.2",
            [("down.0.0.resnet", "input_blocks.1.0"), ("down.0.1.resnet", "input_blocks.2.0")],
        ),
        (
            "output_blocks.9.0.out_layers.3.bias",
            "out_layers.3",
            [(f"up.3.{i}.resnet", f"output_blocks.{9 + i}.0") for i in range(3)],
        ),
        (
            "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
            "transformer_blocks.0.attn2.to_k",
            [("down.1.0.transformer", "input_blocks.4.1"), ("down.1.1.transformer", "input_blocks.5.1")],
        ),
        (
            "input_blocks.4.1.transformer_blocks.0.norm2.weight",
            "transformer_blocks.0.norm2",
            [("down.1.0.transformer", "input_blocks.4.1"), ("down.1.1.transformer", "input_blocks.5.1")],
        ),
    ],
)
def test_a_layer_takes_over_what_its_likes_have_changed(rank, key, layer, sources):
    pack = carrying(rank)
    other = weights(SD, 5)
    played = differences.played_in(pack, other, "other").tensors[key]
    plain = other[key] + (weights(SD, 1)[key] - weights(SD)[key])
    wanted = plain + by_hand(key, layer, sources, matrices(pack.description.carry), other)
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
    """R spans all that it can: with L the identity the whole change of a square layer comes over."""
    carry = Carry.within_blocks(M2, UNITS, 64)
    start = carry.start(M2, torch.Generator().manual_seed(0))
    key = "input_blocks.1.0.out_layers.3.weight"
    (link,) = (one for one in carry.links(M2)[key] if one.source.startswith("input_blocks.2"))
    change = weights(SD, 2)[link.source]
    assert torch.equal(link(change, start | {link.left[0]: torch.eye(8)}), change)


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


def test_a_checkpoint_that_lacks_what_is_carried_over_is_refused():
    less = {k: v for k, v in weights(SD).items() if not k.startswith("input_blocks.2.0.")}
    with pytest.raises(BadFile, match=r"input_blocks.2.0.*it is not there"):
        differences.played_in(carrying(), less, "pruned")


def test_what_reads_the_same_has_no_right_factor():
    carry = Carry.within_blocks(M2, UNITS, 64)
    for links in carry.links(M2).values():
        for link in links:
            alike = any(name in link.source for name in ("emb_layers.1.", "attn2.to_k.", "attn2.to_v."))
            assert bool(link.right) == (not alike and not link.gain and link.source.endswith("weight")), link


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
