"""What passes of a copy leave behind in its attributes, taken back by an update: caches, counters, flags.

A table that the first pass computes from weights, and keeps in a dictionary until ``train()`` clears it, would else be
that of old weights for ever: nobody calls ``train()`` of a copy.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from .classes import are_equal, attributes_of, is_data
from .refusals import refusals_borne

_CONTAINERS = (dict, list, set, deque)
_LATER = "end_name"
"""The attribute that a copy is given after it was made, and not by its passes."""

_ABSENT = object()


class Restore:
    """The attributes of a copied network as they are now, and what containers and data objects in them hold.

    Tensors keep their values: others follow these.

    Args:
        network: the copy, before its first pass.
    """

    def __init__(self, network: nn.Module) -> None:
        attributes = [held for part in network.modules() for held in (vars(part), part._buffers)]
        inside = list(_inside(map(attributes_of, network.modules())))
        attributes += [held for held in inside if isinstance(held, dict)]
        self._dicts = [(held, dict(held)) for held in attributes]
        self._others = [(held, held.copy()) for held in inside if not isinstance(held, dict)]

    def __call__(self) -> None:
        """Bring them back, in place."""
        for held, before in self._dicts:
            if not are_equal(held, before):
                _set_back(held, before)
        for container, items in self._others:
            if not are_equal(container, items):
                with refusals_borne():  # a class of the user's own
                    container.clear()
                    container.update(items) if isinstance(container, set) else container.extend(items)


def _inside(attributes: Iterable[dict[str, Any]]) -> Iterator[Any]:
    """Containers that may change, and the attributes of objects that are data, at any depth."""
    seen = set[int]()
    stack = [value for held in attributes for value in held.values()]
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, (Tensor, nn.Module)):
            continue
        seen.add(id(value))
        if isinstance(value, tuple):
            stack += value
        elif isinstance(value, _CONTAINERS):
            stack += value.values() if isinstance(value, dict) else value
            yield value
        elif is_data(value) and not type(value).__module__.startswith(__name__.partition(".")[0]):
            stack += vars(value).values()
            yield vars(value)


def _set_back(held: dict[Any, Any], before: dict[Any, Any]) -> None:
    for name in [name for name in held if name not in before and name != _LATER]:
        del held[name]
    for name, value in before.items():
        if not isinstance(value, Tensor) and held.get(name, _ABSENT) is not value:
            held[name] = value
