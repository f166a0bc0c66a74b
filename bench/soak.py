"""Many runs with inherited features, of changing size, batch, sampler and plan, every fifth interrupted: memory and
results.

    python bootstrap.py bench NAME=soak [ARGS="--runs 200"]

A narrow SD1.5 topology with random weights. Every finished run must equal the first of its kind, made on
a MODEL clone of its own, bit for bit. After each run the tensors that Python still knows are counted, and the
feature memories that are still alive. From a quarter of the runs on the count of tensors must not change, and
the process may not grow by more than 32 MB.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import time
import weakref
from dataclasses import replace
from pathlib import Path

import torch

from asdm_core import inheritance
from asdm_core.architecture import FAMILIES, Architecture
from bench._common import pack_module, randomise, record, start_host
from bench._unets import with_plan

BOUND_MB = 32
CASES = (
    ((16, 16), 1, "euler"),
    ((8, 16), 2, "heun"),
    ((16, 8), 1, "dpmpp_2m"),
    ((8, 8), 3, "dpmpp_sde"),
    ((24, 16), 1, "uni_pc"),
)


def narrow():
    """A random SD1.5 UNet with 32 base channels."""
    import comfy.model_management as management
    import comfy.model_patcher

    sd15 = replace(FAMILIES["sd15"], model_channels=32)
    config = pack_module("nodes.engine.models").model_config(Architecture.full(sd15), "eps")
    config.set_inference_dtype(torch.float32, None)
    base = config.get_model({}, "")
    randomise(base.diffusion_model)
    return comfy.model_patcher.CoreModelPatcher(
        base, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )


def sample(model, size, batch, sampler, callback=None):
    import comfy.sample

    generator = torch.Generator().manual_seed(0)
    positive, negative = ([[torch.randn(1, 77, 768, generator=generator), {}]] for _ in range(2))
    latent = torch.zeros(batch, 4, *size)
    noise = torch.randn(latent.shape, generator=generator)
    return comfy.sample.sample(
        model,
        noise,
        4,
        3.0,
        sampler,
        "normal",
        positive,
        negative,
        latent,
        disable_pbar=True,
        seed=0,
        callback=callback,
    )


def interrupt(i, x0, x, n):
    import comfy.model_management

    comfy.model_management.interrupt_current_processing(i == 2)


def resident_mb() -> float:
    """Memory of this process. Linux only."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def tensors() -> int:
    gc.collect()
    return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())


def watch(memory_class) -> list[weakref.ref]:
    """References to all memories that will be made."""
    made = []
    create = memory_class.__init__

    def init(self, *args):
        made.append(weakref.ref(self))
        create(self, *args)

    memory_class.__init__ = init
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--notes", default="", help="kept in the record: what else the machine was doing")
    args = parser.parse_args()
    host_path = start_host("--use-pytorch-cross-attention")
    import comfy.model_management as management

    memories = watch(pack_module("nodes.engine.feature_cache").FeatureCache)
    model = narrow()
    config = pack_module("nodes.engine.network").architecture_of(model).config
    plans = [
        inheritance.deepcache(config, 1),
        inheritance.attention(config),
        inheritance.deepcache(config, 0).reusing("forecast"),
        inheritance.deepcache(config, 2, inheritance.Schedule("adaptive", threshold=0.5)),
    ]
    fresh = {
        (p, c): sample(with_plan(model, plan), *case) for p, plan in enumerate(plans) for c, case in enumerate(CASES)
    }
    models = [with_plan(model, plan) for plan in plans]
    choose = random.Random(0)
    rows: list[dict] = []
    began = time.perf_counter()
    for n in range(args.runs):
        p, c = choose.randrange(len(plans)), choose.randrange(len(CASES))
        equal = None
        try:
            equal = torch.equal(sample(models[p], *CASES[c], callback=interrupt if n % 5 == 3 else None), fresh[p, c])
        except management.InterruptProcessingException:
            pass
        rows.append(
            {
                "plan": plans[p].name,
                "case": c,
                "equal": equal,
                "tensors": tensors(),
                "resident_mb": round(resident_mb(), 1),
                "memories_alive": sum(memory() is not None for memory in memories),
            }
        )
    warm = rows[args.runs // 4 :]
    summary = {
        "runs": args.runs,
        "interrupted": sum(row["equal"] is None for row in rows),
        "unequal": sum(row["equal"] is False for row in rows),
        "tensors_more": max(row["tensors"] for row in warm) - warm[0]["tensors"],
        "memories_alive": max(row["memories_alive"] for row in rows),
        "resident_mb_more": max(row["resident_mb"] for row in warm) - warm[0]["resident_mb"],
        "bound_mb": BOUND_MB,
        "seconds": time.perf_counter() - began,
    }
    record("soak", summary, rows, "python bootstrap.py bench NAME=soak", host_path, args.notes)
    if (
        summary["unequal"]
        or summary["tensors_more"]
        or summary["memories_alive"]
        or summary["resident_mb_more"] > BOUND_MB
    ):
        raise SystemExit("something stayed behind, or a result changed; see the summary above")


if __name__ == "__main__":
    main()
