"""What the methods of a class reach besides ``self``, in globals, closures and defaults: in a copy, too, the original.

Only what a forward or a hook runs counts: what other methods name, such as a training step, no copy ever runs.
"""

import dis
import functools
import itertools
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from .classes import functions_in, kind_of, names_in
from .walking import modules_of

_CONTAINERS = (list, tuple, set, deque)


def named_by(kind: type, first: str, own: set[int]) -> Iterator[tuple[str, str, object]]:
    """The functions that a method runs, names there by which they reach one of these objects, and the object.

    Args:
        kind: the class; PyTorch's own bases of it, and those of this package, reach nothing.
        first: the name of the method.
        own: the identities of the parts of a model.
    """
    bases = [base for base in kind.__mro__ if not _is_known(base)]
    classes = tuple(base.__name__ for base in bases)
    seen, waiting, made = set[str](), [first], set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        attributes = [vars(base)[name] for base in bases if name in vars(base)]
        held = attributes if name not in made else []
        yield from ((f"{kind.__qualname__}.{first}", name, part) for value in held for part in _parts_in(value, own))
        for function in _with_inner(f for attribute in attributes for f in functions_in(attribute)):
            for found, value in _reached_by(function):
                held = [value, *(_named_on(value, function.__code__) if isinstance(value, type) else ())]
                yield from ((function.__qualname__, found, part) for one in held for part in _parts_in(one, own))
            made |= _set_by(function.__code__)
            waiting += _asked_of_itself(function.__code__, classes)


def _parts_in(value: Any, own: set[int]) -> Iterator[object]:
    """These parts of a model in a value: itself, the owner of a method, or what a container holds."""
    value = value.__self__ if isinstance(value, types.MethodType) else value
    held = value.values() if isinstance(value, dict) else value if isinstance(value, _CONTAINERS) else (value,)
    yield from (part for part in list(held) if id(part) in own)


def _named_on(kind: type, code: types.CodeType) -> list[Any]:
    """What code reads of a class of modules, and does not set itself, as what is being run."""
    if not issubclass(kind, nn.Module):
        return []
    names = set(names_in(code)) - _set_by(code)
    return [vars(base)[name] for base in kind.__mro__ for name in names if name in vars(base)]


@functools.lru_cache(maxsize=4096)
def _set_by(code: types.CodeType) -> frozenset[str]:
    """The attributes that code sets."""
    return frozenset(step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR")


def are_listed(network: nn.Module) -> bool:
    """Whether a class of a part keeps a list of parts of the model, through which a copy would write into the model."""
    parts = list(modules_of(network))
    own = set(map(id, parts))
    bases = {base for kind in set(map(kind_of, parts)) for base in kind.__mro__ if not _is_known(base)}
    return any(id(item) in own for base in bases for value in vars(base).values() for item in _items_of(value))


def _items_of(value: Any) -> list[Any]:
    """What a container holds, through weak references too; nothing of any other value."""
    if isinstance(value, (dict, weakref.WeakValueDictionary)):
        items = list(value.values())
    else:
        items = list(value) if isinstance(value, (*_CONTAINERS, weakref.WeakSet)) else []
    return [item() if isinstance(item, weakref.ref) else item for item in items]


def runs_compiled(network: nn.Module) -> set[nn.Module]:
    """The parts whose code, or that of a part inside, names a function that ``torch.compile`` was given.

    The compiler would compile with it each mode of PyTorch's functions that it is called in.
    """
    parts = list(modules_of(network))
    kinds = {kind: _names_compiled(kind) for kind in set(map(kind_of, parts))}
    own = {part for part in parts if kinds[kind_of(part)] or any(map(_is_compiled, vars(part).values()))}
    return {part for part in parts if not own.isdisjoint(modules_of(part))} if own else set()


def _names_compiled(kind: type) -> bool:
    items = [item for base in kind.__mro__ if not _is_known(base) for item in vars(base).values()]
    functions = list(_with_inner(function for item in items for function in functions_in(item)))
    return any(map(_is_compiled, functions)) or any(
        _is_compiled(value) or (isinstance(value, types.ModuleType) and _has_compiled(value, function))
        for function in functions
        for _, value in _reached_by(function)
    )


def _has_compiled(module: types.ModuleType, function: types.FunctionType) -> bool:
    return any(_is_compiled(vars(module).get(name)) for name in names_in(function.__code__))


def _is_compiled(value: object) -> bool:
    functions = functions_in(value) if isinstance(value, (types.FunctionType, types.MethodType)) else ()
    return any("_torchdynamo_orig_callable" in vars(function) for function in functions)


def _is_known(base: type) -> bool:
    return base is object or base.__module__.partition(".")[0] in ("torch", __name__.partition(".")[0])


def _with_inner(functions: Iterable[types.FunctionType]) -> Iterator[types.FunctionType]:
    """These, functions that they have enclosed or as a default, and those of the same file that they name."""
    seen, stack = set[int](), list(functions)
    while stack:
        function = stack.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        yield function
        stack += (inner for _, value in _reached_by(function) for inner in functions_beside(function, value))


def functions_beside(function: types.FunctionType, value: object) -> list[types.FunctionType]:
    """The functions in this one if it is of the same file; a library's reach no model."""
    inner = functions_in(value) if isinstance(value, types.FunctionType) else []
    return [one for one in inner if one.__globals__ is function.__globals__]


def _reached_by(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What this function reads of globals and its closure, and the defaults of its arguments, by name."""
    code, defaults = function.__code__, function.__defaults__ or ()
    yield from ((name, function.__globals__.get(name)) for name in globals_of(code))
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # it is empty
            continue
    yield from zip(code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount], defaults, strict=True)
    yield from (function.__kwdefaults__ or {}).items()


@functools.lru_cache(maxsize=4096)
def globals_of(code: types.CodeType) -> tuple[str, ...]:
    """The globals that code reads, and the functions in it."""
    found = [step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"]
    return *found, *(name for inner in _codes_in(code) for name in globals_of(inner))


@functools.lru_cache(maxsize=4096)
def _asked_of_itself(code: types.CodeType, classes: tuple[str, ...], itself: str = "") -> tuple[str, ...]:
    """The attributes that code asks its first argument for, or one of these classes, or ``super()``."""
    itself = itself or "".join(code.co_varnames[:1])
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("EXTENDED_ARG", "PUSH_NULL")]
    owners, found = {itself, *classes}, list[str]()
    for before, step in itertools.pairwise(steps):
        asked = before.argval[-1] if isinstance(before.argval, tuple) and before.argval else before.argval
        of_super = step.opname.startswith("LOAD_SUPER") or (
            "super" in code.co_names and before.opname.startswith("CALL")
        )
        of_itself = before.opname.startswith(("LOAD_", "STORE_FAST_LOAD")) and asked in owners
        if step.opname.startswith(("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER")) and (of_super or of_itself):
            found.append(str(step.argval))
    return *found, *(name for inner in _codes_in(code) for name in _asked_of_itself(inner, classes, itself))


def _codes_in(code: types.CodeType) -> list[types.CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
