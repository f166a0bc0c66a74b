"""What the Comfy Registry would publish of this tree, and whether it meets the registry's rules.

    python -m tools.registry                       check, and say what the published zip holds and weighs
    python -m tools.registry --zip asdm.zip        write that zip as well
    python -m tools.registry --address URL         write the repository's address into pyproject.toml, once, before the
    first publishing python -m tools.registry --publish             check also what the registry needs only when
    publishing: that address

Rules: https://docs.comfy.org/registry/specifications and /registry/standards. As comfy-cli does, the zip takes the
files that git knows without those that .comfyignore names (the syntax of .gitignore). Needs git, and on Python 3.10
tomli.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import subprocess
import sys
import tokenize
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

ROOT = Path(__file__).resolve().parent.parent
ICON_SIZE, ICON_TYPES = (400, 400), (".svg", ".png")
MOST = 25 * 2**20  # bytes of the zip; it is downloaded for every update
PREFIX = "ASDM"
NEVER = ("tests/", "bench/", "runs/", "demo/", ".github/", ".ci/", ".pre-commit", "CONTRIBUTING")  # not for artists
BANNED_CALLS = {"eval", "exec", "compile", "__import__"}
BANNED_MODULES = {"subprocess", "ctypes", "pickle", "marshal", "pip", "requests", "urllib", "socket", "http"}
HARMLESS = {"urllib.parse"}  # reads addresses and opens none
LONGEST_LINE = 400  # longer ones hide code, or are data that belongs in a file of its own


# ---------------------------------------------------------------- what is published


def git_files(root: Path, *options: str) -> set[str]:
    done = subprocess.run(["git", "ls-files", "-z", *options], cwd=root, capture_output=True, text=True, check=True)
    return {name for name in done.stdout.split("\0") if name}


def published(root: Path = ROOT) -> list[str]:
    """Names of the files that a published version holds, sorted. Raises CalledProcessError outside of a git
    checkout.
    """
    ignored = git_files(root, "--cached", "--ignored", "--exclude-from=.comfyignore")
    return sorted(name for name in git_files(root) - ignored if (root / name).is_file())


def write_zip(target, root: Path = ROOT) -> None:
    """Write the zip that is published to a path or an open file."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in published(root):
            archive.write(root / name, name)


# ---------------------------------------------------------------- the rules


def metadata_problems(project: dict, comfy: dict, root: Path) -> Iterator[str]:
    name, version = project.get("name", ""), project.get("version", "")
    if not re.fullmatch(r"[A-Za-z](?:[-_.]?[A-Za-z0-9])*", name) or len(name) >= 100:
        yield f"name: wanted fewer than 100 letters, digits and single - _ . after a letter, got {name!r}"
    if "comfyui" in name.lower():
        yield "name: the registry asks not to put ComfyUI into it"
    if not re.fullmatch(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)", version):
        yield f"version: wanted X.Y.Z, got {version!r}"
    changelog = root / "docs" / "changelog.md"
    if not changelog.is_file() or f"## {version}" not in changelog.read_text("utf-8"):
        yield f"docs/changelog.md has no section '## {version}'"
    licence = project.get("license")
    if not isinstance(licence, dict) or not set(licence) & {"file", "text"}:
        yield "license: wanted { file = ... } or { text = ... }; the registry does not read a bare text"
    if (
        not (root / "LICENSE").is_file()
        or "GNU GENERAL PUBLIC LICENSE" not in (root / "LICENSE").read_text("utf-8")[:200]
    ):
        yield "LICENSE: wanted the GPL, as the nodes import ComfyUI, which is under the GPL"
    if not project.get("description"):
        yield "description is missing"
    if not any(c.startswith("Operating System ::") for c in project.get("classifiers", [])):
        yield "classifiers: wanted one for the operating system"
    if project.get("dependencies"):
        yield f"dependencies: ComfyUI has all that the nodes need, got {project['dependencies']}"
    for key in ("PublisherId", "DisplayName", "Icon", "requires-comfyui"):
        if not comfy.get(key):
            yield f"[tool.comfy] {key} is missing"
    if not re.fullmatch(
        r"(?:[<>]=?|==|~=|!=)\d+\.\d+\.\d+(?:,(?:[<>]=?|==|~=|!=)\d+\.\d+\.\d+)*", comfy.get("requires-comfyui", "")
    ):
        yield f"requires-comfyui: wanted a version range such as >=0.30.0, got {comfy.get('requires-comfyui')!r}"


def icon_problems(icon: str, root: Path) -> Iterator[str]:
    path = root / icon.rpartition("/main/")[2]  # an address on GitHub, or a file of the tree
    if path.suffix not in ICON_TYPES or not path.is_file():
        yield f"Icon: wanted a {' or '.join(ICON_TYPES)} of this tree, got {icon!r}"
        return
    if path.suffix == ".svg":
        found = re.search(r'<svg[^>]*\bwidth="(\d+)"[^>]*\bheight="(\d+)"', path.read_text("utf-8"))
        size = tuple(map(int, found.groups())) if found else (0, 0)
    else:
        data = path.read_bytes()
        size = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if size[0] != size[1] or not 0 < size[0] <= ICON_SIZE[0]:
        yield f"Icon: wanted a square of at most {ICON_SIZE[0]} x {ICON_SIZE[1]} pixels, got {size[0]} x {size[1]}"


