"""The teacher's outputs computed once: a run on them is the run with the teacher, and wrong ones are refused."""

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from tests.train.recipes import NARROW
from train.recipe import load
from train.criterion import Criterion
from train.loop import train
from train.teacher_outputs import TeacherOutputs, write_teacher_outputs

CPU = torch.device("cpu")


def paths(recipe):
    return Criterion(recipe, CPU).teacher_paths


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    recipe = load(NARROW)
    with pytest.MonkeyPatch.context() as m:
        m.setattr("train.teacher_outputs.SHARD", 16)
        write_teacher_outputs(folder, recipe, paths(recipe), count=24, device=CPU, batch=4)
    return folder


def settings(folder, outputs, *changes):
    return load(NARROW, [f"run.folder={folder}", f"network.teacher_outputs={outputs}", "run.stored=float32", *changes])


def test_a_run_on_them_equals_one_with_the_teacher(outputs, tmp_path, monkeypatch):
    monkeypatch.setattr("train.teacher_outputs.SHARD", 16)
    assert [p.name for p in sorted(outputs.iterdir())] == ["00000.safetensors", "00001.safetensors"]
    products = []
    for name, given in (("live", ""), ("computed", outputs)):
        recipe = settings(tmp_path / name, given, "loss.blocks=0", "loss.mid=0")
        train(recipe, Accelerator(cpu=True))
        products.append(load_file(recipe.product))
    assert products[0].keys() == products[1].keys()
    for key, value in products[0].items():
        assert torch.equal(value, products[1][key]), key


def test_features_are_those_of_the_sample(outputs, monkeypatch):
    monkeypatch.setattr("train.teacher_outputs.SHARD", 16)
    recipe = settings("unused", outputs)
    found = TeacherOutputs(recipe, paths(recipe))
    predicted, features = found(range(14, 18), CPU)
    first, second = (load_file(p) for p in sorted(outputs.iterdir()))
    assert torch.equal(predicted, torch.cat([first["predicted"][14:], second["predicted"][:2]]))
    assert set(features) == set(paths(recipe)) and features["mid_block"].dtype == torch.float16
    assert torch.equal(features["mid_block"], torch.cat([first["mid_block"][14:], second["mid_block"][:2]]))


def test_a_stopped_computation_goes_on(outputs, tmp_path, monkeypatch):
    monkeypatch.setattr("train.teacher_outputs.SHARD", 16)
    recipe = load(NARROW)
    write_teacher_outputs(tmp_path, recipe, paths(recipe), count=16, device=CPU, batch=4)
    changed = (tmp_path / "00000.safetensors").stat().st_mtime_ns
    write_teacher_outputs(tmp_path, recipe, paths(recipe), count=24, device=CPU, batch=4)
    assert (tmp_path / "00000.safetensors").stat().st_mtime_ns == changed
    for a, b in zip(sorted(tmp_path.iterdir()), sorted(outputs.iterdir()), strict=True):
        one, two = load_file(a), load_file(b)
        assert all(torch.equal(one[k], two[k]) for k in two)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["seed=7"], "made for another stream"),
        (["data.caption_dropout=0.5"], "made for another stream"),
        (["student.preset=base"], r"does not hold down_blocks.2, with which narrow compares"),
        (["run.steps=9"], "holds 32 samples, narrow takes 36"),
    ],
)
def test_outputs_that_do_not_fit_are_named(outputs, changes, message, monkeypatch):
    monkeypatch.setattr("train.teacher_outputs.SHARD", 16)
    recipe = settings("unused", outputs, *changes)
    with pytest.raises(ValueError, match=message):
        TeacherOutputs(recipe, paths(recipe))
    with pytest.raises(ValueError, match="holds no .safetensors file"):
        TeacherOutputs(settings("unused", outputs / "none"), [])
