#!/usr/bin/env python3
"""Proves the pack on this machine's graphics card, and writes one page about it: output/card/report.md.

    python card.py                  all parts, each at most 8 minutes; goes on where an earlier run stopped
    python card.py --fast           the short form, about 3 minutes
    python card.py --part NAME      one part again (--list names them); the report keeps the others
    python card.py bench NAME ...   a benchmark, where bench/ is there
    python card.py train RECIPE ... a training
    python card.py core match ...   asdm's command line (python -m asdm_core)

Takes the ComfyUI that is there (COMFYUI_PATH, or the one this folder lies in) with the Python that runs this, and
changes nothing in it. Portable ComfyUI: python_embeded\\python.exe -s card.py
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
from pathlib import Path


def _folder() -> Path:
    """Where this lies, by the path it was called by: a linked pack belongs to the ComfyUI of the link."""
    folder = Path(os.path.abspath(__file__)).parent
    here = Path(os.environ.get("PWD") or folder)  # the shell's: what the system tells has no links in it
    return here if here.is_absolute() and here.is_dir() and here.samefile(folder) else folder


ROOT = _folder()
# The embedded Python of portable ComfyUI does not look beside a script. Packages of a bundle come after the machine's.
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]
sys.path += [str(ROOT / "packages")] if (ROOT / "packages").is_dir() else []
REPORT = ROOT / "output" / "card"


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] in (["bench"], ["train"], ["core"]):
        return hand_over(*arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="the short form")
    parser.add_argument("--part", action="append", metavar="NAME", help="only this part, anew; may be given again")
    parser.add_argument("--again", action="store_true", help="forget what earlier runs found")
    parser.add_argument("--list", action="store_true", help="name the parts and run none")
    parser.add_argument("--to", type=Path, default=REPORT, help="folder of the report")
    options = parser.parse_args(arguments)
    try:
        comfyui = found_host()
    except ValueError as error:
        return told(str(error))
    if comfyui is None:
        return by_bootstrap(arguments)
    return check(comfyui, options, parser)


def told(text: str) -> int:
    print(f"asdm: {text}", file=sys.stderr)
    return 2


def found_host() -> Path | None:
    from card import host

    return host.find()


def by_bootstrap(arguments: list[str]) -> int:
    """Without a ComfyUI in sight: the managed one of a checkout, which comes back here with COMFYUI_PATH set."""
    if not (ROOT / "bootstrap.py").is_file():
        return told("no ComfyUI found. Set COMFYUI_PATH to its folder, and run this with the Python that runs it.")
    import shlex

    import bootstrap

    return bootstrap.main(["card", f"ARGS={shlex.join(arguments)}"] if arguments else ["card"])


def check(comfyui: Path, options, parser) -> int:
    """Run the parts that are wanted and still open, and write the report after each."""
    try:
        import torch
    except ImportError:
        return told(f"this Python ({Path(sys.executable).name}) has no torch; run card.py with ComfyUI's own Python.")
    from datetime import date

    from card import host, parts, report

    # A card that torch drives otherwise (MPS, XPU) is not taken: it is not measured right by what is here.
    card = host.card()
    wanted = parts.parts(card, options.fast)
    names = [part.name for part in wanted]
    if options.list:
        print(*names, sep="\n")
        return 0
    if unknown := set(options.part or ()) - set(names):
        parser.error(f"there is no part {min(unknown)}; there are: {', '.join(names)}")
    found = {
        "machine": host.machine(),
        "card": card,
        "versions": host.versions(comfyui),
        "form": "fast" if options.fast else "whole",
        "date": date.today().isoformat(),
        "left_out": left_out(),
        "parts": {},
    }
    if not options.again:
        found["parts"] = earlier(options.to / "report.json", found)
    for name in names:
        found["parts"].setdefault(name, {"state": "open", "rows": {}})
    found["parts"] = {name: found["parts"][name] for name in names}
    del torch
    report.write(found, options.to)
    with parts.workplace() as base:
        for part in wanted:
            kept = found["parts"][part.name]
            # What failed is run again: the person may have mended it, and a report that stays red tells nothing.
            again = [name for name, row in kept["rows"].items() if report.failed(row)]
            if part.name not in options.part if options.part else kept["state"] == "done" and not again:
                continue
            for name in list(kept["rows"]) if options.part else again:
                del kept["rows"][name]
            kept |= {"state": "unfinished", "why": "stopped; the same command goes on"}
            if part.lacks:
                kept |= {"state": "skipped", "why": part.lacks}
            else:
                kept |= run(part, comfyui, Path(base), kept["rows"], lambda: report.keep(found, options.to))
            print(f"asdm: {part.name}: {state(kept)}", flush=True)
            report.write(found, options.to)
    print(f"asdm: {found['sentence']}\nasdm: wrote {shown(options.to / 'report.md')}", flush=True)
    return 1 if report.failures(found) else 0


def run(part, comfyui: Path, base: Path, rows: dict, keep) -> dict:
    """Run a part, after what it compares with; returns its state."""
    from card import parts

    def say(text: str) -> None:
        print(f"asdm: {text[:110]}", flush=True)

    if part.compares and not (base / "reference.safetensors").exists():
        settings = {"dtype": "fp32"} | {k: v for k, v in part.settings.items() if k in ("networks", "runs", "only")}
        flags = ("--cpu", "--use-pytorch-cross-attention", parts.TYPES["fp32"])
        made = parts.run(parts.Part("reference", "reference", flags, settings), comfyui, base, {}, lambda: None, say)
        if made["state"] != "done":
            return made | {"why": f"the runs on the CPU to compare with: {made['why']}"}
    return {"why": ""} | parts.run(part, comfyui, base, rows, keep, say)


def state(kept: dict) -> str:
    checks = [row for row in kept["rows"].values() if row["kind"] == "check"]
    failed = sum(not row["passed"] for row in checks)
    said = f"{kept['state']}" + (f" ({kept['why']})" if kept.get("why") else "")
    return said + (f", {len(checks) - failed} of {len(checks)} checks passed" if checks else "")


def earlier(path: Path, found: dict) -> dict:
    """The parts of an earlier report of the same machine, versions and form."""
    try:
        old = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    same = all(old.get(key) == found[key] for key in ("machine", "card", "versions", "form"))
    if not same:
        print("asdm: the report that is there is of another machine, version or form; it is made anew", flush=True)
    return old["parts"] if same else {}


def left_out() -> list[str]:
    """What a bundle came without; nothing elsewhere."""
    about = ROOT / "bundle.json"
    return json.loads(about.read_text("utf-8"))["left_out"] if about.is_file() else []


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def hand_over(what: str, name: str = "", *arguments: str) -> int:
    """Run a benchmark, a training or the command line of the pack with the ComfyUI that is there."""
    module = {"bench": f"bench.{name}", "train": "train", "core": "asdm_core"}[what]
    if what == "core":
        sys.argv = ["asdm", *([name] if name else []), *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return 0
    comfyui = found_host()
    if not name or not (ROOT / what).is_dir() or what == "bench" and not (ROOT / "bench" / f"{name}.py").is_file():
        return told(f"wanted: card.py bench NAME or card.py train RECIPE; there is no {what} {name} in this folder.")
    if comfyui is not None:
        os.environ["COMFYUI_PATH"] = str(comfyui)
    sys.argv = [module, *([name] if what == "train" else []), *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
