"""Ten thousand damaged and crafted files: each is read or ends in one quick BadFile.

    python bootstrap.py bench NAME=mutations [ARGS="--files 10000 --seed 1"]

Small files of every kind that asdm reads (packs, pruned UNets, checkpoints, diffusers folders in shards, text encoders,
LoRAs) are damaged at random: bytes are flipped, lost, doubled and put in; entries of the header, of the description and
of a folder's JSON are exchanged, renamed, nested or made huge. Bounds: nothing but BadFile, in one printable line; no
file takes 2 seconds of CPU, and the process never holds 1 GB more than at its start. File number N of a seed is always
the same, so that what is found can be made again: --only N.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from asdm_core import packs, text_encoder
from asdm_core.architecture import FAMILIES, Architecture
from asdm_core.condconv import CondConv
from asdm_core.gri import LogGains
from asdm_core.packs import Description
from asdm_core.tensor_file import BadFile
from asdm_core.text import MESSAGE
from bench._common import command_line, record

BOUND_SECONDS, BOUND_MB = 2.0, 1024.0
NARROW = replace(FAMILIES["sd15"], model_channels=8, context_dim=8)
TEXT_CONFIG = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 5,
    "projection_dim": 8,
    "vocab_size": 20,
    "eos_token_id": 19,
    "hidden_act": "quick_gelu",
}


# What is damaged ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A sound file, or a folder of files, and who reads it."""

    name: str
    path: Path
    read: Callable[[Path], object]


def read_model(path: Path) -> None:
    packs.open_model(path, drop_unknown=True)


def read_as_pack(path: Path) -> None:
    packs.open_pack(path)


