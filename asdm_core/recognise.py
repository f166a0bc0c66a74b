"""What is this UNet? Reads family, cut units and layout off the names and shapes of a state dict.

Published students carry no description of themselves: BK-SDM, small-sd and tiny-sd come as diffusers
files, others as LDM files. Shapes alone decide the family and how many layers each block has; which
layers they were follows the one convention that keeps all widths (BK-SDM: the first layers of a down
block, the first and the last of an up block; the first transformer blocks of a transformer).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .addresses import NO_MID, RESNET_MID, Slot, UNetConfig, keys, walk
from .architecture import FAMILIES, Architecture
from .text import MESSAGE, printable

Shapes = Mapping[str, tuple[int, ...]]

# Longest first: a checkpoint, a bare ComfyUI UNet, a diffusers pipeline saved as one file, a bare UNet.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.", "")


class Unrecognised(ValueError):
    """The file is not a UNet of a known family, or differs from one; the message says in what, in one bounded line."""

    def __init__(self, message: str):
        super().__init__(printable(message, MESSAGE))


@dataclass(frozen=True)
class Recognised:
    """A UNet inside a state dict.

    prefix: what stands before every UNet key in the file.
    layout, numbering: arguments for `architecture.keys`.
    unknown: keys of the file (with prefix) that lie among those of the UNet and belong to no layer of it.
    """

    architecture: Architecture
    prefix: str
    layout: str
    numbering: str
    unknown: tuple[str, ...] = ()

    def keys(self) -> dict[str, Slot]:
        """The file's UNet keys (with prefix) and the skeleton slots they fill."""
        table = self.architecture.keys(self.layout, self.numbering)
        return {self.prefix + key: slot for key, slot in table.items()}


def unet_prefix(names: Iterable[str]) -> tuple[str, str]:
    """Prefix and layout of the UNet in a state dict. Raises Unrecognised when there is none."""
    names = set(names)
    for prefix in PREFIXES:
        if f"{prefix}input_blocks.0.0.weight" in names:
            return prefix, "ldm"
        if f"{prefix}conv_in.weight" in names and any(n.startswith(f"{prefix}down_blocks.") for n in names):
            return prefix, "diffusers"
    some = ", ".join(map(printable, sorted(names)[:3])) or "nothing"
    hint = ""
    if any("lora" in n for n in names):
        hint = " It looks like a LoRA; load it with a LoRA node."
    elif any("double_blocks" in n or "transformer_blocks.0.attn.to_q" in n for n in names):
        hint = " It looks like a transformer model (Flux, SD3 or the like); asdm works on UNets."
    raise Unrecognised(
        f"no Stable Diffusion UNet in this file: wanted keys like 'input_blocks.0.0.weight' or "
        f"'down_blocks.0.resnets.0.conv1.weight', found {some}.{hint}"
    )


def recognise(shapes: Shapes, families: Iterable[UNetConfig] = FAMILIES.values()) -> Recognised:
    """Recognise the UNet of a state dict from its key names and shapes.

    shapes: every key of the file with its shape. Raises Unrecognised: nothing may be missing or have another shape, and
    there may be no further layer. Other tensors that no layer has, as LCM's projection of the guidance scale, are told
    in `unknown`: ComfyUI loads such files, so whether they are right is for the caller to say.
    """
    prefix, layout = unet_prefix(shapes)
    unet = {n.removeprefix(prefix): tuple(s) for n, s in shapes.items() if n.startswith(prefix)}
    if not prefix:
        # A bare UNet file may lie inside a checkpoint that also holds a text encoder and a VAE.
        roots = {k.split(".", 1)[0] for k in keys(FAMILIES["sdxl"], layout)}
        unet = {n: s for n, s in unet.items() if n.split(".", 1)[0] in roots}
    stem = _read_stem(unet, layout)
    near: list[tuple[int, str]] = []
    larger: list[Recognised] = []
    for family in families:
        skeleton = _fit_stem(family, stem)
        if skeleton is None:
            continue
        for candidate, numbering in _candidates(skeleton, unet, layout):
            wanted = {k: s.shape for k, s in candidate.keys(layout, numbering).items()}
            if wanted == unet:
                return Recognised(candidate.named(), prefix, layout, numbering)
            if wanted.items() <= unet.items() and _read_counts(wanted, layout) == _read_counts(unet, layout):
                unknown = tuple(prefix + key for key in sorted(unet.keys() - wanted.keys()))
                larger.append(Recognised(candidate.named(), prefix, layout, numbering, unknown))
            near.append(_difference(wanted, unet, candidate.named(), prefix))
    if larger:
        return min(larger, key=lambda found: len(found.unknown))
    if near:
        raise Unrecognised(min(near)[1])
    raise Unrecognised(
        f"a UNet with {stem['model_channels']} base channels, text width {stem['context_dim']} and pooled "
        f"conditioning {stem['adm_channels']} belongs to none of the known families: "
        + "; ".join(f"{f.family} ({f.model_channels}, {f.context_dim}, {f.adm_channels})" for f in families)
    )


