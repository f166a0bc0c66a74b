"""Losses on pictures that are not trained on, and the trackers a run goes to."""

import json
import sys

import pytest
import torch
from accelerate import Accelerator

from tests.train.test_sources import models, recipe, write_folder  # noqa: F401
from train import networks
from train.data import Batches
from train.diffusion import coefficients
from train.criterion import Criterion
from train.log import flat
from train.loop import train
from train.sources import open_source
from train.taps import Tapped


def run(tmp_path, models, *changes):  # noqa: F811
    for name, count in (("data", 6), ("other", 5)):
        if not (tmp_path / name).exists():
            write_folder(tmp_path / name, count)
    config = recipe(
        "folder",
        tmp_path / "data",
        models,
        *("run.steps=2", "run.batch=2", "run.micro_batch=2", "run.picture_every=1", "run.log_every=1"),
        *(f"run.folder={tmp_path / 'run'}", "run.stored=float32", "samples.steps=1", *changes),
    )
    train(config, Accelerator(cpu=True))
    return config, [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]


def test_the_log_has_the_losses_of_the_average_on_other_pictures(models, tmp_path):  # noqa: F811
    given = [f"data.held_out={tmp_path / 'other'}", "data.held_out_count=3", "data.caption_dropout=0.5"]
    config, lines = run(tmp_path, models, *given)
    found = [line for line in lines if "held_out" in line]
    assert [line["step"] for line in found] == [1, 2] and found[0]["held_out"] != found[1]["held_out"]
    assert [line["step"] for line in lines if "held_out" not in line] == [1, 2]
    # The same by hand, from the product; three samples are four, in parts of two.
    its = recipe("folder", tmp_path / "other", models, "data.caption_dropout=0")
    teacher = networks.load_teacher(config)
    student = networks.assembled(teacher, config.product)
    criterion = Criterion(config, torch.device("cpu"))
    batch = Batches(open_source(its), its)(range(4))
    a, s = coefficients(batch.t)
    x = a * batch.x0 + s * batch.noise
    with torch.no_grad():
        outputs = [
            Tapped(net, paths)(x, batch.t, batch.context)
            for net, paths in ((student, criterion.student_paths), (teacher, criterion.teacher_paths))
        ]
        values = criterion(batch, x, *outputs).mean(1)
    for name, value in zip(criterion.weights, values.tolist(), strict=True):
        assert found[1]["held_out"][name] == pytest.approx(value, rel=1e-3)


def test_trackers_get_the_losses_and_every_setting(models, tmp_path):  # noqa: F811
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, _ = run(tmp_path, models, 'run.trackers=["tensorboard"]', "optimiser.lr=0.0005", "run.picture_every=0")
    folder = tmp_path / "run" / "narrow"
    said = next(folder.rglob("hparams.yml")).read_text()
    assert "optimiser.lr: 0.0005" in said and "run.batch: 2" in said
    events = EventAccumulator(str(folder)).Reload()
    assert [e.step for e in events.Scalars("task")] == [1, 2] and "waited_for_data" in events.Tags()["scalars"]


def test_what_is_not_there_is_named(models, tmp_path, monkeypatch):  # noqa: F811
    for name, message in (("wand", "run.trackers: 'wand' is none of"), ("wandb", "pip install wandb")):
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(ValueError, match=message):
            run(tmp_path, models, f'run.trackers=["{name}"]')
    with pytest.raises(ValueError, match="data.held_out: possible with the sources cache, folder, shards"):
        recipe("prompts", tmp_path, models, "data.held_out=x")


def test_settings_are_flat_under_the_keys_of_set():
    given = {"a": {"b": 1, "c": {"d": True}}, "e": [1, 2], "f": None, "g": "x"}
    assert flat(given) == {"a.b": 1, "a.c.d": True, "e": "[1, 2]", "f": "null", "g": "x"}
