"""What an attack is, as text that is the same in every process: its settings in words, its code as a short hash."""

import dis
import functools
import inspect
import numbers
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..model import FastAttackModel
from .content import bytes_of, digest
from .identity import OF_A_PROCESS, model_hash

_OF_LIBRARIES = re.compile(r"[\\/](site|dist)-packages[\\/]")
_PLAIN = (numbers.Number, str, bytes, type(None), type(...), torch.dtype)
_MUTABLE = (list, dict, set)

_LARGEST = 2**20
"""A tensor with more entries than this is told by its shape alone."""


def described(value: Any) -> str:
    """A setting in words: a function by where it is defined, an object by its class and what it was made with."""
    if isinstance(value, functools.partial):
        given = [described(item) for item in value.args]
        given += [f"{name}={described(item)}" for name, item in sorted(value.keywords.items())]
        return f"{described(value.func)}({', '.join(given)})"
    if isinstance(value, MethodType):
        return f"{described(value.__self__)}.{value.__name__}"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    if not callable(value) and "__repr__" in {name for base in type(value).__mro__[:-1] for name in vars(base)}:
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    kind = type(value)
    own = {name: setting for name, setting in _settings(value) if isinstance(setting, (int, float, str, tuple))}
    settings = ", ".join(f"{name}={setting!r}" for name, setting in own.items())
    return f"{kind.__module__}.{kind.__qualname__}" + (f"({settings})" if settings else "")


def code_of(value: Any) -> str:
    """What words leave out, as a short hash behind a blank: code, what it closes over, models. Empty if there is none.

    Of a class the code that is not of a library, whose version tells it.
    """
    seen: set[int] = set()
    told = list(_of_class(value, seen) if isinstance(value, type) else _told(value, seen, first=True))
    return f" #{digest(repr(told).encode(), 4)}" if told else ""


