"""GRI attention: global-regional interactive self-attention, in time and memory linear in the tokens of a map.

After A-SDM (arXiv 2406.00210), in the form defined here: queries are grouped in windows; each window attends, in
one softmax, to its own tokens and to average-pooled keys and values of all cells outside of it. A pooled key stands
for as many tokens as its cell has, so its logit gets the logarithm of that number. A window that covers the map,
cells of one token, or a constant map give exactly full attention.

Windows consist of whole cells, so that a cell lies inside a window or outside, never across its border. Where
cells do not divide the map the last ones are smaller and count for less; nothing is padded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import addresses
from .addresses import Slot, UNetConfig, in_order, unit

CELLS = 16  # per side of the map, at most, in the automatic choice: the cost of a token stays the same at any size
WINDOW = 16  # tokens per side in the automatic choice
PAYS_FROM = 64 * 64  # tokens; with fewer, full attention is a small part of the network's time

# Kernels that take no mask get the bias as further channels of q and k: so many, because they want head sizes that 8
# divides. The channels of q are a power of two, so that they are exact in every dtype.
_FURTHER = 8
_UNIT = 8.0


@dataclass(frozen=True)
class GRI:
    """Settings of GRI attention: windows of `window` x `window` tokens, cells of `pool` x `pool`.

    shift: the first window of each row and column is only so many tokens long. Raises ValueError for sizes below 1
    and for a window or a shift that does not consist of whole cells.
    """

    window: int
    pool: int
    shift: int = 0

    def __post_init__(self):
        if self.window < 1 or self.pool < 1 or not 0 <= self.shift < self.window:
            raise ValueError(f"GRI needs window and pool of at least 1 and a shift from 0 to below the window, got {self}")
        if self.window % self.pool or self.shift % self.pool:
            raise ValueError(f"window and shift must be multiples of pool, so that no cell lies across the border of a window; got "
                             f"window {self.window}, shift {self.shift}, pool {self.pool}")

    @classmethod
    def choose(cls, height: int, width: int, window: int = 0, pool: int = 0, shifted: bool = False) -> GRI:
        """Settings for a map of height x width tokens; what is 0 is chosen.

        The pool is the smallest power of two with at most CELLS x CELLS cells, and at least 4. A window that the
        chosen pool does not divide grows to the next multiple. shifted: by half a window.
        """
        if not pool:
            pool = max(4, 2 ** math.ceil(math.log2(math.sqrt(height * width) / CELLS)))
            window = -(-(window or WINDOW) // pool) * pool
        window = window or -(-WINDOW // pool) * pool
        return cls(window, pool, window // 2 // pool * pool if shifted else 0)

    def covers(self, height: int, width: int) -> bool:
        """Whether a single window holds the whole map, so that this is full attention."""
        return all(len(_spans(size, self)) == 1 and _spans(size, self)[0].count == 1 for size in (height, width))


@dataclass(frozen=True)
class Gains:
    """The self-attentions that a pack has trained gains for: of these transformers, all blocks.

    A gain is one number per head, added to the logits of the pooled keys; 0 changes nothing. In a pack file it lies at
    `<transformer>.transformer_blocks.<i>.attn1.gain`, (heads,). Raises ValueError for anything but a list of addresses.
    """

    units: tuple[str, ...]

    def __post_init__(self):
        if not self.units or not all(isinstance(a, str) for a in self.units):
            raise ValueError(f"gri: gains must name at least one transformer, got {self.units!r}")

    def keys(self, config: UNetConfig) -> dict[str, Slot]:
        """Names and shapes of the gains in a pack file. Raises ValueError for units this UNet has no self-attention in."""
        slots = {}
        for u in (unit(config, address) for address in in_order(config, self.units)):
            if u.kind != "transformer" or u.address not in self.units:
                raise ValueError(f"gri: gains belong to whole transformers, and {u.address} is none")
            for i in range(u.depth):
                name = f"transformer_blocks.{i}.attn1.gain"
                tensor = addresses.Tensor(name, name, (config.heads(u.channels_out),), "attn1", i)
                slots[u.key(tensor)] = Slot(u, tensor)
        return slots

    def to_dict(self) -> dict:
        return {"gains": list(self.units)}

    @classmethod
    def from_dict(cls, data: Mapping) -> Gains:
        """Inverse of `to_dict`, from JSON too. Raises ValueError for anything else."""
        if not isinstance(data, Mapping) or set(data) != {"gains"} or not isinstance(data["gains"], list):
            raise ValueError(f"gri must be a JSON object with a list of transformers, gains, got {data!r}")
        return cls(tuple(data["gains"]))


@dataclass(frozen=True)
class _Span:
    """Windows of equal size side by side, along one axis."""

    start: int
    size: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.size * self.count


def _spans(length: int, gri: GRI) -> list[_Span]:
    """All windows along an axis. A rest of less than half a window joins the window before it: alone it would be
    a window with hardly any neighbours."""
    spans = [_Span(0, gri.shift, 1)] if 0 < gri.shift < length else []
    start = gri.shift if spans else 0
    count, rest = divmod(length - start, gri.window)
    joins = count and 2 * rest < gri.window and rest
    if count - bool(joins):
        spans.append(_Span(start, gri.window, count - bool(joins)))
    if rest:
        size = rest + gri.window if joins else rest
        spans.append(_Span(length - size, size, 1))
    return spans


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """torch's fused attention on (B, heads, N, dim)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def gri_attention(q: Tensor, k: Tensor, v: Tensor, height: int, width: int, gri: GRI, gain: Tensor | None = None,
                  attend: Callable[..., Tensor] = sdpa, masks: bool | None = None) -> Tensor:
    """Self-attention of a map of height x width tokens, row by row.

    q, k, v: (B, N, heads, dim) with N = height * width, the result too.
    gain: (heads,), added to the logits of the pooled keys; trainable, None is 0.
    attend: fused attention (q, k, v, scale, mask) on (B', heads, N', dim'), returning the same shape; the mask is None
            or added to the logits, (B', heads or 1, 1, keys).
    masks: whether the counts come in a mask. Without, they come as channels of q and k, for kernels that are fast only
           without a mask. None: a mask on the CPU, whose kernels are faster with one than with more channels.
    Raises ValueError where N is not height * width or q, k and v differ in shape.
    """
    if q.shape[1] != height * width or not q.shape == k.shape == v.shape:
        raise ValueError(f"q, k and v must be (B, {height} * {width}, heads, dim) alike, got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if gri.covers(height, width):
        return attend(*(t.transpose(1, 2) for t in (q, k, v)), q.shape[-1] ** -0.5).transpose(1, 2)
    masks = q.device.type == "cpu" if masks is None else masks
    q, k, v = (t.unflatten(1, (height, width)) for t in (q, k, v))
    bias = _counts(height, width, gri.pool, q.device).log()[..., None] + (0 if gain is None else gain.float())
    cells = torch.arange(bias[..., 0].numel(), device=q.device).view(bias.shape[:2])
    pooled = _pool(k, gri.pool).flatten(1, 2), _pool(v, gri.pool).flatten(1, 2), bias.flatten(0, 1)
    rows = []
    for r in _spans(height, gri):
        row = [_windows(q, k, v, pooled, _outside(cells, r, c, gri.pool), r, c, attend, masks) for c in _spans(width, gri)]
        rows.append(torch.cat(row, 2) if len(row) > 1 else row[0])
    return (torch.cat(rows, 1) if len(rows) > 1 else rows[0]).flatten(1, 2)


def _windows(q, k, v, pooled, outside: Tensor, r: _Span, c: _Span, attend, masks: bool) -> Tensor:
    """Output of equal windows side by side, (B, height, width, heads, dim). outside: (windows, cells)."""
    batch, dim, scale = q.shape[0], q.shape[-1], q.shape[-1] ** -0.5
    q, k, v = (_fold(t[:, r.start:r.end, c.start:c.end], r, c) for t in (q, k, v))  # (B, windows, tokens, heads, dim)
    k, v = (torch.cat([own, cells[:, outside]], 2) for own, cells in zip((k, v), pooled[:2], strict=True))
    bias = F.pad(pooled[2][outside], (0, 0, q.shape[2], 0))  # (windows, keys, heads or 1); own tokens have none
    if masks:
        mask = bias.to(q.dtype).transpose(1, 2)[:, :, None].repeat(batch, 1, 1, 1)
    else:
        mask = None
        q, k, v = _further(q, _UNIT, _UNIT), _further(k, *_halves(bias / (scale * _UNIT), k.dtype)), F.pad(v, (0, _FURTHER))
    out = attend(*(t.flatten(0, 1).transpose(1, 2) for t in (q, k, v)), scale, mask)  # (B * windows, heads, tokens, dim)
    out = out[..., :dim].transpose(1, 2).reshape(batch, r.count, c.count, r.size, c.size, *q.shape[3:4], dim)
    return out.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _fold(x: Tensor, r: _Span, c: _Span) -> Tensor:
    x = x.unflatten(2, (c.count, c.size)).unflatten(1, (r.count, r.size))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _outside(cells: Tensor, r: _Span, c: _Span, pool: int) -> Tensor:
    """For each window, the numbers of the cells outside of it; equal windows have equally many."""
    outside = []
    for top in range(r.start, r.end, r.size):
        for left in range(c.start, c.end, c.size):
            out = torch.ones_like(cells, dtype=torch.bool)
            out[top // pool:-(-(top + r.size) // pool), left // pool:-(-(left + c.size) // pool)] = False
            outside.append(cells[out])
    return torch.stack(outside)


def _pool(x: Tensor, pool: int) -> Tensor:
    """Means of cells: (B, height, width, heads, dim) -> (B, rows, columns, heads, dim)."""
    # in ceil_mode, with no padding, the mean is over the tokens that are there
    means = F.avg_pool2d(x.flatten(3).movedim(3, 1), pool, ceil_mode=True, count_include_pad=False)
    return means.movedim(1, 3).unflatten(3, x.shape[3:])


def _counts(height: int, width: int, pool: int, device) -> Tensor:
    """Tokens in each cell, (rows, columns), float32."""
    rows, columns = (torch.tensor([min(pool, size - i) for i in range(0, size, pool)], device=device, dtype=torch.float32)
                     for size in (height, width))
    return rows[:, None] * columns


def _halves(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two tensors of a dtype whose sum is x, more precisely than one alone could be."""
    high = x.to(dtype)
    return high, (x - high).to(dtype)


def _further(x: Tensor, *channels: Tensor | float) -> Tensor:
    """x with further channels, filled up with zeros."""
    further = x.new_zeros(*x.shape[:-1], _FURTHER)
    for i, channel in enumerate(channels):
        further[..., i] = channel
    return torch.cat([x, further], -1)
