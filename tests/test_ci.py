"""The check behind .ci/run: host tests that did not run must not look like success."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import bootstrap

ROOT = Path(__file__).parent.parent
CHECK = ROOT / ".ci" / "check_host_tests.py"
CORE = '<testcase classname="tests.test_core" name="test_a"/>'
PASSED = '<testcase classname="tests.host.test_server" name="test_b"/>'
SKIPPED = '<testcase classname="tests.host.test_server" name="test_c"><skipped/></testcase>'
FAILED = '<testcase classname="tests.host.test_server" name="test_d"><error/></testcase>'


@pytest.mark.parametrize(
    ("cases", "code", "words"),
    [
        ([CORE, PASSED, PASSED], 0, "2 passed, 0 skipped, 0 failed"),
        ([CORE], 1, "0 passed"),
        ([], 1, "0 passed"),
        ([PASSED, SKIPPED], 1, "did not pass: tests.host.test_server::test_c"),
        ([PASSED, FAILED], 1, "did not pass: tests.host.test_server::test_d"),
    ],
    ids=["all passed", "only core tests", "no tests", "one skipped", "one failed"],
)
def test_host_tests_must_all_pass(cases, code, words, tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    done = subprocess.run([sys.executable, CHECK, report], stdout=subprocess.PIPE, text=True)
    assert done.returncode == code
    assert words in done.stdout


def test_every_supported_python_is_in_the_matrix():
    (row,) = re.findall(r"python: \[(.*)\]", (ROOT / ".github" / "workflows" / "tests.yml").read_text("utf-8"))
    major, oldest = bootstrap.PYTHON_MIN
    assert row == ", ".join(f'"{major}.{minor}"' for minor in range(oldest, bootstrap.PYTHON_BELOW[1]))


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.stem)
def test_whoever_reports_a_fault_is_asked_for_what_helps(path):
    form = yaml.safe_load(path.read_text("utf-8"))
    if path.stem == "config":
        assert form["blank_issues_enabled"] is False
        return
    assert form["name"] and form["description"]
    required = {part["id"] for part in form["body"] if part.get("validations", {}).get("required")}
    assert required >= ({"host", "nodes", "card"} if path.stem in ("bug", "speed") else {"idea"})
