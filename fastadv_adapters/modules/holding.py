"""What a module holds besides its parts, parameters and buffers: containers, objects that are data, hidden modules."""

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from .classes import attributes_of, inside_of, is_data
from .leaving_out import is_left_out
from .walking import modules_of


def held_by(module: nn.Module, registered: Collection[int]) -> Iterator[Any]:
    """Tensors in containers, objects that hold data and nothing else, and modules that only containers hold.

    All at any depth. (A configuration is held. A trainer, an optimizer, a logger or a data set that the module happens
    to refer to is not: these change all the time.)

    Args:
        module: a part of a model.
        registered: the identities of the model's parts, which are no hidden modules.
    """
    if inside_of(module) is not None or is_left_out(module):
        return
    values = (value for value in attributes_of(module).values() if not isinstance(value, Tensor))
    yield from held_in(values, registered)


def held_in(values: Iterable[Any], registered: Collection[int] | None = None) -> Iterator[Any]:
    """The same of these values, tensors among them included; no module if no parts of a model are named."""
    known = set[int]()
    stack = list(values)
    while stack:
        value = stack.pop()
        if id(value) in known:
            continue
        known.add(id(value))
        if isinstance(value, nn.Module):
            if registered is None or id(value) in registered or is_left_out(value):
                continue
            yield value
            stack += (*value._parameters.values(), *value._buffers.values(), *value._modules.values())
            stack += attributes_of(value).values()
        elif isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple, set, dict, deque)):
            stack += value.values() if isinstance(value, dict) else value
        elif is_data(value):
            yield value
            stack += vars(value).values()


def own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and tensors in attributes, of the module and of all inside."""
    for part in modules_of(module):
        for held in (part._parameters, part._buffers, vars(part)):
            yield from (value for value in held.values() if isinstance(value, Tensor))


def tensors_in_containers(module: nn.Module) -> list[Tensor]:
    """Tensors that only containers, data objects and hidden modules of a model hold, each once."""
    own, parts = set(map(id, own_tensors(module))), list(modules_of(module))
    registered = set(map(id, parts))
    held = (item for part in parts for item in held_by(part, registered))
    return list({id(item): item for item in held if isinstance(item, Tensor) and id(item) not in own}.values())
