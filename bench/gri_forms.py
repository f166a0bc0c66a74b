"""Forms of GRI attention that were tried: error against full attention, on what the emoji teacher attends to.

    python bootstrap.py bench NAME=gri_forms

The maps are those of bench/gri.py (part activations), at 32 x 32 and 64 x 64 tokens: a sheet of emoji and one enlarged,
each self-attention of the first level. Each form is computed as it is written, without regard to time; what it would
cost is the number of keys a query sees, and what is said of it in docs/gri.md. Forms of a cell, a square of tokens:

    sum           mean key and value, no bias: a cell counts as one token
    mean          mean key and value, bias log(count)
    isotropic     the same, and the second-order term |q|^2 s^2 / (2 dim), s^2 the mean variance of the keys of the cell
    diagonal      the same with the variance of each channel
    exact         mean key and value, the exact sum of the exponentials as bias: no better bias exists for each query
    mean query    weighted by the attention of the mean query of the map, bias the entropy of the weights
    window query  the same with the mean query of each window, whose cost grows with the square of the tokens

gathered n: mean query, but tokens change cells within their window n times, to the nearest mean key (asdm_core/gri.py).
seen: so many cells, to which the mean query of the window attends most, are seen in full instead. halo: a window also
sees so many tokens around it in full. shapes: half of the heads have windows twice as wide, half as high.
"""

from __future__ import annotations

import argparse
import math
import statistics

import torch
import torch.nn.functional as F
from torch import Tensor

from asdm_core import gri
from bench._attention import Larger, Map, error
from bench._common import add_common_arguments, begin, command_line, record

FORMS = ("sum", "mean", "isotropic", "diagonal", "exact", "mean query", "window query")
# side of the map: window, pool, halo, seen, forms
SETTINGS = {
    32: ((8, 4, 0, 0, FORMS), (16, 4, 0, 0, FORMS), (8, 4, 4, 0, ("mean", "mean query"))),
    64: (
        (16, 4, 0, 0, ("mean", "mean query", "window query")),
        (8, 4, 4, 0, ("mean", "mean query")),
        (16, 4, 0, 16, ("mean query",)),
        (16, 8, 0, 4, ("mean query",)),
    ),
}
GATHERED = {32: ((8, 4), (16, 4)), 64: ((16, 4), (16, 8), (8, 4), (16, 2))}
STEPS = (0, 1, 2, 3, 5)


