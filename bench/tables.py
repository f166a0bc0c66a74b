"""The papers' tables at emoji scale, with the controls without which they say nothing.

    python -m bench.tables --samples 4000 --prompts 240 --steps 10

Trains the runs of RUNS one after the other, by train's own recipes and loop, and measures each against the teacher
with the same inputs, prompts and noises (train/emoji/compare.py). All runs of a seed see the same samples in the
same order, against outputs of the teacher computed once. --samples is what a run of one stage learns from.

It can be stopped at any point, kill -9 included: the same command goes on, and every finished run and measurement
is a file under runs/tables/. After each one it writes bench/results/tables.json and docs/evidence.md anew, from
what is there. With --shipped it measures the files in models/ alone, and puts their rows beside those of the record.
Needs the family's glyphs and latents in --runs and its cache (`python -m train.emoji.cache`).
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from asdm_core.architecture import Architecture
from asdm_core.packs import describe
from asdm_core.tensor_file import TensorFile
from asdm_core.surgery import cut_diffusers
from train.config import Config
from train.recipe import load
from train.emoji.compare import FIXED, Judge, Switched
from train.progress import plain_errors
from train.provenance import named
from train.emoji.features import ClassifierFeatures
from train.emoji.unet import CONFIG
from train.criterion import Criterion
from train.loop import train
from train.teacher_outputs import write_teacher_outputs
from train.networks import assembled

from . import _evidence as evidence
from . import _evidence_page as evidence_page
from ._common import RESULTS, beside_earlier, command_line, record

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "train" / "configs"
BATCH = 16  # small batches learn more per sample
LR = 1e-3
WARMUP = 20  # steps
COOLDOWN = 0.4  # share of the run
EMA = 0.99  # short runs want a short memory


# What is run ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One training run.

    what: it is, for the tables. cut: the preset its gap is measured from. recipe: of train/configs/. start: the run
    whose product it begins with; empty: the teacher. share: how many times --samples it learns from. changes: of the
    recipe's settings. seconds_of: instead of `share`, as many samples as this one takes in the time the other took,
    (other, this kind of run at full length).
    """

    name: str
    what: str
    cut: str
    recipe: str
    start: str = ""
    share: float = 1.0
    changes: tuple[str, ...] = ()
    seconds_of: tuple[str, str] | None = None


ALONE = ("loss.task=1", "loss.output=0", "loss.blocks=0")  # the denoising loss alone: no distillation
PAPER = ("loss.task=1", "loss.mid=1", "loss.blocks=0")  # A-SDM's losses of stage 2, without VGG

# Semantic-aware supervision: the family's classifier is what VGG is to SD1.5.
SEEN = ("loss.perceptual=0.1", "loss.perceptual_warmup=1")

