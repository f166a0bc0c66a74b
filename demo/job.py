"""What the demo runs: the checkpoint for A, what makes B of it, the prompts, and the graphs made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from asdm_core import packs
from asdm_core.architecture import Architecture
from asdm_core.tensor_file import TensorFile
from demo.server import PACK

EMBEDDED = PACK / "models" / "emoji"
WORKFLOWS = PACK / "workflows" / "api"
SIDES = ("a", "b")  # the pair of the headline
PLAIN, WITH_PACK, SPED_UP = "text_to_image.json", "text_to_image_pack.json", "speed_up.json"
LIKENESS = "close"  # of Speed Up, as its node begins with
SD15 = "sd15"
# The prefixes under which the host finds the other parts of an SD1.5 checkpoint.
PARTS = {"text encoder": "cond_stage_model.", "VAE": "first_stage_model."}

EMBEDDED_LOADER = "ASDMCheckpointLoader"
TEACHER, TEACHER_PACK = "emoji-teacher.safetensors", "emoji-m2.safetensors"

# In the words of the family's captions: a Unicode name, one of six backgrounds, a style of the teacher.
EMOJI_PROMPTS = (
    "red apple on white, noto style",
    "rocket on blue, twemoji style",
    "panda on green, noto style",
    "sunflower on blue, noto style",
    "lady beetle on yellow, twemoji style",
    "soccer ball on white, twemoji style",
    "umbrella on pink, twemoji style",
    "fire engine on grey, noto style",
)
SD15_PROMPTS = (
    "portrait of a girl with silver hair, flower field, soft light",
    "a red fox sitting in fresh snow, morning sun",
    "a small wooden house by a lake, mountains, autumn",
    "a steaming bowl of ramen on a wooden table",
    "a lighthouse on a cliff, stormy sea, dramatic sky",
    "a knight in ornate armor, castle hall, detailed",
    "a street in Tokyo at night, rain, neon reflections",
    "a bouquet of peonies in a glass vase, oil painting",
)
SD15_NEGATIVE = "lowres, blurry, bad anatomy, watermark, text"


class DemoError(Exception):
    """Something a person can mend, in one message."""


@dataclass(frozen=True)
class Variant:
    """What a side has that A has not: the likeness of Speed Up, and whether the job's pack plays."""

    likeness: str | None = None
    pack: bool = False


@dataclass(frozen=True)
class Job:
    """One comparison. ``models`` are further model folders for the host, by kind.

    pack: what B is the checkpoint with; None for Speed Up, which needs no weights. showcase: Speed Up as B, the pack as
    C, and both as D.
    """

    loader: str
    checkpoint: Path
    pack: Path | None
    prompts: Sequence[str]
    negative: str
    size: int
    cfg: float
    steps: int = 20
    models: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    showcase: bool = False

    @property
    def variants(self) -> dict[str, Variant]:
        """What is compared with A, by side."""
        if self.showcase:
            return {"b": Variant(LIKENESS), "c": Variant(pack=True), "d": Variant(LIKENESS, True)}
        return {"b": Variant(pack=True) if self.pack else Variant(LIKENESS)}

    @property
    def sides(self) -> tuple[str, ...]:
        return ("a", *self.variants)

    def variant(self, side: str) -> Variant:
        return self.variants.get(side, Variant())

    def bare(self, side: str) -> str:
        """The side that has the network of this one, and computes every step of it."""
        wanted = Variant(pack=self.variant(side).pack)
        return next(other for other in self.sides if self.variant(other) == wanted)

    def addition(self, side: str = "b") -> str:
        """What a side has and A has not, for people."""
        variant = self.variants[side]
        speed_up = [f"Speed Up ({variant.likeness})"] if variant.likeness else []
        return " and ".join([*speed_up, *([self.pack.stem] if variant.pack and self.pack else [])])

    def graph(self, side: str, index: int, steps: int | None = None) -> dict:
        """The API graph of one image: a side, prompt and seed by index."""
        variant = self.variant(side)
        graph = load_graph(WITH_PACK if variant.pack else SPED_UP if variant.likeness else PLAIN)
        if variant.pack and variant.likeness:
            speed_up(graph)
        graph = needed(graph, node_id(graph, "Save"))
        nodes = by_title(graph)
        nodes["Checkpoint"].update(class_type=self.loader)
        nodes["Checkpoint"]["inputs"] = {"ckpt_name": self.checkpoint.name}
        nodes["Prompt"]["inputs"]["text"] = self.prompts[index]
        nodes["Negative prompt"]["inputs"]["text"] = self.negative
        nodes["Size"]["inputs"].update(width=self.size, height=self.size)
        nodes["Sampler"]["inputs"].update(seed=index + 1, steps=steps or self.steps, cfg=self.cfg)
        nodes["Save"]["inputs"]["filename_prefix"] = f"{index + 1:02}-{side}"
        if variant.pack and self.pack:
            nodes["Pack"]["inputs"]["pack_name"] = self.pack.name
        if variant.likeness:
            nodes["Faster"]["inputs"]["likeness"] = variant.likeness
        return graph