def pooled(form: str, q: Tensor, k: Tensor, v: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (B, heads, cells, dim) and bias, of queries (B, heads, n, dim), cells (B, heads, cells, tokens,
    dim) and the mean query (B, heads, dim).
    """
    scale = q.shape[-1] ** -0.5
    if form.endswith("query"):
        logits = scale * torch.einsum("bhd,bhcnd->bhcn", q.mean(2) if form == "window query" else mean, k)
        w = logits.softmax(-1)
        return *(torch.einsum("bhcn,bhcnd->bhcd", w, x) for x in (k, v)), torch.special.entr(w).sum(-1)[:, :, None]
    keys, values = k.mean(3), v.mean(3)
    if form == "exact":
        return (
            keys,
            values,
            (scale * torch.einsum("bhqd,bhcnd->bhqcn", q, k)).logsumexp(-1) - scale * q @ keys.transpose(2, 3),
        )
    bias = torch.full_like(keys[..., 0], 0.0 if form == "sum" else math.log(k.shape[3]))[:, :, None]
    if form in ("isotropic", "diagonal"):
        variance = k.var(3, unbiased=False)
        variance = variance.mean(-1, keepdim=True).expand_as(variance) if form == "isotropic" else variance
        bias = bias + 0.5 * scale**2 * q.square() @ variance.transpose(2, 3)
    return keys, values, bias


def attend(m: Map, height: int, width: int, pool: int, form: str, halo: int = 0, seen: int = 0) -> tuple[Tensor, int]:
    """(B, N, heads * dim), and the number of keys of the window that sees most."""
    q, k, v = (
        t.unflatten(2, (m.heads, -1)).unflatten(1, (m.side, m.side)).permute(0, 3, 1, 2, 4) for t in (m.q, m.k, m.v)
    )
    cells = [
        t.unflatten(3, (-1, pool)).unflatten(2, (-1, pool)).transpose(3, 4).flatten(4, 5).flatten(2, 3) for t in (k, v)
    ]
    out = torch.empty_like(q)
    most = 0
    mean = q.mean((2, 3))
    for y in range(0, m.side, height):
        for x in range(0, m.side, width):
            rows = slice(max(y - halo, 0), min(y + height + halo, m.side))
            columns = slice(max(x - halo, 0), min(x + width + halo, m.side))
            outside = torch.ones(m.side // pool, m.side // pool, dtype=torch.bool)
            outside[rows.start // pool : rows.stop // pool, columns.start // pool : columns.stop // pool] = False
            queries = q[:, :, y : y + height, x : x + width].flatten(2, 3)
            own = [t[:, :, rows, columns].flatten(2, 3) for t in (k, v)]
            others = [t[:, :, outside.flatten()] for t in cells]
            keys, values, bias = pooled(form, queries, others[0], others[1], mean)
            bias = bias.expand(-1, -1, queries.shape[2], -1)
            if seen:
                logits = queries.mean(2, keepdim=True) @ keys.transpose(2, 3) * q.shape[-1] ** -0.5
                best = (logits + bias[:, :, :1]).topk(seen).indices
                bias = bias.scatter(3, best.expand(-1, -1, queries.shape[2], -1), -math.inf)
                best = best.transpose(2, 3)[..., None].expand(-1, -1, -1, *others[0].shape[3:])
                own = [torch.cat([x, t.gather(2, best).flatten(2, 3)], 2) for x, t in zip(own, others, strict=True)]
            bias = F.pad(bias, (own[0].shape[2], 0))
            found = F.scaled_dot_product_attention(
                queries, torch.cat([own[0], keys], 2), torch.cat([own[1], values], 2), bias
            )
            out[:, :, y : y + height, x : x + width] = found.unflatten(2, (height, width))
            most = max(most, bias.shape[-1] - seen)
    return out.permute(0, 2, 3, 1, 4).flatten(3, 4).flatten(1, 2), most


def gathered(m: Map, window: int, pool: int, steps: int) -> Tensor:
    q, k, v = (t.unflatten(2, (m.heads, -1)) for t in (m.q, m.k, m.v))
    return gri.gri_attention(q, k, v, m.side, m.side, gri.GRI(window, pool), steps=steps).flatten(2)


def shapes(m: Map, pool: int, form: str) -> Tensor:
    """Windows of 8 x 32 for the first half of the heads, 32 x 8 for the second."""
    half = m.q.shape[2] // 2
    parts = [
        Map(m.q[..., part], m.k[..., part], m.v[..., part], m.heads // 2) for part in (slice(half), slice(half, None))
    ]
    return torch.cat(
        [attend(part, *size, pool, form)[0] for part, size in zip(parts, ((8, 32), (32, 8)), strict=True)], 2
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    args, host, _, _ = begin(parser)
    family = Larger(32)
    rows = []

    def add(maps, outs, **more):
        errors = [error(out, m.wanted) for out, m in zip(outs, maps, strict=True)]
        rows.append({"tokens": maps[0].q.shape[1], **more, "error": statistics.mean(errors), "errors": errors})
        print(*(f"{key} {value}" for key, value in rows[-1].items() if key != "errors"), flush=True)

    with torch.inference_mode():
        for side, settings in SETTINGS.items():
            maps = family.maps(side, 0)
            for window, pool, halo, seen, forms in settings:
                for form in forms:
                    found = [attend(m, window, window, pool, form, halo, seen) for m in maps]
                    add(
                        maps,
                        [out for out, _ in found],
                        window=window,
                        pool=pool,
                        halo=halo,
                        seen=seen,
                        form=form,
                        keys=found[0][1],
                    )
            for window, pool in GATHERED[side]:
                for steps in STEPS:
                    add(
                        maps,
                        [gathered(m, window, pool, steps) for m in maps],
                        window=window,
                        pool=pool,
                        halo=0,
                        seen=0,
                        form=f"gathered {steps}",
                        keys=window**2 + (side**2 - window**2) // pool**2,
                    )
            add(
                maps,
                [shapes(m, 4, "mean query") for m in maps],
                window="8 x 32, 32 x 8",
                pool=4,
                halo=0,
                seen=0,
                form="mean query",
                keys=256 + (side**2 - 256) // 16,
            )
    summary = {
        f"error_{row['form'].replace(' ', '_')}": row["error"]
        for row in rows
        if (row["tokens"], row["window"], row["pool"], row["halo"], row["seen"]) == (64 * 64, 16, 4, 0, 0)
    }
    record("gri_forms", summary, rows, command_line("gri_forms"), host, args.notes)


if __name__ == "__main__":
    main()
