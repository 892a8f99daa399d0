"""What passes of a copy leave behind in its attributes, taken back by an update: caches, counters, flags.

A table that the first pass computes from weights, and keeps in a dictionary until ``train()`` clears it, would else be
that of old weights for ever: nobody calls ``train()`` of a copy.
"""

import operator
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .classes import attributes_of, is_data
from .refusals import refusals_borne
from .walking import modules_of

_CONTAINERS = (dict, list, set, deque)
_LATER = "end_name"
"""The attribute that a copy is given after it was made, and not by its passes."""

_ABSENT = object()


class Restore:
    """The attributes of a network as they are now, and what containers, data objects and hidden modules in them hold.

    Args:
        network: a copy, before its first pass; or a model that is lent.
        source: what it was copied from, and may share objects with, which are left alone; None for no copy.
    """

    def __init__(self, network: nn.Module, source: nn.Module | None = None) -> None:
        shared = set() if source is None else {id(held) for held in _inside(source)}
        inside = [held for held in _inside(network) if id(held) not in shared]
        own = [held for part in modules_of(network) for held in (vars(part), part._buffers)]
        self._followed = [] if source is None else [(held, dict(held)) for held in own]
        dicts = [held for held in inside if isinstance(held, dict)] + ([] if self._followed else own)
        self._dicts = [(held, dict(held)) for held in dicts]
        self._others = [(held, held.copy()) for held in inside if not isinstance(held, dict)]

    def __call__(self) -> None:
        """Bring them back, in place. Tensors in attributes and buffers of a copy are left to what follows these."""
        for held, before in self._followed:
            _set_back(held, before, tensors=False)
        for held, before in self._dicts:
            _set_back(held, before, tensors=True)
        for container, items in self._others:
            if len(container) != len(items) or not all(map(operator.is_, container, items)):
                with refusals_borne():  # a class of the user's own
                    container.clear()
                    container.update(items) if isinstance(container, set) else container.extend(items)


def _inside(network: nn.Module) -> Iterator[Any]:
    """Containers that may change, and the attributes of data objects and of hidden modules, at any depth."""
    parts = list(modules_of(network))
    seen = set(map(id, parts))
    stack = [value for part in parts for value in attributes_of(part).values()]
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, Tensor):
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            stack += (*value._modules.values(), *attributes_of(value).values())
            yield from (vars(value), value._parameters, value._buffers)
        elif isinstance(value, tuple):
            stack += value
        elif isinstance(value, _CONTAINERS):
            stack += value.values() if isinstance(value, dict) else value
            yield value
        elif is_data(value) and not type(value).__module__.startswith(__name__.partition(".")[0]):
            stack += vars(value).values()
            yield vars(value)


def _set_back(held: dict[Any, Any], before: dict[Any, Any], *, tensors: bool) -> None:
    if held.keys() == before.keys() and all(map(operator.is_, held.values(), before.values())):
        return
    for name in [name for name in held if name not in before and name != _LATER]:
        del held[name]
    for name, value in before.items():
        if (tensors or not isinstance(value, Tensor)) and held.get(name, _ABSENT) is not value:
            held[name] = value
