"""The nodes over HTTP, as the browser uses them, on a running ComfyUI."""

import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from asdm_core import packs, surgery
from asdm_core.architecture import Architecture
from demo.server import PACK, PromptError
from demo.thumbnails import on_embedded_family, upload_pictures
from tests.core.narrow import SDXL, weights

IDS = sorted(
    {name for path in (PACK / "nodes").glob("*.py") for name in re.findall(r'node_id="(\w+)"', path.read_text("utf-8"))}
)
GRAPHS = sorted((PACK / "workflows" / "api").glob("*.json"))


def test_the_benchmark_of_the_start_counts_all_nodes(host):
    done = subprocess.run(
        [sys.executable, "-m", "bench.start", "--once"],
        cwd=PACK,
        env={**os.environ, "COMFYUI_PATH": str(host)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["nodes"] == len(IDS)


@pytest.fixture(scope="module")
def family(server, random_family):
    """A checkpoint with companions and a pack of it, of random weights, in the server's model folders."""
    shutil.copytree(random_family, server.base / "models", dirs_exist_ok=True)


def graph(**changes):
    """Text to image on the family with its pack; `changes` are inputs of the pack node."""
    pack = {
        "model": ["1", 0],
        "pack_name": "random-m2.safetensors",
        "start_percent": 0.0,
        "end_percent": 1.0,
        "strength": 1.0,
    }
    sampler = {
        "model": ["8", 0],
        "positive": ["2", 0],
        "negative": ["2", 0],
        "latent_image": ["4", 0],
        "seed": 1,
        "steps": 2,
        "cfg": 3.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
    }
    return {
        "1": {"class_type": "ASDMCheckpointLoader", "inputs": {"ckpt_name": "random.safetensors"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "red apple"}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        "5": {"class_type": "KSampler", "inputs": sampler},
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "test"}},
        "8": {"class_type": "ASDMApplyPack", "inputs": pack | changes},
    }


def image(client, outputs, node="7"):
    return Image.open(io.BytesIO(client.fetch(outputs[node]["images"][0])))


def test_all_nodes_are_offered_with_a_description(client):
    offered = {
        name: info for name, info in client.object_info().items() if info["python_module"] == "custom_nodes.asdm"
    }
    assert IDS and sorted(offered) == IDS
    for name, info in offered.items():
        assert len(info["description"]) > 40, name
        assert info["display_name"] != name


@pytest.mark.parametrize("node", IDS)
def test_every_setting_has_a_tooltip(client, node):
    inputs = client.object_info(node)["input"]
    settings = {**inputs.get("required", {}), **inputs.get("optional", {})}
    links = ("MODEL", "CLIP", "VAE", "LATENT", "CONDITIONING", "IMAGE")
    assert not [
        name for name, (kind, *options) in settings.items() if kind not in links and not options[0].get("tooltip")
    ]


@pytest.mark.parametrize("node", IDS)
def test_every_node_has_a_help_page(client, node):
    page = client.request(f"/extensions/asdm/docs/{node}.md").decode()
    assert page.startswith("# ") and len(page) > 200
    for name in re.findall(r"!\[.+\]\((.+)\)", page):
        assert Image.open(io.BytesIO(client.request(f"/extensions/asdm/docs/{name}"))).width > 200


def test_there_are_workflows():
    assert GRAPHS


@pytest.mark.sweep(3)
@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_workflow_runs(client, path, host):
    upload_pictures(client)
    described = on_embedded_family(json.loads(path.read_text("utf-8")), "red apple", "emoji-teacher")
    for node in described.values():
        node["inputs"].update({name: 1 for name in ("rounds", "batch_size") if name in node["inputs"]})
        node["inputs"].update({"minutes": 0.05} if "minutes" in node["inputs"] else {})
    outputs = client.run(described)
    entries = [entry for output in outputs.values() for entry in output.get("images", [])]
    for shown in (output["asdm_compare"][0] for output in outputs.values() if "asdm_compare" in output):
        entries += [entry for batch in shown["batches"] for entry in batch]
    pictures = [Image.open(io.BytesIO(client.fetch(entry))) for entry in entries]
    assert pictures
    for picture in pictures:
        low, high = picture.convert("L").getextrema()
        assert low < high


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    ("checkpoint", "pack"),
    [("teacher", "m1"), ("teacher", "m2"), ("small", ""), ("tiny-e2", ""), ("tiny-e2", "tiny-e2-pack")],
)
def test_shipped_packs_and_students_draw_what_the_teacher_draws(client, checkpoint, pack):
    def drawn(checkpoint, pack):
        described = json.loads((PACK / "workflows/api/text_to_image_pack.json").read_text("utf-8"))
        described["1"]["inputs"]["ckpt_name"] = f"emoji-{checkpoint}.safetensors"
        described["8"]["inputs"]["pack_name"] = f"emoji-{pack}.safetensors"
        if not pack:
            described["5"]["inputs"]["model"] = ["1", 0]
            del described["8"]
        return np.asarray(image(client, client.run(described)), dtype=np.float32) / 255

    error = np.square(drawn(checkpoint, pack) - drawn("teacher", "")).mean()
    assert 0 < error < 0.04  # an untrained cut is above 0.1


