"""What training costs: the loop of stage 1 and stage 2 against a step with nothing but the networks.

    python bootstrap.py bench NAME=train_speed [ARGS="--network middle --rounds 5"]

The reference is the teacher's forward pass and the student's forward and backward pass on the same batch, with the
task and output losses, the same frozen weights and the same attention: no features, no optimiser, no average, no
clipping, no log, no reading of data. The loop is `train.loop.train` on a cache of random latents, with the losses of
SD1.5's recipes but for the perceptual one of stage 2.

    stage1            emoji-base: task, output and BK-SDM's block features, all weights of the student
    stage2            emoji-m2: task, output and A-SDM's mid feature, the original part frozen
    full_student      the same, with every weight of the combined UNet trained (emoji-m5)
    rollout           emoji-two-steps-lora, without the time in which the teacher draws the bank, told beside it
                      (bank_seconds_of_a_step); its reference is the student alone, forward and backward

And of the data:

    waited_for_data       share of the time in which stage 2 on pictures on the disk, with two workers, has no data
    start_on_a_million    seconds from nothing to the first batch of a cache of 1 million pictures, and of as many in
                          shards (start_on_a_million_in_shards)
    plan_over_peak        memory of train.dry_run's plan over the peak of a process, in both precisions

--parts speed, memory or data measures that alone and keeps the rest of the record.

Speeds (samples per second) are compared within each round, everything in turn; the first step of each run, in which
buffers are made, is left out. Memory is the peak of a process of its own, less what it held before the networks.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from asdm_core.tensor_file import write_file
from bench._common import RESULTS, add_common_arguments, clock_of, command_line, record
from train import dry_run, losses, loop, networks
from train.config import Config
from train.recipe import load
from train.data import Batch, Batches
from train.diffusion import STEPS, coefficients
from train.attention import BmmAttention
from train.sources import open_source

CONFIGS = Path(loop.__file__).parent / "configs"
PARTS = ("speed", "memory", "data")
RUNS = {"stage1": "emoji-base", "stage2": "emoji-m2", "full_student": "emoji-m5", "rollout": "emoji-two-steps-lora"}
LOSSES = {
    "stage1": ["loss.task=1"],
    "stage2": ["loss.task=1", "loss.mid=1", "loss.blocks=0"],
    "rollout": ["rollout.window=16"],  # no more trajectories than its few steps walk
}
# The emoji family as it is trained, and SD1.5's topology with 128 channels on 32 x 32 latents (256 px).
MIDDLE = {
    "family": "middle",
    "model_channels": 128,
    "channel_mult": [1, 2, 4, 4],
    "down": [[1, 1], [1, 1], [1, 1], [0, 0]],
    "mid": 1,
    "up": [[0, 0, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]],
    "context_dim": 256,
    "num_heads": 8,
}
NETWORKS = {"emoji": [], "middle": ["network.family=middle", "data.size=256", "run.batch=8", "run.micro_batch=4"]}


def recipe(run: str, network: str, folder: Path, steps: int, precision: str = "no") -> Config:
    changes = [
        f"run.precision={precision}",
        *NETWORKS[network],
        *LOSSES.get(run, LOSSES["stage2"]),
        "network.teacher=random",
        "student.start=",
        f"data.path={folder / 'cache.safetensors'}",
        f"run.folder={folder / run}",
        f"run.steps={steps}",
        "run.log_every=1",
        "run.save_every=1_000_000",
    ]
    if network == "middle":
        parts = ", ".join(f"{k} = {str(v).replace(chr(39), chr(34))}" for k, v in MIDDLE.items() if k != "family")
        changes.append(f"network.shape={{{parts}}}")
    return load(CONFIGS / f"{RUNS[run]}.toml", changes)


def write_cache(config: Config, pictures: int = 256, tokens: int = 77) -> None:
    side = config.data.size // 8
    unet = config.network.config
    g = torch.Generator().manual_seed(0)
    write_file(
        config.data.path,
        {
            "latents": torch.randn(pictures, unet.in_channels, side, side, generator=g).half(),
            "captions": torch.arange(pictures)[:, None],
            "states": torch.randn(pictures, tokens, unet.context_dim, generator=g).half(),
            "empty": torch.zeros(tokens, unet.context_dim).half(),
        },
        {},
    )


def write_pictures(folder: Path, size: int, count: int = 128) -> None:
    """Pictures of noise, as JPEG of twice the size, each with a caption."""
    folder.mkdir(parents=True)
    g = torch.Generator().manual_seed(0)
    for i in range(count):
        pixels = torch.randint(0, 256, (2 * size, 2 * size, 3), generator=g, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{i:04d}.jpg", quality=90)
        (folder / f"{i:04d}.txt").write_text("a picture of noise, best quality", encoding="utf-8")


def write_encoders(folder: Path, width: int) -> None:
    """A diffusers folder with a narrow VAE and text encoder, random weights, and a vocabulary of letters."""
    vae: Any = AutoencoderKL(
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    vae.save_pretrained(folder / "vae")
    letters = [chr(c) for c in range(33, 127)]
    words = {w: i for i, w in enumerate([*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"])}
    end = len(words) - 1
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=1,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    (tokenizer / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    settings = {"tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def waited_for_data(network: str, steps: int, folder: Path, workers: int = 2) -> float:
    """The share of its time in which a run of stage 2 waited for pictures, after the first step."""
    config = recipe("stage2", network, folder, steps)
    write_pictures(folder / "pictures", config.data.size)
    write_encoders(folder / "models", config.network.config.context_dim)
    data = replace(config.data, source="folder", path=str(folder / "pictures"))
    its = replace(config.encoders, models=str(folder / "models"))
    # A family without a latent factor of its own shows no pictures; they would count as work.
    config = replace(config, data=data, encoders=its, run=replace(config.run, workers=workers, picture_every=0))
    device = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=config.run.precision)
    with redirect_stdout(sys.stderr):
        loop.train(config, device)
    lines = [json.loads(line) for line in (config.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    first, last = lines[0], lines[-1]
    return (last["waited"] - first["waited"]) / (last["seconds"] - first["seconds"])


def start_on_a_cache(folder: Path, pictures: int, clock: Callable[[], float], files: int = 250) -> float:
    """Seconds until the first batch of a cache of so many small pictures with a few captions."""
    config = recipe("stage2", "emoji", folder, 1)
    config = replace(config, data=replace(config.data, size=16, path=str(folder / "many")))
    unet, each = config.network.config, pictures // files
    (folder / "many").mkdir()
    tensors = {
        "latents": torch.zeros(each, unet.in_channels, 2, 2).half(),
        "captions": torch.zeros(each, 1, dtype=torch.long),
        "states": torch.zeros(4, 77, unet.context_dim).half(),
        "empty": torch.zeros(77, unet.context_dim).half(),
    }
    for i in range(files):
        write_file(folder / "many" / f"{i:05d}.safetensors", tensors, {})
    began = clock()
    Batches(open_source(config), config)(range(config.run.micro_batch))
    return clock() - began


def start_on_shards(folder: Path, shards: int, clock: Callable[[], float], each: int = 1000) -> float:
    """Seconds until the first batch of so many shards, which are one file under many names."""
    config = recipe("stage2", "emoji", folder, 1)
    write_encoders(folder / "models", config.network.config.context_dim)
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), (90, 120, 30)).save(picture, "png")
    (folder / "shards").mkdir()
    first = folder / "shards" / "00000.tar"
    with tarfile.open(first, "w") as tar:
        for i in range(each):
            for name, content in ((f"{i:06d}.png", picture.getvalue()), (f"{i:06d}.txt", b"a picture")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    for i in range(1, shards):
        (folder / "shards" / f"{i:05d}.tar").hardlink_to(first)
    data = replace(config.data, source="shards", path=str(folder / "shards"), size=32)
    config = replace(config, data=data, encoders=replace(config.encoders, models=str(folder / "models")))
    began = clock()
    Batches(open_source(config), config)(range(config.run.micro_batch))
    return clock() - began


def run_loop(config: Config, clock: Callable[[], float]) -> tuple[float, float]:
    """Mean seconds of the steps of a run, but for the first: without those of a bank, and of the bank in all its steps.

    Its folder is gone afterwards.
    """
    device = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=config.run.precision)
    with redirect_stdout(sys.stderr):
        loop.train(config, device, clock)
    lines = [json.loads(line) for line in (config.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    shutil.rmtree(config.folder)
    times = [line["seconds"] - line.get("bank_seconds", 0.0) for line in lines]
    return (times[-1] - times[0]) / (len(times) - 1), lines[-1].get("bank_seconds", 0.0) / len(lines)


class Reference:
    """The plain step of a recipe's networks."""

    def __init__(self, config: Config, device: torch.device):
        self.config = config
        self.teacher = networks.load_teacher(config)
        self.student = networks.make_student(self.teacher, config)
        self.student.train()
        for net in (self.teacher, self.student):
            nn.Module.to(net, device)
            if device.type == "cpu":
                networks.set_attention(net, BmmAttention())
        g = torch.Generator().manual_seed(0)
        size = config.run.micro_batch
        side = config.data.size // 8
        unet = config.network.config
        x0, noise = torch.randn(2, size, unet.in_channels, side, side, generator=g)
        t = torch.randint(STEPS, (size,), generator=g)
        context = torch.randn(size, 77, unet.context_dim, generator=g)
        self.batch = Batch(x0, noise, t, context).to(device)

    def step(self) -> None:
        for _ in range(self.config.accumulation(1)):
            x0, noise, t, context = self.batch[:4]
            a, s = coefficients(t)
            x = a * x0 + s * noise
            predicted = self.student(x, t, context, return_dict=False)[0]
            loss = losses.task(predicted, x0, noise, a, s, self.config.network.prediction)
            if not self.config.rollout.steps:
                with torch.no_grad():
                    wanted = self.teacher(x, t, context, return_dict=False)[0]
                loss = loss + losses.output(predicted, wanted)
            loss.mean().backward()
        self.student.zero_grad()


