"""Arguments and outputs of any shape (tuples, dicts, data classes) as a flat list of tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # private by name, but what PyTorch's own transforms and exporters use

from .opening import flatten, hides_tensors

_CONSTANT = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class _Form:
    """All of a tree but its tensors."""

    leaves: list[Any]  # None in the place of each tensor: whoever keeps a form keeps no tensor alive
    spec: pytree.TreeSpec
    places: list[int]
    kind: tuple[Any, ...]
    constants: tuple[Any, ...] | None
    hiding: list[str]
    fillable: bool = False  # whether there is an empty list or dictionary, which may be meant to be filled
    build: Callable[[Sequence[Tensor]], Any] | None = None  # of the commonest trees, where unflattening takes long

    def with_tensors(self, tensors: Sequence[Tensor]) -> Any:
        if self.build is not None:
            (_,) = tensors
            return self.build(tensors)
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return pytree.tree_unflatten(leaves, self.spec)


class Packed:
    """A tree with its tensors taken out.

    Args:
        tree: arguments ``(args, kwargs)`` or an output.

    Attributes:
        tensors: the tensors in the tree, in order.
        kind: equal for trees that a model's code can hardly tell apart: structure, ranks, flags; not numbers.
        constants: equal for trees that differ in tensors alone; None if that cannot be said.
        hiding: names of the classes in the tree that hold tensors out of reach which want a gradient.
    """

    def __init__(self, tree: Any) -> None:
        form, self.tensors = _common(tree) or _taken_apart(tree)
        self._take(form)

    def _take(self, form: _Form) -> None:
        self._form = form
        self.kind, self.constants, self.hiding = form.kind, form.constants, form.hiding

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        """The same tree with these tensors in it."""
        return self._form.with_tensors(tensors)

    def holding(self, tensors: Sequence[Tensor]) -> "Packed":
        """The same tree with these tensors in it, packed."""
        other = Packed.__new__(Packed)
        other.tensors = list(tensors)
        other._take(self._form)
        return other

    def cast(self, dtype: torch.dtype) -> "Packed":
        """The same with floating tensors in this dtype."""
        return self.holding([t.to(dtype) if t.is_floating_point() else t for t in self.tensors])

    def refuse_filled(self, tree: Any) -> None:
        """Raise a TypeError if the arguments that a model was run on have more in them than before."""
        if self._form.fillable and pytree.tree_structure(tree).num_leaves > self._form.spec.num_leaves:
            raise TypeError(
                "expected a model that returns what it computes, got one that fills a list or dictionary among its "
                "arguments. A fast model runs on copies, so yours would stay empty: return it beside the logits"
            )

    def tree(self) -> Any:
        """The tree as it came."""
        return self.rebuild(self.tensors)


def pack_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Packed:
    """The arguments of a call.

    Raises:
        TypeError: tensors that want a gradient are out of reach.
    """
    arguments = Packed((args, kwargs))
    if arguments.hiding and torch.is_grad_enabled():
        raise TypeError(
            f"expected inputs that want a gradient in tuples, lists, dicts, data classes or classes known to PyTorch, "
            f"got some inside a {arguments.hiding[0]}, where their gradients would be lost: pass them as arguments, "
            f"register the class with torch.utils._pytree, or detach them"
        )
    return arguments


def _taken_apart(tree: Any) -> tuple[_Form, list[Tensor]]:
    leaves, spec = flatten(tree)
    if not _is_call(tree):  # a cache is for later calls, which no attack makes: as if the model had not kept it
        leaves = [None if _is_cache(leaf) and hides_tensors(leaf) else leaf for leaf in leaves]
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors: list[Tensor] = [leaves[i] for i in places]
    ranks = tuple(t.ndim for t in tensors)
    others = tuple(_kind(leaf) for leaf in leaves if not isinstance(leaf, Tensor))
    hiding = [type(leaf).__name__ for leaf in leaves if hides_tensors(leaf)]
    constants = _constants(str(spec), leaves)
    for i in places:
        leaves[i] = None
    return _Form(leaves, spec, places, (str(spec), ranks, others), constants, hiding, _is_fillable(tree)), tensors


def _is_call(tree: Any) -> bool:
    """Whether these are arguments ``(args, kwargs)``."""
    return type(tree) is tuple and list(map(type, tree)) == [tuple, dict]


def _is_cache(leaf: object) -> bool:
    """Whether this is a cache of keys and values of the library transformers, which is slow to import."""
    return any(kind.__name__ == "Cache" and kind.__module__.startswith("transformers.") for kind in type(leaf).__mro__)


def _is_fillable(tree: Any) -> bool:
    """Whether there is an empty list or dictionary among arguments."""
    if not _is_call(tree):
        return False
    stack = [*tree[0], *tree[1].values()]
    while stack:
        value = stack.pop()
        if isinstance(value, (list, tuple, dict)):
            if not value and not isinstance(value, tuple):
                return True
            stack += value.values() if isinstance(value, dict) else value
    return False


_forms: dict[tuple[bool, int], _Form] = {}


def _common(tree: Any) -> tuple[_Form, list[Tensor]] | None:
    """The commonest trees, whose forms are kept: one tensor, as an output or as the only argument."""
    call = _is_call(tree) and len(tree[0]) == 1 and not tree[1]
    tensor = tree[0][0] if call else tree
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_complex():
        return None
    key = call, tensor.ndim
    if key not in _forms:
        form, _ = _taken_apart(tree)
        build: Callable[[Sequence[Tensor]], Any] = (lambda t: ((t[0],), {})) if call else (lambda t: t[0])
        _forms[key] = replace(form, build=build)
    return _forms[key], [tensor]


def _constants(spec: str, leaves: Sequence[Any]) -> tuple[Any, ...] | None:
    others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    known = all(isinstance(leaf, _CONSTANT) for leaf in others)
    return (spec, *((type(leaf), leaf) for leaf in others)) if known else None


def _kind(leaf: object) -> object:
    return leaf if isinstance(leaf, (bool, str, type(None))) else type(leaf)