def sources(folder: Path) -> list[Source]:
    """Writes one small file of each kind. Each must be read as it is."""
    generator = torch.Generator().manual_seed(0)

    def tensors(slots) -> dict[str, torch.Tensor]:
        return {key: torch.randn(slot.shape, generator=generator) for key, slot in slots.items()}

    full = Architecture.full(NARROW)
    tiny, m2 = (Architecture.preset(name, NARROW) for name in ("tiny", "m2"))
    unit = ("mid.0.resnet", "up.1.0.transformer")
    described = {
        "pack": (Description("pack", m2, m2.pack_units()), torch.float16),
        "pack of two units": (Description("pack", full, unit), None),
        "pack, int8": (Description("pack", tiny, tiny.pack_units()), "int8"),
        "experts": (Description("pack", full, condconv=CondConv({"up.3.2.resnet.conv1": 3})), None),
        "gains": (Description("pack", full, gri=LogGains(("down.0.0.transformer",))), None),
    }
    found = []
    for name, (description, dtype) in described.items():
        path = folder / f"{name}.safetensors"
        packs.write_pack(path, tensors(description.keys()), description, dtype)
        found += [Source(name, path, read_model), Source(name, path, read_as_pack)]
    unet = folder / "unet.safetensors"
    companions = {"vae": "emoji-vae.safetensors"}
    packs.write_unet(unet, tensors(tiny.keys()), Description("unet", tiny, prediction="v", companions=companions))
    # Without a description only known widths are recognised: the narrowest of these, one byte a number.
    small = Architecture.preset("tiny", FAMILIES["emoji"])

    def recognised(layout: str) -> dict[str, torch.Tensor]:
        slots = small.keys(layout, "renumbered")
        return {key: torch.zeros(slot.shape, dtype=torch.float8_e4m3fn) for key, slot in slots.items()}

    checkpoint = folder / "checkpoint.safetensors"
    beside = {"first_stage_model.decoder.conv_in.bias": torch.zeros(4), "cond_stage_model.logit_scale": torch.zeros(())}
    save_file({f"model.diffusion_model.{k}": t for k, t in recognised("ldm").items()} | beside, checkpoint)
    pipeline = folder / "pipeline"
    (pipeline / "unet").mkdir(parents=True)
    (pipeline / "scheduler").mkdir()
    (pipeline / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": "v_prediction"}))
    weights = recognised("diffusers")
    places: dict[str, str] = {}
    for n in (1, 2):
        shard = f"diffusion_pytorch_model-0000{n}-of-00002.safetensors"
        part = dict(list(weights.items())[n - 1 :: 2])
        save_file(part, pipeline / "unet" / shard)
        places |= dict.fromkeys(part, shard)
    index = pipeline / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    encoder = folder / "text.safetensors"
    text = {k: torch.randn(s, generator=generator) for k, s in text_encoder.text_shapes(TEXT_CONFIG, 3).items()}
    text["token_ids"] = torch.tensor([4, 18, 19], dtype=torch.int32)
    save_file(text, encoder, {"text_config": json.dumps(TEXT_CONFIG)})
    lora = folder / "lora.safetensors"
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    save_file({f"{name}.lora_up.weight": torch.zeros(8, 2), f"{name}.lora_down.weight": torch.zeros(2, 8)}, lora)
    return [
        *found,
        *(Source(path.stem, path, read_model) for path in (unet, checkpoint, pipeline, lora)),
        Source("text encoder", encoder, lambda path: text_encoder.open_text_encoder(path)),
    ]


# How it is damaged ----------------------------------------------------------------------------------

WORDS = ("", "F32", "I8", "F4", "pack", "unet", "sd15", "mid.0.resnet", "\x1b[2J", "a\nb", "../x", "\u202e", "x" * 5000)
NUMBERS = (-1, 0, 1, 2, 7, 2**31, 2**40, 2**63, 10**30, True, 0.5, -0.0, 1e308)

LONGEST = 1_000_000  # letters of a text: what a file holds is to be large beside what is known, and not beside memory


def anything(choose: random.Random, depth: int = 3) -> Any:
    """A value that JSON can hold."""
    kind = choose.randrange(6 if depth else 4)
    if kind == 0:
        return choose.choice(WORDS)
    if kind == 1:
        return choose.choice(NUMBERS)
    if kind == 2:
        return None
    if kind == 3:
        return choose.randrange(100)
    inner = [anything(choose, depth - 1) for _ in range(choose.randrange(4))]
    return inner if kind == 4 else {choose.choice(WORDS): value for value in inner}


def places_in(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key or index) of everything inside a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places_in(value[key])


def damaged_json(value: Any, choose: random.Random) -> Any:
    """A JSON value with some of its parts exchanged, renamed, doubled, lost or nested."""
    value = copy.deepcopy(value)
    for _ in range(choose.choice((1, 1, 2, 5))):
        places = list(places_in(value))
        if not places or choose.random() < 0.02:
            return anything(choose)
        within, key = choose.choice(places)
        match choose.randrange(7):
            case 0:
                del within[key]
            case 1 if isinstance(within, dict):
                within[choose.choice([*WORDS, f"{key}.scale", f"model.{key}", str(key)[1:]])] = within.pop(key)
            case 2 if isinstance(within, dict):
                within[f"{key}{choose.randrange(9)}"] = copy.deepcopy(within[key])
            case 3:
                for _ in range(choose.choice((1, 50))):
                    within[key] = [within[key]]
            case 4 if isinstance(within[key], int) and not isinstance(within[key], bool):
                within[key] = within[key] + choose.choice((-1, 1, 8, 2**20, -(2**70)))
            case 5 if isinstance(within[key], str):
                times = choose.choice((0, 2, 1000))
                enough = min(times, LONGEST // max(len(within[key]), 1) + 1)  # what is cut off again takes no memory
                within[key] = (within[key] * enough + choose.choice(WORDS))[:LONGEST]
            case _:
                within[key] = anything(choose)
    return value


def damaged_bytes(data: bytes, choose: random.Random) -> bytes:
    """Bytes flipped, lost, doubled, put in or cut off; in half of the cases near the start, where a header is."""
    found = bytearray(data)
    for _ in range(choose.choice((1, 1, 3, 20))):
        at = choose.randrange(min(len(found), choose.choice((16, 2000, 2**40))) or 1)
        match choose.randrange(6):
            case 0 if found:
                found[min(at, len(found) - 1)] ^= choose.randrange(1, 256)
            case 1:
                del found[at : at + choose.choice((1, 8, 500))]
            case 2:
                found[at:at] = choose.randbytes(choose.choice((1, 8, 500)))
            case 3:
                found[at:at] = found[at : at + 200]
            case 4 if choose.random() < 0.2:
                del found[at:]
            case _:
                found[at : at + 4] = b"\x00\x00\xc0\x7f"  # a float that is no number
    return bytes(found)


def damaged_header(data: bytes, choose: random.Random) -> bytes:
    """A safetensors file with another header: of its tensors, its metadata, or the JSON inside the metadata."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    metadata = header.get("__metadata__", {})
    kind = choose.randrange(5)
    if kind == 0 and metadata:
        key = choose.choice(list(metadata))
        try:
            metadata[key] = json.dumps(damaged_json(json.loads(metadata[key]), choose))
        except ValueError:
            metadata[key] = choose.choice(WORDS)
    elif kind == 1:
        header["__metadata__"] = damaged_json(metadata, choose)
    elif kind == 2:  # names that look like many layers
        stem = choose.choice([key for key in header if key != "__metadata__"])
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        header |= {stem.replace("0", str(n)): empty for n in range(choose.choice((10, 3000)))}
    else:
        header = damaged_json(header, choose)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[end:]


def damage(path: Path, choose: random.Random) -> None:
    """Damage a file, or one file of a folder, where it lies."""
    file = choose.choice(sorted(p for p in path.rglob("*") if p.is_file())) if path.is_dir() else path
    data = file.read_bytes()
    if file.suffix == ".json" and choose.random() < 0.7:
        file.write_text(json.dumps(damaged_json(json.loads(data), choose)))
    elif file.suffix == ".safetensors" and choose.random() < 0.6:
        file.write_bytes(damaged_header(data, choose))
    else:
        file.write_bytes(damaged_bytes(data, choose))


# What comes of it -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """of: what was damaged. came: "read", "refused", or the error that should not be. seconds: of CPU."""

    number: int
    of: str
    came: str
    seconds: float

    @property
    def sound(self) -> bool:
        return self.came in ("read", "refused") and self.seconds <= BOUND_SECONDS


def attempt(source: Source, path: Path, number: int) -> Outcome:
    begun = time.process_time()
    said = ""
    try:
        source.read(path)
        came = "read"
    except BadFile as e:
        said = str(e)
        came = "refused" if said.isprintable() and len(said) <= MESSAGE else f"a message of {len(said)} characters"
    except Exception as e:  # any of them is what is looked for
        came = f"{type(e).__name__}: {e}"[:200]
    return Outcome(number, source.name, came, time.process_time() - begun)


def outcomes(seed: int, numbers: range, folder: Path) -> Iterator[Outcome]:
    """Damages and reads files in a folder, one after the other."""
    (folder / "sound").mkdir()
    known = sources(folder / "sound")
    for source in known:
        source_is = attempt(source, source.path, -1).came
        if source_is != ("refused" if source.name == "lora" else "read"):
            raise RuntimeError(f"the sound file {source.path.name} is not read: {source_is}")
    for number in numbers:
        choose = random.Random(f"{seed} {number}")
        source = choose.choice(known)
        path = folder / source.path.name
        (shutil.copytree if source.path.is_dir() else shutil.copyfile)(source.path, path)
        damage(path, choose)
        yield attempt(source, path, number)
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def resident_mb() -> float:
    """The most memory this process has held so far."""
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="make only this file, and say what came; nothing is recorded")
    parser.add_argument("--notes", default="", help="kept in the record: what else the machine was doing")
    args = parser.parse_args()
    numbers = range(args.files) if args.only is None else range(args.only, args.only + 1)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        before = resident_mb()
        for outcome in outcomes(args.seed, numbers, Path(folder)):
            found.append(outcome)
            if not outcome.sound or args.only is not None:
                print(f"{outcome.number}: {outcome.of}: {outcome.came} after {outcome.seconds:.2f} s", flush=True)
        more = resident_mb() - before
    if args.only is not None:
        return
    rows = []
    for name in dict.fromkeys(outcome.of for outcome in found):
        its = [outcome for outcome in found if outcome.of == name]
        rows.append(
            {"of": name, "files": len(its), "seconds_most": max(o.seconds for o in its)}
            | {came: sum(o.came == came for o in its) for came in ("read", "refused")}
        )
    rows += [
        {"of": o.of, "file": o.number, "came": o.came, "seconds": round(o.seconds, 3)} for o in found if not o.sound
    ]
    summary = {
        "files": len(found),
        "read": sum(o.came == "read" for o in found),
        "refused": sum(o.came == "refused" for o in found),
        "other_errors": sum(o.came not in ("read", "refused") for o in found),
        "seconds_most": max(o.seconds for o in found),
        "seconds_bound": BOUND_SECONDS,
        "mb_more": more,
        "mb_bound": BOUND_MB,
    }
    record("mutations", summary, rows, command_line("mutations"), notes=args.notes)
    if not all(o.sound for o in found) or more > BOUND_MB:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