# In order of importance: what is not finished is said to be not run.
RUNS = (
    Row("base", "stage 1, Base", "base", "emoji-base"),
    Row("m2", "M2: stage 1, then stage 2 with the original frozen", "m2", "emoji-m2", "base"),
    Row("m2-direct", "M2 without stage 1, stage 2 for as many samples as both", "m2", "emoji-m2", share=2),
    Row(
        "m2-alone",
        "M2 without stage 1 and without distillation, as many samples as both",
        "m2",
        "emoji-m2",
        share=2,
        changes=ALONE,
    ),
    Row("m5", "M5: as M2, nothing frozen", "m2", "emoji-m5", "base"),
    Row(
        "teacher-on", "the teacher trained on, no distillation", "", "emoji-m5", changes=("student.preset=full", *ALONE)
    ),
    Row("tiny", "stage 1, Tiny", "tiny", "emoji-tiny"),
    Row("tiny-on", "Tiny trained on", "tiny", "emoji-tiny", "tiny"),
    Row("tiny-e2", "Tiny trained on with two experts", "tiny", "emoji-tiny-e2", "tiny"),
    Row("m1", "M1: stage 1, then stage 2 with the original frozen", "m1", "emoji-m1", "base"),
    Row("m3", "M3: stage 1, then stage 2 with the original frozen", "m3", "emoji-m3", "base"),
    Row("base-alone", "Base without distillation", "base", "emoji-base", changes=ALONE),
    Row("small", "stage 1, Small", "small", "emoji-small"),
    Row("small-on", "Small trained on", "small", "emoji-small", "small"),
    Row("small-e2", "Small trained on with two experts", "small", "emoji-small-e2", "small"),
    Row(
        "tiny-e2-fixed",
        "Tiny trained on with two experts, router frozen",
        "tiny",
        "emoji-tiny-e2",
        "tiny",
        changes=("experts.router=false",),
    ),
    Row(
        "small-e2-fixed",
        "Small trained on with two experts, router frozen",
        "small",
        "emoji-small-e2",
        "small",
        changes=("experts.router=false",),
    ),
    Row("tiny-clme", "Tiny trained on with experts of the original's layers (CLME)", "tiny", "emoji-tiny-clme", "tiny"),
    Row(
        "small-clme",
        "Small trained on with experts of the original's layers (CLME)",
        "small",
        "emoji-small-clme",
        "small",
    ),
    Row("m5-seconds", "M5 for as many seconds as M2", "m2", "emoji-m5", "base", seconds_of=("m2", "m5")),
    Row("m2-mid", "M2 with the mid-block loss as well", "m2", "emoji-m2", "base", changes=("loss.mid=1",)),
    Row(
        "m2-paper",
        "M2 with the denoising and the mid-block loss, not those of the blocks",
        "m2",
        "emoji-m2",
        "base",
        changes=PAPER,
    ),
    Row("base-task", "stage 1, Base, with the denoising loss as well", "base", "emoji-base", changes=("loss.task=1",)),
    Row("base-on", "Base trained on", "base", "emoji-base", "base"),
    Row("base-e2", "Base trained on with two experts", "base", "emoji-base-e2", "base"),
    Row("base-clme", "Base trained on with experts of the original's layers (CLME)", "base", "emoji-base-clme", "base"),
    Row("m4", "M4: as M1, nothing frozen", "m1", "emoji-m4", "base"),
    Row("tiny-alone", "Tiny without distillation", "tiny", "emoji-tiny", changes=ALONE),
    Row("small-alone", "Small without distillation", "small", "emoji-small", changes=ALONE),
    Row(
        "m1-alone",
        "M1 without stage 1 and without distillation, as many samples as both",
        "m1",
        "emoji-m1",
        share=2,
        changes=ALONE,
    ),
    Row(
        "m3-alone",
        "M3 without stage 1 and without distillation, as many samples as both",
        "m3",
        "emoji-m3",
        share=2,
        changes=ALONE,
    ),
    Row("m2-features", "M2 with the classifier's features as well", "m2", "emoji-m2", "base", changes=SEEN),
    Row(
        "m2-both",
        "M2 with the mid-block loss and the classifier's features as well",
        "m2",
        "emoji-m2",
        "base",
        changes=("loss.mid=1", *SEEN),
    ),
)
KEY = ("base", "m2", "m2-direct", "m5", "base-on")  # trained with every seed, the others with the first
SHIPPED = ("m2", "m1", "small", "tiny-e2")  # in models/, made with --rows
CUT = ("base", "m2", "tiny", "small", "m1", "m3")  # merely cut
# Table 3, first and second network and the share of the first: the paper switches after 10 or 15 of 25 steps.
SWITCHES = (
    ("base", "whole", 0.4),
    ("whole", "base", 0.6),
    ("whole", "base", 0.4),
    ("base", "whole", 0.6),
    ("base", "whole", 0.2),
    ("whole", "base", 0.8),
    ("base", "whole", 0.8),
    ("whole", "base", 0.2),
)  # S1, S2, S3 and what lies around them
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

    def shipped(self) -> dict[str, Path]:
        """The files in models/ by the run whose kind they are."""
        return {name: path for name in SHIPPED if (path := self.models / f"emoji-{name}.safetensors").exists()}

    def seeds(self) -> list[int]:
        """Those with which anything in the folder was trained."""
        return sorted(
            {int(found[1]) for path in self.folder.iterdir() if (found := re.fullmatch(r".+-s(\d+)", path.name))}
        )

    def updates(self, share: float = 1) -> int:
        """Of a run that learns from `share` times the samples."""
        return max(1, round(share * self.samples / BATCH))

    def seconds(self, run: str, seed: int) -> float:
        log = (self.product(run, seed).parent / "log.jsonl").read_text().splitlines()
        return json.loads(log[-1])["seconds"]

    def recipe(self, run: Row, seed: int) -> Config:
        """The recipe of a run with everything that is equal for all."""
        share = run.share
        if run.seconds_of:
            reference, full = run.seconds_of
            share = self.seconds(reference, seed) / self.seconds(full, seed)
        steps = self.updates(share)
        start = self.product(run.start, seed) if run.start else ""
        return load(
            RECIPES / f"{run.recipe}.toml",
            [
                f"name={run.name}",
                f"seed={seed}",
                f"student.start={start}",
                f"data.path={self.family / 'cache.safetensors'}",
                f"network.teacher={self.models / 'emoji-teacher.safetensors'}",
                f"network.teacher_outputs={self.outputs(seed)}",
                f"loss.classifier={self.models}",
                f"run.folder={self.folder / self.seeded(run.name, seed)}",
                f"run.steps={steps}",
                f"run.batch={BATCH}",
                f"run.micro_batch={BATCH}",
                "run.precision=bf16",
                "run.save_every=50",
                "run.keep=1",
                "run.log_every=10",
                "run.picture_every=0",
                f"optimiser.lr={LR}",
                f"optimiser.warmup={WARMUP}",
                f"optimiser.cooldown={round(COOLDOWN * steps)}",
                f"optimiser.ema={EMA}",
                *run.changes,
            ],
        )

    def outputs(self, seed: int) -> Path:
        return self.folder / f"outputs-s{seed}"


