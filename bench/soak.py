"""Many mixed runs in one process: memory and results.

    python bootstrap.py bench NAME=soak [ARGS="--runs 1000"]

Sizes, batches, samplers, packs, windows, plans, forecasts, GRI, LoRAs and switches change from run to run, and every
fifth is interrupted over HTTP. A narrow UNet of two levels with random weights. Every finished run must equal the
first of its kind, made on MODELs of its own, bit for bit. After every tenth run the tensors that Python still knows are
counted, with the feature memories that are still alive and the dead entries in the host's list of loaded models. From a
quarter of the runs on the count of tensors must not change, and the process may not grow by more than 32 MB.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import random
import tempfile
import threading
import time
import urllib.request
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from asdm_core import inheritance
from asdm_core.addresses import UNetConfig
from asdm_core.architecture import Architecture
from asdm_core.assignment import Window
from asdm_core.forecast import FULL, RESULT, Action, ForecastPlan
from asdm_core.switching import SwitchPoint
from bench._common import command_line, pack_module, record, start_host
from bench._unets import with_plan, with_technique

BOUND_MB = 32
STEPS = 3
NETWORK = UNetConfig(
    "two-levels", 32, (1, 2), ((1, 1), (1,)), 1, ((1, 1), (1, 1, 1)), context_dim=48, num_heads=4
)  # all kinds of layers and of packs, in few of them: what is looked for lies between runs, not in a network
CUTS = "down.0.1", "up.1.1, mid"  # of the two packs
COUNTED = 10  # every so many runs: a count takes longer than a run
CASES: tuple[dict[str, Any], ...] = (
    {"size": (8, 8), "batch": 1, "sampler": "euler"},
    {"size": (8, 16), "batch": 1, "sampler": "heun"},
    {"size": (16, 8), "batch": 1, "sampler": "dpmpp_2m"},
    {"size": (8, 8), "batch": 3, "sampler": "dpmpp_sde"},
)


def kinds(folder: Path) -> dict[str, Callable[[Any, Any], Any]]:
    """What is put on a MODEL: name -> (a MODEL, another one of the same shape) -> a clone of the first with it."""
    import comfy.sd

    narrow, apply_pack = pack_module("card.narrow"), pack_module("nodes.apply_pack").apply_pack
    with_switch = pack_module("nodes.engine.switch").with_switch
    forecasts, regional = pack_module("nodes.engine.forecasts"), pack_module("nodes.engine.regional")
    packs = [
        narrow.write_pack(folder / f"{seed}.safetensors", NETWORK, seed=seed, chosen=Architecture.choose(NETWORK, cut))
        for seed, cut in enumerate(CUTS, 10)
    ]
    lora = lora_of(narrow)

    def pack(model, path=packs[0], window=None):
        return apply_pack(model, path, path.name, window or Window())

    def add_lora(model):
        return comfy.sd.load_lora_for_models(model, None, lora, 0.5, 0)[0]

    skip = inheritance.deepcache(NETWORK, 1)
    forecasting = ForecastPlan((Action(FULL), Action(FULL), Action(RESULT)))
    return {
        "deepcache-1": lambda a, b: with_plan(a, skip),
        "attention": lambda a, b: with_plan(a, inheritance.attention(NETWORK)),
        "deepcache-0, forecast": lambda a, b: with_plan(a, inheritance.deepcache(NETWORK, 0).reusing("forecast")),
        "adaptive": lambda a, b: with_plan(
            a, inheritance.deepcache(NETWORK, 1, inheritance.Schedule("adaptive", threshold=0.5))
        ),
        "pack": lambda a, b: pack(a),
        "two packs in windows": lambda a, b: pack(pack(a, packs[0], Window(0, 0.5)), packs[1], Window(0.5, 1)),
        "LoRA on a pack, inheriting": lambda a, b: with_plan(add_lora(pack(a)), skip),
        "whole-step forecasts": lambda a, b: with_technique(a, forecasts.Forecasts(forecasting)),
        "GRI": lambda a, b: with_technique(a, regional.Regional(window=4, pool=2)),
        "switch": lambda a, b: with_switch(with_plan(a, skip), pack(b), SwitchPoint(0.5)),
        "switch, one with a LoRA": lambda a, b: with_switch(add_lora(a), b, SwitchPoint(0.5)),
    }


def lora_of(narrow) -> dict[str, torch.Tensor]:
    """A LoRA in kohya's names for the attention of every transformer."""
    generator, found = torch.Generator().manual_seed(5), {}
    for slot in narrow.addresses.keys(NETWORK, "diffusers").values():
        key = slot.unit.key(slot.tensor, "diffusers")
        if len(slot.shape) == 2 and ".attn" in key:
            name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
            found[f"{name}.lora_up.weight"] = torch.randn(slot.shape[0], 2, generator=generator) * 0.2
            found[f"{name}.lora_down.weight"] = torch.randn(2, slot.shape[1], generator=generator) / 2
    return found


# Interrupts ------------------------------------------------------------------------------------------