def measure(network: str, rounds: int, steps: int, device: torch.device, clock: Callable[[], float]) -> list[dict]:
    times: dict[str, list[float]] = {}
    banks: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        recipes = {run: recipe(run, network, Path(folder), steps + 1) for run in RUNS}
        write_cache(recipes["stage1"])
        references = {f"{run}_reference": Reference(recipes[run], device) for run in ("stage1", "stage2", "rollout")}
        for each in references.values():
            each.step()
        for _ in range(rounds):
            for run, config in recipes.items():
                seconds, bank = run_loop(config, clock)
                times.setdefault(run, []).append(seconds)
                banks.setdefault(run, []).append(bank)
                if reference := references.get(f"{run}_reference"):
                    start = clock()
                    for _ in range(steps):
                        reference.step()
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    times.setdefault(f"{run}_reference", []).append((clock() - start) / steps)
    return [
        {
            "network": network,
            "run": name,
            "batch": (batch := recipes[name.removesuffix("_reference")].run.batch),
            "seconds_of_a_step": statistics.median(found),
            "all_seconds": found,
            "samples_per_second": batch / statistics.median(found),
        }
        | ({"bank_seconds_of_a_step": statistics.median(banks[name])} if name == "rollout" else {})
        for name, found in times.items()
    ]


