"""The run list of bench/tables.py and the verdicts of bench/_evidence.py, without training anything."""

import dataclasses
import json
from pathlib import Path

import pytest

from asdm_core.architecture import Architecture
from asdm_core.packs import Description, METADATA_KEY
from asdm_core.tensor_file import write_file
from bench import _evidence as evidence
from bench import _evidence_page as evidence_page
from bench import tables
from bench._evidence import Claim, verdict
from bench.tables import RUNS, Settings
from train.provenance import named
from train.losses import LOSSES
from train.emoji.unet import CONFIG

NAMES = [run.name for run in RUNS]


@pytest.fixture()
def settings(tmp_path):
    return Settings(4000, 240, 10, 1, tmp_path, tmp_path / "family", tmp_path / "models")


def logged(settings, run, seconds, seed=1):
    folder = settings.product(run, seed).parent
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text(json.dumps({"seconds": seconds}) + "\n")


def test_runs_differ_in_what_they_say_and_in_nothing_else(settings):
    logged(settings, "m2", 50.0), logged(settings, "m5", 100.0)
    recipes = {run.name: settings.recipe(run, 1) for run in RUNS}
    assert len(set(NAMES)) == len(NAMES)
    one = recipes["base"]
    for run in RUNS:
        recipe = recipes[run.name]
        assert recipe.optimiser == type(one.optimiser)(
            **{**vars(one.optimiser), "cooldown": round(0.4 * recipe.run.steps)}
        )
        assert (
            recipe.data == one.data and recipe.run.batch == one.run.batch and recipe.run.precision == one.run.precision
        )
        assert recipe.run.steps == {2.0: 500, 1.0: 125 if run.seconds_of else 250}[run.share]
        # What a run begins with is made before it.
        assert not run.start or NAMES.index(run.start) < NAMES.index(run.name)
        assert recipe.student.start == (str(settings.product(run.start, 1)) if run.start else "")
        assert not run.cut or recipe.architecture.name == run.cut
        if run.name.endswith(("alone", "teacher-on")):
            assert [name for name in LOSSES if getattr(recipe.loss, name)] == ["task"]
    assert (
        recipes["tiny-e2"].condconv == recipes["tiny-e2-fixed"].condconv and not recipes["tiny-e2-fixed"].experts.router
    )
    assert {len(r.architecture.own) for n, r in recipes.items() if n == "teacher-on"} == {0}


def finished(settings, run, samples, seed=1):
    """A product of a run, but for its weights."""
    path = settings.product(run, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    preset = tables.find(run).cut
    write_file(
        path,
        {},
        {
            METADATA_KEY: Description(
                "unet", Architecture.preset(preset, CONFIG), training={"samples": samples}
            ).to_json()
        },
    )


def test_what_a_run_learned_from_is_read_from_its_product(settings):
    for run, samples in (("base", 4000), ("m2", 4000), ("m2-direct", 8000), ("m5-seconds", 1600)):
        finished(settings, run, samples)
    assert [tables.learned(settings, tables.find(run), 1) for run in ("m2", "m2-direct", "m5-seconds")] == [
        8000,
        8000,
        5600,
    ]
    other = dataclasses.replace(settings, samples=38_400)
    message = (
        r"base-s1/base.safetensors learned from 4,000 samples, with --samples 38400 it would from 38,400; "
        r"give the --samples of this folder"
    )
    with pytest.raises(ValueError, match=message):
        tables.learned(other, tables.find("base"), 1)
    with pytest.raises(ValueError, match=message):  # before anything is computed
        next(tables.jobs(other, [1]))


def test_claims_are_about_rows_that_exist():
    rows = {*NAMES, "whole", *map(tables.switch_name, tables.SWITCHES)}
    for claim in evidence.CLAIMS:
        assert {claim.better, claim.worse} <= rows, claim
    assert {name for names in evidence_page.TABLES.values() for name in names} == {
        *NAMES,
        *(f"shipped-{name}" for name in tables.SHIPPED),
    }


ROW = {"seeds": 1, "v_mse_teacher": 0.1, "psnr": 16.0, "accuracy": 0.7, "accuracy_se": 0.03}
NEAR = Claim("a is better than b", "a test", "a", "b")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"v_mse_teacher": 0.08}, "held"),
        ({"v_mse_teacher": 0.08, "psnr": 16.5}, "held"),
        ({"v_mse_teacher": 0.12}, "did not hold"),
        ({"v_mse_teacher": 0.08, "psnr": 15.5}, "mixed"),
        ({"v_mse_teacher": 0.103, "psnr": 16.1}, "no difference"),
    ],
)
def test_a_verdict_needs_a_difference_above_the_margin(change, word):
    found = verdict(NEAR, {"a": ROW | change, "b": ROW})
    assert found["verdict"] == word
    assert found["differences"]["psnr"] == pytest.approx(change.get("psnr", 16.0) - 16.0)


