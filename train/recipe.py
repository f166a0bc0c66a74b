"""Reading recipes: TOML, and `--set key=value`.

A recipe may begin with `extends = "other.toml"` and then only says what differs. Unknown keys and
values of the wrong type are errors.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from .config import Config

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    try:
        import tomli as tomllib
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "recipes are TOML, which Python 3.10 cannot read by itself: pip install tomli"
        ) from None


def load(path: str | Path, changes: Iterable[str] = ()) -> Config:
    """A recipe with `key=value` changes, keys dotted, values TOML or plain text. Raises ValueError."""
    path = Path(path)
    data = _read(path)
    data.setdefault("name", path.stem)
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"--set {change}: wanted key=value, such as optimiser.lr=1e-4")
        _put(data, key.strip(), _value(text.strip()))
    return _build(Config, data, path.name)


def _read(path: Path, heirs: tuple[Path, ...] = ()) -> dict:
    """The table of a recipe on top of those it extends. heirs: the recipes that led here."""
    heirs = (*heirs, path.resolve())
    if heirs[-1] in heirs[:-1]:
        raise ValueError(f"{path}: a recipe cannot extend itself ({' -> '.join(p.name for p in heirs)})")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8; save the recipe as UTF-8") from None
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise ValueError(f"{path}: not valid TOML ({e})") from None
    parent = data.pop("extends", None)
    if parent is None:
        return data
    if not isinstance(parent, str):
        raise ValueError(f"{path}: extends: wanted the name of another recipe, got {parent!r}")
    base = _read(path.parent / parent, heirs)
    base.pop("name", None)  # a recipe is named after its own file
    return _merged(base, data)


def _merged(base: dict, data: Mapping) -> dict:
    return base | {
        k: _merged(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v for k, v in data.items()
    }


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text  # a path or a name needs no quotes


def _put(data: dict, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise ValueError(f"--set {key}: {section} is no section")
    data[name] = value


def _build(cls: type, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: wanted a section with keys, got {data!r}")
    hints = get_type_hints(cls)
    for key in data:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 1, 0.5)
            raise ValueError(
                f"{where}: unknown key {key!r}"
                + (f"; did you mean {near[0]!r}?" if near else "")
                + f" Known are {', '.join(hints)}"
            )
    return cls(**{key: _typed(hints[key], value, f"{where}: {key}") for key, value in data.items()})


def _typed(hint: Any, value: Any, where: str) -> Any:
    """The value as the field's type; whole numbers pass for others, nothing else is converted."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if get_origin(hint) in (Union, types.UnionType):
        hint = get_args(hint)[0]
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        if kinds[1:] == (Ellipsis,) and isinstance(value, list):
            return tuple(_typed(kinds[0], v, where) for v in value)
        if not isinstance(value, list) or len(value) != len(kinds):
            raise ValueError(f"{where}: wanted a list of {len(kinds)}, got {value!r}")
        return tuple(_typed(k, v, where) for k, v in zip(kinds, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{where}: this number is too large") from None
    if not isinstance(value, hint) or hint is not bool and isinstance(value, bool):
        raise ValueError(f"{where}: wanted {_TYPES[hint]}, got {value!r}")
    return value


_TYPES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", dict: "a table"}
