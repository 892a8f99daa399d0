"""Which tensors of a call have a row per sample, and a few samples of it."""

from collections.abc import Sequence

from torch import Tensor

SAMPLES = 4


def length_of(place: Tensor) -> int:
    """How many rows there are; -1 for a tensor without dimensions."""
    return len(place) if place.ndim else -1


def batched(tensors: Sequence[Tensor], needs: Sequence[bool]) -> list[bool]:
    """Which tensors have a row per sample: those as long as the first that wants a gradient."""
    length = next((t.shape[:1] for t, need in zip(tensors, needs, strict=True) if need), tensors[0].shape[:1])
    return [t.ndim > 0 and t.shape[:1] == length for t in tensors]


def few(tensors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    """At most four samples; what has no row per sample is left whole."""
    return [
        t.detach()[:SAMPLES] if own else t.detach() for t, own in zip(tensors, batched(tensors, needs), strict=True)
    ]


def are_rows(gradients: Sequence[Tensor]) -> bool:
    """Whether these have a row for each sample."""
    return all(g.ndim > 1 for g in gradients) and len({len(g) for g in gradients}) == 1


def as_rows(gradients: Sequence[Tensor], samples: int) -> Sequence[Tensor]:
    """Each of these, if it has a row for each of so many samples; else in one row, as one that all samples share."""
    if are_rows(gradients):
        return gradients
    return [g if g.ndim > 1 and len(g) == samples else g.reshape(1, -1) for g in gradients]
