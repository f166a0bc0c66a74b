"""UNets in diffusers folders: whole, in shards, with variants and schedulers, and refused when something is wrong."""

import json
import re

import pytest
from safetensors.torch import load_file, save_file

from asdm_core import diffusers_folder, surgery
from asdm_core.architecture import Architecture
from asdm_core.packs import open_unet
from asdm_core.tensor_file import BadFile
from asdm_core.surgery import ADDRESSED, Form
from tests.core.narrow import SD, equal, weights

pytestmark = pytest.mark.usefixtures("known")

BASE = Architecture.preset("base", SD)


def a_folder(root, scheduler=None, sub="unet"):
    sd, _ = surgery.cut(weights(SD), BASE)
    (root / sub).mkdir(parents=True)
    save_file(
        surgery.convert(sd, BASE, ADDRESSED, Form("diffusers", "renumbered")),
        root / sub / "diffusion_pytorch_model.safetensors",
    )
    if scheduler is not None:
        (root / "scheduler").mkdir()
        (root / "scheduler/scheduler_config.json").write_text(scheduler)
    return root


@pytest.mark.parametrize(
    "scheduler, prediction",
    [
        (None, None),
        ("{}", "eps"),
        ('{"prediction_type": "epsilon"}', "eps"),
        ('{"prediction_type": "v_prediction"}', "v"),
    ],
)
def test_folders_say_what_is_predicted(tmp_path, scheduler, prediction):
    root = a_folder(tmp_path / "model", scheduler)
    for path in (root, root / "unet"):
        assert open_unet(path).description.prediction == prediction


@pytest.mark.parametrize(
    "scheduler, message",
    [
        (
            '{"prediction_type": "sample"}',
            "prediction type 'sample' is not supported; wanted one of epsilon, v_prediction",
        ),
        ("{", "cannot be read as JSON"),
        ('{"prediction_type":' * 100_000, "cannot be read as JSON"),
        ("[]", "cannot be read as JSON"),
        ('{"prediction_type": ["epsilon"]}', "is not supported"),
    ],
)
def test_folders_with_a_bad_scheduler(tmp_path, scheduler, message):
    with pytest.raises(BadFile, match=f"scheduler_config.json: .*{re.escape(message)}"):
        open_unet(a_folder(tmp_path / "model", scheduler))


def shard(folder, sd, variant="", parts=2, stem="diffusion_pytorch_model"):
    """A UNet in several files with their index, named as diffusers names them."""
    folder.mkdir(parents=True, exist_ok=True)
    dot, names = f".{variant}" if variant else "", sorted(sd)
    places = {}
    for i in range(parts):
        name = f"{stem}{dot}-{i + 1:05}-of-{parts:05}.safetensors"
        mine = names[i::parts]
        save_file({k: sd[k] for k in mine}, folder / name)
        places |= dict.fromkeys(mine, name)
    index = folder / f"{stem}.safetensors.index{dot}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.fixture
def diffusers_weights():
    sd = surgery.cut(weights(SD), BASE)[0]
    return surgery.convert(sd, BASE, ADDRESSED, Form("diffusers", "renumbered"))


@pytest.mark.parametrize("sub", ["unet", "", "unet_ema"])
@pytest.mark.parametrize("variant", ["", "fp16", "bf16", "non_ema"])
@pytest.mark.parametrize("sharded", [False, True])
def test_folders_of_every_kind(tmp_path, diffusers_weights, sub, variant, sharded):
    folder = tmp_path / "model" / sub
    if sharded:
        shard(folder, diffusers_weights, variant)
    else:
        folder.mkdir(parents=True)
        dot = f".{variant}" if variant else ""
        save_file(diffusers_weights, folder / f"diffusion_pytorch_model{dot}.safetensors")
    (folder / "diffusion_pytorch_model.bin").touch()
    found = open_unet(tmp_path / "model")
    assert found.description.architecture == BASE and equal(found.tensors, surgery.cut(weights(SD), BASE)[0])


@pytest.mark.parametrize(
    "file, part, index",
    [
        ("{}-{}.fp16", "{}.fp16-{}", "{}.safetensors.index.fp16.json"),  # as older diffusers named shards
        ("{}.fp16-{}", "{}.fp16-{}", "{}.fp16.safetensors.index.json"),
        ("{}.fp16-full-{}", "{}.fp16-{}", "{}.safetensors.index.fp16-full.json"),
    ],
)
def test_variants_in_other_places(tmp_path, diffusers_weights, file, part, index):
    stem = "diffusion_pytorch_model"
    written = shard(tmp_path / "unet", diffusers_weights, "fp16")
    places = written.read_text()
    for number in ("00001-of-00002", "00002-of-00002"):
        old, new = (f"{form.format(stem, number)}.safetensors" for form in (part, file))
        (tmp_path / "unet" / old).rename(tmp_path / "unet" / new)
        places = places.replace(old, new)
        assert diffusers_folder.is_shard(new)
    written.unlink()
    (tmp_path / "unet" / index.format(stem)).write_text(places)
    assert equal(open_unet(tmp_path).tensors, surgery.cut(weights(SD), BASE)[0])


def test_of_several_files_the_plain_one_is_taken_then_fp16(tmp_path):
    names = ["non_ema", "bf16", "fp16", ""]
    for variant in names:
        path = tmp_path / f"diffusion_pytorch_model{'.' * bool(variant)}{variant}.safetensors"
        path.touch()
        assert diffusers_folder.unet_in_folder(tmp_path) == path
    assert diffusers_folder.unet_in_folder(tmp_path / "absent") is None


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda index: index.write_text("{"), "no index of shards"),
        (lambda index: index.write_text("[]"), "no index of shards"),
        (lambda index: index.write_text('{"weight_map": {"a": "../a.safetensors"}}'), "files beside it"),
        (lambda index: index.write_text('{"weight_map": {"a": 5}}'), "files beside it"),
        (lambda index: index.write_text('{"weight_map": {"a": "absent.safetensors"}}'), "1 of the 1 files"),
        (lambda index: index.write_text(json.dumps({"weight_map": {"a": "a" * 5000}})), "1 of the 1 files"),
        (lambda index: index.write_text(index.read_text().replace('"conv_in.weight"', '"moon"')), "no tensor moon"),
    ],
)
def test_wrong_shards(tmp_path, diffusers_weights, change, message):
    change(shard(tmp_path / "unet", diffusers_weights))
    with pytest.raises(BadFile, match=message):
        open_unet(tmp_path)


def test_a_tensor_in_two_shards(tmp_path, diffusers_weights):
    shard(tmp_path, diffusers_weights)
    name = tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors"
    save_file(load_file(name) | load_file(tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors"), name)
    with pytest.raises(BadFile, match="in two of its files"):
        open_unet(tmp_path)


def test_a_choice_by_hand_wins_over_the_schedulers_file(tmp_path):
    for scheduler in ('{"prediction_type": "sample"}', '{"prediction_type": "v_prediction"}', "{"):
        root = a_folder(tmp_path / str(len(scheduler)), scheduler)
        assert open_unet(root, prediction="eps").description.prediction == "eps"


def test_folders_of_pickles_are_refused_with_a_way_out(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").touch()
    with pytest.raises(BadFile, match=r"pickle file.*save_pretrained\(NEW_FOLDER\)"):
        open_unet(tmp_path)
