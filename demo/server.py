"""A real ComfyUI in a child process, and a client for its HTTP interface.

Shared by the demo, `make serve` and the host tests.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from card.host import device_flags  # noqa: F401  for those who start a Server

PACK = Path(__file__).resolve().parent.parent
LAUNCHER = Path(__file__).resolve().with_name("launcher.py")
WINDOWS = os.name == "nt"

START_TIMEOUT = 900  # a cold disk and a slow or busy machine; the host needs about 10 s
STOP_TIMEOUT = 10


class ServerError(RuntimeError):
    """The host did not start, or is gone."""


class PromptError(RuntimeError):
    """A graph was refused, or a node of it failed."""


class PromptInterrupted(PromptError):
    """A run was interrupted."""


def free_port(preferred: int = 0) -> int:
    """The preferred port if nobody listens there, else any free one. Raises ServerError for what is no port."""
    if not 0 <= preferred < 2**16:
        raise ServerError(f"a port is a number from 0 to {2**16 - 1}, got {preferred}")
    for port in (preferred, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            # As the host's own server binds it. On POSIX this passes over connections of an earlier server that are
            # closing still; on Windows it would pass over a server that listens.
            if not WINDOWS:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if port and listens(port):
                continue
            probe.bind(("127.0.0.1", port))
            return probe.getsockname()[1]
    raise ServerError("no free port on 127.0.0.1")


def listens(port: int) -> bool:
    """Whether somebody answers at a port of this machine, also where he listens at all of its addresses."""
    with socket.socket() as visitor:
        visitor.settimeout(1)
        return visitor.connect_ex(("127.0.0.1", port)) == 0


def link_folder(link: Path, target: Path) -> None:
    """Make ``link`` show a folder. A junction on Windows, where symbolic links need special rights."""
    if link.exists() and link.samefile(target):
        return
    if os.path.islink(link):
        link.unlink()
    elif os.path.lexists(link):
        os.rmdir(link)  # a dead junction; refuses a real folder with files in it
    link.parent.mkdir(parents=True, exist_ok=True)
    if WINDOWS:
        import _winapi

        _winapi.CreateJunction(str(target), str(link))  # type: ignore[attr-defined]
    else:
        link.symlink_to(target, target_is_directory=True)


def model_folders(folder: Path) -> dict[str, list[Path]]:
    """The model folders of a ComfyUI, by kind: {"checkpoints": [...], ...}."""
    if not folder.is_dir():
        return {}
    return {path.name: [path] for path in sorted(folder.iterdir()) if path.is_dir()}


def write_model_paths(file: Path, folders: Mapping[str, Iterable[Path]]) -> None:
    """Write the YAML with which the host finds models in further folders."""

    def text(value: str) -> str:
        # JSON strings are YAML strings, but for letters that JSON would write as two halves.
        return json.dumps(value, ensure_ascii=False)

    # The host splits at line ends.
    lines = [f"  {text(kind)}: {text(chr(10).join(map(str, paths)))}" for kind, paths in folders.items()]
    file.write_text("asdm:\n" + "\n".join(lines) + "\n", "utf-8")


class Server:
    """A ComfyUI process with this pack as its only custom node pack, as a context manager.

    host: folder of the ComfyUI to run; nothing in it is changed.
    base: folder for its inputs, outputs, models and settings.
    flags: further arguments of ComfyUI's main.py, such as "--cpu".
    models: further model folders by kind.
    python: interpreter with the host's requirements.
    pack: folder to link as custom_nodes/asdm; None where base has one already, installed or disabled.
    waiting: called again and again while the host starts.
    """

    def __init__(
        self,
        host: Path,
        base: Path,
        *,
        flags: Iterable[str] = (),
        models: Mapping[str, Iterable[Path]] | None = None,
        port: int = 0,
        python: str = sys.executable,
        pack: Path | None = PACK,
        waiting: Callable[[Server], None] | None = None,
    ):
        self.host = Path(host)
        self.base = Path(base).resolve()
        self.flags = tuple(flags)
        self.models = dict(models or {})
        self.port = port
        self.python = python
        self.pack = pack
        self.waiting = waiting
        self.log_file = self.base / "comfyui.log"
        self._process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log(self, lines: int = 40) -> str:
        """The end of what the host printed."""
        with contextlib.suppress(FileNotFoundError):
            return "\n".join(self.log_file.read_text("utf-8", errors="replace").splitlines()[-lines:])
        return ""

    def command(self) -> list[str]:
        command = [self.python, str(LAUNCHER), str(self.host)]
        command += ["--listen", "127.0.0.1", "--port", str(self.port), "--disable-auto-launch"]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        command += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", "asdm"]
        command += ["--use-pytorch-cross-attention", *self.flags]
        if self.models:
            command += ["--extra-model-paths-config", str(self.base / "model_paths.yaml")]
        return command

    def start(self) -> Server:
        """Start the host and wait until it answers."""
        for name in ("input", "output", "models", "user"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        if self.pack:
            link_folder(self.base / "custom_nodes" / "asdm", self.pack)
        if self.models:
            write_model_paths(self.base / "model_paths.yaml", self.models)
        self.port = free_port(self.port)
        # A group of its own: Ctrl-C reaches us alone, and we stop the host in order.
        group: dict[str, Any] = {"start_new_session": True}
        if WINDOWS:
            group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}  # type: ignore[attr-defined]
        with open(self.log_file, "wb") as log:
            self._process = subprocess.Popen(
                self.command(), stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, cwd=self.base, **group
            )
        atexit.register(self.stop)
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self.stop()
            raise
        return self

    def _wait_until_ready(self, process: subprocess.Popen) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ServerError(f"ComfyUI ended with status {process.returncode} while starting:\n{self.log()}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/system_stats", timeout=5):
                return
            if self.waiting:
                self.waiting(self)
            time.sleep(0.1)
        raise ServerError(f"ComfyUI did not answer within {START_TIMEOUT} s:\n{self.log()}")

    def stop(self) -> None:
        """Stop the host. Does nothing when it is not running."""
        process, self._process = self._process, None
        if process is None:
            return
        atexit.unregister(self.stop)
        with contextlib.suppress(ProcessLookupError):
            self._signal(process, force=False)
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # What the host started itself, too.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                self._signal(process, force=True)
            process.wait()
            if process.stdin:
                process.stdin.close()

    @staticmethod
    def _signal(process: subprocess.Popen, force: bool) -> None:
        if WINDOWS:
            process.kill() if force else process.terminate()
        else:
            os.killpg(process.pid, signal.SIGKILL if force else signal.SIGTERM)

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()


class Client:
    """Talks to a ComfyUI over HTTP."""

    def __init__(self, url: str):
        self.url = url
        self.id = uuid.uuid4().hex

    def request(self, path: str, body: object = None, headers: Mapping[str, str] | None = None) -> bytes:
        """GET, or POST when there is a body: bytes as they are, anything else as JSON."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data=body, headers=dict(headers or {}))
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.read()

    def get(self, path: str) -> Any:
        """The JSON under a path."""
        return json.loads(self.request(path))

    def object_info(self, node: str | None = None) -> dict:
        """What the host knows about all nodes, or about one (KeyError if it has none of that name)."""
        return self.get(f"/object_info/{node}")[node] if node else self.get("/object_info")

    def choices(self, node: str, name: str) -> list[str]:
        """The options of a combo input of a node."""
        inputs = self.object_info(node)["input"]
        kind, *options = (inputs.get("required", {}) | inputs.get("optional", {}))[name]
        # Nodes of the older interface put the list itself in the place of the type.
        return kind if isinstance(kind, list) else options[0]["options"]

    def submit(self, graph: Mapping, workflow: Mapping | None = None) -> str:
        """Queue an API graph; returns the id of the run. PromptError when the host refuses it."""
        body = {"prompt": graph, "client_id": self.id}
        if workflow is not None:
            body["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
        try:
            return json.loads(self.request("/prompt", body))["prompt_id"]
        except urllib.error.HTTPError as error:
            raise PromptError(_refusal(json.loads(error.read()))) from None

    def history(self, prompt_id: str) -> dict | None:
        """The record of a finished run, None while it is queued or running."""
        return self.get(f"/history/{prompt_id}").get(prompt_id)

    def wait(self, prompt_id: str, timeout: float = 300) -> dict:
        """Wait for a run; returns {node id: its outputs}. PromptError when a node failed."""
        deadline = time.monotonic() + timeout
        while (record := self.history(prompt_id)) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the run {prompt_id} took longer than {timeout} s")
            time.sleep(0.05)
        return outputs_of(record)

    def run(self, graph: Mapping, timeout: float = 300) -> dict:
        """Queue an API graph and wait for it; returns {node id: its outputs}."""
        return self.wait(self.submit(graph), timeout)

    def fetch(self, image: Mapping[str, str]) -> bytes:
        """The file behind one entry of an output's "images", with its metadata."""
        names = {key: image.get(key, "") for key in ("filename", "subfolder", "type")}
        return self.request("/view?" + urllib.parse.urlencode(names))

    def upload(self, name: str, png: bytes) -> str:
        """Put an image into the host's input folder; returns its name for a LoadImage node."""
        boundary = uuid.uuid4().hex
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
        body = head.encode() + b"Content-Type: image/png\r\n\r\n" + png + f"\r\n--{boundary}--\r\n".encode()
        answer = self.request("/upload/image", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})
        return json.loads(answer)["name"]

    def interrupt(self) -> None:
        """Interrupt the run in progress."""
        self.request("/interrupt", {})

    def free(self) -> None:
        """Have the host unload all models and drop its execution cache before its next run."""
        self.request("/free", {"unload_models": True, "free_memory": True})


def outputs_of(record: Mapping) -> dict:
    """The outputs in a history record; PromptError when the run failed."""
    for kind, data in record["status"]["messages"]:
        if kind == "execution_interrupted":
            raise PromptInterrupted(f"interrupted in node {data['node_id']} ({data['node_type']})")
        if kind == "execution_error":
            message = (
                f"node {data['node_id']} ({data['node_type']}): {data['exception_type']}: {data['exception_message']}"
            )
            raise PromptError(message.strip())
    return record["outputs"]


def _refusal(details: Mapping) -> str:
    error = details["error"]
    lines = [f"{error['message']}: {error.get('details', '')}".rstrip(": ")]
    for node, said in (details.get("node_errors") or {}).items():
        for problem in said["errors"]:
            lines.append(f"node {node} ({said['class_type']}): {problem['message']}: {problem['details']}")
    return "\n".join(lines)
