"""The demo without a host: which files it takes, the graphs it sends, and what it makes of the measurements."""

import json
import math
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from asdm_core import measure, packs, pictures, tensor_file
from asdm_core.architecture import FAMILIES, Architecture
from demo import job, report
from demo.server import PromptError, PromptInterrupted, outputs_of
from demo.timing import TimedRun, made, step_seconds

ROOT = Path(__file__).parents[1]


@pytest.fixture
def roots(tmp_path, monkeypatch):
    """An embedded family and one model folder, as empty files."""
    monkeypatch.setattr(job, "EMBEDDED", tmp_path / "embedded")
    for name in (
        "embedded/emoji-teacher.safetensors",
        "embedded/emoji-m2.safetensors",
        "embedded/emoji-openmoji.safetensors",
        "models/checkpoints/anime.safetensors",
        "models/asdm_packs/sd15-m2.safetensors",
        "elsewhere/mine.safetensors",
        "elsewhere/old.ckpt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return [tmp_path / "models"]


def test_without_arguments_it_is_the_embedded_teacher(roots):
    found = job.find_job(None, None, 20, roots)
    assert (found.loader, found.checkpoint.name, found.pack.name) == (
        "ASDMCheckpointLoader",
        "emoji-teacher.safetensors",
        "emoji-m2.safetensors",
    )
    assert (found.size, found.cfg, len(found.prompts), found.models) == (128, 3.0, 8, {})
    assert found.sides == ("a", "b", "c", "d")
    assert [found.addition(side) for side in "bcd"] == [
        "Speed Up (close)",
        "emoji-m2",
        "Speed Up (close) and emoji-m2",
    ]
    both = job.by_title(found.graph("d", 0))
    graph = found.graph("d", 0)
    assert graph[both["Sampler"]["inputs"]["model"][0]]["class_type"] == "ASDMSpeedUp"
    assert graph[both["Faster"]["inputs"]["model"][0]]["class_type"] == "ASDMApplyPack"
    assert job.find_job(None, "emoji-m2.safetensors", 20, roots).sides == ("a", "b")  # a pack asked for is B


def test_embedded_finetune_takes_the_teachers_pack(roots):
    found = job.find_job("emoji-openmoji.safetensors", None, 20, roots)
    assert (found.checkpoint.name, found.pack.name) == ("emoji-openmoji.safetensors", "emoji-m2.safetensors")


def test_own_checkpoint_by_name_and_by_path(roots, tmp_path):
    found = job.find_job("anime.safetensors", "sd15-m2.safetensors", 20, roots)
    assert (found.loader, found.size, found.cfg, len(found.prompts)) == ("CheckpointLoaderSimple", 512, 7.0, 8)
    found = job.find_job(str(tmp_path / "elsewhere/mine.safetensors"), "sd15-m2.safetensors", 20, roots)
    assert found.models == {"checkpoints": [tmp_path / "elsewhere"], "asdm_packs": [tmp_path / "models/asdm_packs"]}


def test_own_checkpoint_without_a_pack_is_sped_up(roots):
    found = job.find_job("anime.safetensors", None, 20, roots)
    assert (found.pack, found.addition(), list(found.models)) == (
        None,
        "Speed Up (close)",
        ["checkpoints"],
    )
    a, b = (found.graph(side, 0) for side in job.SIDES)
    (faster,) = b.keys() - a.keys()
    assert b[faster]["class_type"] == "ASDMSpeedUp"
    assert (b[faster]["inputs"]["likeness"], b[faster]["inputs"]["model"]) == (
        "close",
        [job.node_id(b, "Checkpoint"), 0],
    )
    job.by_title(b)["Sampler"]["inputs"]["model"] = b.pop(faster)["inputs"]["model"]
    job.by_title(b)["Save"]["inputs"]["filename_prefix"] = job.by_title(a)["Save"]["inputs"]["filename_prefix"]
    assert a == b


def test_missing_file_lists_where_it_was_looked_for(roots, tmp_path):
    with pytest.raises(job.DemoError) as error:
        job.find_job("nope.safetensors", None, 20, roots)
    assert str(tmp_path / "models/checkpoints/nope.safetensors") in str(error.value)


def test_folders_are_refused(roots, tmp_path):
    with pytest.raises(job.DemoError, match="elsewhere is a folder; wanted one .safetensors file"):
        job.find_job(str(tmp_path / "elsewhere"), None, 20, roots)


def test_pickles_are_refused(roots, tmp_path):
    with pytest.raises(job.DemoError, match="is no .safetensors file"):
        job.find_job(str(tmp_path / "elsewhere/old.ckpt"), None, 20, roots)


def sparse_file(path, shapes, metadata=None):
    """A safetensors file with a header and no content, which takes no room on the disk."""
    header = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape)
        header[name] = {"dtype": "F8_E4M3", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": metadata or {}, **header}).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def checkpoint_shapes(
    architecture, prefix="model.diffusion_model.", parts=("cond_stage_model.w", "first_stage_model.w")
):
    keys = architecture.keys(*packs.standalone_form(architecture))
    return {prefix + key: slot.shape for key, slot in keys.items()} | {part: (1,) for part in parts}


