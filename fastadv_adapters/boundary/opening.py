"""Leaves opened: data classes, namespaces, dictionaries with more to them, complex and sparse tensors, as nodes.

So trees of arguments and outputs end in real, dense tensors, which the boundary scales and filters.
"""

import dataclasses
from collections import OrderedDict, UserDict
from types import SimpleNamespace
from typing import Any

import torch
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
    made = kind.__new__(kind)  # __init__ might compute from tensors what is known already
    for name, value in zip(names, values, strict=True):
        object.__setattr__(made, name, value)  # also where the class is frozen
    return made


class _Mapping:
    """What stands for an object of a subclass of ``dict``: its items, and its attributes, which may repeat them."""

    def __init__(self, kind: type, items: dict[Any, Any], attributes: dict[str, Any]) -> None:
        self.kind, self.items, self.attributes = kind, items, attributes


def _items_of(mapping: _Mapping) -> tuple[list[Any], Any]:
    return [mapping.items, mapping.attributes], mapping.kind


def _mapping_of(values: Any, kind: Any) -> Any:
    items, attributes = values
    made = kind.__new__(kind)
    base = OrderedDict if issubclass(kind, OrderedDict) else dict
    for key, value in items.items():  # not the class's own way, which may want to know more
        base.__setitem__(made, key, value)
    for name, value in attributes.items():
        object.__setattr__(made, name, items.get(name, value))
    return made


class _Complex:
    """What stands for a complex tensor: real and imaginary parts."""

    def __init__(self, real: Tensor) -> None:
        self.real = real


class _Sparse:
    """What stands for a sparse tensor: its indices and values."""

    def __init__(self, tensor: Tensor) -> None:
        if tensor.layout is torch.sparse_coo:
            tensor = tensor.coalesce()
            self.indices = [tensor.indices()]
        else:
            rows = tensor.layout is torch.sparse_csr
            self.indices = (
                [tensor.crow_indices(), tensor.col_indices()] if rows else [tensor.ccol_indices(), tensor.row_indices()]
            )
        self.values, self.context = _open(tensor.values()), (tensor.layout, tensor.shape)


def _tensor_of(held: Any, context: Any) -> Tensor:
    *indices, values = held
    layout, shape = context
    if layout is torch.sparse_coo:
        return torch.sparse_coo_tensor(indices[0], values, shape, is_coalesced=True)
    return torch.sparse_compressed_tensor(indices[0], indices[1], values, shape, layout=layout)


pytree.register_pytree_node(_Sparse, lambda held: ([*held.indices, held.values], held.context), _tensor_of)
pytree.register_pytree_node(_Opened, _apart, _together)
pytree.register_pytree_node(_Mapping, _items_of, _mapping_of)
pytree.register_pytree_node(
    _Complex, lambda held: ([held.real], None), lambda values, _: torch.view_as_complex(next(iter(values)).contiguous())
)


def flatten(tree: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """As PyTorch's ``tree_flatten``, but what is opened here is a node too, without being registered."""
    leaves, spec = pytree.tree_flatten(tree)
    opened = list(map(_open, leaves))
    if all(new is old for new, old in zip(opened, leaves, strict=True)):
        return leaves, spec
    return pytree.tree_flatten(pytree.tree_unflatten(opened, spec))


def _open(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        if leaf.layout in (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc):
            return _Sparse(leaf)
        return _Complex(torch.view_as_real(leaf.resolve_conj())) if leaf.is_complex() else leaf
    if isinstance(leaf, dict):
        return _open_mapping(leaf)
    if isinstance(leaf, (type, list, tuple)) or not _holds_data(leaf):
        return leaf
    names = [f.name for f in (*_fields(leaf), *getattr(type(leaf), "__attrs_attrs__", ()))]
    fields = {name: getattr(leaf, name) for name in names if hasattr(leaf, name)}
    leaves, spec = pytree.tree_flatten({**fields, **getattr(leaf, "__dict__", {})})
    attributes = pytree.tree_unflatten(map(_open, leaves), spec)
    has_tensors = any(isinstance(held, Tensor) for held in pytree.tree_leaves(attributes))
    return _Opened(type(leaf), attributes) if has_tensors else leaf


def _holds_data(leaf: Any) -> bool:
    """Whether an object is its attributes: of a data class, also as the package attrs makes them, or a namespace."""
    named = dataclasses.is_dataclass(leaf) or hasattr(type(leaf), "__attrs_attrs__")
    return named or isinstance(leaf, (SimpleNamespace, UserDict))


def _fields(leaf: Any) -> tuple[Any, ...]:
    return dataclasses.fields(leaf) if dataclasses.is_dataclass(leaf) else ()


def _open_mapping(mapping: dict[Any, Any]) -> Any:
    attributes = getattr(mapping, "__dict__", {})
    both = [dict(mapping), {name: None if name in mapping else value for name, value in attributes.items()}]
    leaves, spec = pytree.tree_flatten(both)
    items, others = pytree.tree_unflatten(map(_open, leaves), spec)
    has_tensors = any(isinstance(held, Tensor) for held in pytree.tree_leaves([items, others]))
    return _Mapping(type(mapping), items, others) if has_tensors else mapping


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
