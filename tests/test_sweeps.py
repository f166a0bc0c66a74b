"""Sweeps: which cases `make test` plays of tests of many, and that no test is lost with those it leaves out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import bootstrap
from tests.host.scripts.sweeps import spread

ROOT = Path(bootstrap.ROOT)
TESTS = """
import pytest

@pytest.mark.sweep(2)
@pytest.mark.parametrize("a", range(3))
@pytest.mark.parametrize("b", "xy")
def test_many(a, b): pass

@pytest.mark.sweep(2)
@pytest.mark.parametrize("a", range(6))
def test_others(a): pass

@pytest.mark.sweep(2)
@pytest.mark.parametrize("a", range(2))
def test_few(a): pass

@pytest.mark.parametrize("a", range(4))
def test_no_sweep(a): pass

@pytest.mark.sweep(0)
def test_costly(): pass
"""


@pytest.mark.parametrize("cases", [1, 2, 7, 36, 37])
def test_cases_are_spread_and_sweeps_over_one_list_meet_all_of_it(cases):
    for wanted in range(1, cases + 1):
        longest = -(-cases // wanted)
        sweeps = [spread(cases, wanted, number) for number in range(longest)]
        for kept in sweeps:
            assert len(kept) == wanted and kept == sorted(set(kept)) and kept[-1] < cases
            assert all(b - a < 2 * longest for a, b in zip([-1, *kept], [*kept, cases], strict=False))
        assert {case for kept in sweeps for case in kept} == set(range(cases))


@pytest.mark.parametrize("cases, inner", [(36, 6), (12, 3), (20, 2)])
def test_no_value_of_an_inner_parameter_is_met_alone(cases, inner):
    assert {case % inner for case in spread(cases, cases // inner, 0)} == set(range(inner))


def played(folder, everything, *arguments):
    """What pytest says of TESTS."""
    (folder / "test_it.py").write_text(TESTS)
    plugin = ["-p", "sweeps", "-p", "no:cacheprovider", "-p", "no:randomly", "-c", os.devnull, "--rootdir", folder]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"ASDM_ALL_TESTS": everything, "PYTHONPATH": str(ROOT / "tests" / "host" / "scripts")}
    command = [sys.executable, "-m", "pytest", *plugin, folder / "test_it.py", "-q", *arguments]
    done = subprocess.run([*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("workers", ["0", "2"])
def test_what_is_left_out_is_counted(tmp_path, workers):
    text = played(tmp_path, "", "-n", workers)
    assert "10 passed" in text and "skipped" not in text
    assert "9 cases of 3 sweeps were left out: make test ALL=1 runs them" in text


def test_all_cases_are_played_with_all(tmp_path):
    text = played(tmp_path, "1")
    assert "19 passed" in text and "left out" not in text


def test_a_case_that_is_asked_for_is_played(tmp_path):
    kept = spread(6, 2, 1)
    case = next(case for case in range(6) if case not in kept)
    assert "1 passed" in played(tmp_path, "", "-k", f"test_others[{case}]")


@pytest.mark.parametrize(("given", "wanted"), [([], ""), (["ALL=0"], ""), (["ALL=1", "FAST=1"], "1")])
def test_all_is_handed_on(given, wanted, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setenv("ASDM_ALL_TESTS", "of the tests around")
    monkeypatch.setattr(bootstrap, "host_path", lambda: tmp_path)
    monkeypatch.setattr(bootstrap, "host_version", lambda host: bootstrap.HOST_VERSION)
    monkeypatch.setattr(bootstrap, "ensure_environment", lambda host: sys.executable)
    monkeypatch.setattr(bootstrap, "run_target", lambda command, env: seen.append(env) or 0)
    assert bootstrap.main(["test", *given]) == 0
    assert seen and all(env["ASDM_ALL_TESTS"] == wanted for env in seen)
