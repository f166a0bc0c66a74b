"""The recipes of the SDXL family, and a narrow network of its kind through two stages of progressive removal."""

import json

import pytest
import torch
from accelerate import Accelerator
from diffusers.models.embeddings import Timesteps
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from asdm_core.packs import open_unet
from asdm_core.tensor_file import write_file
from tests.train.recipes import CONFIGS
from train import taps
from train.recipe import load
from train.data import Batches, Cache, Random
from train.encoders import load_text
from train.diffusion import coefficients
from train.loop import train
from train.networks import load_teacher
from train.show import predictor
from train.teacher_outputs import write_teacher_outputs

# A chain of stages each: from the recipe that starts at the teacher to the published shape.
CHAINS = {
    "ssd-1b": ["sdxl-ssd-1b-1", "sdxl-ssd-1b-2", "sdxl-ssd-1b"],
    "vega": ["sdxl-ssd-1b-1", "sdxl-ssd-1b-2", "sdxl-vega-1", "sdxl-vega"],
    "koala-1b": ["sdxl-koala-1b"],
    "koala-700m": ["sdxl-koala-700m"],
}
NARROW = [
    "network.shape={model_channels = 32, channel_mult = [1, 1, 2], down = [[0, 0], [2, 2], [2, 2]], mid = 2, "
    "up = [[2, 2, 2], [2, 2, 2], [0, 0, 0]], context_dim = 32, head_channels = 8, use_linear = true, adm_channels = "
    "1568}",
    "network.teacher=random",
    "data.size=64",
    "run.steps=2",
    "run.batch=2",
    "run.micro_batch=2",
    "run.precision=no",
    "run.log_every=1",
    "run.picture_every=2",
    "samples.steps=2",
]


@pytest.mark.parametrize("name", CHAINS)
def test_stages_remove_more_and_more_and_each_starts_from_the_one_before(name):
    recipes = [load(CONFIGS / f"{stem}.toml") for stem in CHAINS[name]]
    starts = ["", *(str(r.product) for r in recipes[:-1])]
    assert [r.student.start for r in recipes] == starts and recipes[-1].architecture.name == name
    for one, two in zip(recipes, recipes[1:], strict=False):
        gone = {a for a in one.architecture.cut if not any(a.startswith(f"{b}.") for b in two.architecture.cut)}
        assert gone <= two.architecture.cut and two.architecture.params < one.architecture.params
    kinds = {kind for r in recipes for kind in taps.KINDS if getattr(r.loss, kind)}
    assert kinds == ({"attention"} if name.startswith("koala") else {"layers"})


def test_every_sdxl_recipe_belongs_to_a_chain():
    pruned = {p.stem for p in CONFIGS.glob("sdxl-*.toml") if load(p).makes_network}
    assert pruned == {stem for chain in CHAINS.values() for stem in chain}


def narrow(recipe, folder, *changes):
    return load(
        CONFIGS / f"{recipe}.toml",
        [*NARROW, f"run.folder={folder}", f"data.path={folder / 'cache.safetensors'}", *changes],
    )


def write_cache(config):
    config.folder.mkdir()
    g = torch.Generator().manual_seed(0)
    write_file(
        config.data.path,
        {
            "latents": torch.randn(3, 4, 8, 8, generator=g).half(),
            "captions": torch.arange(3)[:, None],
            "states": torch.randn(3, 5, 32, generator=g).half(),
            "empty": torch.zeros(5, 32).half(),
            "pooled": torch.randn(3, 32, generator=g).half(),
            "empty_pooled": torch.full((32,), -1.0).half(),
            "sizes": torch.tensor([[64.0, 96.0, 0, 16, 64, 64]]).repeat(3, 1),
        },
        {},
    )


def test_pooled_states_and_sizes_come_with_the_cache(tmp_path):
    config = narrow("sdxl-ssd-1b-1", tmp_path / "run", "data.caption_dropout=0.5")
    write_cache(config)
    batch = Batches(Cache(config.data.path, config), config)(range(40))
    dropped = (batch.pooled == -1).all(1)
    assert (
        batch.pooled.shape == (40, 32)
        and torch.equal(dropped, (batch.context == 0).flatten(1).all(1))
        and 5 < int(dropped.sum()) < 35
    )
    assert batch.sizes.unique(dim=0).tolist() == [[64, 96, 0, 16, 64, 64]]
    assert Batches(Random(config), config)(range(2)).added["text_embeds"].shape == (2, 32)
    write_file(config.data.path, {k: v for k, v in load_file(config.data.path).items() if k != "pooled"}, {})
    with pytest.raises(ValueError, match="lacks the pooled states and sizes that a UNet of sdxl takes"):
        Cache(config.data.path, config)