def test_the_spread_over_training_seeds_widens_the_margin():
    several = ROW | {"seeds": 3, "v_mse_teacher_sd": 0.02, "psnr_sd": 1.0}
    assert (
        verdict(NEAR, {"a": several | {"v_mse_teacher": 0.08, "psnr": 17.0}, "b": several})["verdict"]
        == "no difference"
    )
    assert verdict(NEAR, {"a": several | {"v_mse_teacher": 0.05, "psnr": 17.0}, "b": several})["verdict"] == "held"
    # A row of one seed varies as the other does, and is one draw of it: 2 * 0.02 * sqrt(1 + 1/3) = 0.046.
    assert verdict(NEAR, {"a": ROW | {"v_mse_teacher": 0.056}, "b": several})["verdict"] == "no difference"
    assert verdict(NEAR, {"a": ROW | {"v_mse_teacher": 0.052}, "b": several})["verdict"] == "held"


def test_key_rows_are_trained_with_every_seed_and_the_others_with_the_first():
    assert list(tables.runs(1)) == list(RUNS)
    again = list(tables.runs(2))
    assert {run.name for run in again} == set(tables.KEY)
    assert all(not run.start or run.start in tables.KEY for run in again)


def test_accuracy_is_compared_in_standard_errors():
    claim = Claim("", "", "a", "b", ("accuracy",))
    assert verdict(claim, {"a": ROW | {"accuracy": 0.78}, "b": ROW})["verdict"] == "no difference"
    assert verdict(claim, {"a": ROW | {"accuracy": 0.79}, "b": ROW})["verdict"] == "held"


def test_what_was_not_run_is_said_to_be():
    found = verdict(NEAR, {"a": ROW})
    assert (found["verdict"], found["missing"]) == ("not run", ["b"])
    lines = evidence_page.table({"a": ROW}, [("a", "one"), ("b", "two")])
    assert lines[2].startswith("| one | 0.1000 | 16.00") and lines[3].startswith("| two | not run")
    assert lines[3].count("|") == lines[0].count("|")


def test_rows_are_means_over_the_seeds_that_are_finished(tmp_path):
    for seed, psnr, mse in ((1, 16.0, 0.02), (3, 18.0, 0.04)):
        (tmp_path / f"teacher-m2-s{seed}.json").write_text(
            json.dumps(
                {
                    "pictures": 4,
                    "top1": 0.5,
                    "top1_se": 0.1,
                    "psnr": psnr,
                    "psnr_se": 0.2,
                    "mse": mse,
                    "kid": 0.1,
                    "v_mse": {"teacher": {"all": 0.05}, "data": {"all": 0.3}},
                }
            )
        )
    found = evidence.row(evidence.read(tmp_path, "teacher", "m2", (1, 2, 3)), {"mse": 0.1})
    assert (found["seeds"], found["psnr"], found["accuracy"], found["v_mse_data"]) == (2, 17.0, 0.5, 0.3)
    assert found["psnr_sd"] == pytest.approx(2**0.5) and found["gap_recovered"] == pytest.approx(0.7)
    assert evidence.read(tmp_path, "teacher", "m1", (1, 2)) is None


def test_the_macs_of_table_three_are_between_those_of_its_networks():
    assert evidence.macs_share(Architecture.full(CONFIG)) == 1
    assert (
        0.5
        < evidence.macs_share(Architecture.preset("base", CONFIG))
        < evidence.macs_share(Architecture.preset("m2", CONFIG))
        < 1
    )


