"""Units of a UNet as modules of the host: the layers it has, stand-ins for cut ones, packs.

The only place that knows the host's layer classes and their constructors.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import comfy.model_management
import comfy.ops
import torch
from comfy.ldm.modules import attention
from comfy.ldm.modules.diffusionmodules import openaimodel
from torch import Tensor, nn

from ...asdm_core import differences
from ...asdm_core.addresses import Slot, Unit, UNetConfig, walk
from ...asdm_core.architecture import Architecture
from ...asdm_core.carry import Links
from ...asdm_core.condconv import CondConv2d, Conv, further_experts
from ...asdm_core.packs import Description, Loaded
from ...asdm_core.surgery import pass_through

# Stand-ins ------------------------------------------------------------------------------------------
# Other packs place their modules by class: they must find a ResBlock where a ResBlock was cut, and the
# host must count a cut transformer. So each stand-in is of the kind it stands for, with no weights.


class _StandIn:
    """What all stand-ins share: a unit, and what it does with its input (nothing, unless told otherwise)."""

    def stand_for(self, unit: Unit, play: Callable | None):
        self.unit = unit
        self.channels, self.out_channels = unit.channels_in, unit.channels_out
        self.play = play or self.pass_on

    def pass_on(self, x: Tensor, output_shape=None) -> Tensor:
        return pass_through(self.unit, x)


class ResBlock(_StandIn, openaimodel.TimestepBlock):
    """In place of a resnet. Named after the host's class because others recognise layers by class name."""

    def __init__(self, unit: Unit, play: Callable | None = None):
        super().__init__()
        self.stand_for(unit, play)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.play(x)


class SpatialTransformer(_StandIn, attention.SpatialTransformer):
    """In place of a transformer. heads: of its attention, where others may look for its blocks; they are hollow."""

    def __init__(self, unit: Unit, play: Callable | None = None, heads: int = 0):
        nn.Module.__init__(self)
        self.stand_for(unit, play)
        self.in_channels = unit.channels_in
        blocks = [BasicTransformerBlock(unit, i, heads) for i in range(unit.depth)] if heads else []
        self.transformer_blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, context=None, transformer_options={}) -> Tensor:
        return self.play(x)


class Downsample(_StandIn, openaimodel.Downsample):
    """In place of a downsampler."""

    def __init__(self, unit: Unit, play: Callable | None = None):
        nn.Module.__init__(self)
        self.stand_for(unit, play)

    def forward(self, x: Tensor) -> Tensor:
        return self.play(x)


class Upsample(_StandIn, openaimodel.Upsample):
    """In place of an upsampler."""

    def __init__(self, unit: Unit, play: Callable | None = None):
        nn.Module.__init__(self)
        self.stand_for(unit, play)

    def forward(self, x: Tensor, output_shape=None) -> Tensor:
        return self.play(x, output_shape)


class Linear(nn.Module):
    """A layer that nobody runs: `weight` and `bias` are shapes alone, no parameters."""

    def __init__(self, weight: tuple[int, ...], bias: tuple[int, ...] | None):
        super().__init__()
        self.weight = torch.empty(weight, device="meta")
        self.bias = None if bias is None else torch.empty(bias, device="meta")
        self.in_features, self.out_features = weight[-1], weight[0]


class LayerNorm(Linear):
    """The same of a norm."""


class CrossAttention(attention.CrossAttention):
    """The same of an attention."""

    def __init__(self, channels: int, heads: int):
        nn.Module.__init__(self)
        self.heads, self.dim_head, self.attn_precision = heads, channels // heads, None


