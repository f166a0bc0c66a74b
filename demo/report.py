"""What the demo measured: report.json, compare.png and the summary on the screen."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from asdm_core import measure
from asdm_core.architecture import Architecture
from asdm_core.pictures import HEAT_HEAD, INK, PAPER, QUIET, Row, finite, fitted, font, grid, heat_map, likeness, shown
from demo.job import SIDES, Job, by_title
from demo.timing import TimedRun

Runs = Mapping[str, Sequence[TimedRun]]
GROUPS = 2  # prompts side by side on the sheet


def image_name(side: str, index: int) -> str:
    return f"{index + 1:02}-{side}.png"


def clear_results(folder: Path) -> None:
    """Remove the results of an earlier run, so that all that lies there is of this one."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in ("??-[a-d].png", "compare.png", "headline.png", "report.json"):
        for file in folder.glob(pattern):
            file.unlink()


def seconds_per_step(runs: Sequence[TimedRun], full_step: float) -> float:
    """Seconds per step of a whole run, the median over all pictures.

    full_step: of a step that computes everything, as the first one of a run does, which is not timed.
    """
    return statistics.median((full_step + sum(run.step_seconds)) / (1 + len(run.step_seconds)) for run in runs)


def full_step(runs: Sequence[TimedRun]) -> float:
    """Seconds of a step that computes everything, from runs of nothing else; the median over all pictures."""
    return statistics.median(statistics.mean(run.step_seconds) for run in runs)


def write_results(
    job: Job, networks: Mapping[str, Architecture], runs: Runs, system: Mapping, output: Path
) -> dict[str, Any]:
    """Measure the images in ``output``, write compare.png, headline.png and report.json there, return the report.

    system: the host's answer to /system_stats. `a`, `b`, `speedup`, `psnr` and `ssim` of the report are the headline's;
    `variants` has an entry for each of the others, B among them.
    """
    images = {side: [_open(output / image_name(side, i)) for i in range(len(job.prompts))] for side in job.sides}
    sides = {side: _side(side, job, networks[side], runs) for side in job.sides}
    variants = [_variant(side, job, sides, images) for side in job.variants]
    headline, sampler = variants[0], by_title(job.graph("a", 0))["Sampler"]["inputs"]
    report = {
        "checkpoint": job.checkpoint.name,
        "pack": job.pack and job.pack.name,
        "addition": headline["addition"],
        "prompts": list(job.prompts),
        "negative_prompt": job.negative,
        "seeds": [i + 1 for i in range(len(job.prompts))],
        "width": job.size,
        "height": job.size,
        **{key: sampler[key] for key in ("steps", "cfg", "sampler_name", "scheduler")},
        **{key: headline[key] for key in ("speedup", "psnr", "ssim", "psnr_values", "ssim_values")},
        **{side: sides[side] for side in SIDES},
        "variants": variants,
        "host": {
            "comfyui": system["system"]["comfyui_version"],
            "torch": system["system"]["pytorch_version"],
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": system["devices"][0]["name"],
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        },
    }
    draw_comparison(report, images).save(output / "compare.png")
    draw_headline(report, images).save(output / "headline.png")
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return report


def _variant(side: str, job: Job, sides: Mapping[str, Mapping], images: Mapping[str, Sequence[Image.Image]]) -> dict:
    """One side against A: how much faster, how much less work, how alike."""
    psnr, ssim = [], []
    for a, b in zip(images["a"], images[side], strict=True):
        psnr.append(finite(float(measure.psnr(to_tensor(a), to_tensor(b)))))
        ssim.append(float(measure.ssim(to_tensor(a), to_tensor(b))))
    unlike = [value for value in psnr if value is not None]
    return {
        "side": side,
        "addition": job.addition(side),
        "purpose": purpose(job, side),
        "speedup": sides["a"]["seconds_per_step"]["whole_run"] / sides[side]["seconds_per_step"]["whole_run"],
        "macs_share": sides[side]["unet_macs"] / sides["a"]["unet_macs"],
        # Equal pairs have none; with a mean over the others the whole never looks more alike than it is.
        "psnr": statistics.mean(unlike) if unlike else None,
        "ssim": statistics.mean(ssim),
        "psnr_values": psnr,
        "ssim_values": ssim,
        **sides[side],
    }


def purpose(job: Job, side: str) -> str:
    """What a variant is for, in a sentence."""
    variant = job.variants[side]
    if variant.likeness and variant.pack:
        return "both at once: the least work, and the pack's rougher picture"
    if variant.likeness:
        return "needs no training and works on any checkpoint; steps that can be foretold are not computed"
    return "a smaller trained UNet: every step gets cheaper and the file smaller, and it paints its own picture"


def _side(side: str, job: Job, network: Architecture, runs: Runs) -> dict[str, Any]:
    latent = job.size // 8
    cost = measure.total(measure.costs(network, latent, latent))
    made = statistics.mean(run.made for run in runs[side])
    values = [seconds for run in runs[side] for seconds in run.step_seconds]
    return {
        "seconds_per_step": {
            "median": statistics.median(values),
            "whole_run": seconds_per_step(runs[side], full_step(runs[job.bare(side)])),
            "values": values,
        },
        "evaluations_made": made,
        "unet_params": cost.params,
        "unet_macs": round(cost.total * made),
        "images": [image_name(side, i) for i in range(len(job.prompts))],
    }


