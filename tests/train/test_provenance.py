"""What files were made with is told by contents: a moved model is the same, one that is exchanged is another."""

import shutil

import pytest
import torch

from tests.train.recipes import NARROW
from tests.train.test_batches import write_cache
from tests.train.test_schedules import write_folder, write_teacher
from train.recipe import load
from train.data import Random
from train.encoders import Text
from train.provenance import ENCODERS, NETWORK, contents
from train.rollout import Bank
from train.schedules import STANDARD
from train.sources import Prompts
from train.teacher_outputs import stream_of

CPU = torch.device("cpu")


def samples(tmp_path, monkeypatch, *changes):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    config = load(NARROW, ["data.source=prompts", f"data.path={tmp_path / 'prompts.txt'}", *changes])
    return Prompts(config, lambda x, *_: x, lambda texts: Text(torch.zeros(len(texts), 3, 32)), CPU).settings


def bank(tmp_path, monkeypatch, *changes):
    lora = ["student.preset=full", "student.trained=none", "lora.rank=4", "loss.blocks=0", "loss.mid=0", "loss.task=0"]
    steps = ["loss.output=0", "loss.rollout=1", "rollout.steps=[2]", f"run.folder={tmp_path / 'run'}"]
    config = load(NARROW, [*lora, *steps, *changes])
    return Bank(config, Random(config), lambda x, *_: x, CPU).settings


def outputs(tmp_path, monkeypatch, *changes):
    return stream_of(load(NARROW, list(changes)))


@pytest.mark.parametrize("made_with", [samples, bank, outputs])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_teacher_made_is_bound_to_its_contents(made_with, kind, tmp_path, monkeypatch):
    def teacher(name, seed=0):
        path = tmp_path / name
        if kind == "file":
            return write_teacher(path.with_suffix(".safetensors"), licence=f"weights {seed}")
        (write_folder(path, STANDARD) / "unet" / "config.json").write_text(f"{seed}")
        return path

    def made(path):
        return made_with(tmp_path, monkeypatch, f"network.teacher={path}")

    path = teacher("first")
    first = made(path)
    moved = path.with_stem("moved")
    shutil.move(path, moved)
    assert made(moved) == first
    other = teacher("other", seed=1)
    assert made(other) != first
    shutil.move(other, path)  # exchanged where it lay
    assert made(path) != first


def test_samples_are_bound_to_the_encoders_and_outputs_to_the_cache(tmp_path, monkeypatch):
    (tmp_path / "a" / "text_encoder").mkdir(parents=True)
    (tmp_path / "a" / "text_encoder" / "model.safetensors").write_bytes(b"one")
    first = samples(tmp_path, monkeypatch, f"encoders.models={tmp_path / 'a'}")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert samples(tmp_path, monkeypatch, f"encoders.models={tmp_path / 'b'}") == first
    (tmp_path / "a" / "text_encoder" / "model.safetensors").write_bytes(b"two")
    assert samples(tmp_path, monkeypatch, f"encoders.models={tmp_path / 'a'}") != first

    def of(path, pictures):
        return outputs(tmp_path, monkeypatch, "data.source=cache", f"data.path={write_cache(path, pictures)}")

    assert of(tmp_path / "c.safetensors", 5) == of(tmp_path / "d.safetensors", 5) != of(tmp_path / "c.safetensors", 6)


def test_contents_look_at_what_is_read_and_nothing_else(tmp_path):
    """Each part by itself: what belongs to it changes it, what does not leaves it alone."""
    for folder in (*NETWORK, *ENCODERS, "safety_checker"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.safetensors").write_bytes(b"one")
    before = contents(tmp_path, NETWORK), contents(tmp_path, ENCODERS)
    for folder in (*NETWORK, *ENCODERS, "safety_checker"):
        file = tmp_path / folder / "model.safetensors"
        file.write_bytes(b"another")
        now = contents(tmp_path, NETWORK), contents(tmp_path, ENCODERS)
        assert [a != b for a, b in zip(now, before, strict=True)] == [folder in NETWORK, folder in ENCODERS]
        file.write_bytes(b"one")
        (tmp_path / folder / "picture.png").write_bytes(b"a picture")
        assert (contents(tmp_path, NETWORK), contents(tmp_path, ENCODERS)) == before
    assert contents("random") == "random"
