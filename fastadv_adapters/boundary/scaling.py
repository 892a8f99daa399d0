"""How gradients are scaled on the way into half precision, unscaled and filtered on the way out, and what is counted.

Backpropagation is linear, and in eval mode samples do not see each other. So each sample's gradient at the logits may
be multiplied by its own power of two, which brings its largest entry to where half precision is precise, and the
gradient at the input divided by it in float32: exactly the same gradient, without the underflow (loss scaling after
Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740, here per sample and with powers of two only).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .powers import exponent_of, times_power_of_two

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
        nonfinite: samples whose gradient had an infinite or NaN entry; such entries came back as 0.
        zero: samples whose gradient came back as all zero though finite.
        nonfinite_logits: samples with an infinite or NaN output, in forward passes of either kind.
    """

    passes: int
    samples: int
    nonfinite: int
    zero: int
    nonfinite_logits: int


class Watch:
    """Collects which samples lost gradient entries; see :func:`watch_gradients`.

    Attributes:
        broken: bool tensor (N,), True for samples with a non-finite entry in any watched pass; None before the first.
    """

    def __init__(self) -> None:
        self.broken: Tensor | None = None

    def add(self, broken: Tensor) -> None:
        """Note the broken samples of one pass.

        Raises:
            ValueError: another number of samples than in the passes before.
        """
        if self.broken is not None and self.broken.shape != broken.shape:
            raise ValueError(
                f"expected passes of {len(self.broken)} samples inside one watch_gradients(), got one of "
                f"{len(broken)}: watch batches of each size in a block of their own"
            )
        self.broken = broken if self.broken is None else self.broken | broken


_watches: ContextVar[tuple[Watch, ...]] = ContextVar("watches", default=())


@contextmanager
def watch_gradients() -> Iterator[Watch]:
    """Watch the backward passes of all forwards made inside the block (the passes themselves may come later).

    All those passes must have the same number of samples. Nothing waits for the device.
    """
    watch = Watch()
    token = _watches.set((*_watches.get(), watch))
    try:
        yield watch
    finally:
        _watches.reset(token)


class State:
    """What the boundary of one model remembers between passes, all of it on the device: nothing here waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.passes = 0
        self._samples = 0
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)
        self._start, self.exponent = (torch.full((), START, dtype=torch.int32, device=device) for _ in range(2))
        self._calm = torch.zeros((), dtype=torch.int64, device=device)
        self._broken_at_start = torch.zeros((), dtype=torch.int64, device=device)
        self._incurable = torch.zeros((), dtype=torch.int64, device=device)

    def start_anew(self) -> None:
        """Scale as for a model that was never seen."""
        self._start.fill_(START)
        self.exponent.fill_(START)
        self._incurable.zero_()
        self._calm.zero_()

    def start_at_most(self, exponent: int) -> None:
        """Scale no higher than this, now and later: above it a gradient was seen to overflow."""
        self._start.clamp_(max=exponent)
        self.exponent.clamp_(max=exponent)

    def follow(self) -> None:
        """Weights have new values: scale as before, or a step higher if there has been no overflow for long."""
        higher = torch.minimum(self.exponent + STEP, self._start)
        climbs = self._calm >= PATIENCE
        self.exponent.copy_(torch.where(climbs, higher, self.exponent))
        self._calm.masked_fill_(climbs, 0)
        self._incurable.zero_()

    def reset_counts(self) -> None:
        """Forget all counts."""
        self.passes = self._samples = 0
        self._counts.zero_()

    def count_logits(self, outputs: Sequence[Tensor]) -> None:
        """Count the samples with a non-finite output."""
        peaks = row_peaks([o for o in outputs if o.is_floating_point()])
        if peaks is not None:
            self._counts[2] += (~peaks.isfinite()).sum()

    def count_samples(self, samples: int) -> None:
        """Count one backward pass and its samples; apart from what is counted on the device, which may be replayed."""
        self.passes += 1
        self._samples += samples

    def count_pass(self, peaks: Tensor, broken: Tensor) -> None:
        """Count from each sample's largest gradient entry."""
        self._counts[:2] += torch.stack((broken.sum(), (peaks == 0).sum()))

    def lower_after(self, overflowed: Tensor) -> None:
        """Scale lower from the next pass on if this one overflowed.

        An overflow deep in the network seldom reaches the input as an infinity: the next layer sums infinities of
        both signs to NaN. So NaN lowers the exponent too, down to the lowest. Samples that are still broken there
        were broken by something else: that many are put up with until the next update, and if lowering has cured no
        other sample, the exponent goes back to the start.

        Args:
            overflowed: which samples lost gradient entries though what came in was finite, bool (N,).
        """
        count = overflowed.sum()
        lower = count > self._incurable
        at_start, at_floor = self.exponent >= self._start, self.exponent <= FLOOR
        self._broken_at_start.copy_(torch.where(lower & at_start, count, self._broken_at_start))
        given_up = lower & at_floor
        self._incurable.copy_(torch.where(given_up, count, self._incurable))
        at_bottom = torch.where(count < self._broken_at_start, FLOOR, self._start)
        lowered = torch.where(at_floor, at_bottom, (self.exponent - STEP).clamp(min=FLOOR))
        self.exponent.copy_(torch.where(lower, lowered, self.exponent))
        self._calm.add_(1).masked_fill_(lower, 0)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """As before afterwards: for passes that only warm up or record."""
        tensors = (self._counts, self.exponent, self._broken_at_start, self._incurable, self._calm)
        before = [t.clone() for t in tensors]
        try:
            yield
        finally:
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)

    def stats(self) -> GradientStats:
        """Read the counts; waits for the device."""
        nonfinite, zero, logits = self._counts.tolist()
        return GradientStats(self.passes, self._samples, nonfinite, zero, logits)