def networks(job: Job) -> dict[str, Architecture]:
    """The network of each side of a job, from the headers of its files.

    Raises tensor_file.BadFile where a file cannot be used, DemoError where it is of another kind than the job needs.
    """
    file = TensorFile(job.checkpoint)
    whole = packs.identify_unet(file)[0].architecture
    config = whole.config
    name = job.checkpoint.name
    if job.loader != EMBEDDED_LOADER:
        if config.family != SD15:
            raise DemoError(
                f"{name} is of the family {config.family}; the demo compares SD1.5 checkpoints. For SD2 and SDXL run "
                "`make serve` and take Templates, asdm, 02 Speed up my checkpoint."
            )
        if whole.cut:
            raise DemoError(
                f"the UNet of {name} is pruned already; the demo makes an unpruned SD1.5 checkpoint faster."
            )
        missing = [part for part, prefix in PARTS.items() if not any(key.startswith(prefix) for key in file)]
        if missing:
            raise DemoError(
                f"{name} holds no {' and no '.join(missing)}; wanted a whole checkpoint, as it lies in ComfyUI's "
                "models/checkpoints."
            )
    with_pack = whole
    if job.pack is not None:
        described = packs.open_pack(job.pack).description
        if described.family != config.family:
            raise DemoError(
                f"{job.pack.name} is a pack for the family {described.family}, {name} is of {config.family}."
            )
        with_pack = described.architecture
    return {side: with_pack if job.variant(side).pack else whole for side in job.sides}


def load_graph(name: str) -> dict:
    """A workflow file of workflows/api."""
    return json.loads((WORKFLOWS / name).read_text("utf-8"))


def speed_up(graph: dict) -> None:
    """Put Speed Up between the pack and the sampler of a graph."""
    source = load_graph(SPED_UP)
    faster = source[node_id(source, "Faster")]
    sampler = by_title(graph)["Sampler"]["inputs"]
    faster["inputs"]["model"], sampler["model"] = sampler["model"], ["faster", 0]
    graph["faster"] = faster


def needed(graph: Mapping, key: str) -> dict:
    """The part of a graph that one node needs."""
    found = {}
    open_ = [key]
    while open_:
        key = open_.pop()
        found[key] = graph[key]
        open_ += [
            value[0] for value in graph[key]["inputs"].values() if isinstance(value, list) and value[0] not in found
        ]
    return found


def by_title(graph: Mapping) -> dict[str, dict]:
    """The nodes of an API graph by their titles."""
    return {node["_meta"]["title"]: node for node in graph.values()}


def node_id(graph: Mapping, title: str) -> str:
    """The id of the node with a title."""
    return next(key for key, node in graph.items() if node["_meta"]["title"] == title)


def find_job(checkpoint: str | None, pack: str | None, steps: int, model_roots: Sequence[Path]) -> Job:
    """The job for what a person asked for; DemoError when a file for it is missing.

    Files are given by path, or by the name they have in the pack or in one of the model folders
    ``model_roots`` of a ComfyUI. The embedded family shows Speed Up, its pack, and both; any other checkpoint without a
    pack gets Speed Up.
    """
    file = find_file(checkpoint or TEACHER, "checkpoint", [EMBEDDED, *(root / "checkpoints" for root in model_roots)])
    embedded = file.parent == EMBEDDED
    showcase = embedded and not pack
    pack = pack or (TEACHER_PACK if embedded else None)
    pack_file = find_file(pack, "pack", [EMBEDDED, *(root / "asdm_packs" for root in model_roots)]) if pack else None
    models = {
        kind: [f.parent] for kind, f in (("checkpoints", file), ("asdm_packs", pack_file)) if f and f.parent != EMBEDDED
    }
    if embedded:
        return Job(EMBEDDED_LOADER, file, pack_file, EMOJI_PROMPTS, "", 128, 3.0, steps, models, showcase)
    return Job("CheckpointLoaderSimple", file, pack_file, SD15_PROMPTS, SD15_NEGATIVE, 512, 7.0, steps, models)


def find_file(name: str, what: str, folders: Sequence[Path]) -> Path:
    """A model file by path or by name in one of the folders."""
    given = Path(name).expanduser()
    candidates = [given] if given.is_absolute() else [given.absolute(), *(folder / name for folder in folders)]
    for path in candidates:
        if path.is_dir():
            raise DemoError(f"the {what} {path} is a folder; wanted one .safetensors file")
        if path.is_file():
            if path.suffix != ".safetensors":
                raise DemoError(
                    f"the {what} {path} is no .safetensors file; other formats are not read. Convert it first."
                )
            return path
    places = "\n  ".join(str(path) for path in candidates)
    raise DemoError(f"there is no {what} {name}; it was looked for as\n  {places}")