def runs(seed: int, rows: Sequence[str] = ()) -> Iterator[Row]:
    """Those that are trained with this seed; seeds begin at 1. rows: only these, of any seed, where there are any."""
    return (run for run in RUNS if (run.name in rows if rows else seed == 1 or run.name in KEY))


def compute_outputs(settings: Settings, seed: int, rows: Sequence[str] = ()) -> None:
    """The teacher's outputs for the longest run, with every feature any run compares."""
    recipes = [settings.recipe(run, seed) for run in runs(seed, rows) if not run.seconds_of]
    criteria = [Criterion(recipe, torch.device("cpu"), ClassifierFeatures) for recipe in recipes]
    paths = {path for criterion in criteria for path in criterion.teacher_paths}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_teacher_outputs(
        settings.outputs(seed), recipes[0], paths, max(r.run.steps * r.run.batch for r in recipes), device
    )


def make(run: Row, settings: Settings, seed: int) -> None:
    """Train a run, or go on with it."""
    product = settings.product(run.name, seed)
    if product.exists():
        return
    recipe = settings.recipe(run, seed)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=recipe.run.precision)
    train(recipe, accelerator, classifier=ClassifierFeatures)
    for checkpoint in product.parent.glob("checkpoint-*.safetensors"):
        checkpoint.unlink()


# What is measured -----------------------------------------------------------------------------------


def cut_teacher(judge: Judge, preset: str) -> torch.nn.Module:
    network = copy.deepcopy(judge.whole)
    cut_diffusers(network, Architecture.preset(preset, CONFIG))
    return network


def trained(judge: Judge, settings: Settings, run: str, seed: int) -> torch.nn.Module:
    return judge.whole if run == "whole" else assembled(judge.whole, settings.product(run, seed))


