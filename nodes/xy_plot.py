"""A grid of runs over asdm's own settings, with time and likeness in each cell."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from comfy_api.latest import io

from ..asdm_core import inheritance
from ..asdm_core.assignment import Window
from ..asdm_core.inheritance import DIALS, Plan, Schedule
from ..asdm_core.pictures import Row, duration, finite, grid
from ..asdm_core.switching import UNITS, SwitchPoint
from ..asdm_core.text import printable
from .apply_pack import apply_pack
from .common import CATEGORY, SHOWS_PICTURE, sampling_inputs
from .engine import files
from .engine.assigned import name_of, packs_of
from .engine.comparison import Sampling, alike, cell_of, decode
from .engine.inheritance import Inheritance
from .engine.network import architecture_of
from .engine.on_model import with_technique, without_technique
from .engine.picture import from_image, preview, to_image
from .engine.regional import Regional
from .engine.switch import beside, with_switch
from .engine.technique import techniques_of
from .engine.timing import TimedModel, alternate
from .speed_up import LIKENESS, SpeedUp, state_of_profiles, with_speed_up

OFF = "off"
ENDING = ".safetensors"  # of a pack's name; may be left out
WHOLE = Window()
MOST_CELLS = 400


# What one value of an axis does to a MODEL: (model, value, the axis' other settings) -> model ----------


def _inherit(model, value: str):
    if value == OFF:
        return without_technique(model, Inheritance)
    config = architecture_of(model).config
    steps = re.fullmatch(r"([0-9]{1,2}) */ *([0-9]{1,4})", value)
    if value in DIALS:
        plan = inheritance.dial(config, value)
    elif value.startswith("{"):
        plan = Plan.from_json(value)
    elif steps:
        branch, interval = map(int, steps.groups())
        plan = inheritance.deepcache(config, branch, Schedule(interval=interval)).reusing("forecast")
    else:
        raise ValueError(
            f"XY Plot, inheritance: wanted {OFF}, {', '.join(DIALS)}, a skip branch and an interval (0/3), or a plan "
            f"as JSON; got {printable(repr(value))}."
        )
    return with_technique(model, Inheritance(plan))


def _speed_up(model, value: str):
    if value == OFF:
        return without_technique(model, SpeedUp)
    if value not in LIKENESS:
        raise ValueError(
            f"XY Plot, speed up: wanted {OFF}, {', '.join(LIKENESS)}, as on Speed Up; got {printable(repr(value))}."
        )
    return with_speed_up(model, SpeedUp(value))


@dataclass(frozen=True)
class Played:
    """What axes say of one pack; of what they do not say, Apply Pack's defaults hold."""

    name: str
    window: Window | None = None
    strength: float | None = None

    def on(self, model):
        """The MODEL with the pack. Raises ValueError."""
        known = {known.removesuffix(ENDING): known for known in files.packs()}
        short = self.name.removesuffix(ENDING)
        if short not in known:
            there = ", ".join(known) or "none"
            raise ValueError(f"XY Plot: there is no pack {printable(repr(self.name))}. There are {there}.")
        name = known[short]
        varied = self.window is not None or self.strength is not None
        if varied and name in map(name_of, packs_of(model)):
            raise ValueError(
                f"XY Plot: {name} plays on this MODEL already, in a window and a strength of its own, and another on "
                "top would not take that away. Connect the MODEL as it is before Apply Pack."
            )
        window, strength = self.window or WHOLE, 1.0 if self.strength is None else self.strength
        return apply_pack(model, files.pack_path(name), name, window, strength)


def _pack(value: str) -> Played | None:
    return None if value == OFF else Played(value)


def _strength(value: str, pack_name: str) -> Played:
    return Played(pack_name, strength=_number(value, "pack strength", 0, 2))


def _window(value: str, pack_name: str) -> Played:
    start, dash, end = value.partition("-")
    if not dash:
        raise ValueError(
            f"XY Plot, pack window: wanted where it begins and ends in the run (0-0.5), got {printable(repr(value))}."
        )
    return Played(pack_name, Window(_number(start, "pack window", 0, 1), _number(end, "pack window", 0, 1)))


def _joined(said: Iterable[Played]) -> list[Played]:
    """What is said of each pack, from all axes."""
    found: dict[str, Played] = {}
    for one in said:
        short = one.name.removesuffix(ENDING)
        before = found.get(short, one)
        window = before.window if one.window is None else one.window
        strength = before.strength if one.strength is None else one.strength
        found[short] = Played(before.name, window, strength)
    return list(found.values())


def _regional(model, value: str):
    if value == OFF:
        return without_technique(model, Regional)
    return with_technique(model, Regional(0 if value == "auto" else _number(value, "GRI window", 0, 1024, whole=True)))


def _switch(model, value: str, model_second, unit: str):
    return with_switch(model, model_second, SwitchPoint(_number(value, "switch at", 0, 10_000), unit))