def test_plots_and_text_are_written_from_what_is_there(settings, tmp_path, monkeypatch):
    measured = settings.folder / "measured"
    measured.mkdir()
    numbers = {
        "pictures": 240,
        "top1": 0.7,
        "top1_se": 0.03,
        "kid": 0.1,
        "v_mse": {
            what: {"all": 0.1, "0-249": 0.2, "250-499": 0.1, "500-749": 0.05, "750-999": 0.05}
            for what in ("teacher", "data")
        },
    }
    paired = {"psnr": 16.0, "psnr_se": 0.2, "ssim": 0.7, "mse": 0.03, "latent_mse": 0.6}
    (measured / "settings.json").write_text('{"prompts": 240, "steps": 10, "cfg": 3.0}')
    for name, values in (
        ("whole", numbers),
        ("cut-base", numbers | paired | {"mse": 0.1}),
        ("base-s1", numbers | paired),
    ):
        (measured / f"teacher-{name}.json").write_text(json.dumps(values))
    monkeypatch.setattr(tables, "ROOT", tmp_path / "root")
    monkeypatch.setattr("bench._common.RESULTS", tmp_path / "root")
    monkeypatch.setattr("bench._common.ROOT", tmp_path)
    (tmp_path / "root").mkdir()
    tables.write(settings)  # no run is finished
    assert not list((tmp_path / "root").iterdir())
    logged(settings, "base", 90.0), finished(settings, "base", 4000)
    monkeypatch.setattr("sys.argv", ["tables", "--samples", "4000", "--seeds", "2", "3", "--report", "--notes", "a b"])
    tables.write(dataclasses.replace(settings, prompts=7, steps=7))
    summary = json.loads((tmp_path / "root" / "tables.json").read_text())["summary"]
    assert (
        summary["gap_recovered_base"] == pytest.approx(0.7)
        and summary["psnr_base"] == 16
        and summary["accuracy_whole"] == 0.7
    )
    text = (tmp_path / "root" / "docs" / "evidence.md").read_text()
    assert "| stage 1, Base | 4,000 | 90 | 0.1000 |" in text and "**not run**" in text
    assert f"1 of {len(RUNS)} runs are finished; every row is **one** training run" in text
    assert "from 4,000 samples, equal" in text and "(240 plain prompts, 10 DDIM steps, CFG 3)" in text
    assert "python -m bench.tables --samples 4000 --prompts 240 --steps 10 --seeds 1\n" in text
    assert {p.name for p in Path(tmp_path / "root" / "docs").glob("*.png")} == {
        "evidence-rows.png",
        "evidence-switching.png",
        "evidence-timesteps.png",
    }
    # Seeds that other processes trained are in the report as well.
    (measured / "teacher-base-s3.json").write_text(json.dumps(numbers | paired | {"psnr": 18.0}))
    logged(settings, "base", 90.0, 3), finished(settings, "base", 4000, 3)
    tables.write(settings)
    assert json.loads((tmp_path / "root" / "tables.json").read_text())["summary"]["psnr_base"] == 17

    # Files in models/ that came later are put beside what the record has, from a folder of their own.
    before = json.loads((tmp_path / "root" / "tables.json").read_text())
    shipped = tmp_path / "models" / "emoji-m2.safetensors"
    shipped.parent.mkdir()
    shipped.write_bytes(b"a pack")
    later = dataclasses.replace(settings, folder=tmp_path / "later", models=shipped.parent)
    (later.folder / "measured").mkdir(parents=True)
    its = later.folder / "measured"
    (its / "settings.json").write_text((measured / "settings.json").read_text())
    (its / "teacher-cut-m2.json").write_text(json.dumps(numbers | paired | {"mse": 0.3}))
    (its / f"teacher-{named(shipped)}.json").write_text(json.dumps(numbers | paired | {"psnr": 23.5}))
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "root")
    monkeypatch.setattr(tables, "jobs", lambda *given, **more: iter([]))
    with pytest.raises(ValueError, match="give the same --samples, --prompts and --steps"):
        tables.measure_shipped(dataclasses.replace(later, samples=4000, prompts=7), ["m2"])
    monkeypatch.setattr("sys.argv", ["tables", "--shipped", "m2"])
    tables.measure_shipped(dataclasses.replace(later, samples=4000, prompts=240, steps=10), ["m2"])
    after = json.loads((tmp_path / "root" / "tables.json").read_text())
    assert after["summary"] == before["summary"] | {
        key: value for key, value in after["summary"].items() if key.endswith("_shipped_m2")
    }
    assert after["summary"]["psnr_shipped_m2"] == 23.5
    assert after["summary"]["gap_recovered_shipped_m2"] == pytest.approx(0.9)
    assert after["command"] == before["command"] and after.get("notes") == before.get("notes")
    kept = [{k: v for k, v in row.items() if k != "command"} for row in after["rows"] if row.get("row") != "shipped-m2"]
    assert kept == before["rows"] and len(after["rows"]) == len(kept) + 1
    text = (tmp_path / "root" / "docs" / "evidence.md").read_text()
    assert "| m2 in models/ |  |  | 0.1000 |" in text and "| stage 1, Base | 4,000 |" in text
