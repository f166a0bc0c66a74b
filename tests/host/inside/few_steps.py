"""What train/ writes for few steps, played by the stock host: the LoRA's weights, and the run its metadata ask for."""

import dataclasses
import sys
from pathlib import Path

import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import nodes as stock
import pytest
import small
import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT))  # last: the host has its own `nodes`

from asdm_core import few_step  # noqa: E402
from asdm_core.tensor_file import TensorFile  # noqa: E402
from train import lora, networks  # noqa: E402
from train.recipe import load  # noqa: E402
from train.diffusion import simple_times  # noqa: E402
from train.rollout import few_steps, rotations, table  # noqa: E402

TEACHER = ROOT / "models/emoji/emoji-teacher.safetensors"


@pytest.fixture(scope="module")
def recipe():
    return load(
        ROOT / "train/configs/emoji-two-steps-lora.toml", [f"network.teacher={TEACHER}", "lora.rank=4", "lora.alpha=2"]
    )


@pytest.fixture(scope="module")
def student(recipe):
    net = networks.make_student(networks.load_teacher(recipe), recipe).eval()
    g = torch.Generator().manual_seed(0)
    for change in lora.changes(net).values():
        change.up.data = 0.02 * torch.randn(change.up.shape, generator=g)
        for p in change.parameters():  # as the file will have it
            p.data = p.data.half().float()
    return net


@pytest.fixture(scope="module")
def path(recipe, student, tmp_path_factory):
    path = tmp_path_factory.mktemp("loras") / "two-steps.safetensors"
    lora.write_lora(path, student, recipe, {}, few_steps(recipe.rollout), None)
    return path


@pytest.fixture(scope="module")
def played(path):
    """The teacher with the LoRA, by the stock node."""
    folder_paths.add_model_folder_path("loras", str(path.parent))
    (model,) = stock.LoraLoaderModelOnly().load_lora_model_only(small.models.load_unet(str(TEACHER)), path.name, 1.0)
    return model


def test_load_lora_changes_exactly_what_the_merged_weights_change(recipe, student, played):
    architecture = recipe.architecture
    plain = small.models.load_unet(str(TEACHER))
    before = {k: v.clone() for k, v in plain.model.diffusion_model.state_dict().items()}
    names = {k.removeprefix("diffusion_model.") for k in played.patches}
    merged = {name: student.get_submodule(name).weight.detach() for name in lora.changes(student)}
    its = {f"{name}.weight": w for name, w in merged.items()}
    translated = {s.unit.key(s.tensor, "diffusers"): s.unit.key(s.tensor) for s in architecture.keys().values()}
    assert names == {translated[key] for key in its}
    played.patch_model()
    try:
        after = played.model.diffusion_model.state_dict()
        for key, weight in its.items():
            mine = after[translated[key]]
            torch.testing.assert_close(mine.float(), weight, rtol=1e-5, atol=1e-6)
            assert not torch.equal(mine, before[translated[key]]), key
        for key in before.keys() - names:
            assert torch.equal(after[key], before[key]), key
    finally:
        played.unpatch_model()


def test_the_run_the_metadata_ask_for_is_the_one_that_was_trained(path, student, played):
    few = few_step.of_lora(TensorFile(path).metadata)
    g = torch.Generator().manual_seed(1)
    noise, states = torch.randn(2, 4, 16, 16, generator=g), torch.randn(2, 77, 128, generator=g)
    latents = comfy.sample.sample(
        played,
        noise,
        few.steps,
        few.cfg,
        few.sampler,
        few.scheduler,
        [[states, {}]],
        [[torch.zeros_like(states), {}]],
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=0,
    )
    x, (cos, sin) = noise, rotations(table(few.times))
    with torch.no_grad():
        for k, t in enumerate(few.times):
            x = cos[k] * x - sin[k] * student(x, torch.full((2,), t), states).sample
    torch.testing.assert_close(played.model.process_latent_in(latents), x, rtol=1e-2, atol=1e-2)
    assert (x - noise).abs().mean() > 0.1


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 8, 9, 12, 20])
def test_time_steps_are_those_of_the_hosts_scheduler(steps):
    sampling = small.models.load_unet(str(TEACHER)).get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", steps)
    assert sampling.timestep(sigmas[:-1]).tolist() == list(simple_times(steps)) and sigmas[-1] == 0


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """The shipped M2 pack as if it had been trained for two steps."""
    loaded = small.packs.open_pack(ROOT / "models/emoji/emoji-m2.safetensors")
    few = few_step.FewStep(2, "euler", "simple", 1.0, (999, 499))
    training = {**loaded.description.training, few_step.KEY: few.to_dict()}
    path = tmp_path_factory.mktemp("packs") / "two-steps-m2.safetensors"
    small.packs.write_pack(path, loaded.tensors, dataclasses.replace(loaded.description, training=training))
    return path