def _number(text: str, name: str, low: float, high: float, whole: bool = False) -> Any:
    """A value as the input of a node would take it. Raises ValueError."""
    kind = "a whole number" if whole else "a number"
    try:
        number = int(text) if whole else float(text)
    except ValueError:
        number = math.nan
    if not low <= number <= high:
        raise ValueError(
            f"XY Plot, {name}: wanted {kind} from {low:g} to {high:g}, got {printable(repr(text.strip()))}."
        )
    return number


@dataclass(frozen=True)
class Axis:
    """What an axis can vary: how, its values to begin with, its other inputs, and its place in the order of nodes.

    apply: MODEL and a value -> MODEL; says: in the place of it, a value -> what it says of a pack.
    """

    apply: Callable | None
    default: str
    help: str
    inputs: Callable[[], list[io.Input]] = list
    place: int = 0
    says: Callable[..., Played | None] | None = None


def _pack_input() -> list[io.Input]:
    return [io.Combo.Input("pack_name", options=files.packs(), tooltip="The pack that plays.")]


def _second_inputs() -> list[io.Input]:
    return [
        io.Model.Input("model_second", tooltip="The model that takes over."),
        io.Combo.Input(
            "unit", options=list(UNITS), default="percent", tooltip="What the values count; see Switch UNet."
        ),
    ]


# Nodes stand in this order: a pack is on the model before anything looks at its layers, GRI is what its own axis says
# and not what Speed Up adds, and a switch comes last.
AXES = {
    "speed up": Axis(
        _speed_up,
        f"{OFF}, {', '.join(LIKENESS)}",
        f"{OFF}, {', '.join(LIKENESS)}: how like the full run Speed Up is to stay",
        place=1,
    ),
    "inheritance": Axis(
        _inherit,
        f"{OFF}, {', '.join(DIALS)}",
        f"{OFF}, {', '.join(DIALS)}, skip branch/interval (0/3), or plans as JSON, one a line",
        place=1,
    ),
    "pack": Axis(
        None, OFF, f"{OFF} and names of packs, as Apply Pack lists them, with or without the ending", says=_pack
    ),
    "pack strength": Axis(None, "0, 0.5, 1", "of the experts and gains of a pack", _pack_input, says=_strength),
    "pack window": Axis(
        None, "0-1, 0-0.5, 0.5-1", "where in the run the pack begins and ends to play", _pack_input, says=_window
    ),
    "GRI window": Axis(_regional, f"{OFF}, auto", f"{OFF}, auto, or sides of the regions in tokens", place=2),
    "switch at": Axis(_switch, "0.25, 0.5, 0.75", "where the second model takes over", _second_inputs, place=3),
}


def axis_input(name: str, tooltip: str, first: str) -> io.DynamicCombo.Input:
    """The input of one axis; `first` is the choice to begin with."""
    options = {"nothing": []} | {
        key: [
            io.String.Input(
                "values",
                default=axis.default,
                multiline=True,
                tooltip=f"{axis.help}. Separated by commas, or one a line.",
            ),
            *axis.inputs(),
        ]
        for key, axis in AXES.items()
    }
    ordered = [first, *(key for key in options if key != first)]
    return io.DynamicCombo.Input(
        name, tooltip=tooltip, options=[io.DynamicCombo.Option(key, options[key]) for key in ordered]
    )


def values(text: str) -> list[str]:
    """The values in a text: one a line, or separated by commas where there is one line without a plan. Raises
    ValueError.
    """
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if len(lines) == 1 and "{" not in text:
        lines = [part.strip() for part in text.split(",") if part.strip()]
    if not lines:
        raise ValueError("XY Plot: an axis needs at least one value; choose nothing for an axis that varies nothing.")
    return lines


@dataclass(frozen=True)
class Point:
    """A value of an axis. label: of its cells. place: in the order of nodes. apply: MODEL -> MODEL; or pack: what it
    says of one.
    """

    label: str = ""
    place: int = 0
    apply: Callable | None = None
    pack: Played | None = None


def set_to(model, values: Sequence[Point]):
    """A clone of MODEL with what the values of all axes say. Packs come first: others look at their layers."""
    for pack in _joined(value.pack for value in values if value.pack):
        model = pack.on(model)
    for value in sorted(values, key=lambda value: value.place):
        model = value.apply(model) if value.apply else model
    return model


def points(name: str, settings: dict, model) -> list[Point]:
    """The values of an axis, for clones of MODEL."""
    settings = dict(settings)
    kind = settings.pop(name)
    if "model_second" in settings:  # where it cannot share the UNet, all cells share one copy
        settings["model_second"] = beside(model, settings["model_second"])
    if kind == "nothing":
        return [Point()]
    axis, found = AXES[kind], []
    for value in values(settings.pop("values")):
        shown = Plan.from_json(value).name or "plan" if value.startswith("{") else value.removesuffix(ENDING)
        label = f"{kind}: {shown}"
        if axis.says:
            found.append(Point(label, axis.place, pack=axis.says(value, **settings)))
        elif axis.apply:
            found.append(Point(label, axis.place, partial(_applied, axis.apply, value, settings)))
    return found


