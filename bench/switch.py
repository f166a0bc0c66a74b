"""Switching UNets within a run: what the switch itself costs, in time and memory, and time against quality.

    python bootstrap.py bench NAME=switch [ARGS="--cpu-time --pictures 16"]

Memory: SD1.5 at full size with random weights; a run of it, then one that switches from it to itself with an M2
pack. What the process has grown by, relative to the size of the pack's file.

Overhead: a switched run against the sum of its parts, the times of its two models' own runs by their shares of the
steps. SD1.5 at full size, 256 x 256 pixels, few steps, with its M2 pack and with BK-SDM Base, which is a UNet of its
own; and every switch of the quality part. What is compared is measured in turn; a ratio is the median over the rounds
of the ratio within a round.

Quality: the emoji teacher as the large UNet and the teacher with its M2 pack as the small one, 25 steps as in the
paper, paired seeds. Who begins and for how long; S1 to S3 are among these. Similarity to the teacher's own pictures
(PSNR, SSIM), and how often a classifier recognises the emoji that was asked for.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import math
import statistics
import sys
import tempfile
from pathlib import Path

import psutil
import torch

from asdm_core import packs
from asdm_core.architecture import Architecture
from asdm_core.assignment import Window
from asdm_core.measure import psnr, ratio, ssim, time_alternating
from asdm_core.tensor_file import DTYPES
from asdm_core.switching import PRESETS, SwitchPoint
from bench._common import (
    ROOT,
    add_common_arguments,
    begin,
    beside_earlier,
    command_line,
    pack_module,
    pyplot,
    record,
)
from bench._family import FAMILY, Family
from bench._unets import full_size

SHARES = (0.2, 0.4, 0.6, 0.8)
FADE = 5  # steps of the cross-fade that is shown


def switched(first, second, at: float, crossfade: int = 0):
    """What the node Switch UNet makes, at a share of the steps."""
    return pack_module("nodes.engine.switch").with_switch(first, second, SwitchPoint(at, "share of steps"), crossfade)


def with_pack(model, path: Path):
    return pack_module("nodes.apply_pack").apply_pack(model, path, path.name, Window())


# SD1.5 at full size -----------------------------------------------------------------------------------


def sample(model, steps: int):
    import comfy.sample

    cond = [[torch.zeros(1, 77, 768), {}]]
    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        comfy.sample.sample(
            model, noise, steps, 7.0, "euler", "normal", cond, cond, torch.zeros_like(noise), seed=0, disable_pbar=True
        )


def bench_full_size(dtype: str, steps: int, rounds: int, device: torch.device, clock) -> tuple[dict, list[dict]]:
    model = full_size(DTYPES[dtype])
    m2 = Architecture.preset("m2")
    state = model.model.diffusion_model.state_dict()
    description = packs.Description("pack", m2, m2.pack_units())

    def memory() -> int:
        gc.collect()
        if device.type == "cuda":
            return torch.cuda.memory_allocated()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps for later is not ours
        return psutil.Process().memory_info().rss

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m2.safetensors"
        # In the dtype the MODEL runs in, so that the file's size is the size of the pack in memory.
        packs.write_pack(path, {k: state[k] for k in description.keys()}, description, DTYPES[dtype])
        sample(model, 2)
        before = memory()
        packed = with_pack(model, path)
        sample(switched(model, packed, 0.5), 2)
        extra = memory() - before
        size = path.stat().st_size
    rows: list[dict] = [
        {"part": "memory", "switch": "SD1.5 to SD1.5 with M2", "dtype": dtype, "file_bytes": size, "extra_bytes": extra}
    ]
    base = full_size(DTYPES[dtype], Architecture.preset("base"), seed=1)
    rows += bench_overhead(
        {
            "SD1.5 to SD1.5 with M2": (model, packed),
            "Base to SD1.5": (base, model),
        },
        lambda m: sample(m, steps),
        rounds,
        clock,
    )
    overhead = max(row["over_sum_of_parts"] for row in rows if row["part"] == "overhead") - 1
    return {"switch_overhead": overhead, "shared_trunk_extra_memory_over_pack_size": extra / size}, [
        row | {"dtype": dtype} for row in rows
    ]


def bench_overhead(pairs: dict, run, rounds: int, clock) -> list[dict]:
    """Runs of pairs of MODELs, switched at half of the steps, over the mean of the two unswitched ones."""
    rows = []
    for name, (first, second) in pairs.items():
        trio = {"first": first, "second": second, "switched": switched(first, second, 0.5)}
        times = time_alternating({label: functools.partial(run, m) for label, m in trio.items()}, rounds, clock=clock)
        rows.append(
            {
                "part": "overhead",
                "switch": name,
                "over_sum_of_parts": over_parts(times, "switched", "first", "second", 0.5),
                "all_seconds": times,
            }
        )
        print(f"{name}: {rows[-1]['over_sum_of_parts']:.4f} of the sum of its parts", flush=True)
    return rows


def over_parts(times: dict, name: str, first: str, second: str, at: float) -> float:
    """Median over the rounds of the time of a switched run over that of the two models' runs, in their shares of the
    steps.
    """
    return statistics.median(
        s / (at * a + (1 - at) * b) for a, b, s in zip(times[first], times[second], times[name], strict=True)
    )


# The emoji family -------------------------------------------------------------------------------------


def settings(large, small) -> dict[str, tuple[dict, object]]:
    """Label -> (what it is, MODEL)."""
    found: dict[str, tuple[dict, object]] = {
        "large": ({"small_share": 0.0}, large),
        "small": ({"small_share": 1.0}, small),
    }
    presets = {(p.small_first, p.at.at): name for name, p in PRESETS.items()}
    for small_first in (True, False):
        first, second = (small, large) if small_first else (large, small)
        for at in SHARES:
            row = {"small_first": small_first, "at": at, "small_share": at if small_first else round(1 - at, 2)}
            preset = presets.get((small_first, at))
            name = f"{'small' if small_first else 'large'} for {at:.0%}"
            found[name] = (row | ({"preset": preset} if preset else {}), switched(first, second, at))
    s1 = PRESETS["S1"].at.at
    found[f"small for {s1:.0%}, cross-fade over {FADE} steps"] = (
        {"small_first": True, "at": s1, "crossfade": FADE},
        switched(small, large, s1, FADE),
    )
    return found


def bench_quality(pictures: int, rounds: int, clock) -> tuple[dict, list[dict]]:
    family = Family(pictures)
    latents = {}
    chosen = settings(family.model, with_pack(family.model, FAMILY / "emoji-m2.safetensors"))

    def call(label):
        latents[label] = family.latents(chosen[label][1], "dpmpp_2m", "karras", 25)

    for _, model in chosen.values():  # whatever a model does only once
        family.latents(model, "euler", "normal", 2)
    times = time_alternating({label: functools.partial(call, label) for label in chosen}, rounds, warmup=0, clock=clock)
    made = {label: family.pictures(x) for label, x in latents.items()}
    rows = []
    summary: dict[str, float] = {}
    over = []
    for label, (row, _) in chosen.items():
        row = {
            "part": "quality",
            "setting": label,
            "sampler": "dpmpp_2m",
            "scheduler": "karras",
            "steps": 25,
            **row,
            "time_over_large": round(ratio(times, label, "large"), 4),
            "top1": family.top1(made[label]),
        }
        if label != "large":
            quality = psnr(made[label], made["large"]).clamp(max=80)
            row |= {
                "psnr": round(float(quality.mean()), 3),
                "psnr_se": round(float(quality.std() / math.sqrt(len(quality))), 3),
                "ssim": round(float(ssim(made[label], made["large"]).mean()), 4),
            }
        if "at" in row and "crossfade" not in row:
            order = ("small", "large") if row["small_first"] else ("large", "small")
            over.append(over_parts(times, label, *order, row["at"]))
            row["over_sum_of_parts"] = round(over[-1], 4)
        rows.append(row)
        key = row.get("preset", label if label in ("large", "small") else None)
        if key:
            summary |= {
                f"{key.lower()}_{name}": row[name] for name in ("time_over_large", "psnr", "top1") if name in row
            }
        print(
            "  ".join(
                f"{v:>8}" if not isinstance(v, str) else f"{v:42}"
                for v in (
                    label,
                    row["time_over_large"],
                    row.get("psnr", ""),
                    row.get("ssim", ""),
                    round(row["top1"], 3),
                )
            ),
            flush=True,
        )
    return {"switch_overhead_emoji": statistics.median(over) - 1} | summary, rows


def draw(rows: list[dict], path: Path) -> None:
    """Similarity and recognition against time, for either order of the two UNets."""
    if (plt := pyplot()) is None:
        return

    rows = [row for row in rows if row["part"] == "quality"]
    ends = {row["setting"]: row for row in rows if row["setting"] in ("large", "small")}
    orders = {True: ("#d1495b", "small UNet first"), False: ("#2b59c3", "large UNet first")}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharex=True)
    for ax, key, title in zip(
        axes, ("psnr", "top1"), ("PSNR to the large UNet's pictures (dB)", "emoji recognised (top 1)"), strict=True
    ):
        for small_first, (colour, label) in orders.items():
            line = [row for row in rows if row.get("small_first") == small_first and "crossfade" not in row]
            line = sorted([*line, *(end for end in ends.values() if key in end)], key=lambda row: row["small_share"])
            ax.plot(
                [r["time_over_large"] for r in line],
                [r[key] for r in line],
                color=colour,
                marker="o",
                ms=4,
                lw=1.6,
                label=label,
            )
            for row in line:
                if "preset" in row:
                    ax.annotate(
                        row["preset"],
                        (row["time_over_large"], row[key]),
                        xytext=(0, 8),
                        textcoords="offset points",
                        ha="center",
                        color=colour,
                        weight="bold",
                    )
        for row in rows:
            if "crossfade" in row:
                ax.scatter(
                    row["time_over_large"],
                    row[key],
                    marker="D",
                    s=26,
                    facecolor="none",
                    edgecolor=orders[True][0],
                    label=f"S1 with a cross-fade over {row['crossfade']} steps",
                )
        for name, end in ends.items():
            if key in end:
                ax.scatter(end["time_over_large"], end[key], color="#333a45", s=34, zorder=3)
                ax.annotate(
                    f"{name} UNet alone",
                    (end["time_over_large"], end[key]),
                    xytext=(0, -15),
                    textcoords="offset points",
                    ha="left" if name == "small" else "right",
                    color="#333a45",
                )
        ax.set(title=title, xlabel="time, relative to the large UNet alone")
        ax.margins(y=0.15)
        if key == "top1":
            ax.set_ylim(min(0.9, *(row[key] - 0.05 for row in rows)), 1.03)
        ax.grid(True, alpha=0.25)
    axes[0].legend(frameon=False)
    figure.suptitle(f"Emoji teacher and its M2 pack, {rows[0]['steps']} steps: who begins, and for how long")
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["cost", "quality"], default=["cost", "quality"])
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default=None, help="of SD1.5; by default fp16 on CUDA and bf16 on a CPU"
    )
    parser.add_argument("--steps", type=int, default=4, help="of SD1.5")
    parser.add_argument("--cost-rounds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1, help="of the quality part")
    parser.add_argument("--pictures", type=int, default=32)
    add_common_arguments(parser)
    args, host, device, clock = begin(parser)
    summary: dict[str, float] = {}
    rows: list[dict] = []
    if "cost" in args.parts:
        summary, rows = bench_full_size(
            args.dtype or ("fp16" if device.type == "cuda" else "bf16"), args.steps, args.cost_rounds, device, clock
        )
    if "quality" in args.parts:
        found, more = bench_quality(args.pictures, args.rounds, clock)
        draw(more, ROOT / "docs" / "switch.png")
        summary, rows = summary | found, rows + more
    command = command_line("switch")
    summary, rows = beside_earlier("switch", summary, rows, command, lambda row: row["part"] == "quality")
    record("switch", summary, rows, command, host, args.notes)


if __name__ == "__main__":
    main()