def run(pack, **settings):
    """A run of the teacher with a pack, as the stock sampler makes it."""
    model = small.with_pack(small.models.load_unet(str(TEACHER)), pack)
    states, latent = torch.zeros(1, 77, 128), {"samples": torch.zeros(1, 4, 16, 16)}
    plain = {"cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    stock.common_ksampler(model, 0, positive=[[states, {}]], negative=[[states, {}]], latent=latent, **plain | settings)


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    "settings, said",
    [
        ({}, ""),
        ({"steps": 20}, "This run has 20 steps, for"),
        ({"cfg": 7.0, "sampler_name": "dpmpp_2m"}, "This run has dpmpp_2m, CFG 7, for"),
        ({"scheduler": "karras"}, "This run has other noise levels"),
        ({"denoise": 0.5}, "This run has other noise levels"),
    ],
)
def test_a_run_that_is_set_up_otherwise_than_a_pack_was_trained_for_is_told_so_once(pack, caplog, settings, said):
    run(pack, **{"steps": 2} | settings)
    told = "two-steps-m2.safetensors was trained for 2 steps of euler, scheduler simple, CFG 1."
    assert caplog.text.count(told) == bool(said) and said in caplog.text


@pytest.mark.parametrize(
    "fit, settings, said",
    [
        ({"steps": 3}, {"cfg": 7.0, "sampler_name": "dpmpp_2m"}, ""),
        ({"steps": 3}, {"steps": 20}, "This run has 20 steps, for"),
        ({"steps": 3}, {"scheduler": "karras"}, "This run has other noise levels"),
        ({"steps": 0}, {"steps": 20}, ""),
        ({}, {"steps": 20}, ""),
    ],
)
def test_a_pack_that_was_fitted_for_other_runs_says_so_once(tmp_path, caplog, fit, settings, said):
    loaded = small.packs.open_pack(ROOT / "models/emoji/emoji-m2.safetensors")
    training = {**loaded.description.training, "fit": fit}
    path = tmp_path / "fitted.safetensors"
    small.packs.write_pack(path, loaded.tensors, dataclasses.replace(loaded.description, training=training))
    run(path, **{"steps": 3} | settings)
    told = "fitted.safetensors was trained for 3 steps, scheduler simple."
    assert caplog.text.count(told) == bool(said) and said in caplog.text
    assert said or "was trained for" not in caplog.text


@pytest.mark.parametrize("worn", [False, True])
def test_a_pack_for_a_lora_says_once_where_no_lora_is_on_the_model(caplog, worn):
    model = small.with_pack(small.models.load_unet(str(TEACHER)), ROOT / "models/emoji/emoji-m2-two-steps.safetensors")
    if worn:
        lora = comfy.utils.load_torch_file(str(ROOT / "models/loras/emoji-two-steps.safetensors"))
        model, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    states, latent = torch.zeros(1, 77, 128), {"samples": torch.zeros(1, 4, 16, 16)}
    stock.common_ksampler(model, 0, 2, 1.0, "euler", "simple", [[states, {}]], [[states, {}]], latent)
    told = "emoji-m2-two-steps.safetensors was trained beneath the LoRA emoji-two-steps.safetensors, and no LoRA is on"
    assert caplog.text.count(told) == (not worn) and "This run has" not in caplog.text


def test_inspect_model_tells_what_a_pack_was_trained_for(pack):
    model = small.with_pack(small.models.load_unet(str(TEACHER)), pack)
    told = [line for t in small.technique.techniques_of(model) for line in t.tells(model)]
    assert "two-steps-m2.safetensors: made for 2 steps of euler, scheduler simple, CFG 1" in told