@pytest.mark.parametrize(("checkpoint", "said"), [("tiny-e2", []), ("teacher", ["8"])])
def test_experts_that_were_made_for_another_student_say_so_on_their_node(client, checkpoint, said):
    described = json.loads((PACK / "workflows/api/text_to_image_pack.json").read_text("utf-8"))
    described["1"]["inputs"]["ckpt_name"] = f"emoji-{checkpoint}.safetensors"
    described["8"]["inputs"]["pack_name"] = "emoji-tiny-e2-pack.safetensors"
    next(n for n in described.values() if n["class_type"] == "KSampler")["inputs"]["steps"] = 1
    run = client.submit(described)
    client.wait(run)
    notes = client.get(f"/asdm/notes?prompt_id={run}")
    assert all("was made for emoji-tiny-e2.safetensors" in "".join(notes[node]) for node in said)
    assert sorted(notes) == said


def test_pack_changes_the_picture_and_an_empty_window_does_not(client, family):
    plain = graph()
    plain["5"]["inputs"]["model"] = ["1", 0]
    del plain["8"]
    pictures = [
        image(client, client.run(g)).tobytes()
        for g in (plain, graph(start_percent=0.5, end_percent=0.5), graph(end_percent=0.5))
    ]
    assert pictures[0] == pictures[1]
    assert pictures[0] != pictures[2]


def test_same_seed_gives_the_same_picture_after_another(client, family):
    def run(seed):
        changed = graph()
        changed["5"]["inputs"]["seed"] = seed
        return image(client, client.run(changed)).tobytes()

    first, second = run(11), run(12)
    assert first != second
    client.free()
    assert run(11) == first


def test_files_that_come_later_are_offered_without_a_restart(client, family, server):
    shutil.copy(
        server.base / "models/asdm_packs/random-m2.safetensors", server.base / "models/asdm_packs/later.safetensors"
    )
    assert "later.safetensors" in client.choices("ASDMApplyPack", "pack_name")
    checkpoints = client.choices("ASDMCheckpointLoader", "ckpt_name")
    assert "random.safetensors" in checkpoints and checkpoints[0] == "emoji-teacher.safetensors"
    client.run(graph(pack_name="later.safetensors"))


def test_unknown_file_is_refused_before_the_run(client, family):
    with pytest.raises(PromptError, match=r"(?s)node 8 \(ASDMApplyPack\).*pack_name.*nothing.safetensors"):
        client.run(graph(pack_name="nothing.safetensors"))
    assert client.run(graph())


def damaged(path, how):
    data = bytearray(path.read_bytes())
    if how == "truncated":
        del data[-1000:]
    if how == "pickle":
        data[:10] = b"PK\x03\x04\x00\x00\x00\x00\x00\x00"
    return bytes(data)


@pytest.mark.parametrize("how, said", [("truncated", "cut short"), ("pickle", "pickle")])
def test_damaged_pack_is_one_error_and_the_next_run_works(client, family, server, how, said):
    folder = server.base / "models/asdm_packs"
    bad = folder / f"{how}.safetensors"
    bad.write_bytes(damaged(folder / "random-m2.safetensors", how))
    with pytest.raises(PromptError, match=rf"(?s)ASDMApplyPack.*{how}.safetensors.*{said}"):
        client.run(graph(pack_name=bad.name))
    assert client.run(graph())
    # The same name, put right, without a restart.
    shutil.copy(folder / "random-m2.safetensors", bad)
    assert client.run(graph(pack_name=bad.name))


