"""The state of the boundary on a processor, where nothing waits: exponents and counts are numbers of Python."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .scaling import (
    FLOOR,
    PATIENCE,
    START,
    STEP,
    GradientStats,
    LossScale,
    Shift,
    State,
    added,
    bounds_of,
    rows_of,
    unscaled,
)

_NORMAL = {torch.float32: (-126, 127), torch.float64: (-1022, 1023)}


@dataclass(frozen=True)
class HostShift:
    """See :class:`Shift`.

    Attributes:
        exponents: one per sample, or one for all.
    """

    exponents: Sequence[int]

    def times(self, values: Tensor) -> Tensor:
        """Exact for normal results."""
        values = values if values.dtype == torch.float64 else values.float()
        lowest, highest = _NORMAL[values.dtype]
        if lowest <= min(self.exponents) and max(self.exponents) <= highest:
            return values * _factor(self.exponents, values)
        halves = [exponent // 2 for exponent in self.exponents]  # one factor alone would lie outside the range
        rest = [exponent - half for exponent, half in zip(self.exponents, halves, strict=True)]
        return values * _factor(halves, values) * _factor(rest, values)

    def __neg__(self) -> "HostShift":
        return HostShift([-exponent for exponent in self.exponents])

    def __add__(self, other: Shift) -> "HostShift":
        pair = [self.exponents, cast("HostShift", other).exponents]
        longest = max(map(len, pair))
        return HostShift([sum(both) for both in zip(*(list(e) * (longest // len(e)) for e in pair), strict=True)])


def _factor(exponents: Sequence[int], values: Tensor) -> Tensor | float:
    lowest, highest = _NORMAL[values.dtype]
    factors = [math.ldexp(1.0, min(max(exponent, lowest), highest)) for exponent in exponents]
    if len(factors) == 1 or min(factors) == max(factors):
        return factors[0]
    return torch.tensor(factors, dtype=values.dtype).view(-1, *(1,) * (values.ndim - 1))


class HostState(State):
    """See :class:`State`."""

    exponent: int

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.start_anew()
        self.reset_counts()

    def start_anew(self) -> None:
        """Scale as for a model that was never seen."""
        self._start = self.exponent = START
        self._incurable = self._calm = self._broken_at_start = 0

    def start_at_most(self, exponent: int) -> None:
        """Scale no higher than this."""
        self._start, self.exponent = min(self._start, exponent), min(self.exponent, exponent)

    def follow(self) -> None:
        """Weights have new values."""
        if self._calm >= PATIENCE:
            self.exponent, self._calm = min(self.exponent + STEP, self._start), 0
        self._incurable = 0

    def reset_counts(self) -> None:
        """Forget all counts."""
        self._passes = self._samples = self._nonfinite = self._zero = self._logits = self._entries = self._zeros = 0

    def count_logits(self, outputs: Sequence[Tensor]) -> None:
        """Count the samples with a non-finite output."""
        floating = [o for o in outputs if o.is_floating_point() and o.numel()]
        if not all(math.isfinite(o.detach().abs().amax().item()) for o in floating):
            self._logits += sum(not math.isfinite(peak) for peak in row_peaks(floating))

    def count_pass(self, *, samples: int, entries: int) -> None:
        """Count one backward pass and its size."""
        self._passes += 1
        self._samples += samples
        self._entries += entries

    def stats(self) -> GradientStats:
        """The counts."""
        return GradientStats(self._passes, self._samples, self._nonfinite, self._zero, self._logits)

    def zero_entries(self) -> float:
        """The share of gradient entries that came back as exactly 0."""
        return self._zeros / max(self._entries, 1)

    def lower_after(self, count: int) -> None:
        """Scale lower from the next pass on if this one overflowed.

        Args:
            count: how many samples lost gradient entries though what came in was finite.
        """
        self._calm += 1
        if count <= self._incurable:
            return
        self._calm = 0
        if self.exponent >= self._start:
            self._broken_at_start = count
        if self.exponent > FLOOR:
            self.exponent = max(self.exponent - STEP, FLOOR)
        else:
            self._incurable = count
            self.exponent = FLOOR if count < self._broken_at_start else self._start

    @contextmanager
    def kept(self) -> Iterator[None]:
        """As before afterwards."""
        before: dict[str, Any] = dict(vars(self))
        try:
            yield
        finally:
            vars(self).update(before)

    def shift_for(
        self,
        loss_scale: LossScale,
        grads: Sequence[Tensor],
        leaves: Sequence[Tensor],
        *,
        higher: int = 0,
    ) -> HostShift | None:
        """By which powers of two a pass is scaled."""
        if loss_scale not in ("per-sample", "per-call") or not grads:
            return None
        peaks = row_peaks(grads)
        if not peaks:
            return None
        if loss_scale == "per-call" or not rows_of([*grads, *leaves]):
            peaks = [max((p for p in peaks if math.isfinite(p)), default=0.0)]
        return HostShift([self.exponent + 1 + higher - _exponent(peak) for peak in peaks])

    def finish(
        self,
        loss_scale: LossScale,
        grads: Sequence[Tensor],
        shift: Shift | None,
        past: Sequence[Tensor | None] = (),
        entered: Sequence[Tensor] | None = None,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Undo the scale, put 0 for what is not finite, count, and scale lower from now on after an overflow."""
        bounds = bounds_of(grads)
        grads = unscaled(grads, loss_scale)
        peaks = row_peaks(grads)
        if not peaks:
            return list(grads), None
        if shift is not None:
            back = _back(cast("HostShift", shift).exponents, peaks, *bounds)
            grads = [back.times(g) for g in grads]
        if any(g is not None for g in past):
            grads = added(grads, past)
            peaks = row_peaks(grads)
        broken = [not math.isfinite(peak) for peak in peaks]
        if any(broken):
            grads = [g.nan_to_num(0.0, 0.0, 0.0) for g in grads]
        self._nonfinite += sum(broken)
        self._zero += peaks.count(0.0)
        self._zeros += sum(g.numel() - int(torch.count_nonzero(g)) for g in grads)
        if entered is not None:
            self.lower_after(_told(broken, entered) if any(broken) else 0)
        return [g.contiguous() for g in grads], torch.tensor(broken)


