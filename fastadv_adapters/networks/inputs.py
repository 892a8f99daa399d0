"""Whether what comes in is of another kind than at the last audit: inputs, or the gradients of another loss."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_FEWEST, _IMAGES = 4, 8
_SHIFT = 0.75  # in standard deviations; of 8 natural images each the means differ by a third of that
_RATIO = 2.0
_BALANCED = 0.01  # of a sample's absolute sum
_NEARLY = 0.75  # of the entries that two losses read between them
_SPANS = 8  # of one output are told apart, so that no more audits come of them


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


def balanced(grads: Sequence[Tensor | None]) -> tuple[bool, ...]:
    """Of the gradients at each output, whether they sum to zero over a sample, as those of a cross entropy or a margin.

    Then a part that all logits share has no say. A sum of logits, their largest or the energy asks for that part alone,
    and tells nothing of what a cross entropy will ask for. It waits for the device.
    """
    return tuple(g is not None and g.ndim > 1 and g.numel() > 0 and _sums_to_zero(_few(g.detach())) for g in grads)


class Heard:
    """Between which entries of each output losses read: logits of one task, say, in a row that holds two."""

    def __init__(self) -> None:
        self._known: dict[int, list[tuple[int, int]]] = {}
        self._last: dict[int, int] = {}

    def numbers(self, grads: Sequence[Tensor | None]) -> tuple[int, ...]:
        """For the gradient at each output a number, equal if nearly the same entries are read. It waits for the device.

        A gradient that does not tell has the number of the one before it.
        """
        return tuple(-1 if grad is None else self._number(place, grad.detach()) for place, grad in enumerate(grads))

    def _number(self, place: int, grad: Tensor) -> int:
        if (span := _span(grad)) is not None:
            known = self._known.setdefault(place, [])
            found = next((number for number, other in enumerate(known) if _are_near(span, other)), len(known))
            if found == len(known) < _SPANS:
                known.append(span)
            self._last[place] = min(found, _SPANS - 1)
        return self._last.get(place, -1)


def _span(grad: Tensor) -> tuple[int, int] | None:
    """From which entry of a row to which there is a gradient in any sample; None if that is chance, or a single one."""
    if grad.ndim not in (2, 3) or len(grad) < _IMAGES:
        return None
    samples: list[int] = grad.flatten(0, -2).count_nonzero(0).tolist()
    first = next((place for place, count in enumerate(samples) if count), len(samples))
    last = next((place for place in range(len(samples) - 1, first, -1) if samples[place]), first)
    return (first, last + 1) if last > first else None


def _are_near(one: tuple[int, int], other: tuple[int, int]) -> bool:
    shared = min(one[1], other[1]) - max(one[0], other[0])
    return shared >= _NEARLY * (max(one[1], other[1]) - min(one[0], other[0]))


def _sums_to_zero(grads: Tensor) -> bool:
    """Seen at the largest: in the gradient of a cross entropy that is sure of a class, all is rounding."""
    rows = grads.flatten(1)
    sizes: list[float] = rows.abs().sum(1).tolist()
    totals: list[float] = rows.sum(1).tolist()
    size, total = max(zip(sizes, totals, strict=True))
    return abs(total) <= _BALANCED * size


def _few(tensor: Tensor) -> Tensor:
    return tensor[:: max(len(tensor) // _IMAGES, 1)][:_IMAGES]


def _glance(tensor: Tensor) -> Glance:
    few = _few(tensor)
    mean, norm = float(few.mean()), float(torch.linalg.vector_norm(few))  # std_mean takes ten times as long
    return Glance(mean, max(norm**2 / max(few.numel(), 1) - mean**2, 0.0) ** 0.5)


def _is_other(now: Glance, before: Glance) -> bool:
    larger, smaller = max(now.deviation, before.deviation), min(now.deviation, before.deviation)
    return abs(now.mean - before.mean) > _SHIFT * larger or larger > _RATIO * smaller
