"""Whether samples see each other in one run: then no sample can have a scale of its own."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..modules import refusals_borne
from .half import weights_for
from .samples import length_of

_IN_TURN = [([0], slice(1, None)), ([-1], slice(None, -1))]
_TOGETHER = [([0, -1], slice(1, -1))]
"""Samples that gradients come in at, and those where they may not come out."""


class Seen(NamedTuple):
    """What one run shows.

    Attributes:
        as_long: which places, outputs or ends of half precision, are as long as there are samples.
        coupled: whether samples reach each other in these.
        samples: how many there are.
    """

    as_long: list[bool]
    coupled: bool
    samples: int


def look(places: Sequence[Tensor], leaves: Sequence[Tensor], batched: Sequence[bool]) -> Seen:
    """Look at a run whose graph is still there; if it takes no second backward pass, no place counts.

    Args:
        places: outputs, or ends.
        leaves: the inputs.
        batched: which inputs have a row per sample.
    """
    samples = next((len(leaf) for leaf, own in zip(leaves, batched, strict=True) if own), 0)
    as_long = [length_of(place) == samples for place in places]
    with refusals_borne():
        return Seen(as_long, reach_others(places, as_long, leaves, batched), samples)
    return Seen([False] * len(as_long), False, samples)


def reach_others(
    places: Sequence[Tensor],
    have: Sequence[bool],
    leaves: Sequence[Tensor],
    batched: Sequence[bool],
    *,
    together: bool = False,
) -> bool:
    """Whether the places of the first or of the last sample have a gradient at another sample.

    (In a sequence with time in front, each step reaches back only, or forth only.)

    Args:
        places: outputs, or ends.
        have: which of them have a row per sample.
        leaves: the inputs.
        batched: which inputs have a row per sample.
        together: whether one backward pass is to do, which does not see if the two reach each other alone.
    """
    places = [place for place, row in zip(places, have, strict=True) if row and place.requires_grad]
    wanted = [leaf for leaf, own in zip(leaves, batched, strict=True) if own and leaf.requires_grad]
    if not places or not wanted:
        return False
    for own, others in _TOGETHER if together else _IN_TURN:
        row = [(weights_for(p)[own] * p[own]).sum() for p in places]
        grads = torch.autograd.grad(row, wanted, retain_graph=True, materialize_grads=True)
        if any(bool(g[others].nan_to_num(0.0, 0.0, 0.0).count_nonzero()) for g in grads):
            return True
    return False
