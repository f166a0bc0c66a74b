"""The tests of tests/host/inside, which run within a host process: one process per file, one outcome per test."""

import ast
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parent / "inside").glob("*.py"))


def functions(path):
    return [
        node.name
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


def pytest_generate_tests(metafunc):
    if "inside" in metafunc.fixturenames:
        cases = [(path, name) for path in FILES for name in functions(path)]
        metafunc.parametrize("inside", cases, ids=[f"{path.stem}-{name.removeprefix('test_')}" for path, name in cases])


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
            base = tmp_path_factory.mktemp(path.stem)
            names = [name for file, name in chosen if file == path]
            known[path] = call_in_host(base, "inside.py", "main", str(path), names, str(base / "tests"), timeout=900)
        return known[path]

    return failures


def test_inside(inside, failures):
    path, name = inside
    found = failures(path)
    assert "" not in found, found[""][0]
    assert name in found, f"{path.name} did not run {name}"
    if found[name]:
        pytest.fail("\n\n".join(found[name]), pytrace=False)


def test_there_are_tests_inside():
    assert FILES
    assert all(functions(path) for path in FILES)
