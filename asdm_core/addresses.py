"""Units of a Stable Diffusion UNet and all their names, from one walk of its config.

Every layer has one address for ever: its place in the unpruned network.

    stem.conv_in  stem.time_embed  stem.label_embed  stem.norm_out  stem.conv_out
    down.LEVEL.LAYER.resnet        down.LEVEL.LAYER.transformer      down.LEVEL.sampler
    mid.0.resnet                   mid.0.transformer                 mid.1.resnet
    up.BLOCK.LAYER.resnet          up.BLOCK.LAYER.transformer        up.BLOCK.sampler

`down` counts from the shallow end and `up` from the deep end, as diffusers and the A-SDM paper do,
so `down.0` and `up.3` of SD1.5 work at the same resolution. A transformer block and its parts lie
beneath their transformer: `down.2.0.transformer.4`, `down.2.0.transformer.4.attn1`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .text import printable

LAYOUTS = ("ldm", "diffusers")
NO_MID, RESNET_MID = -2, -1  # UNetConfig.mid, in the convention of ComfyUI's transformer_depth_middle


# Ten times what any known UNet has; they keep a broken file from asking for a billion blocks.
_MAX_DEPTH, _MAX_LEVELS, _MAX_LAYERS, _MAX_BLOCKS = 100, 16, 40, 1000


def _is_whole(value: Any, low: int, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _tuples(value: Any) -> Any:
    """Lists, as JSON gives them, as tuples all the way down."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class UNetConfig:
    """Shape of one UNet of the LDM kind (SD1.x, SD2.x, SDXL and their pruned relatives).

    down: per level (shallow first) the transformer depth of each layer; 0 = resnet only.
    up:   per up block (deep first) the transformer depth of each layer.
    mid:  transformer depth of the mid block, RESNET_MID = one resnet only, NO_MID = no mid block.
    num_heads or head_channels: exactly one is given, the other is None.
    adm_channels: width of the pooled conditioning vector (SDXL: 2816), None without one.
    """

    family: str
    model_channels: int
    channel_mult: tuple[int, ...]
    down: tuple[tuple[int, ...], ...]
    mid: int
    up: tuple[tuple[int, ...], ...]
    context_dim: int
    num_heads: int | None = None
    head_channels: int | None = None
    use_linear: bool = False
    adm_channels: int | None = None
    in_channels: int = 4
    out_channels: int = 4

    def __post_init__(self) -> None:
        def wrong(what: str) -> ValueError:
            return ValueError(f"UNet config: {what}")

        if not isinstance(self.family, str) or printable(self.family) != self.family:
            raise wrong(f"family must be a short text in one line, got {printable(repr(self.family))}")
        if not isinstance(self.use_linear, bool):
            raise wrong(f"use_linear must be true or false, got {self.use_linear!r}")
        for name in ("model_channels", "context_dim", "in_channels", "out_channels"):
            if not _is_whole(getattr(self, name), 1):
                raise wrong(f"{name} must be a whole number of at least 1, got {getattr(self, name)!r}")
        for name in ("num_heads", "head_channels", "adm_channels"):
            value = getattr(self, name)
            if value is not None and not _is_whole(value, 1):
                raise wrong(f"{name} must be a whole number of at least 1 or absent, got {value!r}")
        if not _is_whole(self.mid, NO_MID, _MAX_DEPTH):
            raise wrong(f"mid must be a whole number from {NO_MID} to {_MAX_DEPTH}, got {self.mid!r}")
        if not isinstance(self.channel_mult, tuple) or not all(_is_whole(m, 1) for m in self.channel_mult):
            raise wrong(f"channel_mult must be a list of whole numbers of at least 1, got {self.channel_mult!r}")
        for side in ("down", "up"):
            value = getattr(self, side)
            if not isinstance(value, tuple) or not all(
                isinstance(level, tuple) and all(_is_whole(d, 0, _MAX_DEPTH) for d in level) for level in value
            ):
                raise wrong(
                    f"{side} must be lists of whole numbers from 0 to {_MAX_DEPTH}, one list per level, got {value!r}"
                )
        if not len(self.channel_mult) == len(self.down) == len(self.up) > 0:
            raise wrong(
                f"channel_mult, down and up must have one entry per level, "
                f"got {len(self.channel_mult)}, {len(self.down)} and {len(self.up)}"
            )
        if (
            self.levels > _MAX_LEVELS
            or max(map(len, self.up)) > _MAX_LAYERS
            or sum(map(sum, self.down + self.up)) > _MAX_BLOCKS
        ):
            raise wrong(
                f"at most {_MAX_LEVELS} levels of {_MAX_LAYERS} layers with {_MAX_BLOCKS} transformer blocks in all, "
                f"got {self.levels} levels of "
                f"up to {max(map(len, self.up))} layers with {sum(map(sum, self.down + self.up))} blocks"
            )
        for level, layers in enumerate(self.down):
            up_layers = self.up[len(self.up) - 1 - level]
            if len(up_layers) != len(layers) + 1:
                raise wrong(
                    f"level {level} has {len(layers)} down layers, so its up block needs "
                    f"{len(layers) + 1} layers, got {len(up_layers)}"
                )
        if (self.num_heads is None) == (self.head_channels is None):
            raise wrong("give num_heads or head_channels, and not both")
        for level in range(self.levels):
            deepest = level == self.levels - 1 and self.mid > 0
            if (deepest or any(self.down[level] + self.up[-1 - level])) and self.channels(level) % (
                self.num_heads or self.head_channels or 1
            ):
                raise wrong(
                    f"the {self.channels(level)} channels of level {level} cannot be shared out over attention heads "
                    f"(num_heads {self.num_heads}, head_channels {self.head_channels})"
                )

    @property
    def levels(self) -> int:
        return len(self.channel_mult)

    @property
    def time_channels(self) -> int:
        return 4 * self.model_channels

    def channels(self, level: int) -> int:
        return self.model_channels * self.channel_mult[level]

    def heads(self, channels: int) -> int:
        return self.num_heads or channels // (self.head_channels or channels)

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> UNetConfig:
        """Inverse of `to_dict`, from JSON too. Raises ValueError for anything else."""
        if not isinstance(data, Mapping):
            raise ValueError(f"UNet config: wanted a JSON object, got {data!r}")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(data) - set(fields))
        if unknown:
            raise ValueError(f"UNet config: unknown fields {unknown}; known are {sorted(fields)}")
        missing = sorted(n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in data)
        if missing:
            raise ValueError(f"UNet config: fields {missing} are missing")
        return cls(**{name: _tuples(value) for name, value in data.items()})

    def to_host(self) -> dict[str, Any]:
        """The arguments ComfyUI's UNetModel takes for this shape (without dtype, device, operations)."""
        config = {
            "image_size": 32,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "model_channels": self.model_channels,
            "channel_mult": list(self.channel_mult),
            "num_res_blocks": [len(layers) for layers in self.down],
            "transformer_depth": [d for layers in self.down for d in layers],
            # ComfyUI pops this list from the end while it builds the deep blocks first.
            "transformer_depth_output": [d for layers in self.up for d in layers][::-1],
            "transformer_depth_middle": self.mid,
            "context_dim": self.context_dim,
            "num_heads": -1 if self.num_heads is None else self.num_heads,
            "num_head_channels": -1 if self.head_channels is None else self.head_channels,
            "use_linear_in_transformer": self.use_linear,
            "adm_in_channels": self.adm_channels,
            "use_spatial_transformer": True,
            "use_checkpoint": False,
            "legacy": False,
            "use_temporal_attention": False,
            "use_temporal_resblock": False,
        }
        if self.adm_channels is not None:
            config["num_classes"] = "sequential"
        return config

    @classmethod
    def from_host(cls, config: Mapping[str, Any], family: str = "") -> UNetConfig:
        """Inverse of `to_host`: the shape of a UNet that ComfyUI built from `config`."""
        counts = list(config["num_res_blocks"])
        down, up = iter(config["transformer_depth"]), iter(config["transformer_depth_output"][::-1])
        given = {"num_heads": config.get("num_heads", -1), "head_channels": config.get("num_head_channels", -1)}
        return cls(
            family,
            config["model_channels"],
            tuple(config["channel_mult"]),
            down=tuple(tuple(next(down) for _ in range(n)) for n in counts),
            mid=config["transformer_depth_middle"],
            up=tuple(tuple(next(up) for _ in range(n + 1)) for n in reversed(counts)),
            context_dim=config["context_dim"],
            use_linear=bool(config["use_linear_in_transformer"]),
            adm_channels=config.get("adm_in_channels"),
            in_channels=config["in_channels"],
            out_channels=config["out_channels"],
            **{name: None if n == -1 else n for name, n in given.items()},
        )

    def to_diffusers(self) -> dict[str, Any]:
        """The arguments diffusers' UNet2DConditionModel takes for this shape.

        Raises ValueError for shapes that class cannot express (a block in which only some layers
        have a transformer).
        """
        for side in ("down", "up"):
            for block, depths in enumerate(getattr(self, side)):
                if any(depths) and not all(depths):
                    raise ValueError(
                        f"diffusers cannot express {side}.{block}: only some of its layers have a transformer"
                    )
        heads = [self.heads(self.channels(level)) for level in range(self.levels)]
        mid_types = {NO_MID: None, RESNET_MID: "UNetMidBlock2D"}
        config = {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "block_out_channels": tuple(self.channels(level) for level in range(self.levels)),
            "layers_per_block": tuple(len(layers) for layers in self.down),
            "down_block_types": tuple("CrossAttnDownBlock2D" if any(d) else "DownBlock2D" for d in self.down),
            "up_block_types": tuple("CrossAttnUpBlock2D" if any(d) else "UpBlock2D" for d in self.up),
            "mid_block_type": mid_types.get(self.mid, "UNetMidBlock2DCrossAttn"),
            # In diffusers this argument is, for history's sake, the number of heads.
            "attention_head_dim": tuple(heads),
            "cross_attention_dim": self.context_dim,
            "use_linear_projection": self.use_linear,
        }
        if any(d > 1 for layers in (*self.down, *self.up) for d in layers) or self.mid > 1:
            # A block without transformers wants a depth all the same.
            config["transformer_layers_per_block"] = [[d or 1 for d in layers] for layers in self.down]
            config["reverse_transformer_layers_per_block"] = [[d or 1 for d in layers] for layers in self.up]
        if self.adm_channels is not None:
            config |= {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": self.adm_channels,
            }
        return config


