"""GRI attention: global-regional interactive self-attention, in time and memory linear in the tokens of a map.

After A-SDM (arXiv 2406.00210), in the form defined here: queries are grouped in windows; each window attends, in
one softmax, to its own tokens and to the cells of all other windows, each with one key, one value and a bias on its
logit.

The cells of a window begin as squares of tokens. Tokens then move, twice, to the cell of the window whose mean key is
nearest (k-means, for each head by itself), because a cell is as good as its keys are alike: for equal keys it is exact,
whatever their values are. Within a cell the tokens are weighted by the attention that the mean query of the map pays
them: w = softmax(q k / sqrt(dim)), key and value are the means under w, and the bias is the entropy of w. That makes
the cell exact, to first order, for queries near the mean one. For equal tokens the entropy is the logarithm of their
number: the key stands for that many. A window that covers the map, cells of one token, or a constant map give exactly
full attention. docs/gri.md has what else was tried.

Where cells do not divide the map the last ones begin smaller and count for less; nothing is padded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from . import addresses
from .addresses import Slot, UNetConfig, in_order, unit

CELLS = 16  # per side of the map, at most, in the automatic choice: the cost of a token stays the same at any size
WINDOW = 16  # tokens per side in the automatic choice
PAYS_FROM = 64 * 64  # tokens; with fewer, full attention is a small part of the network's time

STEPS = 2  # of k-means
_LEAST = -40.0  # logit of a token, relative to the highest: exp(-40) is nothing in float32
_NEVER = -1e4  # bias of an empty cell
_MOST = 2**26  # pairs of a token and a cell at once, for large windows of small cells

# The bias of a cell is a mask on the CPU, where one row for all queries costs nothing. Elsewhere the fastest kernels
# take no mask, and it comes as further channels of q and k: so many, because kernels want head sizes that 8 divides.
# The channels of q are a power of two, so that they are exact in every dtype.
_FURTHER = 8
_UNIT = 8.0


@dataclass(frozen=True)
class GRI:
    """Settings of GRI attention: windows of `window` x `window` tokens, cells that begin as squares of `pool` x `pool`.

    shift: the first window of each row and column is only so many tokens long. Raises ValueError for sizes below 1
    and for a window or a shift that does not consist of whole cells.
    """

    window: int
    pool: int
    shift: int = 0

    def __post_init__(self) -> None:
        if self.window < 1 or self.pool < 1 or not 0 <= self.shift < self.window:
            raise ValueError(
                f"GRI needs window and pool of at least 1 and a shift from 0 to below the window, got {self}"
            )
        if self.window % self.pool or self.shift % self.pool:
            raise ValueError(
                f"window and shift must be multiples of pool, so that no cell lies across the border of a window; got "
                f"window {self.window}, shift {self.shift}, pool {self.pool}"
            )

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
class LogGains:
    """The self-attentions that a pack has trained log gains for: of these transformers, all blocks.

    A log gain is one number per head, added to the logits of the pooled keys: it multiplies their weight by its
    exponential, and 0 changes nothing. In a pack file it lies at
    `<transformer>.transformer_blocks.<i>.attn1.log_gain`, (heads,). Raises ValueError for anything but a list of
    addresses.
    """

    units: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.units or not all(isinstance(a, str) for a in self.units):
            raise ValueError(f"gri: log_gains must name at least one transformer, got {self.units!r}")

    def keys(self, config: UNetConfig) -> dict[str, Slot]:
        """Names and shapes of the log gains in a pack file. Raises ValueError for units this UNet has no self-
        attention in.
        """
        slots = {}
        for u in (unit(config, address) for address in in_order(config, self.units)):
            if u.kind != "transformer" or u.address not in self.units:
                raise ValueError(f"gri: log gains belong to whole transformers, and {u.address} is none")
            for i in range(u.depth):
                name = f"transformer_blocks.{i}.attn1.log_gain"
                tensor = addresses.TensorSpec(name, name, (config.heads(u.channels_out),), "attn1", i)
                slots[u.key(tensor)] = Slot(u, tensor)
        return slots

    def to_dict(self) -> dict[str, Any]:
        return {"log_gains": list(self.units)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LogGains:
        """Inverse of `to_dict`, from JSON too. Raises ValueError for anything else."""
        if not isinstance(data, Mapping) or set(data) != {"log_gains"} or not isinstance(data["log_gains"], list):
            raise ValueError(f"gri must be a JSON object with a list of transformers, log_gains, got {data!r}")
        return cls(tuple(data["log_gains"]))


@dataclass(frozen=True)
class _Span:
    """Windows of equal size side by side, along one axis."""

    start: int
    size: int
    count: int

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.size * self.count)


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


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """torch's fused attention on (B, heads, N, dim)."""
    return F.scaled_dot_product_attention(q, k, v, bias, scale=scale)


