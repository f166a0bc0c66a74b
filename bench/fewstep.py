"""Few steps without guidance at emoji scale, against the teacher's own few steps.

    python bootstrap.py bench NAME=fewstep ARGS="two_steps_lora=a.safetensors two_steps_m2=b.safetensors+c.safetensors"

All draw the plain names of the 360 concepts from the same noises. The reference is the teacher's run of 20 DDIM steps
with CFG 3; PSNR is to its pictures. Beside each student stands the teacher with 1 to 4 steps of DPM-Solver++(2M) and
CFG 3, because recognition cannot tell a few-step picture from a long run's:

    border     mean distance of the outermost pixels to their median: muddy grounds, halos
    grad       mean difference of neighbouring pixels, relative to the reference's
    top1       share the family's classifier recognises
    factor     multiplications of the UNet in the reference run over those of the row

Goes into bench/results/fewstep.json and the section on few steps in docs/evidence.md.

A student is NAME=PACK, NAME=LORA or NAME=PACK+LORA; its steps are those its file says. Latents are kept in --folder, so
the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from asdm_core import few_step
from asdm_core.architecture import Architecture
from asdm_core.few_step import FewStep
from asdm_core.lora import modules as lora_modules
from asdm_core.measure import costs, psnr, total
from asdm_core.packs import describe, open_pack
from asdm_core.tensor_file import TensorFile, write_file
from bench._common import ROOT, beside_earlier, command_line, record
from bench._evidence_page import with_few_steps
from train.attention import BmmAttention
from train.diffusion import schedule, simple_times
from train.emoji.classifier import load_classifier, top_k
from train.emoji.codec import load_codec
from train.emoji.teacher import codec_images
from train.emoji.text import Tokens, host_folder, load_text
from train.emoji.unet import CONFIG, load_unet
from train.encoders import Text
from train.lora import merge_file
from train.metrics import border, gradient, standard_error
from train.networks import assembled, set_attention
from train.progress import Progress, plain_errors
from train.provenance import fingerprint, same_folder
from train.rollout import guided_trajectory
from train.seeds import seeded

SHARE = 24  # pictures drawn at once, and in a file
REFERENCE = "ddim_20"


class Row:
    """One way to draw: a network, its time steps, sampler and guidance. whole: so many steps at the beginning are the
    checkpoint's own, as where Apply Pack has a start_percent.
    """

    def __init__(
        self, name: str, files: tuple[Path, ...], times: tuple[int, ...], sampler: str, cfg: float, whole: int = 0
    ):
        self.name = name
        self.files = files
        self.times = times
        self.sampler = sampler
        self.cfg = cfg
        self.whole = whole
        opened = [open_pack(path).description for path in files if describe(TensorFile(path)) is not None]
        architecture = opened[0].architecture if opened else Architecture.full(CONFIG)
        prompts = 1 if cfg == 1 else 2
        self.forwards = len(times) * prompts
        own, full = (total(costs(a, 16, 16)).total for a in (architecture, Architecture.full(CONFIG)))
        self.macs = prompts * (whole * full + (len(times) - whole) * own)
        self.key = "-".join([name, *map(fingerprint, files)])

    def network(self, whole: UNet2DConditionModel) -> UNet2DConditionModel:
        """A pack's units in a copy of the teacher, then the LoRA on all of it."""
        unet = copy.deepcopy(whole)
        for path in self.files:
            if describe(TensorFile(path)) is not None:
                unet = assembled(unet, path)
            else:
                merge_file(unet, CONFIG, path)
        set_attention(unet, BmmAttention())
        unet.eval()
        return unet


def few_of(path: Path) -> FewStep | None:
    file = TensorFile(path)
    description = describe(file)
    return few_step.of_lora(file.metadata) if description is None else few_step.of_pack(description.training)


def student(text: str) -> Row:
    """A row from the command line. Raises ValueError for files that are no few-step student."""
    name, equals, files = text.partition("=")
    paths = tuple(Path(part) for part in files.split("+"))
    if not equals:
        raise ValueError(f"{text}: wanted NAME=FILE or NAME=PACK+LORA")
    said = {few for few in map(few_of, paths) if few is not None}
    if len(said) != 1:
        raise ValueError(f"{text}: its files say {len(said)} ways to be run, wanted one; were they trained together?")
    for path in paths:
        if describe(TensorFile(path)) is None and not any(lora_modules(TensorFile(path)).values()):
            raise ValueError(f"{path.name} is neither a pack nor a LoRA")
    few = said.pop()
    return Row(name, paths, few.times, "ddim", few.cfg)  # Euler is DDIM


def rows_of(students: list[str]) -> Iterator[Row]:
    yield Row(REFERENCE, (), tuple(schedule(20)), "ddim", 3.0)
    for steps in (1, 2, 3, 4):
        yield Row(f"teacher_{steps}", (), simple_times(steps), "dpmpp_2m", 3.0)
    yield from map(student, students)


