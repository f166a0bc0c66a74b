"""The check of a card without a host: its report, its parts, and how it goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from card import parts, report
from demo.server import link_folder

ROOT = Path(__file__).parents[1]

CARD = {"memory_gib": 24.0, "compute": "8.9", "cuda": "13.0"}


def check(passed=True, found=0.0, wanted="0", **more):
    return {"kind": "check", "passed": passed, "found": found, "wanted": wanted, **more}


def time(technique, pixels, speedup, network="sdxl", **more):
    row = {"network": network, "technique": technique, "pixels": pixels, "batch": 1, "finite": True}
    row |= {"seconds": 1 / speedup, "speedup": speedup, "rounds": 5, "peak_mb": 5000.0, "share": None}
    return row | {"headline": technique == "plan"} | more


@pytest.fixture
def found():
    """What a run on a card may find."""
    timed = [time("none", 1024, 1.0), time("plan", 1024, 1.84), time("GRI", 1024, 0.98), time("GRI", 1536, 1.2)]
    return {
        "machine": {"gpu": "A Card", "cpu": "A CPU"},
        "card": CARD,
        "versions": {"torch": "2.11"},
        "form": "whole",
        "date": "2026-01-01",
        "parts": {
            "correct fp16": {
                "state": "done",
                "rows": {"one": check(), "two": check(found=0.01, wanted="at most 0.05")},
            },
            "times": {"state": "done", "rows": {"SDXL": {"kind": "times", "rows": timed}}},
            "flash attention": {"state": "skipped", "why": "the package flash_attn is not there", "rows": {}},
        },
    }


def test_the_third_line_says_it_all(found):
    lines = report.page(found).splitlines()
    assert lines[0] == "# asdm on A Card"
    assert lines[2] == (
        "On this card plan is 1.8x at SDXL 1024; GRI pays from 1536 on with SDXL; nothing failed in 6 checks."
    )


@pytest.mark.parametrize(
    "row, said",
    [
        (check(False, 0.2, "at most 0.05"), "wanted at most 0.05, found 0.2"),
        (check(False, None), "wanted 0, found no number"),
        (check(False, None, "no error", error="ValueError: no"), "found ValueError: no"),
        (
            {"kind": "times", "rows": [time("GRI", 512, 1.0, finite=False)]},
            "GRI at SDXL 512 makes something that is no",
        ),
    ],
)
def test_what_failed_is_in_the_sentence_and_on_the_page(found, row, said):
    found["parts"]["correct fp16"]["rows"]["bad"] = row
    page = report.page(found)
    assert said in page
    assert "1 of " in page.splitlines()[2] and "checks failed" in page.splitlines()[2]


def test_a_part_that_broke_has_failed_and_what_was_not_run_is_said(found):
    found["parts"]["correct fp16"] |= {"state": "broken", "why": "the process ended by itself (-11)"}
    found["parts"]["times"]["rows"]["SDXL"]["rows"].append({**time("Base", 1536, 1.0), "why": "out of memory"})
    page = report.page(found)
    assert "- correct fp16: the process ended by itself (-11)" in page and len(report.failures(found)) == 1
    assert "- flash attention: the package flash_attn is not there" in page
    assert "- Base at SDXL 1536: out of memory" in page


def test_gri_that_pays_nowhere_or_not_all_the_way_is_not_praised():
    rows = [time("GRI", 512, 1.2), time("GRI", 1024, 1.0), time("GRI", 1536, 1.0)]
    assert report.gri_pays(rows) == "GRI does not pay up to 1536 with SDXL"
    rows.append(time("GRI", 768, 1.3, "sd15"))
    assert report.gri_pays(rows).endswith("and pays from 768 on with SD1.5")


def test_the_report_is_a_page_its_data_and_two_plots(found, tmp_path):
    report.write(found, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "report.json", "speed.png", "cost.png"}
    assert json.loads((tmp_path / "report.json").read_text("utf-8"))["sentence"] in (tmp_path / "report.md").read_text(
        "utf-8"
    )


@pytest.mark.parametrize(
    "text, kept",
    [
        ("no /home/mary/comfy/models/a.safetensors", "no a.safetensors"),
        (r"no 'C:\Users\mary\comfy\a.safetensors'", "no 'a.safetensors'"),
        ("1/2 of 3", "1/2 of 3"),
    ],
)
def test_texts_lose_their_paths(text, kept):
    assert parts.impersonal(text) == kept


# Parts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [{}, CARD], ids=["CPU", "card"])
@pytest.mark.parametrize("fast", [True, False])
def test_parts_have_names_of_their_own_and_compare_with_one_reference(there, fast):
    found = parts.parts(there, fast)
    assert len({part.name for part in found}) == len(found)
    assert all(part.lacks or ("--cpu" in part.flags) == (not there) for part in found)
    comparing = [{k: part.settings.get(k) for k in ("networks", "runs")} for part in found if part.compares]
    assert all(settings == comparing[0] for settings in comparing)


def test_a_small_card_skips_what_is_too_large_for_it_and_says_so():
    lacking = {part.name: part.lacks for part in parts.parts(CARD | {"memory_gib": 6.0}, False)}
    assert lacking["times sdxl 1024"] == "the card has 6.0 GiB, this needs 8" and not lacking["times sd15 512"]


def run(part, tmp_path, rows=None):
    rows = {} if rows is None else rows
    return parts.run(part, tmp_path, tmp_path, rows, lambda: None, lambda text: None)


def test_the_comfyui_around_a_linked_pack_is_found(tmp_path, monkeypatch):
    for name in ("comfy/sd.py", "nodes.py", "folder_paths.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    link_folder(tmp_path / "custom_nodes" / "asdm", ROOT)
    environment = {name: value for name, value in os.environ.items() if name != "COMFYUI_PATH"}
    linked = tmp_path / "custom_nodes" / "asdm"
    for folder, script in ((linked, "card.py"), (tmp_path, str(linked / "card.py"))):
        program = f"import runpy; print(runpy.run_path({script!r})['found_host']())"
        found = subprocess.run(
            [sys.executable, "-c", program],
            cwd=folder,
            env=environment | {"PWD": str(folder)},  # as shells set it
            capture_output=True,
            text=True,
            timeout=1800,
        )
        assert found.stdout.strip() == str(tmp_path), found.stderr


def test_the_command_line_is_there_for_pythons_that_do_not_look_beside_a_script(tmp_path):
    """As that of portable ComfyUI; -I stands for it."""
    command = [sys.executable, "-I", str(ROOT / "card.py"), "core", "presets"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    assert found.returncode == 0 and "bk-sdm" in found.stdout.lower(), found.stderr


def test_a_part_whose_host_does_not_start_is_broken(tmp_path):
    result = run(parts.Part("p", "correct", (), {"dtype": "fp32"}), tmp_path)
    assert result["state"] == "broken" and "ModuleNotFoundError: No module named 'comfy'" in result["why"]


def test_a_part_that_finds_nothing_in_its_time_is_stopped_and_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "MOST", 0)
    part = parts.Part("p", "correct", (), {"dtype": "fp32"})
    result = run(part, tmp_path)
    assert (result["state"], result["why"]) == ("broken", "starting: not done after 0 s")
