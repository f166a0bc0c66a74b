"""The benchmarks of style and of longer trainings: their measures, their rows and their sections of the page."""

import argparse
from collections import Counter

import pytest
import torch

from asdm_core.packs import open_pack, open_unet
from bench import longer, style
from bench._evidence import plot_samples
from bench._evidence_page import FEW, FEW_ROWS, LONGER, ROLLOUTS, STYLE, with_few_steps, with_longer, with_style
from tests.train.recipes import CONFIGS
from train.emoji.unet import load_unet
from train.rollout import Course

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
    assert "carries over what cut units have | | not run" in once
    assert "carries over what cut units have | 6 | 14.20 +- 0.25 | 0.90 | 50.0% |" in again
    assert again.count(STYLE) == 1 and again.endswith("\n## Not tried here\n\n- this\n")
    assert with_style(again, {"rows": ROWS[:2]}) == once


LONGER_ROWS = [
    *(
        {"part": "samples", "row": "m1", "samples": n, "seed": s, "psnr": p}
        for n, s, p in ((3008, 1, 18.0), (8000, 1, 20.0))
    ),
    *({"part": "samples", "row": "m1", "samples": 24_000, "seed": s, "psnr": 20.0 + s} for s in (1, 2, 3)),
    *(
        {"part": "samples", "row": "m5", "what": "M5, all", "samples": 24_000, "seed": s, "psnr": 19.0 + s}
        | {"border": 0.02, "grad": 0.9, "accuracy": 0.8 + s / 100, "pictures": n}
        for s, n in ((1, 240), (2, 240), (3, 120))
    ),
    longer.spread("m1", [torch.tensor([23.0, 25.0]), torch.tensor([24.0, 26.0])]),
    {"part": "rollouts", "row": "pairs", "uses": 3, "trajectories": 1024, "samples": 6144, "psnr": 18.0, "psnr_se": 0.2}
    | {"steps": 2, "border": 0.02, "grad": 0.9, "top1": 0.8},
]


def test_longer_trainings_have_a_section_and_means_over_seeds(tmp_path):
    found = longer.summary(LONGER_ROWS)
    assert (found["psnr_m1_24000"], found["psnr_m1_24000_sd"], found["psnr_m1_3008"]) == (22, 1, 18)
    assert "psnr_m1_3008_sd" not in found and found["psnr_rollout_pairs"] == 18
    assert found["psnr_noises_m1"] == 24.5 and found["psnr_noises_m1_sd"] == pytest.approx(0.5**0.5)
    # One more way, file or seed leaves the record's others.
    assert len(set(map(longer.kind_of, LONGER_ROWS))) == len(LONGER_ROWS)
    page = "# Title\n\n" + STYLE + "\n\nsome\n\n## Not tried here\n\n- this\n"
    once = with_longer(page, LONGER_ROWS[:2])
    again = with_longer(once, LONGER_ROWS)
    assert once.startswith("# Title\n\n" + STYLE + "\n\nsome\n\n" + LONGER)
    assert "| M1 | 18.00 | 20.00 | 22.00 (1.00) | 24.50 after" in again and "| 2 | 1,024 | 3 times | 18.00" in again
    assert again.count(LONGER) == 1 and again.endswith("\n## Not tried here\n\n- this\n")
    # A row with one number of samples is no curve, but has its spread.
    assert "| M5 |" not in again
    assert (
        "| M5, all | 24,000 | 3 | 120 or 240 | 21.00 (1.00) | 0.0200 (0.0000) | 0.900 (0.000) | 82.0% (1.0%) |" in again
    )
    assert with_longer(again, LONGER_ROWS[:2]) == once
    plot_samples(tmp_path / "plot.png", LONGER_ROWS)
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_few_steps_have_a_section_with_the_original_beside_them():
    page = "# Title\n\n" + STYLE + "\n\nsome\n\n## Not tried here\n\n- this\n"
    row = {"forwards": 2, "factor": 20.0, "psnr": 23.5, "psnr_se": 0.2, "border": 0.02, "grad": 0.9, "top1": 0.9}
    row |= {"pictures": 1440}
    reference = {key: value for key, value in row.items() if "psnr" not in key}
    rows = [{"row": "two_steps_lora"} | row, {"row": "ddim_20"} | reference, {"row": "style_2_steps_lora"} | row]
    found = with_few_steps(with_few_steps(page, {"rows": rows[:1]}), {"rows": rows})
    assert found.count(FEW) == 1 and found.count("not run") == len(FEW_ROWS) - 2
    assert "| LoRA in models/, 2 steps | 1,440 | 2 | 20.0 x | 23.50 +- 0.20 | 0.0200 | 0.90 | 90.0% |" in found
    assert "| the original, 20 steps of ddim, CFG 3 | 1,440 | 2 | 20.0 x |  | 0.0200 |" in found