SAMPLES = 128
# What is freed goes back to the system at once: the peak is of what was held, not of what malloc keeps for later.
KEEPS_NOTHING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def planned(network: str) -> dict[str, float]:
    """The memory of the plan over the peak of a process of its own, of both stages in both precisions."""
    found = {}
    for run in ("stage1", "stage2"):
        for precision in ("no", "bf16"):
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "bench.train_speed", "--network", network),
                    *("--memory", run, "--precision", precision),
                ],
                capture_output=True,
                text=True,
                check=True,
                env=os.environ | KEEPS_NOTHING,
            )
            config = for_memory(recipe(run, network, Path("nowhere"), 2, precision))
            plan = dry_run.memory(dry_run.meta_student(config), config, 1, not torch.cuda.is_available()).total
            suffix = ("" if precision == "no" else f"_{precision}") + ("" if network == "emoji" else f"_{network}")
            found[f"plan_over_peak_{run}{suffix}"] = plan / int(done.stdout.split()[-1])
    return found


def for_memory(config: Config) -> Config:
    """With so many samples at once that what libraries keep for themselves is little beside them."""
    return replace(config, run=replace(config.run, batch=SAMPLES, micro_batch=SAMPLES))


def memory(network: str, name: str, precision: str, device: torch.device) -> int:
    """Peak bytes of one run in this process, above what it holds after a first one of a single sample."""

    def peak() -> int:
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        # Not ru_maxrss, which a process inherits from the one that started it.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])

    with tempfile.TemporaryDirectory() as folder:
        config = for_memory(recipe(name, network, Path(folder), 2, precision))
        write_cache(config)
        small = replace(config.run, steps=2, batch=1, micro_batch=1, folder=str(Path(folder) / "first"))
        run_loop(replace(config, run=small), lambda: 0.0)  # libraries that are loaded when they are first used
        before = forget(device)
        run_loop(config, lambda: 0.0)
        return peak() - before


