"""Weak references to parts of the original of a copy, made to refer to the copy: a deep copy leaves them alone."""

import types
import weakref
from collections import deque
from typing import Any

from torch import nn

from .classes import is_data, things_of

Copies = dict[int, nn.Module]
_MAPPINGS = (dict, weakref.WeakValueDictionary)


def redirect(parts: list[tuple[nn.Module, nn.Module]]) -> None:
    """Exchange the weak references in attributes, and in containers and data objects there.

    Args:
        parts: each part of the original, and what it became.
    """
    # A proxy shows the attributes of what it refers to, and nothing else.
    copies = {id(key): copied for part, copied in parts for key in (part, vars(part))}
    seen = {id(copied) for _, copied in parts}
    for _, copied in parts:
        for name, value in things_of(copied).items():
            if (redirected := _redirected(value, copies)) is not value:
                vars(copied)[name] = redirected
            else:
                _redirect_in(value, copies, seen)


def is_weak(value: object) -> bool:
    """Whether this is a weak reference that a deep copy refuses, or takes for what it refers to."""
    return type(value) in (weakref.WeakMethod, *weakref.ProxyTypes)


def _redirect_in(held: Any, copies: Copies, seen: set[int]) -> None:
    if id(held) in seen:
        return
    seen.add(id(held))
    if isinstance(held, (list, deque, *_MAPPINGS)):
        for key, value in list(held.items() if isinstance(held, _MAPPINGS) else enumerate(held)):
            if (redirected := _redirected(value, copies)) is not value:
                held[key] = redirected
            else:
                _redirect_in(value, copies, seen)
    elif isinstance(held, weakref.WeakKeyDictionary):
        for key in [key for key in held if id(key) in copies]:
            held[copies[id(key)]] = held.pop(key)
    elif isinstance(held, (set, weakref.WeakSet)):
        for item in [item for item in held if _redirected(item, copies) is not item]:
            held.remove(item)
            held.add(_redirected(item, copies))
    elif isinstance(held, tuple):
        for value in held:
            _redirect_in(value, copies, seen)
    elif not is_weak(held) and not isinstance(held, nn.Module) and is_data(held):
        _redirect_in(vars(held), copies, seen)


def _redirected(value: Any, copies: Copies) -> Any:
    """A reference to the copy if this is one to an original."""
    try:
        if type(value) is weakref.ref:
            return weakref.ref(copies[id(value())])
        if type(value) is weakref.WeakMethod:
            method: Any = value()
            return weakref.WeakMethod(types.MethodType(method.__func__, copies[id(method.__self__)]))
        if type(value) in weakref.ProxyTypes:
            return weakref.proxy(copies[id(vars(value))])
    except (KeyError, AttributeError, TypeError, ReferenceError):  # to something else, or to nothing any more
        return value
    if type(value) is tuple and any(_redirected(item, copies) is not item for item in value):
        return tuple(_redirected(item, copies) for item in value)
    return copies.get(id(value), value) if isinstance(value, nn.Module) else value
