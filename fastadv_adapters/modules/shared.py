"""What code keeps outside of a model, where all models of a class find it: in classes, globals, closures, defaults.

A run of a copy writes there, too. What stands for a value in such a run must not stay there.
"""

import functools
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from .classes import ATOMS, defaults_of, functions_in, names_in, things_of
from .leaving_out import is_trainer
from .process_wide import is_process_wide
from .walking import modules_of

_KNOWN = sys.stdlib_module_names | {"torch", "torchvision", "numpy", __name__.partition(".")[0]}
"""What code of these keeps is no model's."""
_CONTAINERS = (dict, list, set, deque)


@contextmanager
def put_back(module: nn.Module, is_foreign: Callable[[Any], bool]) -> Iterator[None]:
    """Leave no foreign object where the code of a module may write: a place that has got one is as it was before."""
    kept = [(place, _entries(place)) for place in _places(module)]
    try:
        yield
    finally:
        for place, before in kept:
            changed = [(k, v) for k, v in _entries(place).items() if k not in before or before[k] is not v]
            if any(_holds(item, is_foreign, set()) for pair in changed for item in pair):
                _restore(place, before)


class _Globals(NamedTuple):
    """Those of a file that code names: what else is there may change meanwhile."""

    own: dict[str, Any]
    names: frozenset[str]


def _places(module: nn.Module) -> Iterator[Any]:
    """Containers, classes, cells and globals in reach of what the forward of a module, or of a part, may run."""
    seen = {id(part): part for part in modules_of(module)}  # it holds them: nothing else gets the identity of one
    stack: list[Any] = [item for part in modules_of(module) for item in (type(part), *things_of(part).values())]
    methods = _Methods()
    while stack or (stack := methods.due()):
        value = stack.pop()
        if type(value) in ATOMS or id(value) in seen or isinstance(value, Tensor):
            continue
        seen[id(value)] = value
        places = _places_in(value)
        yield from places
        if isinstance(value, types.FunctionType):
            methods.named.update(names_in(value.__code__))
        entries = [entry for place in places for entry in _entries(place).items()]
        stack += methods.others(entries) if isinstance(value, type) else (held for _, held in entries)
        stack += _named_in(value)


class _Methods:
    """Those of classes, of which a forward runs some: a base class of a library has many others, which reach far."""

    def __init__(self) -> None:
        self.named = {"forward", "__call__", "__getitem__", "__setitem__", "__contains__", "__getattr__"}
        self._waiting: list[tuple[str, list[types.FunctionType]]] = []

    def others(self, entries: Sequence[tuple[str, Any]]) -> list[Any]:
        """What else is in a class; the methods wait."""
        found = [(name, functions_in(value)) for name, value in entries]
        self._waiting += [pair for pair in found if pair[1]]
        return [value for (_, value), (_, functions) in zip(entries, found, strict=True) if not functions]

    def due(self) -> list[Any]:
        """Those that code has named by now."""
        due = [functions for name, functions in self._waiting if name in self.named]
        self._waiting = [pair for pair in self._waiting if pair[0] not in self.named]
        return [function for functions in due for function in functions]


def _places_in(value: Any) -> list[Any]:
    """Where an object itself keeps what it has."""
    if isinstance(value, (*_CONTAINERS, types.CellType)):
        return [value]
    if isinstance(value, type):
        return [base for base in value.__mro__ if not _is_known(base)]
    if isinstance(value, types.FunctionType) and not _is_known(value):
        names = frozenset(names_in(value.__code__))
        modules = [m for m in map(value.__globals__.get, names) if isinstance(m, types.ModuleType) and not _is_known(m)]
        files = [_Globals(one, names) for one in (value.__globals__, *map(vars, modules))]
        return [vars(value), *files, *(value.__closure__ or ())]
    return [vars(value)] if _is_object(value) else []


def _named_in(value: Any) -> list[Any]:
    """What it runs or holds besides."""
    if isinstance(value, functools.partial):
        return [value.func, *value.args, value.keywords]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, types.FunctionType):
        return list(defaults_of(value))
    if isinstance(value, tuple):
        return list(value)
    return [type(value)] if _is_object(value) else list(functions_in(value))


def _is_object(value: Any) -> bool:
    """Whether it is of a class that people write, or a module of layers."""
    if isinstance(value, (type, types.ModuleType, types.FunctionType)) or is_process_wide(value) or is_trainer(value):
        return False
    written = isinstance(value, (nn.Module, types.SimpleNamespace)) or not _is_known(type(value))
    return written and isinstance(getattr(value, "__dict__", None), dict)  # a __getattr__ may make up one


def _is_known(value: Any) -> bool:
    name = getattr(value, "__name__" if isinstance(value, types.ModuleType) else "__module__", "")
    return str(name).partition(".")[0] in _KNOWN


def _entries(place: Any) -> dict[Any, Any]:
    """What a place holds now, by key."""
    if isinstance(place, _Globals):
        return {name: place.own[name] for name in place.names if name in place.own}
    if isinstance(place, types.CellType):
        try:
            return {"cell_contents": place.cell_contents}
        except ValueError:  # it is empty
            return {}
    if isinstance(place, dict):
        return dict(place)
    return dict(vars(place)) if isinstance(place, type) else dict(enumerate(tuple(place)))


def _restore(place: Any, before: dict[Any, Any]) -> None:
    if isinstance(place, (list, set, deque)):
        place.clear()
        (place.update if isinstance(place, set) else place.extend)(before.values())
        return
    held = place.own if isinstance(place, _Globals) else place
    put, take = (dict.__setitem__, dict.__delitem__) if isinstance(held, dict) else (setattr, delattr)
    now = _entries(place)
    for key in now.keys() - before.keys():
        take(held, key)
    for key, value in before.items():
        if key not in now or now[key] is not value:
            put(held, key, value)


def _holds(value: Any, is_foreign: Callable[[Any], bool], seen: set[int]) -> bool:
    """Whether it is foreign, or holds what is."""
    if type(value) in ATOMS or id(value) in seen or isinstance(value, Tensor):
        return False
    seen.add(id(value))
    if is_foreign(value):
        return True
    inside = list(value) if isinstance(value, (*_CONTAINERS, tuple)) else []
    inside += value.values() if isinstance(value, dict) else vars(value).values() if _is_object(value) else ()
    return any(_holds(item, is_foreign, seen) for item in inside)