def _read_stem(unet: Shapes, layout: str) -> dict[str, Any]:
    ldm = layout == "ldm"
    conv_in = unet["input_blocks.0.0.weight" if ldm else "conv_in.weight"]
    conv_out = unet.get("out.2.weight" if ldm else "conv_out.weight", (4,))
    label = unet.get("label_emb.0.0.weight" if ldm else "add_embedding.linear_1.weight")
    if len(conv_in) != 4 or label is not None and len(label) != 2:
        raise Unrecognised(
            f"the first convolution has shape {printable(tuple(conv_in))}; wanted 4 dimensions (out, in, 3, 3)"
        )
    if not all(conv_in) or len(conv_out) < 1 or not all(conv_out):
        raise Unrecognised(
            f"the first convolution has shape {tuple(conv_in)} and the last {tuple(conv_out)}; wanted (out, in, 3, "
            "3) with channels in both"
        )
    context = {s[1] for n, s in unet.items() if n.endswith("attn2.to_k.weight") and len(s) == 2}
    return {
        "model_channels": conv_in[0],
        "in_channels": conv_in[1],
        "out_channels": conv_out[0],
        "adm_channels": label[1] if label else None,
        "context_dim": context.pop() if len(context) == 1 else None,
    }


def _fit_stem(family: UNetConfig, stem: dict[str, Any]) -> UNetConfig | None:
    """The family's skeleton with the file's numbers of input and output channels (inpainting: 9 in)."""
    if any(getattr(family, n) != stem[n] for n in ("model_channels", "context_dim", "adm_channels")):
        return None
    if (family.in_channels, family.out_channels) == (stem["in_channels"], stem["out_channels"]):
        return family
    return replace(family, in_channels=stem["in_channels"], out_channels=stem["out_channels"])


def _candidates(skeleton: UNetConfig, unet: Shapes, layout: str) -> Iterator[tuple[Architecture, str]]:
    """Architectures the file might be, likeliest first.

    The convention goes first: a renumbered M1 in diffusers names could also be read as an addressed
    network that lacks its last up layer, which is another network.
    """
    counts = _read_counts(unet, layout)
    cut = _conventional_cut(skeleton, counts)
    if cut is not None:
        yield from _legal(skeleton, cut, "renumbered")
    if layout == "ldm":
        present = {s.owner for k, s in keys(skeleton, layout).items() if k in unet}
        units = {a for u in walk(skeleton) for a in (u.address, *u.blocks)}
        yield from _legal(skeleton, units - present, "addressed")


def _legal(skeleton: UNetConfig, cut: Iterable[str], numbering: str) -> Iterator[tuple[Architecture, str]]:
    try:
        candidate = Architecture(skeleton, frozenset(cut))
        candidate.keys("ldm", numbering)
    except ValueError:
        return
    # A file that stands for itself has weights of its own everywhere.
    yield Architecture(skeleton, candidate.cut, tuple(u.address for u in candidate.kept)), numbering


@dataclass(frozen=True)
class _Counts:
    """Transformer depth of each layer, per level or block, as the file numbers them."""

    down: list[list[int]]
    up: list[list[int]]
    mid: int


# Deeper than any path that is asked for below (down_blocks.0.attentions.0); names can have any number of parts.
_PARTS = 4


