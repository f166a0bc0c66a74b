"""What importing the pack costs a ComfyUI that does not use it: nothing it would notice."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# In a fresh interpreter, because this one has imported everything already.
CODE = """
import importlib.util, json, sys
sys.path.insert(0, {root!r})
sys.dont_write_bytecode = True
import torch, safetensors.torch, einops, numpy
before, seen = set(sys.modules), []
WRITING = ("w", "a", "x", "+")
def hook(event, args):
    forbidden = ("socket.", "subprocess.", "os.mkdir", "os.remove", "os.rename", "shutil.", "tempfile.", "urllib.")
    if event.startswith(forbidden):
        seen.append([event, str(args)[:200]])
    if event == "open" and any(c in str(args[1]) for c in WRITING):
        seen.append([event, str(args)[:200]])
sys.addaudithook(hook)
{imports}
print(json.dumps([sorted(set(sys.modules) - before), seen]))
"""
ROOT_PACKAGE = """
spec = importlib.util.spec_from_file_location(
    "custom_nodes.asdm", {root!r} + "/__init__.py", submodule_search_locations=[{root!r}]
)
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
assert callable(module.comfy_entrypoint) and not hasattr(module, "NODE_CLASS_MAPPINGS")
"""
CORE = "\n".join(
    f"import asdm_core.{path.stem}"
    for path in sorted((ROOT / "asdm_core").glob("*.py"))
    if not path.stem.startswith("__")
)


@pytest.mark.slow
@pytest.mark.parametrize("imports", [ROOT_PACKAGE.format(root=str(ROOT)), CORE], ids=["root package", "asdm_core"])
def test_import_brings_no_large_packages_writes_nothing_and_opens_no_socket(imports, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(root=str(ROOT), imports=imports)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    modules, seen = json.loads(done.stdout)
    ours = {"asdm_core", "custom_nodes"}
    forbidden = ("comfy", "comfy_api", "nodes", "diffusers", "transformers", "accelerate", "train")
    assert not [m for m in modules if m.split(".")[0] in forbidden and m.split(".")[0] not in ours]
    assert not seen
    assert not list(tmp_path.iterdir())


def imported(path):
    """Modules a file of the repository imports, by their full names."""
    package = list(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{name.name}" for name in node.names)


PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
MAY_IMPORT = {
    room: set(re.findall(r"`([\w.]+)`", others))
    for room, others in re.findall(r"^\| `([\w.]+)` \| ((?:`[\w.]+`(?:, )?)*) ?\|", PAGE, re.MULTILINE)
}
KNOW_THE_HOST = {"nodes", "nodes.engine", "card", "demo", "bench"}
HOST = ("comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "latent_preview", "nodes", "server")


def files_of(room):
    return sorted((ROOT / room.replace(".", "/")).glob("*.py"))


def room_of(module):
    """The room a module of ours lies in; None for others'."""
    return max((room for room in MAY_IMPORT if f"{module}.".startswith(f"{room}.")), key=len, default=None)


def test_every_room_has_its_line():
    assert {"asdm_core", "nodes", "nodes.engine", "train", "train.emoji", "card", "demo", "bench", "tools"} == set(
        MAY_IMPORT
    )
    assert MAY_IMPORT["asdm_core"] == set() and MAY_IMPORT["nodes"] == {"asdm_core", "nodes.engine"}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_arrows_point_one_way(room):
    paths = files_of(room)
    assert paths
    wrong = []
    for path in paths:
        for module in imported(path):
            # An absolute `nodes` is ComfyUI's nodes.py; ours is imported relatively, or by bench under the pack's name.
            absolute = module in HOST or module.startswith(tuple(f"{name}." for name in HOST[:4]))
            other = None if absolute and not relative(path, module) else room_of(module)
            if other not in (None, room, *MAY_IMPORT[room]):
                wrong.append(f"{path.relative_to(ROOT)}: {module}")
            if absolute and not relative(path, module) and room not in KNOW_THE_HOST:
                wrong.append(f"{path.relative_to(ROOT)}: {module} is ComfyUI's")
    assert not wrong


def relative(path, module):
    """Whether a file imports a module relatively."""
    found = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)]
    package = path.relative_to(ROOT).parent.parts
    return any(
        node.level
        and module.startswith(".".join((*package[: len(package) - node.level + 1], node.module or "")).strip("."))
        for node in found
    )


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_no_file_imports_one_that_imports_it(room):
    arrows = {path.stem: set() for path in files_of(room) if path.stem != "__init__"}
    for path in files_of(room):
        for module in imported(path):
            inside = module.removeprefix(f"{room}.").split(".")[0] if module.startswith(f"{room}.") else ""
            if inside in arrows and path.stem in arrows and inside != path.stem:
                arrows[path.stem].add(inside)
    assert any(arrows.values())
    while leaves := [name for name, others in arrows.items() if not others & arrows.keys()]:
        for name in leaves:
            del arrows[name]
    assert not arrows


@pytest.mark.parametrize("room", ["asdm_core", "nodes.engine", "train"])
def test_the_page_names_every_file(room):
    heading = f"## {room.replace('.', '/')}\n"
    part = PAGE[PAGE.index(heading) + len(heading) :].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+\.py)` \| (.+) \|$", part, re.MULTILINE))
    assert list(rows) == [path.name for path in files_of(room) if path.name != "__init__.py"]
    for path in files_of(room):
        says = " ".join((ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split())
        row = rows.get(path.name, says)
        assert says.startswith(row) and says[len(row) : len(row) + 1] in (".", "?", ""), path.name  # whole sentences