def test_file_that_vanishes_is_named(client, family, server):
    folder = server.base / "models/asdm_packs"
    gone = shutil.copy(folder / "random-m2.safetensors", folder / "gone.safetensors")
    client.choices("ASDMApplyPack", "pack_name")
    gone.unlink()
    with pytest.raises(PromptError, match="gone.safetensors"):
        client.run(graph(pack_name="gone.safetensors"))
    assert client.run(graph())


def test_whole_unet_as_pack_and_pack_as_unet(client, family, server):
    models = server.base / "models"
    shutil.copy(models / "checkpoints/random.safetensors", models / "asdm_packs/whole.safetensors")
    with pytest.raises(
        PromptError, match="whole.safetensors: this is a whole UNet, not a pack. Load it with Load Pruned UNet"
    ):
        client.run(graph(pack_name="whole.safetensors"))
    (models / "diffusion_models").mkdir(exist_ok=True)
    shutil.copy(models / "asdm_packs/random-m2.safetensors", models / "diffusion_models/pack.safetensors")
    wrong = graph()
    wrong["9"] = {
        "class_type": "ASDMLoadPrunedUNet",
        "inputs": {"unet_name": "pack.safetensors", "prediction": "auto", "weight_dtype": "default"},
    }
    wrong["8"]["inputs"]["model"] = ["9", 0]
    with pytest.raises(PromptError, match="pack.safetensors: this is a pack, not a whole UNet. Use Apply Pack"):
        client.run(wrong)
    assert client.run(graph())


def test_pack_of_another_family_is_refused(client, family, server):
    sdxl = Architecture.preset("vega", SDXL)
    units = ("down.1.0.resnet",)
    packs.write_pack(
        server.base / "models/asdm_packs/xl.safetensors",
        surgery.extract(weights(SDXL), sdxl, units),
        packs.Description("pack", sdxl, units),
    )
    with pytest.raises(
        PromptError,
        match=r"node 8 \(ASDMApplyPack\): ValueError: xl.safetensors is a pack for narrow-sdxl UNets .* this MODEL "
        r"is emoji",
    ):
        client.run(graph(pack_name="xl.safetensors"))
    assert client.run(graph())


def test_saved_unet_can_be_loaded_and_gives_the_same_picture(client, family, server):
    outputs = client.run(
        {
            **{k: v for k, v in graph().items() if k in ("1", "8")},
            "10": {
                "class_type": "ASDMSaveUNet",
                "inputs": {"model": ["8", 0], "filename_prefix": "saved/m2", "dtype": "fp32"},
            },
        }
    )
    text = outputs["10"]["text"][0]
    assert text.startswith("output/saved/m2_00001.safetensors\nemoji m2, ")
    (saved,) = (server.base / "output/saved").glob("*.safetensors")
    (server.base / "models/diffusion_models").mkdir(exist_ok=True)
    shutil.copy(saved, server.base / "models/diffusion_models/saved.safetensors")
    loaded = graph()
    loaded["8"] = {
        "class_type": "ASDMLoadPrunedUNet",
        "inputs": {"unet_name": "saved.safetensors", "prediction": "auto", "weight_dtype": "default"},
    }
    assert image(client, client.run(loaded)).tobytes() == image(client, client.run(graph())).tobytes()


def inheriting(preset="balanced", **settings):
    """Text to image on the family with feature inheritance, and the picture of its plan."""
    g = graph()
    g["8"] = {
        "class_type": "ASDMFeatureInheritance",
        "inputs": {
            "model": ["1", 0],
            "preset": preset,
            "memory_limit_mb": 0,
            "keep_on_cpu": False,
            **{f"preset.{k}": v for k, v in settings.items()},
        },
    }
    g["9"] = {
        "class_type": "ASDMInheritancePlan",
        "inputs": {"model": ["8", 0], "steps": 10, "width": 128, "height": 128, "batch_size": 1, "after": ["5", 0]},
    }
    g["10"] = {"class_type": "SaveImage", "inputs": {"images": ["9", 1], "filename_prefix": "plan"}}
    g["5"]["inputs"]["steps"] = 10
    return g


