"""What the demo measured: report.json, compare.png and the summary on the screen."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from asdm_core import measure, packs
from asdm_core.architecture import Architecture
from asdm_core.pictures import HEAT_HEAD, Row, finite, grid, heat_map, likeness
from demo.job import SIDES, Job, by_title
from demo.timing import TimedRun

Runs = Mapping[str, Sequence[TimedRun]]
GROUPS = 2  # prompts side by side on the sheet


def image_name(side: str, index: int) -> str:
    return f"{index + 1:02}-{side}.png"


def clear_results(folder: Path) -> None:
    """Remove the results of an earlier run, so that all that lies there is of this one."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in ("??-[ab].png", "compare.png", "report.json"):
        for file in folder.glob(pattern):
            file.unlink()


def unet_architectures(job: Job) -> dict[str, Architecture]:
    """What is computed per UNet call on each side: all of the checkpoint, and what the pack leaves of it.

    Raises packs.BadFile when the pack is none.
    """
    pack = packs.open_pack(job.pack).description.architecture
    return {"a": Architecture.full(pack.config), "b": pack}


def median_step(runs: Sequence[TimedRun]) -> float:
    return statistics.median(seconds for run in runs for seconds in run.step_seconds)


def write_results(job: Job, architectures: Mapping[str, Architecture], runs: Runs, system: Mapping, output: Path) -> dict:
    """Measure the images in ``output``, write compare.png and report.json there, return the report.

    system: the host's answer to /system_stats.
    """
    images = {side: [_open(output / image_name(side, i)) for i in range(len(job.prompts))] for side in SIDES}
    psnr, ssim = [], []
    for a, b in zip(images["a"], images["b"], strict=True):
        psnr.append(finite(float(measure.psnr(_tensor(a), _tensor(b)))))
        ssim.append(float(measure.ssim(_tensor(a), _tensor(b))))
    sampler = by_title(job.graph("a", 0))["Sampler"]["inputs"]
    report = {
        "checkpoint": job.checkpoint.name,
        "pack": job.pack.name,
        "prompts": list(job.prompts),
        "negative_prompt": job.negative,
        "seeds": [i + 1 for i in range(len(job.prompts))],
        "width": job.size,
        "height": job.size,
        **{key: sampler[key] for key in ("steps", "cfg", "sampler_name", "scheduler")},
        "speedup": median_step(runs["a"]) / median_step(runs["b"]),
        "psnr": None if None in psnr else statistics.mean(psnr),
        "ssim": statistics.mean(ssim),
        "psnr_values": psnr,
        "ssim_values": ssim,
        **{side: _side(side, job, architectures[side], runs[side]) for side in SIDES},
        "host": {
            "comfyui": system["system"]["comfyui_version"],
            "torch": system["system"]["pytorch_version"],
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": system["devices"][0]["name"],
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        },
    }
    draw_comparison(report, images, runs).save(output / "compare.png")
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return report


def _side(side: str, job: Job, architecture: Architecture, runs: Sequence[TimedRun]) -> dict:
    latent = job.size // 8
    cost = measure.total(measure.costs(architecture, latent, latent))
    return {
        "seconds_per_step": {
            "median": median_step(runs),
            "values": [seconds for run in runs for seconds in run.step_seconds],
        },
        "unet_params": cost.params,
        "unet_macs": cost.total,
        "images": [image_name(side, i) for i in range(len(job.prompts))],
    }


def _open(file: Path) -> Image.Image:
    return Image.open(file).convert("RGB")


def _tensor(image: Image.Image) -> torch.Tensor:
    """(1, 3, H, W) in 0 ... 1"""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)[None]


# texts ------------------------------------------------------------------------------------------


def headline(report: Mapping) -> str:
    a, b = (1000 * report[side]["seconds_per_step"]["median"] for side in SIDES)
    factor = report["speedup"]
    verdict = f"{factor:.2f} times faster" if factor >= 1 else f"{1 / factor:.2f} times slower"
    return f"B is {verdict} per step: {a:.1f} ms to {b:.1f} ms"


def draw_comparison(report: Mapping, images: Mapping[str, Sequence[Image.Image]], runs: Runs) -> Image.Image:
    """The labelled grid of a report."""
    rows = []
    for i, prompt in enumerate(report["prompts"]):
        a, b = (1000 * median_step([runs[side][i]]) for side in SIDES)
        like = likeness(report["psnr_values"][i], report["ssim_values"][i])
        pair = images["a"][i], images["b"][i]
        rows.append(Row((*pair, heat_map(*pair)), prompt, f"{a:.0f} to {b:.0f} ms per step, {like}"))
    host = report["host"]
    subtitle = (
        f"{report['steps']} steps, CFG {report['cfg']:g}, {report['sampler_name']}, {report['width']} x {report['height']}, "
        f"same seeds; B against A: {likeness(report['psnr'], report['ssim'])}; "
        f"ComfyUI {host['comfyui']}, torch {host['torch']}, {host['device']}"
    )
    heads = [f"A  {Path(report['checkpoint']).stem}", f"B  with {Path(report['pack']).stem}", HEAT_HEAD]
    return grid(headline(report), subtitle, heads, rows, groups=GROUPS)


def summary(report: Mapping, output: Path) -> str:
    """What a person reads at the end."""
    lines = ["", f"     {'parameters':>13}{'MACs, batch 1':>16}{'s per step':>13}   UNet"]
    names = (report["checkpoint"], f"{report['checkpoint']} + {report['pack']}")
    for side, name in zip(SIDES, names, strict=True):
        row = report[side]
        lines.append(
            f"  {side.upper()}  {row['unet_params'] / 1e6:>11.2f} M{row['unet_macs'] / 1e9:>14.3f} G"
            f"{row['seconds_per_step']['median']:>13.4f}   {name}"
        )
    lines += ["", f"  {headline(report)}", f"  B against A: {likeness(report['psnr'], report['ssim'])}"]
    lines += ["", f"  {output / 'compare.png'}", f"  {output / 'report.json'}"]
    return "\n".join(lines)
