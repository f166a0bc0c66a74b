"""The benchmark of style: its measures, its rows and its section of the page."""

import argparse

import pytest
import torch

from asdm_core.packs import open_pack, open_unet
from bench import style
from bench._evidence import STYLE, with_style
from tests.train.recipes import CONFIGS
from train.emoji.unet import load_unet

MODELS = CONFIGS.parents[1] / "models" / "emoji"
LORA = MODELS.parent / "loras" / "emoji-two-steps.safetensors"


def row(name, psnr, grad=1.0):
    return {"row": name, "psnr": psnr, "psnr_se": 0.25, "grad": grad, "top1": 0.5, "forwards": 6}


ROWS = [
    row("style_openmoji_2", 17.0),
    row("style_m2_absolute", 10.7),
    row("style_m2_difference", 11.8, 0.8),
    row("style_m2_styles", 14.2, 0.9),
    row("style_m2_fitted_3min", 18.5),
    row("style_teacher_m2_absolute", 20.0),
    row("style_teacher_m2_difference", 20.0),
    row("style_teacher_m2_styles", 19.75),
]


def test_the_summary_has_the_names_of_the_measures():
    found = style.summary_of(ROWS, True)
    assert found["style_psnr_m2_untuned"] == 14.2 and found["style_grad_m2_untuned"] == 0.9
    assert found["style_psnr_m2_fitted_3min"] == 18.5 and found["style_psnr_openmoji_2"] == 17.0
    assert found["teacher_psnr_lost_by_styles"] == 0.25 and found["teacher_psnr_lost_by_difference"] == 0
    assert not any("teacher_m2" in key for key in found)
    assert style.summary_of(ROWS[:3], False)["style_psnr_m2_untuned"] == 11.8


def test_the_section_is_put_in_once_and_made_anew():
    page = "# Title\n\n## Transfer\n\nsome\n\n## Not tried here\n\n- this\n"
    once = with_style(page, {"rows": ROWS[:2]})
    again = with_style(once, {"rows": ROWS})
    assert once.startswith("# Title\n\n## Transfer\n\nsome\n\n" + STYLE) and once.endswith(
        "\n## Not tried here\n\n- this\n"
    )
    assert "| M2 over many styles, a difference | | not run" in once
    assert "| M2 over many styles, a difference | 6 | 14.20 +- 0.25 | 0.90 | 50.0% |" in again
    assert again.count(STYLE) == 1 and again.endswith("\n## Not tried here\n\n- this\n")
    assert with_style(again, {"rows": ROWS[:2]}) == once


def test_a_difference_rides_in_the_finetune_and_is_the_pack_in_the_teacher(tmp_path):
    args = argparse.Namespace(folder=tmp_path, models=MODELS, styles=None, lora=[LORA], minutes=[])
    rows = {r.name: r for r in style.rows_of(args, [])}
    assert [r.forwards for r in rows.values()] == [6, 4, 6, 6, 6, 6, 2, 2]
    absolute, changed = rows["style_m2_absolute"], rows["style_m2_difference"]
    teacher, finetune = load_unet(MODELS / style.TEACHER), load_unet(MODELS / style.FINETUNE)
    key = "input_blocks.1.0.in_layers.2.weight"
    name = "down_blocks.0.resnets.0.conv1.weight"
    its = {which: open_unet(MODELS / which).tensors[key].float() for which in (style.TEACHER, style.FINETUNE)}
    pack = open_pack(MODELS / "emoji-m2.safetensors").tensors[key].float()
    assert torch.equal(absolute.network(finetune).get_parameter(name), pack)
    change = (pack - its[style.TEACHER]).half().float()  # as it is stored
    for network, which in ((finetune, style.FINETUNE), (teacher, style.TEACHER)):
        played = changed.network(network).get_parameter(name)
        torch.testing.assert_close(played, its[which] + change, atol=1e-6, rtol=0)


def test_a_lora_without_steps_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"lora_unet_conv_in.lora_up.weight": torch.zeros(1, 1)}, tmp_path / "plain.safetensors")
    args = argparse.Namespace(
        folder=tmp_path, models=MODELS, styles=None, lora=[tmp_path / "plain.safetensors"], minutes=[]
    )
    with pytest.raises(SystemExit, match="does not say for how many steps"):
        list(style.rows_of(args, []))


def test_a_fit_is_measured_against_a_bare_step():
    found = style.speed(argparse.Namespace(models=MODELS, speed=1), ["a cat", "a dog", "an owl", "a key"])
    assert found["samples_per_second"] > 0 and found["bare"] > 0
    assert len(found["all_seconds"]["fit"]) == len(found["all_seconds"]["bare"]) == 1
