"""How much of a finetune's style a pack leaves: packs and LoRAs in OpenMoji, which no training of theirs ever saw.

    python bootstrap.py bench NAME=style ARGS="--minutes 1 3 10 --speed 9 --grid"

The reference is OpenMoji's own run of 4 steps (dpmpp_2m, simple, CFG 3) from the same noise; packs are drawn with 3
steps of the same, few-step LoRAs as their metadata say. Beside them the finetune's own fewer steps, and M2 in the
teacher, against the teacher's own run, for what it loses there by being a difference or trained over many styles. A
fit begins at M2 as it ships and learns from the names of all concepts as prompts, for runs of 3 steps, 16 walks at a
time in bfloat16, for so many CPU minutes of one thread; rows of their own say what 3 minutes for runs of any number of
steps come to, and what it is worth to leave the first step to the finetune itself.

    --models DIR   the family's files; its M2, if it holds differences, is M2 over many styles
                   (train/configs/emoji-m2-styles.toml), and as one gets it without a fit
    --speed N      samples of a fit in a second against a bare step of teacher and student: N rounds, on CPU time
    --grid         docs/evidence-style.jpg
    --rows NAME    measure these rows alone, such as m2_fitted_3min

Goes into bench/results/fewstep.json and the section on style in docs/evidence.md. Latents are kept in --folder, so the
same command goes on where it stopped, and rows that are not run again stay.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from asdm_core import fit
from asdm_core.__main__ import main as convert
from asdm_core.measure import ratio, time_alternating
from asdm_core.packs import open_pack, open_unet
from bench._common import RESULTS, ROOT, beside_earlier, command_line, record
from bench._evidence_page import with_style
from bench.fewstep import Pictures, Row, few_of
from train.diffusion import ALPHAS, simple_times
from train.emoji.teacher import codec_images
from train.emoji.text import encoder_beside
from train.figures import save_grid
from train.fit import Pair
from train.progress import plain_errors

TEACHER, FINETUNE, TEXT = "emoji-teacher.safetensors", "emoji-openmoji.safetensors", "emoji-text.safetensors"
SAMPLER, CFG, STEPS = "dpmpp_2m", 3.0, 3
ANY_STEPS = 3.0  # minutes of a fit for runs of any number of steps
SHOWN = 12  # pictures of a row in the grid
WALKS = 16  # of a fit: states this small leave room for more than its default
BATCHES = 4  # steps in a round of --speed


def own(name: str, steps: int) -> Row:
    return Row(name, (), simple_times(steps), SAMPLER, CFG)


def with_pack(name: str, path: Path, whole: int = 0) -> Row:
    return Row(name, (path,), simple_times(STEPS), SAMPLER, CFG, whole)


def shipped(args: argparse.Namespace, pack: str) -> Path:
    return args.models / f"emoji-{pack}.safetensors"


def is_difference(path: Path) -> bool:
    return open_pack(path).description.difference_of is not None


def absolute(args: argparse.Namespace, pack: str) -> Path:
    """A pack of the family as the units that it plays in its teacher; made once, where it ships as differences."""
    its = shipped(args, pack)
    if not is_difference(its):
        return its
    path = args.folder / f"{pack}-absolute.safetensors"
    if not path.exists() and convert(["to-absolute", *map(str, (its, args.models / TEACHER, path)), "--dtype", "fp32"]):
        raise SystemExit(f"{pack} could not be played in its teacher")
    return path


def difference(args: argparse.Namespace, pack: str) -> Path:
    """The same as differences from its teacher, which carry nothing over; made once."""
    path = args.folder / f"{pack}-difference.safetensors"
    its = [absolute(args, pack), args.models / TEACHER, path]
    if not path.exists() and convert(["to-difference", *map(str, its), "--dtype", "fp16"]):
        raise SystemExit(f"{pack} could not be turned into differences")
    return path


def untuned(args: argparse.Namespace) -> Path:
    """M2 as one gets it for a finetune."""
    return shipped(args, "m2") if is_difference(shipped(args, "m2")) else difference(args, "m2")


def fitted(args: argparse.Namespace, prompts: list[str], minutes: float, steps: int) -> Path:
    """The M2 pack as it ships, fitted to the finetune for so long, for runs of so many steps; made once."""
    path = args.folder / f"m2-fitted-{minutes:g}min-{steps}.safetensors"
    if not path.exists():
        words = args.folder / "prompts.txt"
        words.write_text("\n".join(prompts) + "\n", "utf-8")
        files = [args.models / FINETUNE, untuned(args), path]
        options = ["--prompts", words, "--size", "128", "--walks", WALKS, "--precision", "bf16"]
        options += ["--steps", steps, "--minutes", f"{minutes:g}", "--cpu", "--cpu-time"]
        command = [sys.executable, "-m", "train.emoji", "fit", *files, *options]
        subprocess.run([str(word) for word in command], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return path


def rows_of(args: argparse.Namespace, prompts: list[str]) -> Iterator[Row]:
    yield own("style_openmoji_3", 3)
    yield own("style_openmoji_2", 2)
    for pack in ("m1", "m2"):
        yield with_pack(f"style_{pack}_absolute", absolute(args, pack))
        yield with_pack(f"style_{pack}_difference", difference(args, pack))
    if is_difference(shipped(args, "m2")):
        yield with_pack("style_m2_styles", shipped(args, "m2"))
    for lora in args.lora:
        few = few_of(lora)
        if few is None:
            raise SystemExit(f"{lora.name} does not say for how many steps it was trained")
        yield Row(f"style_{few.steps}_steps_lora", (lora,), few.times, "ddim", few.cfg)
        yield Row(f"style_{few.steps}_steps_lora_m2_difference", (untuned(args), lora), few.times, "ddim", few.cfg)
    for minutes in args.minutes:
        yield with_pack(f"style_m2_fitted_{minutes:g}min", fitted(args, prompts, minutes, STEPS))
    if ANY_STEPS in args.minutes:
        yield with_pack(f"style_m2_fitted_{ANY_STEPS:g}min_any", fitted(args, prompts, ANY_STEPS, 0))
        late = fitted(args, prompts, ANY_STEPS, STEPS)
        yield with_pack(f"style_m2_fitted_{ANY_STEPS:g}min_from_second", late, whole=1)
    yield with_pack("style_m2_from_second", untuned(args), whole=1)


def in_the_teacher(args: argparse.Namespace) -> Iterator[Row]:
    yield own("style_teacher_3", 3)
    yield with_pack("style_teacher_m2_absolute", absolute(args, "m2"))
    yield with_pack("style_teacher_m2_difference", difference(args, "m2"))
    if is_difference(shipped(args, "m2")):
        yield with_pack("style_teacher_m2_styles", shipped(args, "m2"))


def summary_of(found: list[dict], styles: bool) -> dict[str, float]:
    """The measures, of the rows that are there. styles: whether M2 ships over many styles."""
    rows = {row["row"]: row for row in found}
    values: dict[str, float] = {}
    for name, row in rows.items():
        if not name.startswith("style_teacher_"):
            values |= {f"style_{key}_{name.removeprefix('style_')}": row[key] for key in ("psnr", "grad")}
    gotten = "m2_styles" if styles else "m2_difference"
    for key in ("psnr", "grad"):
        if f"style_{key}_{gotten}" in values:
            values[f"style_{key}_m2_untuned"] = values[f"style_{key}_{gotten}"]
    absolute = rows.get("style_teacher_m2_absolute")
    for name in ("difference", "styles"):
        mine = rows.get(f"style_teacher_m2_{name}")
        if absolute and mine:
            values[f"teacher_psnr_lost_by_{name}"] = absolute["psnr"] - mine["psnr"]
    return values


def speed(args: argparse.Namespace, prompts: list[str]) -> dict:
    """Samples of a fit in a CPU second against a bare step: teacher, student, backward and AdamW, on one batch."""
    torch.set_num_threads(1)
    pair = Pair(
        open_unet(args.models / FINETUNE),
        open_pack(args.models / "emoji-m2.safetensors"),
        torch.device("cpu"),
        torch.float32,
    )
    to_text = encoder_beside(args.models / TEXT)
    texts, empty = [to_text([prompt]) for prompt in prompts], to_text([""])
    networks = pair.networks(texts, empty, 128)
    settings = fit.Settings(walks=WALKS)
    learning = fit.Fit(
        *networks, pair.taps, pair.parameters, fit.Diffusion(ALPHAS, "v"), (4, 16, 16), len(prompts), settings
    )
    count = 2 * settings.walks
    x, t = torch.randn(count, 4, 16, 16), torch.arange(count) * 999 // count
    chosen = [texts[i % len(texts)] for i in range(settings.walks)]
    context = torch.cat([text.states for text in [*chosen, *[empty] * settings.walks]])
    adamw = torch.optim.AdamW(pair.parameters.values(), settings.lr)

    def bare() -> None:
        for _ in range(BATCHES):
            with torch.no_grad():
                wanted = pair.whole(x, t, context).sample
            (pair.student(x, t, context).sample - wanted).square().mean().backward()
            adamw.step()
            adamw.zero_grad()

    def fits() -> None:
        until = learning.told.steps + BATCHES
        learning.run(BATCHES, lambda: float(learning.told.steps - until + BATCHES))

    times = time_alternating({"fit": fits, "bare": bare}, args.speed, 1, clock=time.process_time)
    samples = {name: count * BATCHES / statistics.median(seconds) for name, seconds in times.items()}
    return {
        "row": "fit_speed",
        "samples_per_second": samples["fit"],
        "bare": samples["bare"],
        "share": 1 / ratio(times, "fit", "bare"),
        "all_seconds": times,
    }


def images(pictures: Pictures, row: Row) -> Tensor:
    step = max(1, len(pictures.chosen) // SHOWN)
    return codec_images(pictures.codec, pictures.latents(row, 0)[::step][:SHOWN]).clamp(0, 1)


@plain_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.style", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, nargs="*", default=[1.0, 3.0, 10.0], help="of each fit")
    parser.add_argument("--lora", type=Path, nargs="*", default=[Path("models/loras/emoji-two-steps.safetensors")])
    parser.add_argument("--speed", type=int, default=0, help="rounds of the comparison with a bare step")
    parser.add_argument("--grid", action="store_true", help="draw docs/evidence-style.jpg")
    parser.add_argument("--rows", nargs="*", help="measure these alone")
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--models", type=Path, default=Path("models/emoji"))
    parser.add_argument("--folder", type=Path, default=Path("runs/style"))
    parser.add_argument("--comfy", help="ComfyUI folder, for the CLIP tokeniser")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--notes", default="", help="kept in the record: what else the machine was doing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    finetune = Pictures(args.models, args.folder, args.prompts, 1, args.comfy, FINETUNE)
    teacher = Pictures(args.models, args.folder / "teacher", args.prompts, 1, args.comfy)
    shown, found = [], []
    for pictures, rows, reference in (
        (finetune, rows_of(args, finetune.names), own("style_openmoji_4", 4)),
        (teacher, in_the_teacher(args), own("style_teacher_4", 4)),
    ):
        if args.grid and pictures is finetune:
            shown.append(images(pictures, reference))
        for row in rows:
            if args.rows is None or row.name.removeprefix("style_") in args.rows:
                found.append(pictures.measure(row, reference))
                print({k: round(found[-1][k], 4) for k in ("psnr", "grad", "top1")}, row.name, flush=True)
            if args.grid and pictures is finetune:
                shown.append(images(pictures, row))
    values = summary_of(found, is_difference(shipped(args, "m2")))
    if args.speed:
        found.append(speed(args, finetune.names))
        values["fit_samples_share"] = found[-1]["share"]
    command = command_line("style")
    values, found = beside_earlier("fewstep", values, found, command, lambda row: row["row"])
    record("fewstep", values, found, command, notes=args.notes)
    page = ROOT / "docs" / "evidence.md"
    page.write_text(with_style(page.read_text("utf-8"), json.loads((RESULTS / "fewstep.json").read_text())), "utf-8")
    if shown:
        drawn = args.folder / "grid.png"
        save_grid(drawn, torch.cat(shown), SHOWN, 0.5)
        Image.open(drawn).save(ROOT / "docs" / "evidence-style.jpg", quality=75)


if __name__ == "__main__":
    main()
