"""The papers' tables at emoji scale, with the controls without which they say nothing.

    python -m bench.tables --samples 4000 --prompts 240

Trains the runs of RUNS one after the other, by train's own recipes and loop, and measures each against the teacher
with the same inputs, prompts and noises (train/emoji/compare.py). All runs of a seed see the same samples in the
same order, against outputs of the teacher computed once. --samples is what a run of one stage learns from.

It can be stopped at any point, kill -9 included: the same command goes on, and every finished run and measurement
is a file under runs/tables/. After each one it writes bench/results/tables.json and docs/evidence.md anew, from
what is there. Needs the family's glyphs and latents in --runs and its cache (`python -m train.emoji.cache`).
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from asdm_core.architecture import Architecture
from asdm_core.surgery import cut_diffusers
from train.config import Config, load
from train.emoji.compare import Judge, Switched
from train.emoji.unet import CONFIG
from train.loop import Criterion, train
from train.outputs import write_outputs
from train.stages import assembled

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "train" / "configs"
BATCH = 16  # small batches learn more per sample
LR, WARMUP, COOLDOWN, EMA = 1e-3, 20, 0.4, 0.99  # WARMUP in steps, COOLDOWN as a share of the run; short runs want a short memory


# What is run ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training run.

    recipe: of train/configs/. start: the run whose product it begins with; empty: the teacher. share: how many times
    --samples it learns from. changes: of the recipe's settings. seconds_of: instead of `share`, as many samples as
    this one takes in the time the other took, (other, this kind of run at full length).
    """

    name: str
    recipe: str
    start: str = ""
    share: float = 1.0
    changes: tuple[str, ...] = ()
    seconds_of: tuple[str, str] | None = None


ALONE = ("loss.output=0", "loss.blocks=0", "loss.mid=0")  # the denoising loss alone: no distillation
SHALLOW = "down.0-1.*.resnet, up.2-3.*.resnet"

# In order of importance: what is not finished is said to be not run.
RUNS = (
    Run("base", "emoji-base"),
    Run("m2", "emoji-m2", "base"),
    Run("m2-direct", "emoji-m2", share=2),
    Run("m2-alone", "emoji-m2", share=2, changes=ALONE),
    Run("m5", "emoji-m5", "base"),
    Run("teacher-on", "emoji-m5", changes=("student.preset=full", *ALONE)),
    Run("m1", "emoji-m1", "base"),
    Run("m3", "emoji-m3", "base"),
    Run("tiny", "emoji-tiny"),
    Run("tiny-on", "emoji-tiny", "tiny"),
    Run("tiny-e2", "emoji-tiny-e2", "tiny"),
    Run("base-alone", "emoji-base", changes=ALONE),
    Run("small", "emoji-small"),
    Run("small-on", "emoji-small", "small"),
    Run("small-e2", "emoji-small-e2", "small"),
    Run("tiny-e2-fixed", "emoji-tiny-e2", "tiny", changes=("experts.router=false",)),
    Run("small-e2-fixed", "emoji-small-e2", "small", changes=("experts.router=false",)),
    Run("tiny-clme", "emoji-tiny-clme", "tiny"),
    Run("small-clme", "emoji-small-clme", "small"),
    Run("m5-seconds", "emoji-m5", "base", seconds_of=("m2", "m5")),
    Run("m2-none", "emoji-m2", "base", changes=("loss.mid=0",)),
    Run("base-on", "emoji-base", "base"),
    Run("base-e2", "emoji-base-e2", "base"),
    Run("base-clme", "emoji-base-clme", "base"),
    Run("m4", "emoji-m4", "base"),
    Run("tiny-alone", "emoji-tiny", changes=ALONE),
    Run("small-alone", "emoji-small", changes=ALONE),
)
CUT = ("base", "m2", "tiny", "small", "m1", "m3")  # merely cut
# Table 3, first and second network and the share of the first: the paper switches after 10 or 15 of 25 steps.
SWITCHES = tuple((first, second, at) for at in (0.4, 0.6, 0.2, 0.8) for first, second in (("base", "whole"), ("whole", "base")))
TRANSFER = ("m2", "m1", "m3", "m2-alone", "base")  # played in the finetune they never saw; "cut-m2" for comparison


@dataclass(frozen=True)
class Settings:
    """What the command line fixes for all runs. family: folder of the family's own data."""

    samples: int
    prompts: int
    steps: int
    rounds: int
    folder: Path
    family: Path
    models: Path

    def seeded(self, run: str, seed: int) -> str:
        return f"{run}-s{seed}"

    def product(self, run: str, seed: int) -> Path:
        return self.folder / self.seeded(run, seed) / f"{run}.safetensors"

    def seconds(self, run: str, seed: int) -> float:
        log = (self.product(run, seed).parent / "log.jsonl").read_text().splitlines()
        return json.loads(log[-1])["seconds"]

    def recipe(self, run: Run, seed: int) -> Config:
        """The recipe of a run with everything that is equal for all."""
        share = run.share
        if run.seconds_of:
            reference, full = run.seconds_of
            share = self.seconds(reference, seed) / self.seconds(full, seed)
        steps = max(1, round(share * self.samples / BATCH))
        start = self.product(run.start, seed) if run.start else ""
        return load(RECIPES / f"{run.recipe}.toml", [
            f"name={run.name}", f"seed={seed}", f"student.start={start}", f"data.path={self.family / 'cache.safetensors'}",
            f"network.teacher={self.models / 'emoji-teacher.safetensors'}", f"network.outputs={self.outputs(seed)}",
            f"run.folder={self.folder / self.seeded(run.name, seed)}", f"run.steps={steps}", f"run.batch={BATCH}",
            f"run.micro_batch={BATCH}", "run.precision=bf16", "run.save_every=50", "run.keep=1", "run.log_every=10",
            f"optimiser.lr={LR}", f"optimiser.warmup={WARMUP}", f"optimiser.cooldown={round(COOLDOWN * steps)}", f"optimiser.ema={EMA}", *run.changes])

    def outputs(self, seed: int) -> Path:
        return self.folder / f"outputs-s{seed}"


