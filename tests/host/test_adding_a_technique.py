"""What docs/adding_a_technique.md says, done as it says: a technique is one core file, one node file and one test."""

import contextlib
import re
import shutil
from pathlib import Path

import pytest

from tests.host.forks import Forks
from tests.host.test_inside import functions, run_inside

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "adding_a_technique.md").read_text("utf-8")
TOY = ROOT / "tests" / "host" / "toy"
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5}


@pytest.fixture
def played(tmp_path, monkeypatch, host, forks):
    """played(files): what failed in the test among them, by name, in a copy of the pack to which they are added."""

    def played(files: dict[str, str]) -> dict[str, list[str]]:
        pack = tmp_path / "pack"
        for name in ("asdm_core", "nodes", "card"):
            shutil.copytree(ROOT / name, pack / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "__init__.py", pack)
        for name in ("models", "web"):
            (pack / name).symlink_to(ROOT / name)
        for name, text in files.items():
            path = pack / name
            assert not path.exists(), f"{name} is a file of the pack: a technique changes none"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
        (test,) = [pack / name for name in files if name.startswith("tests/")]
        monkeypatch.setenv("ASDM_PACK", str(pack))
        names = functions(test)
        with contextlib.closing(Forks(host, forks.arguments)) as others:  # the other forks have the pack as it is
            found = run_inside(test, names, others.call, tmp_path)
        assert set(found) == set(names), found
        return {name: failed for name, failed in found.items() if failed}

    return played


def files_said() -> int:
    """How many Python files a technique is, as the page says."""
    (word,) = re.findall(r"A technique is (\w+) Python files", PAGE)
    return NUMBERS[word]


def test_the_pages_own_example_runs_as_it_stands(played):
    files = dict(re.findall(r"```python\n# (\S+\.py)\n(.*?)```", PAGE, re.DOTALL))
    assert len(files) == files_said() and len(files) == PAGE.count("```python")
    assert not played(files)


def test_a_technique_with_state_and_a_voice_is_as_many_files(played):
    files = {"asdm_core/hold.py": "core.py", "nodes/toy.py": "node.py", "tests/host/inside/toy.py": "test.py"}
    assert len(files) == files_said() == len(list(TOY.glob("*.py")))
    assert not played({name: (TOY / source).read_text("utf-8") for name, source in files.items()})