def code_problems(name: str, text: str) -> Iterator[str]:
    """What the registry forbids in published Python code: eval and exec, installing and downloading while running,
    hidden code.
    """
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > LONGEST_LINE:
            yield f"{name}:{number}: a line of {len(line)} characters"
    for token in tokenize.generate_tokens(io.StringIO(text).readline) if ";" in text else ():
        if token.type == tokenize.OP and token.string == ";":
            yield f"{name}:{token.start[0]}: two statements on one line"
    for node in ast.walk(ast.parse(text, name)):
        at = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BANNED_CALLS:
            yield f"{at}: {node.func.id}()"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            if node.attr in ("system", "popen") or node.attr.startswith(("exec", "spawn")):
                yield f"{at}: os.{node.attr}"
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            if module.split(".")[0] in BANNED_MODULES and module not in HARMLESS:
                yield f"{at}: import of {module}"


def node_ids(root: Path = ROOT) -> list[str]:
    """The ids of all nodes, as the source spells them."""
    return [
        name
        for path in sorted((root / "nodes").glob("*.py"))
        for name in re.findall(r'node_id="([^"]*)"', path.read_text("utf-8"))
    ]


def file_problems(names: list[str], root: Path) -> Iterator[str]:
    if stray := [name for name in names if name.startswith(NEVER)]:
        yield f".comfyignore lets through what is not for artists: {', '.join(stray[:5])}"
    for needed in (
        "__init__.py",
        "nodes/__init__.py",
        "asdm_core/__init__.py",
        "LICENSE",
        "README.md",
        "pyproject.toml",
    ):
        if needed not in names:
            yield f".comfyignore holds back {needed}"
    if missing := {
        name for name in git_files(root) if name.startswith(("web/", "locales/", "nodes/", "asdm_core/"))
    } - set(names):
        yield f".comfyignore holds back {', '.join(sorted(missing)[:5])}"
    weights = {Path(name).name for name in names if name.endswith(".safetensors")}
    ours = {path.name for path in (root / "models").rglob("*.safetensors")}
    for name in names:
        if re.fullmatch(r"workflows/[^/]*\.json", name):
            text = json.dumps(json.loads((root / name).read_text("utf-8")))
            if lacking := {file for file in ours - weights if file in text}:
                yield f"{name} needs {', '.join(sorted(lacking))}, which .comfyignore holds back"


def problems(root: Path = ROOT, publish: bool = False) -> list[str]:
    """All that the registry, or an artist after installing from it, would find fault with; empty when all is well.

    publish: require what may be missing until the first publishing, the address of the repository.
    """
    settings = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    project = settings["project"]
    comfy = settings.get("tool", {}).get("comfy", {})
    names = published(root)
    found = [
        *metadata_problems(project, comfy, root),
        *icon_problems(comfy.get("Icon", ""), root),
        *file_problems(names, root),
    ]
    if publish and not (project.get("urls", {}).get("Repository") and comfy.get("Icon", "").startswith("https://")):
        found.append(
            "the address of the repository is missing: python -m tools.registry --address "
            "https://github.com/OWNER/NAME, and commit that"
        )
    for name in names:
        if name.endswith(".py"):
            found += code_problems(name, (root / name).read_text("utf-8"))
    for node, count in Counter(node_ids(root)).items():
        if count > 1 or not re.fullmatch(rf"{PREFIX}[A-Z]\w*", node):
            found.append(f"node id {node}: wanted one node of that name, beginning with {PREFIX}")
    if (size := zip_size(root)) > MOST:
        found.append(f"the zip weighs {size / 2**20:.1f} MB, more than {MOST / 2**20:.0f} MB")
    return found


def zip_size(root: Path = ROOT) -> int:
    """Bytes of the published zip."""
    write_zip(buffer := io.BytesIO(), root)
    return buffer.tell()


# ---------------------------------------------------------------- the address


def addressed(text: str, address: str) -> str:
    """pyproject.toml with the address of the repository on GitHub in it, as the registry wants it for links and the
    icon.
    """
    address = address.rstrip("/")
    raw = address.replace("https://github.com/", "https://raw.githubusercontent.com/") + "/main/"
    urls = (
        f'[project.urls]\nRepository = "{address}"\nDocumentation = "{address}#readme"\n'
        f'"Bug Tracker" = "{address}/issues"\n\n'
    )
    return re.sub(r'(?m)^Icon = "', f'Icon = "{raw}', text.replace("[tool.comfy]\n", f"{urls}[tool.comfy]\n", 1))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zip", type=Path, help="also write the published zip to this file")
    parser.add_argument(
        "--address", help="first write this address (https://github.com/OWNER/NAME) into pyproject.toml"
    )
    parser.add_argument("--publish", action="store_true", help="the address of the repository must be known")
    options = parser.parse_args(arguments)
    if options.address:
        path = ROOT / "pyproject.toml"
        path.write_text(addressed(path.read_text("utf-8"), options.address), "utf-8")
    names = published()
    folders: Counter[str] = Counter()
    for name in names:
        folders[name.partition("/")[0] + ("/" if "/" in name else "")] += (ROOT / name).stat().st_size
    for folder, size in folders.most_common():
        print(f"{size / 2**20:8.2f} MB  {folder}")
    print(f"{len(names)} files, {zip_size() / 2**20:.1f} MB as zip")
    if options.zip:
        write_zip(options.zip)
    found = problems(publish=options.publish)
    for problem in found:
        print(f"problem: {problem}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