@pytest.fixture
def checkpoint(roots):
    """checkpoint(shapes): the job of an own checkpoint with these tensors."""

    def make(shapes, pack=None):
        sparse_file(roots[0] / "checkpoints/anime.safetensors", shapes)
        return job.find_job("anime.safetensors", pack, 20, roots)

    return make


def test_speed_up_and_the_pack_change_the_network_or_not(checkpoint, roots):
    full = Architecture.full(FAMILIES["sd15"])
    sides = job.networks(checkpoint(checkpoint_shapes(full)))
    assert {side: (of.config, of.cut) for side, of in sides.items()} == dict.fromkeys("ab", (full.config, frozenset()))
    found = job.find_job(None, None, 20, roots)
    assert [found.bare(side) for side in found.sides] == ["a", "a", "c", "c"]


@pytest.mark.parametrize("more", ["time_embed.cond_proj.weight", "input_blocks.1.0.in_layers.2.scale_weight"])
def test_tensors_that_comfyui_ignores_or_reads_itself_do_not_matter(checkpoint, more):
    shapes = checkpoint_shapes(Architecture.full(FAMILIES["sd15"]))
    assert job.networks(checkpoint(shapes | {f"model.diffusion_model.{more}": (1,)})) == job.networks(
        checkpoint(shapes)
    )


@pytest.mark.parametrize("family", ["sdxl", "sd21", "emoji"])
def test_checkpoint_of_another_family_is_refused(checkpoint, family):
    with pytest.raises(
        job.DemoError, match=f"anime.safetensors is of the family {family}; the demo compares SD1.5 checkpoints"
    ):
        job.networks(checkpoint(checkpoint_shapes(Architecture.full(FAMILIES[family]))))


def test_pruned_checkpoint_and_unet_alone_are_refused(checkpoint):
    with pytest.raises(job.DemoError, match="pruned already"):
        job.networks(checkpoint(checkpoint_shapes(Architecture.preset("base"))))
    with pytest.raises(job.DemoError, match="holds no text encoder and no VAE"):
        job.networks(checkpoint(checkpoint_shapes(Architecture.full(FAMILIES["sd15"]), prefix="", parts=())))


