"""What a LoRA file changes in a pruned UNet: which of its modules land, and which aim at a cut unit.

A LoRA names the layers of the network it was trained on. Made for the original, its modules land at their own address
or have nothing to act on. Made for the pruned UNet itself (the LCM LoRA of SSD-1B), it uses the names of the small
network, most of which are also names of other layers of the original: `meant` tells which from what is named, and from
shapes. Only names and shapes are read, so the report costs no memory. Names are those ComfyUI's Load LoRA reads (see
`addresses.lora_names`) and, on a MODEL of Load Pruned UNet, those PEFT writes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from .addresses import Slot, Unit, UNetConfig, in_order, keys, lora_names, peft_names, walk
from .architecture import Architecture
from .text import printable

Shapes = Mapping[str, tuple[int, ...] | None]

ORIGINAL, OWN = "original", "own"
READINGS = (ORIGINAL, OWN)

# How a file ends the names of one module's tensors, by kind. The kind of a module is told by its first such tensor.
_ENDINGS = {
    "LoRA": r"\.lora_(up|down|mid)\.weight|\.lora_[AB]((\.default)?\.weight)?"
    r"|(_lora|\.lora|\.lora_linear_layer)\.(up|down)\.weight",
    "LoHa": r"\.hada_(w[12]_[ab]|t[12])",
    "LoKr": r"\.lokr_(w[12](_[ab])?|t2)",
    "other": r"\.[ab][12]\.weight|\.oft_blocks|\.rescale|\.diff(_b)?|\.set_weight|\.[wb]_norm",
    "": r"\.alpha|\.dora_scale|\.reshape_weight",  # comes with any kind
}
_ENDING = re.compile("|".join(f"(?:{pattern})$" for pattern in _ENDINGS.values()))
_TEXT = re.compile(r"lora_te\d?_|text_encoder(_2)?\.|text_model\.|clip_[lg]\.")


@dataclass(frozen=True)
class LoraReport:
    """Where the modules of a LoRA file go. All lists are of LDM module names (addressed) or, in `peft`, `misfits` and
    `unknown`, of names in the file.

    reading: whose layers it names, the "original"'s or the pruned UNet's "own"; told: whether names and shapes say so.
    kept: modules that act, at their own address. dropped: unit (or transformer block) that is cut -> the
    modules that aimed at it. text: how many modules are for text encoders. peft: names PEFT writes, which act on a
    MODEL of Load Pruned UNet and which ComfyUI does not read elsewhere. misfits: modules whose tensors have not the
    shape of their layer, so that ComfyUI cannot add them. unknown: names of no UNet layer.
    kinds: how many modules of the UNet are LoRA (convolutions included, LoCon), LoHa, LoKr or other.
    """

    reading: str
    told: bool
    kept: tuple[str, ...]
    dropped: dict[str, tuple[str, ...]]
    text: int
    peft: tuple[str, ...]
    misfits: tuple[str, ...]
    unknown: tuple[str, ...]
    kinds: dict[str, int]


def modules(names: Iterable[str]) -> dict[str, str]:
    """Module name -> kind (a key of the LoRA kinds), for the tensor names of a LoRA file; "" where no ending tells."""
    found: dict[str, str] = {}
    for name in names:
        match = _ENDING.search(name)
        module = name[: match.start()] if match else name
        kind = next(k for k, pattern in _ENDINGS.items() if re.fullmatch(pattern, match[0])) if match else ""
        found[module] = found.get(module) or kind
    return found


@dataclass(frozen=True)
class Factors:
    """Names of a LoRA's tensors for one module: W + (alpha / rank) up down; without alpha W + up down."""

    up: str
    down: str
    alpha: str = ""