def forget(device: torch.device) -> int:
    """Begin a new peak; what is held now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0])


def summary(rows: list[dict]) -> dict[str, float]:
    """Speeds of the loop over those of another run, the median over the rounds."""
    found = {}
    for network in dict.fromkeys(row["network"] for row in rows):
        times = {row["run"]: row["all_seconds"] for row in rows if row["network"] == network}
        suffix = "" if network == "emoji" else f"_{network}"
        for name, run, other in (
            ("stage1_over_reference", "stage1", "stage1_reference"),
            ("stage2_over_reference", "stage2", "stage2_reference"),
            ("stage2_over_full_student", "stage2", "full_student"),
            ("rollout_over_student_step", "rollout", "rollout_reference"),
        ):
            found[name + suffix] = statistics.median(b / a for a, b in zip(times[run], times[other], strict=True))
    return found


def data_summary(networks: Sequence[str], steps: int, clock: Callable[[], float]) -> dict[str, float]:
    found = {}
    for network in networks:
        with tempfile.TemporaryDirectory() as folder:
            found[f"waited_for_data_{network}"] = waited_for_data(network, steps, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        found["start_on_a_million"] = start_on_a_cache(Path(folder), 1_000_000, clock)
    with tempfile.TemporaryDirectory() as folder:
        found["start_on_a_million_in_shards"] = start_on_shards(Path(folder), 1000, clock)
    return found


def part_of(number: str) -> str:
    """The part of the record that a number belongs to."""
    return "data" if number.startswith(("waited", "start")) else "memory" if number.startswith("plan") else "speed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=[*NETWORKS, "all"], default="all")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of a run in one round, one more is left out")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="no", help=argparse.SUPPRESS)
    add_common_arguments(parser)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.memory:
        print(memory(args.network, args.memory, args.precision, device))
        return
    clock = clock_of(args, parser, device)
    networks = list(NETWORKS) if args.network == "all" else [args.network]
    numbers: dict[str, float] = {}
    measured: list[dict] = []
    if "speed" in args.parts:
        measured = [row for network in networks for row in measure(network, args.rounds, args.steps, device, clock)]
        numbers |= summary(measured)
        for row in measured:
            print(f"{row['network']:6} {row['run']:17} {row['samples_per_second']:8.2f} samples/s", flush=True)
    if "memory" in args.parts:
        for network in networks:
            numbers |= planned(network)
    if "data" in args.parts:
        numbers |= data_summary(networks, 2 * args.steps, clock)
    path = RESULTS / "train_speed.json"
    earlier = json.loads(path.read_text("utf-8")) if path.exists() else {"summary": {}, "rows": []}
    kept = {name: value for name, value in earlier["summary"].items() if part_of(name) not in args.parts}
    notes = args.notes
    if kept:
        left = ", ".join(sorted({part_of(name) for name in kept}))
        of = f"{earlier['date']}, asdm {earlier['versions']['asdm']}: {earlier['command']} ({earlier.get('notes', '')})"
        notes = f"{notes + '; ' if notes else ''}{left}: kept from {of}"
    record("train_speed", kept | numbers, measured or earlier["rows"], command_line("train_speed"), notes=notes)


if __name__ == "__main__":
    main()
