"""Packs as differences: there and back, refused where they cannot be, and which checkpoint is which."""

import json
from dataclasses import replace

import pytest
import torch

from asdm_core import differences, packs, surgery, tensor_file
from asdm_core.__main__ import main
from asdm_core.architecture import Architecture
from asdm_core.identity import Checkpoint, places
from asdm_core.packs import Description, open_pack
from asdm_core.tensor_file import BadFile
from tests.core.narrow import SD, weights

pytestmark = pytest.mark.usefixtures("known")

KEY = "input_blocks.1.0.in_layers.2.weight"
M2 = Architecture.preset("m2", SD)


@pytest.fixture
def teacher(tmp_path):
    path = tmp_path / "teacher.safetensors"
    packs.write_unet(path, weights(SD), Description("unet", Architecture.full(SD), prediction="v"))
    return path


def write_pack(path, tensors, **more):
    packs.write_pack(path, tensors, Description("pack", M2, M2.pack_units(), **more), None)
    return path


def own(seed=0):
    return surgery.extract(weights(SD, seed), M2, M2.pack_units())


def test_the_teachers_own_weights_are_a_difference_of_zero_and_add_up_to_any_checkpoints_own(tmp_path, teacher):
    path = write_pack(tmp_path / "own.safetensors", own())
    assert main(["to-difference", str(path), str(teacher), str(tmp_path / "d.safetensors"), "--dtype", "keep"]) == 0
    found = open_pack(tmp_path / "d.safetensors")
    assert not any(t.any() for t in found.tensors.values())
    assert differences.unchanged(found.description, found.tensors) == set(M2.pack_units())
    played = differences.played_in(found, weights(SD, 5), "other").tensors
    assert all(torch.equal(played[k], weights(SD, 5)[k]) for k in found.description.unit_keys)


@pytest.mark.parametrize("preset", ["m1", "m2", "m3", "base"])
def test_there_and_back(tmp_path, teacher, preset):
    chosen = Architecture.preset(preset, SD)
    units = tuple(u.address for u in chosen.kept)
    tensors = surgery.extract(weights(SD, 1), chosen, units)
    packs.write_pack(tmp_path / "a.safetensors", tensors, Description("pack", chosen, units, licence="mine"), None)
    for command, source, target in (("to-difference", "a", "d"), ("to-absolute", "d", "b")):
        paths = [str(tmp_path / f"{source}.safetensors"), str(teacher), str(tmp_path / f"{target}.safetensors")]
        assert main([command, *paths, "--dtype", "fp32"]) == 0
    changed, back = (open_pack(tmp_path / f"{name}.safetensors") for name in "db")
    assert changed.description.difference_of.name == "teacher.safetensors"
    assert back.description.made_for.name == "teacher.safetensors" and back.description.licence == "mine"
    assert all(torch.equal(changed.tensors[k], tensors[k] - weights(SD)[k]) for k in tensors)
    # Rounded twice, each time by half a step of the larger number at the most.
    assert all(torch.allclose(back.tensors[k], tensors[k], rtol=0, atol=2**-21) for k in tensors)


def test_in_another_checkpoint_the_difference_is_added_to_its_weights(tmp_path, teacher):
    pack = write_pack(tmp_path / "p.safetensors", own(1))
    description, tensors = differences.to_difference(open_pack(pack), weights(SD), "teacher")
    packs.write_pack(tmp_path / "d.safetensors", tensors, description, None)
    packs.write_unet(tmp_path / "other.safetensors", weights(SD, 2), Description("unet", Architecture.full(SD)))
    wanted = {k: weights(SD, 2)[k] + (weights(SD, 1)[k] - weights(SD)[k]) for k in own()}
    arguments = [str(tmp_path / f"{name}.safetensors") for name in ("other", "d", "whole")]
    assert main(["assemble", *arguments, "--dtype", "fp32"]) == 0
    found = packs.open_unet(tmp_path / "whole.safetensors").tensors
    assert all(torch.equal(found[k], wanted.get(k, weights(SD, 2)[k])) for k in M2.keys())


