"""Which layers of the original are a pruned UNet's? A search by nearest weights.

A student in the numbering of its own small network (SSD-1B, Vega, KOALA) shows how many layers and transformer blocks
each place has kept, and not which ones they were; LoRAs made for the original need to know. Students start as copies of
the original's layers, and training moves weights far less than layers differ from one another. So at each place the
student's layers are laid over those of the original that they resemble most, in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from torch import Tensor

from .addresses import Unit, UNetConfig, unit, walk
from .architecture import Architecture
from .surgery import check, shapes_of

TINY = 1e-30
UNRELATED = 0.8  # from this distance on two layers have nothing in common


class NoMatch(ValueError):
    """The student was not made from this original, or cannot be laid over it; the message says why."""


@dataclass(frozen=True)
class Pair:
    """A layer or a transformer block of the student and the one of the original that it was found to be, as addresses.

    student: where it stands by the convention that the first ones were kept.
    distance: |s - o|^2 / (|s|^2 + |o|^2) over all matrices; 0 for equal weights, about 1 for unrelated ones.
    next: distance of the nearest other one that it could have been; None where there is no choice.
    """

    student: str
    original: str
    distance: float
    next: float | None


@dataclass(frozen=True)
class Match:
    """architecture: of the student, its layers at the original's addresses. pairs: in the order of execution."""

    architecture: Architecture
    pairs: tuple[Pair, ...]


def match(
    student: Mapping[str, Tensor],
    architecture: Architecture,
    original: Mapping[str, Tensor],
    progress: Callable[[str], None] = lambda place: None,
) -> Match:
    """Lay a student over the original it was made from.

    student: addressed tensors of `architecture`, as read from a file that does not say which layers it kept.
    original: addressed tensors of the unpruned UNet. Both may be lazy; few tensors are held at a time.
    progress: called with each place of the network before it is compared.
    Raises NoMatch if the student is no descendant of this original, Mismatch for a state dict that is not whole.
    """
    config = architecture.config
    check(shapes_of(student), architecture.keys(), "student")
    check(shapes_of(original), Architecture.full(config).keys(), "original")
    _ = architecture.renumbered  # what has no renumbered form says itself where its layers belong, and raises here
    kept = {u.address for u in architecture.kept}
    cut = {a for a in architecture.cut_units if a.endswith(".sampler")}
    pairs: list[Pair] = []

    def assign(mine: Sequence[str], theirs: Sequence[str]) -> dict[str, str]:
        """Their address -> mine, for resnets or transformer blocks."""
        found = _nearest(
            student, original, [_matrices(config, a) for a in mine], [_matrices(config, a) for a in theirs]
        )
        pairs.extend(
            Pair(a, theirs[home], distance, other) for a, (home, distance, other) in zip(mine, found, strict=True)
        )
        return {theirs[home]: a for a, (home, *_) in zip(mine, found, strict=True)}

    for place, units in _places(config).items():
        progress(place)
        resnets = [u.address for u in units if u.kind == "resnet"]
        homes = assign([a for a in resnets if a in kept], resnets)
        cut.update(a for a in resnets if a not in homes)
        for u in units:
            if u.kind == "resnet":
                continue
            source = homes.get(f"{u.layer}.resnet", "").replace("resnet", "transformer")
            if source not in kept:
                cut.add(u.address)
                continue
            mine = [a for a in unit(config, source).blocks if a not in architecture.cut]
            cut.update(set(u.blocks) - assign(mine, u.blocks).keys())
    unlike = sum(pair.distance >= UNRELATED for pair in pairs)
    if 2 * unlike > len(pairs):
        raise NoMatch(
            f"{unlike} of the student's {len(pairs)} layers and transformer blocks resemble none of the original's. "
            "Give the checkpoint that the student was pruned from, or another finetune of the same base model."
        )
    found = Architecture(config, frozenset(cut))
    found = Architecture(config, found.cut, tuple(u.address for u in found.kept)).named()
    return Match(found, tuple(pairs))


def _places(config: UNetConfig) -> dict[str, list[Unit]]:
    """The resnets and transformers that could be taken for one another: those of a block, and each alone in
    the middle.
    """
    places: dict[str, list[Unit]] = {}
    for u in walk(config):
        if u.kind in ("resnet", "transformer"):
            places.setdefault(u.layer if u.side == "mid" else u.block, []).append(u)
    return places


def _matrices(config: UNetConfig, address: str) -> list[str]:
    """Names of the tensors of a unit (its transformer blocks left out) or of a transformer block, without vectors."""
    u = unit(config, address)
    return [u.key(t) for t in u.tensors if u.owner(t) == address and len(t.shape) > 1]


def _nearest(
    student: Mapping[str, Tensor],
    original: Mapping[str, Tensor],
    mine: Sequence[list[str]],
    theirs: Sequence[list[str]],
) -> list[tuple[int, float, float | None]]:
    """For each of mine: the index of its home in theirs, the distance to it, and to the next nearest one.

    Each is a list of tensor names, in one order. Homes are in order too, and no two are the same.
    """
    distances = _distances(student, original, mine, theirs)
    homes = min(
        combinations(range(len(theirs)), len(mine)), key=lambda c: sum(d[j] for d, j in zip(distances, c, strict=True))
    )
    others = [
        min((d for j, d in enumerate(row) if j != home and d < math.inf), default=None)
        for row, home in zip(distances, homes, strict=True)
    ]
    return [(home, row[home], other) for row, home, other in zip(distances, homes, others, strict=True)]


def _distances(
    student: Mapping[str, Tensor],
    original: Mapping[str, Tensor],
    mine: Sequence[list[str]],
    theirs: Sequence[list[str]],
) -> list[list[float]]:
    """Distance of each of mine to each of theirs; infinite where shapes or the order of layers forbid it."""
    shapes = shapes_of(student)
    others = shapes_of(original)
    spare = len(theirs) - len(mine)
    apart = {
        (i, j): 0.0
        for i, names in enumerate(mine)
        for j in range(i, i + spare + 1)
        if [shapes[n] for n in names] == [others[n] for n in theirs[j]]
    }
    size = dict.fromkeys(apart, 0.0)
    for at in range(max(map(len, mine), default=0)):
        held = {i: student[mine[i][at]].float() for i in sorted({i for i, _ in apart}) if at < len(mine[i])}
        for j in sorted({j for i, j in apart if i in held}):
            tensor = original[theirs[j][at]].float()
            for i in held:
                if (i, j) in apart:
                    apart[i, j] += float((held[i] - tensor).square().sum())
                    size[i, j] += float(held[i].square().sum() + tensor.square().sum())
    return [
        [apart[i, j] / max(size[i, j], TINY) if (i, j) in apart else math.inf for j in range(len(theirs))]
        for i in range(len(mine))
    ]