def gri_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height: int,
    width: int,
    gri: GRI,
    log_gain: Tensor | None = None,
    attend: Callable[..., Tensor] = sdpa,
    steps: int = STEPS,
) -> Tensor:
    """Self-attention of a map of height x width tokens, row by row.

    q, k, v: (B, N, heads, dim) with N = height * width, the result too.
    log_gain: (heads,), added to the logits of the cells; trainable, None is 0.
    attend: fused attention (q, k, v, scale, bias) on (B', heads, N', dim'), returning the shape of q. bias is None or
            (B', heads, 1, N'') in float32, for all queries alike; it is only given on the CPU.
    steps: of k-means, in which tokens of a window change their cells; 0 leaves these squares.
    Raises ValueError where N is not height * width or q, k and v differ in shape.
    """
    if q.shape[1] != height * width or not q.shape == k.shape == v.shape:
        raise ValueError(
            f"q, k and v must be (B, {height} * {width}, heads, dim) alike, got {tuple(q.shape)}, {tuple(k.shape)}, "
            f"{tuple(v.shape)}"
        )
    scale = q.shape[-1] ** -0.5
    if gri.covers(height, width):
        heads_first = (rearrange(t, "b n heads dim -> b heads n dim") for t in (q, k, v))
        return rearrange(attend(*heads_first, scale, None), "b heads n dim -> b n heads dim")
    mean = q.mean(1, dtype=torch.promote_types(q.dtype, torch.float32)) * scale
    maps = [rearrange(t, "b (height width) heads dim -> b height width heads dim", height=height) for t in (q, k, v)]
    out = torch.empty_like(maps[0])
    groups = []
    for rows, columns in product(_spans(height, gri), _spans(width, gri)):
        queries, keys, values = (_windows(t, rows, columns) for t in maps)
        cells = _cells(mean, keys, values, rows.size, columns.size, gri.pool, steps)
        groups.append(_Group(rows, columns, queries, keys, values, cells))
    ring = _ring([group.cells for group in groups], log_gain)
    first = 0  # cell of the first window of the group
    for group in groups:
        others = _others(ring, first, group.cells)
        found = _biased(
            group.queries,
            torch.cat([group.keys, others.keys], 3),
            torch.cat([group.values, others.values], 3),
            scale,
            F.pad(rearrange(others.bias, "b windows heads cells 1 -> b windows heads cells"), (group.tokens, 0)),
            attend,
        )
        out[:, group.rows.slice, group.columns.slice] = _unfold(found, group.rows, group.columns)
        first += group.cells.windows * group.cells.each
    return rearrange(out, "b height width heads dim -> b (height width) heads dim")


class _Cells(NamedTuple):
    """Cells of windows, each instead of many tokens.

    keys, values: (B, windows, heads, cells, dim). bias: of their logits, (B, windows, heads, cells, 1).
    """

    keys: Tensor
    values: Tensor
    bias: Tensor

    @property
    def windows(self) -> int:
        return self.keys.shape[1]

    @property
    def each(self) -> int:
        """Cells of a window."""
        return self.keys.shape[3]


class _Group(NamedTuple):
    """Windows of equal size, side by side on the map. queries, keys, values: (B, windows, heads, tokens, dim)"""

    rows: _Span
    columns: _Span
    queries: Tensor
    keys: Tensor
    values: Tensor
    cells: _Cells

    @property
    def tokens(self) -> int:
        """Tokens of a window."""
        return self.rows.size * self.columns.size


def _ring(groups: Sequence[_Cells], log_gain: Tensor | None) -> _Cells:
    """The cells of all windows in one row, (B, heads, 2 * cells, ...), which runs twice: so the cells outside of a
    window are one stretch of it, from the window's end round to its start, and taking them copies nothing.
    """
    row = (
        torch.cat(2 * [rearrange(x, "b windows heads cells dim -> b heads (windows cells) dim") for x in kind], 2)
        for kind in zip(*groups, strict=True)
    )
    ring = _Cells(*row)
    return ring if log_gain is None else ring._replace(bias=ring.bias + log_gain.to(ring.bias.dtype)[:, None, None])


def _others(ring: _Cells, first: int, own: _Cells) -> _Cells:
    """For each window of a group the cells of all other windows of the map, (B, windows, heads, cells, ...).

    first: place in the ring of the first cell of the group. own: its cells.
    """
    around = ring.keys.shape[2] // 2

    def stretches(x: Tensor) -> Tensor:
        every = x[:, :, first + own.each :].unfold(2, around - own.each, own.each)  # one begins where each window ends
        return rearrange(every[:, :, : own.windows], "b heads windows dim cells -> b windows heads cells dim")

    return _Cells(*map(stretches, ring))


_ON_THE_MAP = "b (rows row) (columns column) heads dim"
_IN_WINDOWS = "b (rows columns) heads (row column) dim"


