"""The benchmark of few steps: which rows there are, how they are drawn, and what their files must say."""

import pytest
import torch

from asdm_core.architecture import FAMILIES
from bench import fewstep
from tests.train.recipes import CONFIGS
from train import lora, networks
from train.recipe import load
from train.diffusion import ddim, schedule
from train.encoders import Text
from train.rollout import few_steps, guided_trajectory

MODELS = CONFIGS.parents[1] / "models" / "emoji"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A LoRA of two steps that does nothing."""
    recipe = load(
        CONFIGS / "emoji-two-steps-lora.toml",
        [f"network.teacher={MODELS / 'emoji-teacher.safetensors'}", "lora.rank=1"],
    )
    path = tmp_path_factory.mktemp("lora") / "two.safetensors"
    student = networks.make_student(networks.load_teacher(recipe), recipe)
    lora.write_lora(path, student, recipe, {}, few_steps(recipe.rollout), None)
    return path


def test_the_teachers_few_steps_stand_beside_every_student(written):
    rows = {row.name: row for row in fewstep.rows_of([f"mine={written}"])}
    assert list(rows) == ["ddim_20", "teacher_1", "teacher_2", "teacher_3", "teacher_4", "mine"]
    assert [row.forwards for row in rows.values()] == [40, 2, 4, 6, 8, 2]
    assert rows["mine"].times == (999, 499) and rows["ddim_20"].macs == 20 * rows["mine"].macs
    both = fewstep.student(f"both={MODELS / 'emoji-m2.safetensors'}+{written}")
    assert both.macs < rows["mine"].macs and both.forwards == 2
    with pytest.raises(ValueError, match="say 0 ways to be run"):
        fewstep.student(f"m2={MODELS / 'emoji-m2.safetensors'}")
    with pytest.raises(ValueError, match="wanted NAME=FILE"):
        fewstep.student(str(written))


def test_the_reference_is_the_familys_own_ddim():
    g = torch.Generator().manual_seed(0)
    noise, states, empty = torch.randn(2, 4, 4, 4, generator=g), torch.randn(2, 3, 5, generator=g), torch.zeros(1, 3, 5)

    def predict(x, t, context, added=None):
        return x.flip(1) * context.mean((1, 2))[:, None, None, None] + t[:, None, None, None] / 1000

    mine = guided_trajectory(predict, noise, Text(states), Text(empty), schedule(20), "ddim", 3.0, "v", 32)
    torch.testing.assert_close(mine[:, -1], ddim(predict, noise, states, empty, 20, 3.0), rtol=1e-4, atol=1e-4)


def test_the_summary_has_the_names_of_the_measures():
    row = {"row": "two_steps_lora", "psnr": 23.0, "border": 0.02, "grad": 0.9, "top1": 0.9, "factor": 20.0}
    assert fewstep.summary([row]) == {
        "psnr_two_steps_lora": 23.0,
        "border_two_steps_lora": 0.02,
        "grad_two_steps_lora": 0.9,
        "top1_two_steps_lora": 0.9,
        "mac_factor_two_steps_lora": 20.0,
    }
    assert FAMILIES["emoji"] == fewstep.CONFIG
