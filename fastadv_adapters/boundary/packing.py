"""Arguments and outputs of any shape (tuples, dicts, data classes) as a flat list of tensors."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # private by name, but what PyTorch's own transforms and exporters use

from .opening import flatten, hides_tensors

_CONSTANT = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)


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
        self._leaves, self._spec = flatten(tree)
        self._places = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        self.tensors: list[Tensor] = [self._leaves[i] for i in self._places]
        ranks = tuple(t.ndim for t in self.tensors)
        others = tuple(_kind(leaf) for leaf in self._leaves if not isinstance(leaf, Tensor))
        self.kind = (str(self._spec), ranks, others)
        self.hiding = [type(leaf).__name__ for leaf in self._leaves if hides_tensors(leaf)]
        self.constants = _constants(str(self._spec), self._leaves)
        for i in self._places:  # whoever keeps this object with other tensors keeps none of these alive
            self._leaves[i] = None

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        """The same tree with these tensors in it."""
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        return pytree.tree_unflatten(leaves, self._spec)

    def holding(self, tensors: Sequence[Tensor]) -> "Packed":
        """The same tree with these tensors in it, packed."""
        other = copy.copy(self)
        other.tensors = list(tensors)
        return other

    def tree(self) -> Any:
        """The tree as it came."""
        return self.rebuild(self.tensors)


def _constants(spec: str, leaves: Sequence[Any]) -> tuple[Any, ...] | None:
    others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    known = all(isinstance(leaf, _CONSTANT) for leaf in others)
    return (spec, *((type(leaf), leaf) for leaf in others)) if known else None


def _kind(leaf: object) -> object:
    return leaf if isinstance(leaf, (bool, str, type(None))) else type(leaf)
