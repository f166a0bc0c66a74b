"""Time of pruned and combined UNets against SD1.5, at full size, in the host's own class; cost of a pack.

    python bootstrap.py bench NAME=unet [ARGS="--dtypes bf16 --rounds 3"]

Random weights, 512 x 512 pixels, batch 2 (classifier-free guidance), 77 tokens, the host's fused attention.
All variants are one SD1.5 skeleton whose units are cut in turn, measured A, B, C, A, B, C, ...; a ratio is
the median over the rounds of the ratio within a round. Beside them runs the renumbered network of `base` as
the host itself builds it, without anything of asdm: what cutting in place costs against that.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time

import torch

from asdm_core import packs
from asdm_core.architecture import Architecture
from asdm_core.assignment import Window
from asdm_core.measure import costs, ratio, time_alternating, total
from asdm_core.tensor_file import DTYPES
from bench._common import add_common_arguments, begin, command_line, pack_module, record
from bench._unets import SD15, Cutter, build, full_size

CONTROL = "base"
VARIANTS = ("m1", "m2", "m3", "base", "small", "tiny")


def bench_variants(name: str, rounds: int, device: torch.device, clock) -> tuple[dict, list[dict]]:
    dtype = DTYPES[name]
    cutter = Cutter(build(SD15, dtype, device))
    stock = build(Architecture.preset(CONTROL).renumbered.config, dtype, device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 64, 64, generator=generator).to(device, dtype)
    context = torch.randn(2, 77, SD15.context_dim, generator=generator).to(device, dtype)
    t = torch.tensor([500.0, 500.0], device=device)
    variants = {"sd15": Architecture.full(SD15), **{v: Architecture.preset(v) for v in VARIANTS}}

    def call(unet):
        with torch.inference_mode():
            out = unet(x, t, context, transformer_options={})
        assert out.isfinite().all()

    def call_cut(architecture):
        cutter.become(architecture)
        call(cutter.unet)

    sync = torch.cuda.synchronize if device.type == "cuda" else None
    call_cut(variants["sd15"])  # warms every layer up for all variants, which have no others
    call(stock)
    control = f"{CONTROL}-renumbered"
    calls = {v: lambda a=a: call_cut(a) for v, a in variants.items()} | {control: lambda: call(stock)}
    times = time_alternating(calls, rounds, warmup=0, sync=sync, clock=clock)
    variants[control] = variants[CONTROL]
    work = {v: total(costs(a)).total for v, a in variants.items()}
    rows = [
        {
            "variant": v,
            "dtype": name,
            "seconds": statistics.median(times[v]),
            "all_seconds": times[v],
            "over_sd15": ratio(times, v, "sd15"),
            "macs_over_sd15": work[v] / work["sd15"],
            "params": variants[v].params,
        }
        for v in variants
    ]
    summary = {f"{v}_over_sd15_{name}": ratio(times, v, "sd15") for v in VARIANTS}
    return summary | {f"{CONTROL}_over_renumbered_{name}": ratio(times, CONTROL, control)}, rows


def bench_pack(device: torch.device) -> tuple[dict, list[dict]]:
    """Time and memory of applying an M2 pack to a full SD1.5 in the host, files and all."""
    import tempfile
    from pathlib import Path

    import comfy.sample
    import psutil

    apply_pack = pack_module("nodes.apply_pack")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    model = full_size(dtype)
    m2 = Architecture.preset("m2")
    state = model.model.diffusion_model.state_dict()
    description = packs.Description("pack", m2, m2.pack_units())

    def memory() -> int:
        return torch.cuda.memory_allocated() if device.type == "cuda" else psutil.Process().memory_info().rss

    def step(m):
        cond = [[torch.zeros(1, 77, 768), {}]]
        latent = torch.zeros(1, 4, 32, 32)
        return comfy.sample.sample(
            m, torch.randn(latent.shape), 1, 1.0, "euler", "normal", cond, cond, latent, seed=0, disable_pbar=True
        )

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m2.safetensors"
        # In the dtype the MODEL runs in, so that the file's size is the size of the pack in memory.
        packs.write_pack(path, {k: state[k] for k in description.keys()}, description, dtype)
        step(model)
        before = memory()
        start = time.perf_counter()
        with_pack = apply_pack.apply_pack(model, path, path.name, Window())
        seconds = time.perf_counter() - start
        step(with_pack)
        extra = memory() - before
        size = path.stat().st_size
    row = {"pack": "m2", "dtype": str(dtype), "file_bytes": size, "extra_bytes": extra, "apply_seconds": seconds}
    return {"pack_apply_seconds": seconds, "pack_extra_memory_over_pack_size": extra / size}, [row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--rounds", type=int, default=3)
    add_common_arguments(parser)
    args, host, device, clock = begin(parser)
    summary, rows = bench_pack(device)
    for name in args.dtypes:
        print(f"{name}: SD1.5 and {len(VARIANTS)} variants, {args.rounds} rounds", flush=True)
        more, found = bench_variants(name, args.rounds, device, clock)
        summary, rows = {**more, **summary}, [*found, *rows]
        for row in found:
            print(
                f"  {row['variant']:15} {row['seconds']:8.2f} s  {row['over_sd15']:.3f} of SD1.5 (MACs "
                f"{row['macs_over_sd15']:.3f})",
                flush=True,
            )
    peak = (
        torch.cuda.max_memory_allocated()
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    )
    summary["peak_memory_gib"] = peak / 1024**3
    command = command_line("unet")
    record("unet", summary, rows, command, host, args.notes)


if __name__ == "__main__":
    main()