CUSTOM = {
    "what": "deepcache",
    "branch": 0,
    "targets": "",
    "reuse": "output",
    "when": "uniform",
    "interval": 2,
    "power": 1.4,
    "centre": 0.3,
    "windows": "",
    "steps": "",
    "threshold": 0.1,
    "max_run": 4,
    "first_steps": 1,
    "last_steps": 0,
}


def test_inheritance_saves_steps_and_says_which(client, family):
    plain = inheriting("custom", **CUSTOM | {"interval": 1})
    outputs = client.run(plain)
    assert "0 of 10 steps inherited" in outputs["9"]["text"][0]
    usual = graph()
    usual["5"]["inputs"] |= {"steps": 10, "model": ["1", 0]}
    del usual["8"]
    assert image(client, outputs).tobytes() == image(client, client.run(usual)).tobytes()
    for preset, inherited in (("faithful", 1), ("fast", 2)):
        outputs = client.run(inheriting(preset))
        assert f"last run: {inherited} of 10 steps inherited" in outputs["9"]["text"][0]
        assert image(client, outputs, "10").size[0] == 540  # as wide as the node shows it


def test_a_plan_travels_as_text(client, family):
    plan = json.dumps(
        {
            "format": 1,
            "rules": [{"targets": "mid", "reuse": "output"}],
            "schedule": {"mode": "explicit", "steps": [0, 9]},
        }
    )
    assert "last run: 8 of 10 steps inherited" in client.run(inheriting("plan", plan=plan))["9"]["text"][0]


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"preset": "plan", "plan": "{"}, "not valid JSON"),
        ({"preset": "plan", "plan": " "}, "the plan is empty. Paste a plan that was kept or shared"),
        ({"preset": "plan", "plan": '{"technique": "profile", "format": 1}'}, "connect the MODEL output of Calibrate"),
        ({"preset": "plan", "plan": '{"format": 1, "rules": [{"targets": "down.7"}]}'}, r"down\.7"),
        ({"preset": "custom", **CUSTOM, "when": "windows", "windows": "0.2, 0.8"}, "start, end, interval"),
        ({"preset": "custom", **CUSTOM, "what": "encoder", "reuse": "residual"}, "has no residual"),
    ],
)
def test_a_wrong_plan_is_one_clear_error(client, family, settings, said):
    with pytest.raises(PromptError, match=rf"(?s)node 8 \(ASDMFeatureInheritance\): ValueError: .*{said}"):
        client.run(inheriting(**settings))
    assert client.run(graph())


OLD = {  # inputs of a DeepCache node of other packs, and the settings of ours that must give the same picture
    "DeepCache": (
        {"cache_interval": 3, "cache_depth": 2, "start_step": 0, "end_step": 1000},
        {"interval": 3, "branch": 2},
    ),
    "DeepCacheV2": (
        {"cache_interval": 3, "cache_depth": 2, "start_step": 0, "end_step": 1000},
        {"interval": 3, "branch": 2},
    ),
    "DeepCache_Fix": (
        {
            "cache_interval": 4,
            "cache_depth": 3,
            "start_steps": 0,
            "end_steps": 12,
            "input_cache": "Yes",
            "middle_cahce": "Yes",
            "output_cache": "Yes",
        },
        {"interval": 4, "branch": 3, "last_steps": 3},
    ),
    "ModuleDeepCacheSpeedup": (
        {
            "static_mode": "enable",
            "cache_interval": 3,
            "cache_layer_id": 0,
            "cache_block_id": 1,
            "start_step": 0,
            "end_step": 1000,
        },
        {"interval": 3, "branch": 3},
    ),
}


@pytest.mark.sweep(1)
@pytest.mark.parametrize("old", OLD)
def test_a_graph_with_a_dead_deepcache_node_runs_with_feature_inheritance(client, family, old):
    inputs, settings = OLD[old]
    ours, theirs = inheriting("custom", **CUSTOM | settings), inheriting()
    theirs["8"] = {"class_type": old, "inputs": {"model": ["1", 0], **inputs}, "_meta": {"title": old}}
    expected, outputs = client.run(ours), client.run(theirs)
    assert outputs["9"]["text"] and outputs["9"]["text"][0].splitlines()[0] == expected["9"]["text"][0].splitlines()[0]
    assert image(client, outputs).tobytes() == image(client, expected).tobytes()