class Pictures:
    """What every row is drawn and judged with."""

    def __init__(
        self,
        models: Path,
        folder: Path,
        prompts: int,
        rounds: int,
        comfy: str | None,
        checkpoint: str = "emoji-teacher.safetensors",
    ):
        self.models = models
        self.checkpoint = models / checkpoint
        self.folder = folder
        self.rounds = rounds
        self.decoded: OrderedDict[str, Tensor] = OrderedDict()
        names = json.loads((models / "concepts.json").read_text())
        self.chosen = [i * len(names) // prompts for i in range(min(prompts, len(names)))]
        self.names = list(names.values())
        self.prompts = [self.names[i] for i in self.chosen]
        self.classifier = load_classifier(models, list(names))
        self.codec = load_codec(models)
        self.encoder = load_text(models / "emoji-text.safetensors")
        self.tokens = Tokens(host_folder(comfy), ids=self.encoder.ids.tolist())
        folder.mkdir(parents=True, exist_ok=True)
        same_folder(folder, {"prompts": len(self.chosen), "teacher": fingerprint(self.checkpoint), "share": SHARE})

    @cached_property
    def whole(self) -> UNet2DConditionModel:
        return load_unet(self.checkpoint)

    @torch.no_grad()
    def latents(self, row: Row, number: int) -> Tensor:
        """(N, 4, 16, 16) of one round, drawn once."""
        paths = [self.folder / f"{row.key}-{number}-{i}.safetensors" for i in range(0, len(self.chosen), SHARE)]
        if not all(path.exists() for path in paths):
            network = row.network(self.whole)
            own = Row(row.name, (), row.times, row.sampler, row.cfg).network(self.whole) if row.whole else network
            late = row.times[row.whole]
            progress = Progress(f"{row.name}, round {number}", len(paths))
            empty = Text(self.encoder(self.tokens([""])))
            for n, path in enumerate(paths):
                if path.exists():
                    continue
                part = slice(n * SHARE, (n + 1) * SHARE)
                seeds = [7000 + 1000 * number + i for i in self.chosen[part]]
                noise = torch.stack([torch.randn(4, 16, 16, generator=seeded(seed, 3)) for seed in seeds])
                states = guided_trajectory(
                    lambda x, t, context, added: (network if int(t[0]) <= late else own)(x, t, context).sample,
                    noise,
                    Text(self.encoder(self.tokens(self.prompts[part]))),
                    empty,
                    row.times,
                    row.sampler,
                    row.cfg,
                    "v",
                    128,
                )
                write_file(path, {"latents": states[:, -1]}, {})
                progress.show(n + 1)
            progress.end()
        return torch.cat([load_file(path)["latents"] for path in paths])

    def images(self, row: Row, number: int) -> Tensor:
        """(N, 3, 128, 128) of one round in [0, 1]; the last two are kept, of which one is the reference."""
        key = f"{row.key}-{number}"
        if key not in self.decoded:
            while len(self.decoded) > 1:
                self.decoded.popitem(last=False)
            self.decoded[key] = codec_images(self.codec, self.latents(row, number)).clamp(0, 1)
        self.decoded.move_to_end(key)
        return self.decoded[key]

    def measure(self, row: Row, reference: Row) -> dict:
        """All numbers of a row."""
        quality, edges, found, sharpness = [], [], [], []
        for number in range(self.rounds):
            images, its = self.images(row, number), self.images(reference, number)
            quality.append(psnr(images, its))
            edges.append(border(images))
            sharpness.append((gradient(images).mean(), gradient(its).mean()))
            found.append(top_k(self.classifier, images, torch.tensor(self.chosen))[0].float())
        ours, theirs = (float(sum(part)) for part in zip(*sharpness, strict=True))
        top1 = torch.cat(found)
        result = {
            "row": row.name,
            "files": [path.name for path in row.files],
            "sampler": row.sampler,
            "steps": len(row.times),
            "times": list(row.times),
            "cfg": row.cfg,
            "forwards": row.forwards,
            "factor": reference.macs / row.macs,
            "pictures": len(top1),
            "border": float(torch.cat(edges).mean()),
            "grad": ours / theirs,
            "top1": float(top1.mean()),
            "top1_se": standard_error(top1),
        }
        if row is not reference:
            both = torch.cat(quality)
            result |= {"psnr": float(both.mean()), "psnr_se": standard_error(both)}
        return result


def summary(found: list[dict]) -> dict[str, float]:
    values: dict[str, float] = {}
    for row in found:
        name = row["row"]
        values |= {f"{key}_{name}": row[key] for key in ("psnr", "border", "grad", "top1") if key in row}
        values[f"mac_factor_{name}"] = row["factor"]
    return values


@plain_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fewstep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("students", nargs="*", metavar="NAME=FILE[+FILE]")
    parser.add_argument("--prompts", type=int, default=360)
    parser.add_argument("--rounds", type=int, default=1, help="noises of each prompt")
    parser.add_argument("--models", type=Path, default=Path("models/emoji"))
    parser.add_argument("--folder", type=Path, default=Path("runs/fewstep"))
    parser.add_argument("--comfy", help="ComfyUI folder, for the CLIP tokeniser")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--notes", default="", help="kept in the record: what else the machine was doing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = list(rows_of(args.students))  # better asked before the work than after it
    pictures = Pictures(args.models, args.folder, args.prompts, args.rounds, args.comfy)
    found = []
    for row in rows:
        found.append(pictures.measure(row, rows[0]))
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in found[-1].items() if k != "times"}, flush=True)
    command = command_line("fewstep")
    values, found = beside_earlier("fewstep", summary(found), found, command, lambda row: row["row"])
    record("fewstep", values, found, command, notes=args.notes)
    page = ROOT / "docs" / "evidence.md"
    page.write_text(with_few_steps(page.read_text("utf-8"), {"rows": found}), "utf-8")


if __name__ == "__main__":
    main()
