"""The emoji comparison on stand-ins, and BK-SDM's protocol with its libraries replaced."""

import copy
import csv
import json
import types

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from asdm_core.architecture import Architecture
from asdm_core.surgery import cut_diffusers
from train import coco, evaluate, published
from train.emoji import compare, unet
from train.emoji.classifier import Classifier, save_classifier
from train.emoji.compare import Judge, Switched
from train.diffusion import schedule
from train.emoji.text import TextEncoder

# The emoji family ------------------------------------------------------------------------------------


@pytest.fixture()
def judge(settings, tiny, glyphs, data, tokens, concepts, monkeypatch):
    torch.manual_seed(0)
    encoder = TextEncoder(tokens.ids, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    save_classifier(
        settings.models / "emoji-classifier.safetensors",
        Classifier(len(concepts)).eval(),
        [c.code for c in concepts],
        {},
    )
    for name, value in (
        ("load_glyphs", lambda runs: glyphs),
        ("load_latents", lambda *a: data),
        ("load_text", lambda path: encoder.eval()),
        ("Tokens", lambda *a, **k: tokens),
        ("host_folder", lambda given: None),
        ("FIXED", 32),
        ("LENGTH", 16),
        ("REFERENCE", 4),
    ):
        monkeypatch.setattr(compare, name, value)
    monkeypatch.setattr(Judge, "whole", unet.build(tiny).eval())
    (settings.models / "emoji-teacher.safetensors").touch()
    return lambda prompts=3: Judge(
        "teacher", settings.runs / "measured", settings.runs, settings.models, prompts, steps=2
    )


def cut(judge, preset, config):
    network = copy.deepcopy(judge.whole)
    cut_diffusers(network, Architecture.preset(preset, config))
    return network


def test_networks_are_measured_against_the_teacher_and_only_once(judge, tiny):
    j = judge()
    same = j.measure("same", lambda: j.whole)
    other = j.measure("cut", lambda: cut(j, "base", tiny), rounds=2)
    assert (
        same["mse"] == same["latent_mse"] == 0
        and same["ssim"] == pytest.approx(1)
        and same["v_mse"]["teacher"]["all"] == 0
    )
    assert other["mse"] > 0 and other["v_mse"]["teacher"]["all"] > 0 and (same["pictures"], other["pictures"]) == (3, 6)
    assert "mse" not in j.measure("whole", lambda: j.whole)
    assert "fed" not in other  # six pictures have no covariance of 64 features
    assert set(other["v_mse"]["data"]) == {"all", "0-249", "250-499", "500-749", "750-999"}

    def never():
        raise AssertionError

    assert judge().measure("cut", never, rounds=2) == other
    # The pictures of the first round are there; only their numbers are put together anew.
    assert judge().measure("cut", never)["pictures"] == 3
    with pytest.raises(ValueError, match="made with other settings .prompts was 3 and is 2.; choose another folder"):
        judge(2)


def test_a_teacher_trained_anew_wants_another_folder(judge, settings):
    folder = settings.runs / "measured"
    folder.mkdir()
    (folder / "settings.json").write_text(
        '{"prompts": 3, "steps": 2, "cfg": 3.0}\n'
    )  # from before the teacher was noted
    judge(), judge()
    assert json.loads((folder / "settings.json").read_text()).keys() == {"prompts", "steps", "cfg", "teacher"}
    (settings.models / "emoji-teacher.safetensors").write_bytes(b"trained anew")
    with pytest.raises(ValueError, match="made with other settings .teacher was '.{8}' and is '.{8}'"):
        judge()


@pytest.mark.parametrize(("pictures", "known"), [(64, False), (65, True), (120, True), (300, True)])
def test_the_frechet_distance_needs_more_pictures_than_features_and_has_no_upper_end(
    pictures, known, judge, monkeypatch
):
    j = judge()
    g = torch.Generator().manual_seed(0)
    drawn = {"latents": (4, 2, 2), "images": (3, 16, 16), "features": (64,), "top1": (), "top5": ()}
    monkeypatch.setattr(
        Judge, "pictures", lambda *_: {key: torch.rand(pictures, *shape, generator=g) for key, shape in drawn.items()}
    )
    monkeypatch.setattr(Judge, "reference", torch.rand(160, 64, generator=g))
    found = j.measure("whole", lambda: j.whole, fixed=False)
    assert [key in found for key in ("fed", "fed_glyphs")] == [known, known]


def test_a_switched_run_is_drawn_by_one_and_then_the_other():
    class Named(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x, t, context):
            return self.name

    for at, wanted in ((0.4, 2), (0.6, 3), (1.0, 5)):
        network = Switched(Named("first"), Named("second"), at, steps=5)
        drawn = [network(None, torch.tensor([t, t]), None) for t in schedule(5)]
        assert drawn == ["first"] * wanted + ["second"] * (5 - wanted)


# MS-COCO ---------------------------------------------------------------------------------------------


class Pipeline:
    """Draws pictures of one colour: that of the first number its generator gives."""

    drawn = 0

    def __call__(self, prompts, num_inference_steps, guidance_scale, generator):
        assert (num_inference_steps, guidance_scale) == (25, 7.5)
        Pipeline.drawn += len(prompts)
        colours = [(torch.rand(3, generator=g) * 255).int().tolist() for g in generator]
        return types.SimpleNamespace(images=[Image.new("RGB", (512, 512), tuple(c)) for c in colours])


@pytest.fixture()
def prompts(tmp_path):
    with open(tmp_path / "metadata.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, ["file_name", "text"])
        writer.writeheader()
        writer.writerows({"file_name": f"{i}.jpg", "text": f"prompt {i}"} for i in range(5))
    return tmp_path / "metadata.csv"


class Share:
    """An accelerator of one of several processes."""

    device = torch.device("cpu")
    num_processes = 2

    def __init__(self, index):
        self.process_index = index
        self.is_main_process = index == 0

    def wait_for_everyone(self):
        pass


def test_processes_share_the_pictures_and_what_is_there_stays(prompts, tmp_path):
    texts = coco.read_prompts(prompts)
    assert texts == [f"prompt {i}" for i in range(5)] and coco.read_prompts(prompts, 2) == texts[:2]
    Pipeline.drawn = 0
    for index in (0, 1):
        coco.generate(Pipeline(), texts, tmp_path / "shared", Share(index), 2, 25, 7.5)
    assert Pipeline.drawn == 5
    (tmp_path / "shared" / "000003.jpg").unlink()
    coco.generate(Pipeline(), texts, tmp_path / "shared", Accelerator(cpu=True), 2, 25, 7.5)
    assert Pipeline.drawn == 6
    coco.generate(Pipeline(), texts, tmp_path / "alone", Accelerator(cpu=True), 1, 25, 7.5)
    for i in range(5):
        shared, alone = (Image.open(tmp_path / f / f"{i:06d}.jpg") for f in ("shared", "alone"))
        assert shared.size == (256, 256) and shared.tobytes() == alone.tobytes()


def test_scores_come_from_the_libraries_as_the_protocol_has_them(prompts, tmp_path, monkeypatch):
    asked = {}

    class Clip(torch.nn.Module):
        def encode_image(self, x):
            return torch.tensor([[3.0, 4.0]]).expand(len(x), 2)

        def encode_text(self, tokens):
            return torch.tensor([[2.0, 0.0]]).expand(len(tokens), 2)

    fid = types.SimpleNamespace(
        compute_fid=lambda mine, real, **given: asked.update(mine=mine, real=real, **given) or 12.5
    )
    fidelity = types.SimpleNamespace(
        calculate_metrics=lambda **given: {"inception_score_mean": 30.0, "inception_score_std": 0.5}
    )
    clip = types.SimpleNamespace(
        create_model_and_transforms=lambda name, pretrained: (Clip(), None, lambda picture: torch.zeros(3, 4, 4)),
        get_tokenizer=lambda name: lambda texts: torch.zeros(len(texts), 1),
    )
    monkeypatch.setattr(coco, "libraries", lambda: (fid, fidelity, clip))
    monkeypatch.setattr(coco, "downloads", lambda: [])
    texts = coco.read_prompts(prompts)
    coco.generate(Pipeline(), texts, tmp_path / "mine", Accelerator(cpu=True), 1, 25, 7.5)
    with pytest.raises(ValueError, match="real is no folder"):
        coco.scores(texts, tmp_path / "mine", tmp_path / "real", Accelerator(cpu=True))
    (tmp_path / "val").mkdir()
    for i in range(5):
        Image.new("RGB", (300, 200), (50 * i,) * 3).save(tmp_path / "val" / f"{i}.jpg")
    coco.main([str(tmp_path / "val"), str(tmp_path / "real"), "--names", str(prompts)])
    found = coco.scores(texts, tmp_path / "mine", tmp_path / "real", Accelerator(cpu=True))
    assert found == {"pictures": 5, "clip": pytest.approx(0.6), "fid": 12.5, "is": 30.0, "is_std": 0.5}
    assert asked["mode"] == "legacy_pytorch"

    # The whole command, twice: the second time it has nothing to draw.
    monkeypatch.setattr(coco, "load_pipeline", lambda models, product, device: Pipeline())
    command = [
        "--models",
        "x",
        "--prompts",
        str(prompts),
        "--real",
        str(tmp_path / "real"),
        "--out",
        str(tmp_path / "out"),
        "--cpu",
    ]
    for drawn in (5, 0):
        Pipeline.drawn = 0
        evaluate.main(command)
        assert Pipeline.drawn == drawn
    assert (
        json.loads((tmp_path / "out" / "whole.json").read_text())["fid"] == 12.5
        and (tmp_path / "out" / "whole.png").exists()
    )
    scores = (tmp_path / "out" / "scores.md").read_text()
    assert "| **whole** | 12.500 | 30.000 | 0.6000 | 0 B | 5, 25, 7.5 |" in scores and "do not compare" in scores
    # Nothing is drawn where something is missing.
    with monkeypatch.context() as m:
        m.setattr(coco, "downloads", lambda: ["the weights for FID"])
        m.setattr(coco, "load_pipeline", lambda *_: pytest.fail("drew"))
        with pytest.raises(SystemExit, match="not on this machine:\nthe weights for FID\n.*--download"):
            evaluate.main([*command, "--out", str(tmp_path / "none")])
    # Pictures drawn otherwise are not scored under these settings.
    for change, message in (
        (["--steps", "50"], "steps was 25 and is 50"),
        (["--limit", "2"], "pictures was 5 and is 2"),
        (["--models", "y"], "models was '.*x' and is '.*y'"),
    ):
        with pytest.raises(
            SystemExit, match=f"whole holds what was made with other settings .{message}.; choose another folder"
        ):
            evaluate.main(command + change)
    # Nor those of a model that lay in the same place.
    model = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    model.parent.mkdir(parents=True)
    model.write_bytes(b"one")
    mine = [*command, "--models", str(tmp_path / "model"), "--out", str(tmp_path / "again")]
    evaluate.main(mine)
    model.write_bytes(b"two")
    with pytest.raises(SystemExit, match="models was '.{8}' and is '.{8}'"):
        evaluate.main(mine)
    prompts.write_text(prompts.read_text().replace("prompt 3", "another"))
    with pytest.raises(SystemExit, match="hash of the prompts was"):
        evaluate.main(command)


def test_the_real_pictures_are_those_of_the_list_squeezed(prompts, tmp_path):
    source, out = tmp_path / "val2014", tmp_path / "real"
    source.mkdir()
    for i in range(6):
        Image.new("RGB", (64 + i, 48), (40 * i, 0, 0)).save(source / f"{i}.jpg")
    assert coco.real_pictures(source, out, coco.read_names(prompts)) == 5
    assert sorted(p.name for p in out.iterdir()) == [f"{i}.jpg" for i in range(5)]
    assert Image.open(out / "3.jpg").size == (256, 256)
    coco.check_real(out)
    stays = (out / "3.jpg").stat().st_mtime_ns
    assert coco.real_pictures(source, out) == 6 and (out / "3.jpg").stat().st_mtime_ns == stays
    (source / "2.jpg").unlink()
    with pytest.raises(ValueError, match="lacks 1 of the list's 5 pictures, first 2.jpg"):
        coco.real_pictures(source, out, coco.read_names(prompts))
    with pytest.raises(ValueError, match="is 64 x 48; wanted 256 x 256 px"):
        coco.check_real(source)
    with pytest.raises(ValueError, match="val2014.zip"):
        coco.check_real(tmp_path / "none")


def test_what_is_not_there_is_listed_with_where_it_belongs(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    (tmp_path / "checkpoints").mkdir()
    lines = coco.downloads()
    assert [line.split(" for ")[1].split(",")[0].split(":")[0] for line in lines] == ["FID", "IS", "the CLIP score"]
    for name in coco.WEIGHTS:
        (tmp_path / "checkpoints" / name).touch()
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, name: str(tmp_path / name))
    assert coco.downloads() == []


def test_published_rows_stand_beneath_ones_own_with_their_source():
    row = {"network": "mine", "fid": 11.0, "is": 36.0, "clip": 0.296, "pictures": 30_000, "steps": 25, "cfg": 7.5}
    text = published.beside([row])
    assert "do not compare" not in text and text.splitlines()[2].startswith("| **mine** | 11.000 | 36.000 | 0.2960 |")
    for name, cells in (
        ("M2, original part frozen", "11.840 | 36.560 | 0.2960 | -"),
        ("BK-SDM-Tiny", "17.120 | 30.090 | 0.2653 | 0.5 B"),
        ("S1: Base 10 steps, then SD 15", "12.900 | 35.651 | 0.2970 | -"),
        ("M6 (M3, all trained)", "- | - | - | -"),
    ):
        assert f"| {name} | {cells} |" in text
    assert {r.source for r in published.ROWS} == {published.BK, *(f"{published.ASDM}, Table {n}" for n in (1, 2, 3))}


def test_missing_libraries_and_prompts_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(coco.importlib.util, "find_spec", lambda name: None if name != "open_clip" else object())
    with pytest.raises(ValueError, match="need clean-fid, torch-fidelity: pip install clean-fid torch-fidelity"):
        coco.libraries()
    with pytest.raises(SystemExit, match="need clean-fid"):
        evaluate.main(["--models", "x", "--prompts", "x", "--real", "x", "--out", str(tmp_path)])
    with pytest.raises(ValueError, match="none.csv: cannot be read"):
        coco.read_prompts(tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="needs a prompt in the column text"):
        coco.read_prompts(tmp_path / "other.csv")
