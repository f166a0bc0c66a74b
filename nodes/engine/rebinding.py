"""Functions of other nodes with other modules in the place of those that they hold.

Packs hold a layer, or its own method, in a closure, in an object or in a partial; compiled modules hold what they
compiled. Rebound, such a thing is the same with partners in the place of the layers; whatever else it holds it shares.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

DEPTH = 6  # forwards round forwards

_LEAVES = (str, bytes, int, float, Tensor, type, ModuleType, type(None))


class Opaque(Exception):
    """Something holds a module where it cannot be exchanged."""


class Rebinding:
    """partners: by the id of each module what takes its place. ignored: classes that are taken to hold none. doubtful:
    whether what lies deeper than is looked counts as a module.
    """

    def __init__(self, partners: Mapping[int, nn.Module], ignored: tuple[type, ...] = (), doubtful: bool = True):
        self._partners, self._leaves, self._doubtful = partners, (*_LEAVES, *ignored), doubtful

    def __call__(self, value):
        """Raises Opaque."""
        return self._rebound(value, {}, DEPTH)

    def concerns(self, value: object) -> bool:
        """Whether something holds one of the modules."""
        return self._leads(value, set(), DEPTH)

    def _rebound(self, value, made: dict[int, Any], depth: int):
        """made: by the id of what they stand in for, so that what holds itself, as an object with one of its own
        methods, is met again.
        """
        if isinstance(value, nn.Module) and not _is_compiled(value):
            if id(value) not in self._partners and self._leads(value, set(), depth):
                raise Opaque
            return self._partners.get(id(value), value)
        if id(value) in made:
            return made[id(value)]
        if not self._leads(value, set(), depth):
            return value
        if not depth:
            raise Opaque
        again = functools.partial(self._rebound, made=made, depth=depth - 1)
        if _is_compiled(value):
            made[id(value)] = compiled = value.dynamo_ctx(again(value._orig_mod))
            return compiled
        if isinstance(value, MethodType):
            old, function = value.__self__, value.__func__
            new = again(old)
            if function is getattr(type(old), value.__name__, None):  # the partner may be of another class
                function = getattr(type(new), value.__name__, function)
            return MethodType(again(function), new)
        if isinstance(value, functools.partial):
            parts = again(value.func), tuple(map(again, value.args)), {k: again(v) for k, v in value.keywords.items()}
            return functools.partial(parts[0], *parts[1], **parts[2])
        if isinstance(value, FunctionType):
            return self._function(value, made, depth)
        if type(value) in (list, tuple):
            return type(value)(map(again, value))
        if type(value) is dict:
            return {k: again(v) for k, v in value.items()}
        direct = _direct(value)
        others = [v for n, v in getattr(value, "__dict__", {}).items() if n not in direct]
        if not direct or any(self._holds(v, DEPTH, {id(value)}) for v in others):
            raise Opaque  # a table of modules, say: who looks into it asks for the old ones
        new = made[id(value)] = copy.copy(value)  # of this one module; what it shares with others it goes on sharing
        vars(new).update({n: again(v) for n, v in direct.items()})
        return new

    def _function(self, function: FunctionType, made: dict[int, Any], depth: int) -> FunctionType:
        again = functools.partial(self._rebound, made=made, depth=depth - 1)
        cells = tuple(CellType() for _ in function.__closure__ or ())
        new = made[id(function)] = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
        for n, value in _closed_over(function).items():
            cells[n].cell_contents = again(value)
        new.__defaults__, new.__kwdefaults__ = again(function.__defaults__), again(function.__kwdefaults__)
        vars(new).update(vars(function))
        return new

    def _leads(self, value: object, seen: set[int], depth: int) -> bool:
        """Whether the ways that `_rebound` goes from something lead to one of the modules, or further than it goes."""
        if id(value) in self._partners:
            return True
        if id(value) in seen or isinstance(value, self._leaves):
            return False
        if not depth:
            return self._doubtful
        seen.add(id(value))
        if _is_compiled(value):
            ways: Iterable[object] = (value._orig_mod,)  # type: ignore[attr-defined]
        elif isinstance(value, nn.Module):
            return self._holds(value, DEPTH, set())
        elif isinstance(value, MethodType):
            ways = (value.__self__, value.__func__)
        elif isinstance(value, functools.partial):
            ways = (value.func, *value.args, *value.keywords.values())
        elif isinstance(value, FunctionType):
            ways = (*_closed_over(value).values(), value.__defaults__, value.__kwdefaults__)
        elif type(value) in (list, tuple):
            ways = value  # type: ignore[assignment]
        elif type(value) is dict:
            ways = value.values()
        elif self._holds(value, DEPTH, set()):
            return True
        else:
            ways = _direct(value).values()
        return any(self._leads(way, seen, depth - 1) for way in ways)

    def _holds(self, value: object, depth: int, seen: set[int]) -> bool:
        """Whether something holds one of the modules, itself or in what it holds."""
        if id(value) in self._partners:
            return True
        if not depth or id(value) in seen or isinstance(value, self._leaves):
            return False
        seen.add(id(value))
        inside = [*getattr(value, "__dict__", {}).values(), getattr(value, "__self__", None)]
        if isinstance(value, Mapping):
            inside += [*value.values(), *(k for k in value if isinstance(k, nn.Module))]
        elif isinstance(value, list | tuple | set):
            inside += value
        return any(self._holds(v, depth - 1, seen) for v in inside)


def _is_compiled(value: object) -> bool:
    """Whether something is a compiled module; asked without loading the compiler."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and isinstance(value, compiler.OptimizedModule)


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
