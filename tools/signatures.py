"""Whether saved workflows survive: compares the nodes of this tree with those of an older version, each in a running
ComfyUI.

    python -m tools.signatures OLDER

OLDER is a folder with another version of the pack. Sets up what it needs as `make test` does. Ends with status 1, and
says why, when a node, an input, an output or a choice is gone, a type has changed, or an input came that old workflows
lack.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import bootstrap
from demo.server import PACK, Client, Server


def inputs(info: Mapping) -> dict[str, tuple[object, Mapping, bool]]:
    """Inputs of a node as the host tells them: {name: (type or choices, options, required)}, those behind a choice
    included.
    """
    found = {}

    def add(section: Mapping, required: bool, prefix: str = ""):
        for name, (kind, *options) in section.items():
            options = options[0] if options else {}
            found[prefix + name] = kind, options, required
            for choice in options.get("options", []):
                if isinstance(choice, dict):
                    for nested in choice["inputs"].values():
                        add(nested, False, f"{prefix}{name}={choice['key']}.")

    add(info["input"].get("required", {}), True)
    add(info["input"].get("optional", {}), False)
    return found


def choices(kind, options: Mapping) -> set[str]:
    """The choices of a combo. Names of files are not part of a signature: they are whatever lies in the folders."""
    listed = kind if isinstance(kind, list) else options.get("options", [])
    names = {choice["key"] if isinstance(choice, dict) else str(choice) for choice in listed}
    return {name for name in names if not name.endswith((".safetensors", ".ckpt", "/"))}


def breaks(older: Mapping, newer: Mapping) -> Iterator[str]:
    """What makes workflows of the older version fail: one line each. Both are {node: info of /object_info}."""
    for node, old in older.items():
        new = newer.get(node)
        if new is None:
            yield f"{node}: the node is gone"
            continue
        before, after = inputs(old), inputs(new)
        for name, (kind, options, _) in before.items():
            if name not in after:
                yield f"{node}: the input {name} is gone"
                continue
            now, now_options, _ = after[name]
            if isinstance(kind, str) and isinstance(now, str) and kind != now:
                yield f"{node}: the input {name} was {kind} and is {now}"
            elif gone := choices(kind, options) - choices(now, now_options):
                yield f"{node}: the input {name} lacks the choice {', '.join(sorted(gone))}"
        for name, (_, options, required) in after.items():
            if required and name not in before and "default" not in options:
                yield f"{node}: the new input {name} is required and has no default"
        if new["output"][: len(old["output"])] != old["output"]:
            yield f"{node}: the outputs were {old['output']} and are {new['output']}"


def nodes_of(pack: Path, host: Path, python: Path) -> dict[str, dict]:
    """{node: its info} of a folder with the pack, from a running ComfyUI."""
    with (
        tempfile.TemporaryDirectory() as base,
        Server(host, Path(base), flags=["--cpu", "--disable-api-nodes"], pack=pack, python=str(python)) as server,
    ):
        return {
            name: info
            for name, info in Client(server.url).object_info().items()
            if info["python_module"] == "custom_nodes.asdm"
        }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("older", type=Path, help="folder with the older version of the pack")
    options = parser.parse_args(arguments)
    host = bootstrap.host_path()
    python = bootstrap.ensure_environment(host)
    older, newer = (nodes_of(pack, host, python) for pack in (options.older.resolve(), PACK))
    print(f"{len(older)} nodes before, {len(newer)} now")
    found = list(breaks(older, newer))
    for line in found:
        print(f"breaks workflows: {line}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
