"""CondConv: convolutions whose kernel is mixed from several experts for each sample.

Yang et al. 2019 (arXiv 1904.04971), as A-SDM uses it (arXiv 2312.15516, section 2.3). The routes of a
sample are r = sigmoid(Linear(mean_hw(x))); its kernel, and its bias likewise, is one of

    difference   W = W_1 + sum_k r_k dW_k      k = 2..E, one route each; dW = 0 is exactly the plain convolution
    mixture      W = sum_k r_k W_k             k = 1..E, the papers' form

Expert 1 is an ordinary convolution under its ordinary name, which may belong to a checkpoint. What a
pack holds besides, for a convolution at `<conv>`:

    <conv>.experts.weight   ((E-1) C_out, C_in, h, w)   the experts 2..E (their differences), one after the other
    <conv>.experts.bias     ((E-1) C_out,)
    <conv>.router.weight    (R, C_in)                   R = E - 1 routes, or E in a mixture
    <conv>.router.bias      (R,)

So the further experts together have the form of one convolution with (E-1) C_out outputs: any namespace of
layers can hold, cast and offload them, and int8 storage gives each output channel a scale.
A convolution has an address too, beneath its unit: `up.3.0.resnet.conv1`, `down.0.sampler.conv`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from . import addresses
from .addresses import Slot, Unit, UNetConfig, walk
from .surgery import Mismatch, StateDict, check, shapes_of

FORMS = ("difference", "mixture")
STARTS = ("zero", "random")
MAX_EXPERTS = 64  # eight times what any publication has; keeps a broken file from asking for a billion

# Route of an expert that should start (almost) silent, as a logit: sigmoid(-4.6) = 0.01.
_SILENT = -4.6


# Which convolutions ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conv:
    """One convolution that can have further experts.

    ldm, diffusers: its module beneath the unit's path. shape: of its weight, (C_out, C_in, h, w).
    """

    address: str
    unit: Unit
    ldm: str
    diffusers: str
    shape: tuple[int, int, int, int]

    def path(self, layout: str) -> str:
        """Module path of the convolution in a whole UNet."""
        return f"{self.unit.path(layout)}.{self.ldm if layout == 'ldm' else self.diffusers}"

    def key(self, leaf: str) -> str:
        """Name of one of its tensors in a file: "weight", "bias", "experts.weight", "router.bias", ..."""
        return f"{self.path('ldm')}.{leaf}"


@lru_cache(maxsize=64)
def convolutions(config: UNetConfig) -> dict[str, Conv]:
    """The 3x3 convolutions of the resnets and samplers of a UNet by address, in the order of execution."""
    found = {}
    for u in walk(config):
        for t in u.tensors:
            if t.part == "conv" and len(t.shape) == 4 and u.side != "stem":
                ldm, diffusers = t.ldm.removesuffix(".weight"), t.diffusers.removesuffix(".weight")
                address = f"{u.address}.{diffusers}"
                found[address] = Conv(address, u, ldm, diffusers, t.shape)
    return found


def convolution(config: UNetConfig, address: str) -> Conv:
    """The convolution with this address. Raises ValueError for an address that this UNet does not have."""
    table = convolutions(config)
    if address not in table:
        raise ValueError(f"no convolution {address!r} in a {config.family} UNet; an example is {next(iter(table))!r}")
    return table[address]


@dataclass(frozen=True)
class CondConv:
    """Which convolutions have how many experts, and in which form they are mixed.

    experts: convolution address -> number of experts, the first included (2 to MAX_EXPERTS).
    Raises ValueError for anything else.
    """

    experts: Mapping[str, int]
    form: str = "difference"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"condconv: form must be one of {FORMS}, got {self.form!r}")
        if not isinstance(self.experts, Mapping) or not self.experts:
            raise ValueError(
                f"condconv: experts must give at least one convolution its number of experts, got {self.experts!r}"
            )
        for address, count in self.experts.items():
            if isinstance(count, bool) or not isinstance(count, int) or not 2 <= count <= MAX_EXPERTS:
                raise ValueError(f"condconv: {address} must have 2 to {MAX_EXPERTS} experts, got {count!r}")

    def convs(self, config: UNetConfig) -> dict[str, Conv]:
        """The convolutions by address. Raises ValueError for one that this UNet does not have."""
        return {address: convolution(config, address) for address in self.experts}

    def keys(self, config: UNetConfig) -> dict[str, Slot]:
        """Names and shapes of the further experts and the routers in a pack file."""
        slots = {}
        for conv in self.convs(config).values():
            for leaf, shape in self.shapes(conv).items():
                tensor = addresses.TensorSpec(f"{conv.ldm}.{leaf}", f"{conv.diffusers}.{leaf}", shape, "conv")
                slots[conv.key(leaf)] = Slot(conv.unit, tensor)
        return slots

    def shapes(self, conv: Conv) -> dict[str, tuple[int, ...]]:
        """Shapes of what one convolution has besides expert 1, by name beneath the convolution's."""
        c_out, c_in, *kernel = conv.shape
        count = self.experts[conv.address]
        stacked = (count - 1) * c_out
        routes = count - (self.form == "difference")
        return {
            "experts.weight": (stacked, c_in, *kernel),
            "experts.bias": (stacked,),
            "router.weight": (routes, c_in),
            "router.bias": (routes,),
        }

    def to_dict(self) -> dict[str, Any]:
        return {"form": self.form, "experts": dict(self.experts)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CondConv:
        """Inverse of `to_dict`, from JSON too. Raises ValueError for anything else."""
        if not isinstance(data, Mapping):
            raise ValueError(f"condconv must be a JSON object, got {data!r}")
        unknown = sorted(set(data) - {"form", "experts"})
        if unknown:
            raise ValueError(f"condconv: unknown fields {unknown}; known are form and experts")
        experts: Any = data.get("experts")
        return cls(experts, data.get("form", "difference"))


# The layer ------------------------------------------------------------------------------------------

Weights = Callable[[nn.Module, Tensor], AbstractContextManager[tuple[Tensor, Tensor]]]


@contextmanager
def own_weights(module: nn.Module, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Weight and bias of a layer for the input x, as they lie in it.

    Hosts that cast, patch or move weights on the fly bring a function of their own in its place; what it
    gives need not live longer than the `with` block.
    """
    layer: Any = module
    yield layer.weight, layer.bias


class CondConv2d(nn.Module):
    """A convolution with one kernel per sample: (B, C_in, H, W) -> (B, C_out, H', W').

    conv: expert 1, a convolution with a bias; it may be anybody's, and its stride and padding hold for all.
    experts, router: see the head of this file and `further_experts`.
    strength: scales what the other experts add; at 0 the layer is `conv` and nothing else.

    The kernels are mixed, then each sample gets an ordinary convolution (bench/condconv.py compares this
    with one grouped convolution and with a convolution per expert).
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        experts: nn.Conv2d,
        router: nn.Linear,
        form: str = "difference",
        strength: float = 1.0,
        weights: Weights = own_weights,
    ):
        super().__init__()
        self.conv, self.experts, self.router = conv, experts, router
        self.form, self.strength, self.weights = form, strength, weights

    def extra_repr(self) -> str:
        return f"form={self.form}, strength={self.strength}"

    def routes(self, x: Tensor) -> Tensor:
        """Routes (B, R) in float32, whatever the dtype of the input (B, C_in, H, W)."""
        pooled = x.mean((2, 3), dtype=torch.float32)
        with self.weights(self.router, pooled) as (weight, bias):
            # Not a matrix product, which autocast would do in half precision.
            return ((pooled[:, None] * weight).sum(-1, dtype=torch.float32) + bias).sigmoid()

    def forward(self, x: Tensor, routes: Tensor | None = None) -> Tensor:
        """routes: (B, R) to take in place of the router's, or (1, R): then all samples share one kernel, mixed once."""
        if self.strength == 0:
            plain: Tensor = self.conv(x)
            return plain
        routes = self.routes(x) if routes is None else routes
        kept = None  # (B, 1): how much of expert 1; None for all of it
        if self.form == "mixture":
            kept, routes = 1 + self.strength * (routes[:, :1] - 1), routes[:, 1:]
        routes = self.strength * routes
        # One after the other: a host with little memory may fetch both into one buffer.
        with self.weights(self.experts, x) as (weight, bias):
            kernels, biases = _mixed(weight, routes), _mixed(bias, routes)
        with self.weights(self.conv, x) as (weight, bias):
            kernels = _with_first(kernels, weight, kept)  # (B, C_out, C_in, h, w)
            biases = _with_first(biases, bias, kept)  # (B, C_out)
            # _conv_forward is what hosts and seamless-tiling nodes steer padding by.
            if len(kernels) == 1:
                shared: Tensor = self.conv._conv_forward(x, kernels[0], biases[0])
                return shared
            samples = zip(x.split(1), kernels, biases, strict=True)
            return torch.cat([self.conv._conv_forward(sample, kernel, bias) for sample, kernel, bias in samples])


def _mixed(stacked: Tensor, routes: Tensor) -> Tensor:
    """sum_k r_k W_k as rows (B, n) from stacked experts (K C_out, ...) and routes (B, K)."""
    return routes.to(stacked.dtype) @ stacked.reshape(routes.shape[1], -1)


def _with_first(mixed: Tensor, first: Tensor, kept: Tensor | None) -> Tensor:
    row = first.reshape(1, -1)
    return mixed.add_(row if kept is None else row * kept.to(row.dtype)).view(-1, *first.shape)


def further_experts(settings: CondConv, conv: Conv, operations: Any = nn, **kwargs: Any) -> tuple[nn.Conv2d, nn.Linear]:
    """Modules for the further experts of a convolution and for its router.

    operations: a namespace with Conv2d and Linear (torch.nn, a host's own); kwargs (dtype, device) go to both.
    """
    c_out, c_in, *kernel = settings.shapes(conv)["experts.weight"]
    routes, _ = settings.shapes(conv)["router.weight"]
    return operations.Conv2d(c_in, c_out, tuple(kernel), **kwargs), operations.Linear(c_in, routes, **kwargs)


# Starts ---------------------------------------------------------------------------------------------


def start(config: UNetConfig, settings: CondConv, how: str = "zero", seed: int = 0) -> StateDict:
    """Further experts and routers to train from, under their names in a pack file; float32.

    how: "zero" sets the further experts to 0, which in the form "difference" changes nothing at all;
    "random" draws each as an ordinary convolution begins (the papers' start).
    Routers begin as ordinary linear layers do: experts that start alike need routes that do not.
    """
    if how not in STARTS:
        raise ValueError(f"start must be one of {STARTS}, got {how!r}")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for conv in settings.convs(config).values():
        _, c_in, height, width = conv.shape
        for leaf, shape in settings.shapes(conv).items():
            is_expert = leaf.startswith("experts.")
            bound = 1 / math.sqrt(c_in * height * width if is_expert else c_in)  # of torch.nn's own layers
            drawn = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            tensors[conv.key(leaf)] = torch.zeros(shape) if is_expert and how == "zero" else drawn
    return tensors


def donors(config: UNetConfig, address: str) -> tuple[str, ...]:
    """Convolutions whose weights can become further experts of this one: those in the same place (conv1, conv2)
    of the other layers of its block, if they have its shape (CLME, A-SDM section 2.3).

    Raises ValueError, which says why, where there is none.
    """
    conv = convolution(config, address)
    peers = [
        c
        for c in convolutions(config).values()
        if c.address != address and c.diffusers == conv.diffusers and c.unit.block == conv.unit.block
    ]
    found = tuple(c.address for c in peers if c.shape == conv.shape)
    if not found:
        others = ", ".join(f"{c.address} ({_widths(c)})" for c in peers) or "none"
        raise ValueError(
            f"{address} ({_widths(conv)}) has nobody in {conv.unit.block} to share experts with; there are: {others}"
        )
    return found


def _widths(conv: Conv) -> str:
    return f"{conv.shape[1]} -> {conv.shape[0]}"


def sharing(config: UNetConfig, convs: Iterable[str], form: str = "difference") -> tuple[CondConv, dict[str, str]]:
    """Settings for those of `convs` that can gather experts, with as many as they have donors, and the others, each
    with the reason.

    Raises ValueError if none of them can.
    """
    counts, alone = {}, {}
    for address in convs:
        try:
            counts[address] = 1 + len(donors(config, address))
        except ValueError as e:
            convolution(config, address)  # an address that is none is an error, not a reason
            alone[address] = str(e)
    if not counts:
        raise ValueError("no convolution can share experts: " + "; ".join(alone.values()))
    return CondConv(counts, form), alone


def clme(
    teacher: Mapping[str, Tensor],
    student: Mapping[str, Tensor],
    config: UNetConfig,
    convs: Iterable[str],
    form: str = "difference",
) -> tuple[CondConv, StateDict, dict[str, str]]:
    """Further experts gathered from a teacher (Cross-Layer Multi-Expert, A-SDM section 2.3).

    teacher: an unpruned UNet; student: has the convolutions that become expert 1 (both addressed LDM names).
    Returns settings, tensors as in a pack file, and the convolutions that cannot share, each with the reason.
    The gathered experts start almost silent, r = 0.01, and expert 1 of a mixture at r = 0.99.
    Raises ValueError if none of `convs` can share, Mismatch for missing or misshapen weights.
    """
    settings, alone = sharing(config, convs, form)
    tensors = {}
    for address, conv in settings.convs(config).items():
        found = donors(config, address)
        for leaf in ("weight", "bias"):
            first = _take(student, conv, leaf, "student")
            experts = [_take(teacher, convolution(config, donor), leaf, "teacher") for donor in found]
            if form == "difference":
                experts = [expert - first for expert in experts]
            tensors[conv.key(f"experts.{leaf}")] = torch.cat(experts)
        routes, c_in = settings.shapes(conv)["router.weight"]
        tensors[conv.key("router.weight")] = torch.zeros(routes, c_in)
        tensors[conv.key("router.bias")] = torch.full((routes,), _SILENT)
        if form == "mixture":
            tensors[conv.key("router.bias")][0] = -_SILENT
    return settings, tensors, alone


def _take(sd: Mapping[str, Tensor], conv: Conv, leaf: str, what: str) -> Tensor:
    key = conv.key(leaf)
    shape = conv.shape if leaf == "weight" else conv.shape[:1]
    if key not in sd or tuple(sd[key].shape) != shape:
        came = f"has shape {list(sd[key].shape)}" if key in sd else "is missing"
        raise Mismatch(f"{what}: {key} ({conv.address}) {came}, wanted {list(shape)}")
    return sd[key].detach().float()


# Live networks --------------------------------------------------------------------------------------


def install(
    unet: nn.Module,
    layout: str,
    config: UNetConfig,
    settings: CondConv,
    tensors: Mapping[str, Tensor],
    operations: Any = nn,
    weights: Weights = own_weights,
) -> None:
    """Give convolutions of a live UNet their further experts, in place. Their own weights stay as they are.

    tensors: as in a pack file; may hold more. Raises Mismatch where they do not fit.
    """
    wanted = settings.keys(config)
    check({k: s for k, s in shapes_of(tensors).items() if k in wanted}, wanted, "experts")
    for conv in settings.convs(config).values():
        parent, _, name = conv.path(layout).rpartition(".")
        first: Any = unet.get_submodule(conv.path(layout))
        experts, router = further_experts(
            settings, conv, operations, device=first.weight.device, dtype=first.weight.dtype
        )
        layer = CondConv2d(first, experts, router, settings.form, weights=weights)
        unet.get_submodule(parent).add_module(name, layer)
        for leaf in settings.shapes(conv):
            layer.get_parameter(leaf).data.copy_(tensors[conv.key(leaf)])


def extract(unet: nn.Module, layout: str, config: UNetConfig, settings: CondConv) -> StateDict:
    """Further experts and routers of a live UNet under their names in a pack file."""
    return {
        conv.key(leaf): unet.get_submodule(conv.path(layout)).get_parameter(leaf).detach()
        for conv in settings.convs(config).values()
        for leaf in settings.shapes(conv)
    }
