"""Tiny stand-ins for the data of the emoji family: no graphics, no network, no trained weights."""

import argparse
import json

import pytest
import torch

from asdm_core.addresses import UNetConfig
from asdm_core.tensor_file import write_file

from train.emoji import unet
from train.emoji.codec import Codec, to_taesd
from train.emoji.data import Glyphs, variants
from train.emoji.latents import LatentSet
from train.emoji.sources import STYLES, Concept

TINY = UNetConfig(
    "tiny",
    32,
    (1, 1, 2, 2),
    ((1, 1), (1, 1), (1, 1), (0, 0)),
    1,
    ((0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
    context_dim=32,
    num_heads=4,
)
WORDS = ("cat face", "red heart", "rocket", "pizza", "owl", "key", "robot", "dress", "cactus", "star", "bell", "crab")


@pytest.fixture(scope="session")
def concepts():
    return [Concept(f"1F{400 + i}", name, (f"tag{i}", "shared"), "things") for i, name in enumerate(WORDS)]


@pytest.fixture(scope="session")
def glyphs(concepts):
    g = torch.Generator().manual_seed(0)
    pixels = torch.zeros(len(STYLES), len(concepts), 4, 256, 256, dtype=torch.uint8)
    colours = torch.randint(0, 256, (len(STYLES), len(concepts), 3, 1, 1), generator=g, dtype=torch.uint8)
    pixels[:, :, :3, 40:216, 40:216] = colours
    pixels[:, :, 3, 40:216, 40:216] = 255
    return Glyphs(concepts, pixels)


class FakeTokens:
    """Rows from the letters: the real tokeniser comes with ComfyUI, which these tests do without."""

    ids = list(range(64))

    def __call__(self, texts):
        return torch.tensor([[0] + [ord(c) % 62 + 1 for c in t[:8]] + [63] * (15 - len(t[:8])) for t in texts])


@pytest.fixture()
def tokens():
    return FakeTokens()


@pytest.fixture()
def data(concepts):
    chosen = variants(concepts, STYLES[:2], everything=True)
    return LatentSet(chosen, torch.randn(len(chosen), 4, 16, 16, generator=torch.Generator().manual_seed(1)).half())


@pytest.fixture()
def tiny(monkeypatch):
    """Tiny UNet config, also where the scripts take the family's."""
    monkeypatch.setattr(unet, "CONFIG", TINY)
    return TINY


@pytest.fixture()
def settings(tmp_path):
    """Arguments as the command line would give them, with folders of this test."""
    runs, models = tmp_path / "runs", tmp_path / "models"
    runs.mkdir(), models.mkdir()
    torch.manual_seed(0)
    write_file(
        models / "emoji-vae.safetensors", {k: v.half() for k, v in to_taesd(Codec()).items()}, {"x": json.dumps(0)}
    )
    return argparse.Namespace(
        runs=runs,
        models=models,
        seed=0,
        device="cpu",
        threads=1,
        minutes=1.0,
        steps=6,
        fresh=False,
        batch=4,
        lr=1e-3,
        ema=0.99,
        show_minutes=99.0,
        pooled_samples=8,
        host=None,
    )