@dataclass(frozen=True)
class TensorSpec:
    """One parameter of a unit: its name beneath the unit's path in both layouts, and its shape.

    block: index of the transformer block it belongs to, None outside of one.
    part:  attn1, attn2 or ff inside a transformer block (norms belong to the part they feed),
           "conv", "norm", "time", "skip" or "proj" elsewhere.
    """

    ldm: str
    diffusers: str
    shape: tuple[int, ...]
    part: str
    block: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Unit:
    """One layer-level building block of a UNet and where it lives in every naming scheme.

    channels_in: channels of its input, the concatenated skip included.
    skip: address of the layer whose output it takes from the skip stack (up resnets only).
    scale: how many times its output is smaller than the latent, per side (1, 2, 4, 8).
    depth: number of transformer blocks (transformers only).
    """

    address: str
    kind: str
    ldm: str
    diffusers: str
    channels_in: int
    channels_out: int
    scale: int
    skip: str | None = None
    skip_channels: int = 0
    depth: int = 0
    tensors: tuple[TensorSpec, ...] = dataclasses.field(default=(), repr=False)

    @property
    def side(self) -> str:
        return self.address.split(".", 1)[0]

    @property
    def layer(self) -> str:
        """Address of the layer this unit is part of: `down.0.1` for `down.0.1.resnet`."""
        return self.address if self.kind in ("downsampler", "upsampler") else self.address.rpartition(".")[0]

    @property
    def block(self) -> str:
        """The block of the UNet this unit lies in: `down.0` for `down.0.1.resnet`, `mid` or `stem`."""
        return self.side if self.side in ("mid", "stem") else ".".join(self.address.split(".")[:2])

    @property
    def params(self) -> int:
        return sum(t.numel for t in self.tensors)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Addresses of the transformer blocks of this unit."""
        return tuple(f"{self.address}.{i}" for i in range(self.depth))

    def path(self, layout: str) -> str:
        return self.ldm if layout == "ldm" else self.diffusers

    def key(self, tensor: TensorSpec, layout: str = "ldm") -> str:
        """Full name of one of this unit's tensors in `layout`."""
        return f"{self.path(layout)}.{tensor.ldm if layout == 'ldm' else tensor.diffusers}"

    def owner(self, tensor: TensorSpec) -> str:
        """Finest address a tensor belongs to: its transformer block, or the unit itself."""
        return self.address if tensor.block is None else f"{self.address}.{tensor.block}"


