"""GRI attention: global-regional interactive self-attention, in time and memory linear in the tokens of a map.

After A-SDM (arXiv 2406.00210), in the form defined here: queries are grouped in windows; each window attends, in
one softmax, to its own tokens and to pooled keys and values of all cells outside of it. Within a cell the tokens are
weighted by the attention that the mean query of the map (of each head) pays them: w = softmax(q k / sqrt(dim)), key and
value are the means under w, and the logit of the key gets the entropy of w. That is what makes the cell exact, to first
order, for queries near the mean one. For equal tokens the entropy is the logarithm of their number: the key stands for
that many. A window that covers the map, cells of one token, or a constant map give exactly full attention.
docs/gri.md has what else was tried.

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

# The bias of a pooled key comes as further channels of q and k: so many, because kernels want head sizes that 8 divides.
# The channels of q are a power of two, so that they are exact in every dtype.
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


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """torch's fused attention on (B, heads, N, dim)."""
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def gri_attention(q: Tensor, k: Tensor, v: Tensor, height: int, width: int, gri: GRI, gain: Tensor | None = None,
                  attend: Callable[..., Tensor] = sdpa) -> Tensor:
    """Self-attention of a map of height x width tokens, row by row.

    q, k, v: (B, N, heads, dim) with N = height * width, the result too.
    gain: (heads,), added to the logits of the pooled keys; trainable, None is 0.
    attend: fused attention (q, k, v, scale) on (B', heads, N', dim'), returning the shape of q. There is no mask: many
            kernels take none, and torch's on the CPU writes it out for every query.
    Raises ValueError where N is not height * width or q, k and v differ in shape.
    """
    if q.shape[1] != height * width or not q.shape == k.shape == v.shape:
        raise ValueError(f"q, k and v must be (B, {height} * {width}, heads, dim) alike, got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    scale = q.shape[-1] ** -0.5
    if gri.covers(height, width):
        return attend(*(t.transpose(1, 2) for t in (q, k, v)), scale).transpose(1, 2)
    q, k, v = (t.unflatten(1, (height, width)) for t in (q, k, v))
    keys, values, bias = (t.flatten(1, 2) for t in _pool(q, k, v, gri.pool))
    cells = torch.arange(keys.shape[1], device=q.device).view(-(-height // gri.pool), -1)
    bias = (bias if gain is None else bias + gain.float()) / (scale * _UNIT)
    keys = torch.cat([keys, torch.stack(_halves(bias, keys.dtype), -1), keys.new_zeros(*keys.shape[:-1], _FURTHER - 2)], -1)
    values = F.pad(values, (0, _FURTHER))
    rows = []
    for r in _spans(height, gri):
        row = []
        for c in _spans(width, gri):
            outside = _outside(cells, r, c, gri.pool)
            queries = _windows(q, r, c)
            queries[..., -_FURTHER:2 - _FURTHER] = _UNIT
            out = attend(*(t.flatten(0, 1).transpose(1, 2) for t in (
                queries, _windows(k, r, c, keys[:, outside]), _windows(v, r, c, values[:, outside]))), scale)
            row.append(_unfold(out[..., :-_FURTHER].transpose(1, 2), len(q), r, c))
        rows.append(torch.cat(row, 2) if len(row) > 1 else row[0])
    return (torch.cat(rows, 1) if len(rows) > 1 else rows[0]).flatten(1, 2)


def _windows(x: Tensor, r: _Span, c: _Span, cells: Tensor | None = None) -> Tensor:
    """Tokens of windows side by side, of a map (B, height, width, heads, dim), then their cells (B, windows, cells, heads,
    dim + _FURTHER), all in one tensor like that of the cells. Tokens have zeros for further channels."""
    tokens, (heads, dim) = r.size * c.size, x.shape[3:]
    out = x.new_zeros(len(x), r.count * c.count, tokens + (0 if cells is None else cells.shape[2]), heads, dim + _FURTHER)
    own = out[:, :, :tokens, :, :dim].unflatten(2, (r.size, c.size)).unflatten(1, (r.count, c.count))
    x = x[:, r.start:r.end, c.start:c.end].unflatten(2, (c.count, c.size)).unflatten(1, (r.count, r.size))
    own.copy_(x.transpose(2, 3))
    if cells is not None:
        out[:, :, tokens:] = cells
    return out


def _unfold(x: Tensor, batch: int, r: _Span, c: _Span) -> Tensor:
    """(B * windows, tokens, heads, dim) -> (B, height, width, heads, dim)"""
    x = x.unflatten(1, (r.size, c.size)).unflatten(0, (batch, r.count, c.count))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _outside(cells: Tensor, r: _Span, c: _Span, pool: int) -> Tensor:
    """For each window, the numbers of the cells outside of it; equal windows have equally many."""
    inside = []
    for top in range(r.start, r.end, r.size):
        for left in range(c.start, c.end, c.size):
            mask = torch.zeros_like(cells)
            own = mask[top // pool:-(-(top + r.size) // pool), left // pool:-(-(left + c.size) // pool)]
            own.fill_(1)
            inside.append(mask.flatten())
    # Sorted, not selected: a number that only the tensor knows makes a graphics card wait and cuts compiled graphs.
    return torch.stack(inside).argsort(dim=1, stable=True)[:, :cells.numel() - own.numel()]


def _pool(q: Tensor, k: Tensor, v: Tensor, pool: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of cells, (B, rows, columns, heads, dim), and the entropies of their weights, (B, rows, columns, heads) float32."""
    height, width, heads = q.shape[1:4]
    mean = q.mean((1, 2), dtype=torch.float32) * q.shape[-1] ** -0.5
    logits = torch.einsum("bhd,byxhd->bhyx", mean.to(k.dtype), k).float()
    # in ceil_mode, with no padding, a pool is over the tokens that are there
    logits = logits - _spread(F.max_pool2d(logits.detach(), pool, ceil_mode=True), pool, height, width)

    def sums(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, pool, ceil_mode=True, divisor_override=1)

    total = sums(logits.exp())
    weights = logits.exp() / _spread(total, pool, height, width)  # (B, heads, height, width)
    entropy = total.log() - sums(weights * logits)
    weights = weights.movedim(1, 3)[..., None].to(k.dtype)
    keys, values = (sums((x * weights).flatten(3).movedim(3, 1)).movedim(1, 3).unflatten(3, (heads, -1)) for x in (k, v))
    return keys, values, entropy.movedim(1, 3)


def _spread(x: Tensor, pool: int, height: int, width: int) -> Tensor:
    """Numbers of cells (..., rows, columns) to each of their tokens (..., height, width)."""
    return x.repeat_interleave(pool, -2)[..., :height, :].repeat_interleave(pool, -1)[..., :width]


def _halves(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two tensors of a dtype whose sum is x, more precisely than one alone could be."""
    high = x.to(dtype)
    return high, (x - high).to(dtype)
