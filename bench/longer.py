"""What more samples bring the packs of the emoji family, and what chance does: docs/evidence.md, "More samples".

    python bootstrap.py bench NAME=longer

samples: M1 and M2, stage 1 and 2 by the recipes and settings of bench/tables.py, from each of SAMPLES samples a stage;
         from the most of them with several training seeds, and the key rows of bench/tables.py beside them.
noises:  the files in models/, drawn from noises of several seeds.
rollouts: LoRAs without guidance, all from as many samples: for two steps on their own states, of many trajectories that
         are each walked a few times, or of few that are walked often; on the states of the teacher's trajectory; on
         those between its noise and its picture (Rectified Diffusion); and for as many steps as the teacher, which
         leaves guidance alone to be learned.

PSNR is to the teacher's own pictures from the same noise, as bench/tables.py and, for few steps, bench/fewstep.py
measure it. Goes into bench/results/longer.json and the page. The same command goes on where it stopped; --parts runs
some, --rows some packs (m1), files (two_steps_lora) and ways (pairs), and the record keeps the others.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from asdm_core.measure import psnr
from bench import _evidence as evidence
from bench import _evidence_page as evidence_page
from bench import tables
from bench._common import ROOT, beside_earlier, command_line, record
from bench.fewstep import Pictures, Row, rows_of
from train.config import Config
from train.recipe import load
from train.emoji.compare import Judge
from train.loop import train
from train.networks import assembled
from train.progress import plain_errors
from train.provenance import named

STEPS = 10  # of sampling, for packs
SAMPLES = (3000, 12_000, 24_000)  # of a stage
SEEDS = (1, 2, 3)  # of training, with the most samples
NOISES = 3
PACKS = ("m1", "m2")
KEY = tuple(dict.fromkeys((*tables.KEY, *PACKS)))  # with the most samples
LORA = "two_steps_lora"
ROLLED = 6144  # samples of a LoRA
# Uses of each trajectory, and what else is otherwise than in the recipe.
ROLLOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "own_states": (3, ()),
    "few_trajectories": (48, ()),
    "teacher_states": (3, ("rollout.states=teacher",)),
    "pairs": (3, ("rollout.states=pairs",)),
    "guidance_alone": (3, ("rollout.steps=[8]",)),
}


# More samples ---------------------------------------------------------------------------------------


def by_samples(args: argparse.Namespace) -> list[dict]:
    """A row for each pack, number of samples and training seed."""
    rows = []
    for samples in SAMPLES:
        most = samples == SAMPLES[-1]
        its = tables.Settings(samples, args.prompts, STEPS, 1, args.folder / str(samples), args.runs, args.models)
        for seed in args.seeds if most else args.seeds[:1]:
            wanted = [name for name in (KEY if most else PACKS) if name in args.rows]
            starts = {tables.find(name).start for name in wanted} - {""}
            for name, do in tables.jobs(its, [seed], (*starts, *wanted)) if wanted else ():
                print(f"-- {samples:,} samples: {name}", flush=True)
                do()
            found = tables.gathered(its, [seed])["teacher"] if wanted else {}
            rows += [
                {"part": "samples", "row": name, "what": tables.find(name).what, "seed": seed}
                | {"samples": tables.samples(its, tables.find(name), seed)}
                | {
                    key: found[name][key]
                    for key in ("psnr", "psnr_se", "border", "grad", "accuracy", "v_mse_teacher", "pictures")
                }
                for name in wanted
            ]
    return rows


# What chance does -----------------------------------------------------------------------------------


def by_noises(args: argparse.Namespace) -> list[dict]:
    """A row for each file in models/: PSNR from the noises of each seed."""
    judge = Judge("teacher", args.folder / "noises", args.runs, args.models, args.prompts, STEPS)
    rows = []
    for name in (name for name in tables.SHIPPED if name in args.rows):
        path = args.models / f"emoji-{name}.safetensors"
        network = partial(assembled, judge.whole, path)
        rounds = [
            psnr(
                judge.pictures(named(path), network, n)["images"],
                judge.pictures("whole", lambda: judge.whole, n)["images"],
            )
            for n in range(NOISES)
        ]
        rows.append(spread(name, rounds))
    if LORA in args.rows:
        pictures, reference, lora = few_steps(args, f"{LORA}={args.lora}")
        found = [psnr(pictures.images(lora, n), pictures.images(reference, n)) for n in range(NOISES)]
        rows.append(spread(LORA, found))
    return rows


def spread(name: str, rounds: Sequence[torch.Tensor]) -> dict:
    """rounds: PSNR of each picture, (N,), from the noises of each seed."""
    means = [float(found.mean()) for found in rounds]
    return {
        "part": "noises",
        "row": name,
        "noises": len(means),
        "pictures": len(rounds[0]),
        "psnr": statistics.mean(means),
        "psnr_sd": statistics.stdev(means),
        "each": means,
    }


def few_steps(args: argparse.Namespace, student: str) -> tuple[Pictures, Row, Row]:
    """What bench/fewstep.py draws one round with, its reference, and a student (NAME=FILE)."""
    reference, *_, row = rows_of([student])
    return Pictures(args.models, args.folder / "fewstep", 360, 1, None), reference, row


# Ways of rollout ------------------------------------------------------------------------------------


def recipe(args: argparse.Namespace, name: str) -> Config:
    """Of a LoRA without guidance, from its first step on, whose trajectories are walked so often."""
    uses, changes = ROLLOUTS[name]
    path = tables.RECIPES / "emoji-two-steps-lora.toml"
    config = load(path, changes)
    (steps,), batch = config.rollout.steps, config.run.batch
    updates = ROLLED // batch
    walks = ROLLED // steps + batch  # those that begin or end in the middle count as well
    return load(
        path,
        [
            *changes,
            f"data.path={args.runs / 'prompts.safetensors'}",
            f"network.teacher={args.models / 'emoji-teacher.safetensors'}",
            f"run.folder={args.folder / name}",
            f"run.steps={updates}",
            "run.precision=bf16",
            "run.save_every=50",
            "run.keep=1",
            f"optimiser.cooldown={updates // 2}",
            f"rollout.uses={uses}",
            f"rollout.window={math.ceil(walks / uses)}",
        ],
    )


def by_ways(args: argparse.Namespace) -> list[dict]:
    """A row for each of ROLLOUTS."""
    rows = []
    for name in (name for name in ROLLOUTS if name in args.rows):
        its = recipe(args, name)
        product = its.folder / f"{its.name}.safetensors"
        if not product.exists():
            print(f"-- {name}", flush=True)
            train(its, Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=its.run.precision))
        pictures, reference, row = few_steps(args, f"{name}={product}")
        found = pictures.measure(row, reference)
        kept = ("steps", "psnr", "psnr_se", "border", "grad", "top1", "pictures")
        rows.append(
            {"part": "rollouts", "row": name, "uses": its.rollout.uses, "trajectories": its.rollout.window}
            | {"samples": its.run.steps * its.run.batch}
            | {key: found[key] for key in kept}
        )
    return rows


PARTS = {"samples": by_samples, "noises": by_noises, "rollouts": by_ways}


def kind_of(row: dict) -> tuple:
    """What a row that is made anew takes the place of in the record."""
    return row["part"], row["row"], *((row["samples"], row["seed"]) if row["part"] == "samples" else ())


def summary(rows: Sequence[dict]) -> dict[str, float]:
    """psnr_m1_12000 and _sd over training seeds; psnr_noises_m1 and _sd over seeds of noise; psnr_rollout_pairs."""
    values: dict[str, float] = {}
    for row in rows:
        if row["part"] == "samples":
            its = evidence.of_seeds(rows, row["row"], row["samples"])
            values |= {f"psnr_{row['row']}_{row['samples']}{key}": value for key, value in its.items()}
        elif row["part"] == "noises":
            values |= {f"psnr_noises_{row['row']}": row["psnr"], f"psnr_noises_{row['row']}_sd": row["psnr_sd"]}
        else:
            values[f"psnr_rollout_{row['row']}"] = row["psnr"]
    return values


@plain_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.longer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--prompts", type=int, default=240, help="drawn with each pack")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/emoji"), help="folder of the family's glyphs, latents and caches"
    )
    parser.add_argument("--models", type=Path, default=Path("models/emoji"))
    parser.add_argument("--lora", type=Path, default=Path("models/loras/emoji-two-steps.safetensors"))
    parser.add_argument("--folder", type=Path, default=Path("runs/longer"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--notes", default="", help="kept in the record: what else the machine was doing")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of training, with the most samples")
    named_rows = tuple(dict.fromkeys((*KEY, *tables.SHIPPED, LORA, *ROLLOUTS)))
    parser.add_argument("--rows", nargs="+", choices=named_rows, default=named_rows, help="these alone")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for part in args.parts:
        made = command_line("longer")
        rows = PARTS[part](args)
        _, rows = beside_earlier("longer", {}, rows, made, kind_of)
        record("longer", summary(rows), rows, made, notes=args.notes)
        page = ROOT / "docs" / "evidence.md"
        page.write_text(evidence_page.with_longer(page.read_text("utf-8"), rows), "utf-8")
        evidence.plot_samples(ROOT / "docs" / "evidence-samples.png", rows)


if __name__ == "__main__":
    main()
