"""Aspect-ratio buckets and mirrored pictures: shapes, orders, caches and folders, and a run on them."""

import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from tests.train.recipes import NARROW
from tests.train.test_sources import models  # noqa: F401
from train import buckets
from train.recipe import load
from train.data import Batches, Cache
from train.encode import captioned, encode, read_picture, shape_of
from train.encoders import latents_of, load_text, load_vae
from train.loop import train
from train.sources import open_source

SIZES = [(300, 300), (310, 300), (600, 250), (250, 600), (640, 260), (300, 299), (255, 610)]
RECIPE = ["data.size=128", "data.buckets=true", "data.bucket_batch=2", "run.batch=2", "run.micro_batch=2"]


@pytest.fixture()
def folder(tmp_path):
    """Pictures that are dark at their left, of several shapes."""
    path = tmp_path / "in"
    path.mkdir()
    for i, (width, height) in enumerate(SIZES):
        ramp = np.linspace(0, 255, width).astype("uint8")[None].repeat(height, 0)
        Image.fromarray(ramp).convert("RGB").save(path / f"{i}.png")
        (path / f"{i}.txt").write_text("red cat" if i % 2 else "blue")
    return path


def test_the_shapes_are_those_of_the_scheme():
    found = buckets.shapes(512)
    assert len(found) == len(set(found)) and (512, 512) in found and {(h, w) for w, h in found} == set(found)
    for w, h in found:
        assert w % 64 == h % 64 == 0 and 256 <= min(w, h) and max(w, h) <= 1024 and w * h <= 512 * 512
        assert w == 1024 or h == 1024 or w * (h + 64) > 512 * 512 or (w + 64) * h > 512 * 512
    assert {(256, 1024), (384, 640), (448, 576), (320, 768)} <= set(found)
    for shape in found:
        assert buckets.nearest(512, *shape) == shape
    assert buckets.nearest(512, 3000, 100)[0] == 1024 and buckets.nearest(512, 100, 101) == (512, 512)


def test_groups_are_of_one_bucket_and_every_number_comes():
    its = [i % 7 % 3 for i in range(50)]
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        order = buckets.in_groups(torch.randperm(50, generator=g).tolist(), its, 4, g)
        assert len(order) == 4 * buckets.groups(its, 4) and set(order) == set(range(50))
        assert all(len({its[i] for i in order[at : at + 4]}) == 1 for at in range(0, len(order), 4))
        assert len(order) - 50 == sum(-its.count(b) % 4 for b in range(3))
        firsts = [its[i] for i in order[::4]]
        assert firsts != sorted(firsts)


def test_turned_pictures_are_taken_as_they_are_seen(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (400, 200)).save(tmp_path / "a.jpg", exif=exif)
    assert shape_of(tmp_path / "a.jpg", 512)[0] < shape_of(tmp_path / "a.jpg", 512)[1]
    (tmp_path / "b.jpg").write_bytes(b"x")
    assert shape_of(tmp_path / "b.jpg", 512) == (512, 512)