Job = tuple[str, Callable[[], object]]  # name, what to call


def switched(judge: Judge, settings: Settings, switch: tuple[str, str, float], seed: int) -> torch.nn.Module:
    first, second, at = switch
    return Switched(trained(judge, settings, first, seed), trained(judge, settings, second, seed), at, settings.steps)


def jobs(
    settings: Settings, seeds: Sequence[int], rows: Sequence[str] = (), shipped: Sequence[str] = ()
) -> Iterator[Job]:
    """Everything there is to do, or what belongs to some rows, in order of importance; what is done already takes no
    time. shipped: these files in models/, alone.

    Raises ValueError where a run that is finished learned from other --samples.
    """
    for seed in seeds:
        for run in runs(seed, rows):
            if settings.product(run.name, seed).exists():
                samples(settings, run, seed)
    judge = partial(
        Judge,
        folder=settings.folder / "measured",
        runs=settings.family,
        models=settings.models,
        prompts=settings.prompts,
        steps=settings.steps,
    )
    teacher = judge("teacher")
    finetune = judge("openmoji") if not rows and not shipped else None
    measure = partial(teacher.measure, rounds=settings.rounds)
    yield "teacher", lambda: measure("whole", lambda: teacher.whole)
    for seed in seeds:
        yield f"outputs of the teacher, seed {seed}", partial(compute_outputs, settings, seed, rows)
        for run in runs(seed, rows):
            yield f"train {run.name}, seed {seed}", partial(make, run, settings, seed)
            yield (
                f"measure {run.name}, seed {seed}",
                partial(measure, settings.seeded(run.name, seed), partial(trained, teacher, settings, run.name, seed)),
            )
            if run.cut:
                yield (
                    f"measure cut {run.cut}",
                    partial(measure, f"cut-{run.cut}", partial(cut_teacher, teacher, run.cut)),
                )
            if run.name == "teacher-on" and finetune:
                yield from switching(settings, seed, measure, teacher, SWITCHES[:3])
                yield from transfer(settings, seed, finetune, ("m2", "m2-alone", "base"))
        if seed == 1 and finetune:
            yield from switching(settings, seed, measure, teacher, SWITCHES)
            yield from transfer(settings, seed, finetune, TRANSFER)
    if shipped:
        for preset in dict.fromkeys(cut for name in shipped if (cut := find(name).cut)):
            yield f"measure cut {preset}", partial(measure, f"cut-{preset}", partial(cut_teacher, teacher, preset))
    if not rows:
        for path in (path for name, path in settings.shipped().items() if not shipped or name in shipped):
            yield f"measure {path.name}", partial(measure, named(path), partial(assembled, teacher.whole, path))


def switching(
    settings: Settings, seed: int, measure: Callable, teacher: Judge, switches: Sequence[tuple[str, str, float]]
) -> Iterator[Job]:
    """Table 3."""
    for switch in switches:
        name = settings.seeded(switch_name(switch), seed)
        yield f"measure {name}", partial(measure, name, partial(switched, teacher, settings, switch, seed), fixed=False)


def transfer(settings: Settings, seed: int, finetune: Judge, runs: Sequence[str]) -> Iterator[Job]:
    """Packs in the finetune they never saw."""
    yield "measure openmoji", partial(finetune.measure, "whole", lambda: finetune.whole)
    yield "measure openmoji cut-m2", partial(finetune.measure, "cut-m2", partial(cut_teacher, finetune, "m2"))
    for run in runs:
        yield (
            f"measure openmoji {run}",
            partial(finetune.measure, settings.seeded(run, seed), partial(trained, finetune, settings, run, seed)),
        )


def switch_name(switch: tuple[str, str, float]) -> str:
    first, second, at = switch
    return f"{first}-{second}-{at:g}"


def drawn(settings: Settings) -> dict:
    """What the measurements were made with, whatever the command line says: prompts, steps, cfg."""
    return json.loads((settings.folder / "measured" / "settings.json").read_text())