def test_sizes_reach_teacher_and_student_unrounded(tmp_path, monkeypatch):
    config = narrow("sdxl-ssd-1b-1", tmp_path / "run", "run.precision=bf16", "run.steps=1", "run.picture_every=0")
    write_cache(config)
    write_file(
        config.data.path,
        load_file(config.data.path) | {"sizes": torch.tensor([[1365.0, 96, 0, 16, 64, 64]]).repeat(3, 1)},
        {},
    )
    seen = []
    original = Timesteps.forward

    def forward(self, t):
        seen.append(t)
        return original(self, t)

    monkeypatch.setattr(Timesteps, "forward", forward)
    train(config, Accelerator(cpu=True))
    assert [t[0].item() for t in seen if t.shape == (12,)] == [1365, 1365]  # six sizes of two samples
    predictor(lambda *_, added_cond_kwargs, **__: (seen.append(added_cond_kwargs),), torch.bfloat16)(
        torch.zeros(1), None, torch.zeros(1), {"text_embeds": torch.zeros(1), "time_ids": torch.tensor([1365.0])}
    )
    assert seen[-1]["text_embeds"].dtype == torch.bfloat16 and seen[-1]["time_ids"].item() == 1365


@torch.no_grad()
def test_the_teachers_outputs_know_pooled_states_and_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr("train.teacher_outputs.SHARD", 4)
    config = narrow("sdxl-ssd-1b-1", tmp_path / "run")
    write_cache(config)
    write_teacher_outputs(tmp_path / "outputs", config, [], 4, torch.device("cpu"), batch=2)
    found = load_file(tmp_path / "outputs" / "00000.safetensors")["predicted"]
    batch = Batches(Cache(config.data.path, config), config)(range(4))
    a, s = coefficients(batch.t, config.network.alphas)
    with torch.no_grad():
        x, given = a * batch.x0 + s * batch.noise, {"added_cond_kwargs": batch.added}
        wanted = load_teacher(config)(x, batch.t, batch.context, **given).sample
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_both_text_encoders_speak(tmp_path):
    torch.manual_seed(0)
    words = {"a</w>": 0, "b</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}
    found = []
    for number, kind, width in (("", CLIPTextModel, 8), ("_2", CLIPTextModelWithProjection, 24)):
        found.append(
            kind(
                CLIPTextConfig(
                    vocab_size=4,
                    hidden_size=width,
                    intermediate_size=8,
                    num_hidden_layers=3,
                    num_attention_heads=1,
                    max_position_embeddings=6,
                    projection_dim=16,
                    bos_token_id=2,
                    eos_token_id=3,
                    pad_token_id=3,
                )
            ).eval()
        )
        found[-1].save_pretrained(tmp_path / f"text_encoder{number}")
        (tmp_path / f"tokenizer{number}").mkdir()
        (tmp_path / f"tokenizer{number}" / "vocab.json").write_text(json.dumps(words))
        (tmp_path / f"tokenizer{number}" / "merges.txt").write_text("#version: 0.2\n")
        (tmp_path / f"tokenizer{number}" / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>"})
        )
    text = load_text(tmp_path)(["a b", ""])
    # The second one's rows are filled with the token 0.
    ids = torch.tensor([[[2, 0, 1, 3, f, f], [2, 3, f, f, f, f]] for f in (3, 0)])
    one, two = (model(its, output_hidden_states=True) for model, its in zip(found, ids, strict=True))
    torch.testing.assert_close(
        text.states, torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1)
    )  # SDXL, section 2.1
    torch.testing.assert_close(text.pooled, two.text_embeds)
    assert text.states.shape == (2, 6, 32) and text.pooled.shape == (2, 16)


def test_two_stages_of_removal_and_their_pictures(tmp_path):
    one = narrow("sdxl-ssd-1b-1", tmp_path / "one")
    write_cache(one)
    train(one, Accelerator(cpu=True))
    two = narrow(
        "sdxl-ssd-1b-2",
        tmp_path / "two",
        f"data.path={one.data.path}",
        f"student.start={one.product}",
        "student.cut=mid.0.transformer, mid.1, down.2.*.transformer.1",
        "loss.attention=1",
    )
    train(two, Accelerator(cpu=True))
    found = open_unet(two.product).description
    assert found.architecture == two.architecture and found.training["start"] == "sdxl-ssd-1b-1.safetensors"
    assert set(found.training["final"]) == {"task", "output", "layers", "attention"}
    assert (two.folder / "pictures" / "00000002.png").exists() and "free choice of units" in two.product.with_suffix(
        ".md"
    ).read_text()
