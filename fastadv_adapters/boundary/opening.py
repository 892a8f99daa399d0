"""Data classes opened: trees of arguments and outputs in which they are nodes, as tuples and dictionaries are."""

import dataclasses
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree  # private by name, but what PyTorch's own transforms and exporters use


class _Opened:
    """What stands in a tree for an object of a data class: its attributes, in order."""

    def __init__(self, kind: type, attributes: dict[str, Any]) -> None:
        self.kind, self.attributes = kind, attributes


def _apart(opened: _Opened) -> tuple[list[Any], Any]:
    return list(opened.attributes.values()), (opened.kind, *opened.attributes)


def _together(values: Any, context: Any) -> Any:
    kind, *names = context
    made = object.__new__(kind)  # __init__ might compute from tensors what is known already
    for name, value in zip(names, values, strict=True):
        object.__setattr__(made, name, value)  # also where the class is frozen
    return made


pytree.register_pytree_node(_Opened, _apart, _together)


def flatten(tree: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """As PyTorch's ``tree_flatten``, but data classes that hold tensors are nodes too, without being registered."""
    leaves, spec = pytree.tree_flatten(tree)
    if not any(map(dataclasses.is_dataclass, leaves)):
        return leaves, spec
    return pytree.tree_flatten(pytree.tree_unflatten(map(_open, leaves), spec))


def _open(leaf: Any) -> Any:
    if not dataclasses.is_dataclass(leaf) or isinstance(leaf, (type, dict, list, tuple)):
        return leaf
    fields = {f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf) if hasattr(leaf, f.name)}
    leaves, spec = pytree.tree_flatten({**fields, **getattr(leaf, "__dict__", {})})
    attributes = pytree.tree_unflatten(map(_open, leaves), spec)
    has_tensors = any(isinstance(held, Tensor) for held in pytree.tree_leaves(attributes))
    return _Opened(type(leaf), attributes) if has_tensors else leaf


def hides_tensors(leaf: object) -> bool:
    """Whether a leaf is an object that holds tensors which want a gradient: no caller's gradient would reach them."""
    if isinstance(leaf, Tensor):
        return False
    seen, stack = {id(leaf)}, [leaf]
    while stack:
        for held in _held(stack.pop()):
            if isinstance(held, Tensor):
                if held.requires_grad:
                    return True
            elif id(held) not in seen:
                seen.add(id(held))
                stack.append(held)
    return False


def _held(value: object) -> list[Any]:
    """What an object or a container holds; nothing for modules, functions and classes, which are no outputs."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set)):
        return list(value)
    if isinstance(value, (type, nn.Module)) or callable(value):
        return []
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    return [*getattr(value, "__dict__", {}).values(), *(getattr(value, name, None) for name in slots)]
