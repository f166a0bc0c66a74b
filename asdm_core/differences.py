"""Packs as differences: what training changed in a unit, to be added to the checkpoint's own weights.

A unit of a pack as such overwrites the style of the checkpoint it plays in, because shallow units make shape and colour
themselves. As a difference it is W + (P - T): W the weights of the checkpoint it plays in, P those of the trained unit,
T those of the teacher it was trained from. In the teacher itself both are the same unit.

W are the checkpoint's unpatched weights. Sums are made in float32 and rounded once. A difference of zero gives
W's own bits.

What the checkpoint has in units that the pack cuts may be carried over to those that play (carry.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .addresses import Slot, keys
from .carry import Carry, sources, taken_over
from .identity import Checkpoint
from .packs import Description, Loaded
from .tensor_file import BadFile
from .surgery import shapes_of


class _Changed(Mapping[str, Tensor]):
    """Tensors of a pack with those of its units added to a checkpoint's or taken from them, float32, lazily.

    carry: likewise what its units take over from others, by matrices among the tensors, which go where it is added.
    """

    def __init__(
        self,
        description: Description,
        tensors: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        sign: int,
        carry: Carry | None,
    ):
        self._tensors, self._weights, self._sign = tensors, weights, sign
        self._units = description.unit_keys.keys()
        self._links = carry.links(description.architecture) if carry else {}
        gone = carry.keys(description.architecture) if carry and sign > 0 else {}
        self.shapes = {key: shape for key, shape in shapes_of(tensors).items() if key not in gone}

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.shapes:
            raise KeyError(key)
        tensor = self._tensors[key]
        if key not in self._units:
            return tensor
        total = tensor.float() + self._sign * self._weight(key, tensor)
        links = self._links.get(key, ())
        weights = {link.source: self._weight(link.source, tensor) for link in links}
        matrices = {name: self._tensors[name].float() for link in links for name in link.matrices}
        taken = taken_over(links, weights, matrices)
        return total if taken is None else total + self._sign * taken

    def _weight(self, key: str, like: Tensor) -> Tensor:
        return self._weights[key].to(like.device, torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def needed(description: Description) -> dict[str, Slot]:
    """The weights of a checkpoint that a pack of differences is added to, by addressed name: those of its units, and
    those of which it carries something over.
    """
    whole = keys(description.architecture.config)
    links = description.carry.links(description.architecture) if description.carry else {}
    return description.unit_keys | {key: whole[key] for key in sources(links)}


def _check(description: Description, weights: Mapping[str, Tensor], name: str) -> None:
    shapes = shapes_of(weights)
    for key, slot in needed(description).items():
        if tuple(shapes.get(key, ())) != slot.shape:
            found = "it is not there" if key not in shapes else f"it has {list(shapes[key])}"
            raise BadFile(
                f"{name}: a difference is added to {key} ({slot.unit.address}), wanted with shape {list(slot.shape)}; "
                f"{found}. Give an unpruned checkpoint of the pack's family."
            )


def to_difference(
    loaded: Loaded, teacher: Mapping[str, Tensor], name: str, carry: Carry | None = None
) -> tuple[Description, Mapping[str, Tensor]]:
    """A pack as differences from its teacher: its description and tensors (units float32).

    teacher: addressed weights, whole; name: of its file. carry: what is taken over from other units, by matrices that
    are among the tensors of `loaded`. Raises BadFile where the pack is one already, plays no unit, or the teacher lacks
    a unit or is another one than the pack says.
    """
    description = loaded.description
    if description.difference_of is not None:
        raise BadFile(f"{loaded.path.name}: this pack holds differences already, from {description.difference_of.name}")
    if not description.units:
        raise BadFile(
            f"{loaded.path.name}: it plays no unit of its own; what joins the units of others is no weight of theirs"
        )
    _check(description, teacher, name)
    whose = Checkpoint.of(name, teacher, description.architecture.config)
    said = description.made_for
    if said is not None and said.is_other(whose):
        raise BadFile(f"{loaded.path.name}: it was made for {said.name}, and {name} has other weights. Give that one.")
    changed = replace(description, difference_of=whose, made_for=None, carry=carry)
    _check(changed, teacher, name)
    return changed, _Changed(description, loaded.tensors, teacher, -1, carry)


def to_absolute(
    loaded: Loaded, checkpoint: Mapping[str, Tensor], name: str
) -> tuple[Description, Mapping[str, Tensor]]:
    """A pack of differences as the units that it plays in a checkpoint: its description and tensors (units float32).

    Given the teacher, the inverse of `to_difference`. checkpoint, name: see there. Raises BadFile.
    """
    description = loaded.description
    if description.difference_of is None:
        raise BadFile(f"{loaded.path.name}: this pack holds no differences")
    _check(description, checkpoint, name)
    whose = Checkpoint.of(name, checkpoint, description.architecture.config)
    return (
        replace(description, difference_of=None, made_for=whose, carry=None),
        _Changed(description, loaded.tensors, checkpoint, 1, description.carry),
    )


def played_in(loaded: Loaded, checkpoint: Mapping[str, Tensor], name: str) -> Loaded:
    """A pack with the units that it plays in a checkpoint; absolute ones are what they are, whatever it is."""
    if loaded.description.difference_of is None:
        return loaded
    description, tensors = to_absolute(loaded, checkpoint, name)
    return replace(loaded, description=description, tensors=tensors)


def unchanged(description: Description, tensors: Mapping[str, Tensor]) -> frozenset[str]:
    """The units of a pack of differences that are the checkpoint's own: all their differences are 0, and nothing is
    carried over to them.
    """
    changed = {unit for unit, _ in description.carry.pairs} if description.carry else set()
    changed |= {slot.unit.address for key, slot in description.unit_keys.items() if tensors[key].any()}
    return frozenset(description.units) - changed
