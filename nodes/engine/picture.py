"""Draws a UNet, who plays each unit and its share of the work; and a plan of feature inheritance, units by steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from comfy_api.latest import ui
from PIL import Image, ImageDraw, ImageFont

from ...asdm_core.addresses import Unit, UNetConfig, walk
from ...asdm_core.architecture import Architecture
from ...asdm_core.inheritance import COMPUTED, IDLE, INHERITED, PARTLY, InheritedStep, Plan
from ...asdm_core.pictures import duration
from ...asdm_core.text import printable
from .technique import LEFT_OUT

BACKGROUND, INK, FAINT = "#ffffff", "#1c2330", "#667085"
COLOURS = {"checkpoint": "#a9bfdc", "pack": "#f4a261", "cut": "#f1f3f6"}
NAMES = {"resnet": "resnet", "transformer": "attn", "downsampler": "down", "upsampler": "up"}

BOX, GAP, MARGIN, ROW, HEAD = (84, 40), 8, 28, 96, 92


@dataclass(frozen=True)
class UnitView:
    """How one unit is drawn: its role, and its share of all multiplications (0..1)."""

    role: str
    share: float


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


class _Sheet:
    """A drawing at twice the size, halved at the end for smooth lines and letters."""

    def __init__(self, width: int, height: int):
        self.image = Image.new("RGB", (2 * width, 2 * height), BACKGROUND)
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x, y, text, size=13, fill=INK, anchor="la"):
        self.draw.text((2 * x, 2 * y), printable(text, 500), font=_font(2 * size), fill=fill, anchor=anchor)

    def box(self, x, y, w, h, fill, outline=None, dashed=False):
        self.draw.rounded_rectangle(
            (2 * x, 2 * y, 2 * (x + w), 2 * (y + h)), 10, fill=fill, outline=None if dashed else outline, width=2
        )
        if dashed:
            for at in range(int(x) + 5, int(x + w) - 5, 8):
                self.draw.line((2 * at, 2 * y, 2 * at + 8, 2 * y), fill=outline, width=2)
                self.draw.line((2 * at, 2 * (y + h), 2 * at + 8, 2 * (y + h)), fill=outline, width=2)

    def cell(self, x, y, w, h, fill):
        # At least a line: Pillow refuses a rectangle that ends before it begins.
        self.draw.rectangle((2 * x, 2 * y, max(2 * x, 2 * (x + w) - 3), max(2 * y, 2 * (y + h) - 3)), fill=fill)

    def line(self, points, fill=FAINT, width=2):
        self.draw.line([2 * p for p in points], fill=fill, width=width)

    def done(self) -> Image.Image:
        return self.image.resize((self.image.width // 2, self.image.height // 2), Image.Resampling.LANCZOS)


def draw_levels(config: UNetConfig, views: Mapping[str, UnitView], title: str, lines: Sequence[str]) -> Image.Image:
    """The UNet by levels: for each its share of the work, in the colours of who plays it, and what is cut."""
    blocks: dict[str, list[Unit]] = {}
    for u in walk(config):
        if u.side in ("down", "mid", "up"):
            blocks.setdefault(u.block, []).append(u)
    width, row, left = PLAN_WIDTH, 30, 12
    said = [line for whole in lines for line in wrapped(whole, 14, width - 2 * left)]
    heads = wrapped(title, 17, width - 2 * left)
    top = 20 + 24 * len(heads) + 20 * len(said) + 12
    sheet = _Sheet(width, top + len(blocks) * row + 44)
    for i, line in enumerate(heads):
        sheet.text(left, 12 + 24 * i, line, 17)
    for i, line in enumerate(said):
        sheet.text(left, 16 + 24 * len(heads) + 20 * i, line, 14, FAINT)
    shares = {block: sum(views[u.address].share for u in units) for block, units in blocks.items()}
    longest, bars = max(shares.values()) or 1.0, 190
    for i, (block, units) in enumerate(blocks.items()):
        y = top + i * row
        x: float = left + 66
        sheet.text(x - 8, y + 11, block, 14, INK, "rm")
        for role in ("checkpoint", "pack"):
            share = sum(views[u.address].share for u in units if views[u.address].role == role)
            if share:
                wide = bars * share / longest
                sheet.cell(x, y, wide, 22, COLOURS[role])
                x += wide
        cut, played = (sum(views[u.address].role == role for u in units) for role in ("cut", "pack"))
        words = [f"{shares[block]:.0%}"]
        words += [f"{played} of {len(units)} layers the pack's"] if played else []
        words += [f"{cut} of {len(units)} cut"] if cut else []
        sheet.text(x + 8, y + 11, ", ".join(words), 14, INK, "lm")
    x, y = left, top + len(blocks) * row + 16
    for role, meaning in (("checkpoint", "the checkpoint's own"), ("pack", "played by a pack")):
        sheet.box(x, y, 20, 14, COLOURS[role], FAINT)
        sheet.text(x + 28, y + 7, meaning, 14, INK, "lm")
        x += 180
    sheet.text(x, y + 7, "%: share of the work", 14, FAINT, "lm")
    return sheet.done()


def draw_unet(config: UNetConfig, views: Mapping[str, UnitView], title: str, subtitle: str) -> Image.Image:
    """A picture of the UNet: encoder on the left, decoder on the right, one row per resolution."""
    rows: dict[str, list[Unit]] = {}
    for u in walk(config):
        if u.side in ("down", "mid", "up"):
            name = u.block
            rows.setdefault(name, []).append(u)
    left = max(len(us) for name, us in rows.items() if name.startswith("down"))
    right = max(len(us) for name, us in rows.items() if name.startswith("up"))
    step = BOX[0] + GAP
    half = MARGIN + left * step + 3 * GAP
    width = half + right * step + MARGIN
    with_mid = "mid" in rows
    height = HEAD + (config.levels + with_mid) * ROW + 46
    sheet = _Sheet(width, height)

    sheet.text(MARGIN, 18, title, 21)
    sheet.text(MARGIN, 48, subtitle, 14, FAINT)
    for level in range(config.levels):
        y = HEAD + level * ROW
        down, up = f"down.{level}", f"up.{config.levels - 1 - level}"
        end = MARGIN + len(rows[down]) * step
        sheet.line((end, y + 22 + BOX[1] / 2, half - GAP, y + 22 + BOX[1] / 2))  # the skips
        _draw_block(sheet, MARGIN, y, down, config.channels(level), rows[down], views)
        _draw_block(sheet, half, y, up, config.channels(level), rows[up], views)
    if with_mid:
        _draw_block(
            sheet,
            half - 2 * step,
            HEAD + config.levels * ROW,
            "mid",
            config.channels(config.levels - 1),
            rows["mid"],
            views,
        )
    x = MARGIN
    for role, meaning in (("checkpoint", "the checkpoint's own"), ("pack", "played by a pack"), ("cut", "cut")):
        sheet.box(x, height - 34, 22, 16, COLOURS[role], FAINT, dashed=role == "cut")
        sheet.text(x + 30, height - 26, meaning, 13, INK, "lm")
        x += 190
    sheet.text(x, height - 26, "percent: share of the UNet's multiplications", 13, FAINT, "lm")
    return sheet.done()


def _draw_block(sheet: _Sheet, x: int, y: int, name: str, channels: int, units: list[Unit], views) -> None:
    total = sum(views[u.address].share for u in units)
    size = "full size" if units[0].scale == 1 else f"1/{units[0].scale} size"
    sheet.text(x, y, f"{name}   {channels} channels, {size}" + (f",  {total:.0%}" if total else ""), 13, INK)
    for i, u in enumerate(units):
        view, left, top = views[u.address], x + i * (BOX[0] + GAP), y + 22
        cut = view.role == "cut"
        sheet.box(left, top, *BOX, COLOURS[view.role], FAINT, dashed=cut)
        label = NAMES[u.kind] + (f" x{u.depth}" if u.depth > 1 else "")
        sheet.text(left + BOX[0] / 2, top + (BOX[1] / 2 if cut else 13), label, 13, FAINT if cut else INK, "mm")
        if not cut:
            sheet.text(left + BOX[0] / 2, top + 29, f"{view.share:.1%}", 12, INK, "mm")


PLAN_COLOURS = {
    COMPUTED: COLOURS["checkpoint"],
    PARTLY: "#d9c7a3",
    INHERITED: "#f4a261",
    IDLE: "#eef1f5",
    LEFT_OUT: "#9a86c8",
}
MEANINGS = {
    COMPUTED: "computes",
    PARTLY: "computes in part",
    INHERITED: "keeps earlier features",
    IDLE: "not needed",
    LEFT_OUT: "not played by this model",
}
CELL, LABELS = 13, 150  # of the drawing by layers: height of a row; width of the column of addresses
PLAN_WIDTH = 540


def roles_by_level(units: Iterable[Unit], step: InheritedStep) -> dict[str, str]:
    """Block address ("down.0", "mid") -> what its units do together on an inherited step, in PLAN_COLOURS."""
    blocks: dict[str, set[str]] = {}
    for u in units:
        blocks.setdefault(u.block, set()).add(step.does(u.address))
    found = {}
    for block, did in blocks.items():
        if INHERITED in did:
            did.discard(IDLE)  # what nobody asks for, because all that follows is remembered
        found[block] = did.pop() if len(did) == 1 else PARTLY
    return found


def draw_plan(architecture: Architecture, plan: Plan, facts: Mapping, text: str, by_layer: bool = False) -> Image.Image:
    """A plan as a grid, one row per level of the UNet in the order of the forward pass, or per layer; one column per
    step; below it the last run. As wide as a node shows it, so that its letters are read without zooming in.

    facts: see `nodes.inheritance_plan.describe`. An adaptive plan shows only the steps that must compute.
    """
    inherited = InheritedStep.of(plan, architecture.config, architecture.cut)
    units = [u for u in architecture.kept if u.side in ("down", "mid", "up")]
    roles = {u.address: inherited.does(u.address) for u in units} if by_layer else roles_by_level(units, inherited)
    tall, letters, labels = (CELL, 10, LABELS) if by_layer else (24, 14, 84)
    steps, computed = facts["steps"], set(facts["computed"])
    run = facts.get("last_run")
    meanings = {role: said for role, said in MEANINGS.items() if role != LEFT_OUT or run and role in run["roles"]}
    columns = max(steps, run["steps"] if run else 0)
    cell = max(6, min(26, (PLAN_WIDTH - MARGIN - labels - 12) // columns))
    width = max(MARGIN + labels + columns * cell + 12, PLAN_WIDTH)
    lines = [
        (line, size, INK if i == 0 else FAINT)
        for i, whole in enumerate(text.split("\n"))
        for size in (17 if i == 0 else 14,)
        for line in wrapped(whole, size, width - 2 * 12)
    ]
    top = 22 + 22 * len(lines) + 24
    below = top + len(roles) * tall + 14
    key = 22 * -(-len(meanings) // 2)
    sheet = _Sheet(width, below + (110 if run else 0) + key + 14)
    for i, (line, size, colour) in enumerate(lines):
        sheet.text(12, 12 + 22 * i, line, size, colour)
    left = MARGIN + labels
    for step in range(0, columns, max(1, 60 // cell)):
        sheet.text(left + (step + 0.5) * cell, top - 6, str(step), 13, FAINT, "mb")
    for row, (address, role) in enumerate(roles.items()):
        y = top + row * tall
        sheet.text(left - 8, y + tall / 2, address, letters, INK, "rm")
        for step in range(steps):
            colour = PLAN_COLOURS[COMPUTED if step in computed else role]
            sheet.cell(left + step * cell, y, cell, tall, colour)
    if run:
        _draw_run(sheet, run, left, below, cell)
    y = sheet.image.height // 2 - key - 4
    for i, (role, meaning) in enumerate(meanings.items()):
        x, under = 12 + i % 2 * 260, y + i // 2 * 22
        sheet.cell(x, under, 20, 14, PLAN_COLOURS[role])
        sheet.text(x + 28, under + 7, meaning, 14, INK, "lm")
    return sheet.done()


def wrapped(text: str, size: int, width: float) -> list[str]:
    """A text in lines that fit a width."""
    lines: list[str] = []
    for word in text.split():
        if lines and _font(size).getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _draw_run(sheet: _Sheet, run: Mapping, left: float, top: float, cell: float) -> None:
    """What happened: a strip of steps, and the time of each as a bar (the sum of its evaluations)."""
    sheet.text(left - 8, top + 8, "last run", 13, INK, "rm")
    for step in range(run["steps"]):
        sheet.cell(left + step * cell, top, cell, 16, PLAN_COLOURS[run["roles"][step]])
    seconds = dict.fromkeys(range(run["steps"]), 0.0)
    for step, t in run["seconds"]:
        seconds[step] += t
    # The first step is often slow because weights still move; it must not make all others look alike.
    highest = max([t for step, t in seconds.items() if step > 0], default=0.0)
    if not highest:
        return
    base = top + 22 + 64
    sheet.text(left - 8, base - 34, "time of a step", 13, INK, "rm")
    sheet.text(left - 8, base - 14, f"up to {duration(highest)}", 13, FAINT, "rm")
    for step, t in seconds.items():
        tall = 64 * min(t / highest, 1)
        if tall:
            sheet.cell(left + step * cell, base - tall, cell, tall, PLAN_COLOURS[run["roles"][step]])


OFFER_COLOURS = {"plans": "#d1495b", "fewer steps": "#2b59c3"}


def draw_offers(
    offers: Mapping[str, Sequence[tuple[float, float, str]]], limits: Mapping[str, float], title: str, text: str
) -> Image.Image:
    """What a calibration found: work saved to the right, likeness upwards, a line for each position of the dial.

    offers: by kind, (saving, error as a share of the result, label). limits: the error that each position allows.
    """
    width, left, tall = PLAN_WIDTH, 112, 300
    lines = [line for whole in (title, *text.split("\n")) for line in wrapped(whole, 14, width - 2 * 12)]
    top = 20 + 20 * len(lines) + 14
    sheet = _Sheet(width, top + tall + 74)
    for i, line in enumerate(lines):
        sheet.text(12, 14 + 20 * i, line, 14, FAINT if i else INK)
    # Errors differ by powers of ten; a plan without any lies at the upper edge.
    errors = [max(error, 1e-4) for found in offers.values() for _, error, _ in found] + list(limits.values())
    low, high = np.log10(min(errors)) - 0.1, np.log10(max(errors)) + 0.1

    def at(saving: float, error: float) -> tuple[float, float]:
        share = (np.log10(max(error, 1e-4)) - low) / (high - low)
        return left + saving * (width - left - MARGIN), top + float(share) * tall

    for saved in range(0, 101, 10):
        x, _ = at(saved / 100, 1)
        sheet.line((x, top, x, top + tall), "#eceff4", 1)
        if saved % 20 == 0:
            sheet.text(x, top + tall + 6, f"{saved}%", SMALLEST, FAINT, "ma")
    sheet.text((left + width - MARGIN) / 2, top + tall + 24, "of the work saved", 13, INK, "ma")
    for name, error in limits.items():
        _, y = at(0, error)
        sheet.line((left, y, width - MARGIN, y), FAINT, 2)
        sheet.text(left - 8, y, name, 13, INK, "rm")
    for i, (kind, found) in enumerate(offers.items()):
        colour = OFFER_COLOURS[kind]
        ends = [at(saving, error) for saving, error, _ in sorted(found)]
        if len(ends) > 1:
            sheet.line([n for end in ends for n in end], colour, 4)
        for (_, _, label), (x, y) in zip(sorted(found), ends, strict=True):
            sheet.cell(x - 4, y - 4, 9, 9, colour)
            if kind == "fewer steps":
                sheet.text(x + 7, y - 9, f"{label} steps", SMALLEST, colour, "lm")
        x = 12 + 150 * i
        sheet.cell(x, top + tall + 50, 16, 12, colour)
        sheet.text(x + 22, top + tall + 56, {"plans": "steps left out"}.get(kind, kind), 13, INK, "lm")
    sheet.text(width - 160, top + tall + 56, "higher is more alike", 13, FAINT, "lm")
    return sheet.done()


KIND_COLOURS = {"resnet": COLOURS["checkpoint"], "transformer": "#7fb691", "sampler": "#d9c7a3", "outside": "#ccd2db"}
KIND_NAMES = {"resnet": "resnets", "transformer": "attention", "sampler": "samplers", "outside": "outside the layers"}
BARS = (230, 26)  # width of the longest bar and height of a line
FORETOLD = "foretold"
STEPS = {  # what a step was: colour, meaning
    COMPUTED: (PLAN_COLOURS[COMPUTED], MEANINGS[COMPUTED]),
    INHERITED: (PLAN_COLOURS[INHERITED], MEANINGS[INHERITED]),
    FORETOLD: (PLAN_COLOURS[LEFT_OUT], "foretold by Speed Up"),
    LEFT_OUT: ("#ccd2db", "left out by another node"),
}
SMALLEST = 13  # letters, so that they are read on a node at 100% without a click


def draw_speed(facts: Mapping, title: str, subtitle: str) -> Image.Image:
    """The times of one run: a bar for each step, one for each block of the UNet, one for what each technique saved. As
    wide as a node shows it.

    facts: see `nodes.speed_readout.describe`.
    """
    steps = facts["step_seconds"]
    kinds_of = {INHERITED: "inherited_steps", FORETOLD: "forecast_steps", LEFT_OUT: "left_out_steps"}
    roles = {step: role for role, name in kinds_of.items() for step in facts[name]}
    lines = [(block, kinds) for block, kinds in facts["groups"].items()]
    if lines:
        lines.append(("the rest", {"outside": facts["outside_layers"]}))
    margin, left = 12, 108
    heads = wrapped(title, 17, PLAN_WIDTH - 2 * margin)
    said = wrapped(subtitle, 14, PLAN_WIDTH - 2 * margin)
    saved = [
        (
            entry["seconds"],
            wrapped(f"{entry['technique']}: {duration(entry['seconds'])}, {entry['how']}", 14, BARS[0] + 150),
        )
        for entry in facts["saved"]
    ]
    top_steps = 16 + 24 * len(heads) + 20 * len(said)
    top_blocks = top_steps + 110 + 30 + 22 * -(-len(_in_key(roles)) // 2)
    top_saved = top_blocks + len(lines) * BARS[1] + (64 if lines else 0)
    sheet = _Sheet(PLAN_WIDTH, top_saved + sum(24 + 20 * len(words) for _, words in saved) + 16)
    for i, line in enumerate(heads):
        sheet.text(margin, 12 + 24 * i, line, 17)
    for i, line in enumerate(said):
        sheet.text(margin, 14 + 24 * len(heads) + 20 * i, line, 14, FAINT)
    _draw_steps(sheet, steps, roles, facts["played"], left, top_steps, PLAN_WIDTH - margin)
    total = facts["seconds"]
    spent = [sum(kinds.values()) for _, kinds in lines]
    longest = max([*spent, *(seconds for seconds, _ in saved)], default=0.0) or 1.0
    for row, (block, kinds) in enumerate(lines):
        y = top_blocks + row * BARS[1]
        x: float = left
        sheet.text(left - 10, y + 10, block, 14, INK, "rm")
        for kind in KIND_COLOURS:
            wide = BARS[0] * kinds.get(kind, 0.0) / longest
            if wide >= 0.5:
                sheet.cell(x, y, wide + 1, 20, KIND_COLOURS[kind])
            x += wide
        sheet.text(x + 10, y + 10, f"{spent[row] / total:.0%}   {duration(spent[row])}", 14, INK, "lm")
    for i, (kind, name) in enumerate(KIND_NAMES.items() if lines else ()):
        x, y = left + i % 2 * 150, top_saved - 56 + i // 2 * 22
        sheet.cell(x, y, 16, 14, KIND_COLOURS[kind])
        sheet.text(x + 24, y + 7, name, 14, FAINT, "lm")
    y = top_saved
    for row, (seconds, words) in enumerate(saved):
        if row == 0:
            sheet.text(left - 10, y + 10, "saved", 14, INK, "rm")
        sheet.cell(left, y, max(2, BARS[0] * seconds / longest) + 1, 20, PLAN_COLOURS[INHERITED])
        for i, line in enumerate(words):
            sheet.text(left, y + 24 + 20 * i, line, 14)
        y += 24 + 20 * len(words)
    return sheet.done()


def _draw_steps(
    sheet: _Sheet,
    steps: Sequence,
    roles: Mapping[int, str],
    played: Sequence[int],
    left: int,
    top: float,
    right: float,
) -> None:
    """A bar for each step, and a mark where another model begins. The first step is often slow because weights still
    move; it must not make all others look alike.
    """
    tall = 84
    base = top + 20 + tall
    highest = max(t for _, t in steps[1:] or steps) or 1.0
    cell = min(40.0, (right - left) / len(steps))
    sheet.text(left - 10, base - tall + 6, duration(highest), SMALLEST, FAINT, "rm")
    sheet.text(left - 10, base - tall / 2, "each step", 14, INK, "rm")
    for i, (step, t) in enumerate(steps):
        bar = max(tall * min(t / highest, 1), 3)  # what is foretold takes next to nothing
        sheet.cell(left + i * cell, base - bar, max(cell - 1, 1), bar, STEPS[roles.get(step, COMPUTED)][0])
        if i % max(1, round(50 / cell)) == 0:
            sheet.text(left + (i + 0.5) * cell, base + 4, str(step), SMALLEST, FAINT, "ma")
        if i and played[i] != played[i - 1]:
            sheet.line((left + i * cell - 1, base - tall - 14, left + i * cell - 1, base), INK)
            sheet.text(left + i * cell + 5, base - tall - 18, f"model {played[i]}", SMALLEST, INK, "la")
    for i, role in enumerate(_in_key(roles)):
        x, y = left + i % 2 * 190, base + 28 + i // 2 * 22
        sheet.cell(x, y, 16, 14, STEPS[role][0])
        sheet.text(x + 24, y + 7, STEPS[role][1], 14, FAINT, "lm")


def _in_key(roles: Mapping[int, str]) -> list[str]:
    """Which of STEPS the key explains."""
    return [role for role in STEPS if role in roles.values() or roles and role == COMPUTED]


def to_image(picture: Image.Image) -> torch.Tensor:
    """A picture as the host's IMAGE: (1, H, W, 3) in 0..1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB")).astype(np.float32) / 255)[None]


def preview(cls, picture: torch.Tensor, text: str) -> dict:
    """What a node shows of itself: a picture it made, and its words for whoever reads the run's outputs."""
    return ui.PreviewImage(picture, cls=cls).as_dict() | {"text": (text,)}


def coloured(images: torch.Tensor) -> torch.Tensor:
    """An IMAGE whose pictures have three channels or more; those of one are grey."""
    return images.expand(*images.shape[:-1], 3) if images.shape[-1] == 1 else images


def from_image(image: torch.Tensor) -> Image.Image:
    """One picture (H, W, 1, 3 or 4) of an IMAGE; transparency is left out."""
    return Image.fromarray((255 * coloured(image)[..., :3].cpu().float().clamp(0, 1)).to(torch.uint8).numpy())
