"""What importing the pack costs a ComfyUI that does not use it: nothing it would notice."""

import ast
import json
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


@pytest.mark.parametrize(
    ("files", "forbidden"),
    [
        ("train/*.py", ("train.emoji", "nodes", "bench", "comfy")),
        ("train/emoji/*.py", ("nodes", "bench", "comfy")),
    ],
)
def test_what_is_general_does_not_know_the_special(files, forbidden):
    paths = sorted(ROOT.glob(files))
    assert len(paths) > 10
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in paths
        for name in imported(path)
        if any(name == other or name.startswith(f"{other}.") for other in forbidden)
    ]
    assert not wrong
