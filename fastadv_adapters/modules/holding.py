"""What a module holds besides its modules, parameters and buffers: containers, and objects that are data."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from .classes import attributes_of, inside_of, is_data
from .leaving_out import is_left_out


def held_by(module: nn.Module) -> Iterator[Any]:
    """Tensors in containers, and objects that hold data and nothing else, both at any depth.

    (A configuration is held. A trainer, an optimizer, a logger or a data set that the module happens to refer to is
    not: these change all the time.)
    """
    if inside_of(module) is not None or is_left_out(module):
        return
    yield from held_in(value for value in attributes_of(module).values() if not isinstance(value, Tensor))


def held_in(values: Iterable[Any]) -> Iterator[Any]:
    """The same of these values, tensors among them included."""
    known = set[int]()
    stack = list(values)
    while stack:
        value = stack.pop()
        if id(value) in known or isinstance(value, nn.Module):
            continue
        known.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple, set, dict, deque)):
            stack += value.values() if isinstance(value, dict) else value
        elif is_data(value):
            yield value
            stack += vars(value).values()


def own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and tensors in attributes, of the module and of all inside."""
    for part in module.modules():
        for held in (part._parameters, part._buffers, vars(part)):
            yield from (value for value in held.values() if isinstance(value, Tensor))


def tensors_in_containers(module: nn.Module) -> list[Tensor]:
    """Tensors that only containers and data objects of the module and of those inside hold, each once."""
    own = set(map(id, own_tensors(module)))
    held = (item for part in module.modules() for item in held_by(part))
    return list({id(item): item for item in held if isinstance(item, Tensor) and id(item) not in own}.values())
