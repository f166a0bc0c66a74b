"""What a finetune changed in the units that a pack cuts, carried over to those that play in their place.

A pack of differences (differences.py) leaves a checkpoint its own weights in the units that are played. What a finetune
has learned in the units that are cut goes with them, and a good part of its style is there. So a pack may carry it
over, layer by layer: with W the weights of the checkpoint and T those of the teacher, a layer of a unit u plays with

    W_u + (P - T_u) + sum over c of L (W_c - T_c) R

where c is any unit of u's kind in its block, cut or played, u among them. L (outputs of u, outputs of c) and R (inputs
of c, inputs of u) were learned over many styles (train/styles.py). L alone moves a bias, a factor for each channel a
norm; there is no R where both layers read the same, text or time. In the teacher nothing is added, by construction.

A file needs no T: the T_c are in its differences, D = (P - T_u) - sum of L T_c R, to which W_u and all L W_c R are
added.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .addresses import Slot, TensorSpec, Unit, unit, walk
from .architecture import Architecture
from .surgery import StateDict

MAX_RANK = 1024
# Layers whose inputs are no unit's own: what they read is the same everywhere.
_READ_ALIKE = ("emb_layers.1", "attn2.to_k", "attn2.to_v")


@dataclass(frozen=True)
class Link:
    """How one tensor takes over the change of another.

    source: addressed name of the other. left, right: names of the matrices whose product L and R are; none where there
    is no such factor. gain: name of the factors of a norm.
    """

    source: str
    left: tuple[str, ...] = ()
    right: tuple[str, ...] = ()
    gain: str = ""

    @property
    def matrices(self) -> tuple[str, ...]:
        return (*self.left, *self.right, *((self.gain,) if self.gain else ()))

    def __call__(self, change: Tensor, matrices: Mapping[str, Tensor]) -> Tensor:
        """L change R in the dtype of all. change: (outputs of c, inputs of c, ...), or (outputs of c,)."""
        if self.gain:
            return matrices[self.gain] * change
        for name in self.right:
            change = torch.einsum("oi...,ij->oj...", change, matrices[name])
        for name in reversed(self.left):
            change = torch.tensordot(matrices[name], change, 1)
        return change


@dataclass(frozen=True)
class Carry:
    """Which units take over the changes of which: pairs (u, c) of addresses. rank: of L and R, where a matrix of less
    than full rank is the smaller one in two factors.
    """

    pairs: tuple[tuple[str, str], ...]
    rank: int

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or not 1 <= self.rank <= MAX_RANK:
            raise ValueError(f"carry: rank must be a whole number from 1 to {MAX_RANK}, got {self.rank!r}")
        if not self.pairs or len(set(self.pairs)) < len(self.pairs):
            raise ValueError("carry: pairs must name at least one pair of units, and none twice")

    @classmethod
    def within_blocks(cls, architecture: Architecture, units: Iterable[str], rank: int) -> Carry:
        """Each of these units with all of its kind in its block."""
        played = set(units)
        pairs = tuple(
            (u.address, c.address)
            for u in walk(architecture.config)
            if u.address in played
            for c in walk(architecture.config)
            if (c.block, c.kind) == (u.block, u.kind)
        )
        return cls(pairs, rank)

    def links(self, architecture: Architecture) -> dict[str, list[Link]]:
        """By addressed name of the tensors that take over something. Raises ValueError for units that cannot."""
        return {key: [link for link, _ in found] for key, found in self._linked(architecture).items()}

    def keys(self, architecture: Architecture) -> dict[str, Slot]:
        """Names and shapes of all matrices in a pack file."""
        slots: dict[str, Slot] = {}
        for found in self._linked(architecture).values():
            for _, its in found:
                slots |= its
        return slots

    def _linked(self, architecture: Architecture) -> dict[str, list[tuple[Link, dict[str, Slot]]]]:
        """The links of each tensor, with their matrices."""
        kept = {u.address for u in architecture.kept}
        sources: dict[str, list[Unit]] = defaultdict(list)
        for address, other in self.pairs:
            u, c = (unit(architecture.config, a) for a in (address, other))
            if address not in kept or c.address != other or u.kind != c.kind:
                raise ValueError(f"carry: {address} cannot take over what changes in {other}")
            sources[address].append(c)
        found: dict[str, list[tuple[Link, dict[str, Slot]]]] = {}
        for key, slot in architecture.keys().items():
            for c in sources[slot.unit.address]:
                if linked := self._link(slot, c):
                    found.setdefault(key, []).append(linked)
        return found

    def _link(self, slot: Slot, c: Unit) -> tuple[Link, dict[str, Slot]] | None:
        """The link of a tensor to its like in another unit; None where there is none that fits."""
        its = {t.ldm: t.shape for t in c.tensors}
        layer, _, leaf = slot.tensor.ldm.rpartition(".")
        mine = {t.ldm: t.shape for t in slot.unit.tensors}[f"{layer}.weight"]
        theirs = its.get(f"{layer}.weight")
        if slot.tensor.ldm not in its or theirs is None or mine[2:] != theirs[2:]:
            return None
        slots: dict[str, Slot] = {}

        def named(name: str, *shapes: tuple[int, ...]) -> tuple[str, ...]:
            stem = f"{layer}.carry.{c.address}.{name}"
            names = [stem] if len(shapes) == 1 else [f"{stem}.{i}" for i in range(len(shapes))]
            specs = [
                TensorSpec(n, n, shape, "carry", slot.tensor.block) for n, shape in zip(names, shapes, strict=True)
            ]
            added = {f"{slot.unit.ldm}.{spec.ldm}": Slot(slot.unit, spec) for spec in specs}
            slots.update(added)
            return tuple(added)

        source = f"{c.ldm}.{slot.tensor.ldm}"
        if len(mine) == 1:
            return (Link(source, gain=named("gain", mine)[0]), slots) if mine == theirs else None
        left = named("left", *self._factors(mine[0], theirs[0]))
        reads_alike = mine[1] == theirs[1] and layer.endswith(_READ_ALIKE)
        moves_inputs = leaf == "weight" and not reads_alike
        right = named("right", *self._factors(theirs[1], mine[1])) if moves_inputs else ()
        return Link(source, left, right), slots

    def _factors(self, rows: int, columns: int) -> list[tuple[int, int]]:
        if rows * columns <= self.rank * (rows + columns):
            return [(rows, columns)]
        return [(rows, self.rank), (self.rank, columns)]

    def start(self, architecture: Architecture, generator: torch.Generator) -> StateDict:
        """Matrices to learn from, float32: L and gains are 0, R leaves inputs where they are as far as its rank lets
        it.
        """
        found: StateDict = {}
        for links in self._linked(architecture).values():
            for link, slots in links:
                new = {name: slot.shape for name, slot in slots.items() if name not in found}
                for name, shape in new.items():
                    silent = name in (link.gain, *link.left[:1])
                    found[name] = torch.zeros(shape) if silent else _spanning(shape, generator)
                inner = [name for name in link.right if name in new]
                if len(inner) == 1 and len({*new[inner[0]]}) == 1:
                    found[inner[0]] = torch.eye(new[inner[0]][0])
                elif len(inner) == 2 and new[inner[0]] == new[inner[1]][::-1]:
                    found[inner[1]] = found[inner[0]].T.contiguous()
        return found

    def to_dict(self) -> dict[str, Any]:
        return {"rank": self.rank, "pairs": [list(pair) for pair in self.pairs]}

    @classmethod
    def from_dict(cls, data: object) -> Carry:
        """Inverse of `to_dict`, from JSON too. Raises ValueError for anything else."""
        pairs = data.get("pairs") if isinstance(data, Mapping) else None
        if not isinstance(data, Mapping) or set(data) != {"rank", "pairs"} or not isinstance(pairs, list):
            raise ValueError("carry must be a JSON object with a rank and pairs")
        if not all(isinstance(p, list) and len(p) == 2 and all(isinstance(a, str) for a in p) for p in pairs):
            raise ValueError("carry: each of its pairs must be two addresses")
        return cls(tuple((one, other) for one, other in pairs), data["rank"])


def _spanning(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A random matrix whose singular values are all 1."""
    drawn: Tensor = torch.linalg.qr(torch.randn(max(shape), min(shape), generator=generator))[0]
    return drawn if shape[0] >= shape[1] else drawn.T.contiguous()