def _windows(x: Tensor, rows: _Span, columns: _Span) -> Tensor:
    """Windows side by side of a map: (B, height, width, heads, dim) -> (B, windows, heads, tokens, dim)"""
    return rearrange(
        x[:, rows.slice, columns.slice], f"{_ON_THE_MAP} -> {_IN_WINDOWS}", row=rows.size, column=columns.size
    )


def _unfold(x: Tensor, rows: _Span, columns: _Span) -> Tensor:
    """(B, windows, heads, tokens, dim) -> (B, height, width, heads, dim)"""
    return rearrange(x, f"{_IN_WINDOWS} -> {_ON_THE_MAP}", rows=rows.count, row=rows.size, column=columns.size)


def _cells(mean: Tensor, k: Tensor, v: Tensor, height: int, width: int, pool: int, steps: int) -> _Cells:
    """The cells of windows of height x width tokens, their biases in the dtype of the mean query.

    mean: (B, heads, dim), the mean query, scaled. k, v: (B, windows, heads, tokens, dim).
    """
    if pool == 1:
        return _Cells(k, v, mean.new_zeros(*k.shape[:-1], 1))
    rows, columns = (
        torch.eye(-(-size // pool), device=k.device, dtype=mean.dtype).repeat_interleave(pool, 1)[:, :size]
        for size in (height, width)
    )
    squares = torch.kron(rows, columns)  # (cells, tokens)
    at_once = max(1, _MOST // (k.shape[2] * squares.numel()))
    windows = k.shape[1]
    each = (
        repeat(mean, "b heads dim -> (b windows) heads dim", windows=windows),
        *(rearrange(t, "b windows heads tokens dim -> (b windows) heads tokens dim") for t in (k, v)),
    )
    found = [_gathered(squares, steps, *some) for some in zip(*(t.split(at_once) for t in each), strict=True)]
    whole = (torch.cat(kind) for kind in zip(*found, strict=True))
    return _Cells(*(rearrange(t, "(b windows) ... -> b windows ...", windows=windows) for t in whole))


def _gathered(members: Tensor, steps: int, mean: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cells of windows (B, heads, tokens, dim) that begin with the members (cells, tokens), 0 or 1."""
    dtype, mean = k.dtype, mean[..., None]
    k, v = k.to(mean.dtype), v.to(mean.dtype)
    with torch.no_grad():
        for _ in range(steps):
            count = members.sum(-1, keepdim=True)
            centres = members @ k / count.clamp(min=1)
            nearness = centres @ k.transpose(-1, -2) - torch.where(
                count > 0, centres.square().sum(-1, keepdim=True) / 2, math.inf
            )
            # Not argmax, which is slow. A token as near to several cells is shared among them.
            members = (nearness == nearness.amax(-2, keepdim=True)).to(k.dtype)
        members = members / members.sum(-2, keepdim=True)
    logits = k @ mean
    logits = (logits - logits.detach().amax(-2, keepdim=True)).clamp(min=_LEAST)
    sums = members * logits.exp().transpose(-1, -2) @ torch.cat([k, v, logits, torch.ones_like(logits)], -1)
    total = sums[..., -1:].clamp(min=math.exp(2 * _LEAST))
    keys, values, inner, one = (sums / total).split([k.shape[-1], v.shape[-1], 1, 1], -1)
    return keys.to(dtype), values.to(dtype), torch.where(one > 0, total.log() - inner, _NEVER)


def _biased(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor, attend: Callable[..., Tensor]) -> Tensor:
    """Attention of (B, windows, heads, tokens, dim) with a bias (B, windows, heads, keys) for each key."""
    windows, dim = q.shape[1], q.shape[-1]
    q, k, v, bias = (rearrange(t, "b windows ... -> (b windows) ...") for t in (q, k, v, bias))
    if q.device.type == "cpu" and not bias.requires_grad:
        out = attend(q, k, v, scale, bias[:, :, None])
    else:
        # With the scale that attentions take by themselves for so many channels: some (Sage) know no other.
        own = (dim + _FURTHER) ** -0.5
        further = F.pad(torch.stack(_halves(bias / (own * _UNIT), k.dtype), -1), (0, _FURTHER - 2))
        units = q.new_full((*q.shape[:-1], 2), _UNIT)  # filled where it lies: a list of numbers would be copied there
        queries = torch.cat([q * (scale / own), F.pad(units, (0, _FURTHER - 2))], -1)
        out = attend(queries, torch.cat([k, further], -1), F.pad(v, (0, _FURTHER)), own, None)[..., :dim]
    return rearrange(out, "(b windows) ... -> b windows ...", windows=windows)


def _halves(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two tensors of a dtype whose sum is x, more precisely than one alone could be."""
    high = x.to(dtype)
    return high, (x - high).to(dtype)
