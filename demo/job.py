"""What the demo runs: the checkpoint for A, the pack for B, the prompts, and the graphs made of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from demo.server import PACK

EMBEDDED = PACK / "models" / "emoji"
WORKFLOWS = PACK / "workflows" / "api"
SIDES = ("a", "b")
GRAPHS = {"a": "text_to_image.json", "b": "text_to_image_pack.json"}

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
class Job:
    """One comparison. ``models`` are further model folders for the host, by kind."""

    loader: str
    checkpoint: Path
    pack: Path
    prompts: Sequence[str]
    negative: str
    size: int
    cfg: float
    steps: int = 20
    models: Mapping[str, Sequence[Path]] = field(default_factory=dict)

    def graph(self, side: str, index: int, steps: int | None = None) -> dict:
        """The API graph of one image: side "a" or "b", prompt and seed by index."""
        graph = copy.deepcopy(load_graph(side))
        nodes = by_title(graph)
        nodes["Checkpoint"].update(class_type=self.loader)
        nodes["Checkpoint"]["inputs"] = {"ckpt_name": self.checkpoint.name}
        nodes["Prompt"]["inputs"]["text"] = self.prompts[index]
        nodes["Negative prompt"]["inputs"]["text"] = self.negative
        nodes["Size"]["inputs"].update(width=self.size, height=self.size)
        nodes["Sampler"]["inputs"].update(seed=index + 1, steps=steps or self.steps, cfg=self.cfg)
        nodes["Save"]["inputs"]["filename_prefix"] = f"{index + 1:02}-{side}"
        if side == "b":
            nodes["Pack"]["inputs"]["pack_name"] = self.pack.name
        return graph


def load_graph(side: str) -> dict:
    """The workflow file of a side."""
    return json.loads((WORKFLOWS / GRAPHS[side]).read_text("utf-8"))


def by_title(graph: Mapping) -> dict[str, dict]:
    """The nodes of an API graph by their titles."""
    return {node["_meta"]["title"]: node for node in graph.values()}


def node_id(graph: Mapping, title: str) -> str:
    """The id of the node with a title."""
    return next(key for key, node in graph.items() if node["_meta"]["title"] == title)


def find_job(checkpoint: str | None, pack: str | None, steps: int, model_roots: Sequence[Path]) -> Job:
    """The job for what a person asked for; DemoError when a file for it is missing.

    Files are given by path, or by the name they have in the pack or in one of the model folders
    ``model_roots`` of a ComfyUI.
    """
    file = find_file(checkpoint or TEACHER, "checkpoint", [EMBEDDED, *(root / "checkpoints" for root in model_roots)])
    embedded = file.parent == EMBEDDED
    if not pack and not embedded:
        raise DemoError(
            f"a pack for {file.name} is needed: PACK=my-pack.safetensors. The packs that come with asdm are trained for "
            "the embedded emoji family, and a pack that was not trained gives noise. One pack fits every SD1.5 "
            "checkpoint; train/ makes it (see train/README.md)."
        )
    pack_file = find_file(pack or TEACHER_PACK, "pack", [EMBEDDED, *(root / "asdm_packs" for root in model_roots)])
    models = {kind: [f.parent] for kind, f in (("checkpoints", file), ("asdm_packs", pack_file)) if f.parent != EMBEDDED}
    if embedded:
        return Job("ASDMCheckpointLoader", file, pack_file, EMOJI_PROMPTS, "", 128, 3.0, steps, models)
    return Job("CheckpointLoaderSimple", file, pack_file, SD15_PROMPTS, SD15_NEGATIVE, 512, 7.0, steps, models)


def find_file(name: str, what: str, folders: Sequence[Path]) -> Path:
    """A model file by path or by name in one of the folders."""
    candidates = [Path(name).expanduser().absolute(), *(folder / name for folder in folders)]
    for path in candidates:
        if path.is_file():
            if path.suffix != ".safetensors":
                raise DemoError(f"the {what} {path} is no .safetensors file; other formats are not read")
            return path
    places = "\n  ".join(str(path) for path in candidates)
    raise DemoError(f"there is no {what} {name}; it was looked for as\n  {places}")
