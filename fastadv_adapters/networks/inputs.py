"""Whether inputs are of another kind than those of the last audit, after a warm-up on noise or with other data."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_FEWEST, _IMAGES = 4, 8
_SHIFT = 0.75  # in standard deviations; of 8 natural images each the means differ by a third of that
_RATIO = 2.0


class Glance(NamedTuple):
    """Mean and standard deviation of a few samples of one input."""

    mean: float
    deviation: float


def glance_at(tensors: Sequence[Tensor], needs: Sequence[bool]) -> list[Glance]:
    """A glance at each input that wants a gradient; of few samples, which differ from batch to batch, none.

    It waits for the device.
    """
    return [
        _glance(t.detach()) for t, need in zip(tensors, needs, strict=True) if need and t.ndim and len(t) >= _FEWEST
    ]


def are_others(now: Sequence[Glance], before: Sequence[Glance]) -> bool:
    """Whether the samples come from elsewhere."""
    return any(_is_other(*pair) for pair in zip(now, before, strict=False))


def _glance(tensor: Tensor) -> Glance:
    few = tensor[:: max(len(tensor) // _IMAGES, 1)][:_IMAGES]
    deviation, mean = torch.std_mean(few, correction=0)
    return Glance(float(mean), float(deviation))


def _is_other(now: Glance, before: Glance) -> bool:
    larger, smaller = max(now.deviation, before.deviation), min(now.deviation, before.deviation)
    return abs(now.mean - before.mean) > _SHIFT * larger or larger > _RATIO * smaller
