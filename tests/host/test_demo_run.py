"""The main job against the real ComfyUI, with random weights in the form of the embedded family."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from demo import __main__ as demo
from demo import job as jobs
from demo.job import EMBEDDED, SIDES, Job
from tests.host.scripts import sweeps


@pytest.fixture(scope="module", params=["pack", "speed up"])
def job(random_family, request):
    """Two prompts with the random family, one step more than needed to time any."""
    models = random_family
    return Job(
        "ASDMCheckpointLoader",
        models / "checkpoints/random.safetensors",
        models / "asdm_packs/random-m2.safetensors" if request.param == "pack" else None,
        ("red apple", "a blue cat"),
        "",
        128,
        3.0,
        3,
        {"checkpoints": [models / "checkpoints"], "asdm_packs": [models / "asdm_packs"]},
    )


@pytest.mark.sweep(0)
def test_demo_compares_and_leaves_no_server(job, host, tmp_path, capsys, monkeypatch):
    servers = []

    class Recorded(demo.Server):
        def start(self):
            servers.append(self)
            return super().start()

    monkeypatch.setattr(demo, "Server", Recorded)
    report = demo.run(job, host, tmp_path)
    assert len(servers) == 1 and not servers[0].alive and not servers[0].base.exists()

    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == report
    assert report["host"]["comfyui"] and report["host"]["torch"]
    times = {side: report[side]["seconds_per_step"] for side in SIDES}
    assert report["speedup"] == pytest.approx(times["a"]["whole_run"] / times["b"]["whole_run"])
    assert report["a"]["evaluations_made"] == 1 and report["b"]["evaluations_made"] <= 1
    for side in SIDES:
        values = report[side]["seconds_per_step"]["values"]
        assert len(values) == 2 * (job.steps - 1) and min(values) > 0
        for index, name in enumerate(report[side]["images"]):
            image = Image.open(tmp_path / name)
            assert image.size == (128, 128)
            graph = json.loads(image.text["prompt"])  # drag it in, and it runs again
            for node in graph.values():
                node.pop("is_changed", None)  # the host's note of the file that was read
            assert graph == job.graph(side, index)
            assert len(image.convert("RGB").getcolors(128 * 128)) > 100  # a picture, not a plain colour
    # B is not A: its images are others. The prompts play: theirs are others again.
    assert all(value is not None for value in report["psnr_values"])
    assert (tmp_path / "01-a.png").read_bytes() != (tmp_path / "02-a.png").read_bytes()
    assert Image.open(tmp_path / "compare.png").width > 1000
    assert "2/2" in capsys.readouterr().out


@pytest.fixture
def embedded():
    """A job whose files are there."""
    return Job(
        "ASDMCheckpointLoader",
        EMBEDDED / "emoji-teacher.safetensors",
        EMBEDDED / "emoji-m2.safetensors",
        ("red apple",),
        "",
        128,
        3.0,
        3,
        {"checkpoints": [EMBEDDED], "asdm_packs": [EMBEDDED]},
    )


def test_file_the_host_does_not_offer_is_named(embedded, client):
    with pytest.raises(demo.DemoError, match="does not offer .*elsewhere.safetensors in CheckpointLoaderSimple"):
        demo.check(client, replace(embedded, loader="CheckpointLoaderSimple", checkpoint=Path("elsewhere.safetensors")))


def test_missing_node_is_named(embedded, client):
    with pytest.raises(demo.DemoError, match="lacks the nodes NoSuchLoader"):
        demo.check(client, replace(embedded, loader="NoSuchLoader"))


def test_demo_of_the_embedded_family(tmp_path, capfd, monkeypatch):
    """What `make demo` runs, of its prompts the first or, with ALL=1, all; its headline in multiplications, which
    no machine changes: half at the most, at 30 dB.
    """
    prompts = jobs.EMOJI_PROMPTS if sweeps.everything() else jobs.EMOJI_PROMPTS[:1]
    monkeypatch.setattr(jobs, "EMOJI_PROMPTS", prompts)
    assert (EMBEDDED / "emoji-teacher.safetensors").exists()
    assert demo.main(["--output", str(tmp_path)]) == 0
    assert "fewer multiplications" in capfd.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert len(report["prompts"]) == len(prompts)
    found = {variant["side"]: variant["psnr"] for variant in report["variants"]}
    assert report["psnr"] == found["b"] >= 30
    shares = {variant["side"]: variant["macs_share"] for variant in report["variants"]}
    assert shares["b"] == pytest.approx(report["b"]["evaluations_made"]) and shares["b"] <= 0.5
    assert shares["d"] < min(shares["b"], shares["c"])
    assert found["c"] > 12  # a pack that was cut and never trained reaches 11.5
