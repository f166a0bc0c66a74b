"""Limits for child processes that a busy machine does not use up."""

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence

import psutil


def run_within(command: Sequence[str], cpu_seconds: float, quiet_seconds: float = 900, **options) -> tuple[str, str]:
    """Run a command until it ends, has used so many seconds of CPU time, or did nothing at all for so long on the wall.

    Returns how it ended ("ended with status 0"), and its output.
    """
    with tempfile.TemporaryFile() as output:
        process = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, **options)

        def status(seconds):
            with contextlib.suppress(psutil.TimeoutExpired):
                return process.wait(seconds)
            return None

        ended = wait_within(process, status, cpu_seconds, quiet_seconds)
        output.seek(0)
        return ended, output.read().decode("utf-8", "replace")


def wait_within(
    process: psutil.Process, status: Callable[[float], object], cpu_seconds: float, quiet_seconds: float = 900
) -> str:
    """How a process ended, or that it was stopped. status(seconds) waits so long; what it ended with, else None."""
    used = 0.0
    worked = time.monotonic()
    try:
        while True:
            if (found := status(1)) is not None:
                return f"ended with status {found}"
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
        while status(1) is None:
            pass


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