def _affine(ldm: str, diffusers: str, channels: int, part: str, block: int | None = None) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{ldm}.weight", f"{diffusers}.weight", (channels,), part, block)
    yield TensorSpec(f"{ldm}.bias", f"{diffusers}.bias", (channels,), part, block)


def _linear(
    ldm: str, diffusers: str, shape: tuple[int, ...], part: str, block: int | None = None, bias: bool = True
) -> Iterator[TensorSpec]:
    """A linear or convolution weight (out, in, ...) and its bias (out,)."""
    yield TensorSpec(f"{ldm}.weight", f"{diffusers}.weight", shape, part, block)
    if bias:
        yield TensorSpec(f"{ldm}.bias", f"{diffusers}.bias", shape[:1], part, block)


def _resnet_tensors(c_in: int, c_out: int, c_time: int) -> Iterator[TensorSpec]:
    yield from _affine("in_layers.0", "norm1", c_in, "norm")
    yield from _linear("in_layers.2", "conv1", (c_out, c_in, 3, 3), "conv")
    yield from _linear("emb_layers.1", "time_emb_proj", (c_out, c_time), "time")
    yield from _affine("out_layers.0", "norm2", c_out, "norm")
    yield from _linear("out_layers.3", "conv2", (c_out, c_out, 3, 3), "conv")
    if c_in != c_out:
        yield from _linear("skip_connection", "conv_shortcut", (c_out, c_in, 1, 1), "skip")


