"""The check behind .ci/run: host tests that did not run must not look like success."""

import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).parent.parent / ".ci" / "check_host_tests.py"
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
