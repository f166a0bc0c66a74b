"""From a finetune in one file to pictures, by the documented commands on a narrow network: what train/ writes is what
the host plays.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import comfy.sample
import comfy.samplers
import comfy.sd
import pytest
import small
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT))  # last: the host has its own `nodes`

from asdm_core.architecture import FAMILIES  # noqa: E402
from asdm_core.addresses import UNetConfig  # noqa: E402
from asdm_core.packs import open_pack, open_unet  # noqa: E402
from train import networks  # noqa: E402
from train.recipe import load  # noqa: E402
from train.diffusion import ALPHAS  # noqa: E402

FAMILIES[small.SD.family] = UNetConfig.from_dict(small.SD.to_dict())  # train's own copy of the pack's package
# The command `python -m train`, to which the narrow network is a family like others, for one recipe after another.
COMMAND = f"""
import sys
import asdm_core.architecture as architecture
from asdm_core.addresses import UNetConfig  # noqa: E402
architecture.FAMILIES[{small.SD.family!r}] = UNetConfig.from_dict({small.SD.to_dict()!r})
from train.__main__ import main
recipes, *more = sys.argv[1:]
for recipe in recipes.splitlines():
    sys.argv[1:] = [recipe, *more]
    main()
"""
TOKENIZER = Path(comfy.sd.__file__).parent / "sd1_tokenizer"
STEPS = 3


@pytest.fixture(scope="module")
def finetune(tmp_path_factory):
    """A narrow SD1.5 checkpoint in one file, as artists have them: network and text encoder under their old names."""
    path = tmp_path_factory.mktemp("finetune") / "my-finetune.safetensors"
    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=small.SD.context_dim,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=49406,
            eos_token_id=49407,
            pad_token_id=49407,
        )
    )
    sd = {f"model.diffusion_model.{k}": v.contiguous() for k, v in small.weights(small.SD).items()}
    for key, value in text.state_dict().items():
        sd[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = value.contiguous()
    save_file(sd, path)
    return path


def settings(finetune):
    shape = {k: v for k, v in small.SD.to_dict().items() if k != "family"}
    table = ", ".join(f"{k} = {json.dumps(v)}" for k, v in shape.items() if v is not None)
    return [
        *(f"network.teacher={finetune}", "data.source=prompts", "data.path=prompts.txt", "loss.perceptual=0"),
        *(f"network.family={small.SD.family}", f"network.shape={{{table}}}", f"encoders.tokenizer={TOKENIZER}"),
        *("data.size=128", "samples.count=4", "samples.steps=2", "optimiser.lr=1e-3", "optimiser.ema=0"),
        *("run.steps=3", "run.batch=2", "run.micro_batch=2", "run.precision=no", "run.picture_every=0"),
        *("run.stored=float32", "run.workers=0"),
    ]


@pytest.fixture(scope="module")
def runs(finetune):
    """Where the two commands of docs/training.md ran."""
    folder = finetune.parent
    (folder / "prompts.txt").write_text("a cat\nred hair, smile\na house by the sea\n")
    recipes = ("sd15-base", "sd15-m2")
    sets = [part for change in settings(finetune) for part in ("--set", change)]
    paths = [str(ROOT / "train" / "configs" / f"{recipe}.toml") for recipe in recipes]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "\n".join(paths), "--cpu", *sets],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert all(f"wrote runs/{recipe}/{recipe}.safetensors" in done.stdout for recipe in recipes), said
    return folder / "runs"


@pytest.fixture(scope="module")
def played(finetune):
    """The finetune by the stock loader of checkpoints."""
    return comfy.sd.load_checkpoint_guess_config(str(finetune), output_vae=False, output_clip=False)[0]


def inputs():
    g = torch.Generator().manual_seed(5)
    return torch.randn(2, 4, 16, 16, generator=g), torch.randn(2, 7, small.SD.context_dim, generator=g)


def drawn(model):
    """Latents of a run of the host, in the network's own scale."""
    noise, states = inputs()
    latents = comfy.sample.sample(
        model, noise, STEPS, 1.0, "euler", "normal", [[states, {}]], [[states, {}]], torch.zeros_like(noise),
        disable_pbar=True, seed=0,
    )  # fmt: skip
    return model.model.process_latent_in(latents)


@torch.no_grad()
def by_hand(network, model):
    """The same run by diffusers' network and Euler's rule alone."""
    noise, states = inputs()
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
    known = ((1 - ALPHAS) / ALPHAS).sqrt().log()  # of the time steps
    x = noise * (1 + sigmas[0] ** 2).sqrt()
    for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
        t = (known - now.log()).abs().argmin().expand(len(x))
        x = x + (then - now) * network(x / (1 + now**2).sqrt(), t, states).sample
    return x


def assert_played(model, network):
    found, wanted = drawn(model), by_hand(network, model)
    assert found.isfinite().all()
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


@pytest.fixture(scope="module")
def teacher(finetune):
    config = load(ROOT / "train" / "configs" / "sd15-m2.toml", settings(finetune))
    return networks.load_teacher(config).eval()


def test_a_finetune_in_one_file_plays_as_it_teaches(played, teacher):
    assert_played(played, teacher)


def test_the_pack_trained_from_it_plays_in_it(played, teacher, runs):
    path = runs / "sd15-m2" / "sd15-m2.safetensors"
    description = open_pack(path).description
    assert description.training["teacher"] == "my-finetune.safetensors" and description.training["steps"] == 3
    model = small.with_pack(played, path)
    assert_played(model, networks.assembled(teacher, path).eval())
    assert small.difference(drawn(model), drawn(played)) > 0.01


def test_the_trained_pruned_unet_loads_and_plays(teacher, runs):
    path = runs / "sd15-base" / "sd15-base.safetensors"
    assert open_unet(path).description.architecture.cut
    assert_played(small.models.load_unet(str(path)), networks.assembled(teacher, path).eval())


def test_a_diffusers_folder_loads_and_teaches_and_plays(teacher, runs, finetune, tmp_path):
    teacher.save_pretrained(tmp_path / "folder" / "unet")
    model = small.models.load_unet(str(tmp_path / "folder"))
    assert_played(model, teacher)
    again = networks.load_teacher(
        load(
            ROOT / "train" / "configs" / "sd15-m2.toml", [*settings(finetune), f"network.teacher={tmp_path / 'folder'}"]
        )
    )
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), teacher.state_dict().values(), strict=True)
    )
    path = runs / "sd15-m2" / "sd15-m2.safetensors"
    assert_played(small.with_pack(model, path), networks.assembled(teacher, path).eval())