def _transformer_tensors(c: int, depth: int, c_context: int, use_linear: bool) -> Iterator[TensorSpec]:
    proj = (c, c) if use_linear else (c, c, 1, 1)
    yield from _affine("norm", "norm", c, "norm")
    yield from _linear("proj_in", "proj_in", proj, "proj")
    for i in range(depth):
        at = f"transformer_blocks.{i}"
        for number, part, c_kv in ((1, "attn1", c), (2, "attn2", c_context)):
            yield from _affine(f"{at}.norm{number}", f"{at}.norm{number}", c, part, i)
            name = f"{at}.{part}"
            for to, c_from in (("to_q", c), ("to_k", c_kv), ("to_v", c_kv)):
                yield from _linear(f"{name}.{to}", f"{name}.{to}", (c, c_from), part, i, bias=False)
            yield from _linear(f"{name}.to_out.0", f"{name}.to_out.0", (c, c), part, i)
        yield from _affine(f"{at}.norm3", f"{at}.norm3", c, "ff", i)
        # GEGLU: the first projection makes values and gates, 2 x 4c.
        yield from _linear(f"{at}.ff.net.0.proj", f"{at}.ff.net.0.proj", (8 * c, c), "ff", i)
        yield from _linear(f"{at}.ff.net.2", f"{at}.ff.net.2", (c, 4 * c), "ff", i)
    yield from _linear("proj_out", "proj_out", proj, "proj")


def _mlp_tensors(c_in: int, c_out: int) -> Iterator[TensorSpec]:
    yield from _linear("0", "linear_1", (c_out, c_in), "time")
    yield from _linear("2", "linear_2", (c_out, c_out), "time")


def _conv_tensors(c_in: int, c_out: int, ldm: str = "", diffusers: str = "") -> tuple[TensorSpec, ...]:
    named = _linear(ldm, diffusers, (c_out, c_in, 3, 3), "conv")
    return tuple(dataclasses.replace(t, ldm=t.ldm.lstrip("."), diffusers=t.diffusers.lstrip(".")) for t in named)