def compute_outputs(settings: Settings, seed: int) -> None:
    """The teacher's outputs for the longest run, with every feature any run compares."""
    recipes = [settings.recipe(run, seed) for run in RUNS if not run.seconds_of]
    paths = {path for recipe in recipes for path in Criterion(recipe, torch.device("cpu")).teacher_paths}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_outputs(settings.outputs(seed), recipes[0], paths, max(r.run.steps * r.run.batch for r in recipes), device)


def make(run: Run, settings: Settings, seed: int) -> None:
    """Train a run, or go on with it."""
    product = settings.product(run.name, seed)
    if product.exists():
        return
    recipe = settings.recipe(run, seed)
    train(recipe, Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=recipe.run.precision))
    for checkpoint in product.parent.glob("checkpoint-*.safetensors"):
        checkpoint.unlink()


# What is measured -----------------------------------------------------------------------------------


def cut_teacher(judge: Judge, preset: str) -> torch.nn.Module:
    network = copy.deepcopy(judge.whole)
    cut_diffusers(network, Architecture.preset(preset, CONFIG))
    return network


def trained(judge: Judge, settings: Settings, run: str, seed: int) -> torch.nn.Module:
    return judge.whole if run == "whole" else assembled(judge.whole, settings.product(run, seed))


def switched(judge: Judge, settings: Settings, switch: tuple[str, str, float], seed: int) -> torch.nn.Module:
    first, second, at = switch
    return Switched(trained(judge, settings, first, seed), trained(judge, settings, second, seed), at, settings.steps)


def jobs(settings: Settings, seeds: Sequence[int]) -> Iterator[tuple[str, callable]]:
    """Everything there is to do, in order: (name, what to call)."""
    judges = {host: Judge(host, settings.folder / "measured", settings.family, settings.models, settings.prompts, settings.steps)
              for host in ("teacher", "openmoji")}
    teacher, finetune = judges.values()
    measure = partial(teacher.measure, rounds=settings.rounds)
    yield "teacher", lambda: measure("whole", lambda: teacher.whole)
    for seed in seeds:
        yield f"outputs of the teacher, seed {seed}", partial(compute_outputs, settings, seed)
        for i, run in enumerate(RUNS):
            yield f"train {run.name}, seed {seed}", partial(make, run, settings, seed)
            yield f"measure {run.name}, seed {seed}", partial(
                measure, settings.seeded(run.name, seed), partial(trained, teacher, settings, run.name, seed))
            if i < len(CUT):
                yield f"measure cut {CUT[i]}", partial(measure, f"cut-{CUT[i]}", partial(cut_teacher, teacher, CUT[i]))
            if run.name == "tiny-e2":  # before the less important runs
                yield from rest(settings, seed, measure, judges)
    yield "finetune", lambda: finetune


def rest(settings: Settings, seed: int, measure, judges: dict[str, Judge]) -> Iterator[tuple[str, callable]]:
    """Table 3 and the transfer."""
    teacher, finetune = judges["teacher"], judges["openmoji"]
    for switch in SWITCHES:
        name = settings.seeded(switch_name(switch), seed)
        yield f"measure {name}", partial(measure, name, partial(switched, teacher, settings, switch, seed), fixed=False)
    yield "measure openmoji", partial(finetune.measure, "whole", lambda: finetune.whole)
    yield "measure openmoji cut-m2", partial(finetune.measure, "cut-m2", partial(cut_teacher, finetune, "m2"))
    for run in TRANSFER:
        yield f"measure openmoji {run}", partial(finetune.measure, settings.seeded(run, seed), partial(trained, finetune, settings, run, seed))


def switch_name(switch: tuple[str, str, float]) -> str:
    first, second, at = switch
    return f"{first}-{second}-{at:g}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=38_400, help="what a run of one stage learns from, equal for all")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds, one after the other")
    parser.add_argument("--prompts", type=int, default=360, help="drawn in each round, equal for all")
    parser.add_argument("--steps", type=int, default=25, help="of sampling")
    parser.add_argument("--rounds", type=int, default=1, help="noises of each prompt; from 1000 pictures on there is a Frechet distance")
    parser.add_argument("--runs", type=Path, default=Path("runs/emoji"), help="folder of the family's glyphs, latents and cache")
    parser.add_argument("--models", type=Path, default=Path("models/emoji"))
    parser.add_argument("--folder", type=Path, default=Path("runs/tables"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="only write the results and the text from what is there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = Settings(args.samples, args.prompts, args.steps, args.rounds, args.folder, args.runs, args.models)
    for name, do in jobs(settings, range(1, args.seeds + 1)):
        print(f"-- {name}", flush=True)
        do()


if __name__ == "__main__":
    main()