def test_broken_files_are_refused_before_anything_starts(checkpoint, roots):
    found = checkpoint(checkpoint_shapes(Architecture.full(FAMILIES["sd15"])))
    with open(found.checkpoint, "r+b") as file:
        file.truncate(found.checkpoint.stat().st_size // 2)
    with pytest.raises(tensor_file.BadFile, match="it is cut short"):
        job.networks(found)
    with pytest.raises(tensor_file.BadFile, match="no Stable Diffusion UNet in this file"):
        job.networks(checkpoint({"lora_unet_x.lora_up.weight": (4, 4)}))


def test_pack_of_another_family_is_refused(checkpoint, roots):
    shutil.copy(job.PACK / "models/emoji/emoji-m2.safetensors", roots[0] / "asdm_packs/sd15-m2.safetensors")
    with pytest.raises(job.DemoError, match="a pack for the family emoji, anime.safetensors is of sd15"):
        job.networks(checkpoint(checkpoint_shapes(Architecture.full(FAMILIES["sd15"])), pack="sd15-m2.safetensors"))


def test_graphs_of_a_and_b_differ_by_the_pack_alone(roots):
    found = job.find_job("anime.safetensors", "sd15-m2.safetensors", 12, roots)
    a, b = (found.graph(side, 3) for side in job.SIDES)
    assert job.by_title(a)["Checkpoint"]["class_type"] == "CheckpointLoaderSimple"
    assert job.by_title(a)["Checkpoint"]["inputs"] == {"ckpt_name": "anime.safetensors"}
    assert job.by_title(a)["Prompt"]["inputs"]["text"] == found.prompts[3]
    sampler = job.by_title(a)["Sampler"]["inputs"]
    assert (sampler["seed"], sampler["steps"], sampler["cfg"]) == (4, 12, 7.0)
    pack = job.node_id(b, "Pack")
    assert b[pack]["inputs"] == {
        "model": [job.node_id(b, "Checkpoint"), 0],
        "pack_name": "sd15-m2.safetensors",
        "start_percent": 0.0,
        "end_percent": 1.0,
        "strength": 1.0,
    }
    job.by_title(b)["Sampler"]["inputs"]["model"] = b.pop(pack)["inputs"]["model"]
    job.by_title(b)["Save"]["inputs"]["filename_prefix"] = job.by_title(a)["Save"]["inputs"]["filename_prefix"]
    assert a == b


def test_every_link_of_the_workflow_files_leads_somewhere():
    for file in job.WORKFLOWS.glob("*.json"):
        graph = json.loads(file.read_text("utf-8"))
        for node in graph.values():
            for value in node["inputs"].values():
                if isinstance(value, list):
                    assert value[0] in graph, f"{file.name}: {value}"


def test_steps_announced_together_share_their_average():
    assert step_seconds({1: 10.0, 2: 10.5, 5: 12.0, 6: 12.25}) == (0.5, 0.5, 0.5, 0.5, 0.25)
    assert step_seconds({1: 10.0, 20: 29.0}) == (1.0,) * 19
    assert step_seconds({1: 10.0}) == ()


def test_failed_and_interrupted_runs_name_the_node():
    def record(kind, **data):
        return {
            "outputs": {},
            "status": {
                "messages": [["execution_start", {}], [kind, {"node_id": "5", "node_type": "KSampler", **data}]]
            },
        }

    with pytest.raises(PromptInterrupted, match="node 5"):
        outputs_of(record("execution_interrupted"))
    with pytest.raises(PromptError, match=r"node 5 \(KSampler\): ValueError: too bad"):
        outputs_of(record("execution_error", exception_type="ValueError", exception_message="too bad"))


# ---------------------------------------------------------------- results


SYSTEM = {"system": {"comfyui_version": "0.30.0", "pytorch_version": "2.11.0"}, "devices": [{"name": "cpu"}]}


@pytest.fixture
def results(roots, tmp_path):
    """A comparison of grey images, A 10 ms and B 5 ms a step, C and D as slow as A; the first pairs are identical."""
    found = job.find_job(None, None, 4, roots)
    output = tmp_path / "results"
    report.clear_results(output)
    for i in range(8):
        Image.new("RGB", (128, 128), (100, 100, 100)).save(output / report.image_name("a", i))
        for side in "bcd":
            Image.new("RGB", (128, 128), (100 + i, 100, 100)).save(output / report.image_name(side, i))
    seconds = {"a": 0.01, "b": 0.005, "c": 0.01, "d": 0.01}
    runs = {side: [TimedRun({}, (each,) * 3)] * 7 + [TimedRun({}, (each, each, 9.0))] for side, each in seconds.items()}
    m2 = Architecture.preset("m2")
    networks = {"a": Architecture.full(m2.config)} | dict.fromkeys("bcd", m2)
    return report.write_results(found, networks, runs, SYSTEM, output), output


def test_report_holds_what_was_measured(results):
    written, output = results
    assert json.loads((output / "report.json").read_text("utf-8"), parse_constant=pytest.fail) == written
    assert written["a"]["seconds_per_step"]["median"] == 0.01
    assert written["a"]["seconds_per_step"]["whole_run"] == pytest.approx(0.01)  # the one slow picture does not move it
    assert len(written["a"]["seconds_per_step"]["values"]) == 24
    # B's first step, which is not timed, counts as one of A's.
    assert written["speedup"] == pytest.approx(0.01 / ((0.01 + 3 * 0.005) / 4))
    assert written["a"]["unet_params"] > written["b"]["unet_params"]
    assert written["a"]["unet_macs"] > written["b"]["unet_macs"]
    assert written["psnr_values"][0] is None  # infinite: the pair is equal, which the whole is not
    assert written["psnr"] == pytest.approx(sum(written["psnr_values"][1:]) / 7)
    error = (1 / 255) ** 2 / 3
    assert written["psnr_values"][1] == pytest.approx(-10 * math.log10(error), abs=0.01)
    assert written["host"]["comfyui"] == "0.30.0"
    # An entry for each variant; what stands at the top is the headline's.
    assert [variant["side"] for variant in written["variants"]] == ["b", "c", "d"]
    assert [variant["speedup"] for variant in written["variants"]] == pytest.approx([1.6, 1, 1])
    assert all(written[key] == written["variants"][0][key] for key in ("speedup", "psnr", "ssim", "addition"))
    assert (output / "headline.png").is_file()
    assert all((output / name).is_file() for side in job.SIDES for name in written[side]["images"])


def test_what_was_left_out_counts_by_the_runs_own_words(results, roots):
    _, output = results
    found = job.find_job("anime.safetensors", None, 4, roots)
    full = Architecture.full(FAMILIES["sd15"])
    runs = {"a": [TimedRun({}, (1.0, 1.0, 1.0))] * 8, "b": [TimedRun({}, (0.0, 1.0, 0.0), 0.5)] * 8}
    written = report.write_results(found, {"a": full, "b": full}, runs, SYSTEM, output)
    assert written["b"]["seconds_per_step"]["whole_run"] == 0.5 and written["speedup"] == pytest.approx(2)
    assert written["b"]["unet_params"] == written["a"]["unet_params"]
    assert (written["a"]["evaluations_made"], written["b"]["evaluations_made"]) == (1, 0.5)
    latent = found.size // 8
    assert written["a"]["unet_macs"] == measure.total(measure.costs(full, latent, latent)).total
    assert written["b"]["unet_macs"] == pytest.approx(written["a"]["unet_macs"] / 2)
    assert written["pack"] is None and "anime.safetensors + Speed Up (close)" in report.summary(written, output)


def test_words_about_evaluations_are_read_from_any_node():
    assert made({}) == made({"3": ["too small."]}) == 1
    assert made(
        {"3": ["too small."], "7:12": ["x.", "14 of 40 evaluations of the network were made, 65% left out."]}
    ) == (14 / 40)


def test_texts_are_honest_in_both_directions(results):
    written, output = results
    (b, *_), less = written["variants"], 1 - written["b"]["unet_macs"] / written["a"]["unet_macs"]
    assert report.headline(b) == f"B is 1.60 times faster, the same picture: {less:.0%} fewer multiplications"
    assert report.headline({**b, "psnr": 18.6, "speedup": 0.8}).startswith("B is 1.25 times slower: ")
    text = report.summary(written, output)
    furthest = min(value for value in b["psnr_values"] if value is not None)
    assert f"the furthest {furthest:.1f} dB" in text  # a mean hides it
    assert "1.60 times faster" in text and str(output / "compare.png") in text
    assert pictures.likeness(None, 1.0) == "identical"


def test_grid_shows_every_pair_with_its_difference(results):
    _, output = results
    sheet = Image.open(output / "compare.png")
    group = 3 * pictures.CELL + 2 * pictures.GAP
    # The panel of the headline, before those of C and D.
    assert sheet.height % 3 == 0
    sheet = sheet.crop((0, 0, sheet.width, sheet.height // 3))
    assert sheet.width == report.GROUPS * group + (report.GROUPS + 1) * pictures.MARGIN
    top = sheet.height - pictures.MARGIN - 10
    left = 2 * pictures.MARGIN + group + 10  # the eighth pair: B is seven brighter in red
    colours = [sheet.getpixel((left + i * (pictures.CELL + pictures.GAP), top)) for i in range(3)]
    assert colours == [(100, 100, 100), (107, 100, 100), tuple(pictures.HEAT[3 * 7])]


def test_results_of_an_earlier_run_do_not_mix_with_new_ones(tmp_path):
    for name in ("01-a.png", "12-b.png", "compare.png", "report.json", "mine.png"):
        (tmp_path / name).write_bytes(b"")
    report.clear_results(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]


@pytest.mark.parametrize("command", [["demo", "--output"], ["demo.serve", "--no-open", "--folder"]])
def test_a_folder_that_cannot_be_written_costs_one_line(tmp_path, command):
    (tmp_path / "file").touch()
    given = [sys.executable, "-m", *command, str(tmp_path / "file" / "within")]
    found = subprocess.run(given, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert found.returncode == 1 and "Traceback" not in found.stderr
    assert str(tmp_path / "file") in found.stderr.splitlines()[-1]


def test_embedded_prompts_are_eight_of_each():
    assert len(set(job.EMOJI_PROMPTS)) == len(set(job.SD15_PROMPTS)) == 8


def test_paths_are_absolute_for_the_host(roots, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert job.find_file("mine.safetensors", "checkpoint", []) == Path(tmp_path / "elsewhere/mine.safetensors")
