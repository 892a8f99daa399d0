"""How gradients are scaled on the way into half precision, unscaled and filtered on the way out, and what is counted.

Backpropagation is linear, and in eval mode samples do not see each other. So each sample's gradient may be multiplied,
where it enters half precision, by its own power of two, which brings its largest entry to where half precision is
precise, and the gradient at the input divided by it in float32: exactly the same gradient, without the underflow (loss
scaling after Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740, here per sample and with powers of two only).

The same is written twice. On an accelerator (``on_device``) nothing may wait for the device, so exponents and counts
are tensors there. On a processor (``on_host``) nothing waits, and reading the largest entries spares most operators.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from .powers import exponent_of

START = 4  # the largest entry of a scaled gradient lies in [2^4, 2^5)
FLOOR = -10  # as far down as overflow may push that
STEP = 2
PATIENCE = 256  # passes without an overflow after which an update may push it up again
# A gradient below this comes back at it, direction kept: smaller ones lose entries to float32's own range.
# One above the ceiling likewise comes back at it. Both as exponents, for the dtype of the input.
_SMALLEST = {torch.float16: -10}
_SMALLEST_OTHERWISE = -100
_LARGEST = {torch.float16: 15, torch.float64: 1023}
_LARGEST_OTHERWISE = 127

LossScale = Literal["per-sample", "per-call"] | float | None


class GradientStats(NamedTuple):
    """What has passed through the boundary since the last reset.

    Attributes:
        passes: backward passes.
        samples: samples in them.
        nonfinite: samples whose gradient had an infinite or NaN entry. After a pass in half precision on a
            CPU they were run again in full precision; else, and if that did not help, such entries came back as 0.
        zero: samples whose gradient came back as all zero though finite. A high number does no harm in attacks that
            want nothing more of a sample once it is adversarial, such as C&W with its hinge loss.
        nonfinite_logits: samples with an infinite or NaN output, in forward passes with and without gradient.
    """

    passes: int
    samples: int
    nonfinite: int
    zero: int
    nonfinite_logits: int


class Shift(Protocol):
    """The powers of two by which a pass is scaled: one per sample, or one for all."""

    def times(self, values: Tensor) -> Tensor:
        """``values`` (N, ...) scaled, in float32, or float64 where they are."""

    def __neg__(self) -> "Shift":
        """What undoes it."""

    def __add__(self, other: "Shift") -> "Shift":
        """Both, one after the other."""


class Counts:
    """How many backward passes there were, with how many samples and entries."""

    def __init__(self) -> None:
        self._passes = self._samples = self._entries = 0

    def count_pass(self, *, samples: int, entries: int) -> None:
        """Count one backward pass and its size; apart from what ``finish`` counts, which may be replayed."""
        self._passes += 1
        self._samples += samples
        self._entries += entries

    def reset_counts(self) -> None:
        """Forget all counts."""
        self._passes = self._samples = self._entries = 0


def scale(grad: Tensor, shift: Shift | None, loss_scale: LossScale) -> Tensor:
    """A gradient at the outputs as it enters the network."""
    if shift is not None:
        return shift.times(grad)
    if not isinstance(loss_scale, (int, float)):
        return grad
    return (grad if grad.dtype == torch.float64 else grad.float()) * loss_scale


def unscaled(grads: Sequence[Tensor], loss_scale: LossScale) -> list[Tensor]:
    """Gradients in float32 or float64, without a scale that is a number."""
    grads = [g if g.dtype == torch.float64 else g.float() for g in grads]
    return [g / loss_scale for g in grads] if isinstance(loss_scale, (int, float)) else grads


def added(grads: Sequence[Tensor], past: Sequence[Tensor | None]) -> list[Tensor]:
    """Gradients with those that came another way."""
    return [g if other is None else g + other.to(g.dtype) for g, other in zip(grads, past, strict=True)]


def bounds_of(grads: Sequence[Tensor]) -> tuple[int, int]:
    """The exponents between which the largest entry of a gradient comes back."""
    smallest = max(_SMALLEST.get(g.dtype, _SMALLEST_OTHERWISE) for g in grads)
    return smallest, min(_LARGEST.get(g.dtype, _LARGEST_OTHERWISE) for g in grads)


def share_rows(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors share a first dimension, so that each sample has a row in all of them."""
    return len({t.shape[:1] for t in tensors}) == 1 and tensors[0].ndim > 0


def back_of(shift: Tensor, peaks: Tensor, smallest: int, largest: int) -> Tensor:
    """The exponents that undo ``shift``, but leave each sample's largest entry between floor and ceiling."""
    finite = torch.where(peaks.isfinite() & (peaks > 0), peaks, 1.0)
    exponent = exponent_of(finite if shift.ndim else finite.amax())
    return torch.minimum(torch.maximum(-shift, smallest + 1 - exponent), largest - exponent)


def row_peaks(tensors: Sequence[Tensor]) -> Tensor | None:
    """The largest absolute entry of each sample over all tensors; (1,) where they share no first dimension."""
    tensors = [t for t in tensors if t.numel()]
    if not tensors:
        return None
    if len(tensors) == 1 and tensors[0].ndim > 1:
        (tensor,) = tensors
        return tensor.abs().amax(dim=tuple(range(1, tensor.ndim)))
    per_row = share_rows(tensors)
    start = 1 if per_row else 0
    rows = [t.abs().amax(dim=tuple(range(start, t.ndim))) if t.ndim > start else t.abs() for t in tensors]
    rows = [row if per_row else row.view(1) for row in rows]
    if len(rows) == 1:
        return rows[0]
    widest = max((row.dtype for row in rows), key=lambda dtype: dtype.itemsize)
    return torch.stack([row.to(widest) for row in rows]).amax(dim=0)
