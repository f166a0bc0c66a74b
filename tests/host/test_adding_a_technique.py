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


# By file of the pack: what the page shows, and the toy.
SHOWN = dict(re.findall(r"```python\n# (\S+\.py)\n(.*?)```", PAGE, re.DOTALL))
SOURCES = {"asdm_core/hold.py": "core.py", "nodes/toy.py": "node.py", "tests/host/inside/toy.py": "test.py"}


@pytest.fixture(scope="module")
def failures(tmp_path_factory, host, forks):
    """What failed in the tests of each, by name, in a copy of the pack to which the files of both are added."""
    folder = tmp_path_factory.mktemp("technique")
    pack = folder / "pack"
    for name in ("asdm_core", "nodes", "card"):
        shutil.copytree(ROOT / name, pack / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "__init__.py", pack)
    for name in ("models", "web"):
        (pack / name).symlink_to(ROOT / name)
    toy = {name: (TOY / source).read_text("utf-8") for name, source in SOURCES.items()}
    for name, text in (*SHOWN.items(), *toy.items()):
        path = pack / name
        assert not path.exists(), f"{name} is a file of the pack: a technique changes none"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    failures = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASDM_PACK", str(pack))
        with contextlib.closing(Forks(host, forks.arguments)) as others:  # the other forks have the pack as it is
            for which, files in (("shown", SHOWN), ("toy", toy)):
                (test,) = [pack / name for name in files if name.startswith("tests/")]
                names = functions(test)
                base = folder / which
                base.mkdir()
                found = run_inside(test, names, others.call, base)
                assert set(found) == set(names), found
                failures[which] = {name: failed for name, failed in found.items() if failed}
    return failures


def files_said() -> int:
    """How many Python files a technique is, as the page says."""
    (word,) = re.findall(r"A technique is (\w+) Python files", PAGE)
    return NUMBERS[word]


def test_the_pages_own_example_runs_as_it_stands(failures):
    assert len(SHOWN) == files_said() and len(SHOWN) == PAGE.count("```python")
    assert not failures["shown"]


def test_a_technique_with_state_and_a_voice_is_as_many_files(failures):
    assert len(SOURCES) == files_said() == len(list(TOY.glob("*.py")))
    assert not failures["toy"]
