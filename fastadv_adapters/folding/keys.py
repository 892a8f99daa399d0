"""The arguments of a call: the tensors among them, and a key by which equal ones are found again."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_CONSTANTS = (type(None), bool, int, str, torch.dtype, torch.device, torch.memory_format, torch.layout)


class NoKeyError(Exception):
    """Something among the arguments cannot be compared; always caught again."""


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, dicts and slices."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from tensors_of(item)
    elif isinstance(tree, dict):
        yield from tensors_of(list(tree.values()))
    elif isinstance(tree, slice):
        yield from tensors_of((tree.start, tree.stop, tree.step))


def copied(tree: Any) -> Any:
    """The same, in containers of its own: code may write into lists that it passes or gets, later."""
    if type(tree) in (list, tuple):
        return type(tree)(map(copied, tree))
    return {name: copied(item) for name, item in tree.items()} if type(tree) is dict else tree


def key_for(value: Any) -> Any:
    """What equals that of equal arguments alone; tensors equal themselves.

    Raises:
        NoKeyError: for what is neither a tensor nor a constant, nor made of these.
    """
    if isinstance(value, Tensor):
        return Tensor, id(value)
    if type(value) in (tuple, list, torch.Size):
        return type(value), tuple(map(key_for, value))
    if type(value) is dict:
        return dict, tuple((name, key_for(item)) for name, item in value.items())
    if isinstance(value, slice):
        return slice, key_for((value.start, value.stop, value.step))
    if type(value) is float:
        return float, value.hex()
    if type(value) in _CONSTANTS or value is Ellipsis:
        return type(value), value
    raise NoKeyError