def _read_counts(unet: Shapes, layout: str) -> _Counts:
    modules: set[str] = set()
    blocks: dict[str, set[str]] = {}
    for name in unet:
        parts = name.split(".", _PARTS)[:-1]
        modules.update(".".join(parts[:i]) for i in range(1, len(parts) + 1))
        path, _, inside = name.partition(".transformer_blocks.")
        number, dot, _ = inside.partition(".")
        if dot and number.isascii() and number.isdecimal():
            blocks.setdefault(path, set()).add(number)

    def depth(path: str) -> int:
        return len(blocks.get(path, ()))

    down: list[list[int]] = [[]]
    up: list[list[int]] = [[]]
    if layout == "ldm":
        n = 1
        while f"input_blocks.{n}" in modules:
            if f"input_blocks.{n}.0.op" in modules:
                down.append([])
            else:
                down[-1].append(depth(f"input_blocks.{n}.1"))
            n += 1
        n = 0
        while f"output_blocks.{n}" in modules:
            up[-1].append(depth(f"output_blocks.{n}.1"))
            if f"output_blocks.{n}.1.conv" in modules or f"output_blocks.{n}.2.conv" in modules:
                up.append([])
            n += 1
        mid_transformer, mid_resnet = "middle_block.1", "middle_block.0"
    else:
        for side, name in ((down, "down_blocks"), (up, "up_blocks")):
            side.clear()
            while f"{name}.{len(side)}" in modules:
                block, i = f"{name}.{len(side)}", 0
                side.append([])
                while f"{block}.resnets.{i}" in modules:
                    side[-1].append(depth(f"{block}.attentions.{i}"))
                    i += 1
        mid_transformer, mid_resnet = "mid_block.attentions.0", "mid_block.resnets.0"
    mid = depth(mid_transformer) or (RESNET_MID if mid_resnet in modules else NO_MID)
    return _Counts(down, up, mid)


def _conventional_cut(skeleton: UNetConfig, counts: _Counts) -> set[str] | None:
    """Cut units under the keep-first (and, in up blocks, keep-last) convention; None if it cannot be."""
    levels = len(counts.down)
    if levels > skeleton.levels or len(counts.up) != levels:
        return None
    cut: set[str] = set()

    def cut_layer(at: str, depth: int) -> None:
        cut.add(f"{at}.resnet")
        if depth:
            cut.add(f"{at}.transformer")

    def cut_side(side: str, block: int, whole: tuple[int, ...], kept: list[int], keep_last: bool) -> bool:
        if len(kept) > len(whole):
            return False
        homes = list(range(len(kept)))
        if keep_last and kept:
            homes[-1] = len(whole) - 1
        for i, depth in enumerate(whole):
            at = f"{side}.{block}.{i}"
            if i not in homes:
                cut_layer(at, depth)
                continue
            has = kept[homes.index(i)]
            if has > depth:
                return False
            if depth and not has:
                cut.add(f"{at}.transformer")
            else:
                cut.update(f"{at}.transformer.{b}" for b in range(has, depth))
        return True

    for level in range(skeleton.levels):
        block = skeleton.levels - 1 - level
        gone = level >= levels
        down_kept = [] if gone else counts.down[level]
        up_kept = [] if gone else counts.up[levels - 1 - level]
        if not (
            cut_side("down", level, skeleton.down[level], down_kept, False)
            and cut_side("up", block, skeleton.up[block], up_kept, True)
        ):
            return None
        if gone:
            cut.update((f"down.{level - 1}.sampler", f"up.{block}.sampler"))
    if counts.mid > skeleton.mid:
        return None
    if counts.mid == NO_MID and skeleton.mid > NO_MID:
        cut.add("mid.0.resnet")
    if counts.mid < 1 <= skeleton.mid:
        cut.update(("mid.0.transformer", "mid.1.resnet"))
    elif counts.mid >= 1:
        cut.update(f"mid.0.transformer.{b}" for b in range(counts.mid, skeleton.mid))
    return cut


def _difference(wanted: Shapes, got: Shapes, candidate: Architecture, prefix: str) -> tuple[int, str]:
    missing = sorted(wanted.keys() - got.keys())
    extra = sorted(got.keys() - wanted.keys())
    shapes = sorted(k for k in wanted.keys() & got.keys() if tuple(wanted[k]) != tuple(got[k]))
    parts = []
    if shapes:
        k = shapes[0]
        parts.append(
            f"{len(shapes)} tensors of another shape (first: {printable(prefix + k)} is {printable(list(got[k]))}, "
            f"wanted {list(wanted[k])})"
        )
    if missing:
        parts.append(f"{len(missing)} missing (first: {printable(prefix + missing[0])})")
    if extra:
        parts.append(f"{len(extra)} unknown (first: {printable(prefix + extra[0])})")
    title = f"{candidate.config.family} {candidate.name}".strip()
    return len(shapes) + len(missing) + len(
        extra
    ), f"the UNet is closest to {title or 'a pruned UNet'}, but has " + ", ".join(parts)
