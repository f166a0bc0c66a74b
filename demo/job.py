"""What the demo runs: the checkpoint for A, what makes B of it, the prompts, and the graphs made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from asdm_core import inheritance, packs
from asdm_core.architecture import Architecture
from asdm_core.inheritance import Plan
from asdm_core.packs import TensorFile
from demo.server import PACK

EMBEDDED = PACK / "models" / "emoji"
WORKFLOWS = PACK / "workflows" / "api"
SIDES = ("a", "b")  # the pair of the headline
PLAIN, WITH_PACK, INHERITING = "text_to_image.json", "text_to_image_pack.json", "feature_inheritance.json"
DIAL = "balanced"  # of Feature Inheritance on a checkpoint of a person's
HEADLINE_DIAL = "fast"  # of Feature Inheritance on the embedded family
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
    """What a side has that A has not: a dial of Feature Inheritance, and whether the job's pack plays."""

    dial: str | None = None
    pack: bool = False


@dataclass(frozen=True)
class Job:
    """One comparison. ``models`` are further model folders for the host, by kind.

    pack: what B is the checkpoint with; None for Feature Inheritance, which needs no weights. showcase: inheritance as
    B, the pack as C, and both as D.
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
            return {"b": Variant(HEADLINE_DIAL), "c": Variant(pack=True), "d": Variant(HEADLINE_DIAL, True)}
        return {"b": Variant(pack=True) if self.pack else Variant(DIAL)}

    @property
    def sides(self) -> tuple[str, ...]:
        return ("a", *self.variants)

    def addition(self, side: str = "b") -> str:
        """What a side has and A has not, for people."""
        variant = self.variants[side]
        inheritance = [f"Feature Inheritance ({variant.dial})"] if variant.dial else []
        return " and ".join([*inheritance, *([self.pack.stem] if variant.pack and self.pack else [])])

    def graph(self, side: str, index: int, steps: int | None = None) -> dict:
        """The API graph of one image: a side, prompt and seed by index."""
        variant = self.variants.get(side, Variant())
        graph = load_graph(WITH_PACK if variant.pack else INHERITING if variant.dial else PLAIN)
        if variant.pack and variant.dial:
            inherit(graph)
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
        if variant.dial:
            nodes["Faster"]["inputs"]["preset"] = variant.dial
        return graph


@dataclass(frozen=True)
class Work:
    """What one side computes: its network, and the plan by which some steps of a run inherit."""

    architecture: Architecture
    plan: Plan | None = None

    def full_steps(self, steps: int) -> tuple[bool, ...]:
        """For each step of a run, whether all of the network computes."""
        return self.plan.schedule.computed(steps) if self.plan else (True,) * steps


def work(job: Job) -> dict[str, Work]:
    """What each side of a job computes, from the headers of its files.

    Raises packs.BadFile where a file cannot be used, DemoError where it is of another kind than the job needs.
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
    return {"a": Work(whole)} | {
        side: Work(
            with_pack if variant.pack else whole, inheritance.dial(config, variant.dial) if variant.dial else None
        )
        for side, variant in job.variants.items()
    }


def load_graph(name: str) -> dict:
    """A workflow file of workflows/api."""
    return json.loads((WORKFLOWS / name).read_text("utf-8"))


def inherit(graph: dict) -> None:
    """Put Feature Inheritance between the pack and the sampler of a graph."""
    source = load_graph(INHERITING)
    faster = source[node_id(source, "Faster")]
    sampler = by_title(graph)["Sampler"]["inputs"]
    faster["inputs"]["model"], sampler["model"] = sampler["model"], ["inheritance", 0]
    graph["inheritance"] = faster


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
    ``model_roots`` of a ComfyUI. The embedded family shows inheritance, its pack, and both; any other checkpoint
    without a pack gets Feature Inheritance.
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