class BasicTransformerBlock(attention.BasicTransformerBlock):
    """In place of a transformer block. Packs number layers by counting these and their attention, and look at the sizes
    of their layers; what they put there has nothing to act on.
    """

    def __init__(self, unit: Unit, block: int, heads: int):
        nn.Module.__init__(self)
        channels = unit.channels_in
        self.n_heads, self.d_head = heads, channels // heads
        self.is_res, self.disable_self_attn, self.switch_temporal_ca_to_sa = True, False, False
        self.ff_in, self.attn_precision = None, None
        self.attn1, self.attn2 = CrossAttention(channels, heads), CrossAttention(channels, heads)
        layers: dict[str, dict[str, tuple[int, ...]]] = {}
        for tensor in unit.tensors:
            if tensor.block == block:
                path, _, leaf = tensor.ldm.split(".", 2)[2].rpartition(".")
                layers.setdefault(path, {})[leaf] = tensor.shape
        for path, shapes in layers.items():
            kind = Linear if len(shapes["weight"]) > 1 else LayerNorm
            self._place(path.split("."), kind(shapes["weight"], shapes.get("bias")))

    def _place(self, path: list[str], layer: nn.Module) -> None:
        parent: nn.Module = self
        for name, following in zip(path, [*path[1:], ""], strict=True):
            while name.isdigit() and len(parent._modules) < int(name):  # what stands between has no weights
                parent.add_module(str(len(parent._modules)), nn.Identity())
            if name not in parent._modules:
                within = nn.Sequential() if following.isdigit() else nn.Module()
                parent.add_module(name, within if following else layer)
            parent = parent.get_submodule(name)

    def forward(self, x: Tensor, context=None, transformer_options={}) -> Tensor:
        return x


_STAND_INS: dict[str, Any] = {
    "resnet": ResBlock,
    "transformer": SpatialTransformer,
    "downsampler": Downsample,
    "upsampler": Upsample,
}

# Every class a dispatched layer can have. Naming them, instead of nn.Module, leaves the layers that
# other packs put between them to those packs.
LAYER_CLASSES = (
    openaimodel.ResBlock,
    ResBlock,
    attention.SpatialTransformer,
    openaimodel.Downsample,
    openaimodel.Upsample,
)
_KIND_CLASSES = {
    "resnet": (openaimodel.ResBlock, ResBlock),
    "transformer": attention.SpatialTransformer,
    "downsampler": openaimodel.Downsample,
    "upsampler": openaimodel.Upsample,
}


def stand_in(unit: Unit, is_block: bool = False, heads: Callable[[int], int] | None = None) -> nn.Module:
    """A module that passes its input on in place of a cut unit or transformer block.

    heads: of the attention of so many channels; given where others find these modules in a network.
    """
    if is_block:
        return BasicTransformerBlock(unit, 0, heads(unit.channels_in) if heads else 1)
    if heads and unit.kind == "transformer":
        return SpatialTransformer(unit, heads=heads(unit.channels_in))
    return _STAND_INS[unit.kind](unit)


def player(unit: Unit, play: Callable) -> nn.Module:
    """A module that plays a unit by a function of its input and, for upsamplers, the shape to return to."""
    return _STAND_INS[unit.kind](unit, play)


def passes_on(module: nn.Module) -> bool:
    """Whether a module stands for a cut unit: it passes its input on."""
    return isinstance(module, _StandIn) and getattr(module.play, "__func__", None) is _StandIn.pass_on


@lru_cache(maxsize=1024)
def shared_stand_in(unit: Unit) -> nn.Module:
    """A stand-in for dispatch: it has no state, so one serves all runs (and all compiled graphs)."""
    return stand_in(unit)


# Layers of a live UNet ------------------------------------------------------------------------------


def layers(unet: Any, config: UNetConfig) -> dict[str, nn.Module]:
    """The layer that plays each dispatchable unit of a live host UNet, by address.

    Found by kind within their block, not by position: other packs insert modules into these blocks. Raises ValueError
    where another pack has put layers of other classes in their place.
    """
    blocks = {"middle_block": unet.middle_block}
    for side in ("input_blocks", "output_blocks"):
        blocks.update({f"{side}.{n}": block for n, block in enumerate(getattr(unet, side))})
    found: dict[str, nn.Module] = {}
    seen: dict[tuple[str, str], int] = {}
    for unit in walk(config):
        if unit.kind not in _KIND_CLASSES:
            continue
        name = unit.ldm.rpartition(".")[0]
        of_kind = [m for m in blocks[name] if isinstance(m, _KIND_CLASSES[unit.kind])]
        number = seen.get((name, unit.kind), 0)
        if number >= len(of_kind):
            there = ", ".join(type(m).__name__ for m in blocks[name])
            raise ValueError(
                f"asdm does not find the {unit.kind} {unit.address} of this UNet: another node has put layers of its "
                f"own into {name} ({there}). Use either that node or asdm's on this MODEL."
            )
        found[unit.address] = of_kind[number]
        seen[name, unit.kind] = number + 1
    return found


