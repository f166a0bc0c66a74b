"""What other nodes have put on single layers of the checkpoint, carried over to who plays them in its place.

Packs put a forward of their own on a module, by an object patch or directly, and hold the module's own one in a closure
or an object. Carried over, such a function is the same function with the player's modules in place of the checkpoint's;
whatever else it holds it shares. Bypass LoRAs of the host are of this kind. What holds the checkpoint's modules where
nobody can see it, and modules that stand in place of others with weights of their own, cannot be carried over.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

from comfy.weight_adapter import BypassForwardHook
from torch import Tensor, nn

from ...asdm_core.condconv import CondConv2d
from .units import BasicTransformerBlock

DEPTH = 6  # forwards round forwards

# Set on modules by the host as it loads them, and by what the layers of packs are made of.
_HOSTS = ("comfy_", "prev_comfy_", "training", "weight_function", "bias_function", "_v", "_pin", "factory_kwargs")
_HOOKS = [
    f"_forward{kind}hooks{more}"
    for kind in ("_", "_pre_")
    for more in ("", "_with_kwargs", *(["_always_called"] if kind == "_" else []))
]
_PLAIN = (int, float, str, bool, tuple, type(None))
_LEAVES = (str, bytes, int, float, Tensor, type, ModuleType, type(None))


class _Opaque(Exception):
    """Something holds a module of the checkpoint where it cannot be exchanged."""


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
        for path, (methods, changed) in found.items():
            module, twin = theirs[path], twins[path]
            vars(twin).update(changed)
            self._given += [f"{path}.{n}={v}" for n, v in changed.items() if n not in _HOOKS]
            if methods:  # what these may look for on the module
                more = {n: v for n, v in vars(module).items() if n not in vars(twin) and not n.startswith(_HOSTS)}
                vars(twin).update({n: v for n, v in more.items() if n not in methods})
            for name, value in methods.items():
                try:
                    vars(twin)[name] = _rebound(value, partners, {})
                except _Opaque:
                    self.lost.append(_under(path, name))
                    continue
                self._given.append(f"{path}.{name}@{_identity(value)}")
                # So that no other function gets its identity while this player is in a compiled graph.
                vars(twin).setdefault("asdm_carried", []).append(value)
        self.player = twins[""]

    @property
    def name(self) -> str:
        return ";".join(self._given)


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
            twins[path] = made = copy.copy(root.get_submodule(path))
            made._modules = dict(made._modules)
            if path:
                parent, _, name = path.rpartition(".")
                twin(parent)._modules[name] = made
        return twins[path]

    for path in ("", *paths):
        twin(path)
    return twins


def _rebound(value, partners: Mapping[int, nn.Module], made: dict[int, Any], depth: int = DEPTH):
    """A function with the player's modules in place of the checkpoint's. made: by the id of what they stand in for, so
    that what holds itself, as an object with one of its own methods, is met again. Raises _Opaque.
    """
    if isinstance(value, nn.Module):
        return partners.get(id(value), value)
    if id(value) in made:
        return made[id(value)]
    if not _leads_to(value, partners, set(), depth):
        return value
    if not depth:
        raise _Opaque
    again = functools.partial(_rebound, partners=partners, made=made, depth=depth - 1)
    if isinstance(value, MethodType):
        old, function = value.__self__, value.__func__
        new = again(old)
        if function is getattr(
            type(old), value.__name__, None
        ):  # the player may be of another class, as for other dtypes
            function = getattr(type(new), value.__name__, function)
        return MethodType(again(function), new)
    if isinstance(value, functools.partial):
        parts = again(value.func), tuple(map(again, value.args)), {k: again(v) for k, v in value.keywords.items()}
        return functools.partial(parts[0], *parts[1], **parts[2])
    if isinstance(value, FunctionType):
        return _function_rebound(value, again, made)
    if type(value) in (list, tuple):
        return type(value)(map(again, value))
    if type(value) is dict:
        return {k: again(v) for k, v in value.items()}
    direct = _direct(value)
    others = [v for n, v in getattr(value, "__dict__", {}).items() if n not in direct]
    if not direct or any(_holds(v, partners, DEPTH, {id(value)}) for v in others):
        raise _Opaque  # a table of modules, say: who looks into it asks for those of the checkpoint
    new = made[id(value)] = copy.copy(value)  # of this one module; what it shares with others it goes on sharing
    vars(new).update({n: again(v) for n, v in direct.items()})
    return new


def _function_rebound(function: FunctionType, again: Callable[[Any], Any], made: dict[int, Any]) -> FunctionType:
    cells = tuple(CellType() for _ in function.__closure__ or ())
    new = made[id(function)] = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
    for n, value in _closed_over(function).items():
        cells[n].cell_contents = again(value)
    new.__defaults__, new.__kwdefaults__ = again(function.__defaults__), again(function.__kwdefaults__)
    vars(new).update(vars(function))
    return new


def _closed_over(function: FunctionType) -> dict[int, object]:
    """What a function has closed over, by number; what is not assigned yet is not there."""
    found = {}
    for n, cell in enumerate(function.__closure__ or ()):
        with suppress(ValueError):
            found[n] = cell.cell_contents
    return found


def _direct(value: object) -> dict[str, Any]:
    """What of an object's own is exchanged with it: modules and functions, by name."""
    kinds = nn.Module | MethodType | FunctionType | functools.partial
    return {n: v for n, v in getattr(value, "__dict__", {}).items() if isinstance(v, kinds)}


def _leads_to(value: object, partners: Mapping[int, nn.Module], seen: set[int], depth: int) -> bool:
    """Whether the ways that `_rebound` goes from something lead to a module of the checkpoint, or further than it
    goes.
    """
    if isinstance(value, nn.Module):
        return id(value) in partners
    if id(value) in seen or isinstance(value, _LEAVES):
        return False
    if not depth:
        return True
    seen.add(id(value))
    if isinstance(value, MethodType):
        ways: Iterable[object] = (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        ways = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, FunctionType):
        ways = (*_closed_over(value).values(), value.__defaults__, value.__kwdefaults__)
    elif type(value) in (list, tuple):
        ways = value  # type: ignore[assignment]
    elif type(value) is dict:
        ways = value.values()
    elif _holds(value, partners, DEPTH, set()):
        return True
    else:
        ways = _direct(value).values()
    return any(_leads_to(way, partners, seen, depth - 1) for way in ways)


def _holds(value: object, partners: Mapping[int, nn.Module], depth: int, seen: set[int]) -> bool:
    """Whether something holds a module of the checkpoint, itself or in what it holds."""
    if isinstance(value, nn.Module):
        return id(value) in partners
    if not depth or id(value) in seen or isinstance(value, _LEAVES):
        return False
    seen.add(id(value))
    inside = [*getattr(value, "__dict__", {}).values(), getattr(value, "__self__", None)]
    if isinstance(value, Mapping):
        inside += [*value.values(), *(k for k in value if isinstance(k, nn.Module))]
    elif isinstance(value, list | tuple | set):
        inside += value
    return any(_holds(v, partners, depth - 1, seen) for v in inside)
