"""Functions that others have put into the options of a run, with the layers of packs in place of the checkpoint's.

Such a function (a patch, a wrapper of the network, an attention of its own) is called in whatever plays a unit, but may
hold the checkpoint's layers and compute with them. The options themselves, and what does not lead to a layer, stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from . import units
from .carried import WHOLE
from .rebinding import Opaque, Rebinding

DEPTH = 6  # of collections in the options
MOST = 1000  # functions that are remembered: some are made anew for each call


class Patches:
    """What is in the options of a run while some units are played by others. lost: where in them something holds layers
    of the checkpoint and cannot be exchanged ("patches_replace.attn2"), by the addresses of these.
    """

    def __init__(self, players: Mapping[str, nn.Module], layers: Mapping[str, nn.Module]):
        self.lost: dict[str, list[str]] = {}
        self._partners = {address: _partners(player, layers[address]) for address, player in players.items()}
        of_all = {key: partner for partners in self._partners.values() for key, partner in partners.items()}
        self._rebinding = Rebinding(of_all, WHOLE, doubtful=False, shared=True)
        self._bound: dict[int, tuple[object, Any]] = {}

    def bound(self, options: dict) -> dict:
        """transformer_options with these functions; the same where there are none."""
        return self._in(options, (), DEPTH)

    def _in(self, value, place: tuple[str, ...], depth: int):
        if type(value) is dict and depth:
            made = {name: self._in(part, (*place, str(name)), depth - 1) for name, part in value.items()}
            return made if any(made[name] is not part for name, part in value.items()) else value
        if type(value) in (list, tuple) and depth:
            parts = [self._in(part, place, depth - 1) for part in value]
            return type(value)(parts) if any(a is not b for a, b in zip(parts, value, strict=True)) else value
        if not callable(value) or isinstance(value, type):
            return value
        known = self._bound.get(id(value))
        if known is None:
            if len(self._bound) >= MOST:
                self._bound.clear()
            known = self._bound[id(value)] = value, self._exchanged(value, ".".join(place[:2]))
        return known[1]

    def _exchanged(self, value, place: str):
        if not self._rebinding.concerns(value):
            return value
        try:
            return self._rebinding(value)
        except Opaque:
            for address, partners in self._partners.items():
                names = self.lost.setdefault(address, [])
                if place not in names and Rebinding(partners, WHOLE, doubtful=False).concerns(value):
                    names.append(place)
            return value


def _partners(player: nn.Module, layer: nn.Module) -> dict[int, nn.Module]:
    """A player's modules by the ids of those that they stand in for."""
    own = {path: m for path, m in player.named_modules() if not isinstance(m, units.BasicTransformerBlock)}
    return {id(m): own[path] for path, m in layer.named_modules() if path in own and own[path] is not m}
