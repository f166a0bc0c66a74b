"""Captions of pictures: text files beside them, or a table in their folder; read as people's programs write them."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
CAPTIONS = (".txt", ".caption")
TABLES = ("metadata.jsonl", "metadata.csv")
FILE_COLUMNS = ("file_name", "filename", "file", "image", "path")
TEXT_COLUMNS = ("text", "caption", "captions", "prompt")
WANTED = (
    f"{' or '.join(TABLES)} with file_name and text, or pictures ({', '.join(SUFFIXES)}) with "
    f"{' or '.join(CAPTIONS)} files beside them"
)

Captioned = tuple[Path, list[str]]


def decode(data: bytes, name: object) -> str:
    """A text that is UTF-8, with or without a mark of byte order, or UTF-16 with one. Raises ValueError."""
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{name}: not UTF-8 (byte {e.start}); save it as UTF-8") from None
    if "\0" in text:  # UTF-16 without its mark, or no text at all
        raise ValueError(f"{name}: not UTF-8 (a zero, character {text.index(chr(0)) + 1}); save it as UTF-8")
    return text


def read_text(path: Path) -> str:
    """As `decode`, of a file. Raises OSError where it cannot be read."""
    return decode(path.read_bytes(), path)


def texts_of(caption: object, name: object) -> list[str]:
    """The captions of a picture from a text or a list of them. Raises ValueError for anything else, and for none."""
    found: list[Any] = caption if isinstance(caption, list) else [caption]
    if not all(isinstance(text, str) for text in found):
        raise ValueError(f"{name}: wanted a text or a list of texts as caption, got {caption!r:.80}")
    if kept := [text.strip() for text in found if text.strip()]:
        return kept
    raise ValueError(f"{name}: has no caption")


def captioned(folder: Path) -> list[Captioned]:
    """The pictures of a folder with the captions of each, in a fixed order; those without one are counted and said.

    Raises ValueError where there are none, and for tables and texts that cannot be taken as they stand.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; wanted one with {WANTED}")
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    pictures = [p for p in files if p.suffix.lower() in SUFFIXES]
    tables = {p.name.lower(): p for p in files if p.parent == folder}
    table = next((tables[name] for name in TABLES if name in tables), None)
    found: dict[Path, list[str]] = {}
    missing = []
    for path, given in _table(table) if table else _beside(pictures, files):
        if table and not path.is_file():
            missing.append(path)
        elif kept := [text.strip() for text in given if text.strip()]:
            found.setdefault(path, []).extend(kept)
    without = [p for p in pictures if p not in found]
    _say(folder, without, "have no caption and are left out" if found else "have no caption")
    _say(folder, missing, f"of {table.name if table else ''} are not there and are left out")
    if not found:
        raise ValueError(f"{folder}: no pictures with captions; wanted {WANTED}")
    return sorted(found.items())


def say_unreadable(pictures: Sequence[Captioned], folder: Path, threads: int = 8) -> None:
    """Look at the head of every picture, and say how many cannot be read: whoever draws one takes the next instead."""

    def broken(path: Path) -> bool:
        try:
            with Image.open(path):
                return False
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return True

    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(broken, (path for path, _ in pictures))
        _say(folder, [path for (path, _), bad in zip(pictures, found, strict=True) if bad], "cannot be read")


def _say(folder: Path, paths: Sequence[Path], what: str) -> None:
    if paths:
        first = paths[0].relative_to(folder) if paths[0].is_relative_to(folder) else paths[0]
        print(f"{folder}: {len(paths)} pictures {what}, the first is {first}", flush=True)


def _beside(pictures: Sequence[Path], files: Sequence[Path]) -> Iterator[Captioned]:
    """Pictures with the text files beside them, whatever case their names are in."""
    texts = {(p.parent, p.stem, p.suffix.lower()): p for p in files if p.suffix.lower() in CAPTIONS}
    folded = {(parent, stem.casefold(), suffix): p for (parent, stem, suffix), p in texts.items()}
    undecoded = []
    for picture in pictures:
        for suffix in CAPTIONS:
            exact = texts.get((picture.parent, picture.stem, suffix))
            path = exact or folded.get((picture.parent, picture.stem.casefold(), suffix))
            if path is not None:
                try:
                    yield picture, [read_text(path)]
                except ValueError as e:
                    undecoded.append(str(e))
                break
    if undecoded:
        more = f", and {len(undecoded) - 1} more" if len(undecoded) > 1 else ""
        raise ValueError(f"{undecoded[0]}{more}")


def _table(path: Path) -> Iterator[Captioned]:
    """Rows of metadata.jsonl or metadata.csv. Rows that name the same picture give it several captions."""
    rows = _json_lines(path) if path.suffix.lower() == ".jsonl" else _sheet(path)
    for where, row in rows:
        file = next((row[c] for c in FILE_COLUMNS if c in row), None)
        column = next((c for c in TEXT_COLUMNS if c in row), None)
        if not file or not isinstance(file, str) or column is None or row[column] is None:
            raise ValueError(f"{where} of its metadata has no file_name or no text, got {row!r:.200}")
        given: list[Any] = row[column] if isinstance(row[column], list) else [row[column]]
        if not all(isinstance(text, str) for text in given):
            raise ValueError(f"{where}: {column}: wanted a text or a list of texts, got {row[column]!r:.80}")
        yield path.parent / file, given


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for line, text in enumerate(read_text(path).split("\n"), 1):
        if not text.strip():
            continue
        number += 1
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path}, line {line}: not valid JSON ({e})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {line}: wanted an object with file_name and text, got {row!r:.80}")
        yield f"{path.parent}: entry {number}", row


def _sheet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a table whose columns are parted by commas, semicolons or tabs, as spreadsheets write them."""
    text = read_text(path)
    first, _, rest = text.partition("\n")
    if first.lower().startswith("sep=") and len(first.strip()) == 5:  # Excel's own first line
        delimiter = first.strip()[4]
        text = rest
    else:
        delimiter = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = [name.strip().lower() for name in next(reader, [])]
        if not set(columns) & set(FILE_COLUMNS) or not set(columns) & set(TEXT_COLUMNS):
            raise ValueError(f"{path}: wanted the columns file_name and text, got {', '.join(columns) or 'none'}")
        for number, row in enumerate(reader, 1):
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(columns):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(row)} columns, wanted {len(columns)}; a caption that holds "
                    f"{delimiter!r} must stand in quotes"
                )
            yield f"{path.parent}: entry {number}", dict(zip(columns, row, strict=True))
    except csv.Error as e:
        raise ValueError(f"{path}, line {reader.line_num}: cannot be read as a table ({e})") from None
