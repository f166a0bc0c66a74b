"""What further experts cost: M2 at full size with and without them, and the ways to compute one such convolution.

    python bootstrap.py bench NAME=condconv [ARGS="--dtypes bf16 fp32 --rounds 5"]

Random weights, 512 x 512 pixels. The UNet: batch 2 (classifier-free guidance), 77 tokens, the host's fused
attention; e2 and e4 have 2 and 4 experts on every 3 x 3 convolution of M2's own layers, played by the modules
that Apply Pack dispatches to. The layer: one convolution with 2 or 4 experts, computed as

    plain        the convolution alone, for comparison
    per sample   kernels are mixed, each sample gets a convolution of its own (what asdm_core.condconv does)
    grouped      kernels are mixed, one grouped convolution for the batch
    per expert   a convolution for each expert, their outputs are mixed

Everything is measured in turn; a ratio is the median over the rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from pathlib import Path
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from asdm_core.architecture import Architecture
from asdm_core.condconv import CondConv, CondConv2d, convolution, convolutions, further_experts, start
from asdm_core.measure import ratio, time_alternating
from asdm_core.packs import Description, Loaded
from asdm_core.tensor_file import DTYPES
from bench._common import add_common_arguments, begin, beside_earlier, command_line, pack_module, record
from bench._unets import SD15, Cutter, build

COUNTS = (2, 4)
BATCHES = (1, 2, 4, 8)
# The convolutions with the largest map and with the most weights: address, side of its map at 512 pixels.
LAYERS = {"up.3.0.resnet.conv1": 64, "up.2.0.resnet.conv1": 32}


# The UNet -------------------------------------------------------------------------------------------


def expert_players(cutter: Cutter, count: int, dtype: torch.dtype, device: torch.device) -> dict[str, torch.nn.Module]:
    """The layers of M2's own units with `count` experts in their 3 x 3 convolutions, by unit address."""
    own = Architecture.preset("m2").own
    settings = CondConv({a: count for a, conv in convolutions(SD15).items() if conv.unit.address in own})
    description = Description("pack", Architecture.full(SD15), condconv=settings)
    loaded = Loaded(Path("experts"), description, start(SD15, settings, "random"))
    pack = pack_module("nodes.engine.units").PackModel.load(loaded, dtype, None).to(device)
    return {address: pack.with_experts(address, cutter.units[address][1], 1.0) for address in description.expert_units}


def bench_unet(name: str, rounds: int, device: torch.device, clock) -> tuple[dict, list[dict]]:
    dtype = DTYPES[name]
    cutter = Cutter(build(SD15, dtype, device))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 64, 64, generator=generator).to(device, dtype)
    context = torch.randn(2, 77, SD15.context_dim, generator=generator).to(device, dtype)
    t = torch.tensor([500.0, 500.0], device=device)
    variants = {"plain": {}, **{f"e{count}": expert_players(cutter, count, dtype, device) for count in COUNTS}}

    def call(players):
        cutter.become(Architecture.preset("m2"))
        for address, player in players.items():
            parent, _, leaf = cutter.units[address][0].ldm.rpartition(".")
            cutter.unet.get_submodule(parent).add_module(leaf, player)
        with torch.inference_mode():
            out = cutter.unet(x, t, context, transformer_options={})
        assert out.isfinite().all()

    times = time_alternating(
        {v: functools.partial(call, p) for v, p in variants.items()}, rounds, sync=sync_of(device), clock=clock
    )
    rows = [
        {
            "unet": "m2",
            "variant": v,
            "dtype": name,
            "seconds": statistics.median(times[v]),
            "all_seconds": times[v],
            "over_plain": ratio(times, v, "plain"),
        }
        for v in variants
    ]
    return {f"{row['variant']}_over_plain": row["over_plain"] for row in rows[1:]}, rows


# The layer ------------------------------------------------------------------------------------------


def grouped(layer: CondConv2d, x: torch.Tensor) -> torch.Tensor:
    routes = layer.routes(x).to(x.dtype)
    conv: Any = layer.conv
    stacked: Any = layer.experts
    experts, biases = stacked.weight.view(routes.shape[1], -1), stacked.bias.view(routes.shape[1], -1)
    kernels = torch.addmm(conv.weight.view(1, -1), routes, experts).view(-1, *conv.weight.shape[1:])
    out = F.conv2d(
        x.reshape(1, -1, *x.shape[2:]),
        kernels,
        torch.addmm(conv.bias[None], routes, biases).flatten(),
        padding=conv.padding,
        groups=len(x),
    )
    return out.view(len(x), -1, *out.shape[2:])