@lru_cache(maxsize=64)
def walk(config: UNetConfig) -> tuple[Unit, ...]:
    """All units of a UNet in the order of execution, with their names, widths and skips."""
    c0, c_time = config.model_channels, config.time_channels
    units: list[Unit] = []
    skips: list[tuple[str, int]] = []  # (layer address, channels), as the forward pass pushes them

    def add(
        address: str,
        kind: str,
        ldm: str,
        diffusers: str,
        c_in: int,
        c_out: int,
        scale: int,
        tensors: Iterable[TensorSpec],
        **more: Any,
    ) -> None:
        units.append(Unit(address, kind, ldm, diffusers, c_in, c_out, scale, tensors=tuple(tensors), **more))

    def resnet(address: str, ldm: str, diffusers: str, c_in: int, c_out: int, scale: int, **skip: Any) -> None:
        add(
            f"{address}.resnet",
            "resnet",
            ldm,
            diffusers,
            c_in,
            c_out,
            scale,
            _resnet_tensors(c_in, c_out, c_time),
            **skip,
        )

    def transformer(address: str, ldm: str, diffusers: str, c: int, scale: int, depth: int) -> None:
        add(
            f"{address}.transformer",
            "transformer",
            ldm,
            diffusers,
            c,
            c,
            scale,
            _transformer_tensors(c, depth, config.context_dim, config.use_linear),
            depth=depth,
        )

    add("stem.time_embed", "time_embed", "time_embed", "time_embedding", c0, c_time, 1, _mlp_tensors(c0, c_time))
    if config.adm_channels is not None:
        add(
            "stem.label_embed",
            "label_embed",
            "label_emb.0",
            "add_embedding",
            config.adm_channels,
            c_time,
            1,
            _mlp_tensors(config.adm_channels, c_time),
        )
    add(
        "stem.conv_in",
        "conv_in",
        "input_blocks.0.0",
        "conv_in",
        config.in_channels,
        c0,
        1,
        _conv_tensors(config.in_channels, c0),
    )
    skips.append(("stem.conv_in", c0))

    c, n, scale = c0, 1, 1
    for level, depths in enumerate(config.down):
        c_out = config.channels(level)
        for i, depth in enumerate(depths):
            at, block = f"down.{level}.{i}", f"down_blocks.{level}"
            resnet(at, f"input_blocks.{n}.0", f"{block}.resnets.{i}", c, c_out, scale)
            c = c_out
            if depth:
                transformer(at, f"input_blocks.{n}.1", f"{block}.attentions.{i}", c, scale, depth)
            skips.append((at, c))
            n += 1
        if level < config.levels - 1:
            scale *= 2
            add(
                f"down.{level}.sampler",
                "downsampler",
                f"input_blocks.{n}.0",
                f"down_blocks.{level}.downsamplers.0",
                c,
                c,
                scale,
                _conv_tensors(c, c, "op", "conv"),
            )
            skips.append((f"down.{level}.sampler", c))
            n += 1

    if config.mid > NO_MID:
        resnet("mid.0", "middle_block.0", "mid_block.resnets.0", c, c, scale)
    if config.mid > RESNET_MID:
        transformer("mid.0", "middle_block.1", "mid_block.attentions.0", c, scale, config.mid)
        resnet("mid.1", "middle_block.2", "mid_block.resnets.1", c, c, scale)

    n = 0
    for up_block, depths in enumerate(config.up):
        level = config.levels - 1 - up_block
        c_out = config.channels(level)
        for i, depth in enumerate(depths):
            at, name = f"up.{up_block}.{i}", f"up_blocks.{up_block}"
            skip, c_skip = skips.pop()
            resnet(
                at,
                f"output_blocks.{n}.0",
                f"{name}.resnets.{i}",
                c + c_skip,
                c_out,
                scale,
                skip=skip,
                skip_channels=c_skip,
            )
            c = c_out
            if depth:
                transformer(at, f"output_blocks.{n}.1", f"{name}.attentions.{i}", c, scale, depth)
            if level and i == len(depths) - 1:
                scale //= 2
                add(
                    f"up.{up_block}.sampler",
                    "upsampler",
                    f"output_blocks.{n}.{2 if depth else 1}",
                    f"{name}.upsamplers.0",
                    c,
                    c,
                    scale,
                    _conv_tensors(c, c, "conv", "conv"),
                )
            n += 1

    add(
        "stem.norm_out",
        "norm_out",
        "out.0",
        "conv_norm_out",
        c,
        c,
        1,
        (TensorSpec("weight", "weight", (c,), "norm"), TensorSpec("bias", "bias", (c,), "norm")),
    )
    add(
        "stem.conv_out",
        "conv_out",
        "out.2",
        "conv_out",
        c0,
        config.out_channels,
        1,
        _conv_tensors(c0, config.out_channels),
    )
    return tuple(units)