def current_watches() -> tuple[Watch, ...]:
    """The watches that forward passes of this thread report to now."""
    return _watches.get()


def shift_for(
    loss_scale: LossScale, state: State, grads: Sequence[Tensor], leaves: Sequence[Tensor], *, higher: int = 0
) -> Tensor | None:
    """The exponents of the powers of two by which this pass is scaled: (N,) per sample, () per call, None for none."""
    if loss_scale not in ("per-sample", "per-call") or not grads:
        return None
    lengths = {t.shape[:1] for t in (*grads, *leaves)}
    peaks = row_peaks(grads)
    if peaks is None or peaks.numel() == 0:
        return None
    if loss_scale == "per-call" or len(lengths) != 1:
        peaks = torch.where(peaks.isfinite(), peaks, 0.0).amax()
    return state.exponent + (1 + higher) - exponent_of(peaks)


def scale(grad: Tensor, shift: Tensor | None, loss_scale: LossScale) -> Tensor:
    """A gradient at the outputs as it enters the network."""
    if shift is not None:
        return times_power_of_two(grad, shift)
    if not isinstance(loss_scale, (int, float)):
        return grad
    return (grad if grad.dtype == torch.float64 else grad.float()) * loss_scale


def unscale_and_filter(
    loss_scale: LossScale,
    state: State,
    grads: Sequence[Tensor],
    shift: Tensor | None,
    past: Sequence[Tensor | None] = (),
) -> tuple[list[Tensor], Tensor | None]:
    """Undo the scale, put 0 for what is not finite, and count.

    Args:
        loss_scale: how the gradients were scaled.
        state: where to count.
        grads: at the inputs, scaled.
        shift: the exponents by which they were.
        past: gradients at the inputs that were never scaled, to be added.

    Returns:
        The gradients in float32 (or float64), contiguous, and which samples lost entries: bool (N,), or None if the
        gradients are empty.
    """
    smallest = max(_SMALLEST.get(g.dtype, _SMALLEST_OTHERWISE) for g in grads)
    largest = min(_LARGEST.get(g.dtype, _LARGEST_OTHERWISE) for g in grads)
    grads = [g if g.dtype == torch.float64 else g.float() for g in grads]
    if isinstance(loss_scale, (int, float)):
        grads = [g / loss_scale for g in grads]
    peaks = row_peaks(grads)
    if peaks is None:
        return list(grads), None
    if shift is not None:
        back = _back(shift, peaks, smallest, largest)
        grads = [times_power_of_two(g, back) for g in grads]
    if any(g is not None for g in past):
        grads = [g if other is None else g + other.to(g.dtype) for g, other in zip(grads, past, strict=True)]
        peaks = row_peaks(grads)
        if peaks is None:
            return list(grads), None
    broken = ~peaks.isfinite()
    state.count_pass(peaks, broken)
    return [g.nan_to_num(0.0, 0.0, 0.0).contiguous() for g in grads], broken


def _back(shift: Tensor, peaks: Tensor, smallest: int, largest: int) -> Tensor:
    """The exponents that undo ``shift``, but leave each sample's largest entry between floor and ceiling."""
    finite = torch.where(peaks.isfinite() & (peaks > 0), peaks, 1.0)
    exponent = exponent_of(finite if shift.ndim else finite.amax())
    return torch.minimum(torch.maximum(-shift, smallest + 1 - exponent), largest - exponent)


def row_peaks(tensors: Sequence[Tensor]) -> Tensor | None:
    """The largest absolute entry of each sample over all tensors; (1,) where they share no first dimension."""
    tensors = [t for t in tensors if t.numel()]
    if not tensors:
        return None
    per_row = len({t.shape[:1] for t in tensors}) == 1 and tensors[0].ndim > 0
    start = 1 if per_row else 0
    rows = [t.abs().amax(dim=tuple(range(start, t.ndim))) if t.ndim > start else t.abs() for t in tensors]
    rows = [row if per_row else row.view(1) for row in rows]
    widest = max((row.dtype for row in rows), key=lambda dtype: dtype.itemsize)
    return torch.stack([row.to(widest) for row in rows]).amax(dim=0)
