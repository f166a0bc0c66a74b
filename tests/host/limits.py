"""Limits for child processes that a busy machine does not use up."""

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Sequence

import psutil


def run_within(command: Sequence[str], cpu_seconds: float, quiet_seconds: float = 900, **options) -> tuple[str, str]:
    """Run a command until it ends, has used so many seconds of CPU time, or did nothing at all for so long on the wall.

    Returns how it ended ("ended with status 0"), and its output.
    """
    with tempfile.TemporaryFile() as output:
        process = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, **options)
        ended = _wait(process, cpu_seconds, quiet_seconds)
        output.seek(0)
        return ended, output.read().decode("utf-8", "replace")


def _wait(process: psutil.Process, cpu_seconds: float, quiet_seconds: float) -> str:
    used = 0.0
    worked = time.monotonic()
    try:
        while True:
            with contextlib.suppress(psutil.TimeoutExpired):
                return f"ended with status {process.wait(1)}"
            now = _cpu_seconds(process)
            if now > used + 0.1:
                used = now
                worked = time.monotonic()
            if used > cpu_seconds:
                return f"was stopped after {used:.0f} s of CPU time"
            if time.monotonic() - worked > quiet_seconds:
                return f"was stopped after {quiet_seconds:.0f} s in which it did nothing"
    finally:
        for one in _family(process):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()


def _family(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [*process.children(recursive=True), process]
    return []


def _cpu_seconds(process: psutil.Process) -> float:
    """Of a process and of all that it started, the ended ones it waited for included."""
    total = 0.0
    for one in _family(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(one.cpu_times()[:4])
    return total