def _open(file: Path) -> Image.Image:
    return Image.open(file).convert("RGB")


def to_tensor(image: Image.Image) -> torch.Tensor:
    """(1, 3, H, W) in 0 ... 1"""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)[None]


# texts ------------------------------------------------------------------------------------------


ALIKE = 30  # dB from which on two pictures of the family look the same side by side


def alike(variant: Mapping) -> bool:
    return variant["psnr"] is None or variant["psnr"] >= ALIKE


def likeness_of(variant: Mapping) -> str:
    """The mean over all pictures, and the one that is furthest off: "PSNR 34.5 dB, SSIM 0.99, the furthest 25.4 dB"."""
    unlike = [value for value in variant["psnr_values"] if value is not None]
    return likeness(variant["psnr"], variant["ssim"]) + (f", the furthest {min(unlike):.1f} dB" if unlike else "")


def headline(variant: Mapping) -> str:
    """ "B is 2.10 times faster, the same picture: 54% fewer multiplications"."""
    factor = variant["speedup"]
    verdict = f"{factor:.2f} times faster" if factor >= 1 else f"{1 / factor:.2f} times slower"
    same = ", the same picture" if alike(variant) else ""
    return f"{variant['side'].upper()} is {verdict}{same}: {1 - variant['macs_share']:.0%} fewer multiplications"


def draw_comparison(report: Mapping, images: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """One labelled grid below the other: each variant beside A."""
    host = report["host"]
    settings = (
        f"{report['steps']} steps, CFG {report['cfg']:g}, {report['sampler_name']}, {report['width']} x "
        f"{report['height']}, same seeds; ComfyUI {host['comfyui']}, torch {host['torch']}, {host['device']}"
    )
    sheets = []
    for variant in report["variants"]:
        side, rows = variant["side"], []
        for i, prompt in enumerate(report["prompts"]):
            pair = images["a"][i], images[side][i]
            like = likeness(variant["psnr_values"][i], variant["ssim_values"][i])
            rows.append(Row((*pair, heat_map(*pair)), prompt, like))
        a, b = (1000 * of["seconds_per_step"]["whole_run"] for of in (report["a"], variant))
        subtitle = (
            f"{variant['addition']}: {variant['purpose']}\n"
            f"{a:.1f} ms to {b:.1f} ms per step, medians over all pictures; against A: "
            f"{likeness_of(variant)}\n{settings}"
        )
        heads = [f"A  {Path(report['checkpoint']).stem}", f"{side.upper()}  {variant['addition']}", HEAT_HEAD]
        sheets.append(grid(headline(variant), subtitle, heads, rows, groups=GROUPS))
    whole = Image.new("RGB", (sheets[0].width, sum(sheet.height for sheet in sheets)), PAPER)
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


def draw_headline(report: Mapping, images: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """The headline alone, wide and low: all pictures of A above those of B."""
    variant = report["variants"][0]
    cell, gap, margin, over = 128, 6, 24, 64
    count = len(report["prompts"])
    labels = 150
    sheet = Image.new("RGB", (2 * margin + labels + count * (cell + gap), over + 2 * (cell + gap) + margin), PAPER)
    draw = ImageDraw.Draw(sheet)
    # In multiplications, which are the same everywhere; times are of this machine.
    same = ", the same picture" if alike(variant) else ""
    against = (
        f"{variant['side'].upper()}: {1 - variant['macs_share']:.0%} fewer multiplications{same} "
        f"({likeness_of(variant)})"
    )
    draw.text((margin, 20), fitted(draw, against, 27, sheet.width - 2 * margin), INK, font(27))
    names = (("a", "in full"), (variant["side"], variant["addition"]))
    for row, (side, name) in enumerate(names):
        top = over + row * (cell + gap)
        draw.text((margin, top + cell // 2 - 28), side.upper(), INK, font(30))
        for line, words in enumerate(name.split(" (")):
            draw.text((margin, top + cell // 2 + 8 + 18 * line), words.rstrip(")"), QUIET, font(15))
        for i, picture in enumerate(images[side]):
            sheet.paste(shown(picture, (cell, cell)), (margin + labels + i * (cell + gap), top))
    return sheet


def summary(report: Mapping, output: Path) -> str:
    """What a person reads at the end."""
    lines = ["", f"     {'parameters':>13}{'MACs, batch 1':>16}{'s per step':>13}   UNet"]
    named = [("a", report["a"], report["checkpoint"])]
    named += [(of["side"], of, f"{report['checkpoint']} + {of['addition']}") for of in report["variants"]]
    for side, row, name in named:
        lines.append(
            f"  {side.upper()}  {row['unet_params'] / 1e6:>11.2f} M{row['unet_macs'] / 1e9:>14.3f} G"
            f"{row['seconds_per_step']['whole_run']:>13.4f}   {name}"
        )
    for variant in report["variants"]:
        lines += ["", f"  {headline(variant)}", f"     against A: {likeness_of(variant)}; {variant['purpose']}"]
    lines += ["", f"  {output / 'compare.png'}", f"  {output / 'headline.png'}", f"  {output / 'report.json'}"]
    return "\n".join(lines)