@lru_cache(maxsize=64)
def _unit_table(config: UNetConfig) -> dict[str, Unit]:
    return {u.address: u for u in walk(config)}


_INSIDE_UNIT = re.compile(r"(?P<unit>.+)\.(?P<block>0|[1-9][0-9]*)(\.(attn1|attn2|ff))?")


def unit(config: UNetConfig, address: str) -> Unit:
    """The unit with this address, or the transformer unit a block or part address lies in.

    Raises ValueError for an address that this UNet does not have.
    """
    table = _unit_table(config)
    if address in table:
        return table[address]
    at = _INSIDE_UNIT.fullmatch(address)
    if at is None or at["unit"] not in table or int(at["block"]) >= table[at["unit"]].depth:
        raise ValueError(f"no unit {address!r} in a {config.family} UNet; an example is {next(iter(table))!r}")
    return table[at["unit"]]


@dataclass(frozen=True)
class Slot:
    """A named tensor of a state dict: which unit it belongs to and what its shape must be."""

    unit: Unit
    tensor: TensorSpec

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def owner(self) -> str:
        return self.unit.owner(self.tensor)


@lru_cache(maxsize=64)
def keys(config: UNetConfig, layout: str = "ldm") -> dict[str, Slot]:
    """Every state-dict key of a UNet of this config, in `layout` ("ldm" or "diffusers")."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    return {u.key(t, layout): Slot(u, t) for u in walk(config) for t in u.tensors}


def lora_names(config: UNetConfig, norms: bool = False) -> dict[str, str]:
    """Every name of a UNet's module under which ComfyUI finds it in a LoRA file, with the LDM module it means.

    Dialects: kohya over diffusers names (`lora_unet_down_blocks_0_attentions_0_proj_in`), the same of SimpleTuner's
    LyCORIS (`lycoris_down_blocks...`), kohya over LDM names (`lora_unet_input_blocks_1_1_proj_in`, usual for SDXL),
    generic LDM (`diffusion_model.input_blocks...`), and diffusers with its attention processors
    (`unet.down_blocks.0.attentions.0.proj_in`, `unet...attn1.processor.to_q`, both without `unet.` as well). Both sides
    are without `.weight`; the LDM side has no prefix. norms: those of norms too, which LyCORIS can train.
    """
    names: dict[str, str] = {}
    for ldm, diffusers in _modules(config, norms):
        spelled = re.sub(r"(?<=\.processor\.to_out)\.0$", "", diffusers.replace(".to_", ".processor.to_"))
        kohya = diffusers.replace(".", "_")
        names |= dict.fromkeys(
            (
                f"lora_unet_{kohya}",
                f"lora_unet_{ldm.replace('.', '_')}",
                f"lycoris_{kohya}",
                f"diffusion_model.{ldm}",
                spelled,
                f"unet.{spelled}",
            ),
            ldm,
        )
    return names


def peft_names(config: UNetConfig) -> dict[str, str]:
    """Names of modules as PEFT writes them, which ComfyUI does not read, with the LDM module they mean:
    `unet.down_blocks.0.attentions.0...attn1.to_q`, and with PEFT's own prefix `base_model.model.` before any module.
    """
    names: dict[str, str] = {}
    for ldm, diffusers in _modules(config):
        names |= dict.fromkeys((f"base_model.model.{diffusers}", f"unet.base_model.model.{diffusers}"), ldm)
        names |= dict.fromkeys((f"base_model.model.unet.{diffusers}", f"base_model.model.{ldm}"), ldm)
        if ".to_" in diffusers:
            names[f"unet.{diffusers}"] = ldm
    return names


def _modules(config: UNetConfig, norms: bool = False) -> Iterable[tuple[str, str]]:
    """The modules LoRAs can act on, under their LDM and their diffusers names."""
    return (
        (
            slot.unit.key(slot.tensor, "ldm").removesuffix(".weight"),
            slot.unit.key(slot.tensor, "diffusers").removesuffix(".weight"),
        )
        for slot in keys(config, "ldm").values()
        if len(slot.shape) > 1 or norms and slot.unit.key(slot.tensor).endswith(".weight")
    )


_SEGMENT = re.compile(r"(?P<any>\*)|(?P<low>\d+)-(?P<high>\d+)|(?P<words>[a-z0-9_]+(\|[a-z0-9_]+)*)")


def _segment_test(segment: str, expression: str) -> Callable[[str], bool]:
    match = _SEGMENT.fullmatch(segment)
    if match is None:
        raise ValueError(
            f"cannot read {segment!r} in {expression!r}: each part between dots is a name, a number, "
            f"a range like 0-2, choices like resnet|transformer, or *"
        )
    if match["any"]:
        return lambda s: True
    if match["words"]:
        words = set(match["words"].split("|"))
        return words.__contains__
    low, high = int(match["low"]), int(match["high"])
    if low > high:
        raise ValueError(f"the range {segment!r} in {expression!r} runs backwards")
    return lambda s: s.isdigit() and low <= int(s) <= high


def select(config: UNetConfig, expression: str | Iterable[str]) -> frozenset[str]:
    """Addresses chosen by a range expression.

    Terms are separated by commas or blanks; each is an address in which a part may be a number range
    (`down.0-1.1`), a choice (`up.3.1.resnet|transformer`) or `*`. A term shorter than a unit's address
    takes everything beneath it (`mid`, `up.2.1`); a longer one reaches transformer blocks
    (`down.2.*.transformer.4-9`). A term that starts with `!` takes its units out again.
    Returns unit addresses and block addresses. Raises ValueError for a term that matches nothing.
    """
    terms = re.split(r"[\s,]+", expression.strip()) if isinstance(expression, str) else list(expression)
    chosen: set[str] = set()
    for term in filter(None, terms):
        tests = [_segment_test(s, term) for s in term.removeprefix("!").split(".")]
        found: set[str] = set()
        for u in walk(config):
            names = (u.address,) if len(tests) <= len(u.address.split(".")) else u.blocks
            found.update(
                n
                for n in names
                if all(t(s) for t, s in zip(tests, n.split("."), strict=False)) and len(tests) <= len(n.split("."))
            )
        if not found:
            sides = ", ".join(dict.fromkeys(u.address for u in walk(config) if u.side != "stem"))
            raise ValueError(f"{term!r} matches no unit of this {config.family} UNet; its units are: {sides}")
        chosen = _without(config, chosen, found) if term.startswith("!") else chosen | found
    return frozenset(chosen)


def _without(config: UNetConfig, chosen: set[str], out: set[str]) -> set[str]:
    """A choice of units and blocks without some others. A unit that loses a block is left with its other blocks."""
    left = set()
    for address in chosen - out:
        u = unit(config, address)
        if u.address in out:
            continue
        left |= set(u.blocks) - out if address == u.address and out.intersection(u.blocks) else {address}
    return left


def in_order(config: UNetConfig, addresses: Iterable[str]) -> tuple[str, ...]:
    """The given unit and block addresses in the order of execution."""
    order: dict[str, int] = {}
    for u in walk(config):
        for name in (u.address, *u.blocks):
            order[name] = len(order)
    unknown = sorted(set(addresses) - set(order))
    if unknown:
        raise ValueError(f"no unit {unknown[0]!r} in a {config.family} UNet")
    return tuple(sorted(set(addresses), key=order.__getitem__))