def test_trajectories_are_walked_as_often_as_the_way_says(tmp_path):
    """All recipes of the bench have as many samples; each trajectory is walked so often, and none but those."""
    args = argparse.Namespace(folder=tmp_path, models=MODELS, runs=tmp_path)
    assert set(longer.ROLLOUTS) == set(ROLLOUTS)
    for name, (uses, _) in longer.ROLLOUTS.items():
        recipe = longer.recipe(args, name)
        assert recipe.run.steps * recipe.run.batch == longer.ROLLED
        course = Course(recipe)
        walks = {
            course.place(step, sample).walk for step in range(recipe.run.steps) for sample in range(recipe.run.batch)
        }
        used = Counter(map(course.trajectory, walks))
        assert recipe.rollout.window == pytest.approx(longer.ROLLED / recipe.rollout.steps[0] / uses, rel=0.03)
        assert len(used) == recipe.rollout.window and max(used.values()) == uses


def test_what_ships_takes_over_what_cut_units_have_and_costs_nothing_in_the_teacher(tmp_path):
    args = argparse.Namespace(folder=tmp_path, models=MODELS, lora=[], minutes=[])
    rows = {r.name: r for r in [*style.rows_of(args, []), *style.in_the_teacher(args)]}
    shipped = open_pack(MODELS / "emoji-m2.safetensors")
    assert shipped.description.carry and rows["style_m2_styles"].files == rows["style_teacher_m2_styles"].files
    teacher, finetune = load_unet(MODELS / style.TEACHER), load_unet(MODELS / style.FINETUNE)
    for network, least, most in ((teacher, 0.0, 1e-3), (finetune, 1e-2, 1.0)):
        played, plain = (
            dict(rows[name].network(network).named_parameters()) for name in ("style_m2_styles", "style_m2_difference")
        )
        moved = max(float(((played[name] - p).norm() / p.norm()).detach()) for name, p in plain.items())
        assert least <= moved <= most


def test_a_difference_rides_in_the_finetune_and_is_the_pack_in_the_teacher(tmp_path):
    args = argparse.Namespace(folder=tmp_path, models=MODELS, lora=[LORA], minutes=[])
    rows = {r.name: r for r in style.rows_of(args, [])}
    assert [r.forwards for r in rows.values()] == [6, 4, 6, 6, 6, 6, 6, 2, 2, 6]
    whole, late, pack = (rows[f"style_{name}"].macs for name in ("openmoji_3", "m2_from_second", "m2_styles"))
    assert late == pytest.approx((whole + 2 * pack) / 3)
    absolute, changed = rows["style_m2_absolute"], rows["style_m2_difference"]
    teacher, finetune = load_unet(MODELS / style.TEACHER), load_unet(MODELS / style.FINETUNE)
    key = "input_blocks.1.0.in_layers.2.weight"
    name = "down_blocks.0.resnets.0.conv1.weight"
    its = {which: open_unet(MODELS / which).tensors[key].float() for which in (style.TEACHER, style.FINETUNE)}
    pack = open_pack(style.absolute(args, "m2")).tensors[key].float()
    assert torch.equal(absolute.network(finetune).get_parameter(name), pack)
    change = (pack - its[style.TEACHER]).half().float()  # as it is stored
    for network, which in ((finetune, style.FINETUNE), (teacher, style.TEACHER)):
        played = changed.network(network).get_parameter(name)
        torch.testing.assert_close(played, its[which] + change, atol=1e-6, rtol=0)


def test_a_lora_without_steps_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"lora_unet_conv_in.lora_up.weight": torch.zeros(1, 1)}, tmp_path / "plain.safetensors")
    args = argparse.Namespace(folder=tmp_path, models=MODELS, lora=[tmp_path / "plain.safetensors"], minutes=[])
    with pytest.raises(SystemExit, match="does not say for how many steps"):
        list(style.rows_of(args, []))


def test_a_fit_is_measured_against_a_bare_step(monkeypatch):
    monkeypatch.setattr(style, "WALKS", 2)
    monkeypatch.setattr(style, "BATCHES", 1)
    found = style.speed(argparse.Namespace(models=MODELS, speed=1), ["a cat", "a dog", "an owl", "a key"])
    assert found["samples_per_second"] > 0 and found["bare"] > 0
    assert len(found["all_seconds"]["fit"]) == len(found["all_seconds"]["bare"]) == 1
