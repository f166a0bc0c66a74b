"""Texts and JSON from other people's files: bounded, and safe to print and to draw."""

from __future__ import annotations

import json
from typing import Any

# A name, a description, and a whole message: longer than any that is meant for people.
NAME, TEXT, MESSAGE = 120, 300, 900
_DIGITS = 20  # of a whole number in JSON: 2**63 has 19


def printable(text: object, longest: int = NAME) -> str:
    """A text in one line without control or format characters (escaped) and of bounded length.

    What names in files hold could otherwise move a terminal's cursor, colour it, or forge a line of a log.
    """
    text = str(text)
    cut = len(text) > longest
    escaped = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: longest if cut else None]
    )
    if len(escaped) > longest or cut:
        return escaped[: longest - 3] + "..."
    return escaped


def read_json(text: str | bytes) -> Any:
    """What a JSON text says. Raises ValueError, also for what is nested too deep and for numbers of more than 20
    digits, which cost quadratic time.
    """
    try:
        return json.loads(text, parse_int=_whole)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _whole(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)
