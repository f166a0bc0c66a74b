"""How much of a finetune's style a pack leaves: packs and LoRAs in OpenMoji, which no training of theirs ever saw.

    python bootstrap.py bench NAME=style ARGS="--minutes 1 3 10"

The reference is OpenMoji's own run of 4 steps (dpmpp_2m, simple, CFG 3) from the same noise; packs are drawn with 3
steps of the same, few-step LoRAs as their metadata say. Beside them the finetune's own fewer steps, and the pack in
the teacher, against the teacher's own run, for what it loses there by being a difference. A fit learns from the names
of all concepts as prompts, so many minutes of one process. Goes into bench/results/fewstep.json.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from asdm_core.__main__ import main as convert
from bench._common import beside_earlier, command_line, record
from bench.fewstep import Pictures, Row, few_of
from train.diffusion import simple_times
from train.progress import plain_errors

TEACHER, FINETUNE = "emoji-teacher.safetensors", "emoji-openmoji.safetensors"
SAMPLER, CFG = "dpmpp_2m", 3.0


def own(name: str, steps: int) -> Row:
    return Row(name, (), simple_times(steps), SAMPLER, CFG)


def with_pack(name: str, path: Path) -> Row:
    return Row(name, (path,), simple_times(3), SAMPLER, CFG)


def fitted(models: Path, folder: Path, prompts: list[str], minutes: float, threads: int) -> Path:
    """The M2 pack, fitted to the finetune for so long; made once."""
    path = folder / f"m2-fitted-{minutes:g}min.safetensors"
    if not path.exists():
        words = folder / "prompts.txt"
        words.write_text("\n".join(prompts) + "\n", "utf-8")
        command = [sys.executable, "-m", "train.emoji", "fit", models / FINETUNE, models / "emoji-m2.safetensors", path]
        options = ["--prompts", words, "--size", "128", "--minutes", f"{minutes:g}", "--cpu"]
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run([str(word) for word in (*command, *options)], check=True, env=env)
    return path


def rows_of(args: argparse.Namespace, prompts: list[str]) -> Iterator[Row]:
    m2 = args.models / "emoji-m2.safetensors"
    difference = args.folder / "m2-difference.safetensors"
    if not difference.exists() and convert(
        ["to-difference", str(m2), str(args.models / TEACHER), str(difference), "--dtype", "fp16"]
    ):
        raise SystemExit("the pack could not be turned into differences")
    yield own("style_openmoji_3", 3)
    yield own("style_openmoji_2", 2)
    yield with_pack("style_m2_absolute", m2)
    yield with_pack("style_m2_untuned", difference)
    for lora in args.lora:
        few = few_of(lora)
        if few is None:
            raise SystemExit(f"{lora.name} does not say for how many steps it was trained")
        yield Row(f"style_{few.steps}_steps_lora", (lora,), few.times, "ddim", few.cfg)
    for minutes in args.minutes:
        path = fitted(args.models, args.folder, prompts, minutes, args.threads)
        yield with_pack(f"style_m2_fitted_{minutes:g}min", path)


@plain_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.style", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, nargs="*", default=[1.0, 3.0, 10.0], help="of each fit")
    parser.add_argument("--lora", type=Path, nargs="*", default=[Path("models/loras/emoji-two-steps.safetensors")])
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--models", type=Path, default=Path("models/emoji"))
    parser.add_argument("--folder", type=Path, default=Path("runs/style"))
    parser.add_argument("--comfy", help="ComfyUI folder, for the CLIP tokeniser")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--notes", default="", help="kept in the record: what else the machine was doing")
    args = parser.parse_args()
    found: list[dict] = []
    values: dict[str, float] = {}
    finetune = Pictures(args.models, args.folder, args.prompts, 1, args.comfy, FINETUNE)
    reference = own("style_openmoji_4", 4)
    for row in rows_of(args, finetune.names):
        found.append(finetune.measure(row, reference))
        values |= {f"{key}_{row.name}": found[-1][key] for key in ("psnr", "grad")}
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in found[-1].items() if k != "times"}, flush=True)
    teacher = Pictures(args.models, args.folder / "teacher", args.prompts, 1, args.comfy)
    alone, pair = own("style_teacher_4", 4), {}
    for name, path in (
        ("absolute", args.models / "emoji-m2.safetensors"),
        ("untuned", args.folder / "m2-difference.safetensors"),
    ):
        found.append(teacher.measure(with_pack(f"style_teacher_m2_{name}", path), alone))
        pair[name] = found[-1]["psnr"]
    summary = {"_".join(("style", key.replace("_style", ""))): v for key, v in values.items()}
    summary["teacher_psnr_lost_by_difference"] = pair["absolute"] - pair["untuned"]
    command = command_line("style")
    summary, found = beside_earlier("fewstep", summary, found, command, lambda row: row["row"])
    record("fewstep", summary, found, command, notes=args.notes)


if __name__ == "__main__":
    main()