def _told(broken: Sequence[bool], entered: Sequence[Tensor]) -> int:
    """How many of the broken samples came in whole."""
    peaks = row_peaks([t.detach().float() for t in entered])
    if len(peaks) != len(broken):
        return sum(broken)
    return sum(lost and math.isfinite(peak) for lost, peak in zip(broken, peaks, strict=True))


def _back(exponents: Sequence[int], peaks: Sequence[float], smallest: int, largest: int) -> HostShift:
    """What undoes a scale, but leaves each sample's largest entry between floor and ceiling."""
    if len(exponents) == 1:
        peaks = [max((p for p in peaks if math.isfinite(p)), default=0.0)]
    found = [_exponent(peak if math.isfinite(peak) and peak else 1.0) for peak in peaks]
    return HostShift([min(max(-e, smallest + 1 - own), largest - own) for e, own in zip(exponents, found, strict=True)])


def _exponent(value: float) -> int:
    """The e with 2^(e-1) <= |value| < 2^e; 0 if it is zero, infinite or NaN."""
    return math.frexp(value)[1] if math.isfinite(value) else 0


def row_peaks(tensors: Sequence[Tensor]) -> list[float]:
    """The largest absolute entry of each sample over all tensors; of all where they share no first dimension."""
    tensors = [t for t in tensors if t.numel()]
    if not tensors:
        return []
    rows = [_peaks(t, rows=rows_of(tensors)) for t in tensors]
    return rows[0] if len(rows) == 1 else [_largest(peaks) for peaks in zip(*rows, strict=True)]


def _largest(peaks: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, peaks)) else max(peaks)


def _peaks(tensor: Tensor, *, rows: bool) -> list[float]:
    size = tensor.detach().abs()  # no isfinite() and no norm, which take several times as long
    if not rows:
        return [size.amax().item()]
    found: list[float] = (size.amax(tuple(range(1, size.ndim))) if size.ndim > 1 else size).tolist()
    return found
