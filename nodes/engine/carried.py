"""What other nodes have put on single layers of the checkpoint, carried over to who plays them in its place.

Packs put a forward of their own on a module, by an object patch or directly, and hold the module's own one in a closure
or an object. Carried over, such a function is the same function with the player's modules in place of the checkpoint's;
whatever else it holds it shares. Bypass LoRAs of the host are of this kind. What holds the checkpoint's modules where
nobody can see it, and modules that stand in place of others with weights of their own, cannot be carried over.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

from comfy.ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential, UNetModel
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import BypassForwardHook
from torch import nn

from ...asdm_core.condconv import CondConv2d
from .rebinding import Opaque, Rebinding
from .units import BasicTransformerBlock

# Set on modules by the host as it loads them, and by what the layers of packs are made of.
_HOSTS = ("comfy_", "prev_comfy_", "training", "weight_function", "bias_function", "_v", "_pin", "factory_kwargs")
_LOADED = ("_v_signature", "_v_weight", "_v_bias")  # by what the host knows that a module lies on the card
_HOOKS = [
    f"_forward{kind}hooks{more}"
    for kind in ("_", "_pre_")
    for more in ("", "_with_kwargs", *(["_always_called"] if kind == "_" else []))
]
_FUNCTIONS = (FunctionType, MethodType, functools.partial)
# What a function may know besides, to ask something of it: all hold the layers, and are no way to one.
WHOLE = (ModelPatcher, BaseModel, UNetModel, TimestepEmbedSequential)
_PLAIN = (int, float, str, bool, tuple, type(None))


def overrides(module: nn.Module) -> dict[str, object]:
    """Methods that were put over those of a module's class, by name ("forward")."""
    return {
        name: value
        for name, value in vars(module).items()
        if callable(value) and callable(getattr(type(module), name, None)) and not _is_own(module, value)
    }


def is_bare(module: nn.Module) -> bool:
    """Whether nobody has put a method or a hook on a module."""
    return not overrides(module) and not any(getattr(module, hooks) for hooks in _HOOKS)


def _is_own(module: nn.Module, value: object) -> bool:
    """Whether it is a method of the module's own class: the host leaves one behind where a patch was."""
    return (
        isinstance(value, MethodType)
        and value.__self__ is module
        and value.__func__ is getattr(type(module), value.__name__, None)
    )


def _settings(module: nn.Module) -> dict[str, object]:
    """Plain values by which modules of one class differ ("padding_mode")."""
    return {n: v for n, v in vars(module).items() if isinstance(v, _PLAIN) and not n.startswith(_HOSTS)}


