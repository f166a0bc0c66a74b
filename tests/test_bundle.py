"""The bundle for machines without a network: what goes in, what stands in, and what is said to be missing."""

import io
import subprocess
import sys
import tarfile
import zipfile

import pytest

import bootstrap
from tools import bundle


def test_what_is_there_and_what_it_requires_is_not_brought_along():
    environment = bundle.marker_environment("3.12", "linux_x86_64")
    have = bundle.HAVE.split(",")
    names = bundle.missing(have, "3.12", "linux_x86_64")
    assert {"comfy-aimdo", "comfy-kitchen", "torchsde", "diffusers"} <= set(names)
    assert not set(names) & bundle.closure(have, environment) and not set(names) & {"torch", "numpy", "pyyaml"}
    assert "numpy" in bundle.missing([], "3.12", "linux_x86_64")


def test_requirements_follow_the_platform():
    windows = bundle.closure(["tqdm"], bundle.marker_environment("3.12", "win_amd64"))
    assert "colorama" in windows and "colorama" not in bundle.closure(
        ["tqdm"], bundle.marker_environment("3.12", "linux_x86_64")
    )


STAND_IN = """
import av
from av.container import InputContainer
from av.video.reformatter import ColorRange
import av.subtitles.stream
def annotated(a: InputContainer) -> ColorRange: pass
for use in (lambda: av.open("file"), lambda: InputContainer(), lambda: ColorRange.JPEG()):
    try:
        use()
    except RuntimeError as error:
        assert "av is left out of this bundle" in str(error)
    else:
        raise SystemExit("it let itself be used")
print("refused")
"""


def test_what_stands_in_can_be_imported_and_refuses_to_be_used(tmp_path):
    (tmp_path / "av.py").write_text(bundle.STAND_IN.format(name="av"))
    done = subprocess.run([sys.executable, "-c", STAND_IN], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "refused", done.stderr


@pytest.fixture
def wheels(monkeypatch):
    """Wheels without a registry: each a module and a compiled file."""

    def wheels(names, python, platform, folder):
        for name in names:
            path = folder / f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
            with zipfile.ZipFile(path, "w") as wheel:
                wheel.writestr(f"{name}/__init__.py", "")
                wheel.writestr(f"{name}/kernel.so", bytes(100))
            yield path

    monkeypatch.setattr(bundle, "wheels", wheels)


@pytest.fixture
def host(tmp_path):
    for name in (
        "nodes.py",
        "comfy/sd.py",
        "comfy/text_encoders/t5.py",
        "comfy/text_encoders/t5/tokenizer.json",
        "input/a.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    return tmp_path


@pytest.mark.parametrize("room, kernels", [(100, True), (0, False)])
def test_kernels_come_along_where_there_is_room(wheels, host, room, kernels):
    files, facts = bundle.bundle(host, bundle.HAVE.split(","), "3.12", "linux_x86_64", room)
    assert ("packages/comfy-kitchen/kernel.so" in files) == kernels and "packages/comfy-aimdo/kernel.so" in files
    assert any("kernels" in text for text in facts["left_out"]) == (not kernels)


def test_the_bundle_has_the_host_without_its_page_and_the_pack_without_tests(wheels, host):
    files, facts = bundle.bundle(host, bundle.HAVE.split(","), "3.12", "linux_x86_64", 14)
    assert {"host/nodes.py", "host/comfy/text_encoders/t5.py", "card.py", "bench/unet.py", "train/__main__.py"} <= set(
        files
    )
    assert not [name for name in files if name.startswith(("tests/", "docs/", "host/input/")) or name.endswith(".png")]
    assert "host/comfy/text_encoders/t5/tokenizer.json" not in files
    assert b"Version" in files["packages/av-0.0.dist-info/METADATA"]
    assert "packages/av.py" in files and any(text.startswith("av: ") for text in facts["left_out"])
    with_av, _ = bundle.bundle(host, [*bundle.HAVE.split(","), "av"], "3.12", "linux_x86_64", 14)
    assert "packages/av.py" not in with_av


def test_a_tar_is_the_same_for_the_same_files():
    files = {"b": b"2", "a/c": b"1"}
    first = bundle.packed(files)
    assert first == bundle.packed(dict(reversed(files.items())))
    with tarfile.open(fileobj=io.BytesIO(first)) as tar:
        assert tar.getnames() == ["a/c", "b"]


def test_a_wheel_that_is_not_there_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(bootstrap.SetupError, match="no wheel of einops .* for Python 3.12 on win_amd64"):
        list(bundle.wheels(["einops"], "3.12", "win_amd64", tmp_path))
