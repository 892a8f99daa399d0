"""What a copy must not have: code that would still run on, or write into, the original."""

import dis
import functools
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from .classes import ALL_HOOKS, ATOMS, HOOKS, defaults_of, functions_in, inside_of
from .methods import functions_beside, globals_of, named_by
from .walking import modules_of, named_modules_of


def refuse_what_reaches_back(module: nn.Module) -> None:
    """Raise ValueError where a copy's code would still run on, or write into, the original."""
    own = {id(m) for m in modules_of(module)}
    kinds = set[type]()
    for name, part in named_modules_of(module):
        where = f"{type(part).__name__}" + (f" ({name})" if name else "")
        if inside_of(part) is None:
            _refuse_functions(part, where, own)
        if type(part) not in kinds:
            kinds.add(type(part))
            _refuse_methods(part, where, own)
        for hook in (h for kind in HOOKS for h in vars(part)[kind].values()):
            if any(id(value) in own for value in _captured(hook, _read_by_methods(own))):
                raise ValueError(
                    f"expected hooks that reach their module through their arguments, got {_name(hook)} on {where}, "
                    f"which captures a part of the model itself and would write into it from the copy. Remove the "
                    f"hook before wrapping, or use the module that the hook is handed"
                )


def _refuse_functions(part: nn.Module, where: str, own: set[int]) -> None:
    for name, value in vars(part).items():
        if type(value) in ATOMS or name in ALL_HOOKS or name == "_compiled_call_impl":  # the latter is not copied
            continue
        if name == "forward":
            _refuse_forward(value, where, own)
            continue
        functions = [item for item in _inside(value) if isinstance(item, _CAPTURING)]
        if any(id(captured) in own for function in functions for captured in _captured(function, enclosed=False)):
            raise ValueError(
                f"expected functions in attributes that are free of the model itself, got {name} of {where}, which "
                f"names a part of it as a global, or caches what it gives, and would run on the original from the "
                f"copy. Make it a method of the class"
            )


def _refuse_methods(part: nn.Module, where: str, own: set[int]) -> None:
    for first in ("forward", "__call__"):
        for function, name, _ in named_by(type(part), first, own):
            raise ValueError(
                f"expected methods that reach the model through self alone, got {function} of {where}, in which {name} "
                f"is a part of the model: a global, a variable of a closure, a default or an attribute of a class, or "
                f"in a container there; it would run on the original from the copy. Assign it to an attribute in "
                f"__init__, and use that"
            )


def _refuse_forward(forward: object, where: str, own: set[int]) -> None:
    """What it has enclosed is exchanged in a copy; what it names as a global, or caches, cannot be."""
    compiled = getattr(forward, "_torchdynamo_orig_callable", None)
    if any(id(value) in own for value in _captured(compiled or forward, enclosed=False)):
        raise ValueError(
            f"expected forward to be a method of the class, got one patched on the instance of {where}, whose "
            f"copy would still run the original. Define a subclass with that forward and wrap it"
        )


_Objects = Callable[[object], Iterator[object]]
_CAPTURING = (types.FunctionType, types.MethodType, functools.partial, functools._lru_cache_wrapper)
"""What :func:`_captured` looks into."""


def _captured(function: object, others: _Objects = lambda _: iter(()), *, enclosed: bool = True) -> Iterator[object]:
    """What a function reaches besides what it is handed: closures, defaults, and the globals that its own code reads.

    Args:
        function: or a partial of one, or one with a cache; a deep copy takes other objects along, and bound methods.
        others: what an object that is none of these reaches.
        enclosed: whether modules in closures and defaults count.
    """
    seen, stack = set[int](), [function]
    while stack:
        inner = stack.pop()
        if id(inner) in seen:
            continue
        seen.add(id(inner))
        if isinstance(inner, functools.partial):
            stack += [inner.func, *(v for v in (*inner.args, *inner.keywords.values()) if callable(v))]
        elif isinstance(inner, functools._lru_cache_wrapper):  # which a deep copy leaves as it is
            cached = inner.__wrapped__
            yield cached.__self__ if isinstance(cached, types.MethodType) else cached
            stack.append(cached)
        elif isinstance(inner, types.FunctionType):
            values = [cell.cell_contents for cell in inner.__closure__ or () if _filled(cell)]
            values += defaults_of(inner)
            if enclosed:
                yield from (value.__self__ if isinstance(value, types.MethodType) else value for value in values)
            named = [inner.__globals__.get(name) for name in globals_of(inner.__code__)]
            yield from named
            stack += (*values, *(function for value in named for function in functions_beside(inner, value)))
        elif isinstance(inner, types.MethodType):
            if (
                getattr(type(inner.__self__), getattr(inner, "__name__", ""), None) is not inner.__func__
            ):  # made for this instance
                stack.append(inner.__func__)
            yield from others(inner)
        else:
            yield from others(inner)


def _read_by_methods(own: set[int]) -> _Objects:
    """What a hook that is a method, or an object, reads of its owner's attributes, which is no part of the model.

    Also what such hooks, the model's own included, name besides.
    """

    def read(hook: object) -> Iterator[object]:
        owner, names, first = hook, iter(["__call__"]), "__call__"
        if isinstance(hook, types.MethodType):
            owner, names, first = hook.__self__, _names_read(hook.__func__), getattr(hook, "__name__", "")
        yield from (module for *_, module in named_by(type(owner), first, own))
        if id(owner) in own or not hasattr(owner, "__dict__"):
            return
        seen, stack = set[str](), list(names)
        while stack:
            name = stack.pop()
            if name in seen:
                continue
            seen.add(name)
            yield from _inside(vars(owner).get(name))
            stack += _names_read(getattr(type(owner), name, None))

    return read


def _names_read(method: object) -> Iterator[str]:
    for function in functions_in(method):
        yield from _read(function.__code__, "LOAD_ATTR", "LOAD_METHOD")


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, (list, tuple, set, deque)) else [value]


def _read(code: types.CodeType, *operations: str) -> Iterator[str]:
    yield from (step.argval for step in dis.get_instructions(code) if step.opname in operations)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _read(constant, *operations)


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _name(hook: object) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__name__))
