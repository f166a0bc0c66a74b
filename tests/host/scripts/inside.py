"""Runs the tests of one file of tests/host/inside within the host process, and reports each outcome."""

import json
import sys
from pathlib import Path

import pytest

import comfy.model_management

sys.path.append(str(Path(__file__).parent))  # for small.py, shared.py and sweeps.py
import sweeps  # noqa: E402

SETTINGS = Path(__file__).with_name("inside.ini")


class Outcomes:
    """Collects what failed, by the name of the test function; parameters of one function together.

    A file holds the failures, the name of the test under way and what sweeps left out, at each moment: what is known
    when this process dies.
    """

    def __init__(self, file: Path):
        self.file = file
        self.failures: dict[str, list[str]] = {}

    def pytest_runtest_logstart(self, nodeid, location):
        self.write(location[2].partition("[")[0])

    def pytest_sessionfinish(self):
        self.write(None)

    def write(self, under_way: str | None):
        part = self.file.with_suffix(".part")
        part.write_text(
            json.dumps({"failures": self.failures, "under_way": under_way, "left_out": sweeps.LEFT_OUT}), "utf-8"
        )
        part.replace(self.file)

    def pytest_runtest_logreport(self, report):
        name = report.location[2].partition("[")[0]
        found = self.failures.setdefault(name, [])
        if report.skipped:
            found.append(f"{report.nodeid} was skipped; nothing may be skipped")
        if report.failed:
            # The report first: a long log must not push it out.
            found.append(
                f"{report.nodeid} "
                f"({report.when})\n{report.longreprtext[-6000:]}\n{(report.capstdout + report.caplog)[-2000:]}"
            )

    def pytest_collectreport(self, report):
        if report.failed:
            self.failures.setdefault("", []).append(report.longreprtext)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self):
        # No test may lean on what another left on the "device".
        comfy.model_management.unload_all_models()


def main(path, names, base, file):
    outcomes = Outcomes(Path(file))
    tests = [f"{path}::{name}" for name in names]
    # The pack's own pytest settings would put its folder on sys.path, where its nodes/ hides the host's nodes.py.
    options = [
        "-c",
        str(SETTINGS),
        "--rootdir",
        str(Path(path).parent),
        "--noconftest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:randomly",
        "--basetemp",
        base,
        "--import-mode=importlib",
        "-q",
        "--durations=15",
        "--durations-min=0.5",
    ]
    pytest.main([*options, *tests, "-p", "shared"], plugins=[outcomes, sweeps])
