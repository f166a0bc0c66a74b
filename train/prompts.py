"""Captions as ComfyUI reads prompts (comfy/sd1_clip.py): emphasis in parentheses, and as many rows of tokens as it
takes.

What is trained on must be what will be met: the same tokens in the same rows, the same weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

WORD = 8  # a piece of fewer tokens is not parted between two rows
_EMBEDDING = re.compile(r"(?<=\s)embedding:")
_NESTED = 1.1  # the weight of a pair of parentheses without a number
STRONG = 10.0  # no one means a weight above this: it is a caption that has a number in parentheses, such as a year


class Token(NamedTuple):
    number: int
    weight: float = 1.0


Row = list[Token]  # with start, end and padding: as long as the text encoder takes


def emphasised(text: str, weight: float = 1.0) -> list[tuple[str, float]]:
    """The pieces of a prompt with their weights: (text) is 1.1 of what is around it, (text:1.3) is 1.3, whatever is
    around it; the backslash in \\( and \\) keeps them plain.
    """
    hidden = text.replace("\\)", "\0\1").replace("\\(", "\0\2")
    return [
        (piece.replace("\0\1", ")").replace("\0\2", "("), its_weight) for piece, its_weight in _weighed(hidden, weight)
    ]


def _weighed(text: str, weight: float) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for piece in _outermost(text):
        if not (len(piece) >= 2 and piece[0] == "(" and piece[-1] == ")"):
            found.append((piece, weight))
            continue
        inner, its_weight = piece[1:-1], weight * _NESTED
        colon = inner.rfind(":")
        if colon > 0:
            said = _number(inner[colon + 1 :])
            if said is not None:
                inner, its_weight = inner[:colon], said
        found += _weighed(inner, its_weight)
    return found


def _number(text: str) -> float | None:
    """A weight; None for words. The host takes "(Avengers: Infinity)" for one too, and makes no number of it."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _outermost(text: str) -> list[str]:
    """The text parted at its outermost parentheses. Whatever does not pair is left as the host leaves it."""
    found = []
    piece = ""
    depth = 0
    for letter in text:
        if letter == "(":
            if depth == 0 and piece:
                found.append(piece)
                piece = ""
            depth += 1
            piece += letter
        elif letter == ")":
            depth -= 1
            piece += letter
            if depth == 0:
                found.append(piece)
                piece = ""
        else:
            piece += letter
    return [*found, piece] if piece else found


class Tokeniser:
    """Prompts to rows of tokens. pad: the token that fills a row; None: the end token, as CLIP-L wants it.

    tokenizer: transformers' CLIPTokenizer. length: tokens of a row, start and end included. rows: the most of a prompt.
    """

    def __init__(self, tokenizer: Any, length: int, rows: int, pad: int | None = None):
        self.tokenizer = tokenizer
        self.length = length
        self.rows = rows
        self.start, self.end = tokenizer("")["input_ids"][:2]
        self.pad = self.end if pad is None else pad
        self.said: set[str] = set()

    def empty(self) -> Row:
        """The row of the empty prompt."""
        return self._filled([Token(self.start), Token(self.end)])

    def __call__(self, prompt: str) -> list[Row]:
        """(rows, length). What is longer than `rows` of them is cut, and that is said once."""
        pieces = []
        for text, weight in emphasised(prompt):
            first, *others = _EMBEDDING.split(text)
            if abs(weight) > STRONG:
                self._say("strong", f"{text!r} has weight {weight:g}, as ComfyUI reads it; \\( and \\) are plain")
            for word in filter(None, [first, *(f"embedding:{o}" for o in others)]):
                pieces.append([Token(t, weight) for t in self.tokenizer(word)["input_ids"][1:-1]])
        if "embedding:" in prompt:
            self._say("embedding:", "embeddings are not loaded in training: their names are read as words")
        found = self._rows(pieces)
        if len(found) > self.rows:
            self._say("long", f"cut after {self.rows * (self.length - 2)} tokens (encoders.rows)")
        return found[: self.rows]

    def _rows(self, pieces: Sequence[Row]) -> list[Row]:
        row = [Token(self.start)]
        found = [row]
        for piece in pieces:
            parted = len(piece) >= WORD or len(piece) > self.length - 2
            while piece:
                left = self.length - 1 - len(row)
                if len(piece) <= left:
                    row += piece
                    break
                if parted:
                    row += piece[:left]
                    piece = piece[left:]
                row += [Token(self.end)]
                if not parted:
                    row += [Token(self.pad)] * left
                row = [Token(self.start)]
                found.append(row)
        row.append(Token(self.end))
        self._filled(row)
        return found

    def _filled(self, row: Row) -> Row:
        row += [Token(self.pad)] * (self.length - len(row))
        return row

    def _say(self, what: str, text: str) -> None:
        if what not in self.said:
            self.said.add(what)
            print(f"captions: {text}", flush=True)