def test_the_browser_is_told_of_dead_deepcache_nodes(client):
    told = client.get("/node_replacements")
    needed = client.object_info("ASDMFeatureInheritance")["input"]["required"]
    for old, (inputs, _) in OLD.items():
        (entry,) = told[old]
        assert entry["new_node_id"] == "ASDMFeatureInheritance"
        # Workflows keep the values of widgets by position.
        assert entry["old_widget_ids"] == list(inputs)
        assert {m["old_id"] for m in entry["input_mapping"] if "old_id" in m} <= {"model", *inputs}
        assert set(needed) <= {m["new_id"] for m in entry["input_mapping"]}


def calibrating(node, **more):
    """Text to image with the MODEL of a calibration, and its full run saved by 11."""
    g = graph()
    inputs = g["5"]["inputs"]
    run = {
        name: inputs[name]
        for name in ("positive", "negative", "latent_image", "seed", "cfg", "sampler_name", "scheduler")
    }
    g["8"] = {"class_type": node, "inputs": {"model": ["1", 0], **run, "steps": 6, **more}, "_meta": {"title": node}}
    g["10"] = {"class_type": "VAEDecode", "inputs": {"samples": ["8", 3], "vae": ["1", 2]}}
    g["11"] = {"class_type": "SaveImage", "inputs": {"images": ["10", 0], "filename_prefix": "full"}}
    inputs |= {"steps": 6, "model": ["8", 0]}
    return g


OLD_GOAL = {"goal": "saving", "goal.saving": 0.2, "longest": 2}


def test_a_graph_with_calibrate_inheritance_runs_with_calibrate(client, family):
    theirs = client.run(calibrating("ASDMCalibrateInheritance", **OLD_GOAL))
    said = theirs["8"]["text"][0]
    assert said.startswith("profile my profile, learned from 4 pictures")
    defaults = {"denoise": 1.0, "pictures": 4, "name": "my profile", "likeness": "close", "try_fewer_steps": True}
    ours = client.run(calibrating("ASDMCalibrate", **defaults))
    assert ours["8"]["text"][0] == said
    for node in ("7", "11"):
        assert image(client, theirs, node).tobytes() == image(client, ours, node).tobytes()


def test_a_profile_that_comes_where_a_plan_did_is_one_clear_error(client, family):
    g = calibrating("ASDMCalibrateInheritance", **OLD_GOAL)
    g["9"] = {
        "class_type": "ASDMFeatureInheritance",
        "inputs": {
            "model": ["1", 0],
            "preset": "plan",
            "preset.plan": ["8", 1],
            "memory_limit_mb": 0,
            "keep_on_cpu": False,
        },
    }
    g["5"]["inputs"]["model"] = ["9", 0]
    said = r"(?s)node 9 \(ASDMFeatureInheritance\): .*connect the MODEL output of Calibrate in place of"
    with pytest.raises(PromptError, match=said):
        client.run(g)


def test_the_browser_is_told_of_calibrate_inheritance(client):
    (entry,) = client.get("/node_replacements")["ASDMCalibrateInheritance"]
    assert entry["new_node_id"] == "ASDMCalibrate"
    # As the workflow of this pack kept them: 1, "fixed", 20, 3, "euler", "normal", "saving", 0.35, 2.
    run = ["steps", "cfg", "sampler_name", "scheduler"]
    assert entry["old_widget_ids"] == ["seed", "control_after_generate", *run, *OLD_GOAL]
    needed = client.object_info("ASDMCalibrate")["input"]["required"]
    assert {m["new_id"] for m in entry["input_mapping"]} == {*needed, "control_after_generate"}
    copied = {m["new_id"]: m["old_id"] for m in entry["input_mapping"] if "old_id" in m}
    assert copied == {n: n for n in ("model", "positive", "negative", "latent_image", "seed", *run)}
    outputs = range(len(client.object_info("ASDMCalibrate")["output"]))
    assert entry["output_mapping"] == [{"new_idx": i, "old_idx": i} for i in outputs]


def test_the_plan_of_a_model_without_one_is_a_clear_error(client, family):
    g = inheriting()
    g["9"]["inputs"]["model"] = ["1", 0]
    with pytest.raises(PromptError, match="inherits no features. Put Feature Inheritance before this node"):
        client.run(g)
