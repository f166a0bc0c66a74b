"""Thumbnails of the workflows, beside their files: without asdm on the left, with it on the right.

    python -m demo.thumbnails [NAME ...]

NAME: part of a workflow's name; without one, all are made. Runs each API graph twice in a real ComfyUI, as it
is and with asdm's nodes taken out. A checkpoint that only its user has is stood in for by the embedded family.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw

import bootstrap
from asdm_core.architecture import FAMILIES, Architecture
from asdm_core.inheritance import dial, saving
from asdm_core.measure import costs, total
from asdm_core.packs import open_pack
from asdm_core.pictures import font
from demo.job import EMBEDDED, needed
from demo.server import PACK, Client, Server, device_flags
from demo.timing import made

WORKFLOWS = PACK / "workflows"
SIDE = 512
# In the words of the family; a finetune of its own stands in for a user's.
STAND_INS = {
    "speed_up_my_checkpoint": ("sunflower on white", "emoji-teacher"),
    "anime_finetune": ("star on white", "emoji-openmoji"),
    "sdxl": ("four leaf clover on white", "emoji-teacher"),
    "fit_a_pack_to_my_checkpoint": ("rocket on blue, openmoji style", "emoji-openmoji"),
}
PICTURES = WORKFLOWS / "pictures"


def api_graph(workflow: Path) -> dict:
    """The API graph that belongs to a workflow file."""
    return json.loads((WORKFLOWS / "api" / f"{api_name(workflow)}.json").read_text("utf-8"))


def api_name(workflow: Path) -> str:
    """Name of a workflow's API graph: "02 Speed up my checkpoint" has its place in the list, which a graph has not."""
    return workflow.stem.lower().lstrip("0123456789 ").replace(" ", "_")


def upload_pictures(client: Client) -> None:
    """Put the pictures that workflows load into the host's input folder."""
    for picture in PICTURES.glob("*.png"):
        client.upload(picture.name, picture.read_bytes())


def on_embedded_family(graph: Mapping, prompt: str, checkpoint: str) -> dict:
    """The graph with the embedded family in place of a stock loader's checkpoint, at its size."""
    made: dict = json.loads(json.dumps(graph))
    loaders = [key for key, node in made.items() if node["class_type"] == "CheckpointLoaderSimple"]
    for key in loaders:
        made[key] |= {"class_type": "ASDMCheckpointLoader", "inputs": {"ckpt_name": f"{checkpoint}.safetensors"}}
    if loaders:
        texts = [node for node in made.values() if node["class_type"] == "CLIPTextEncode"]
        for node, text in zip(texts, (prompt, ""), strict=True):
            node["inputs"]["text"] = text
        for node in made.values():
            inputs = node["inputs"]
            inputs.update({side: 128 for side in ("width", "height") if isinstance(inputs.get(side), int)})
            inputs.update({"cfg": 3.0} if "cfg" in inputs else {})
    return made


def without_asdm(graph: Mapping) -> dict:
    """The graph with each asdm node that turns a MODEL into a MODEL taken out."""
    made: dict = json.loads(json.dumps(graph))
    source = {
        key: node["inputs"].get("model", node["inputs"].get("model_second"))
        for key, node in made.items()
        if node["class_type"].startswith("ASDM") and node["class_type"] != "ASDMCheckpointLoader"
    }
    for node in made.values():
        for name, value in node["inputs"].items():
            while isinstance(value, list) and value[0] in source and name.startswith("model"):
                value = source[value[0]]
            node["inputs"][name] = value
    return made


def first_of(graph: Mapping, kind: str) -> str | None:
    """Id of the first node of a class."""
    return next((key for key, node in graph.items() if node["class_type"] == kind), None)


def saved_picture(client: Client, graph: Mapping, key: str) -> tuple[Image.Image, Mapping[str, list[str]]]:
    """The first image that a Save Image of the graph saves, and what was said on the nodes in the run."""
    run = client.submit(needed(graph, key))
    outputs = client.wait(run)
    picture = Image.open(io.BytesIO(client.fetch(outputs[key]["images"][0]))).convert("RGB")
    return picture, client.get(f"/asdm/notes?prompt_id={run}")


def work_of(graph: Mapping, key: str, steps: int, pixels: tuple[int, int], notes: Mapping[str, list[str]]) -> float:
    """Multiplications of a run of the MODEL that a node gives, against those of the checkpoint in full.

    notes: what was said on the nodes in that run; Speed Up says how many evaluations were made.
    """
    plan, architecture, made_of = None, None, 1.0
    while (kind := graph[key]["class_type"]) != "ASDMCheckpointLoader":
        inputs = graph[key]["inputs"]
        if kind == "ASDMSwitchUNet":
            first, second = (
                work_of(graph, inputs[f"model_{which}"][0], steps, pixels, notes) for which in ("first", "second")
            )
            return (first * inputs["switch_at"] + second * (steps - inputs["switch_at"])) / steps
        if kind in ("ASDMSpeedUp", "ASDMCalibrate"):
            made_of = made({key: notes.get(key, [])})
        elif kind == "ASDMFeatureInheritance":
            plan = inputs["preset"]
        elif kind in ("ASDMApplyPack", "ASDMFitPack"):
            architecture = open_pack(EMBEDDED / inputs["pack_name"]).description.architecture
        key = inputs["model"][0]
    full = Architecture.full(FAMILIES["emoji"])
    architecture = architecture or full
    latent = pixels[1] // 8, pixels[0] // 8
    share = total(costs(architecture, *latent)).total / total(costs(full, *latent)).total
    left = 1 - saving(dial(full.config, plan), architecture, steps, *latent) if plan else 1
    return share * left * made_of


