"""Host processes that begin with ComfyUI imported: forks of one that did it (see runner.py)."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from tests.host.limits import run_within, wait_within

RUNNER, SCRIPTS = (Path(__file__).with_name(name) for name in ("runner.py", "scripts"))
IMPORT = 120  # seconds of CPU time, at the most


class Forks:
    """Runs calls in a host, with these arguments of ComfyUI, until it is closed."""

    def __init__(self, host: Path, arguments: list[str]):
        self.command = [sys.executable, str(RUNNER), str(host)]
        self.arguments = arguments
        self.environment = dict(os.environ, PYTHONUNBUFFERED="1")
        self.parent: subprocess.Popen | None = None
        self.log = tempfile.TemporaryFile()

    def call(self, folder: Path, script: str, function: str = "main", *args, cpu_seconds: float = 900, **kwargs):
        """What a function of a script (tests/host/scripts) returns; a folder for the call and the host's files."""
        call, result, base = folder / "call.json", folder / "result.json", folder / "base"
        result.unlink(missing_ok=True)
        path = SCRIPTS / script
        call.write_text(json.dumps({"script": str(path), "function": function, "args": args, "kwargs": kwargs}))
        for name in ("input", "output", "models", "custom_nodes", "user"):
            (base / name).mkdir(parents=True, exist_ok=True)
        ended, output = self.run(call, result, base, cpu_seconds)
        if ended != "ended with status 0" or not result.exists():
            pytest.fail(f"{script}:{function} {ended} in the host:\n{output[-8000:]}", pytrace=False)
        return json.loads(result.read_text())

    def run(self, call: Path, result: Path, base: Path, cpu_seconds: float) -> tuple[str, str]:
        """How the process ended, and its output. Where the system can fork, no limit holds the import of ComfyUI."""
        if not hasattr(os, "fork"):
            command = [*self.command, str(call), str(result), *self.arguments, "--base-directory", str(base)]
            return run_within(command, cpu_seconds=IMPORT + cpu_seconds, cwd=base, env=self.environment)
        output, status = base.parent / "output.log", base.parent / "status"
        status.unlink(missing_ok=True)
        asked = {"call": call, "result": result, "base": base, "output": output, "status": status}
        process = psutil.Process(self._fork({key: str(path) for key, path in asked.items()}))

        def ended(seconds):
            until = time.monotonic() + seconds
            while not status.exists() and time.monotonic() < until:
                time.sleep(0.02)
            return status.read_text() if status.exists() else None

        return wait_within(process, ended, cpu_seconds), output.read_text("utf-8", "replace")

    def _fork(self, request: dict[str, str]) -> int:
        """The number of the process that does what is asked."""
        if not self.parent:
            self.parent = subprocess.Popen(
                [*self.command, "-", *self.arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
                text=True,
                env=self.environment,
            )
        asked, answers = self.parent.stdin, self.parent.stdout
        assert asked and answers
        asked.write(json.dumps(request) + "\n")
        asked.flush()
        while line := answers.readline():
            if line.startswith("pid "):
                return int(line.removeprefix("pid "))
        self.log.seek(0)
        raise RuntimeError(f"ComfyUI could not be imported:\n{self.log.read().decode('utf-8', 'replace')[-8000:]}")

    def close(self) -> None:
        if self.parent:
            self.parent.communicate()  # the end of what it reads is its end
        self.log.close()
