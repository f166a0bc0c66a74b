"""What a script shows while it works, and how it ends where its input was wrong."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable


def plain_errors(main: Callable) -> Callable:
    """Let a script's main end in the message alone where its input was wrong."""

    @functools.wraps(main)
    def called(*arguments):
        try:
            return main(*arguments)
        except (ValueError, OSError) as e:
            raise SystemExit(str(e)) from None

    return called


class Progress:
    """One status line: rewritten on a terminal, printed now and then into a log."""

    def __init__(self, label: str, total: int | None = None):
        self.label = label
        self.total = total
        self.started = self.shown = time.monotonic()
        self.live = sys.stdout.isatty()
        self.line = ""

    def show(self, done: int, detail: str = "") -> None:
        now = time.monotonic()
        if self.total:
            filled = int(20 * done / self.total)
            bar = f"[{'#' * filled}{'.' * (20 - filled)}] {done}/{self.total}"
        else:
            bar = f"step {done}"
        self.line = f"{self.label} {bar} {detail}".rstrip()
        if now - self.shown > (0.2 if self.live else 20):
            print(f"\r{self.line:<100}" if self.live else self.line, end="" if self.live else "\n", flush=True)
            self.shown = now

    def end(self) -> None:
        print(
            f"\r{self.line:<100}" if self.live else f"{self.line} ({time.monotonic() - self.started:.0f} s)", flush=True
        )
