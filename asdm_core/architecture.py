"""Which units of a UNet are cut, which have weights of their own, and the published presets.

An `Architecture` is the unpruned skeleton plus a set of cut units. Cut units pass their input on: an
encoder unit unchanged (a copy goes onto the skip stack, so the stack keeps its length), a decoder
layer as the first channels of `cat(h, skip)`. Under these rules it computes exactly what the smaller,
renumbered network of the literature computes; `Architecture.renumbered` gives that network and says
which of its units came from where.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any

from .addresses import (
    NO_MID,
    RESNET_MID,
    Slot,
    Unit,
    UNetConfig,
    in_order,
    keys,
    select,
    unit,
    walk,
)
from .text import printable

FORMAT = 1  # version of the JSON form; readers refuse a newer one
NUMBERINGS = ("addressed", "renumbered")

_SD_UP = ((0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1))
_SD_DOWN = ((1, 1), (1, 1), (1, 1), (0, 0))

FAMILIES: dict[str, UNetConfig] = {
    c.family: c
    for c in (
        UNetConfig("sd15", 320, (1, 2, 4, 4), _SD_DOWN, 1, _SD_UP, context_dim=768, num_heads=8),
        UNetConfig("sd21", 320, (1, 2, 4, 4), _SD_DOWN, 1, _SD_UP, context_dim=1024, head_channels=64, use_linear=True),
        UNetConfig(
            "sdxl",
            320,
            (1, 2, 4),
            ((0, 0), (2, 2), (10, 10)),
            10,
            ((10, 10, 10), (2, 2, 2), (0, 0, 0)),
            context_dim=2048,
            head_channels=64,
            use_linear=True,
            adm_channels=2816,
        ),
        UNetConfig("emoji", 64, (1, 1, 2, 2), _SD_DOWN, 1, _SD_UP, context_dim=128, num_heads=4),
    )
}


@dataclass(frozen=True)
class Preset:
    """One published pruned UNet: the units `cut` removes, as far as they lie in the blocks `on`.

    `on` is what makes a combined UNet: there the weights are the pruned student's own, everywhere
    else the original network's.
    """

    name: str
    family: str
    cut: str
    on: str
    source: str


_BK = "down.*.1, up.*.1"  # BK-SDM: layer 1 of each down block, the middle layer of each up block
_BK_PAPER = "BK-SDM, arXiv 2305.15798, src/unet_config"
_ASDM = "A-SDM, arXiv 2312.15516, section 2.2 and table 2"
_VEGA_MID = "mid.0.transformer, mid.1"

# name, skeleton, cut units, blocks with own weights, source
PRESETS: dict[str, Preset] = {
    row[0]: Preset(*row)
    for row in (
        ("base", "sd15", _BK, "*", f"{_BK_PAPER}/bk_base"),
        ("small", "sd15", f"{_BK}, mid", "*", f"{_BK_PAPER}/bk_small"),
        ("tiny", "sd15", f"{_BK}, mid, down.2.sampler, down.3, up.0", "*", f"{_BK_PAPER}/bk_tiny"),
        ("m1", "sd15", _BK, "down.0, up.3", f"{_ASDM}: base on dn0, up3 over SD1.5"),
        ("m2", "sd15", _BK, "down.0-1, up.2-3", f"{_ASDM}: base on dn0-1, up2-3 over SD1.5"),
        ("m3", "sd15", _BK, "down.0-2, up.1-3", f"{_ASDM}: base on dn0-2, up1-3 over SD1.5"),
        (
            "ssd-1b",
            "sdxl",
            f"down.2.*.transformer.4-9, {_VEGA_MID}, up.0.0-1.transformer.4-9, up.1.1-2.transformer.1",
            "*",
            "SSD-1B, arXiv 2401.02677; depths from the released config",
        ),
        (
            "vega",
            "sdxl",
            f"down.1.*.transformer.1, down.2.*.transformer.2-9, {_VEGA_MID}, "
            "up.0.*.transformer.2-9, up.1.*.transformer.1",
            "*",
            "Segmind-Vega, arXiv 2401.02677; depths from the released config",
        ),
        (
            "koala-1b",
            "sdxl",
            f"{_BK}, down.2.0.transformer.6-9, mid.0.transformer.6-9, up.0.0|2.transformer.6-9",
            "*",
            "KOALA-1B, arXiv 2312.04005; depths from the released config",
        ),
        (
            "koala-700m",
            "sdxl",
            f"{_BK}, mid, down.2.0.transformer.5-9, up.0.0|2.transformer.5-9",
            "*",
            "KOALA-700M, arXiv 2312.04005; depths from the released config",
        ),
    )
}


@dataclass(frozen=True)
class Renumbered:
    """The smaller network an architecture is equal to.

    origin: address in the small network -> address in the skeleton, for units and transformer blocks.
    """

    config: UNetConfig
    origin: Mapping[str, str]


def first_resnet(config: UNetConfig, cut: Container[str] = ()) -> Unit:
    """The first resnet that is not cut: what schedules that decide in the run watch."""
    return next(u for u in walk(config) if u.kind == "resnet" and u.address not in cut)


@dataclass(frozen=True)
class Architecture:
    """A skeleton with some units cut and some units carrying weights of their own.

    cut: addresses of cut units and of cut transformer blocks.
    own: addresses of the units whose weights are the student's, in the order of execution;
         everything else that is kept is the checkpoint's.
    Raises ValueError where the choice cannot work: a layer that changes the number of channels, a
    sampler without everything beneath it, a stem unit, an unknown address.
    """

    config: UNetConfig
    cut: frozenset[str] = frozenset()
    own: tuple[str, ...] = ()
    name: str = ""
    _flow: Mapping[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        config = self.config
        cut = frozenset(self.cut)
        in_order(config, cut | set(self.own))  # unknown addresses raise here
        # A block inside a cut transformer says nothing new; one canonical set makes equality mean equality.
        cut = frozenset(
            a for a in cut if a in _units(config) and not _is_block(config, a) or a.rpartition(".")[0] not in cut
        )
        own = in_order(config, self.own)
        for address in own:
            if _is_block(config, address):
                raise ValueError(
                    f"{address} is a transformer block; weights of its own has a whole unit, "
                    f"{address.rpartition('.')[0]}"
                )
        lost = cut & set(own)
        if lost:
            raise ValueError(f"{min(lost)} is both cut and trained; a cut unit has no weights")
        for u in walk(config):
            if u.depth and u.address not in cut and cut.issuperset(u.blocks):
                raise ValueError(f"every block of {u.address} is cut; cut {u.address} itself instead")
        object.__setattr__(self, "cut", cut)
        object.__setattr__(self, "own", own)
        object.__setattr__(self, "_flow", _check_flow(config, cut))

    # construction -------------------------------------------------------------------------------

    @classmethod
    def full(cls, config: UNetConfig) -> Architecture:
        """The unpruned network."""
        return cls(config, name="full")

    @classmethod
    def choose(cls, config: UNetConfig, cut: str = "", on: str = "*", name: str = "") -> Architecture:
        """Cut the units of `cut` that lie in the blocks `on`; what is kept there is trained.

        Both are range expressions of `addresses.select`.
        """
        where = select(config, on)
        chosen = frozenset(a for a in (select(config, cut) if cut else ()) if _covers(where, a))
        own = () if not chosen and on == "*" else tuple(a for a in where if a in _units(config) and a not in chosen)
        return cls(config, chosen, own, name)

    @classmethod
    def preset(cls, name: str, config: UNetConfig | None = None) -> Architecture:
        """A row of PRESETS on its own family, or on any config with the same block structure."""
        row = PRESETS.get(name)
        if row is None:
            raise ValueError(f"no preset {name!r}; presets are {', '.join(PRESETS)}")
        return cls.choose(config or FAMILIES[row.family], row.cut, row.on, name)

    def over(self, blocks: str) -> Architecture:
        """This student on `blocks` only, over the original network elsewhere (M2 = base over dn0-1, up2-3)."""
        where = select(self.config, blocks)
        return Architecture(self.config, self.cut_in(where), tuple(a for a in self.own if a in where)).named()

    def keeping(self, blocks: str) -> Architecture:
        """The same network, said to have kept exactly `blocks` of the transformers that these lie in.

        For students of which it is known which transformer blocks of the original they kept; a file only shows how
        many. blocks: a range expression of transformer blocks. Raises ValueError unless each transformer keeps as many
        as before.
        """
        chosen = select(self.config, blocks)
        cut = set(self.cut)
        for u in dict.fromkeys(unit(self.config, a) for a in in_order(self.config, chosen)):
            kept = chosen.intersection(u.blocks)
            count = 0 if u.address in self.cut else len(self.kept_blocks(u))
            if not count:
                raise ValueError(f"{u.address} has no transformer blocks in this UNet, so none can be kept")
            if u.address in chosen or len(kept) != count:
                raise ValueError(
                    f"{u.address} has {count} transformer blocks in this UNet, and the list names "
                    f"{'it as a whole' if u.address in chosen else len(kept)}; name {count} of its blocks, as "
                    f"{u.address}.0"
                )
            cut = cut - set(u.blocks) | set(u.blocks) - kept
        return Architecture(self.config, frozenset(cut), self.own).named()

    def named(self) -> Architecture:
        """The same architecture under the name of the preset it equals, if there is one."""
        for name in PRESETS:
            try:
                candidate = Architecture.preset(name, self.config)
            except ValueError:
                continue  # a preset of another block structure
            if candidate.cut == self.cut:
                return replace(self, name=name)
        return replace(self, name="full" if not self.cut else "")

    # what is there ------------------------------------------------------------------------------

    @cached_property
    def kept(self) -> tuple[Unit, ...]:
        """The units that are not cut, in the order of execution."""
        return tuple(u for u in walk(self.config) if u.address not in self.cut)

    @cached_property
    def cut_units(self) -> tuple[str, ...]:
        """The cut units, without single transformer blocks, in the order of execution."""
        return tuple(u.address for u in walk(self.config) if u.address in self.cut)

    def cut_in(self, units: Collection[str]) -> frozenset[str]:
        """What is cut of these units: they themselves, and single transformer blocks of theirs."""
        return frozenset(a for a in self.cut if _covers(units, a))

    def has(self, slot: Slot) -> bool:
        """Whether a tensor of the skeleton is part of this architecture."""
        return slot.unit.address not in self.cut and slot.owner not in self.cut

    @cached_property
    def params(self) -> int:
        return sum(s.tensor.numel for s in keys(self.config).values() if self.has(s))

    def pack_units(self, stem: bool = False) -> tuple[str, ...]:
        """The units a pack made from this architecture plays; the stem stays the checkpoint's by default."""
        return tuple(a for a in self.own if stem or not a.startswith("stem."))

    def kept_blocks(self, u: Unit) -> tuple[int, ...]:
        """Indices of the transformer blocks of `u` that are not cut."""
        return tuple(i for i, block in enumerate(u.blocks) if block not in self.cut)

    # the renumbered network ---------------------------------------------------------------------

    @cached_property
    def renumbered(self) -> Renumbered:
        """The smaller network that computes the same.

        Raises ValueError when there is none: then the choice exists in addressed form only.
        """
        config, cut = self.config, self.cut

        def no_form(why: str) -> ValueError:
            return ValueError(f"this choice of units has no renumbered form ({why}); it can only be kept addressed")

        def layers(side: str, block: int, depths: tuple[int, ...]) -> list[tuple[str, int]]:
            kept = []
            for i, depth in enumerate(depths):
                at = f"{side}.{block}.{i}"
                if f"{at}.resnet" in cut:
                    if depth and f"{at}.transformer" not in cut:
                        raise no_form(f"{at} keeps its transformer without its resnet")
                    continue
                u = unit(config, f"{at}.transformer") if depth else None
                kept.append((at, len(self.kept_blocks(u)) if u and u.address not in cut else 0))
            return kept

        levels = [n for n in range(config.levels) if n == 0 or f"down.{n - 1}.sampler" not in cut]
        down = [layers("down", n, config.down[n]) for n in levels]
        up = [layers("up", config.levels - 1 - n, config.up[config.levels - 1 - n]) for n in reversed(levels)]
        for n, d, opposite in zip(levels, down, reversed(up), strict=True):
            if len(opposite) != len(d) + 1:
                raise no_form(
                    f"level {n} keeps {len(d)} down and {len(opposite)} up layers; the up side needs one more"
                )
            if not d:  # ComfyUI counts levels by their layers and builds another network
                raise no_form(f"level {n} keeps no down layer")
        mid = self._renumbered_mid(no_form)

        small = replace(
            config,
            channel_mult=tuple(config.channel_mult[n] for n in levels),
            mid=mid,
            down=tuple(tuple(depth for _, depth in block) for block in down),
            up=tuple(tuple(depth for _, depth in block) for block in up),
        )
        layer_origin = {"mid.0": "mid.0", "mid.1": "mid.1"}
        for side, blocks in (("down", down), ("up", up)):
            for b, block in enumerate(blocks):
                layer_origin.update({f"{side}.{b}.{i}": at for i, (at, _) in enumerate(block)})
                level = levels[b] if side == "down" else levels[len(levels) - 1 - b]
                whole_block = level if side == "down" else config.levels - 1 - level
                layer_origin[f"{side}.{b}.sampler"] = f"{side}.{whole_block}.sampler"

        origin: dict[str, str] = {}
        for u in walk(small):
            if u.side == "stem":
                home = u.address
            elif u.kind in ("downsampler", "upsampler"):
                home = layer_origin[u.address]
            else:
                home = f"{layer_origin[u.layer]}.{u.kind}"
            origin[u.address] = home
            whole = unit(config, home)
            origin.update(zip(u.blocks, (whole.blocks[i] for i in self.kept_blocks(whole)), strict=True))
            if u.skip and layer_origin.get(u.skip, u.skip) != self._flow[whole.address]:
                raise no_form(
                    f"{home} takes its skip from {self._flow[whole.address]}, "
                    f"the small network would give it {layer_origin.get(u.skip, u.skip)}"
                )
        return Renumbered(small, origin)

    def _renumbered_mid(self, no_form: Callable[[str], ValueError]) -> int:
        if self.config.mid == NO_MID:
            return NO_MID
        kept = tuple(u.address for u in self.kept if u.side == "mid")
        full = tuple(u.address for u in walk(self.config) if u.side == "mid")
        if not kept:
            return NO_MID
        if kept == ("mid.0.resnet",):
            return RESNET_MID
        if kept != full:
            raise no_form(f"the mid block keeps {', '.join(kept)}")
        return len(self.kept_blocks(unit(self.config, "mid.0.transformer")))

    def keys(self, layout: str = "ldm", numbering: str = "addressed") -> dict[str, Slot]:
        """Every key of a state dict of this architecture, with the skeleton's slot it belongs to.

        layout: "ldm" or "diffusers"; numbering: "addressed" (the skeleton's own names, with holes) or
        "renumbered" (the names of the small network).
        """
        if numbering not in NUMBERINGS:
            raise ValueError(f"numbering must be one of {NUMBERINGS}, got {numbering!r}")
        if numbering == "addressed":
            return {k: s for k, s in keys(self.config, layout).items() if self.has(s)}
        full = {(s.unit.address, s.tensor.ldm): s for s in keys(self.config).values()}
        table = {}
        for key, slot in keys(self.renumbered.config, layout).items():
            name = slot.tensor.ldm
            if slot.tensor.block is not None:
                home = self.renumbered.origin[slot.owner].rpartition(".")[2]
                name = name.replace(f"transformer_blocks.{slot.tensor.block}.", f"transformer_blocks.{home}.", 1)
            table[key] = full[self.renumbered.origin[slot.unit.address], name]
        return table

    # JSON ---------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        standard = FAMILIES.get(self.config.family) == self.config
        data = {
            "format": FORMAT,
            "family": self.config.family,
            "name": self.name,
            "cut": list(in_order(self.config, self.cut)),
            "own": list(self.own),
        }
        return data if standard else data | {"config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Architecture:
        if not isinstance(data, Mapping):
            raise ValueError(f"architecture: wanted a JSON object, got {type(data).__name__}")
        version = data.get("format")
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise ValueError(f"architecture: format {version!r} is no version number")
        if version > FORMAT:
            raise ValueError(
                f"architecture: format {version} is newer than this version of asdm reads ({FORMAT}); update asdm"
            )
        family, name = data.get("family"), data.get("name", "")
        if not isinstance(name, str) or printable(name) != name:
            raise ValueError(f"architecture: name must be a short text in one line, got {printable(repr(name))}")
        if "config" in data:
            config = UNetConfig.from_dict(data["config"])
        elif isinstance(family, str) and family in FAMILIES:
            config = FAMILIES[family]
        else:
            raise ValueError(f"architecture: family {family!r} is none of {', '.join(FAMILIES)} and no config is given")
        lists = {}
        for key in ("cut", "own"):
            lists[key] = data.get(key, [])
            if not isinstance(lists[key], list) or not all(isinstance(a, str) for a in lists[key]):
                raise ValueError(f"architecture: {key!r} must be a list of addresses, got {lists[key]!r}")
        return cls(config, frozenset(lists["cut"]), tuple(lists["own"]), name)


def _units(config: UNetConfig) -> frozenset[str]:
    return frozenset(u.address for u in walk(config))


def _is_block(config: UNetConfig, address: str) -> bool:
    return address not in _units(config)


def _covers(where: Collection[str], address: str) -> bool:
    """Whether `where` holds the address, or the transformer unit it is a block of."""
    return address in where or address.rpartition(".")[0] in where


def _check_flow(config: UNetConfig, cut: frozenset[str]) -> dict[str, str]:
    """Walk the pruned network once; raise where it cannot run.

    Returns, for each kept up resnet, the layer whose output its skip really holds: a cut encoder layer
    pushes a copy of what came before it.
    """
    for u in walk(config):
        if u.side == "stem" and u.address in cut:
            raise ValueError(f"{u.address} cannot be cut; every network needs it")
    _check_samplers(config, cut)
    h_channels, h_scale, h_from = 0, 1, ""
    skips: list[tuple[int, int, str]] = []
    flow: dict[str, str] = {}
    for layer, group in groupby(
        (u for u in walk(config) if u.kind not in ("time_embed", "label_embed")),
        key=lambda u: u.address if u.side == "stem" else u.layer,
    ):
        units = list(group)
        resnet = units[0] if units[0].kind == "resnet" else None
        if resnet is not None and resnet.side == "up":
            s_channels, s_scale, s_from = skips.pop()
            if s_scale != h_scale:
                raise ValueError(
                    f"{layer}: its input is {h_scale} times smaller than the latent, its skip {s_scale} "
                    "times; the samplers between them cannot be cut alone"
                )
            if resnet.address not in cut:
                flow[resnet.address] = s_from
                if s_channels != resnet.skip_channels:
                    raise ValueError(
                        f"{layer}: its skip has {s_channels} channels, its weights want {resnet.skip_channels}; "
                        f"{resnet.skip} changes the number of channels and cannot be cut alone"
                    )
        for u in units:
            if u.address in cut:
                if u.kind == "resnet" and u.channels_in - u.skip_channels != u.channels_out:
                    raise ValueError(
                        f"{u.address} cannot be cut: it turns {u.channels_in - u.skip_channels} channels "
                        f"into {u.channels_out}, and nobody would"
                    )
                continue
            if u.kind == "conv_in":
                h_channels = u.channels_in
            if h_channels != u.channels_in - u.skip_channels:
                raise ValueError(f"{u.address} wants {u.channels_in - u.skip_channels} channels and gets {h_channels}")
            h_channels, h_from = u.channels_out, layer
            if u.kind in ("downsampler", "upsampler"):
                h_scale = h_scale * 2 if u.kind == "downsampler" else h_scale // 2
        if units[0].side == "down" or layer == "stem.conv_in":
            skips.append((h_channels, h_scale, h_from))
    return flow


def _check_samplers(config: UNetConfig, cut: frozenset[str]) -> None:
    for level in range(config.levels - 1):
        down, up = f"down.{level}.sampler", f"up.{config.levels - 2 - level}.sampler"
        if (down in cut) != (up in cut):
            raise ValueError(f"{down if down in cut else up} cannot be cut alone: {down} and {up} are a pair")
        if down in cut:
            deeper = [u.address for u in walk(config) if u.address not in cut and _level(config, u) > level]
            if deeper:
                raise ValueError(f"{down} can only be cut together with everything beneath it; {deeper[0]} is kept")


def _level(config: UNetConfig, u: Unit) -> int:
    """How many samplers lie between this unit and the shallow end; -1 where that says nothing (mid, stem).

    A downsampler belongs to the level above it, an upsampler to the level beneath.
    """
    if u.side not in ("down", "up"):
        return -1
    block = int(u.address.split(".")[1])
    return block if u.side == "down" else config.levels - 1 - block