def work_behind(graph: Mapping, picture: str, pixels: tuple[int, int], notes: Mapping[str, list[str]]) -> float:
    """Multiplications behind the picture of a node, in forwards of the checkpoint in full: two a step with guidance."""
    inputs = graph[picture]["inputs"]
    if "steps" in inputs:
        forwards = inputs["steps"] * (1 if inputs["cfg"] == 1 else 2)
        return forwards * work_of(graph, inputs["model"][0], inputs["steps"], pixels, notes)
    return work_behind(graph, inputs["samples"][0], pixels, notes)


def figure(graph: Mapping, pixels: tuple[int, int], notes: Mapping[str, list[str]]) -> str:
    """What a graph saves, in multiplications: times would tell of the machine that made the picture."""
    sampler = first_of(graph, "ASDMABCompare") or first_of(graph, "KSampler")
    if sampler is None:
        raise ValueError("a workflow needs A/B Compare or KSampler for its thumbnail")
    inputs = graph[sampler]["inputs"]
    a, b = (
        work_of(graph, inputs[name][0], inputs["steps"], pixels, notes) if name in inputs else 1.0
        for name in ("original", "model")
    )
    return f"-{1 - b / a:.0%} work"


def saving_side(graph: Mapping, picture: list) -> dict:
    """The graph with a Save Image, "side", of a node's output."""
    save = {"class_type": "SaveImage", "inputs": {"images": picture, "filename_prefix": "side"}}
    return {**graph, "side": save}


def thumbnail(client: Client, graph: Mapping) -> Image.Image:
    """A and B of the graph's comparison, or without asdm and with it; and what is saved."""
    graph = json.loads(json.dumps(graph))
    for node in graph.values():
        node["inputs"].update({name: 1 for name in ("batch_size", "minutes") if name in node["inputs"]})
    comparison, images = first_of(graph, "ASDMABCompare"), first_of(graph, "ASDMCompareImages")
    if images:  # two samplers of one checkpoint
        inputs = graph[images]["inputs"]
        a, b = inputs["images.a"], inputs["images.b"]
        (left, mine), (right, its) = (saved_picture(client, saving_side(graph, side), "side") for side in (a, b))
        labels = tuple(label.strip() for label in inputs["labels"].split(","))
        whole, fewer = work_behind(graph, a[0], left.size, mine), work_behind(graph, b[0], left.size, its)
        return split(left, right, labels, f"-{1 - fewer / whole:.0%} work")
    if comparison:
        sides = [saving_side(graph, [comparison, i]) for i in (1, 2)]
        (left, notes), (right, _) = (saved_picture(client, side, "side") for side in sides)
        inputs = graph[comparison]["inputs"]
        labels = inputs["label_a"], inputs["label_b"]
    else:
        key = first_of(graph, "SaveImage")
        if key is None:
            raise ValueError("a workflow needs A/B Compare or Save Image for its thumbnail")
        (left, _), (right, notes) = (saved_picture(client, g, key) for g in (without_asdm(graph), graph))
        labels = "in full", "with its pack"
    return split(left, right, labels, figure(graph, left.size, notes))


def split(left: Image.Image, right: Image.Image, labels: tuple[str, str], figure: str) -> Image.Image:
    """One picture made of two halves of the same place, with a handle between them and a figure above it."""
    left, right = (picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS) for picture in (left, right))
    middle = SIDE // 2
    left.paste(right.crop((middle, 0, SIDE, SIDE)), (middle, 0))
    draw = ImageDraw.Draw(left)
    draw.line((middle, 0, middle, SIDE), fill="white", width=5)
    draw.ellipse((middle - 17, SIDE // 2 - 17, middle + 17, SIDE // 2 + 17), fill="white")
    draw.text((middle, SIDE // 2), "< >", font=font(18), fill="#404040", anchor="mm")
    for label, x, anchor in zip(labels, (14, SIDE - 14), ("ls", "rs"), strict=True):
        box = draw.textbbox((x, SIDE - 20), label, font=font(22), anchor=anchor)
        draw.rounded_rectangle((box[0] - 8, box[1] - 6, box[2] + 8, box[3] + 6), 8, fill="#202020")
        draw.text((x, SIDE - 20), label, font=font(22), fill="white", anchor=anchor)
    box = draw.textbbox((middle, 20), figure, font=font(44), anchor="mt")
    draw.rounded_rectangle((box[0] - 16, box[1] - 10, box[2] + 16, box[3] + 12), 14, fill="#f4a261")
    draw.text((middle, 20), figure, font=font(44), fill="#1c2330", anchor="mt")
    return left


def main() -> int:
    host = bootstrap.host_path()
    with tempfile.TemporaryDirectory() as base, Server(host, Path(base), flags=device_flags()) as server:
        client = Client(server.url)
        upload_pictures(client)
        for path in sorted(WORKFLOWS.glob("*.json")):
            if sys.argv[1:] and not any(name in path.stem for name in sys.argv[1:]):
                continue
            graph = on_embedded_family(api_graph(path), *STAND_INS.get(api_name(path), ("", "")))
            thumbnail(client, graph).save(path.with_suffix(".jpg"), quality=88)
            print(f"thumbnails: {path.with_suffix('.jpg').name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
