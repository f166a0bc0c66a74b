"""Caches of latents, and batches that depend on the seed and the number of the sample alone."""

import pytest
import torch

from asdm_core.tensor_file import write_file
from tests.train.recipes import CONFIGS, NARROW
from train.recipe import load
from train.data import Batches, Cache, Random
from train.diffusion import STEPS
from train.sources import open_source


def write_cache(path, pictures=5, first=0, **changes):
    """Picture i has latents i; its captions j in (0, 1) have states 10 i + j."""
    numbers = torch.arange(first, first + pictures).float()
    tensors = {
        "latents": numbers[:, None, None, None].expand(-1, 4, 8, 8).half(),
        "captions": torch.arange(2 * pictures).view(-1, 2),
        "states": (10 * numbers[:, None] + torch.tensor([0.0, 1.0])).flatten()[:, None, None].expand(-1, 3, 32).half(),
        "empty": torch.full((3, 32), -1.0).half(),
    }
    path.parent.mkdir(exist_ok=True)
    write_file(path, {k: v for k, v in (tensors | changes).items() if v is not None}, {})
    return path


def recipe(*changes):
    return load(NARROW, ["data.source=cache", *changes])


def test_a_sample_depends_on_the_seed_and_its_number_alone():
    config = load(NARROW)
    one = Batches(Random(config), config)
    two = Batches(Random(config), config)
    other = Batches(Random(config), load(NARROW, ["seed=5"]))
    one(range(100, 120))
    whole = one(range(4, 8))
    parts = [two(range(6, 8)), two(range(4, 6))]
    for a, *b in zip(whole, *reversed(parts), strict=True):
        assert a is None and b == [None, None] or torch.equal(a, torch.cat(b))
    assert not torch.equal(other(range(4, 8)).noise, whole.noise)
    assert (
        whole.x0.shape == whole.noise.shape == (4, 4, 8, 8)
        and whole.context.shape == (4, 8, 32)
        and whole.t.shape == (4,)
    )


def test_every_picture_comes_once_an_epoch_in_a_new_order(tmp_path):
    config = recipe(f"data.path={write_cache(tmp_path / 'a.safetensors')}")
    batches = Batches(open_source(config), config)
    drawn = batches(range(20)).x0[:, 0, 0, 0].int().tolist()
    epochs = [drawn[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs) and len(set(map(tuple, epochs))) > 1


def test_captions_are_drawn_and_dropped(tmp_path):
    path = write_cache(tmp_path / "a.safetensors")
    config = recipe(f"data.path={path}", "data.caption_dropout=0.25")
    batch = Batches(open_source(config), config)(range(1000))
    dropped = batch.context[:, 0, 0] == -1
    assert 200 < int(dropped.sum()) < 300
    which = (batch.context[:, 0, 0] - 10 * batch.x0[:, 0, 0, 0])[~dropped]
    assert set(which.tolist()) == {0, 1} and 0.4 < float(which.mean()) < 0.6
    config = recipe(f"data.path={path}", "data.caption_dropout=0")
    assert (Batches(open_source(config), config)(range(100)).context >= 0).all()


def test_timesteps_are_uniform_or_rarely_quiet():
    config = load(NARROW)
    t = Batches(Random(config), config)(range(2000)).t
    assert 0 <= int(t.min()) < 10 and STEPS - 10 < int(t.max()) < STEPS
    assert all(400 < int((t // 250 == q).sum()) < 600 for q in range(4))
    config = load(NARROW, ["data.timesteps=snr"])
    assert int((Batches(Random(config), config)(range(2000)).t < 250).sum()) < 300


def test_several_files_are_one_cache(tmp_path):
    write_cache(tmp_path / "b" / "000.safetensors", 3), write_cache(tmp_path / "b" / "001.safetensors", 4, first=3)
    source = Cache(tmp_path / "b", recipe())
    assert len(source) == 7
    latents, (states, pooled), *_ = source.examples(range(7), [0.75] * 7)
    assert latents.dtype == states.dtype == torch.float32 and pooled is None
    assert [latents[i].unique().tolist() for i in range(7)] == [[i] for i in range(7)]
    assert [states[i].unique().tolist() for i in range(7)] == [[10 * i + 1] for i in range(7)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions": None}, "wanted a tensor 'captions' of 2 dimensions, got none"),
        ({"empty": torch.zeros(3)}, r"wanted a tensor 'empty' of 2 dimensions, got \[3\]"),
        ({"latents": torch.zeros(5, 4, 16, 16)}, r"latents are \[4, 16, 16\], wanted \[4, 8, 8\] \(data.size = 64\)"),
        ({"states": torch.zeros(10, 3, 768)}, "768 wide, a UNet of smoke takes 32"),
        ({"latents": torch.zeros(0, 4, 8, 8)}, "holds no pictures"),
        ({"captions": torch.full((5, 2), 10)}, "its captions are not those of its 5 pictures and 10 texts"),
        ({"captions": torch.zeros(3, 2).long()}, "its captions are not those"),
        ({"captions": torch.zeros(5, 0).long()}, "its captions are not those"),
        ({"captions": torch.zeros(5, 2)}, "its captions are not those"),
        ({"rows": torch.tensor([[9, 2]] * 10)}, "its captions are not those"),
        ({"empty": torch.zeros(3, 16)}, "its empty caption is of another width"),
    ],
)
def test_a_wrong_cache_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Cache(write_cache(tmp_path / "a.safetensors", **changes), recipe())


def test_missing_data_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no .safetensors file"):
        Cache(tmp_path, recipe())
    with pytest.raises(ValueError, match="no such file"):
        Cache(tmp_path / "none.safetensors", recipe())
    with pytest.raises(ValueError, match="data.path: give the data"):
        open_source(recipe())
    assert load(CONFIGS / "sd15-base.toml").data.path
