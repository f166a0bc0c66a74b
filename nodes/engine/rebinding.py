"""Functions of other nodes with other modules in the place of those that they hold.

Packs hold a layer, or its own method, in a closure, in an object or in a partial; compiled modules hold what they
compiled. Rebound, such a thing is the same with partners in the place of the layers; whatever else it holds it shares.
What it puts in another's place later (an attribute, a closed over variable) it has to itself, or shares as well.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from types import CellType, FunctionType, MethodType, ModuleType, new_class
from typing import Any

from torch import Tensor, nn

DEPTH = 6  # forwards round forwards

_LEAVES = (str, bytes, int, float, Tensor, type, ModuleType, type(None))


class Opaque(Exception):
    """Something holds a module where it cannot be exchanged."""


class Rebinding:
    """partners: by the id of each module what takes its place. ignored: classes that are taken to hold none. doubtful:
    whether what lies deeper than is looked counts as a module. shared: whether what is rebound and what it was share
    their attributes and variables from then on, and all that is rebound is of one piece: as for things that act on the
    modules and on their partners in turns.
    """

    def __init__(
        self,
        partners: Mapping[int, nn.Module],
        ignored: tuple[type, ...] = (),
        doubtful: bool = True,
        shared: bool = False,
    ):
        self._partners, self._leaves, self._doubtful = partners, (*_LEAVES, *ignored), doubtful
        self._shared = shared
        self._made: dict[int, tuple[Any, Any]] = {}

    def __call__(self, value):
        """Raises Opaque."""
        made = self._made.copy()
        rebound = self._rebound(value, made, DEPTH)
        if self._shared:
            self._made = made
        return rebound

    def concerns(self, value: object) -> bool:
        """Whether something holds one of the modules."""
        return self._leads(value, set(), DEPTH)

    def _rebound(self, value, made: dict[int, tuple[Any, Any]], depth: int):
        """made: what was rebound and what it became, by the id of the former, so that what holds itself, as an object
        with one of its own methods, is met again.
        """
        if isinstance(value, nn.Module) and not _is_compiled(value):
            if id(value) not in self._partners and self._leads(value, set(), depth):
                raise Opaque
            return self._partners.get(id(value), value)
        if id(value) in made:
            return made[id(value)][1]
        if not self._leads(value, set(), depth):
            return value
        if not depth:
            raise Opaque
        again = functools.partial(self._rebound, made=made, depth=depth - 1)
        if _is_compiled(value):
            compiled = value.dynamo_ctx(again(value._orig_mod))
            made[id(value)] = value, compiled
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
        # Of this one module; what it shares with others it goes on sharing.
        new = _view(value) if self._shared else copy.copy(value)
        made[id(value)] = value, new
        for n, v in direct.items():
            if not self._shared:
                vars(new)[n] = again(v)
            elif (partner := again(v)) is not v:
                setattr(type(new), n, _shown(n, v, partner))
        return new

    def _function(self, function: FunctionType, made: dict[int, tuple[Any, Any]], depth: int) -> FunctionType:
        again = functools.partial(self._rebound, made=made, depth=depth - 1)
        closed = {
            n: value
            for n, value in _closed_over(function).items()
            if not self._shared or self._leads(value, set(), depth - 1)
        }
        cells = tuple(
            cell if self._shared and n not in closed else CellType()
            for n, cell in enumerate(function.__closure__ or ())
        )
        new = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
        made[id(function)] = function, new
        for n, value in closed.items():
            cells[n].cell_contents = again(value)
        new.__defaults__, new.__kwdefaults__ = again(function.__defaults__), again(function.__kwdefaults__)
        new.__dict__ = vars(function) if self._shared else dict(vars(function))
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


def _view(value: object) -> Any:
    """An object of the same attributes as another one, whatever is put on either; its class is its own, to show some of
    them otherwise. Raises Opaque for one that cannot have such a double.
    """
    kind = type(value)
    if any(getattr(base, "__slots__", ()) for base in kind.__mro__):
        raise Opaque
    try:
        double: Any = object.__new__(new_class(kind.__name__, (kind,)))
        object.__setattr__(double, "__dict__", vars(value))
    except TypeError as error:
        raise Opaque from error
    return double


def _shown(name: str, value: object, partner: object) -> property:
    """An attribute that is a partner as long as it is this value."""

    def get(self):
        if name not in vars(self):
            raise AttributeError(name)
        now = vars(self)[name]
        return partner if now is value else now

    def put(self, new):
        vars(self)[name] = value if new is partner else new

    def delete(self):
        del vars(self)[name]

    return property(get, put, delete)


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