def test_files_say_what_they_are(tmp_path, teacher, capsys):
    path = write_pack(tmp_path / "p.safetensors", own(1))
    assert json.loads(tensor_file.read_header(path).metadata["asdm"])["format"] == 2  # older versions read it
    main(["to-difference", str(path), str(teacher), str(tmp_path / "d.safetensors")])
    assert json.loads(tensor_file.read_header(tmp_path / "d.safetensors").metadata["asdm"])["format"] == 3
    capsys.readouterr()
    main(["inspect", str(tmp_path / "d.safetensors")])
    assert "differences from teacher.safetensors" in capsys.readouterr().out


def test_what_cannot_be_is_refused(tmp_path, teacher):
    pack = open_pack(write_pack(tmp_path / "p.safetensors", own(1)))
    description, tensors = differences.to_difference(pack, weights(SD), "teacher")
    changed = replace(pack, description=description, tensors=tensors)
    with pytest.raises(BadFile, match="holds differences already"):
        differences.to_difference(changed, weights(SD), "teacher")
    with pytest.raises(BadFile, match="holds no differences"):
        differences.to_absolute(pack, weights(SD), "teacher")
    less = {k: v for k, v in weights(SD).items() if k != KEY}
    with pytest.raises(BadFile, match="it is not there"):
        differences.to_absolute(changed, less, "teacher")
    bound = replace(pack, description=replace(pack.description, made_for=Checkpoint.of("t", weights(SD), SD)))
    with pytest.raises(BadFile, match="it was made for t, and other has other weights"):
        differences.to_difference(bound, weights(SD, 2), "other")
    with pytest.raises(ValueError, match="only the units of a pack"):
        Description("unet", M2, difference_of=Checkpoint.of("t", weights(SD), SD))


@pytest.mark.parametrize("broken", [{}, {"name": "a"}, {"name": 3, "marks": []}, {"name": "a", "marks": [1.0]}, 7])
def test_a_broken_checkpoint_in_a_description_is_refused(broken):
    told = json.loads(Description("pack", M2, M2.pack_units()).to_json())
    with pytest.raises(ValueError, match="checkpoint"):
        Description.from_json(json.dumps(told | {"made_for": broken}))


def test_a_mark_that_is_no_finite_number_is_refused():
    marks = [0.0] * len(places(SD))
    for bad in (True, "1", 1e400):
        with pytest.raises(ValueError, match="finite numbers"):
            Checkpoint.from_dict({"name": "a", "marks": [bad, *marks[1:]]}, SD)


# Which checkpoint is which ----------------------------------------------------------------------------------------


def as_checkpoint(tensors):
    return Checkpoint.of("", tensors, SD)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_a_checkpoint_is_itself_in_every_dtype(dtype):
    small = {k: v * 0.05 for k, v in weights(SD).items()}
    mine = as_checkpoint(small)
    stored = as_checkpoint({k: v.to(dtype) for k, v in small.items()})
    assert not mine.is_other(stored) and not stored.is_other(mine)
    assert Checkpoint.from_dict(json.loads(json.dumps(stored.to_dict())), SD) == stored
    other = as_checkpoint({k: v.to(dtype) for k, v in weights(SD, 1).items()})
    assert mine.is_other(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_finetune_and_a_merged_lora_are_others(dtype):
    mine = as_checkpoint(weights(SD))
    tuned = {k: (v + 0.02 * weights(SD, 3)[k]).to(dtype) for k, v in weights(SD).items()}
    merged = {k: tuned[k] if ".attn2." in k else v.to(dtype) for k, v in weights(SD).items()}
    assert mine.is_other(as_checkpoint(tuned)) and mine.is_other(as_checkpoint(merged))


def test_a_checkpoint_that_lacks_units_is_compared_in_the_rest():
    cut, _ = surgery.cut(weights(SD), Architecture.preset("base", SD))
    assert not as_checkpoint(weights(SD)).is_other(as_checkpoint(cut))