def command(settings: Settings) -> str:
    """The command that makes what is there, in one process for all seeds."""
    kept = []
    skipped = False
    for word in sys.argv[1:]:
        if word.startswith("--"):
            skipped = word in ("--notes", "--report", "--rows", "--seeds", "--prompts", "--steps")
        if not skipped:
            kept.append(word)
    its = drawn(settings)
    return shlex.join(
        [
            "python",
            "-m",
            "bench.tables",
            *kept,
            "--prompts",
            str(its["prompts"]),
            "--steps",
            str(its["steps"]),
            "--seeds",
            *map(str, settings.seeds()),
        ]
    )


# What comes out -------------------------------------------------------------------------------------


def gathered(settings: Settings, seeds: Sequence[int]) -> dict[str, dict[str, dict]]:
    """The rows that are finished, by host and name."""
    folder = settings.folder / "measured"
    found: dict[str, dict[str, dict]] = {"teacher": {}, "openmoji": {}}

    def put(host: str, name: str, seeds: Sequence[int] | None, cut: str = "", measured_as: str = "") -> None:
        if measured := evidence.read(folder, host, measured_as or name, seeds):
            gap_from = evidence.read(folder, host, f"cut-{cut}", None) if cut else None
            found[host][name] = evidence.row(measured, gap_from[0] if gap_from else None)

    for host in found:
        put(host, "whole", None)
        for name, path in settings.shipped().items():
            put(host, f"shipped-{name}", None, find(name).cut, named(path))
        for preset in CUT:
            put(host, f"cut-{preset}", None)
        for run in RUNS:
            put(host, run.name, seeds, run.cut)
    for switch in SWITCHES:
        put("teacher", switch_name(switch), seeds)
    for run in RUNS:
        done = [seed for seed in seeds if settings.product(run.name, seed).exists()]
        if run.name in found["teacher"] and done:
            found["teacher"][run.name] |= {
                "samples": statistics.mean(learned(settings, run, seed) for seed in done),
                "seconds": statistics.mean(spent(settings, run, seed) for seed in done),
            }
    return found


def find(name: str) -> Row:
    return next(run for run in RUNS if run.name == name)


def samples(settings: Settings, run: Row, seed: int) -> int:
    """What a finished run learned from. Raises ValueError where --samples says something else."""
    product = settings.product(run.name, seed)
    description = describe(TensorFile(product))
    assert description is not None  # training writes one
    found = description.training["samples"]
    wanted = settings.updates(run.share) * BATCH
    if found != wanted and not run.seconds_of:
        raise ValueError(
            f"{product} learned from {found:,} samples, with --samples {settings.samples} it would from {wanted:,}; "
            "give the "
            "--samples of this folder, or another --folder"
        )
    return found


def learned(settings: Settings, run: Row, seed: int) -> int:
    """Samples of a finished run and of those before it."""
    before = learned(settings, find(run.start), seed) if run.start else 0
    return samples(settings, run, seed) + before


def spent(settings: Settings, run: Row, seed: int) -> float:
    """Seconds of training of a run and of those before it, the teacher's outputs not counted."""
    before = spent(settings, find(run.start), seed) if run.start else 0
    return settings.seconds(run.name, seed) + before


def write(settings: Settings, notes: str = "") -> None:
    """bench/results/tables.json, docs/evidence.md and its plots, from what is finished, of all seeds; nothing before a
    run is.
    """
    seeds = settings.seeds()
    rows = gathered(settings, seeds)
    mine = rows["teacher"]
    if "whole" not in mine or not any("samples" in found for found in mine.values()):
        return
    publish(settings, rows, command(settings), notes)
    bins = {
        name: measured[0]["v_mse"]["teacher"]
        for name in ("cut-m2", "base", "m2", "m2-direct", "m5", "teacher-on")
        if (
            measured := evidence.read(
                settings.folder / "measured", "teacher", name, None if name.startswith("cut") else seeds
            )
        )
    }
    evidence.plot_timesteps(ROOT / "docs" / "evidence-timesteps.png", bins)


