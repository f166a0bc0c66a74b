"""The tree meets the registry's rules, and the check that says so finds what breaks them."""

import functools
import re
import shutil
import subprocess
import zipfile

import pytest

import bootstrap
from tools import registry

pytestmark = pytest.mark.slow  # of who publishes


@pytest.fixture(scope="module", autouse=True)
def each_file_is_read_once():
    """All trees here are this one, but for a file or two."""
    read = functools.cache(lambda *file: tuple(code_problems(*file)))
    code_problems = registry.code_problems
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "code_problems", read)
        yield


def test_the_tree_can_be_published():
    assert registry.problems() == []


def test_the_version_of_comfyui_is_the_oldest_that_was_tried():
    oldest = re.search(r'OLDEST_HOST = "(.+?)"', (registry.ROOT / "__init__.py").read_text("utf-8"))[1]
    assert f'requires-comfyui = ">={oldest}"' in (registry.ROOT / "pyproject.toml").read_text("utf-8")
    assert tuple(map(int, oldest.split("."))) <= tuple(map(int, bootstrap.HOST_VERSION.split(".")))


def test_the_zip_holds_the_nodes_and_none_of_the_tests(tmp_path):
    registry.write_zip(tmp_path / "asdm.zip")
    with zipfile.ZipFile(tmp_path / "asdm.zip") as archive:
        names = archive.namelist()
    assert {"card.py", "card/correct.py"} <= set(names)
    assert "__init__.py" in names and "models/emoji/emoji-teacher.safetensors" in names
    assert not [name for name in names if name.startswith(("tests", "bench", "runs", ".")) or "openmoji" in name]


@pytest.fixture
def tree(tmp_path):
    """A copy of what is published and of what the check reads, as a git checkout of its own."""
    for name in [*registry.published(), ".comfyignore", ".gitignore", "docs/changelog.md", "web/icon.svg"]:
        if not name.endswith(".safetensors"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(registry.ROOT / name, tmp_path / name)
    commit(tmp_path)
    return tmp_path


def commit(tree):
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=tree, check=True)


@pytest.mark.parametrize(
    "name, old, new, said",
    [
        ("pyproject.toml", 'name = "asdm"', 'name = "1-ComfyUI--asdm"', "name: wanted fewer than 100"),
        ("pyproject.toml", 'version = "0.1.0"', 'version = "0.1"', "version: wanted X.Y.Z"),
        ("pyproject.toml", 'version = "0.1.0"', 'version = "0.2.0"', "no section '## 0.2.0'"),
        ("pyproject.toml", '{ text = "GPL-3.0-or-later" }', '"GPL"', "license: wanted"),
        ("pyproject.toml", "dependencies = []", 'dependencies = ["torch"]', "dependencies: ComfyUI has all"),
        ("pyproject.toml", "PublisherId", "Publisher", "PublisherId is missing"),
        ("pyproject.toml", '">=0.27.0"', '"new"', "requires-comfyui: wanted"),
        ("pyproject.toml", "icon.svg", "icon.gif", "Icon: wanted a .svg or .png"),
        ("web/icon.svg", 'height="400"', 'height="300"', "Icon: wanted a square"),
        ("LICENSE", "GNU GENERAL PUBLIC LICENSE", "SOME LICENCE", "LICENSE: wanted the GPL"),
        (
            "nodes/load_checkpoint.py",
            "from __future__",
            "import subprocess\nfrom __future__",
            "nodes/load_checkpoint.py:3: import of subprocess",
        ),
        (
            "nodes/common.py",
            "CATEGORY = ",
            'eval("1"); CATEGORY = ',
            r"nodes/common.py:\d+: eval\(\)",
        ),
        ("nodes/common.py", "CATEGORY = ", "pass; CATEGORY = ", "two statements on one line"),
        ("nodes/common.py", "CATEGORY = ", 'import os\nos.system("true")\nCATEGORY = ', "os.system"),
        ("nodes/common.py", "CATEGORY = ", "HIDDEN = " + repr("A" * 500) + "\nCATEGORY = ", "a line of 51"),
        ("nodes/load_checkpoint.py", 'node_id="ASDMCheckpointLoader"', 'node_id="Loader"', "node id Loader: wanted"),
        (
            "nodes/load_checkpoint.py",
            'node_id="ASDMCheckpointLoader"',
            'node_id="ASDMApplyPack"',
            "node id ASDMApplyPack: wanted one",
        ),
        (".comfyignore", "/tests/", "/web/", "holds back web/"),
    ],
)
def test_what_breaks_a_rule_is_found(tree, monkeypatch, name, old, new, said):
    monkeypatch.setattr(registry, "zip_size", lambda root: 0)
    path = tree / name
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), "utf-8")
    assert any(re.search(said, problem) for problem in registry.problems(tree)), registry.problems(tree)


def test_what_is_not_for_artists_and_weights_that_a_workflow_needs_are_found(tree):
    for name in ("tests/test_it.py", "models/emoji/emoji-openmoji.safetensors", "workflows/finetune.json"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text('{"1": "emoji-openmoji.safetensors"}')
    (tree / ".comfyignore").write_text("/models/emoji/emoji-openmoji.safetensors\n")
    commit(tree)
    found = "\n".join(registry.problems(tree))
    assert "what is not for artists: tests/test_it.py" in found
    assert "workflows/finetune.json needs emoji-openmoji.safetensors" in found


def test_a_heavy_zip_is_found(tree, monkeypatch):
    monkeypatch.setattr(registry, "MOST", 1000)
    assert any("the zip weighs" in problem for problem in registry.problems(tree))


def test_publishing_needs_the_address_of_the_repository(tree):
    (problem,) = registry.problems(tree, publish=True)
    assert "--address" in problem
    path = tree / "pyproject.toml"
    path.write_text(registry.addressed(path.read_text("utf-8"), "https://github.com/someone/asdm/"), "utf-8")
    assert registry.problems(tree, publish=True) == []
    text = path.read_text("utf-8")
    assert 'Repository = "https://github.com/someone/asdm"' in text
    assert 'Icon = "https://raw.githubusercontent.com/someone/asdm/main/web/icon.svg"' in text
