"""The pack, the host and what is missing beside a list of packages, in one file for a machine without a network.

    python bootstrap.py bundle asdm.tar [--have torch,transformers,...] [--python 3.12] [--platform win_amd64]

On that machine: tar xf asdm.tar, then python card.py. Nothing is installed there; what is missing lies in packages/,
after the machine's own. What is left out, and why, is in bundle.json and in the report that card.py writes.
"""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import bootstrap
from tools.registry import ROOT, git_files

HAVE = "torch,transformers,safetensors,einops,aiohttp,Pillow,scipy,psutil"
# What the host imports to load and sample, and what bench/ and train/ import.
WANTED = (
    *("torch", "torchsde", "transformers", "tokenizers", "safetensors", "einops", "numpy", "scipy", "psutil", "Pillow"),
    *("aiohttp", "yarl", "pyyaml", "tqdm", "filelock", "requests", "pydantic", "typing-extensions", "packaging"),
    *("simpleeval", "blake3", "sqlalchemy", "alembic", "comfy-kitchen", "comfy-aimdo", "accelerate", "diffusers"),
)
# Imported by the host at start and used by nothing that runs here: media, and what is compiled for one torch alone.
REFUSING = ("av", "torchvision", "torchaudio")
ROOM = 14  # MB beside the pack
COMPILED = (".so", ".pyd", ".dll", ".cuh", ".h")
# Folders and files of the host that serve its web page or its tests, and text encoders of other model families.
NOT_OF_HOST = (
    "blueprints/,tests/,tests-unit/,script_examples/,.github/,.ci/,comfy_api_nodes/,custom_nodes/,"
    "input/,output/,models/,openapi.yaml,comfy/text_encoders/"
).split(",")
NOT_OF_PACK = (
    "tests/",
    "docs/",
    "web/",
    "locales/",
    "workflows/",
    "demo/",
    "tools/",
    "requirements/",
    "bench/results/",
)
PICTURES = (".png", ".jpg", ".svg")

METADATA = "Metadata-Version: 2.1\nName: {name}\nVersion: 0.0\n"
STAND_IN = '''"""Stands in for {name}, which is left out of this bundle: it can be imported, and refuses to be used."""

import importlib.abc
import importlib.machinery
import sys
import types

LEFT_OUT = "{name} is left out of this bundle, and {{}} of it is wanted. On a whole ComfyUI it is there."


class _Refusing(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _refusing(name)

    def __call__(cls, *args, **more):
        raise RuntimeError(LEFT_OUT.format(cls.__name__))


def _refusing(name):
    return _Refusing(name, (), {{}})


class _Module(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _refusing(name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.startswith("{name}."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


__path__ = []
sys.modules[__name__].__class__ = _Module
sys.meta_path.append(_Finder())
'''


# What is missing -------------------------------------------------------------------------------------


def marker_environment(python: str, platform: str) -> dict[str, str]:
    """The environment that requirements are read for. platform: a tag of wheels."""
    windows, mac = platform.startswith("win"), platform.startswith("macosx")
    return {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "win32" if windows else "darwin" if mac else "linux",
        "platform_system": "Windows" if windows else "Darwin" if mac else "Linux",
        "os_name": "nt" if windows else "posix",
        "platform_machine": "arm64" if "arm64" in platform else "aarch64" if "aarch64" in platform else "x86_64",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": "",
    }


def closure(names: Iterable[str], environment: dict[str, str]) -> set[str]:
    """Packages with all that they require, as the environment of this Python knows it. Unknown ones count alone."""
    found: set[str] = set()
    open_: list[str] = [canonicalize_name(name) for name in names]
    while open_:
        name = open_.pop()
        if name in found:
            continue
        found.add(name)
        try:
            requires = metadata.requires(name) or ()
        except metadata.PackageNotFoundError:
            continue
        for text in requires:
            wanted = Requirement(text)
            if wanted.marker is None or wanted.marker.evaluate(environment):
                open_.append(canonicalize_name(wanted.name))
    return found


def missing(have: Iterable[str], python: str, platform: str) -> list[str]:
    """Names of the packages to bring along, beside those that are there and what these require themselves."""
    environment = marker_environment(python, platform)
    there = closure(have, environment)
    # What torch brings for one kind of card is torch's own.
    wanted = {name for name in closure(WANTED, environment) if not name.startswith(("nvidia-", "cuda-"))}
    return sorted(wanted - there - {"torch", "triton", "sympy", "networkx", "setuptools"})