def publish(
    settings: Settings, rows: dict[str, dict[str, dict]], made_by: str, notes: str, shipped: Sequence[str] = ()
) -> None:
    """The record, the text and the plots of rows. shipped: where these alone are new, the others the record's own."""
    mine, its = rows["teacher"], rows["openmoji"]
    presets = {name: Architecture.preset(name, CONFIG) for name in CUT}
    macs = {name: evidence.macs_share(a) for name, a in presets.items()} | {"whole": 1.0}
    macs |= {switch_name((a, b, at)): at * macs[a] + (1 - at) * macs[b] for a, b, at in SWITCHES}
    verdicts = [evidence.verdict(claim, mine) for claim in evidence.CLAIMS]
    summary: dict[str, float] = {}
    for name, found in mine.items():
        key = name.replace("-", "_")
        summary |= {
            f"{metric}_{key}": found[metric]
            for metric in ("gap_recovered", "psnr", "ssim", "fed", "kid", "accuracy", "v_mse_teacher", "v_mse_data")
            if metric in found
        }
    summary |= {
        f"transfer_{metric}_{name.replace('-', '_')}": found[metric]
        for name, found in its.items()
        for metric in ("gap_recovered", "psnr", "ssim", "accuracy")
        if metric in found
    }
    records = [{"host": host, "row": name, **found} for host, part in rows.items() for name, found in part.items()]
    if shipped:
        # Verdicts are of runs of the comparison, which the files in models/ are not among.
        new = [row for row in records if row["row"] in {f"shipped-{name}" for name in shipped}]
        summary, new = beside_earlier("tables", summary, new, command_line("tables"), lambda row: row.get("row"))
        record("tables", summary, new, made_by, notes=notes)
    else:
        record("tables", summary, records + verdicts, made_by, notes=notes)
    docs = ROOT / "docs"
    docs.mkdir(exist_ok=True)
    evidence.plot_rows(docs / "evidence-rows.png", mine)
    evidence.plot_switching(docs / "evidence-switching.png", mine, macs)
    text = page(settings, rows, macs, verdicts, made_by, notes)
    few_steps = ROOT / "bench" / "results" / "fewstep.json"
    if few_steps.exists():
        its_rows = json.loads(few_steps.read_text())
        text = evidence_page.with_style(evidence_page.with_few_steps(text, its_rows), its_rows)
    longer = ROOT / "bench" / "results" / "longer.json"
    if longer.exists():
        text = evidence_page.with_longer(text, json.loads(longer.read_text())["rows"])
    (docs / "evidence.md").write_text(text, encoding="utf-8")


def measure_shipped(settings: Settings, names: Sequence[str]) -> None:
    """Put what lies in models/ now of these names into the record and the text, whose other rows stay.

    Raises ValueError where the record was made with other prompts or steps.
    """
    old = json.loads((RESULTS / "tables.json").read_text())
    its = argparse.ArgumentParser()
    for name in ("--samples", "--prompts", "--steps"):
        its.add_argument(name, type=int, default=0)
    given, _ = its.parse_known_args(shlex.split(old["command"]))
    if vars(given) != {name: getattr(settings, name) for name in ("samples", "prompts", "steps")}:
        raise ValueError(f"the record was made by `{old['command']}`: give the same --samples, --prompts and --steps")
    for name, do in jobs(settings, (), shipped=names):
        print(f"-- {name}", flush=True)
        do()
    rows: dict[str, dict[str, dict]] = {"teacher": {}, "openmoji": {}}
    for row in old["rows"]:
        if "host" in row:
            rows[row["host"]][row["row"]] = {k: v for k, v in row.items() if k not in ("host", "row")}
    for name, found in gathered(settings, ())["teacher"].items():
        if name.removeprefix("shipped-") in names and name.startswith("shipped-"):
            rows["teacher"][name] = found
    publish(settings, rows, old["command"], old.get("notes", ""), names)