def attends_to_text(layer: nn.Module) -> bool:
    """Whether the first attention of a loaded transformer attends to the text, as its second does."""
    return any(getattr(block, "disable_self_attn", False) for block in getattr(layer, "transformer_blocks", ()))


def with_submodules(layer: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """A shallow copy of a layer with other modules at some paths (`in_layers.2`); it shares everything else."""
    twin = copy.copy(layer)
    twin._modules = dict(layer._modules)
    for path, module in modules.items():
        name, _, rest = path.partition(".")
        twin._modules[name] = with_submodules(twin.get_submodule(name), {rest: module}) if rest else module
    return twin


@contextmanager
def host_weights(module: nn.Module, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Weight and bias of a layer for the input x, patched, cast and brought to its device by the host's own means, or
    by those of a layer whose numbers are to be unpacked first (GGUF).
    """
    if callable(unpack := getattr(module, "cast_bias_weight", None)):
        yield unpack(x)
        return
    weight, bias, stream = comfy.ops.cast_bias_weight(module, x, offloadable=True)
    yield weight, bias
    comfy.ops.uncast_bias_weight(module, weight, bias, stream)


# Packs ----------------------------------------------------------------------------------------------

_serials = itertools.count()


class PackModel(nn.Module):
    """The units of a pack, under the paths they have inside the host's model, its further experts and its log gains.

    Parameter names are the host's (`diffusion_model.input_blocks.1.0...`), so LoRA patches fit as they are.
    Experts, routers and log gains lie elsewhere (`further.input_blocks.1.0.in_layers.2.experts`): LoRAs are not for
    them, and the host neither patches nor moves the weights of a module that has children with weights.
    serial: tells this module from any other one; compiled graphs are keyed by it. own: of a pack of differences, the
    weights of the checkpoint that they were added to, by parameter. unchanged: its units that are the checkpoint's own.
    links, matrices: by which they take over what changes elsewhere in the checkpoint (asdm_core/carry.py); the weights
    there are in `own` as well.
    """

    def __init__(
        self,
        description: Description,
        convs: tuple[Conv, ...],
        log_gains: Mapping[str, Slot],
        dtype: torch.dtype,
        attn_precision,
    ):
        super().__init__()
        self.serial = next(_serials)
        self.own: Mapping[str, Tensor] = {}
        self.unchanged: frozenset[str] = frozenset()
        self.links: Links = {}
        self.matrices: Mapping[str, Tensor] = {}
        self.architecture = architecture = description.architecture
        self.diffusion_model = nn.Module()
        self._paths: dict[str, str] = {}
        for u in architecture.kept:
            if u.address in description.units:
                module = _build(u, architecture, dtype, attn_precision)
                _attach(self.diffusion_model, u.ldm, module)
                self._paths[u.address] = u.ldm
        self.further = nn.Module()
        self._condconv = description.condconv
        self._convs = convs
        for conv in convs:
            experts, router = further_experts(self._condconv, conv, comfy.ops.manual_cast, dtype=dtype, device="meta")
            _attach(self.further, f"{conv.path('ldm')}.experts", experts)
            _attach(self.further, f"{conv.path('ldm')}.router", router)
        self._log_gains: dict[str, dict[int, str]] = {}
        for key, slot in log_gains.items():  # in the form of a layer, because the host moves and casts layers only
            _attach(self.further, key, comfy.ops.manual_cast.Linear(1, *slot.shape, bias=False, device="meta"))
            self._log_gains.setdefault(slot.unit.address, {})[slot.tensor.block] = key

    def log_gains(self, address: str, strength: float) -> dict[int, Callable[[Tensor], Tensor]]:
        """For the blocks of a transformer that have them: the log gains of its heads, (heads,) float32, where
        the queries are.
        """

        def scaled(module: nn.Module, q: Tensor) -> Tensor:
            with host_weights(module, q[:0].float()) as (weight, _):
                return strength * weight[:, 0]

        return {
            i: partial(scaled, self.further.get_submodule(key)) for i, key in self._log_gains.get(address, {}).items()
        }

    def with_experts(self, address: str, layer: nn.Module, strength: float) -> nn.Module:
        """The layer that plays a unit, with this pack's further experts in its convolutions; its own are expert 1."""
        conditional = {}
        for conv in self._convs:
            if conv.unit.address == address:
                further = self.further.get_submodule(conv.path("ldm"))
                conditional[conv.ldm] = CondConv2d(
                    layer.get_submodule(conv.ldm),
                    further.experts,
                    further.router,
                    self._condconv.form,
                    strength,
                    host_weights,
                )
        return with_submodules(layer, conditional)

    def layer(self, address: str) -> nn.Module:
        """The module that plays a unit."""
        return self.diffusion_model.get_submodule(self._paths[address])

    @classmethod
    def load(
        cls, pack: Loaded, dtype: torch.dtype, attn_precision, own: Mapping[str, Tensor] | None = None
    ) -> PackModel:
        """Build the modules and give them the pack's weights, as `dtype`; routers are float32.

        own: for a pack of differences, the unpatched weights of the checkpoint that it is added to
        (differences.needed) by addressed name.
        """
        description, tensors = pack.description, pack.tensors
        played = differences.played_in(pack, own, "this MODEL").tensors if own is not None else tensors
        units = {k: played[k].to(dtype) for k in description.unit_keys}
        experts = {k: tensors[k].to(torch.float32 if ".router." in k else dtype) for k in description.expert_keys}
        # Differences that are all 0 are left out: then no bit changes, however the device adds up a convolution.
        convs = tuple(
            c
            for c in description.convs
            if description.condconv.form != "difference"
            or any(experts[c.key(f"experts.{x}")].any() for x in ("weight", "bias"))
        )
        names = {c.key(leaf) for c in convs for leaf in description.condconv.shapes(c)}
        log_gains = {k: slot for k, slot in description.log_gain_keys.items() if tensors[k].any()}  # likewise
        model = cls(description, convs, log_gains, dtype, attn_precision)
        weights = {f"diffusion_model.{k}": t for k, t in units.items()} | {f"further.{k}": experts[k] for k in names}
        weights |= {f"further.{k}.weight": tensors[k].float()[:, None] for k in log_gains}
        model.load_state_dict(weights, strict=True, assign=True)
        model.requires_grad_(False).eval()
        if own is not None:
            model.own = {f"diffusion_model.{k}": weight for k, weight in own.items()}
            if description.carry:
                model.links = description.carry.links(description.architecture)
                model.matrices = {name: tensors[name].float() for name in description.carry_keys}
            model.unchanged = differences.unchanged(description, tensors)
        comfy.model_management.archive_model_dtypes(model)
        return model


def _build(u: Unit, architecture: Architecture, dtype: torch.dtype, attn_precision) -> nn.Module:
    # manual_cast, whatever the host's own operations are: a pack's dtype need not be the host's.
    # Weights are assigned afterwards, so nothing is allocated here.
    config = architecture.config
    operations = comfy.ops.manual_cast
    more = {"dtype": dtype, "device": "meta", "operations": operations}
    if u.kind == "resnet":
        return openaimodel.ResBlock(u.channels_in, config.time_channels, 0, out_channels=u.channels_out, **more)
    if u.kind == "downsampler":
        return openaimodel.Downsample(u.channels_in, True, out_channels=u.channels_out, **more)
    if u.kind == "upsampler":
        return openaimodel.Upsample(u.channels_in, True, out_channels=u.channels_out, **more)
    if u.kind != "transformer":
        raise ValueError(f"{u.address} cannot be played by a pack; write the whole UNet instead (asdm_core assemble)")
    heads = config.heads(u.channels_in)
    transformer = attention.SpatialTransformer(
        u.channels_in,
        heads,
        u.channels_in // heads,
        depth=u.depth,
        context_dim=config.context_dim,
        use_linear=config.use_linear,
        use_checkpoint=False,
        attn_precision=attn_precision,
        **more,
    )
    for i, block in enumerate(u.blocks):
        if block in architecture.cut:
            transformer.transformer_blocks[i] = stand_in(u, True, config.heads)
    return transformer


def _attach(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    root.add_module(name, module)
