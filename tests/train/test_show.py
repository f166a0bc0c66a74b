"""What a run shows and leaves behind: pictures, curves, the model card; and what it says when the disk is full."""

import errno

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from asdm_core import tensor_file
from tests.train.recipes import NARROW
from train import show
from train.recipe import load
from train.loop import train
from train.optimisation import Average, averaged

# The narrow network as one of SD1.5, whose latents have a fixed matrix to pictures.
SD15 = ("network.family=sd15", "samples.steps=2", "run.steps=2", "run.log_every=1")


def settings(folder, *changes):
    return load(NARROW, [f"run.folder={folder}", *changes])


def run(*arguments):
    recipe = settings(*arguments)
    train(recipe, Accelerator(cpu=True))
    return recipe


def test_pictures_show_teacher_above_student_and_change_nothing(tmp_path):
    changes = (*SD15, "student.preset=full", "student.trained=all", "loss.mid=0", "loss.blocks=0", "optimiser.lr=1e-30")
    shown = run(tmp_path / "a", *changes, "run.picture_every=1", "run.tensorboard=true")
    plain = run(tmp_path / "b", *changes, "run.picture_every=0")
    a, b = (load_file(max(r.folder.glob("checkpoint-*.safetensors"))) for r in (shown, plain))
    assert all(torch.equal(a[k], b[k]) for k in b) and not (plain.folder / "pictures").exists()
    files = sorted((shown.folder / "pictures").iterdir())
    assert [f.name for f in files] == ["00000001.png", "00000002.png"]
    grid = np.array(Image.open(files[0]).convert("RGB")).astype(int)
    half = grid.shape[0] // 2
    # A student that is the teacher draws what the teacher draws.
    assert grid.shape == (68, 136, 3) and abs(grid[:half] - grid[half:]).max() <= 2 and grid[:half].std() > 5
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(shown.folder / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == {"lr", "gradient", "loss/task", "loss/output"} and board.Tags()["images"]
    assert [e.step for e in board.Scalars("loss/task")] == [1, 2]


def test_the_average_stands_in_for_the_weights_and_goes_again():
    weights = {"a": torch.nn.Parameter(torch.randn(5))}
    average = Average(weights, 0.9)
    average.weights["a"] += 1
    before = weights["a"].detach().clone()
    mean = average.weights["a"].clone()
    with pytest.raises(RuntimeError), averaged(weights, average):
        assert torch.equal(weights["a"], mean)
        raise RuntimeError
    assert torch.equal(weights["a"], before) and torch.equal(average.weights["a"], mean)


def test_latents_without_a_way_to_pictures_are_not_drawn():
    assert show.decoder(load(NARROW), torch.device("cpu")) is None


def test_the_card_says_what_was_trained(tmp_path):
    recipe = run(tmp_path, "run.steps=2")
    card = (tmp_path / "narrow.md").read_text()
    own = sum(
        v.numel()
        for k, v in load_file(max(tmp_path.glob("checkpoint-*.safetensors"))).items()
        if k.startswith("weights.")
    )
    for part in (
        "A pack of the smoke family (m2), for the node Apply Pack",
        f"{own / 1e6:.1f} M of them trained",
        "| steps | 2 |",
        "| samples | 8 |",
        "| pictures left out (unreadable) | 0 |",
        'preset = "m2"',
    ):
        assert part in card, part
    text = card[card.index("```toml\n") + 8 : card.rindex("```")]
    (tmp_path / "again.toml").write_text(text)
    assert load(tmp_path / "again.toml") == recipe


def test_tensorboard_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="run.tensorboard needs TensorBoard: pip install tensorboard"):
        run(tmp_path, "run.tensorboard=true")


def test_a_full_disk_leaves_the_last_checkpoint_whole_and_the_run_goes_on_from_it(tmp_path, monkeypatch):
    original = tensor_file.save_file

    def full(tensors, path, metadata=None):
        if "00000004" in str(path):
            original(dict(list(tensors.items())[:3]), path, metadata=metadata)  # a part of it was written
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, path, metadata=metadata)

    with (
        monkeypatch.context() as m,
        pytest.raises(
            OSError,
            match=r"checkpoint-00000004.safetensors cannot be written \(No space left on "
            r"device\). checkpoint-00000002.safetensors is whole; make room",
        ),
    ):
        m.setattr(tensor_file, "save_file", full)
        run(tmp_path / "full")
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == ["checkpoint-00000002.safetensors", "log.jsonl"]
    run(tmp_path / "full"), run(tmp_path / "whole")
    a, b = (load_file(tmp_path / name / "checkpoint-00000006.safetensors") for name in ("full", "whole"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