def page(
    settings: Settings, rows: dict, macs: dict[str, float], verdicts: Sequence[dict], made_by: str, notes: str
) -> str:
    """docs/evidence.md."""
    mine, its = rows["teacher"], rows["openmoji"]
    titles = {run.name: run.what for run in RUNS}
    titles |= {f"cut-{preset}": f"{preset.capitalize()}, merely cut" for preset in CUT}
    titles |= {f"shipped-{name}": f"{name} in models/" for name in SHIPPED}
    titles |= {
        "whole": "the original",
        **{switch_name(switch): evidence_page.switch_title(switch) for switch in SWITCHES},
    }

    def table(of: dict, names: Iterable[str], macs: dict[str, float] | None = None) -> str:
        return "\n".join(evidence_page.table(of, [(name, titles[name]) for name in names], macs))

    seeds = max(found["seeds"] for found in mine.values() if "samples" in found)
    return evidence_page.PAGE.format(
        **drawn(settings),
        samples=settings.updates() * BATCH,
        batch=BATCH,
        lr=LR,
        finished=sum(run.name in mine for run in RUNS),
        runs=len(RUNS),
        spread=evidence_page.said_of_the_spread(seeds),
        pictures=mine["whole"]["pictures"],
        fixed=FIXED,
        frechet=evidence_page.said_of_the_frechet_distance(mine["whole"]),
        margins=", ".join(map(evidence.margin, evidence.MARGINS)),
        chance=evidence_page.said_of_chance(seeds),
        notes=f" Notes: {notes}." if notes else "",
        trained_on=evidence_page.said_of_training_on(mine),
        claims="\n".join(evidence_page.claims_text(verdicts)),
        cut=table(mine, ["whole", *(f"cut-{preset}" for preset in CUT)]),
        tables="\n\n".join(f"## {title}\n\n{table(mine, names)}" for title, names in evidence_page.TABLES.items()),
        switches=table(mine, map(switch_name, sorted(SWITCHES)), macs),
        transfer=table(its, ["whole", "cut-m2", *TRANSFER]),
        command=made_by,
    )


@plain_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--samples", type=int, default=38_400, help="what a run of one stage learns from, equal for all"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[1, 2, 3],
        help="training seeds: the first trains all rows, 2 and on the key rows; "
        "several processes may have different seeds in one folder, and the report has them all",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=[run.name for run in RUNS],
        default=[],
        help="only these, each after the row it begins with; how the weights in models/ are made",
    )
    parser.add_argument("--prompts", type=int, default=360, help="drawn in each round, equal for all")
    parser.add_argument("--steps", type=int, default=25, help="of sampling")
    parser.add_argument("--rounds", type=int, default=1, help="noises of each prompt")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/emoji"), help="folder of the family's glyphs, latents and cache"
    )
    parser.add_argument("--models", type=Path, default=Path("models/emoji"))
    parser.add_argument("--folder", type=Path, default=Path("runs/tables"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--notes", default="", help="kept in the results and the text: what else the machine was doing")
    parser.add_argument(
        "--shipped",
        nargs="+",
        choices=SHIPPED,
        default=(),
        help="measure these files of models/ anew; the record's other rows stay",
    )
    parser.add_argument("--report", action="store_true", help="only write the results and the text from what is there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = Settings(args.samples, args.prompts, args.steps, args.rounds, args.folder, args.runs, args.models)
    if args.report:
        write(settings, args.notes)
        return
    if args.shipped:
        measure_shipped(settings, args.shipped)
        return
    known: set[Path] = set()
    for name, do in jobs(settings, args.seeds, args.rows):
        print(f"-- {name}", flush=True)
        do()
        if not args.rows and (there := set((settings.folder / "measured").glob("*.json"))) != known:
            write(settings, args.notes)
            known = there


if __name__ == "__main__":
    main()