class Interrupter:
    """ComfyUI's own server in a thread of this process, and a person who presses Cancel."""

    def __init__(self) -> None:
        self._loop, self._ready = asyncio.new_event_loop(), threading.Event()
        self.url = ""
        threading.Thread(target=self._serve, daemon=True).start()
        self._ready.wait()

    def _serve(self) -> None:
        import execution
        import server
        from aiohttp import web

        asyncio.set_event_loop(self._loop)
        comfy = server.PromptServer(self._loop)
        comfy.prompt_queue = execution.PromptQueue(comfy)
        comfy.add_routes()

        async def begin() -> None:
            runner = web.AppRunner(comfy.app, access_log=None)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            address = runner.addresses[0]
            self.url = f"http://{address[0]}:{address[1]}/interrupt"
            self._ready.set()

        self._loop.run_until_complete(begin())
        self._loop.run_forever()

    def __call__(self, i, x0, x, n) -> None:
        """The callback of a run: cancels it after its first step."""
        if i == 0:
            urllib.request.urlopen(urllib.request.Request(self.url, data=b"{}", method="POST")).read()


# Counting --------------------------------------------------------------------------------------------


def resident_mb() -> float:
    """Memory of this process. Linux only."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def tensors() -> int:
    gc.collect()
    return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())


def dead_entries() -> int:
    """Models in the host's list of loaded ones whose MODEL is gone while their weights are not."""
    import comfy.model_management as management

    return sum(bool(entry.real_model and entry.is_dead()) for entry in management.current_loaded_models)


def watch(memory_class) -> list[weakref.ref]:
    """References to all memories that will be made."""
    made = []
    create = memory_class.__init__

    def init(self, *args, **given):
        made.append(weakref.ref(self))
        create(self, *args, **given)

    memory_class.__init__ = init
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--notes", default="", help="kept in the record: what else the machine was doing")
    args = parser.parse_args()
    host_path = start_host("--use-pytorch-cross-attention")
    import comfy.model_management as management

    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.ERROR)  # each run of so few steps is warned of
    memories = watch(pack_module("nodes.engine.feature_cache").FeatureCache)
    interrupt = Interrupter()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        summary, rows = soak(args.runs, Path(folder), memories, interrupt, management.InterruptProcessingException)
    summary |= {"bound_mb": BOUND_MB, "seconds": time.perf_counter() - began}
    record("soak", summary, rows, command_line("soak"), host_path, args.notes)
    left = ("unequal", "tensors_more", "memories_alive", "dead_entries")
    if any(summary[name] for name in left) or summary["resident_mb_more"] > BOUND_MB:
        raise SystemExit("something stayed behind, or a result changed; see the summary above")


def soak(runs: int, folder: Path, memories, interrupt: Interrupter, interrupted) -> tuple[dict, list[dict]]:
    """The runs: (summary, what was counted after every tenth)."""
    import comfy.model_management

    narrow, made = pack_module("card.narrow"), kinds(folder)

    def model(seed: int):
        path = folder / f"network-{seed}.safetensors"
        if not path.exists():
            narrow.write_unet(path, NETWORK, seed=seed)
        return pack_module("nodes.engine.models").load_unet(str(path))

    def sample(model, case, callback=None):
        return narrow.sample(model, NETWORK, **case, steps=STEPS, callback=callback)

    fresh = {
        (kind, c): sample(make(model(0), model(1)), case) for kind, make in made.items() for c, case in enumerate(CASES)
    }
    first, second = model(0), model(1)
    models = {kind: make(first, second) for kind, make in made.items()}
    choose = random.Random(0)
    rows: list[dict] = []
    count = {"interrupted": 0, "unequal": 0}
    for n in range(runs):
        kind, c = choose.choice(sorted(made)), choose.randrange(len(CASES))
        cancelled = n % 5 == 3
        try:
            out = sample(models[kind], CASES[c], interrupt if cancelled else None)
            if cancelled:
                raise SystemExit(f"run {n} was interrupted over HTTP and went on to its end")
            if not torch.equal(out, fresh[kind, c]):
                count["unequal"] += 1
                print(f"run {n} ({kind}, {CASES[c]}) differs from the first of its kind", flush=True)
        except interrupted:
            count["interrupted"] += 1
        if (n + 1) % COUNTED == 0:
            comfy.model_management.unload_all_models()  # else the weights behind a LoRA count, while it is loaded
            rows.append(
                {
                    "runs": n + 1,
                    "last": kind,
                    "tensors": tensors(),
                    "resident_mb": round(resident_mb(), 1),
                    "memories_alive": sum(memory() is not None for memory in memories),
                    "dead_entries": dead_entries(),
                }
            )
    warm = rows[len(rows) // 4 :]
    return {
        "runs": runs,
        "kinds": len(made),
        "cases": len(CASES),
        **count,
        "tensors_more": max(row["tensors"] for row in warm) - warm[0]["tensors"],
        "memories_alive": max(row["memories_alive"] for row in rows),
        "dead_entries": max(row["dead_entries"] for row in rows),
        "resident_mb_more": max(row["resident_mb"] for row in warm) - warm[0]["resident_mb"],
    }, rows


if __name__ == "__main__":
    main()
