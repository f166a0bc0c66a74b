"""Weights that are not the numbers themselves: blocks of GGUF, scaled fp8, whatever layers compute with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import comfy.utils
import torch
from torch import Tensor, nn

from ...asdm_core.addresses import Slot

AT_ONCE = 2**26  # numbers in a batch of probes: 256 MB in float32
_FULL = "comfy_force_cast_weights"  # the host's own layers then compute in full precision


def is_plain(tensor: object, shape: tuple[int, ...]) -> bool:
    """Whether a weight is an ordinary tensor of numbers in this shape."""
    plain = type(tensor) in (torch.Tensor, nn.Parameter)
    return plain and tensor.is_floating_point() and tuple(tensor.shape) == shape  # type: ignore[attr-defined]


def held(network: nn.Module, key: str) -> Tensor | None:
    """The weight under this name of a state dict, as its layer holds it; None where there is none."""
    try:
        return comfy.utils.get_attr(network, key)
    except AttributeError:
        return None


@torch.no_grad()
def played(network: nn.Module, key: str, slots: Mapping[str, Slot], device: torch.device) -> Tensor:
    """What a loaded layer computes with under this name, LoRAs included, in float32 on the CPU.

    Found by playing the layer: its output for an input of zeros is its bias, that for an input with a single one a
    column of its weight. So nothing need be known of how it keeps them. slots: of the whole network. Raises ValueError
    for a layer of which no weight of the right shape comes out.
    """
    path, _, leaf = key.rpartition(".")
    layer, shape, of_weight = comfy.utils.get_attr(network, path), slots[key].shape, slots[f"{path}.weight"].shape
    if len(of_weight) == 1:  # a norm's, which nobody packs
        return getattr(layer, leaf).detach().as_subclass(torch.Tensor).float().cpu()
    try:
        with _in_full(layer):
            if leaf == "bias":
                found = _bias(layer, of_weight, device)
            elif len(of_weight) == 2:
                found = _linear(layer, of_weight, device)
            else:
                found = _conv(layer, of_weight, 2 if slots[key].unit.kind == "downsampler" else 1, device)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ValueError(f"{key}: its layer ({type(layer).__name__}) cannot be played alone: {error}") from error
    if tuple(found.shape) != shape:
        raise ValueError(f"{key}: its layer ({type(layer).__name__}) makes {list(found.shape)}, not {list(shape)}")
    return found.float().cpu()


def _bias(layer: nn.Module, of_weight: tuple[int, ...], device: torch.device) -> Tensor:
    if len(of_weight) == 2:
        return layer(torch.zeros(1, of_weight[1], device=device))[0]
    return layer(torch.zeros(1, *of_weight[1:], device=device))[0, :, 0, 0]


def _probes(count: int, each: int) -> Iterator[range]:
    """Ranges that cover so many inputs, in batches of probes with so many numbers each."""
    at_once = max(1, AT_ONCE // each)
    yield from (range(i, min(count, i + at_once)) for i in range(0, count, at_once))


def _linear(layer: nn.Module, shape: tuple[int, ...], device: torch.device) -> Tensor:
    n_out, n_in = shape
    nothing = layer(torch.zeros(1, n_in, device=device))
    columns = []
    for chosen in _probes(n_in, n_in + n_out):
        probe = torch.zeros(len(chosen), n_in, device=device)
        probe[range(len(chosen)), chosen] = 1
        columns.append((layer(probe) - nothing).float())
    return torch.cat(columns).T.contiguous()


def _conv(layer: nn.Module, shape: tuple[int, ...], stride: int, device: torch.device) -> Tensor:
    """By a single one at each place of an input: with stride s and padding p, output y sees place r by row
    r + p - s * y of the kernel.
    """
    n_out, n_in, side, _ = shape
    padding = side // 2
    places = range(side - 1 - padding, side - 1 - padding + stride)
    size = max((places[-1] + padding) // stride * stride + side - 2 * padding, places[-1] + 1)
    nothing = layer(torch.zeros(1, n_in, size, size, device=device))
    found = torch.zeros(shape)
    for chosen in _probes(n_in, (n_in + n_out) * size**2):
        for row, column in itertools.product(places, places):
            probe = torch.zeros(len(chosen), n_in, size, size, device=device)
            probe[range(len(chosen)), chosen, row, column] = 1
            out = (layer(probe) - nothing).float()
            kernel = itertools.product(
                range((row + padding) % stride, side, stride), range((column + padding) % stride, side, stride)
            )
            for ky, kx in kernel:
                y, x = (row + padding - ky) // stride, (column + padding - kx) // stride
                found[:, chosen.start : chosen.stop, ky, kx] = out[:, :, y, x].T.cpu()
    return found


@contextmanager
def _in_full(layer: nn.Module):
    """The host's quantised layers would round the probes, too."""
    before = vars(layer).get(_FULL)
    setattr(layer, _FULL, True)
    try:
        yield
    finally:
        if before is None:
            delattr(layer, _FULL)
        else:
            setattr(layer, _FULL, before)
