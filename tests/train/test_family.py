"""The finished weights: what is in the files, and that ComfyUI's own classes compute the same with them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import bootstrap
from asdm_core import few_step
from asdm_core.architecture import Architecture
from asdm_core.identity import Checkpoint
from asdm_core.packs import describe, open_model, open_pack, open_unet
from asdm_core.tensor_file import TensorFile
from train.emoji.codec import load_codec
from train.emoji.text import Tokens, load_text
from train.emoji.unet import CONFIG, addressed, load_unet
from train.networks import joining

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "models" / "emoji"
BUDGET = 48 * 2**20  # of models/ as a whole: who clones pays for it


def test_the_weights_stay_within_their_budget():
    assert sum(p.stat().st_size for p in MODELS.parent.rglob("*") if p.is_file()) < BUDGET


def test_the_pack_for_two_steps_names_the_lora_that_it_plays_beneath():
    description = open_pack(MODELS / "emoji-m2-two-steps.safetensors").description
    lora = MODELS.parent / "loras" / description.training["lora"]
    assert description.architecture == Architecture.preset("m2", CONFIG)
    assert few_step.of_pack(description.training) == few_step.of_lora(TensorFile(lora).metadata) is not None


def test_the_teacher_says_what_it_is():
    description = open_unet(MODELS / "emoji-teacher.safetensors").description
    assert description.prediction == "v" and description.architecture == Architecture.full(CONFIG)
    assert all((MODELS / name).exists() for name in description.companions.values())


@pytest.mark.parametrize(("name", "kind"), [("m1", "pack"), ("m2", "pack"), ("small", "unet")])
def test_packs_and_students_say_what_they_are(name, kind):
    loaded = open_model(MODELS / f"emoji-{name}.safetensors")
    description = loaded.description
    teacher = open_unet(MODELS / "emoji-teacher.safetensors").description
    assert description.kind == kind and description.architecture == Architecture.preset(name, CONFIG)
    assert description.training["teacher"] == "emoji-teacher.safetensors" and description.licence == teacher.licence
    assert dict(description.companions) == (dict(teacher.companions) if kind == "unet" else {})


def test_the_student_with_experts_comes_with_their_pack():
    student = MODELS / "emoji-tiny-e2.safetensors"
    experts = open_pack(joining(student)).description
    whole = open_unet(student)
    assert whole.description.training["pack"] == joining(student).name
    assert not experts.made_for.is_other(Checkpoint.of("", whole.tensors, CONFIG))
    assert set(experts.condconv.experts.values()) == {2}


def test_the_gains_fit_the_whole_network():
    pack = open_pack(MODELS / "emoji-gri.safetensors")
    assert pack.description.units == () and pack.description.architecture == Architecture.full(CONFIG)
    assert set(pack.tensors) == set(pack.description.gri.keys(CONFIG)) and all(
        pack.tensors[key].any() for key in pack.tensors
    )


def test_every_further_unet_is_a_network_of_its_own():
    teacher = load_unet(MODELS / "emoji-teacher.safetensors").state_dict()
    for path in MODELS.glob("*.safetensors"):
        description = describe(TensorFile(path))
        if (
            path.name != "emoji-teacher.safetensors"
            and description is not None
            and description.kind == "unet"
            and not description.architecture.cut
        ):
            finetune = load_unet(path).state_dict()
            assert set(teacher) == set(finetune)
            assert all(not torch.equal(teacher[k], finetune[k]) for k in teacher if k.endswith("conv1.weight"))


@pytest.mark.host
@torch.no_grad()
def test_comfyui_computes_the_same(tmp_path):
    host = bootstrap.host_path()
    g = torch.Generator().manual_seed(0)
    codec = load_codec(MODELS)
    unet = load_unet(MODELS / "emoji-teacher.safetensors")
    encoder = load_text(MODELS / "emoji-text.safetensors")
    images = torch.rand(2, 3, 8, 8, generator=g).repeat_interleave(16, 2).repeat_interleave(16, 3)
    tokens = Tokens(Path(host), ids=encoder.ids.tolist())
    rows = tokens(["a cat face on blue, noto style", ""])
    given = {
        "images": images,
        "latents": torch.randn(2, 4, 16, 16, generator=g),
        "t": torch.tensor([20.0, 900.0]),
        "context": encoder(rows),
    }
    config = CONFIG.to_host()
    save_file(
        {k: v.contiguous() for k, v in given.items()}
        | {f"unet.{k}": v.detach().contiguous() for k, v in addressed(unet).items()},
        tmp_path / "in.safetensors",
    )
    (tmp_path / "in.json").write_text(json.dumps(config))
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("host_family.py")),
            str(host),
            str(MODELS),
            str(tmp_path / "in.safetensors"),
            str(tmp_path / "out.safetensors"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    out = load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(out["latents"], codec.encode(images), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(out["decoded"], codec.decode(given["latents"]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        out["v"], unet(given["latents"], given["t"], given["context"]).sample, rtol=1e-3, atol=1e-4
    )
    assert out["tokens"].tolist() == [[tokens.ids[r] for r in rows[0].tolist()]]


def test_text_encoder_keeps_only_rows_in_use():
    with safe_open(MODELS / "emoji-text.safetensors", framework="pt") as f:
        ids = f.get_tensor("token_ids")
        table = f.get_slice("text_model.embeddings.token_embedding.weight").get_shape()
        config = json.loads(f.metadata()["text_config"])
    assert ids.dtype == torch.int32 and table == [len(ids), 128] and ids.tolist() == sorted(set(ids.tolist()))
    assert {49406, 49407} <= set(ids.tolist()) and config["hidden_act"] == "quick_gelu"
