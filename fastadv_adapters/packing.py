"""Arguments and outputs of any shape (tuples, dicts, data classes known to PyTorch) as a flat list of tensors."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree  # private by name, but what PyTorch's own transforms and exporters use


class Packed:
    """A tree with its tensors taken out.

    Args:
        tree: arguments ``(args, kwargs)`` or an output.

    Attributes:
        tensors: the tensors in the tree, in order.
        kind: equal for trees that a model's code can hardly tell apart: structure, ranks, flags; not numbers.
    """

    def __init__(self, tree: Any) -> None:
        self._leaves, self._spec = pytree.tree_flatten(tree)
        self._places = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        self.tensors: list[Tensor] = [self._leaves[i] for i in self._places]
        ranks = tuple(t.ndim for t in self.tensors)
        others = tuple(_kind(leaf) for leaf in self._leaves if not isinstance(leaf, Tensor))
        self.kind = (str(self._spec), ranks, others)
        for i in self._places:  # whoever keeps this object keeps no tensor alive through it
            self._leaves[i] = None

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        """The same tree with these tensors in it."""
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        return pytree.tree_unflatten(leaves, self._spec)

    def tree(self) -> Any:
        """The tree as it came."""
        return self.rebuild(self.tensors)


def _kind(leaf: object) -> object:
    return leaf if isinstance(leaf, (bool, str, type(None))) else type(leaf)
