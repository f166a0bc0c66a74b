"""What a finetune changed in the units that a pack cuts, carried over to those that play in their place.

A pack of differences (differences.py) leaves a checkpoint its own weights in the units that are played. What a finetune
has learned in the units that are cut goes with them, and a good part of its style is there. So a pack may carry it
over, layer by layer: with W the weights of the checkpoint and T those of the teacher, a layer of a unit u plays with

    W_u + (P - T_u) + sum over c of g (L (W_c - T_c) R)

where c is any unit of u's kind in its block, cut or played, u among them. What a unit reads and writes outside of
itself means the same in c and u, what lies inside does not. So L and R are matrices between the spaces inside of the
two: one pair for each space, shared by the layers that write into it (L) and read from it (R); outside of the units
they are 1. g is a factor for each channel of a layer. Norms take over nothing. L, R and g were learned over many styles
(train/styles.py). In the teacher nothing is added, by construction.

A file needs no T: the T_c are in its differences, D = (P - T_u) - sum of g (L T_c R), to which W_u and all g (L W_c R)
are added.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .addresses import Slot, TensorSpec, Unit, unit, walk
from .architecture import Architecture
from .surgery import StateDict

MAX_RANK = 1024

# The spaces that a layer writes into and reads from, by its name in its unit or its transformer block. None: outside of
# the unit (its input and output, time, text). "input" is outside too, but not of one width in all resnets of a block.
_SPACES: dict[str, tuple[str | None, str | None]] = {
    "in_layers.2": ("hidden", "input"),
    "emb_layers.1": ("hidden", None),
    "out_layers.3": (None, "hidden"),
    "skip_connection": (None, "input"),
    "op": (None, None),
    "conv": (None, None),
    "proj_in": ("inner", None),
    "proj_out": (None, "inner"),
    "attn1.to_q": ("attn1.match", "inner"),
    "attn1.to_k": ("attn1.match", "inner"),
    "attn1.to_v": ("attn1.values", "inner"),
    "attn1.to_out.0": ("inner", "attn1.values"),
    "attn2.to_q": ("attn2.match", "inner"),
    "attn2.to_k": ("attn2.match", None),
    "attn2.to_v": ("attn2.values", None),
    "attn2.to_out.0": ("inner", "attn2.values"),
    "ff.net.0.proj": ("ff", "inner"),
    "ff.net.2": ("inner", "ff"),
}
_OF_THE_UNIT = ("hidden", "input", "inner")  # the other spaces lie within a transformer block


@dataclass(frozen=True)
class Link:
    """How one tensor takes over the change of another.

    source: addressed name of the other. left, right: names of the matrices whose product L and R are; none where they
    are 1. gain: name of g.
    """

    source: str
    left: tuple[str, ...]
    right: tuple[str, ...]
    gain: str

    @property
    def matrices(self) -> tuple[str, ...]:
        return (*self.left, *self.right, self.gain)

    def __call__(self, change: Tensor, matrices: Mapping[str, Tensor]) -> Tensor:
        """g (L change R) in the dtype of all. change: (outputs of c, inputs of c, ...), or (outputs of c,). Where L has
        half as many columns as there are outputs (values and gates), it is applied to each half.
        """
        for name in self.right:
            change = torch.einsum("oi...,ij->oj...", change, matrices[name])
        for name in reversed(self.left):
            parts = change.unflatten(0, (-1, matrices[name].shape[1]))
            change = torch.einsum("po,ho...->hp...", matrices[name], parts).flatten(0, 1)
        return matrices[self.gain].view(-1, *[1] * (change.dim() - 1)) * change


Links = Mapping[str, Sequence[Link]]  # by addressed name of the tensors that take over something


def sources(links: Links) -> frozenset[str]:
    """Addressed names of the tensors from which something is taken over."""
    return frozenset(link.source for found in links.values() for link in found)


def taken_over(links: Sequence[Link], changes: Mapping[str, Tensor], matrices: Mapping[str, Tensor]) -> Tensor | None:
    """What a tensor with these links takes over of changes, by addressed name; None where none of them concerns it."""
    found = [link(changes[link.source], matrices) for link in links if link.source in changes]
    return torch.stack(found).sum(0) if found else None


@dataclass(frozen=True)
class Carry:
    """Which units take over the changes of which: pairs (u, c) of addresses. rank: at most of L and R, which are two
    factors where that takes fewer numbers.
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

    def links(self, architecture: Architecture) -> Links:
        """Raises ValueError for units that cannot take over anything of each other."""
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
        """The link of a tensor to its like in another unit, with its matrices; None where there is none that fits."""
        tensor, u = slot.tensor, slot.unit
        layer, _, leaf = tensor.ldm.rpartition(".")
        inside = "" if tensor.block is None else f"transformer_blocks.{tensor.block}."
        mine, theirs = ({t.ldm: t.shape for t in unit.tensors} for unit in (u, c))
        if layer.removeprefix(inside) not in _SPACES or tensor.ldm not in theirs:
            return None
        (outputs, *ins), (its_outputs, *its_ins) = mine[f"{layer}.weight"], theirs[f"{layer}.weight"]
        if ins[1:] != its_ins[1:]:
            return None
        slots: dict[str, Slot] = {}

        def matrix(space: str | None, side: str, rows: int, columns: int) -> tuple[str, ...]:
            if space is None or space == "input" and rows == columns:
                return ()
            where = space if space in _OF_THE_UNIT else f"{inside}{space}"
            factors = [(rows, columns)]
            if rows * columns > self.rank * (rows + columns):
                factors = [(rows, self.rank), (self.rank, columns)]
            ends = [""] if len(factors) == 1 else [".0", ".1"]
            return tuple(added(f"{where}.{side}{end}", shape) for end, shape in zip(ends, factors, strict=True))

        def added(name: str, shape: tuple[int, ...]) -> str:
            block = tensor.block if name.startswith("transformer_blocks.") else None
            name = f"carry.{c.address}.{name}"
            spec = TensorSpec(name, name, shape, "carry", block)
            slots[u.key(spec)] = Slot(u, spec)
            return u.key(spec)

        into, from_ = _SPACES[layer.removeprefix(inside)]
        parts = 2 if into == "ff" else 1
        left = matrix(into, "left", outputs // parts, its_outputs // parts)
        right = matrix(from_, "right", its_ins[0], ins[0]) if leaf == "weight" else ()
        gain = added(f"{layer}.gain", (outputs,))
        return Link(f"{c.ldm}.{tensor.ldm}", left, right, gain), slots

    def start(self, architecture: Architecture, generator: torch.Generator) -> StateDict:
        """Matrices to learn from, float32: gains are 0, L and R are 1 as far as their rank and widths let them."""
        found: StateDict = {}
        for name, slot in self.keys(architecture).items():
            shape = slot.shape
            if name.endswith(".gain"):
                found[name] = torch.zeros(shape)
            elif not name.endswith((".0", ".1")) and shape[0] == shape[1]:
                found[name] = torch.eye(shape[0])
            elif name.endswith(".1") and found[f"{name[:-1]}0"].shape == shape[::-1]:
                found[name] = found[f"{name[:-1]}0"].T.contiguous()
            else:
                found[name] = _spanning(shape, generator)
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
