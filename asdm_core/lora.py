"""What a LoRA file changes in a pruned UNet: which of its modules land, and which aim at a cut unit.

Layers never move, so a module either lands at its own address or has nothing to act on. Only names are
read, so the report costs no memory. Names are those ComfyUI's Load LoRA reads: see `addresses.lora_names`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .addresses import in_order, keys, lora_names, peft_names
from .architecture import Architecture

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
    """Where the modules of a LoRA file go. All lists are of LDM module names or, in `unread` and `unknown`, of names in
    the file.

    kept: modules that act, at their own address. dropped: unit (or transformer block) that is cut -> the
    modules that aimed at it. text: how many modules are for text encoders. unread: names PEFT writes and ComfyUI does
    not read. unknown: names of no UNet layer.
    kinds: how many modules of the UNet are LoRA (convolutions included, LoCon), LoHa, LoKr or other.
    """

    kept: tuple[str, ...]
    dropped: dict[str, tuple[str, ...]]
    text: int
    unread: tuple[str, ...]
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


def report(names: Iterable[str], architecture: Architecture) -> LoraReport:
    """What the tensors with these names do to a UNet of this architecture.

    Raises ValueError if none of them is for a UNet with this skeleton.
    """
    config = architecture.config
    known, elsewhere, slots, here = lora_names(config), peft_names(config), keys(config), architecture.keys()
    kept, dropped, unread, unknown, kinds, text = [], {}, [], [], {}, 0
    for module, kind in modules(names).items():
        ldm = known.get(module)
        if ldm is None:
            if _TEXT.match(module):
                text += 1
            else:
                (unread if module in elsewhere else unknown).append(module)
            continue
        kinds[kind or "other"] = kinds.get(kind or "other", 0) + 1
        slot = slots[f"{ldm}.weight"]
        if f"{ldm}.weight" in here:
            kept.append(ldm)
        else:
            cut = slot.unit.address if slot.unit.address in architecture.cut else slot.unit.owner(slot.tensor)
            dropped.setdefault(cut, []).append(ldm)
    if unread and not kept and not dropped:
        raise ValueError(
            f"ComfyUI's Load LoRA reads no module of this file: {len(unread)} are named as PEFT does, as {unread[0]}. "
            "Convert it to kohya's names, as diffusers' scripts do."
        )
    if not kept and not dropped:
        raise ValueError(
            f"no module of this file belongs to a UNet of the family {config.family}: "
            f"{len(unknown)} have unknown names{f', as {unknown[0]}' if unknown else ''}, {text} are for text "
            "encoders. "
            "Give a LoRA in the kohya, diffusers or LyCORIS form, made for this family."
        )
    return LoraReport(
        tuple(kept),
        {a: tuple(dropped[a]) for a in in_order(config, dropped)},
        text,
        tuple(unread),
        tuple(unknown),
        kinds,
    )