def factors_of(names: Iterable[str]) -> dict[str, Factors | None]:
    """Module name -> its factors, for the tensor names of a LoRA file; None where it is none, or no plain one."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        match = _ENDING.search(name)
        ending = match[0] if match else ""
        part = "up" if _UP.fullmatch(ending) else "down" if _DOWN.fullmatch(ending) else ending.lstrip(".")
        found.setdefault(name.removesuffix(ending), {})[part] = name
    return {
        module: Factors(parts["up"], parts["down"], parts.get("alpha", ""))
        if {"up", "down"} <= parts.keys() <= {"up", "down", "alpha"}
        else None
        for module, parts in found.items()
    }


def of_text_encoder(module: str) -> bool:
    """Whether a module of a LoRA file is for a text encoder."""
    return bool(_TEXT.match(module))


@lru_cache(maxsize=32)
def targets(architecture: Architecture, reading: str) -> dict[str, Slot]:
    """Name of a module in a LoRA file -> the layer it means, as the slot of its weight in the unpruned network.

    reading: "original": the names are those of the unpruned network (of cut layers too); "own": of the pruned UNet, in
    its renumbered form. Names of norms and those of PEFT are among them. Raises ValueError for a UNet without such a
    form.
    """
    config = architecture.config if reading == ORIGINAL else architecture.renumbered.config
    slots = keys(config) if reading == ORIGINAL else architecture.keys("ldm", "renumbered")
    return {n: slots[f"{ldm}.weight"] for n, ldm in (lora_names(config, norms=True) | peft_names(config)).items()}


def _readings(architecture: Architecture) -> dict[str, dict[str, Slot]]:
    found = {ORIGINAL: targets(architecture, ORIGINAL)}
    try:
        return found | {OWN: targets(architecture, OWN)}
    except ValueError:
        return found


def module_of(slot: Slot) -> str:
    """LDM name, in the unpruned network, of the module a weight belongs to."""
    return slot.unit.key(slot.tensor).removesuffix(".weight")


def meant(shapes: Shapes, architecture: Architecture) -> str | None:
    """Whose layers a LoRA file names: "original", "own" (the pruned UNet's), or None where nothing tells.

    shapes: of its tensors by name; None for shapes that are not known. A name only one of the two networks has, and a
    shape that fits in one only, tell. Where all fit in both, naming exactly as many layers or transformer blocks as the
    pruned UNet has left, where the original has more, tells that it was trained on that. "original" where both come to
    the same.
    """
    readings = _readings(architecture)
    if OWN not in readings:
        return ORIGINAL
    original, own = readings[ORIGINAL], readings[OWN]
    sizes = _sizes(shapes)
    named = [n for n in modules(shapes) if n in original or n in own]
    fits = {
        name: {r for r, table in readings.items() if fits_layer(table.get(name), sizes.get(name))} for name in named
    }
    votes = [next(iter(found)) for found in fits.values() if len(found) == 1]
    if votes:
        ours = votes.count(OWN)
        return None if 2 * ours == len(votes) else OWN if 2 * ours > len(votes) else ORIGINAL
    named = [name for name in named if fits[name]]
    if all(original[name] == own[name] for name in named):
        return ORIGINAL
    return OWN if _fills(architecture, named) else None


def fits_layer(slot: Slot | None, size: tuple[int | None, int | None] | None) -> bool:
    """Whether a layer exists and has these numbers of outputs and inputs, where they are known."""
    if slot is None:
        return False
    c_out, c_in = size or (None, None)
    shape = slot.shape
    return c_out in (None, shape[0]) and (c_in is None or c_in in (math.prod(shape[1:2]), math.prod(shape[1:])))


def _fills(architecture: Architecture, names: Iterable[str]) -> bool:
    """Whether, wherever the pruned UNet has fewer layers or blocks than the original, the names are all of those."""
    small = architecture.renumbered.config
    slots = keys(small)
    table = lora_names(small, norms=True) | peft_names(small)
    before = targets(architecture, ORIGINAL)

    def groups(config: UNetConfig) -> dict[tuple[str, str], int]:
        """(place, kind) -> how many there are: layers of a block by kind, and blocks of a transformer."""
        found: dict[tuple[str, str], set[str]] = {}
        for u in walk(config):
            if u.side in ("down", "up"):
                found.setdefault((_place(u), u.kind), set()).add(u.address)
            for block in u.blocks:
                found.setdefault((u.address, "block"), set()).add(block)
        return {group: len(members) for group, members in found.items()}

    ours, theirs = groups(small), groups(architecture.config)
    named: dict[tuple[str, str], set[str]] = {}
    whole: dict[tuple[str, str], int] = {}
    for name in names:
        slot, old = slots[f"{table[name]}.weight"], before[name]
        places = []
        if slot.unit.side in ("down", "up"):
            places.append((_place(slot.unit), slot.unit.kind, slot.unit.address))
        if slot.tensor.block is not None:
            places.append((slot.unit.address, "block", slot.owner))
        for place, kind, member in places:
            home = old.unit.address if kind == "block" else _place(old.unit)
            named.setdefault((place, kind), set()).add(member)
            whole[place, kind] = theirs.get((home, kind), 0)
    fewer = [group for group in named if ours[group] < whole[group]]
    return bool(fewer) and all(len(named[group]) == ours[group] for group in fewer)


def _place(u: Unit) -> str:
    """Where units of its kind are counted together: in its block; samplers, of which a block has one, in its side."""
    return u.side if u.kind in ("downsampler", "upsampler") else u.block


_UP = re.compile(r"\.lora_up\.weight|\.lora_B((\.default)?\.weight)?|(_lora|\.lora|\.lora_linear_layer)\.up\.weight")
_DOWN = re.compile(
    r"\.lora_down\.weight|\.lora_A((\.default)?\.weight)?|(_lora|\.lora|\.lora_linear_layer)\.down\.weight"
)


def _sizes(shapes: Shapes) -> dict[str, tuple[int | None, int | None]]:
    """Module -> (outputs, inputs) of the layer its tensors are for; None for what they do not tell."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        match = _ENDING.search(name)
        if match and shape:
            ending = match[0]
            part = "up" if _UP.fullmatch(ending) else "down" if _DOWN.fullmatch(ending) else ending.lstrip(".")
            found.setdefault(name[: match.start()], {})[part] = tuple(shape)
    return {module: _size(parts) for module, parts in found.items()}


def _size(parts: Mapping[str, tuple[int, ...]]) -> tuple[int | None, int | None]:
    def side(name: str, at: int) -> int | None:
        return parts[name][at] if name in parts and len(parts[name]) > at else None

    if "lokr_w1" in parts or "lokr_w1_a" in parts:
        w1 = side("lokr_w1", 0) or side("lokr_w1_a", 0), side("lokr_w1", 1) or side("lokr_w1_b", 1)
        if "lokr_t2" in parts:  # (rank, rank, k, k) between two factors that lie the other way round
            w2 = side("lokr_w2_a", 1), side("lokr_w2_b", 1)
        else:
            w2 = side("lokr_w2", 0) or side("lokr_w2_a", 0), side("lokr_w2", 1) or side("lokr_w2_b", 1)
        rows, columns = (a * b if a and b else None for a, b in zip(w1, w2, strict=True))
        return rows, columns
    if "hada_w1_a" in parts:
        return side("hada_w1_a", 1 if "hada_t1" in parts else 0), side("hada_w1_b", 1)
    if "diff" in parts or "set_weight" in parts:
        whole = "diff" if "diff" in parts else "set_weight"
        return side(whole, 0), side(whole, 1)
    return side("up", 0), side("down", 1)


def report(shapes: Shapes | Iterable[str], architecture: Architecture, reading: str | None = None) -> LoraReport:
    """What the tensors of a LoRA file do to a UNet of this architecture.

    shapes: by name (or names alone, which tell less). reading: whose layers it names; None: as `meant` tells, and the
    original's where nothing does. Raises ValueError if none of them is for a UNet with this skeleton.
    """
    shapes = shapes if isinstance(shapes, Mapping) else dict.fromkeys(shapes)
    told = None if reading else meant(shapes, architecture)
    reading = reading or told or ORIGINAL
    config = architecture.config
    here = architecture.keys()
    sizes = _sizes(shapes)
    known = targets(architecture, reading)
    by_peft = peft_names(config if reading == ORIGINAL else architecture.renumbered.config)
    kept, peft, misfits, unknown = [], [], [], []
    dropped: dict[str, list[str]] = {}
    kinds: dict[str, int] = {}
    text = 0
    for module, kind in modules(shapes).items():
        slot = known.get(module)
        if slot is None:
            if _TEXT.match(module):
                text += 1
            else:
                unknown.append(module)
            continue
        ldm = module_of(slot)
        if not fits_layer(slot, sizes.get(module)):
            misfits.append(module)
            continue
        kinds[kind or "other"] = kinds.get(kind or "other", 0) + 1
        if module in by_peft:
            peft.append(module)
        if f"{ldm}.weight" in here:
            kept.append(ldm)
        else:
            cut = slot.unit.address if slot.unit.address in architecture.cut else slot.owner
            dropped.setdefault(cut, []).append(ldm)
    if not kept and not dropped:
        raise ValueError(
            f"no module of this file belongs to a UNet of the family {config.family}: "
            f"{len(unknown)} have unknown names{f', as {printable(unknown[0])}' if unknown else ''}, "
            f"{len(misfits)} have another shape than their layer, {text} are for text encoders. "
            "Give a LoRA in the kohya, diffusers, PEFT or LyCORIS form, made for this family."
        )
    return LoraReport(
        reading,
        reading == told,
        tuple(kept),
        {a: tuple(dropped[a]) for a in in_order(config, dropped)},
        text,
        tuple(peft),
        tuple(misfits),
        tuple(unknown),
        kinds,
    )
