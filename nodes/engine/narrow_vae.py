"""TAESD as narrow as it was trained: channels that are nought whatever comes in are left out of its convolutions.

The host has one width for all of TAESD, 64. A smaller decoder is written into it with noughts (train/emoji/codec.py),
which costs as much as if there were something there: at two steps of the UNet, most of a run. The weights stay as they
lie in the file, so that what saves a VAE writes what every loader reads.
"""

from __future__ import annotations

import copy
from typing import Any

import comfy.ops
import torch
from comfy.taesd import taesd
from torch import Tensor, nn

from .units import with_submodules


class _NarrowConv2d(comfy.ops.disable_weight_init.Conv2d):
    """A convolution from some of its channels to some; it holds the weights of all."""

    given: slice | Tensor
    made: slice | Tensor

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias[self.made]
        return super()._conv_forward(input, weight[self.made][:, self.given], bias)


def narrow(vae: nn.Module) -> None:
    """Have encoder and decoder of the host's TAESD leave out the channels that are nought. What they make stays the
    same, to rounding, and their state dict as it is. Networks of other classes are left alone.
    """
    for name, its_class in (("taesd_encoder", taesd.Encoder), ("taesd_decoder", taesd.Decoder)):
        network: Any = getattr(vae, name, None)
        if type(network) is its_class and all(_plain(layer) for layer in network):
            setattr(vae, name, _narrowed(network))


def _plain(layer: nn.Module) -> bool:
    """Whether a layer keeps nought at nought: normalisation does not."""
    if type(layer) is taesd.Block:
        return isinstance(layer.skip, nn.Identity) and layer.pool is None
    return type(layer) in (comfy.ops.disable_weight_init.Conv2d, taesd.Clamp, nn.ReLU, nn.Upsample)


def _narrowed(network: nn.Module) -> nn.Module:
    layers: dict[str, Any] = dict(network.named_children())
    convolutions = [i for i, layer in enumerate(layers.values()) if isinstance(layer, nn.Conv2d)]
    names = list(layers)
    modules: dict[str, nn.Module] = {}
    live = torch.ones(layers[names[convolutions[0]]].in_channels, dtype=torch.bool)
    for i, end in zip(convolutions, [*convolutions[1:], len(names)], strict=True):
        first, blocks = layers[names[i]], [n for n in names[i + 1 : end] if isinstance(layers[n], taesd.Block)]
        after = _made(first, live) if end < len(names) else torch.ones(first.out_channels, dtype=torch.bool)
        for name in blocks:
            after = after | _through(layers[name], after)[-1]
        modules[names[i]] = _part(first, live, after)
        for name in blocks:
            block, (inner, next_inner, _) = layers[name], _through(layers[name], after)
            modules[f"{name}.conv.0"] = _part(block.conv[0], after, inner)
            modules[f"{name}.conv.2"] = _part(block.conv[2], inner, next_inner)
            modules[f"{name}.conv.4"] = _part(block.conv[4], next_inner, after)
        live = after
    return with_submodules(network, modules)


def _through(block: Any, live: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which channels each convolution of a block makes of live ones."""
    inner = _made(block.conv[0], live)
    next_inner = _made(block.conv[2], inner)
    return inner, next_inner, _made(block.conv[4], next_inner)


def _made(convolution: Any, live: Tensor) -> Tensor:
    """Which channels of a convolution's output can be other than nought, given those of its input (C,); at least one,
    because no convolution makes none.
    """
    made = (convolution.weight[:, live] != 0).flatten(1).any(1)
    if convolution.bias is not None:
        made = made | (convolution.bias != 0)
    made[0] |= not made.any()
    return made


def _part(convolution: Any, given: Tensor, made: Tensor) -> nn.Module:
    if given.all() and made.all():
        return convolution
    twin = copy.copy(convolution)
    twin.__class__ = _NarrowConv2d
    twin.given, twin.made = _index(given), _index(made)
    return twin


def _index(chosen: Tensor) -> slice | Tensor:
    """Channels as a slice where they are the first ones: then weights are not copied."""
    count = int(chosen.sum())
    return slice(count) if bool(chosen[:count].all()) else chosen.nonzero().flatten()
