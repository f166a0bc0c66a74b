"""Parameters, MACs, time and picture quality.

MACs are multiplications with an addition each, as thop and the papers count them: convolutions and
linear layers; the two matrix products of attention (QK^T and AV), which thop leaves out, are counted
apart. Norms, activations and additions are not counted. Batch 1.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .addresses import Unit, walk
from .architecture import Architecture

# Parts of the work, as the tables of the literature split it.
PARTS = ("resnet", "attn1", "attn2", "ff", "proj", "sampler", "stem")


@dataclass(frozen=True)
class UnitCost:
    """What one kept unit costs.

    macs: of convolutions and linear layers, by part. attention: of the attention products, by part.
    """

    address: str
    params: int
    macs: Mapping[str, int]
    attention: Mapping[str, int]

    @property
    def linear(self) -> int:
        return sum(self.macs.values())

    @property
    def products(self) -> int:
        return sum(self.attention.values())

    @property
    def total(self) -> int:
        return self.linear + self.products

    def part(self, name: str) -> int:
        return self.macs.get(name, 0) + self.attention.get(name, 0)


def costs(architecture: Architecture, height: int = 64, width: int = 64, tokens: int = 77) -> dict[str, UnitCost]:
    """Cost of every kept unit for a latent of height x width (a 512 px picture: 64) and a prompt of `tokens`."""
    shapes = sizes(architecture, height, width)
    return {u.address: _cost(u, architecture, shapes[u.address], tokens) for u in architecture.kept}


def total(unit_costs: Mapping[str, UnitCost]) -> UnitCost:
    """The sum of unit costs."""
    macs: Counter[str] = Counter()
    attention: Counter[str] = Counter()
    for cost in unit_costs.values():
        macs.update(cost.macs)
        attention.update(cost.attention)
    return UnitCost("", sum(c.params for c in unit_costs.values()), dict(macs), dict(attention))


def output_size(u: Unit, cut: bool, size: Sequence[int], wanted: Sequence[int] | None = None) -> tuple[int, int]:
    """Height and width of what a unit makes of an input of `size` (height, width).

    cut: nobody plays it, so it passes its input on, samplers too. wanted: the size of the skip an upsampler is to meet,
    which may be odd; None for twice its input.
    """
    if cut or u.kind not in ("downsampler", "upsampler"):
        return size[0], size[1]
    if u.kind == "downsampler":
        return (size[0] + 1) // 2, (size[1] + 1) // 2
    return (2 * size[0], 2 * size[1]) if wanted is None else (wanted[0], wanted[1])


def sizes(architecture: Architecture, height: int, width: int) -> dict[str, tuple[int, int]]:
    """Height and width of each kept unit's output. A cut sampler leaves the size as it is."""
    size = (height, width)
    skips: list[tuple[int, int]] = []
    sizes = {}
    units = [u for u in walk(architecture.config) if u.kind not in ("time_embed", "label_embed")]
    for i, u in enumerate(units):
        kept = u.address not in architecture.cut
        if u.kind == "resnet" and u.side == "up":
            skips.pop()
        size = output_size(u, not kept, size, skips[-1] if u.kind == "upsampler" else None)
        if kept:
            sizes[u.address] = size
        ends_layer = i + 1 == len(units) or units[i + 1].layer != u.layer
        if u.kind == "conv_in" or u.side == "down" and ends_layer:
            skips.append(size)
    return sizes | {u.address: (1, 1) for u in architecture.kept if u.address not in sizes}


def _cost(u: Unit, architecture: Architecture, size: tuple[int, int], tokens: int) -> UnitCost:
    n = math.prod(size)
    macs: Counter[str] = Counter()
    attention: Counter[str] = Counter()
    params = 0
    for t in u.tensors:
        if u.owner(t) in architecture.cut:
            continue
        params += t.numel
        if len(t.shape) < 2:
            continue
        # The time embedding is one vector, keys and values of cross-attention come from the prompt,
        # everything else acts on every position.
        positions = (
            1
            if t.part == "time"
            else tokens
            if t.part == "attn2" and t.ldm.endswith(("to_k.weight", "to_v.weight"))
            else n
        )
        macs[_part_of(u, t.part)] += t.numel * positions
    for _ in architecture.kept_blocks(u):
        attention["attn1"] += 2 * n * n * u.channels_out
        attention["attn2"] += 2 * n * tokens * u.channels_out
    return UnitCost(u.address, params, dict(macs), dict(attention))


def _part_of(u: Unit, part: str) -> str:
    if u.kind in ("resnet", "transformer"):
        return "resnet" if u.kind == "resnet" else part
    return "sampler" if u.kind in ("downsampler", "upsampler") else "stem"


# Time -----------------------------------------------------------------------------------------------


def time_alternating(
    callables: Mapping[str, Callable[[], object]],
    rounds: int = 5,
    warmup: int = 1,
    sync: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of several things measured in turn (A, B, C, A, B, C, ...), so that noise hits all alike.

    sync: waits for the device (torch.cuda.synchronize); needed wherever work is queued.
    clock: time.process_time counts the CPU seconds of this process instead, which on a machine with other
           work to do tells more, as long as one thread does everything.
    """
    times: dict[str, list[float]] = {name: [] for name in callables}
    for i in range(warmup + rounds):
        for name, call in callables.items():
            if sync:
                sync()
            start = clock()
            call()
            if sync:
                sync()
            if i >= warmup:
                times[name].append(clock() - start)
    return times


def ratio(times: Mapping[str, list[float]], name: str, reference: str) -> float:
    """Median over the rounds of the time of one thing relative to another's in the same round."""
    return statistics.median(a / b for a, b in zip(times[name], times[reference], strict=True))


# Pictures -------------------------------------------------------------------------------------------


SSIM_WINDOW = 11  # pixels


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pictures (N, C, H, W) in 0..1, one number each; inf for equal ones."""
    _same_shape(a, b)
    return -10 * torch.log10((a.double() - b.double()).square().flatten(1).mean(1))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of pictures (N, C, H, W) in 0..1, one number each.

    Wang et al. 2004: Gaussian window of 11 x 11 with sigma 1.5, K1 = 0.01, K2 = 0.03, per channel, mean
    over the places where the whole window fits. Raises ValueError for pictures smaller than the window.
    """
    _same_shape(a, b)
    if min(a.shape[2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs pictures of at least 11 x 11 pixels, got {a.shape[3]} x {a.shape[2]}")
    a, b = a.double(), b.double()
    line = torch.exp(-((torch.arange(11, device=a.device, dtype=a.dtype) - 5) ** 2) / (2 * 1.5**2))
    line = line / line.sum()
    channels = a.shape[1]

    def blur(x: Tensor) -> Tensor:
        x = F.conv2d(x, line.view(1, 1, 11, 1).expand(channels, 1, 11, 1), groups=channels)
        return F.conv2d(x, line.view(1, 1, 1, 11).expand(channels, 1, 1, 11), groups=channels)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    quality = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
        (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    )
    return quality.flatten(1).mean(1)


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.dim() != 4:
        raise ValueError(
            f"wanted two batches of pictures (N, C, H, W) of one shape, got {list(a.shape)} and {list(b.shape)}"
        )
