"""The numbers of the family: the gate, the codec and the finetune. Packs and students are bench/tables.py's.

    python -m train.emoji.evaluate codec teacher openmoji

Every part writes its rows to the runs folder; the parts made so far are gathered in
models/emoji/report.json. Pictures are drawn with 20 DDIM steps at CFG 3.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asdm_core.measure import psnr

from ..metrics import standard_error
from .captions import held_out, prompt
from .classifier import load_classifier, top_k
from .codec import load_codec, psnr_of
from .data import Glyphs, Variant, draw, load_glyphs
from .render import BACKGROUNDS
from .sources import STYLES
from .teacher import TEACHER_STYLES, codec_images, sample_latents
from .text import Tokens, host_folder, load_text
from ..progress import Progress, plain_errors
from .training import add_common_arguments, start
from ..figures import save_grid
from .unet import load_unet

STEPS, CFG, SEEDS = 20, 3.0, 4
GATE = {"emoji": 320, "top1": 0.80, "top5": 0.95, "codec_psnr": 25.0}


# Metrics --------------------------------------------------------------------------------------------


def background_of(images: Tensor) -> list[str]:
    """The background colour each picture is nearest to, from its outermost pixels (the corners)."""
    corners = torch.stack([images[..., y, x] for y in (1, -2) for x in (1, -2)]).median(0).values  # (B, 3)
    table = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32) / 255
    return [list(BACKGROUNDS)[i] for i in torch.cdist(corners, table).argmin(1).tolist()]


# Parts ----------------------------------------------------------------------------------------------


class Family:
    """Everything a part needs, loaded from the finished files."""

    def __init__(self, args: argparse.Namespace):
        self.models = args.models
        self.runs = args.runs
        self.glyphs: Glyphs = load_glyphs(args.runs)
        self.concepts = self.glyphs.concepts
        self.codec = load_codec(args.models)
        self.classifier = load_classifier(args.models, [c.code for c in self.concepts])
        self.chosen = list(range(len(self.concepts)))[: args.limit]

    def text(self, host: str | None) -> None:
        self.encoder = load_text(self.models / "emoji-text.safetensors")
        self.tokens = Tokens(host_folder(host), ids=self.encoder.ids.tolist())

    def unet(self, name: str) -> nn.Module:
        return load_unet(self.models / f"emoji-{name}.safetensors")

    def draw(self, label: str, unet: nn.Module, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        progress = Progress(label, len(prompts))
        unet = copy.deepcopy(unet).bfloat16()  # twice as fast on a CPU; the sampler and the text stay in float32
        latents = sample_latents(
            unet, self.encoder, self.tokens, list(prompts), list(seeds), STEPS, CFG, progress=progress
        )
        progress.end()
        return codec_images(self.codec, latents)

    def recognised(self, images: Tensor, concepts: Sequence[int]) -> dict:
        first, five = top_k(self.classifier, images, torch.tensor(list(concepts)))
        return {
            "top1": round(float(first.float().mean()), 4),
            "top5": round(float(five.float().mean()), 4),
            "pictures": len(images),
        }


def codec_part(f: Family) -> list[dict]:
    """PSNR of the codec, and the ceiling of the classifier: real glyphs after the codec."""
    rows = []
    for style in STYLES:
        chosen = [Variant(i, style, list(BACKGROUNDS)[i % 6], 0) for i in range(len(f.concepts))]
        images = []
        measured = []
        for i in range(0, len(chosen), 32):
            x = draw(f.glyphs, chosen[i : i + 32], seed=10**6, wild=True)  # jitter no training picture had
            measured.append(psnr_of(f.codec, x))
            with torch.no_grad():
                images.append(f.codec.decode(f.codec.encode(x)))
        quality = torch.cat(measured)
        rows.append(
            {
                "row": f"codec, {style}",
                "psnr": round(float(quality.mean()), 2),
                "psnr_se": round(standard_error(quality), 2),
            }
            | f.recognised(torch.cat(images), [v.concept for v in chosen])
        )
    return rows


def unet_part(f: Family, name: str, styles: tuple[str, ...], seeds: int) -> list[dict]:
    """Recognition with plain prompts, diversity of seeds, held-out pairs."""
    unet = f.unet(name)
    every = f.chosen
    images = []
    for seed in range(seeds):
        images.append(
            f.draw(
                f"{name}, seed {seed}", unet, [prompt(f.concepts[i]) for i in every], [1000 * seed + i for i in every]
            )
        )
        save_grid(f.runs / f"grid-{name}-{seed}.png", images[-1], columns=24, scale=0.5)
    rows = [{"row": f"{name}, plain prompts", "emoji": len(every)} | f.recognised(torch.cat(images), every * seeds)]
    per_concept = torch.stack([top_k(f.classifier, x, torch.tensor(every))[0] for x in images]).float().mean(0)
    rows[0]["never_recognised"] = [f.concepts[i].name for k, i in enumerate(every) if per_concept[k] == 0]
    if seeds > 1:
        alike = psnr(images[0], images[1])
        rows.append(
            {
                "row": f"{name}, two seeds of one prompt",
                "psnr": round(float(alike.mean()), 2),
                "psnr_se": round(standard_error(alike), 2),
            }
        )
    pairs = [(i, s) for s in styles for i in every if held_out(f.concepts[i].code, "style", s)]
    for label, chosen in (
        ("held-out (concept, style)", pairs),
        ("same styles, trained pairs", [(i, next(t for t in styles if t != s)) for i, s in pairs if len(styles) > 1]),
    ):
        if chosen:
            x = f.draw(label, unet, [prompt(f.concepts[i], style=s) for i, s in chosen], [5000 + i for i, _ in chosen])
            rows.append({"row": f"{name}, {label}"} | f.recognised(x, [i for i, _ in chosen]))
    for label, wanted in (("held-out (concept, background)", True), ("trained (concept, background)", False)):
        chosen = []
        for i in every:
            fitting = [b for b in BACKGROUNDS if held_out(f.concepts[i].code, "background", b) == wanted]
            if fitting and i % 2 == 0:
                chosen.append((i, fitting[i // 2 % len(fitting)]))
        x = f.draw(label, unet, [prompt(f.concepts[i], background=b) for i, b in chosen], [6000 + i for i, _ in chosen])
        obeyed = sum(a == b for a, (_, b) in zip(background_of(x), chosen, strict=True)) / len(chosen)
        rows.append(
            {"row": f"{name}, {label}"}
            | f.recognised(x, [i for i, _ in chosen])
            | {"background_obeyed": round(obeyed, 4)}
        )
    return rows


PARTS: dict[str, Callable[[Family], list[dict]]] = {
    "codec": codec_part,
    "teacher": lambda f: unet_part(f, "teacher", TEACHER_STYLES, SEEDS),
    "openmoji": lambda f: unet_part(f, "openmoji", ("openmoji",), 1),
}


# The report -----------------------------------------------------------------------------------------


def versions() -> dict:
    import diffusers
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }


def machine() -> dict:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = lines[0] if lines else model
    return {"cpu": model, "cores": os.cpu_count(), "threads_used": torch.get_num_threads()}


def summary(parts: dict[str, list[dict]]) -> dict:
    """The gate, as far as its parts are there."""
    result: dict[str, Any] = {}
    rows = {row["row"]: row for part in parts.values() for row in part}
    gate = rows.get("teacher, plain prompts")
    if gate:
        result |= {name: gate[name] for name in ("emoji", "top1", "top5")}
        result["gate_met"] = all(gate[name] >= GATE[name] for name in ("emoji", "top1", "top5"))
    ceiling = [rows[f"codec, {s}"] for s in TEACHER_STYLES if f"codec, {s}" in rows]
    if ceiling:
        codec = [rows[f"codec, {s}"]["psnr"] for s in STYLES]
        result |= {
            "ceiling_top1": round(sum(r["top1"] for r in ceiling) / len(ceiling), 4),
            "ceiling_top5": round(sum(r["top5"] for r in ceiling) / len(ceiling), 4),
            "codec_psnr": round(sum(codec) / len(codec), 2),
        }
        result["codec_gate_met"] = result["codec_psnr"] >= GATE["codec_psnr"]
    return result


def table(rows: Sequence[dict]) -> str:
    """The rows as a Markdown table, for models/README.md."""

    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    lines = ["| measured on | pictures | top-1 | top-5 | more |", "|---|---|---|---|---|"]
    for row in rows:
        more = []
        if "psnr" in row:
            what = "between the two" if "seeds" in row["row"] else "of the codec"
            more.append(f"PSNR {what} {row['psnr']:.2f} +- {row['psnr_se']:.2f} dB")
        more += [f"background as asked {row['background_obeyed']:.1%}"] if "background_obeyed" in row else []
        lines.append(
            f"| {row['row']} | {row.get('pictures', '')} | {percent(row.get('top1'))} | {percent(row.get('top5'))} | "
            f"{'; '.join(more)} |"
        )
    return "\n".join(lines)


@plain_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, training=False)
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--host", help="ComfyUI folder, for the CLIP tokeniser")
    parser.add_argument("--limit", type=int, help="only so many concepts, for a quick look; writes no report")
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        raise ValueError(f"unknown part {min(unknown)}; parts are {', '.join(PARTS)}")
    start(args)
    family = Family(args)
    if set(args.parts) - {"codec"}:
        family.text(args.host)
    folder = args.runs / "report"
    folder.mkdir(exist_ok=True)
    for part in args.parts:
        began = time.monotonic()
        rows = PARTS[part](family)
        for row in rows:
            print(json.dumps(row))
        if not args.limit:
            (folder / f"{part}.json").write_text(
                json.dumps({"rows": rows, "minutes": round((time.monotonic() - began) / 60, 1)})
            )
    if args.limit:
        return
    done = {
        part: json.loads((folder / f"{part}.json").read_text()) for part in PARTS if (folder / f"{part}.json").exists()
    }
    rows = [row for d in done.values() for row in d["rows"]]
    report = {
        "command": f"python -m train.emoji.evaluate {' '.join(done)}",
        "machine": machine(),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "settings": {
            "steps": STEPS,
            "cfg": CFG,
            "seeds": SEEDS,
            "sampler": "DDIM",
            "drawn_in": "bfloat16",
            "gate": GATE,
        },
        "minutes": {part: d["minutes"] for part, d in done.items()},
        "summary": summary({part: d["rows"] for part, d in done.items()}),
        "rows": rows,
    }
    (args.models / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(table(rows))
    print(json.dumps(report["summary"], indent=1), file=sys.stderr)


if __name__ == "__main__":
    main()
