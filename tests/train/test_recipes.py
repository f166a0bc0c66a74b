"""Every recipe takes a step, on a network of its family's layout with few channels."""

import json
import math

import pytest
from accelerate import Accelerator
from torch import nn

from asdm_core.packs import open_model
from asdm_core.tensor_file import TensorFile
from tests.train.recipes import RECIPES
from train import criterion
from train.losses import LOSSES
from train.recipe import load
from train.loop import train

SHAPES = {
    "sd15": "{model_channels = 32, channel_mult = [1, 1, 2, 2], down = [[1, 1], [1, 1], [1, 1], [0, 0]], mid = 1, "
    "up = [[0, 0, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]], context_dim = 32, num_heads = 4}",
    "sdxl": "{model_channels = 32, channel_mult = [1, 1, 2], down = [[0, 0], [2, 2], [10, 10]], mid = 10, "
    "up = [[10, 10, 10], [2, 2, 2], [0, 0, 0]], context_dim = 32, head_channels = 8, use_linear = true, adm_channels "
    "= 1568}",
}


class Pixels(nn.Module):
    """In VGG's place."""

    def forward(self, pictures):
        return [pictures]


@pytest.mark.sweep(4)
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_takes_a_step_and_ends_in_its_file(path, tmp_path, monkeypatch):
    monkeypatch.setattr(criterion, "load_vgg", lambda file: Pixels())
    shape = SHAPES["sdxl" if load(path).network.family == "sdxl" else "sd15"]
    recipe = load(
        path,
        [
            f"network.shape={shape}",
            "network.teacher=random",
            "student.start=",
            "data.source=random",
            "data.size=64",
            "styles.checkpoints=[]",
            "styles.uses=1",
            "gri.window=4",
            "gri.pool=2",
            f"run.folder={tmp_path}",
            "run.steps=1",
            "run.batch=2",
            "run.micro_batch=2",
            "run.precision=no",
            "run.picture_every=0",
            "run.log_every=1",
            "rollout.window=2",
        ],
    )
    train(recipe, Accelerator(cpu=True))
    if recipe.makes_network:
        final = open_model(recipe.product).description.training["final"]
    else:
        final = json.loads(TensorFile(recipe.product).metadata["asdm_training"])["final"]
    assert set(final) == {name for name in LOSSES if getattr(recipe.loss, name)}
    assert all(math.isfinite(value) for value in final.values())