def test_a_picture_keeps_its_aspect_ratio_and_sdxl_its_sizes(folder):
    picture, sizes = read_picture(folder / "2.png", (192, 64))
    assert picture.shape == (3, 64, 192)
    assert sizes.tolist() == [250, 600, (round(250 * 192 / 600) - 64) // 2, 0, 64, 192]
    mirrored, same = read_picture(folder / "2.png", (192, 64), flip=True)
    assert torch.equal(mirrored, picture.flip(-1)) and torch.equal(same, sizes)


def opened(folder, tmp_path, models, cached, *changes):  # noqa: F811
    path = folder
    if cached:
        path = tmp_path / "cache"
        broken = encode(
            captioned(folder), path, 128, latents_of(load_vae(models)), load_text(models), 2, buckets=True, flip=True
        )
        assert not broken
    return load(
        NARROW,
        [
            f"data.source={'cache' if cached else 'folder'}",
            f"data.path={path}",
            f"encoders.models={models}",
            "data.caption_dropout=0",
            *RECIPE,
            *changes,
        ],
    )


@pytest.mark.parametrize("cached", [True, False])
def test_batches_are_of_one_shape_and_mirrored_every_other_time(folder, tmp_path, models, cached):  # noqa: F811
    config = opened(folder, tmp_path, models, cached, "data.flip=true")
    source = open_source(config)
    assert isinstance(source, Cache) == cached and source.count == len(SIZES)
    batches = Batches(source, config)
    length = len(source)
    to_latents = latents_of(load_vae(models))
    wanted = {}
    for i, (width, height) in enumerate(SIZES):
        shape = buckets.nearest(128, width, height)
        for flip in (False, True):
            wanted[i, flip] = to_latents(read_picture(folder / f"{i}.png", shape, flip)[0][None])[0]
    seen = []
    for at in range(0, 4 * length, 2):
        batch = batches(range(at, at + 2))
        assert batch.noise.shape == batch.x0.shape
        for x in batch.x0:
            near = [k for k, v in wanted.items() if v.shape == x.shape and torch.allclose(v, x, atol=2e-3)]
            assert near
            seen.append(near[0])
    assert {i for i, _ in seen} == set(range(len(SIZES))) and {flip for _, flip in seen} == {True, False}
    assert batches.order(0) != batches.order(1)


def test_a_run_on_buckets_is_the_same_for_smaller_micro_batches(folder, tmp_path, models):  # noqa: F811
    ends = []
    for micro in (2, 1):
        config = opened(
            folder,
            tmp_path,
            models,
            True,
            f"run.micro_batch={micro}",
            "run.steps=3",
            "run.picture_every=0",
            f"run.folder={tmp_path / str(micro)}",
        )
        train(config, Accelerator(cpu=True))
        ends.append(json.loads((tmp_path / str(micro) / "log.jsonl").read_text().splitlines()[-1]))
    assert math.isclose(ends[0]["task"], ends[1]["task"], rel_tol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.bucket_batch=3"], "data.bucket_batch = 3: wanted a multiple of run.micro_batch = 2"),
        (["data.size=120"], "data.size: with data.buckets a multiple of 64, got 120"),
        (["data.source=shards"], "data.buckets: the shapes of 'shards' are not known beforehand"),
        (
            ["data.source=prompts", "data.buckets=false", "data.flip=true"],
            "data.flip: 'prompts' has no pictures to mirror",
        ),
    ],
)
def test_what_buckets_and_flips_cannot_go_with_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        load(NARROW, [*RECIPE, "data.source=folder", *changes])


def test_caches_without_shapes_or_mirrored_pictures_are_named(folder, tmp_path, models):  # noqa: F811
    config = opened(folder, tmp_path, models, True)
    with pytest.raises(ValueError, match="different shapes want data.buckets = true"):
        Cache(config.data.path, load(NARROW, ["data.size=128"]))
    encode(captioned(folder), tmp_path / "plain", 128, latents_of(load_vae(models)), load_text(models), 2)
    with pytest.raises(ValueError, match="00000.safetensors holds no mirrored pictures"):
        Cache(tmp_path / "plain", load(NARROW, ["data.size=128", "data.source=cache", "data.flip=true"]))


def test_long_captions_come_back_from_a_cache(folder, tmp_path, models):  # noqa: F811
    long = "red cat blue dog " * 4  # 16 tokens: three rows of 6
    (folder / "0.txt").write_text(long)
    to_text = load_text(models)
    encode(captioned(folder), tmp_path / "cache", 128, latents_of(load_vae(models)), to_text, 2)
    cache = Cache(tmp_path / "cache", load(NARROW, ["data.size=128"]))
    text = cache.texts([0, 1], [0.0, 0.0])
    assert text.states.shape == (2, 24, 32)
    torch.testing.assert_close(text.states, to_text([long, "red cat"]).states, atol=2e-3, rtol=0)
    assert cache.text(1).states.shape == (1, 24, 32)
