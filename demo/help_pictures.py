"""The pictures of the help pages, in web/docs/pictures: what settings do, on the embedded emoji family.

    python -m demo.help_pictures [NAME ...]

All but the drawing of GRI attention come out of the nodes themselves, in a real ComfyUI, one of them out of its
browser. Times and likenesses in them are of this run on this machine.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from playwright.sync_api import sync_playwright

import bootstrap
from asdm_core import measure
from asdm_core.gri import GRI
from asdm_core.pictures import EDGE, INK, PAPER, fitted, font
from demo.browser import WANTED, find_browser
from demo.job import TEACHER, TEACHER_PACK
from demo.server import PACK, Client, Server, device_flags
from demo.thumbnails import saved_picture
from demo.report import to_tensor
from demo.timing import made as share_made

FOLDER = PACK / "web" / "docs" / "pictures"
FINETUNE = "emoji-openmoji.safetensors"
CELL, GAP = 200, 8  # the help panel is about 300 pixels wide: two pictures side by side, and letters that survive it
LETTERS = 16
COLOURS = 96  # of drawings: enough for flat areas and smooth letters


# Drawing --------------------------------------------------------------------------------------------


def sheet(pictures: Sequence[Image.Image], labels: Sequence[str], columns: int = 2, cell: int = CELL) -> Image.Image:
    """Square pictures with a label of a line or more below each."""
    step, lines = cell + GAP, 1 + max(label.count("\n") for label in labels)
    tall = cell + GAP + lines * (LETTERS + 6)
    made = Image.new("RGB", (columns * step + GAP, -(-len(pictures) // columns) * tall + GAP), PAPER)
    draw = ImageDraw.Draw(made)
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x = GAP + i % columns * step
        y = GAP + i // columns * tall
        draw.rectangle((x - 1, y - 1, x + cell, y + cell), outline=EDGE)
        made.paste(picture.convert("RGB").resize((cell, cell), Image.Resampling.LANCZOS), (x, y))
        for n, line in enumerate(label.split("\n")):
            draw.text((x, y + cell + 4 + n * (LETTERS + 6)), fitted(draw, line, LETTERS, cell), INK, font(LETTERS))
    return made


def seen(gri: GRI, side: int = 32, scale: int = 16) -> tuple[Image.Image, int]:
    """What the queries of one region see of a map of side x side tokens, and how many keys that is."""
    picture = Image.new("RGB", (side * scale, side * scale), "#f1f3f6")
    draw = ImageDraw.Draw(picture)
    # Two regions from the upper left corner; with a shift the first ones are shorter.
    start = gri.shift or gri.window
    end = min(start + gri.window, side)
    for size, colour, width in ((gri.pool, "#9aa5b8", 1), (gri.window, INK, 4)):
        for at in range(gri.shift % size, side, size):
            draw.line((at * scale, 0, at * scale, side * scale), colour, width)
            draw.line((0, at * scale, side * scale, at * scale), colour, width)
    for y in range(start, end):
        for x in range(start, end):
            draw.rectangle((x * scale + 1, y * scale + 1, (x + 1) * scale - 1, (y + 1) * scale - 1), "#f4a261")
    draw.rectangle((start * scale, start * scale, end * scale, end * scale), outline=INK, width=4)
    own = (end - start) ** 2
    return picture, own + (side * side - own) // gri.pool**2


# Graphs ---------------------------------------------------------------------------------------------


def graph(text: str, checkpoint: str = TEACHER, **nodes: tuple[str, Mapping]) -> dict:
    """An API graph: the loader "1", the prompts "2" and "3", an empty latent "4", and further nodes (class, inputs) by
    their ids.
    """
    base: dict[str, tuple[str, Mapping]] = {
        "1": ("ASDMCheckpointLoader", {"ckpt_name": checkpoint}),
        "2": ("CLIPTextEncode", {"clip": ["1", 1], "text": text}),
        "3": ("CLIPTextEncode", {"clip": ["1", 1], "text": ""}),
        "4": ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": 1}),
    }
    return {key: {"class_type": kind, "inputs": dict(inputs)} for key, (kind, inputs) in (base | nodes).items()}


def sampling(model: list, **changes) -> dict:
    """Inputs of a sampler in `graph`. model: the link to its MODEL."""
    return {
        "model": model,
        "positive": ["2", 0],
        "negative": ["3", 0],
        "latent_image": ["4", 0],
        "seed": 1,
        "steps": 20,
        "cfg": 3.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
    } | changes


def decoded(source: str) -> Any:
    """A node for `graph` that decodes the latent of another."""
    return "VAEDecode", {"samples": [source, 0], "vae": ["1", 2]}


PACKED: Any = (
    "ASDMApplyPack",
    {"model": ["1", 0], "pack_name": TEACHER_PACK, "start_percent": 0.0, "end_percent": 1.0, "strength": 1.0},
)
INHERITING: Any = (
    "ASDMFeatureInheritance",
    {"model": ["1", 0], "preset": "balanced", "memory_limit_mb": 0, "keep_on_cpu": False},
)
SPED_UP: Any = "ASDMSpeedUp", {"model": ["1", 0], "likeness": "close"}


class Studio:
    """Makes pictures in a running ComfyUI."""

    def __init__(self, url: str):
        self._url = url
        self._client = Client(url)

    def run(self, made: Mapping) -> tuple[list[Image.Image], dict]:
        """What the node "save" of a graph saves, and all outputs."""
        outputs = self._client.run(made, timeout=600)
        return [
            Image.open(io.BytesIO(self._client.fetch(entry))).convert("RGB") for entry in outputs["save"]["images"]
        ], outputs

    def saved(
        self, source: str, slot: int = 0, *, text: str = "red apple on white, noto style", **nodes
    ) -> Image.Image:
        """The picture that comes out of a node."""
        (picture,), _ = self.run(
            graph(text, save=("SaveImage", {"images": [source, slot], "filename_prefix": "help"}), **nodes)
        )
        return picture

    def settings(self, text: str, names: Sequence[str], x: Mapping, rounds: int = 1, **nodes) -> Image.Image:
        """The checkpoint, and beside it the values of one axis of XY Plot by their names, each with its PSNR; with
        several rounds also with its speed-up.
        """
        made = graph(
            text,
            plot=("ASDMXYPlot", sampling(["1", 0], vae=["1", 2], y="nothing", rounds=rounds, **x)),
            report=("PreviewAny", {"source": ["plot", 2]}),
            save=("SaveImage", {"images": ["plot", 1], "filename_prefix": "help"}),
            **nodes,
        )
        images, outputs = self.run(made)
        plain = self.saved("decoded", text=text, sampler=("KSampler", sampling(["1", 0])), decoded=decoded("sampler"))
        cells = json.loads(outputs["report"]["text"][0])["cells"]
        notes = [
            f"{name}: " + (f"{cell['speedup']:.1f}x, " if rounds > 1 else "") + f"{cell['psnr'][0]:.0f} dB"
            for name, cell in zip(names, cells, strict=True)
        ]
        return sheet([plain, *images], ["without", *notes])

    # One method for each picture; its name is that of the file.

    def speed_up(self) -> Image.Image:
        """The positions of the dial: the evaluations that are left out, and the PSNR."""
        pictures, labels = [], ["without"]
        for likeness in (None, "same to the eye", "close", "same motif"):
            nodes: dict[str, Any] = {
                "5": (SPED_UP[0], SPED_UP[1] | {"likeness": likeness}),
                "6": ("KSampler", sampling(["5" if likeness else "1", 0])),
                "7": decoded("6"),
                "save": ("SaveImage", {"images": ["7", 0], "filename_prefix": "help"}),
            }
            picture, notes = saved_picture(self._client, graph("strawberry on pink, noto style", **nodes), "save")
            pictures.append(picture)
            if likeness:
                psnr = float(measure.psnr(to_tensor(pictures[0]), to_tensor(picture)))
                labels.append(f"{likeness}\n{1 - share_made(notes):.0%} less work, {psnr:.0f} dB")
        return sheet(pictures, labels)

    def calibrate(self) -> Image.Image:
        """What the node draws of four pictures."""
        its = {"pictures": 4, "name": "help", "likeness": "close", "try_fewer_steps": True}
        run = sampling(["1", 0], sampler_name="dpmpp_2m", scheduler="karras", **its)
        return self.saved("5", 2, text="strawberry on pink, noto style", **{"5": ("ASDMCalibrate", run)})

    def fit_pack(self) -> Image.Image:
        """The finetune's own pictures, with a pack before and after it was fitted."""
        prompts = list(json.loads((PACK / "models" / "emoji" / "concepts.json").read_text("utf-8")).values())
        inputs = {
            "model": ["1", 0],
            "clip": ["1", 1],
            "vae": ["1", 2],
            "pack_name": TEACHER_PACK,
            "prompts": "\n".join(prompts[:: len(prompts) // 60]),
            "minutes": 5.0,
            "width": 128,
            "height": 128,
            "filename_prefix": "help",
            "cfg": 3.0,
            "batch": 8,
            "learning_rate": 5e-4,
            "seed": 0,
        }
        fitting: Any = "ASDMFitPack", inputs
        picture = self.saved("5", 2, checkpoint=FINETUNE, **{"5": fitting})
        picture.thumbnail((640, 1200), Image.Resampling.LANCZOS)
        return picture

    def inheritance(self) -> Image.Image:
        return self.settings(
            "strawberry on pink, noto style",
            names := ("faithful", "balanced", "fast"),
            {"x": "inheritance", "x.values": ", ".join(names)},
            rounds=9,
        )

    def switch(self) -> Image.Image:
        return self.settings(
            "red apple on white, noto style",
            ("S2 at 0.6", "S3 at 0.4", "small only"),
            {"x": "switch at", "x.values": "0.6, 0.4, 0", "x.model_second": ["5", 0], "x.unit": "share of steps"},
            **{"5": PACKED},
        )

    def pack_window(self) -> Image.Image:
        return self.settings(
            "rocket on blue, twemoji style",
            ("0 to 1", "0 to 0.5", "0.5 to 1"),
            {"x": "pack window", "x.values": "0-1, 0-0.5, 0.5-1", "x.pack_name": TEACHER_PACK},
        )

    def family(self) -> Image.Image:
        """What the two checkpoints of the family make of the same words."""
        return sheet(
            [
                self.saved(
                    "6",
                    text="star on white",
                    checkpoint=checkpoint,
                    **{"5": ("KSampler", sampling(["1", 0])), "6": decoded("5")},
                )
                for checkpoint in (TEACHER, FINETUNE)
            ],
            ["emoji-teacher", "emoji-openmoji"],
        )

    def gri(self) -> Image.Image:
        settings = {
            "window 8, pool 4": GRI(8, 4),
            "window 8, pool 2": GRI(8, 2),
            "window 16, pool 4": GRI(16, 4),
            "8 and 4, shifted": GRI(8, 4, 4),
        }
        drawn = {name: seen(gri) for name, gri in settings.items()}
        return sheet(
            [picture for picture, _ in drawn.values()],
            [f"{name}: {keys} keys" for name, (_, keys) in drawn.items()],
            cell=240,
        )

    def plan(self) -> Image.Image:
        return self.saved(
            "7",
            1,
            **{
                "5": INHERITING,
                "6": ("KSampler", sampling(["5", 0])),
                "7": (
                    "ASDMInheritancePlan",
                    {"model": ["5", 0], "steps": 20, "width": 128, "height": 128, "batch_size": 1, "after": ["6", 0]},
                ),
            },
        )

    def speed(self) -> Image.Image:
        nodes: dict[str, Any] = {
            "5": PACKED,
            "6": (SPED_UP[0], SPED_UP[1] | {"model": ["5", 0]}),
            "7": ("ASDMMeasureSpeed", {"model": ["6", 0]}),
            "8": ("KSampler", sampling(["7", 0])),
            "9": ("ASDMSpeedReadout", {"model": ["7", 0], "after": ["8", 0]}),
        }
        return self.saved("9", **nodes)

    def inspect(self) -> Image.Image:
        nodes: dict[str, Any] = {
            "5": PACKED,
            "6": (INHERITING[0], INHERITING[1] | {"model": ["5", 0]}),
            "7": (SPED_UP[0], SPED_UP[1] | {"model": ["6", 0]}),
            "8": ("ASDMInspectModel", {"model": ["7", 0], "width": 128, "height": 128, "at_percent": 0.0}),
        }
        return self.saved("8", 1, **nodes)

    def a_against_b(self) -> Image.Image:
        inputs = sampling(["5", 0], vae=["1", 2], rounds=5, label_a="in full", label_b="sped up")
        return self.saved("6", **{"5": SPED_UP, "6": ("ASDMABCompare", inputs)})

    def xy_plot(self) -> Image.Image:
        axes = {
            "x": "speed up",
            "x.values": "off, same to the eye, close",
            "y": "pack",
            "y.values": f"off, {TEACHER_PACK}",
        }
        return self.saved(
            "plot",
            text="panda on green, noto style",
            plot=("ASDMXYPlot", sampling(["1", 0], vae=["1", 2], rounds=5, **axes)),
        )

    def compare(self) -> Image.Image:
        """The comparing node in the browser, as a slider and as a difference."""
        program = find_browser()
        if not program:
            raise FileNotFoundError(WANTED)
        self._client.request(
            "/settings", {"Comfy.TutorialCompleted": True}
        )  # else the templates cover the page of a new user
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": 1600, "height": 1300})
            page.goto(self._url)
            page.wait_for_function(
                "() => window.app?.graph && window.LiteGraph?.registered_node_types?.ASDMApplyPack", timeout=120_000
            )
            workflow = json.loads((PACK / "workflows" / "01 Quick start.json").read_text("utf-8"))
            page.evaluate(
                """async workflow => {
              await app.loadGraphData(workflow)
              for (const [type, name] of [["ASDMABCompare", "rounds"], ["EmptyLatentImage", "batch_size"]])
                app.graph._nodes.find(n => n.type === type).widgets.find(w => w.name === name).value = 1
              await app.queuePrompt(0)
            }""",
                workflow,
            )
            view = page.locator(".asdm-compare").filter(has=page.locator("img")).last
            view.wait_for(timeout=300_000)
            page.evaluate(
                "() => { const n = app.graph._nodes.find(n => n.type === 'ASDMABCompare'); app.canvas.ds.scale = "
                "1; app.canvas.centerOnNode(n) }"
            )
            page.wait_for_timeout(1000)
            shots = []
            for mode in ("Slider", "Difference"):
                view.get_by_role("button", name=mode).click()
                page.wait_for_timeout(1000)
                shots.append(Image.open(io.BytesIO(view.screenshot())))
            browser.close()
        both = Image.new("RGB", (shots[0].width, sum(shot.height + GAP for shot in shots) - GAP), PAPER)
        for i, shot in enumerate(shots):
            both.paste(shot, (0, i * (shot.height + GAP)))
        return both


PHOTOS = {
    "speed_up",
    "fit_pack",
    "inheritance",
    "switch",
    "pack_window",
    "family",
    "a_against_b",
    "xy_plot",
    "compare",
}
NAMES = [name for name in vars(Studio) if name in PHOTOS | {"calibrate", "gri", "plan", "speed", "inspect"}]


def save(name: str, picture: Image.Image) -> Path:
    """Write a picture, as small as its kind allows."""
    if name in PHOTOS:
        picture.save(path := FOLDER / f"{name}.jpg", quality=85, optimize=True)
    else:
        picture.quantize(COLOURS).save(path := FOLDER / f"{name}.png", optimize=True)
    return path


def main(names: Sequence[str]) -> int:
    if unknown := set(names) - set(NAMES):
        print(f"help_pictures: there is no {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as base,
        Server(bootstrap.host_path(), Path(base), flags=device_flags()) as server,
    ):
        studio = Studio(server.url)
        for name in names or NAMES:
            path = save(name, getattr(studio, name)())
            print(f"help_pictures: {path.name}, {path.stat().st_size / 1000:.0f} kB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
