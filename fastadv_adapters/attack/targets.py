"""What an attack is told beside x: class labels, or any tree of tensors with a row per sample, or nothing."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..boundary import Packed
from .checks import LABELS


@dataclass(frozen=True)
class Targets:
    """A tree of tensors, each with a row per sample.

    Attributes:
        packed: the tree; nobody else writes into its tensors.
    """

    packed: Packed

    @classmethod
    def of(cls, y: Any, *, classes: bool) -> "Targets":
        """A copy of y; class labels as int64, all else in its own dtype."""
        packed = Packed(y)
        kept = [t.detach().to(torch.int64 if classes else t.dtype, copy=True) for t in packed.tensors]
        return cls(packed.holding(kept))

    @property
    def tree(self) -> Any:
        """What the loss is given."""
        return self.packed.tree()

    def take(self, index: Tensor) -> "Targets":
        """Those of the samples at ``index``."""
        return Targets(self.packed.holding([t.index_select(0, index) for t in self.packed.tensors]))

    def join(self, other: "Targets") -> "Targets":
        """These and then those of others."""
        pairs = zip(self.packed.tensors, other.packed.tensors, strict=True)
        return Targets(self.packed.holding([torch.cat(pair) for pair in pairs]))


Need = tuple[str, str]
"""A setting that makes no sense without classes, as the user wrote it; and why, and what to do."""


def need_of_classes(loss: object, *, targeted: bool, early_stop: bool) -> Need | None:
    """The first of these settings that needs classes, if any."""
    if early_stop:
        return "early_stop=True", "nothing is adversarial, so no sample can be dropped. Leave early_stop out"
    if targeted:
        return "targeted=True", "no class can be reached. Pass a loss that is larger nearer to the target"
    if not callable(loss):
        what = (
            "it compares logits. Pass a callable loss(outputs, targets) -> (N,), or y.argmax(1) if y has one-hot rows"
        )
        return f"loss={loss!r}", what
    return None


def refuse_need(classes: bool | None, need: Need | None) -> None:
    """Raise ValueError if there are no classes, and something needs them."""
    if classes is False and need is not None:
        setting, reason = need
        raise ValueError(f"expected y to hold class labels for {setting}, got targets without classes: {reason}")


def has_classes(x: Any, y: Any, *, classes: bool | None, need: Need | None) -> bool:
    """Whether y is to hold class labels, one per sample of x.

    Args:
        x: the samples.
        y: what came with them.
        classes: what the user said; None: integers of shape (N,) are labels, nothing else is.
        need: what makes no sense without them.

    Raises:
        ValueError: there is such a need, but no labels.
    """
    refuse_need(classes, need)
    if classes is not None:
        return classes
    if isinstance(y, Tensor) and isinstance(x, Tensor) and y.dtype in LABELS and y.shape == x.shape[:1]:
        return True
    if need is None:
        return False
    if isinstance(y, Tensor):
        meant_as_labels = y.dtype in LABELS or y.ndim < 2
    else:
        meant_as_labels = y is not None and not Packed(y).tensors
    refuse_need(meant_as_labels, need)
    return True  # of a wrong dtype or shape, for which there are errors that say so
