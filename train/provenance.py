"""What files of an earlier call were made with: kept with them, and compared before they are used again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from asdm_core.tensor_file import read_header

MADE = "made"  # the key of these settings in a file's metadata


NETWORK = ("unet", "unet_ema", "scheduler")  # what a network is read from in a diffusers folder
ENCODERS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")  # and its encoders
_READ = (".safetensors", ".json", ".txt")


def fingerprint(path: Path) -> str:
    """Eight hexadecimal digits that are others for other contents of a file."""
    stat = path.stat()
    return _fingerprint(path.resolve(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _fingerprint(path: Path, _size: int, _changed: int) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as f:
        while part := f.read(1 << 24):
            found.update(part)
    return found.hexdigest()[:8]


def contents(path: str | Path, folders: Sequence[str] = ()) -> str:
    """The same of a file, or of the model files in a folder and in those of its subfolders that are named, wherever
    they lie. What is no path stands for itself ("random").
    """
    path = Path(path)
    if path.is_file():
        return fingerprint(path)
    if not path.is_dir():
        return str(path)
    return digest(
        [
            [folder, file.name, fingerprint(file)]
            for folder in ("", *folders)
            for file in sorted((path / folder).glob("*"))
            if file.is_file() and file.suffix in _READ
        ]
    )


def digest(value: object) -> str:
    """The same of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]


def named(path: Path) -> str:
    """Name of a product in the results, other for other contents: a file trained anew is measured anew."""
    return f"{path.stem}-{fingerprint(path)}"


def difference(old: Mapping, new: Mapping, prefix: str = "") -> str:
    """The first settings that differ, as text; empty where none do."""
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            if found := difference(a, b, f"{prefix}{key}."):
                return found
        elif a != b:
            return f"{prefix}{key} was {a!r} and is {b!r}"
    return ""


def same_folder(folder: Path, mine: Mapping) -> None:
    """Note in `folder`/settings.json what its files are made with. Raises ValueError where it says something else.

    Settings that are not in it yet are added: those of other callers, or older than the setting.
    """
    path = folder / "settings.json"
    its = json.loads(path.read_text()) if path.exists() else {}
    if changed := difference({key: its.get(key, value) for key, value in mine.items()}, mine):
        raise ValueError(f"{folder} holds what was made with other settings ({changed}); choose another folder")
    if not mine.keys() <= its.keys():
        path.write_text(json.dumps({**its, **mine}) + "\n")


def same_file(path: Path, mine: Mapping, remedy: str) -> None:
    """Raise ValueError where a safetensors file was made with other settings. remedy: what to do then.

    One that is older than a setting, or than all of them, says nothing of it.
    """
    its = json.loads(read_header(path).metadata.get(MADE, "{}"))
    if changed := difference(its, {key: value for key, value in mine.items() if key in its}):
        raise ValueError(f"{path} was made with other settings ({changed}); {remedy}")


def made(mine: Mapping) -> dict[str, str]:
    """Metadata of a safetensors file that was made with these settings."""
    return {"format": "pt", MADE: json.dumps(mine)}
