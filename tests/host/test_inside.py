"""The tests of tests/host/inside, which run within a host process: one process per file, one outcome per test."""

import ast
import json
import sys
from pathlib import Path

import pytest

from tests.host.limits import run_within
from tests.host.scripts import sweeps

FILES = sorted((Path(__file__).parent / "inside").glob("*.py"))


def functions(path):
    """The tests of a file, but for those that are played with ALL=1 alone, where it is not set."""
    found = []
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            if sweeps.everything() or "pytest.mark.sweep(0)" not in map(ast.unparse, node.decorator_list):
                found.append(node.name)
            else:
                sweeps.LEFT_OUT[f"{path.name}::{node.name}"] = 1
    return found


def pytest_generate_tests(metafunc):
    if "inside" in metafunc.fixturenames:
        cases = [(path, name) for path in FILES for name in functions(path)]
        metafunc.parametrize("inside", cases, ids=[f"{path.stem}-{name.removeprefix('test_')}" for path, name in cases])


def run_inside(path, names, call_in_host, base, cpu_seconds=3000):
    """{test: what failed in it}, of tests of one file run in one host process.

    A process that dies in a test, or reaches its limit there, fails that test; the rest go on in a second process, and
    what that one leaves undone is not begun again: it is missing in the answer. Under "" is what kept a process from
    beginning at all.
    """
    known = {}
    for attempt in ("first", "second"):
        folder = base / attempt
        folder.mkdir()
        file = folder / "outcomes.json"
        todo = [name for name in names if name not in known]
        died = None
        try:
            call_in_host(
                folder,
                "inside.py",
                "main",
                str(path),
                todo,
                str(folder / "tests"),
                str(file),
                cpu_seconds=cpu_seconds,
            )
        except pytest.fail.Exception as ended:
            died = str(ended)
        found = (
            json.loads(file.read_text("utf-8")) if file.exists() else {"failures": {}, "under_way": "", "left_out": {}}
        )
        known |= found["failures"]
        sweeps.LEFT_OUT.update(found["left_out"])
        if died is None or not found["under_way"]:
            return known | ({"": [died]} if died else {})
        known.setdefault(found["under_way"], []).append(died)
    return known


@pytest.fixture(scope="session")
def failures(request, call_in_host, tmp_path_factory):
    """failures(path): what failed in a file, by test; the file runs once, with the tests chosen from it."""
    known = {}

    def failures(path):
        if path not in known:
            chosen = [
                item.callspec.params["inside"]
                for item in request.session.items
                if getattr(item, "callspec", None) and "inside" in item.callspec.params
            ]
            names = [name for file, name in chosen if file == path]
            known[path] = run_inside(path, names, call_in_host, tmp_path_factory.mktemp(path.stem))
        return known[path]

    return failures


def test_inside(inside, failures):
    path, name = inside
    found = failures(path)
    assert "" not in found, found[""][0]
    assert name in found, f"{path.name} did not come to {name}: two processes ended before it"
    if found[name]:
        pytest.fail("\n\n".join(found[name]), pytrace=False)


DYING = """
import os

def test_passes(): pass
def test_dies(): os._exit(3)
def test_fails(): assert 1 == 2
def test_never_ends():
    while True: pass
def test_after(): pass
"""


def test_what_a_dead_process_left_undone_fails_once_and_the_rest_is_kept(call_in_host, tmp_path):
    path = tmp_path / "dying.py"
    path.write_text(DYING)
    started = []

    def call(*args, **kwargs):
        started.append(args)
        return call_in_host(*args, **kwargs)

    names = functions(path)
    found = run_inside(path, names, call, tmp_path, cpu_seconds=8)
    assert len(started) == 2
    assert found.keys() == set(names) - {"test_after"}
    assert found["test_passes"] == []
    assert "ended with status 3" in found["test_dies"][0]
    assert "assert 1 == 2" in found["test_fails"][0]
    assert "of CPU time" in found["test_never_ends"][0]


def test_limits_are_in_cpu_time_and_notice_who_does_nothing():
    ended, output = run_within([sys.executable, "-c", "print('begun', flush=True)\nwhile True: pass"], cpu_seconds=1)
    assert "of CPU time" in ended and output.strip() == "begun"
    ended, _ = run_within([sys.executable, "-c", "import time; time.sleep(600)"], cpu_seconds=1, quiet_seconds=3)
    assert "did nothing" in ended
    assert run_within([sys.executable, "-c", "raise SystemExit(4)"], cpu_seconds=60) == ("ended with status 4", "")


def test_there_are_tests_inside():
    assert FILES
    assert all(functions(path) for path in FILES)