class Carried:
    """The player of a unit with what others have put on the layer that it stands in for.

    player: the same, or a copy that shares all weights. name: tells players with other things on them apart. lost: what
    could not be carried over ("transformer_blocks.0.forward").
    """

    def __init__(self, player: nn.Module, layer: nn.Module):
        self.lost: list[str] = []
        self._given: list[str] = []
        self._kept: list[_Kept] = []
        self._loaded: list[tuple[dict, dict]] = []  # of modules that the host brings to the card, and of their twins
        theirs: dict[str, nn.Module] = dict(layer.named_modules())
        own: dict[str, nn.Module] = dict(player.named_modules())
        found: dict[str, tuple[dict[str, object], dict[str, Any]]] = {}
        hollow = tuple(f"{path}." for path, module in own.items() if isinstance(module, BasicTransformerBlock))
        for path, module in theirs.items():
            if f"{path}.".startswith(hollow):  # the pack has no such block
                continue
            mine = own.get(path, module)
            if mine is module:  # shared with the layer, where it acts already, or no part of the player
                continue
            methods = overrides(module)
            if isinstance(mine, CondConv2d):  # a convolution all the same, of which one method is known
                self.lost += [_under(path, name) for name in methods if name != "forward"]
                if "forward" in methods:
                    found[path] = {"forward": methods["forward"]}, {}
                continue
            if type(module).__name__ != type(mine).__name__:
                self.lost += [_under(path, name) for name in methods] + [_under(path, type(module).__name__)]
                continue
            before = _settings(mine)
            changed = {n: v for n, v in _settings(module).items() if n in before and before[n] != v}
            hooks = {n: at for n in _HOOKS if (at := getattr(module, n))}
            self._given += [f"{path}.{n}={list(at)}" for n, at in hooks.items()]
            changed |= hooks
            if methods or changed:
                found[path] = methods, changed
        self.player = player
        if not found:
            return
        twins = _twins(player, found)
        partners = {id(theirs[path]): twins.get(path, own[path]) for path in theirs if path in own}
        rebound = Rebinding(partners, WHOLE)
        for path, (methods, changed) in found.items():
            module, twin = theirs[path], twins[path]
            vars(twin).update(changed)
            self._given += [f"{path}.{n}={v}" for n, v in changed.items() if n not in _HOOKS]
            if methods:
                self._kept.append(_Kept(path, module, twin, frozenset({*vars(twin), *methods}), rebound))
            for name, value in methods.items():
                try:
                    vars(twin)[name] = rebound(value)
                except Opaque:
                    self.lost.append(_under(path, name))
                    continue
                self._given.append(f"{path}.{name}@{_identity(value)}")
                # So that no other function gets its identity while this player is in a compiled graph.
                vars(twin).setdefault("asdm_carried", []).append(value)
        self.player = twins[""]
        self._loaded = [(vars(own[path]), vars(twin)) for path, twin in twins.items() if "_pin_state" in vars(twin)]
        self.refresh()

    def refresh(self) -> bool:
        """Give the player what functions of others may look for on its layer, where they put it anew before a step.
        Returns whether more is lost.
        """
        for own, twin in self._loaded:
            twin.update({n: own[n] for n in _LOADED if n in own})
        lost = [_under(kept.path, name) for kept in self._kept for name in kept.refresh()]
        self.lost += [name for name in lost if name not in self.lost]
        return bool(lost)

    def hand_back(self) -> None:
        """Give the layer what such functions have put on the player meanwhile, and the pack's own modules what the host
        has, which would bring them to the card anew in the next run.
        """
        for own, twin in self._loaded:
            own.update({n: twin[n] for n in _LOADED if n in twin})
        for kept in self._kept:
            kept.hand_back()

    @property
    def name(self) -> str:
        return ";".join(self._given)


@dataclass
class _Kept:
    """What others keep on a module, on its twin as well. own: what the twin has by itself, or by another way."""

    path: str
    module: nn.Module
    twin: nn.Module
    own: frozenset[str]
    rebound: Rebinding
    known: dict[str, tuple[object, object]] = field(default_factory=dict)  # what is on the module, and on its twin

    def refresh(self) -> list[str]:
        """Returns the names of functions that hold a layer of the checkpoint where it cannot be exchanged."""
        found = {n: v for n, v in vars(self.module).items() if n not in self.own and not n.startswith(_HOSTS)}
        for name in self.known.keys() - found.keys():
            del self.known[name]
            vars(self.twin).pop(name, None)
        lost = []
        for name, value in found.items():
            if name not in self.known or self.known[name][0] is not value:
                given = value  # shared, whatever it is
                if isinstance(value, _FUNCTIONS):
                    try:
                        given = self.rebound(value)
                    except Opaque:
                        lost.append(name)
                vars(self.twin)[name], self.known[name] = given, (value, given)
        return lost

    def hand_back(self) -> None:
        """Put on the module what the player has put on itself since, as its forward would have on the module."""
        for name, (_, given) in list(self.known.items()):
            value = vars(self.twin).get(name)
            if name in vars(self.twin) and value is not given:
                vars(self.module)[name], self.known[name] = value, (value, value)


def _under(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _identity(value: object) -> str:
    hook = getattr(value, "__self__", None)
    return f"{id(hook.adapter)}*{hook.multiplier}" if isinstance(hook, BypassForwardHook) else str(id(value))


def _twins(root: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """Copies of the modules at some paths and of all that hold them; they share everything else."""
    twins: dict[str, nn.Module] = {}

    def twin(path: str) -> nn.Module:
        if path not in twins:
            module = root.get_submodule(path)
            if "_pin_state" in vars(module):  # in one table: else the host pins the same weights for every twin
                vars(module).setdefault("_pins", {})
            twins[path] = made = copy.copy(module)
            made._modules = dict(made._modules)
            if path:
                parent, _, name = path.rpartition(".")
                twin(parent)._modules[name] = made
        return twins[path]

    for path in ("", *paths):
        twin(path)
    return twins
