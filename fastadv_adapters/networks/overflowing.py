"""Samples whose outputs overflow in half precision: nothing can come in there but NaN, so gradients tell nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..boundary import Run
from ..modules import number_of_samples, refusals_borne
from .nearness import overflow, rows
from .samples import batched

_SAMPLES = 8


@dataclass(frozen=True)
class Overflown:
    """A few such samples.

    Attributes:
        tensors: the inputs of a call of these samples alone.
        exact: its outputs in full precision.
    """

    tensors: list[Tensor]
    exact: list[Tensor]

    def __len__(self) -> int:
        return number_of_samples(self.tensors)


def find_overflown(run: Run, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> Overflown | None:
    """Those whose outputs are not finite, though in full precision they are; None if there are none.

    Args:
        run: runs the model in full precision.
        tensors: the inputs of a pass.
        outputs: what it gave.
    """
    samples = number_of_samples(tensors)
    own = [o.ndim > 0 and len(o) == samples for o in outputs]
    lost = [~rows(o.detach()).isfinite().all(1) for o, apart in zip(outputs, own, strict=True) if apart]
    if not lost:
        return None
    index = torch.stack(lost).any(0).nonzero().flatten()[:_SAMPLES]
    if not len(index):
        return None
    alike = batched(tensors, [t.is_floating_point() for t in tensors])
    few = [t.detach().index_select(0, index) if row else t.detach() for t, row in zip(tensors, alike, strict=True)]
    ours = [o.detach().index_select(0, index) if row else o for o, row in zip(outputs, own, strict=True)]
    with refusals_borne(), torch.no_grad():
        exact = run([t.clone() for t in few]).tensors
        return Overflown(few, exact) if overflow(ours, exact) else None
    return None
