"""The state of the boundary on an accelerator: exponents and counts stay there, and nothing waits for them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from .powers import exponent_of, times_power_of_two
from .scaling import (
    FLOOR,
    PATIENCE,
    START,
    STEP,
    Counts,
    GradientStats,
    LossScale,
    Shift,
    added,
    back_of,
    bounds_of,
    row_peaks,
    share_rows,
    unscaled,
)


@dataclass(frozen=True)
class DeviceShift:
    """See :class:`Shift`.

    Attributes:
        exponents: int32, (N,) per sample or () for all.
    """

    exponents: Tensor

    def times(self, values: Tensor) -> Tensor:
        """Exact for normal results."""
        return times_power_of_two(values, self.exponents)

    def __neg__(self) -> "DeviceShift":
        return DeviceShift(-self.exponents)

    def __add__(self, other: Shift) -> "DeviceShift":
        return DeviceShift(self.exponents + cast("DeviceShift", other).exponents)


class DeviceState(Counts):
    """As ``HostState``, which says what each method is for."""

    lost = None
    exponent: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        # Samples that are not finite, and all zero; entries that are zero; outputs that are not finite.
        self._counts = torch.zeros(4, dtype=torch.int64, device=device)
        self._start, self.exponent = (torch.full((), START, dtype=torch.int32, device=device) for _ in range(2))
        self._calm, self._spoilt_at_start, self._incurable = (
            torch.zeros((), dtype=torch.int64, device=device) for _ in range(3)
        )

    def start_anew(self) -> None:
        """Scale as for a model that was never seen."""
        self._start.fill_(START)
        self.exponent.fill_(START)
        self._incurable.zero_()
        self._calm.zero_()

    def start_at_most(self, exponent: int) -> None:
        """Scale no higher than this."""
        self._start.clamp_(max=exponent)
        self.exponent.clamp_(max=exponent)

    def follow(self) -> None:
        """Weights have new values."""
        higher = torch.minimum(self.exponent + STEP, self._start)
        climbs = self._calm >= PATIENCE
        self.exponent.copy_(torch.where(climbs, higher, self.exponent))
        self._calm.masked_fill_(climbs, 0)
        self._incurable.zero_()

    def reset_counts(self) -> None:
        """Forget all counts."""
        super().reset_counts()
        self._counts.zero_()

    def count_logits(self, outputs: Sequence[Tensor]) -> None:
        """Count the samples with a non-finite output."""
        peaks = row_peaks([o for o in outputs if o.is_floating_point()])
        if peaks is not None:
            self._counts[3] += (~peaks.isfinite()).sum()

    def stats(self) -> GradientStats:
        """Read the counts; waits for the device."""
        nonfinite, zero, _, logits = self._counts.tolist()
        return GradientStats(self._passes, self._samples, nonfinite, zero, logits)

    def zero_entries(self) -> float:
        """The share of gradient entries that came back as exactly 0."""
        return int(self._counts[2]) / max(self._entries, 1)

    def lower_after(self, count: Tensor) -> None:
        """Scale lower from the next pass on if this one overflowed.

        Args:
            count: how many samples lost gradient entries though what came in was finite, int64 ().
        """
        lower = count > self._incurable
        at_start, at_floor = self.exponent >= self._start, self.exponent <= FLOOR
        self._spoilt_at_start.copy_(torch.where(lower & at_start, count, self._spoilt_at_start))
        given_up = lower & at_floor
        self._incurable.copy_(torch.where(given_up, count, self._incurable))
        at_bottom = torch.where(count < self._spoilt_at_start, FLOOR, self._start)
        lowered = torch.where(at_floor, at_bottom, (self.exponent - STEP).clamp(min=FLOOR))
        self.exponent.copy_(torch.where(lower, lowered, self.exponent))
        self._calm.add_(1).masked_fill_(lower, 0)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """As before afterwards."""
        tensors = (self._counts, self.exponent, self._spoilt_at_start, self._incurable, self._calm)
        before = [t.clone() for t in tensors]
        numbers = self._passes, self._samples, self._entries
        try:
            yield
        finally:
            self._passes, self._samples, self._entries = numbers
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)

    def shift_for(
        self,
        loss_scale: LossScale,
        grads: Sequence[Tensor],
        leaves: Sequence[Tensor],
        *,
        higher: int = 0,
        wide: bool = False,
    ) -> DeviceShift | None:
        """By which powers of two a pass is scaled."""
        if loss_scale not in ("per-sample", "per-call") or not grads:
            return None
        peaks = row_peaks(grads)
        if peaks is None or peaks.numel() == 0:
            return None
        if loss_scale == "per-call" or not share_rows([*grads, *leaves]):
            peaks = torch.where(peaks.isfinite(), peaks, 0.0).amax()
        return DeviceShift(self.exponent + (1 + higher) - exponent_of(peaks))

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
        if peaks is None:
            return list(grads), None
        if shift is not None:
            back = back_of(cast("DeviceShift", shift).exponents, peaks, *bounds)
            grads = [times_power_of_two(g, back) for g in grads]
        if any(g is not None for g in past):
            grads = added(grads, past)
            peaks = row_peaks(grads)
            if peaks is None:
                return list(grads), None
        spoilt = ~peaks.isfinite()
        grads = [g.nan_to_num(0.0, 0.0, 0.0).contiguous() for g in grads]
        zeros = sum((g.numel() - torch.count_nonzero(g) for g in grads), start=torch.zeros_like(self._counts[0]))
        self._counts[:3] += torch.stack((spoilt.sum(), (peaks == 0).sum(), zeros))
        if entered is not None:
            self.lower_after((spoilt & _entered_finite(entered, spoilt)).sum())
        return grads, spoilt


def _entered_finite(entered: Sequence[Tensor], spoilt: Tensor) -> Tensor:
    """Which samples have finite outputs and came with a finite gradient: the others cannot tell of an overflow."""
    peaks = row_peaks([t.detach().float() for t in entered])
    return spoilt if peaks is None or peaks.shape != spoilt.shape else peaks.isfinite()
