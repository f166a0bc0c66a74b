"""The parts of the check, and how one is run: in a process of its own, with the host's flags, for at most 8 minutes.

What a part has found arrives line by line and is kept at once, so a part that is stopped, or crashes, goes on where it
was when it is run again.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from . import host

MOST = 480  # seconds of a part
TYPES = {"fp32": "--fp32-unet", "bf16": "--bf16-unet", "fp16": "--fp16-unet"}
SIZES = {"sd15": (512, 768, 1024, 1536), "sdxl": (512, 768, 1024, 1536)}
NEEDS = {"sd15": 4, "sdxl": 8}  # GiB of the card, below which a full-size network is not worth a try
PACKS_GIB = 8  # that the packs of one family take on the disk


@dataclass(frozen=True)
class Part:
    """name: for --part. does: "correct", "compiled", "fast" or "reference". flags: of the host. settings: for what it
    does. lacks: why it cannot run here, or "". compares: it wants the latents of fp32 on the CPU.
    """

    name: str
    does: str
    flags: tuple[str, ...] = ()
    settings: dict = field(default_factory=dict)
    lacks: str = ""
    compares: bool = False


# Name -> flags, the Python package that it needs, and whether it needs a card.
MODES: dict[str, tuple[tuple[str, ...], str, bool]] = {
    "default memory": ((), "", True),
    "no dynamic memory": (("--disable-dynamic-vram",), "", True),
    "lowvram": (("--lowvram", "--disable-dynamic-vram"), "", True),
    "novram": (("--novram",), "", True),
    "highvram": (("--highvram",), "", True),
    "fp8 weights": (("--fp8_e4m3fn-unet",), "", False),
    "pytorch attention": (("--use-pytorch-cross-attention",), "", False),
    "split attention": (("--use-split-cross-attention",), "", False),
    "sub-quadratic attention": (("--use-quad-cross-attention",), "", False),
    "xformers attention": ((), "xformers", True),
    "flash attention": (("--use-flash-attention",), "flash_attn", True),
    "sage attention": (("--use-sage-attention",), "sageattention", True),
}


# Without a card: one technique of each kind, and those that a kind of weights, or of attention, could spoil.
ONE_OF_EACH = ["M2", "GRI", "inheritance 'balanced'", "Speed Up 'close'", "switch to M2", "CondConv", "all together"]
WITH_WEIGHTS = ["M2", "CondConv", "switch to M2", "all together"]
WITH_ATTENTION = ["M2", "GRI", "inheritance 'balanced'"]


def parts(card: dict, fast: bool) -> list[Part]:
    """What is run on this machine. card: what host.card() found; empty without one."""
    one: dict = {"networks": ["narrow SD1.5"], "runs": ["1 of 16 x 16"]}
    base = () if card else ("--cpu",)
    pytorch = ("--use-pytorch-cross-attention",)
    each: dict = {"only": ONE_OF_EACH}
    small: dict = {"pixels": [128], "batches": [1], "rounds": 1}
    if fast and not card:
        return [
            Part("correct fp32", "correct", (*base, *pytorch, TYPES["fp32"]), {"dtype": "fp32", **one, **each}),
            Part("times", "fast", (*base, *pytorch), {"narrow": ["narrow SD1.5"], **small, **each}),
        ]
    if fast:
        networks = {"networks": ["emoji", "narrow SD1.5"], "runs": ["4 of 13 x 19"]}
        return [
            Part("correct fp16", "correct", (TYPES["fp16"],), {"dtype": "fp16", **networks}, compares=True),
            *(timed(card, family, size, (1,)) for family, size in (("sd15", 512), ("sdxl", 1024))),
        ]
    if card:
        found = [Part(f"correct {name}", "correct", (flag,), {"dtype": name}, "", True) for name, flag in TYPES.items()]
    else:
        # All of them in the first part; after it one of each kind, as one core has not the time of a card.
        few = {**one, **each, "again": False}
        flags, odd = (*base, *pytorch), {**few, "runs": ["4 of 13 x 19"]}
        found = [
            Part("correct fp32", "correct", (*flags, TYPES["fp32"]), {"dtype": "fp32", "runs": one["runs"]}),
            Part("odd sizes", "correct", (*flags, TYPES["fp32"]), {"dtype": "fp32", **odd}),
            *(
                Part(f"correct {name}", "correct", (*flags, TYPES[name]), {"dtype": name, **few}, "", True)
                for name in ("fp16", "bf16")
            ),
        ]
    for name, (flags, package, needs_card) in MODES.items():
        lacks = "needs a graphics card" if needs_card and not card else ""
        if flags == pytorch and not card:
            lacks = "without a card the first part has it"
        if package and not importlib.util.find_spec(package):
            lacks = f"the package {package} is not there"
        fp16 = () if "fp8" in name else (TYPES["fp16" if card else "fp32"],)
        settings: dict = {"dtype": "fp16" if card else "bf16" if "fp8" in name else "fp32", **one}
        if not card:
            settings |= {"again": False, "only": WITH_WEIGHTS if "fp8" in name else WITH_ATTENTION}
        found.append(Part(name, "correct", (*base, *flags, *fp16), settings, lacks))
    if card:
        settings = {"dtype": "fp16", "networks": ["narrow SD1.5", "narrow SDXL"]}
        found.append(Part("compiled", "compiled", (TYPES["fp16"],), settings))
    else:
        settings = {"dtype": "fp32", "networks": ["two levels"], "only": ["inheritance 'balanced'"]}
        found.append(Part("compiled", "compiled", (*base, *pytorch, TYPES["fp32"]), settings))
    if card:
        found += [timed(card, family, size, (1, 4)) for family, sizes in SIZES.items() for size in sizes]
    else:
        for name in ("narrow SD1.5", "narrow SDXL"):
            settings = {"narrow": [name], **small}
            found.append(Part(f"times {name}", "fast", (*base, *pytorch), settings))
    return found


def timed(card: dict, family: str, pixels: int, batches: tuple[int, ...]) -> Part:
    memory, free = card.get("memory_gib", 0), shutil.disk_usage(tempfile.gettempdir()).free / 2**30
    lacks = "" if memory >= NEEDS[family] else f"the card has {memory} GiB, this needs {NEEDS[family]}"
    if not lacks and free < PACKS_GIB:
        lacks = f"the folder for temporary files has {free:.1f} GiB free, the packs need {PACKS_GIB}"
    return Part(
        f"times {family} {pixels}", "fast", (), {"family": family, "pixels": [pixels], "batches": batches}, lacks
    )


# In the process of a part ----------------------------------------------------------------------------


def work(connection, comfyui: Path, base: Path, part: Part, known: set[str], path: tuple[str, ...]) -> None:
    """Run a part and send what it finds: ("begin", name), ("row", name, row), and ("end",) or ("broken", why)."""
    log = os.open(base / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.path += [folder for folder in path if folder not in sys.path]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    until = time.monotonic() + MOST
    try:
        host.start(comfyui, (*part.flags, "--base-directory", str(base)), dynamic=True)
        if "--cpu" in part.flags:
            import torch

            torch.set_num_threads(host.CPU_THREADS)
        for name, call in items(part, base, lambda: until - time.monotonic()):
            if name not in known:
                connection.send(("begin", name))
                connection.send(("row", name, outcome(call)))
        connection.send(("end",))
    except Exception as error:
        connection.send(("broken", told(error)))
        raise


def outcome(call: Callable[[], dict]) -> dict:
    """The row of one check, also where it raises."""
    import comfy.model_management as management
    import torch

    began = time.monotonic()
    try:
        row = call()
    except (torch.OutOfMemoryError, management.OOM_EXCEPTION):
        management.unload_all_models()
        row = {"kind": "skipped", "why": "the card has too little memory for this"}
    except Exception as error:
        import traceback

        traceback.print_exc()
        row = {"kind": "check", "passed": False, "found": None, "wanted": "no error", "error": told(error)}
    return row | {"took": round(time.monotonic() - began, 2)}


def told(error: BaseException) -> str:
    return impersonal(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}")[
        :300
    ]


def impersonal(text: str) -> str:
    """A text whose paths are cut down to their last names: a report goes from hand to hand."""
    return re.sub(r"(?:[A-Za-z]:)?(?:[\\/][^\\/\s:'\"]+)+[\\/]([^\\/\s:'\"]+)", r"\1", text)


def items(part: Part, base: Path, until: Callable[[], float]) -> Iterator[tuple[str, Callable[[], dict]]]:
    """The checks of a part, in the process that has the host."""
    settings = dict(part.settings)
    folder = base / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    if part.does == "fast":
        yield from timings(settings, folder, until)
        return
    correct = host.pack_module("card.correct")
    s = correct.Setting(folder, **settings, reference=base / "reference.safetensors" if part.compares else None)
    if part.does == "reference":
        yield "reference", lambda: correct.write_reference(s, base / "reference.safetensors") or {"kind": "made"}
    elif part.does == "compiled":
        compiled = host.pack_module("card.compiled")
        if why := compiled.missing():
            yield "inductor", lambda: {"kind": "skipped", "why": why}
            return
        for network in s.networks:
            yield from compiled.checks(s, network)
    else:
        yield from correct.checks(s)


def timings(settings: dict, folder: Path, until: Callable[[], float]) -> Iterator[tuple[str, Callable[[], dict]]]:
    fast, techniques = host.pack_module("card.fast"), host.pack_module("card.techniques")
    import torch

    dtype = torch.float16 if "family" in settings else torch.float32
    most, rounds = None, settings.get("rounds", ROUNDS)
    for name in settings.get("narrow") or (settings["family"],):
        network = None
        for pixels in settings["pixels"]:
            for batch in settings["batches"]:

                def measured(name=name, pixels=pixels, batch=batch):
                    nonlocal network, most
                    most = most or fast.limit(dtype, 4096 if "family" in settings else 512)
                    if network is None:
                        narrow = "narrow" in settings
                        network = techniques.NETWORKS[name](folder) if narrow else techniques.full_size(name, dtype)
                    share = until() / max(1, len(settings["batches"]) - settings["batches"].index(batch))
                    began = time.monotonic()
                    rows = fast.times(
                        network,
                        pixels,
                        batch,
                        most,
                        rounds,
                        lambda: min(LONG, share) - time.monotonic() + began,
                        settings.get("only", ()),
                    )
                    return {"kind": "times", "rows": rows, "limit": most}

                yield f"{name}, {pixels} x {pixels}, batch {batch}", measured


ROUNDS = 5
LONG = 200  # seconds of rounds that are enough for one size and batch


# In the process that asked ---------------------------------------------------------------------------


def run(
    part: Part, comfyui: Path, base: Path, rows: dict, keep: Callable[[], None], say: Callable[[str], None]
) -> dict:
    """Run a part and put its rows into `rows`; returns {"state": "done", "unfinished" or "broken", ...}."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=work, args=(theirs, comfyui, base, part, set(rows), tuple(sys.path)), name=part.name, daemon=True
    )
    began, current, result = time.monotonic(), "starting", None
    process.start()
    theirs.close()
    try:
        while result is None:
            left = MOST - (time.monotonic() - began)
            if left <= 0:
                if current == "starting" or not rows:
                    result = {"state": "broken", "why": f"{current}: not done after {MOST} s"}
                else:
                    result = {"state": "unfinished", "why": f"stopped after {MOST} s; the same command goes on"}
            elif ours.poll(min(left, 5)):
                try:
                    kind, *data = ours.recv()
                except EOFError:
                    process.join(10)
                    result = {
                        "state": "broken",
                        "why": f"the process ended by itself ({process.exitcode}) in: {current}",
                    }
                    break
                if kind == "begin":
                    (current,) = data
                    say(f"{part.name}, {time.monotonic() - began:.0f} s: {current}")
                elif kind == "row":
                    rows[data[0]] = data[1]
                    keep()
                elif kind == "broken":
                    result = {"state": "broken", "why": data[0]}
                else:
                    result = {"state": "done"}
    finally:
        if result is None or result["state"] != "done":
            process.kill()
        process.join(20)
        ours.close()
    return result | {"seconds": round(time.monotonic() - began, 1)}


def workplace() -> tempfile.TemporaryDirectory:
    """A folder for models, packs and the host's settings, in the place of the person's own."""
    folder = tempfile.TemporaryDirectory(prefix="asdm-card-", ignore_cleanup_errors=True)
    for name in ("input", "output", "models", "custom_nodes", "user", "temp"):
        (Path(folder.name) / name).mkdir()
    return folder
