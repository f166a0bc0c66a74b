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

from asdm_core import measure
from asdm_core.inheritance import step_macs
from asdm_core.pictures import HEAT_HEAD, Row, finite, grid, heat_map, likeness
from demo.job import SIDES, Job, Work, by_title
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


def seconds_per_step(runs: Sequence[TimedRun], full: Sequence[bool]) -> float:
    """Seconds per step of a whole run: the median of all steps, or of full and inherited ones each, by their share of
    the run.

    full: for each step whether it computes in full. The median of all steps together would be that of the more frequent
    kind.
    """
    timed = [(seconds, kind) for run in runs for seconds, kind in zip(run.step_seconds, full[1:], strict=True)]
    return sum(
        full.count(kind) / len(full) * statistics.median(seconds for seconds, of in timed if of is kind)
        for kind in set(full)
    )


def write_results(job: Job, work: Mapping[str, Work], runs: Runs, system: Mapping, output: Path) -> dict:
    """Measure the images in ``output``, write compare.png and report.json there, return the report.

    system: the host's answer to /system_stats.
    """
    full = {side: work[side].full_steps(job.steps) for side in SIDES}
    images = {side: [_open(output / image_name(side, i)) for i in range(len(job.prompts))] for side in SIDES}
    psnr, ssim = [], []
    for a, b in zip(images["a"], images["b"], strict=True):
        psnr.append(finite(float(measure.psnr(_tensor(a), _tensor(b)))))
        ssim.append(float(measure.ssim(_tensor(a), _tensor(b))))
    sampler = by_title(job.graph("a", 0))["Sampler"]["inputs"]
    report = {
        "checkpoint": job.checkpoint.name,
        "pack": job.pack and job.pack.name,
        "addition": job.addition,
        "prompts": list(job.prompts),
        "negative_prompt": job.negative,
        "seeds": [i + 1 for i in range(len(job.prompts))],
        "width": job.size,
        "height": job.size,
        **{key: sampler[key] for key in ("steps", "cfg", "sampler_name", "scheduler")},
        "speedup": seconds_per_step(runs["a"], full["a"]) / seconds_per_step(runs["b"], full["b"]),
        # Equal pairs have none; with a mean over the others the whole never looks more alike than it is.
        "psnr": statistics.mean(unlike) if (unlike := [value for value in psnr if value is not None]) else None,
        "ssim": statistics.mean(ssim),
        "psnr_values": psnr,
        "ssim_values": ssim,
        **{side: _side(side, job, work[side], runs[side]) for side in SIDES},
        "host": {
            "comfyui": system["system"]["comfyui_version"],
            "torch": system["system"]["pytorch_version"],
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": system["devices"][0]["name"],
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        },
    }
    times = {side: [seconds_per_step([run], full[side]) for run in runs[side]] for side in SIDES}
    draw_comparison(report, images, times).save(output / "compare.png")
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return report


def _side(side: str, job: Job, work: Work, runs: Sequence[TimedRun]) -> dict:
    latent = job.size // 8
    full = work.full_steps(job.steps)
    cost = measure.total(measure.costs(work.architecture, latent, latent))
    inherited = step_macs(work.plan, work.architecture, latent, latent)[1] if work.plan else 0
    values = [seconds for run in runs for seconds in run.step_seconds]
    return {
        "seconds_per_step": {
            "median": statistics.median(values),
            "whole_run": seconds_per_step(runs, full),
            "values": values,
        },
        "full_steps": sum(full),
        "unet_params": cost.params,
        "unet_macs": round((cost.total * full.count(True) + inherited * full.count(False)) / len(full)),
        "images": [image_name(side, i) for i in range(len(job.prompts))],
    }


def _open(file: Path) -> Image.Image:
    return Image.open(file).convert("RGB")


def _tensor(image: Image.Image) -> torch.Tensor:
    """(1, 3, H, W) in 0 ... 1"""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)[None]


# texts ------------------------------------------------------------------------------------------


def headline(report: Mapping) -> str:
    a, b = (1000 * report[side]["seconds_per_step"]["whole_run"] for side in SIDES)
    factor = report["speedup"]
    verdict = f"{factor:.2f} times faster" if factor >= 1 else f"{1 / factor:.2f} times slower"
    return f"B is {verdict} per step: {a:.1f} ms to {b:.1f} ms"


def draw_comparison(
    report: Mapping, images: Mapping[str, Sequence[Image.Image]], times: Mapping[str, Sequence[float]]
) -> Image.Image:
    """The labelled grid of a report. times: seconds per step of each run, by side."""
    rows = []
    for i, prompt in enumerate(report["prompts"]):
        a, b = (1000 * times[side][i] for side in SIDES)
        like = likeness(report["psnr_values"][i], report["ssim_values"][i])
        pair = images["a"][i], images["b"][i]
        rows.append(Row((*pair, heat_map(*pair)), prompt, f"{a:.0f} to {b:.0f} ms per step, {like}"))
    host = report["host"]
    subtitle = (
        f"{report['steps']} steps, CFG {report['cfg']:g}, {report['sampler_name']}, {report['width']} x "
        f"{report['height']}, "
        f"same seeds; B against A: {likeness(report['psnr'], report['ssim'])}; "
        f"ComfyUI {host['comfyui']}, torch {host['torch']}, {host['device']}"
    )
    heads = [f"A  {Path(report['checkpoint']).stem}", f"B  with {report['addition']}", HEAT_HEAD]
    return grid(headline(report), subtitle, heads, rows, groups=GROUPS)


def summary(report: Mapping, output: Path) -> str:
    """What a person reads at the end."""
    lines = ["", f"     {'parameters':>13}{'MACs, batch 1':>16}{'s per step':>13}   UNet"]
    names = (report["checkpoint"], f"{report['checkpoint']} + {report['addition']}")
    for side, name in zip(SIDES, names, strict=True):
        row = report[side]
        lines.append(
            f"  {side.upper()}  {row['unet_params'] / 1e6:>11.2f} M{row['unet_macs'] / 1e9:>14.3f} G"
            f"{row['seconds_per_step']['whole_run']:>13.4f}   {name}"
        )
    lines += ["", f"  {headline(report)}", f"  B against A: {likeness(report['psnr'], report['ssim'])}"]
    lines += ["", f"  {output / 'compare.png'}", f"  {output / 'report.json'}"]
    return "\n".join(lines)
