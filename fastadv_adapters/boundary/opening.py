"""Leaves opened: data classes, namespaces, containers with more to them, complex and sparse tensors, as nodes.

So trees of arguments and outputs end in real, dense tensors, which the boundary scales and filters.
"""

import copyreg
import dataclasses
from collections import OrderedDict, UserDict, UserList, defaultdict
from collections.abc import Callable, Set, ValuesView
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # private by name, but what PyTorch's own transforms and exporters use


class _Opened:
    """What stands in a tree for a leaf that holds tensors.

    Attributes:
        parts: a tree of what it holds.
        close: makes such a leaf of these parts and of ``context``.
        context: all else that is known of it.
    """

    def __init__(self, parts: list[Any], close: Callable[[Any, Any], Any], context: Any) -> None:
        self.parts, self.close, self.context = parts, close, context


pytree.register_pytree_node(
    _Opened,
    lambda opened: (opened.parts, (opened.close, opened.context)),
    lambda parts, how: how[0](list(parts), how[1]),
)


def _data_of(values: Any, context: Any) -> Any:
    kind, *names = context
    made = kind.__new__(kind)  # __init__ might compute from tensors what is known already
    for name, value in zip(names, values, strict=True):
        object.__setattr__(made, name, value)  # also where the class is frozen
    return made


def _container_of(parts: Any, kind: Any) -> Any:
    """An object of a subclass of ``tuple``, ``list`` or ``dict``, whose attributes may repeat items of a dictionary."""
    items, attributes = parts
    # Not the class's own ways, which may want to know more, or compute what is known already.
    made = tuple.__new__(kind, items) if issubclass(kind, tuple) else kind.__new__(kind)
    if isinstance(made, list):
        list.extend(made, items)
    elif isinstance(made, dict):
        base = OrderedDict if isinstance(made, OrderedDict) else dict
        for key, value in items.items():
            base.__setitem__(made, key, value)
    repeated = items if isinstance(items, dict) else {}
    for name, value in attributes.items():
        object.__setattr__(made, name, repeated.get(name, value))
    return made


def _complex_of(parts: Any, _: Any) -> Tensor:
    return torch.view_as_complex(parts[0].contiguous())


def _sparse_of(parts: Any, context: Any) -> Tensor:
    *indices, values = parts
    layout, shape = context
    if layout is torch.sparse_coo:
        return torch.sparse_coo_tensor(indices[0], values, shape, is_coalesced=True)
    return torch.sparse_compressed_tensor(indices[0], indices[1], values, shape, layout=layout)


def flatten(tree: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """As PyTorch's ``tree_flatten``, but what is opened here is a node too, without being registered."""
    leaves, spec = pytree.tree_flatten(tree, is_leaf=_is_own_tuple)
    opened = list(map(_open, leaves))
    if all(new is old for new, old in zip(opened, leaves, strict=True)):
        return leaves, spec
    return pytree.tree_flatten(pytree.tree_unflatten(opened, spec))


def _open(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        if leaf.layout in (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc):
            return _open_sparse(leaf)
        return _Opened([torch.view_as_real(leaf.resolve_conj())], _complex_of, None) if leaf.is_complex() else leaf
    if isinstance(leaf, (tuple, list, dict)):
        return _open_subclass(leaf)
    if isinstance(leaf, type) or not _holds_data(leaf):
        return leaf
    names = [f.name for f in (*_fields(leaf), *getattr(type(leaf), "__attrs_attrs__", ()))]
    fields = {name: getattr(leaf, name) for name in names if hasattr(leaf, name)}
    attributes = _open_all({**fields, **getattr(leaf, "__dict__", {})})
    if attributes is None:
        return leaf
    return _Opened(list(attributes.values()), _data_of, (type(leaf), *attributes))


def _open_sparse(tensor: Tensor) -> _Opened:
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        indices = [tensor.indices()]
    elif tensor.layout is torch.sparse_csr:
        indices = [tensor.crow_indices(), tensor.col_indices()]
    else:
        indices = [tensor.ccol_indices(), tensor.row_indices()]
    return _Opened([*indices, _open(tensor.values())], _sparse_of, (tensor.layout, tensor.shape))


def _holds_data(leaf: Any) -> bool:
    """Whether an object is its attributes: of a data class, also as the package attrs makes them, or a namespace."""
    named = dataclasses.is_dataclass(leaf) or hasattr(type(leaf), "__attrs_attrs__")
    return named or isinstance(leaf, (SimpleNamespace, UserDict, UserList))


def _fields(leaf: Any) -> tuple[Any, ...]:
    return dataclasses.fields(leaf) if dataclasses.is_dataclass(leaf) else ()


def _is_own_tuple(value: Any) -> bool:
    """Whether a tuple is of a class derived from a named tuple's, which may have attributes and a way of its own."""
    kind = type(value)
    return isinstance(value, tuple) and tuple not in (kind, *kind.__bases__) and kind not in pytree.SUPPORTED_NODES


def _open_subclass(value: Any) -> Any:
    base = next(kind for kind in (tuple, list, dict) if isinstance(value, kind))
    attributes = _attributes_of(value)
    if isinstance(value, defaultdict):
        attributes["default_factory"] = value.default_factory
    repeated = value if isinstance(value, dict) else ()
    parts = _open_all([base(value), {name: None if name in repeated else v for name, v in attributes.items()}])
    return value if parts is None else _Opened(parts, _container_of, type(value))


def _open_all(held: Any) -> Any:
    """The same with all leaves opened; None if there is no tensor."""
    leaves, spec = pytree.tree_flatten(held, is_leaf=_is_own_tuple)
    opened = pytree.tree_unflatten(map(_open, leaves), spec)
    return opened if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(opened)) else None


def _attributes_of(value: Any) -> dict[str, Any]:
    """What an object holds in its ``__dict__`` and its slots."""
    names: list[str] = copyreg._slotnames(type(value))  # type: ignore[attr-defined]
    slots = {name: getattr(value, name) for name in names if hasattr(value, name)}
    return {**slots, **getattr(value, "__dict__", {})}


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
    if isinstance(value, (dict, MappingProxyType)):
        return list(value.values())
    if isinstance(value, (list, tuple, Set, ValuesView)):
        return list(value)
    if isinstance(value, (type, nn.Module)) or callable(value):
        return []
    return list(_attributes_of(value).values())
