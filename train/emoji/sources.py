"""Emoji graphics and names, fetched as npm packages into a cache folder.

The packages come through the npm client, so whatever registry it is set up with is used. Nothing
fetched is ever committed. Three graphics sets are the three styles; Unicode names and keywords come
from the CLDR tables of emojibase.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

STYLES = ("noto", "twemoji", "openmoji")

# npm package, version, path of the graphics inside it ({code} is the code point in the set's own spelling)
PACKAGES = {
    "noto": ("@svgmoji/noto", "3.2.0", "package/sprites/all.svg"),
    "twemoji": ("@twemoji/svg", "15.0.0", "package/{code}.svg"),
    "openmoji": ("openmoji", "17.0.0", "package/color/svg/{code}.svg"),
    "names": ("emojibase-data", "17.0.0", "package/en/data.json"),
}


@dataclass(frozen=True)
class Concept:
    """One emoji: `code` is its hexadecimal code point, `name` and `tags` are its CLDR name and keywords."""

    code: str
    name: str
    tags: tuple[str, ...]
    group: str


def read_groups() -> dict[str, list[str]]:
    """The chosen emoji by group, as code points; from concepts.txt."""
    groups = {}
    for line in (Path(__file__).parent / "concepts.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            group, emoji = line.split(":")
            groups[group] = [f"{ord(e):X}" for e in emoji.split()]
    return groups


def fetch(what: str, cache: Path) -> Path:
    """The package archive of one of PACKAGES, downloaded into `cache` if it is not there."""
    name, version, _ = PACKAGES[what]
    archive = cache / f"{name.replace('@', '').replace('/', '-')}-{version}.tgz"
    if not archive.exists():
        if shutil.which("npm") is None:
            raise ValueError(
                f"npm is needed to fetch {name}@{version} and was not found; install Node.js, "
                f"or put the package archive at {archive}"
            )
        cache.mkdir(parents=True, exist_ok=True)
        print(f"fetching {name}@{version}")
        done = subprocess.run(
            ["npm", "pack", "--silent", f"{name}@{version}"], cwd=cache, text=True, capture_output=True
        )
        if done.returncode or not archive.exists():
            raise ValueError(f"npm could not fetch {name}@{version}: {done.stderr.strip()[-500:]}")
    return archive


def read_concepts(cache: Path) -> list[Concept]:
    """All chosen concepts, in the order of concepts.txt."""
    with tarfile.open(fetch("names", cache)) as tar:
        table = json.loads(_member(tar, PACKAGES["names"][2]))
    entries = {e["hexcode"].replace("-FE0F", ""): e for e in table}
    return [
        Concept(code, plain(entries[code]["label"]), tuple(plain(t) for t in entries[code].get("tags", ())), group)
        for group, codes in read_groups().items()
        for code in codes
    ]


def plain(text: str) -> str:
    """Lower case, letters, digits and single spaces only: what the captions are made of."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower().replace("’", "").replace("ñ", "n")).strip()


def read_graphics(style: str, codes: list[str], cache: Path) -> dict[str, str]:
    """SVG text of each code point in one style. Raises ValueError for a glyph the set lacks."""
    member = PACKAGES[style][2]
    with tarfile.open(fetch(style, cache)) as tar:
        if "{code}" not in member:
            found = _split_sprite(_member(tar, member).decode())
        else:
            paths = {
                Path(n).stem.upper().replace("-FE0F", ""): n
                for n in tar.getnames()
                if Path(n).parent == Path(member).parent and n.endswith(".svg")
            }
            found = {code: _member(tar, paths[code]).decode() for code in codes if code in paths}
    missing = [code for code in codes if code not in found]
    if missing:
        raise ValueError(f"{style} has no glyph for {', '.join(missing)}; take these out of concepts.txt")
    return {code: found[code] for code in codes}


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    """A file of an archive. Raises ValueError where there is none of this name."""
    file = tar.extractfile(name)
    if file is None:
        raise ValueError(f"the package archive has no file {name}")
    return file.read()


def _split_sprite(sprite: str) -> dict[str, str]:
    """The pictures of an SVG sprite, each a nested <svg id=code> of its own, as standalone documents."""
    pieces = {}
    depth = 0
    start = 0
    for tag in re.finditer(r"<svg\b[^>]*>|</svg>", sprite):
        if tag[0].startswith("</"):
            depth -= 1
            if depth == 1:
                head = sprite[start : sprite.index(">", start) + 1]
                code = re.search(r'\bid="([^"]+)"', head)
                if code:
                    body = sprite[start : tag.end()]
                    if "xmlns:xlink" not in head:
                        body = body.replace("<svg", '<svg xmlns:xlink="http://www.w3.org/1999/xlink"', 1)
                    pieces[code[1].replace("-FE0F", "")] = body
        elif not tag[0].endswith("/>"):
            depth += 1
            if depth == 2:
                start = tag.start()
    return pieces