def wheels(names: list[str], python: str, platform: str, folder: Path) -> Iterator[Path]:
    """Download a wheel of each, in the versions of this environment."""
    tags = platforms(platform)
    for name in names:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
        command += ["--disable-pip-version-check", "--progress-bar", "off", "--python-version", python]
        command += [word for tag in tags for word in ("--platform", tag)]
        done = subprocess.run(
            [*command, f"{name}=={metadata.version(name)}"], capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        if done.returncode:
            raise bootstrap.SetupError(
                f"no wheel of {name} {metadata.version(name)} for Python {python} on {platform}: "
                f"{(done.stderr or done.stdout).strip().splitlines()[-1]}"
            )
    yield from sorted(folder.glob("*.whl"))


def platforms(tag: str) -> list[str]:
    """The tags that a machine of a tag takes: linux_x86_64 also takes what was made for older systems."""
    if not tag.startswith("linux_"):
        return [tag]
    machine = tag.removeprefix("linux_")
    return [*(f"manylinux_2_{n}_{machine}" for n in range(34, 4, -1)), f"manylinux2014_{machine}", tag]


def here() -> str:
    """The platform of this machine, as wheels name it."""
    import sysconfig

    return re.sub(r"[-.]", "_", sysconfig.get_platform())


# What goes in ----------------------------------------------------------------------------------------


def of_host(host: Path) -> dict[str, bytes]:
    """Files of the host, without what only its web page needs; of text encoders the code."""
    found = {}
    for path in sorted(host.rglob("*")):
        name = path.relative_to(host).as_posix()
        code = path.suffix == ".py" or name.startswith("comfy/sd1_tokenizer/")
        kept = code or path.suffix in (".json", ".txt", ".toml") or name == "LICENSE"
        out = name.startswith(tuple(NOT_OF_HOST)) and not (name.startswith("comfy/text_encoders/") and code)
        small = name.startswith("comfy/text_encoders/") and path.suffix == ".json" and "/" not in name[20:]
        if path.is_file() and "__pycache__" not in name and kept and (not out or small):
            found[f"host/{name}"] = path.read_bytes()
    return found


def of_pack() -> dict[str, bytes]:
    """Files of the pack: no tests, no pictures, none of the web page."""
    names = sorted(
        name
        for name in git_files(ROOT) | {name for name in git_files(ROOT, "--others", "--exclude-standard")}
        if not name.startswith((*NOT_OF_PACK, ".")) and not name.endswith(PICTURES) and (ROOT / name).is_file()
    )
    return {name: (ROOT / name).read_bytes() for name in names if name not in ("bootstrap.py", "Makefile")}


def of_wheel(path: Path, kernels: bool = True) -> dict[str, bytes]:
    """The files that installing a wheel would put into site-packages. kernels: with those of compiled code."""
    found = {}
    with zipfile.ZipFile(path) as wheel:
        for name in wheel.namelist():
            inner = re.sub(r"^[^/]*\.data/(purelib|platlib)/", "", name)
            if name.endswith("/") or ".data/" in inner or not kernels and inner.endswith(COMPILED):
                continue
            found[f"packages/{inner}"] = wheel.read(name)
    return found


def packed(files: dict[str, bytes]) -> bytes:
    """A compressed tar of files, the same for the same files. tar finds out the compression by itself."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz", preset=6) as tar:
        for name, data in sorted(files.items()):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mode = 0o644
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def bundle(host: Path, have: list[str], python: str, platform: str, room: float) -> tuple[dict[str, bytes], dict]:
    """All files, and what bundle.json says about them."""
    there = closure(have, marker_environment(python, platform))
    left_out = []
    beside = of_host(host)
    with tempfile.TemporaryDirectory() as folder:
        names = missing(have, python, platform)
        found = list(wheels([name for name in names if name not in REFUSING], python, platform, Path(folder)))
        size = sum(path.stat().st_size for path in found) / 2**20
        for path in found:
            bare = path.name.startswith("comfy_kitchen-") and size > room
            beside |= of_wheel(path, kernels=not bare)
            if bare:
                left_out.append(
                    "the compiled kernels of comfy-kitchen: its slow ways are taken, which concerns fp8 only"
                )
    for name in REFUSING:
        if name not in there:
            beside[f"packages/{name}.py"] = STAND_IN.format(name=name).encode()
            # Others ask for the version of what they can import.
            beside[f"packages/{name}-0.0.dist-info/METADATA"] = METADATA.format(name=name).encode()
            left_out.append(f"{name}: a small module of that name can be imported and refuses to be used")
    left_out.append("the host's web page and the tokenizers of text encoders other than CLIP")
    facts = {
        "python": python,
        "platform": platform,
        "have": sorted(have),
        "packages": names,
        "left_out": left_out,
        "beside_mb": round(len(packed(beside)) / 2**20, 2),
    }
    return beside | of_pack() | {"bundle.json": json.dumps(facts, indent=1).encode()}, facts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python bootstrap.py bundle", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT.tar")
    parser.add_argument("--have", default=HAVE, help="packages that are there, with what they require: %(default)s")
    parser.add_argument("--python", default=f"{sys.version_info[0]}.{sys.version_info[1]}", help="3.12, for example")
    parser.add_argument("--platform", default=here(), help="a tag of wheels: linux_x86_64, win_amd64; %(default)s")
    parser.add_argument(
        "--room", type=float, default=ROOM, help="MB beside the pack; what does not fit comes without compiled kernels"
    )
    options = parser.parse_args(arguments)
    have = [name.strip() for name in options.have.split(",") if name.strip()]
    if not re.fullmatch(r"3\.\d+", options.python):
        parser.error(f"--python: wanted 3.10, 3.11 and so on, got {options.python!r}")
    try:
        files, facts = bundle(bootstrap.ensure_managed_host(), have, options.python, options.platform, options.room)
    except bootstrap.SetupError as error:
        parser.exit(1, f"asdm: {error}\n")
    options.out.write_bytes(packed(files))
    print(f"packages: {', '.join(facts['packages']) or 'none'}")
    print(*(f"left out: {text}" for text in facts["left_out"]), sep="\n")
    print(f"{facts['beside_mb']} MB beside the pack, {options.out.stat().st_size / 2**20:.1f} MB in all: {options.out}")
    if facts["beside_mb"] > options.room:
        print(f"asdm: that is more than the {options.room:g} MB of --room", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