def _applied(apply: Callable, value: str, settings: dict, model):
    return apply(model, value, **settings)


def same(a, b) -> bool:
    """Whether asdm does the same on two MODELs that come from one."""
    return techniques_of(a) == techniques_of(b)


class ASDMXYPlot(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ASDMXYPlot",
            display_name="XY Plot (asdm)",
            category=CATEGORY,
            description="Samples with every combination of two of asdm's settings (Speed Up, inheritance, packs, their "
            "windows and strength, GRI, switch points) and draws all pictures in a grid, each with its time, the "
            "speed-up, and its PSNR and SSIM against the model as it came in.",
            search_aliases=["xy plot", "xyz plot", "grid", "parameter sweep", "benchmark", "compare settings"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="Cells are compared with this model as it is.", extra_dict=SHOWS_PICTURE
                ),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Latent.Input("latent_image"),
                io.Vae.Input("vae"),
                axis_input("x", "What differs from left to right.", "speed up"),
                axis_input("y", "What differs from top to bottom.", "nothing"),
                *sampling_inputs(),
                io.Int.Input(
                    "rounds",
                    default=1,
                    min=1,
                    max=50,
                    advanced=True,
                    tooltip="Timed runs of each cell; the median is shown.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="plot", tooltip="The labelled grid."),
                io.Image.Output(display_name="images", tooltip="The pictures of all cells, row by row."),
                io.String.Output(display_name="report", tooltip="All numbers, as JSON."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        asked = str(inputs)
        named = [name for name in files.packs() if name.removesuffix(ENDING) in asked]
        profiles = state_of_profiles() if "speed up" in asked else []
        return [*(files.changed(files.pack_path, name) for name in named), *profiles]

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        latent_image,
        vae,
        x,
        y,
        rounds,
        **settings,
    ):
        columns, lines = points("x", x, model), points("y", y, model)
        if len(columns) * len(lines) > MOST_CELLS:
            raise ValueError(
                f"XY Plot: {len(columns)} by {len(lines)} values make {len(columns) * len(lines)} cells, and each is a "
                f"run of its own; at most {MOST_CELLS} are drawn. Take fewer values, or several plots."
            )
        sampling = Sampling(**settings)
        sample, steps = sampling.of(positive, negative, latent_image), sampling.steps
        plain = TimedModel("as it came in", model, sample)
        cells, labels = [], []
        for row in lines:
            for column in columns:
                changed = set_to(model, (column, row))
                labels.append(", ".join(filter(None, (column.label, row.label))))
                # A cell that changes nothing is the reference itself, at 1.00, and not the same once more.
                cells.append(plain if same(changed, model) else TimedModel(labels[-1], changed, sample))
        alternate([plain, *(cell for cell in cells if cell is not plain)], rounds, steps)
        reference = decode(vae, plain.latent)
        images = [decode(vae, cell.latent) for cell in cells]
        likenesses = [alike(reference, picture) for picture in images]
        notes = [note(plain, cell, pairs) for cell, pairs in zip(cells, likenesses, strict=True)]
        rows = []
        for i, row in enumerate(lines):
            here = slice(i * len(columns), (i + 1) * len(columns))
            rows.append(Row([from_image(picture[0]) for picture in images[here]], row.label, notes=notes[here]))
        heads = [column.label or "as it came in" for column in columns]
        height, width = reference.shape[1:3]
        subtitle = (
            f"{sampling}, {width} x {height}, seed {sampling.seed}\neach cell: speed-up, time, PSNR and SSIM against it"
        )
        plot = to_image(
            grid(f"The model as it came in: {duration(plain.median)}", subtitle, heads, rows, cell_of(reference))
        )
        report = {
            "plain": plain.facts(steps),
            "cells": [
                {
                    **cell.facts(steps),
                    "label": label,
                    "speedup": round(plain.median / cell.median, 4),
                    "psnr": [finite(psnr) for psnr, _ in pairs],
                    "ssim": [finite(ssim) for _, ssim in pairs],
                }
                for label, cell, pairs in zip(labels, cells, likenesses, strict=True)
            ],
            **sampling.facts(model, reference, rounds),
        }
        return io.NodeOutput(
            plot,
            torch.cat(images),
            json.dumps(report, indent=1),
            ui=preview(cls, plot, "\n".join(f"{label}: {text}" for label, text in zip(labels, notes, strict=True))),
        )


def note(plain: TimedModel, cell: TimedModel, pairs: list[tuple[float, float]]) -> str:
    """What stands below a cell: 1.62x  1.9 s   31.2 dB  0.94; over a batch, the means."""
    psnr, ssim = (statistics.mean(of) for of in zip(*pairs, strict=True))
    identical = all(finite(p) is None for p, _ in pairs)
    like = "identical" if identical else f"{psnr:.1f} dB" + ("" if math.isnan(ssim) else f"  {ssim:.3f}")
    return f"{plain.median / cell.median:.2f}x  {duration(cell.median)}   {like}"
