"""Pictures of different shapes in few shapes of about the same area: aspect-ratio buckets, as NovelAI's and kohya-ss'
trainers make them (sd-scripts, make_bucket_resolutions). What is in one batch has one shape.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

import torch

STEP = 64  # pixels

Shape = tuple[int, int]  # width and height in pixels


@lru_cache(maxsize=8)
def shapes(size: int) -> tuple[Shape, ...]:
    """The shapes around a square: sides from half to twice of it in steps of 64, as large as its area allows.

    size: a multiple of 64.
    """
    area = (size // STEP) ** 2
    found = {(size, size)}
    for width in range(max(STEP, size // 2 // STEP * STEP), 2 * size + 1, STEP):
        height = min(2 * size, area // (width // STEP) * STEP)
        if height >= size // 2:
            found |= {(width, height), (height, width)}
    return tuple(sorted(found))


def nearest(size: int, width: int, height: int) -> Shape:
    """The shape of a picture's bucket: the one with the nearest aspect ratio."""
    return min(shapes(size), key=lambda s: (abs(math.log(s[0] / s[1] * height / width)), s))


def groups(buckets: Sequence[int], group: int) -> int:
    """How many groups of one bucket an epoch has, where the last one of a bucket is filled up."""
    return sum(-(-n // group) for n in torch.bincount(torch.tensor(buckets)).tolist())


def in_groups(order: Sequence[int], buckets: Sequence[int], group: int, generator: torch.Generator) -> list[int]:
    """An order in which each `group` numbers in a row, counted from the first, are of one bucket.

    order: numbers, shuffled. buckets: that of each number. The last group of a bucket is filled up with others of it.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for i in order:
        members[buckets[i]].append(i)
    parts = []
    for bucket in sorted(members):
        mine = members[bucket]
        missing = -len(mine) % group
        filled = mine + [mine[int(torch.randint(len(mine), (), generator=generator))] for _ in range(missing)]
        parts += [filled[at : at + group] for at in range(0, len(filled), group)]
    return [i for n in torch.randperm(len(parts), generator=generator).tolist() for i in parts[n]]