def arguments_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """What a function takes, or what objects of a class are made with; nothing if it is in C and does not show it."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def _settings(value: Any) -> Iterator[tuple[str, Any]]:
    """What an object was made with, as far as it keeps it; not what it counts."""
    for name in arguments_of(type(value)):
        yield name, getattr(value, name, getattr(value, f"_{name}", None))


def _told(value: Any, seen: set[int], *, first: bool = False) -> Iterator[str]:
    """All that may decide what an attack does with a value; what has no say in it gives nothing."""
    if isinstance(value, _PLAIN):
        yield repr(value)
    elif isinstance(value, Tensor):
        yield _of_tensor(value)
    elif hasattr(value, "tobytes") and hasattr(value, "dtype"):  # an array of NumPy
        yield f"{value.dtype} {digest(value.tobytes())}"
    elif isinstance(value, (tuple, list)):
        yield from _of_several(value, seen)
    elif isinstance(value, dict):
        yield from _of_several([part for item in value.items() for part in item], seen)
    elif isinstance(value, (set, frozenset)):
        yield from sorted(repr(list(_told(item, seen))) for item in value)  # texts have another order in each process
    elif id(value) not in seen:
        seen.add(id(value))
        yield from _of_object(value, seen, first=first)


def _of_several(values: Iterable[Any], seen: set[int]) -> Iterator[str]:
    for value in values:
        yield repr(list(_told(value, seen)))


def _of_object(value: Any, seen: set[int], *, first: bool) -> Iterator[str]:
    if isinstance(value, nn.Module):
        yield model_hash(value.wrapped if isinstance(value, FastAttackModel) else value)
        if first:  # an attack, and no model that one holds
            yield from _of_class(type(value), seen)
            yield from _of_several([item for name, item in _settings(value) if not _is_of_a_process(name)], seen)
    elif isinstance(value, functools.partial):
        yield from _of_several((value.func, value.args, value.keywords), seen)
    elif isinstance(value, MethodType):
        yield from _of_several((value.__func__, value.__self__), seen)
    elif isinstance(value, FunctionType):
        if first or not _is_of_library(value.__module__, value.__code__):
            yield from _of_function(value, seen)
        elif hasattr(value, "__wrapped__"):  # by a decorator of a library: torch.no_grad(), say
            yield from _told(value.__wrapped__, seen)
        else:
            yield f"{value.__module__}.{value.__qualname__}"
    elif isinstance(value, CodeType):
        yield repr((value.co_code, value.co_names, value.co_freevars))  # what it does, and not where it is written
        yield from _of_several(value.co_consts, seen)
    elif isinstance(value, type) or hasattr(value, "__qualname__"):
        if not first:  # words name it already
            yield f"{value.__module__}.{value.__qualname__}"
    else:
        code = list(_of_class(type(value), seen))
        settings = [(name, list(_told(item, seen))) for name, item in _settings(value) if not _is_of_a_process(name)]
        yield from code
        if code or not first:
            yield repr(settings)


def _of_tensor(tensor: Tensor) -> str:
    known = tensor.device.type != "meta" and tensor.numel() <= _LARGEST
    content = digest(bytes_of(tensor)) if known else ""
    return f"{tensor.dtype} {tuple(tensor.shape)} {content}"


def _of_class(kind: type, seen: set[int]) -> Iterator[str]:
    """The functions of a class and of those that it derives from, without those of libraries."""
    for base in kind.__mro__:
        for name, function in sorted(vars(base).items(), key=lambda item: item[0]):
            method = getattr(function, "__func__", getattr(function, "fget", function))  # a static one, a property
            inside = inspect.unwrap(method) if callable(method) else method
            if isinstance(inside, FunctionType) and not _is_of_library(base.__module__, inside.__code__):
                yield repr((name, list(_told(inside, seen))))


def _of_function(function: FunctionType, seen: set[int]) -> Iterator[str]:
    """Its code, its defaults, and what it finds outside of itself: numbers, texts, tensors, models and functions."""
    code = function.__code__
    yield from _told(code, seen)
    yield from _of_several((function.__defaults__, function.__kwdefaults__), seen)
    read, written = _names_in(code)
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    outside = {name: function.__globals__[name] for name in read if name in function.__globals__}
    outside |= {name: cell.cell_contents for name, cell in cells.items() if _is_filled(cell)}
    for name, value in sorted(outside.items()):
        if name not in written and not _is_of_a_process(name):
            yield repr((name, list(_of_outside(value, seen))))


def _of_outside(value: Any, seen: set[int]) -> Iterator[str]:
    """A value outside; of a list what can be called alone, for numbers and texts may be what was found so far."""
    if isinstance(value, _MUTABLE):
        items = list(value.values()) if isinstance(value, dict) else list(value)
        value = [item for item in items if callable(item)]
    if isinstance(value, (*_PLAIN, Tensor, tuple, list, frozenset)) or callable(value):
        yield from _told(value, seen)


def _names_in(code: CodeType) -> tuple[set[str], set[str]]:
    """Globals that code and functions in it read, and what they write outside of themselves: counts, say."""
    read: set[str] = set()
    written: set[str] = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            read.add(instruction.argval)
        elif instruction.opname in ("STORE_GLOBAL", "STORE_DEREF"):
            written.add(instruction.argval)
    for inside in code.co_consts:
        if isinstance(inside, CodeType):
            for known, found in zip((read, written), _names_in(inside), strict=True):
                known |= found
    return read, written


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # it is assigned later
        return False


def _is_of_a_process(name: str) -> bool:
    return OF_A_PROCESS.search(name.lower()) is not None


def _is_of_library(module: str | None, code: CodeType) -> bool:
    """Whether code has a version of its own: of Python, an installed distribution, or this package."""
    root = (module or "").partition(".")[0]
    own = __name__.partition(".")[0]
    return root in sys.stdlib_module_names or root == own or _OF_LIBRARIES.search(code.co_filename) is not None
