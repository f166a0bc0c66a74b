"""A LoRA in fewer numbers: each layer keeps the singular values of its change that tell most for what they cost; and
the mean of several.

W = W_0 + (alpha / rank) up down. By Eckart and Young (1936) the best change of a lower rank keeps the largest singular
values; among layers, the value whose square is largest for the numbers that its two vectors take goes first. Layers
end up with ranks of their own, which every loader of LoRAs takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

UP, DOWN, ALPHA = ".lora_up.weight", ".lora_down.weight", ".alpha"


def mean(loras: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """A LoRA whose change is the mean of the changes of several, exactly, with the sum of their ranks: of checkpoints
    of one training it is often better than each (Izmailov et al. 2018; Wortsman et al. 2022). The first one's dtypes.

    Raises ValueError for other names or shapes of layers.
    """
    first, *others = [_layers(tensors) for tensors in loras]
    for number, layers in enumerate(others, 2):
        if odd := sorted(first ^ layers):
            raise ValueError(f"LoRAs of the same layers are wanted; number 1 or {number} lacks {odd[0]}")
    found: dict[str, Tensor] = {}
    for layer in sorted(first):
        ups, downs = [t[layer + UP] for t in loras], [t[layer + DOWN] for t in loras]
        shapes = [(up.shape[:1] + up.shape[2:], down.shape[1:]) for up, down in zip(ups, downs, strict=True)]
        for number, shape in enumerate(shapes, 1):
            if shape != shapes[0]:
                raise ValueError(f"{layer} has another shape in number {number} than in number 1")
        rank = sum(len(down) for down in downs)
        # Each with its own scale within, and the scale of the whole then 1.
        scaled = [up.double() * (_scale(t, layer) / len(loras)) for t, up in zip(loras, ups, strict=True)]
        found[layer + UP] = torch.cat(scaled, 1).to(ups[0].dtype)
        found[layer + DOWN] = torch.cat([down.to(downs[0].dtype) for down in downs])
        found[layer + ALPHA] = torch.tensor(float(rank), dtype=ups[0].dtype)
    return found


def shrink(tensors: Mapping[str, Tensor], most: int) -> tuple[dict[str, Tensor], float]:
    """The tensors of a LoRA (kohya's names) with at most so many numbers in up and down, and the share of the squared
    change (Frobenius) that they keep. A layer whose change is not worth a rank is left out. Dtypes stay.

    Raises ValueError for tensors that are no up, down or alpha of a linear layer or convolution.
    """
    layers = _layers(tensors)
    parts = {layer: _svd(tensors, layer) for layer in sorted(layers)}
    # (worth of a number, layer, rank of the value): within a layer values fall, so lower ones come first.
    offers = sorted(
        (-(float(value) ** 2) / cost, layer, i)
        for layer, (_, values, _, cost) in parts.items()
        for i, value in enumerate(values)
    )
    ranks, left, kept = dict.fromkeys(parts, 0), most, 0.0
    for worth, layer, i in offers:
        cost = parts[layer][3]
        if i == ranks[layer] and cost <= left and worth:
            ranks[layer], left, kept = i + 1, left - cost, kept - worth * cost
    found: dict[str, Tensor] = {}
    for layer, (u, values, v, _) in parts.items():
        rank = ranks[layer]
        if not rank:
            continue
        up, down = tensors[layer + UP], tensors[layer + DOWN]
        root = values[:rank].sqrt()
        found[layer + UP] = (u[:, :rank] * root).reshape(len(up), rank, *up.shape[2:]).to(up.dtype)
        found[layer + DOWN] = (root[:, None] * v[:rank]).reshape(rank, *down.shape[1:]).to(down.dtype)
        found[layer + ALPHA] = torch.tensor(float(rank), dtype=up.dtype)
    whole = sum(float((values**2).sum()) for _, values, _, _ in parts.values())
    return found, kept / whole if whole else 1.0


def _layers(tensors: Mapping[str, Tensor]) -> set[str]:
    layers = {key.removesuffix(UP) for key in tensors if key.endswith(UP)}
    wanted = {f"{layer}{end}" for layer in layers for end in (UP, DOWN)}
    other = sorted(set(tensors) - wanted - {f"{layer}{ALPHA}" for layer in layers})
    if not layers or other or not wanted <= set(tensors):
        raise ValueError(
            f"a LoRA of *{UP}, *{DOWN} and *{ALPHA} is wanted; this has "
            f"{other[0] if other else min(wanted - set(tensors), default='none of them')}"
        )
    return layers


def _scale(tensors: Mapping[str, Tensor], layer: str) -> float:
    """Of a layer's up down."""
    return float(tensors[layer + ALPHA]) / len(tensors[layer + DOWN]) if layer + ALPHA in tensors else 1.0


def _svd(tensors: Mapping[str, Tensor], layer: str) -> tuple[Tensor, Tensor, Tensor, int]:
    """u (out, r), singular values (r,), v (r, in) of a layer's change, and the numbers that one value costs."""
    if tensors[layer + UP].dim() < 2 or tensors[layer + DOWN].dim() < 2:
        raise ValueError(f"{layer}: up and down are matrices or kernels, and one of them is a vector")
    up, down = tensors[layer + UP].double().flatten(1), tensors[layer + DOWN].double().flatten(1)
    if up.shape[1] != down.shape[0]:
        raise ValueError(f"{layer}: up has rank {up.shape[1]} and down {down.shape[0]}")
    # Through the small matrix between the two bases: the change itself would be out x in.
    left, a = torch.linalg.qr(up)
    right, b = torch.linalg.qr(down.T)
    u, values, v = torch.linalg.svd(_scale(tensors, layer) * a @ b.T)
    return left @ u, values, v @ right.T, len(up) + down.shape[1]
