"""Objects of which a process has one, which a copy of a model refers to as the model does: loggers, registries."""

import dis
import functools
import itertools
import logging
from collections import deque
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

_LOGGING = (logging.Filterer, logging.Manager, logging.PlaceHolder)
"""Loggers and handlers, and what leads to all of them: anybody's new logger would be a change of the model."""


def is_process_wide(value: Any) -> bool:
    """Whether an object is shared with all that is not the model, and no part of what that computes.

    That are the parts of ``logging``, and objects whose class says that a deep copy is the object itself, if they lead
    to other objects. (One of constants or tensors is a configuration, shared or not: a change of it counts.) None of
    their code is run.
    """
    if isinstance(value, _LOGGING):
        return True
    return _is_its_own_copy(value) and any(map(_is_object, _held(value)))


def _is_its_own_copy(value: Any) -> bool:
    kind = type(value)
    if isinstance(method := getattr(kind, "__deepcopy__", None), FunctionType):
        return _returns(method.__code__) == {(_first_of(method),)}
    for name in ("__reduce_ex__", "__reduce__"):  # which give a name for what is not to be copied
        if isinstance(method := getattr(kind, name, None), FunctionType):
            found = _returns(method.__code__)
            return bool(found) and all(_is_name(value, _first_of(method), *given) for given in found)
    return False


def _first_of(method: FunctionType) -> str:
    return "".join(method.__code__.co_varnames[:1])


def _is_name(value: Any, itself: str, first: object = None, attribute: object = None) -> bool:
    """Whether a constant, or an attribute, is the name of a global."""
    if first == itself and isinstance(attribute, str):
        return isinstance(vars(value).get(attribute), str)
    return isinstance(first, _Text)


class _Text(str):
    """A constant, and no variable."""

    __slots__ = ()


@functools.lru_cache(maxsize=1024)
def _returns(code: CodeType) -> frozenset[tuple[object, ...]]:
    """What code returns: a variable, an attribute of one or a text; an empty tuple for all else."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("EXTENDED_ARG", "RESUME")]
    found = set[tuple[object, ...]]()
    for index, step in enumerate(steps):
        if step.opname == "RETURN_CONST":
            found.add((_Text(step.argval),) if isinstance(step.argval, str) else ())
        elif step.opname == "RETURN_VALUE":
            found.add(_loaded(steps[:index]))
    return frozenset(found)


def _loaded(steps: list[dis.Instruction]) -> tuple[object, ...]:
    """What the last of these steps load."""
    before, last = (None, *steps)[-2:]
    if last is None:
        return ()
    if last.opname.startswith("LOAD_FAST"):
        return (last.argval,)
    if last.opname == "LOAD_CONST" and isinstance(last.argval, str):
        return (_Text(last.argval),)
    if last.opname == "LOAD_ATTR" and before is not None and before.opname.startswith("LOAD_FAST"):
        return before.argval, last.argval
    return ()


def _held(value: Any) -> list[Any]:
    held = list(vars(value).values())
    inner = ((v.values() if isinstance(v, dict) else v) for v in held if isinstance(v, (dict, list, tuple, set, deque)))
    return [*held, *itertools.chain.from_iterable(inner)]


def _is_object(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, (Tensor, nn.Module))
