"""The fast form of `make card`, on this machine, with the real host."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bootstrap
from card import parts

ROOT = Path(bootstrap.ROOT)


def card(host, folder, *arguments):
    command = [sys.executable, str(ROOT / "card.py"), "--to", str(folder), *arguments]
    env = dict(os.environ, COMFYUI_PATH=str(host), CUDA_VISIBLE_DEVICES="")
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)


def test_the_fast_form_passes_goes_on_and_says_so_in_one_sentence(host, tmp_path):
    done = card(host, tmp_path, "--fast")
    assert done.returncode == 0, done.stdout + done.stderr
    page, found = (tmp_path / "report.md").read_text("utf-8"), json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert page.splitlines()[2] == found["sentence"]
    assert "nothing failed in " in found["sentence"] and "Speed Up 'close' is " in found["sentence"]
    assert [part["state"] for part in found["parts"].values()] == ["done"] * len(parts.parts({}, True))
    checks = [row for part in found["parts"].values() for row in part["rows"].values() if row["kind"] == "check"]
    assert len(checks) > 15 and all(row["passed"] for row in checks)
    exact = [row["found"] for row in checks if row["wanted"] == "0"]
    assert exact and set(exact) == {0.0}
    assert not [
        text for text in (str(Path.home()), str(tmp_path), str(ROOT), str(host)) if text in page + json.dumps(found)
    ]

    # What passed is not done again; a part goes on with what it lacks, and with what failed.
    part = found["parts"]["correct fp32"]
    failed, *_, lost, _ = part["rows"]  # the last one, that nothing is left behind, takes longest
    part["rows"][failed]["passed"] = False
    del part["rows"][lost]
    (tmp_path / "report.json").write_text(json.dumps(found), "utf-8")
    done = card(host, tmp_path, "--fast")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if " s: " in line]
    assert len(lines) == 2 and lines[0].endswith(failed) and lines[1].endswith(lost)
    again = json.loads((tmp_path / "report.json").read_text("utf-8"))["parts"]["correct fp32"]
    assert again["state"] == "done" and set(again["rows"]) == {*part["rows"], lost}
    assert all(row["passed"] for row in again["rows"].values() if row["kind"] == "check")