def per_expert(layer: CondConv2d, x: torch.Tensor) -> torch.Tensor:
    routes = layer.routes(x).to(x.dtype)
    conv = layer.conv
    added = F.conv2d(x, layer.experts.weight, layer.experts.bias, padding=conv.padding).unflatten(
        1, (routes.shape[1], -1)
    )
    return conv(x) + torch.einsum("bk,bkchw->bchw", routes, added)


WAYS: dict[str, Callable[[CondConv2d, torch.Tensor], torch.Tensor]] = {
    "plain": lambda layer, x: layer.conv(x),
    "per sample": CondConv2d.forward,
    "grouped": grouped,
    "per expert": per_expert,
}


def bench_layer(address: str, count: int, name: str, rounds: int, device: torch.device, clock) -> list[dict]:
    settings = CondConv({address: count})
    conv = convolution(SD15, address)
    dtype = DTYPES[name]
    c_out, c_in, height, width = conv.shape
    layer = CondConv2d(torch.nn.Conv2d(c_in, c_out, (height, width), padding=1), *further_experts(settings, conv))
    tensors = start(SD15, settings, "random")
    layer.load_state_dict({leaf: tensors[conv.key(leaf)] for leaf in settings.shapes(conv)}, strict=False)
    layer.requires_grad_(False).to(device, dtype)
    formats = (torch.contiguous_format, torch.channels_last) if device.type == "cuda" else (torch.contiguous_format,)
    rows = []
    for batch in BATCHES:
        for memory in formats:
            x = torch.randn(batch, c_in, LAYERS[address], LAYERS[address], generator=torch.Generator().manual_seed(0))
            x = x.to(device, dtype, memory_format=memory)
            wanted = grouped(layer, x)
            for way in ("per sample", "per expert"):  # they are the same function, up to rounding of kernels
                error = (WAYS[way](layer, x) - wanted).abs().max() / wanted.abs().max()
                assert error < (1e-4 if dtype == torch.float32 else 0.03), (way, float(error))
            calls = {w: functools.partial(way, layer, x) for w, way in WAYS.items()}
            times = time_alternating(calls, rounds, sync=sync_of(device), clock=clock)
            rows += [
                {
                    "layer": address,
                    "experts": count,
                    "batch": batch,
                    "memory": str(memory).removeprefix("torch."),
                    "way": way,
                    "dtype": name,
                    "seconds": statistics.median(times[way]),
                    "over_plain": ratio(times, way, "plain"),
                }
                for way in WAYS
            ]
    return rows


def sync_of(device: torch.device):
    return torch.cuda.synchronize if device.type == "cuda" else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=["bf16"], help="rows of others stay as they were recorded"
    )
    parser.add_argument("--rounds", type=int, default=3)
    add_common_arguments(parser)
    args, host, device, clock = begin(parser)
    summary: dict[str, float] = {}
    rows = []
    command = command_line("condconv")
    for dtype in args.dtypes:
        ratios, found = bench_unet(dtype, args.rounds, device, clock)
        summary |= ratios if dtype == "bf16" else {f"{name}_{dtype}": value for name, value in ratios.items()}
        for row in found:
            print(
                f"m2 {row['variant']:6} {dtype} {row['seconds']:8.2f} s  {row['over_plain']:.3f} of plain", flush=True
            )
        for address in LAYERS:
            for count in COUNTS:
                layers = bench_layer(address, count, dtype, args.rounds, device, clock)
                found += layers
                for row in layers:
                    print(
                        f"{address} e{count} batch {row['batch']} {row['memory']:17} {row['way']:10} "
                        f"{row['seconds'] * 1000:8.1f} ms  "
                        f"{row['over_plain']:.3f} of plain",
                        flush=True,
                    )
        rows += found
    summary, rows = beside_earlier("condconv", summary, rows, command, lambda row: row["dtype"])
    record("condconv", summary, rows, command, host, args.notes)


if __name__ == "__main__":
    main()
