"""The state of the boundary on a processor, where nothing waits: largest entries are read, and counts are numbers."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from .powers import exponent_of, power_of_two, times_power_of_two
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

_MIDDLE = 32
"""Gradients between these powers of two, negative and positive, need no scale in a range like float32's, if in the pass
before none came out beyond the square of that."""

_NORMAL = {torch.float32: (-126, 127), torch.float64: (-1022, 1023)}


@dataclass(frozen=True)
class HostShift:
    """See :class:`Shift`.

    Attributes:
        exponents: int32, (N,) per sample or () for all.
        lowest: no exponent is below it.
        highest: none is above it.
    """

    exponents: Tensor
    lowest: int
    highest: int

    @property
    def is_zero(self) -> bool:
        """Whether it changes nothing."""
        return self.lowest == self.highest == 0

    def times(self, values: Tensor) -> Tensor:
        """Exact for normal results."""
        values = values if values.dtype == torch.float64 else values.float()
        if self.is_zero:
            return values
        lowest, highest = _NORMAL[values.dtype]
        if self.lowest < lowest or self.highest > highest:
            return times_power_of_two(values, self.exponents)
        factor = power_of_two(self.exponents, values.dtype)
        return values * (factor.view(-1, *(1,) * (values.ndim - 1)) if factor.ndim else factor)

    def __neg__(self) -> "HostShift":
        if self.is_zero:
            return self
        return HostShift(-self.exponents, -self.highest, -self.lowest)

    def __add__(self, other: Shift) -> "HostShift":
        other = cast("HostShift", other)
        lowest, highest = self.lowest + other.lowest, self.highest + other.highest
        return HostShift(self.exponents + other.exponents, lowest, highest)


class HostState(Counts):
    """What the boundary of one model remembers between passes, and its arithmetic there.

    An overflow deep in the network seldom reaches the input as an infinity: the next layer sums infinities of both
    signs to NaN. So NaN lowers the exponent too, down to the lowest. Samples that are still spoilt there were spoilt by
    something else: that many are put up with until the next update, and if lowering has cured no other sample, the
    exponent goes back to the start.

    Attributes:
        device: of the tensors that pass.
        exponent: the exponent to which the largest entry of a scaled gradient is brought.
    """

    exponent: int

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start_anew()
        self.reset_counts()

    def start_anew(self) -> None:
        """Scale as for a model that was never seen."""
        self._start = self.exponent = START
        self._incurable = self._calm = self._spoilt_at_start = 0
        self._moderate = False

    def start_at_most(self, exponent: int) -> None:
        """Scale no higher than this, now and later: above it a gradient was seen to overflow."""
        self._start, self.exponent = min(self._start, exponent), min(self.exponent, exponent)

    def follow(self) -> None:
        """Weights have new values: scale as before, or a step higher if there has been no overflow for long."""
        if self._calm >= PATIENCE:
            self.exponent, self._calm = min(self.exponent + STEP, self._start), 0
        self._incurable = 0

    def reset_counts(self) -> None:
        """Forget all counts."""
        super().reset_counts()
        self._nonfinite = self._zero = self._logits = self._zeros = self._vanished = 0
        self._came_in = (0, 0)

    def count_logits(self, outputs: Sequence[Tensor]) -> None:
        """Count the samples with a non-finite output."""
        floating = [o for o in outputs if o.is_floating_point()]
        for output in floating:
            if not math.isfinite(output.detach().sum().item()):  # an entry, or only the sum: then none is counted
                self._logits += sum(not math.isfinite(number) for number in _numbers(floating))
                return

    def stats(self) -> GradientStats:
        """The counts."""
        return GradientStats(self._passes, self._samples, self._nonfinite, self._zero, self._logits)

    @property
    def lost(self) -> int | None:
        """How many samples have had gradients that were not finite, or that vanished; None if asking would wait."""
        return self._nonfinite + self._vanished

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
            self._spoilt_at_start = count
        if self.exponent > FLOOR:
            self.exponent = max(self.exponent - STEP, FLOOR)
        else:
            self._incurable = count
            self.exponent = FLOOR if count < self._spoilt_at_start else self._start

    def _scaled_back(
        self, grads: list[Tensor], shift: HostShift, peaks: Tensor, numbers: Sequence[float], bounds: tuple[int, int]
    ) -> list[Tensor]:
        """Gradients without their scale, the largest entry of each sample between these exponents."""
        smallest, largest = bounds
        lowest, highest = _exponents(numbers)
        self._moderate = lowest >= -2 * _MIDDLE and highest <= 2 * _MIDDLE
        if lowest - shift.highest <= smallest or highest - shift.lowest > largest:
            exponents = back_of(shift.exponents, peaks, smallest, largest)
            return [HostShift(exponents, int(exponents.min()), int(exponents.max())).times(g) for g in grads]
        return grads if shift.is_zero else [(-shift).times(g) for g in grads]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """As before afterwards: for passes that only warm up or record."""
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
        wide: bool = False,
    ) -> HostShift | None:
        """By which powers of two a pass is scaled; None for none.

        Args:
            loss_scale: the option.
            grads: what comes in at the outputs.
            leaves: the inputs.
            higher: by so much higher than usual, as a power of two.
            wide: whether the network has float32's range, in which a scale matters only near the ends of that.
        """
        self._came_in = (0, 0)
        if loss_scale not in ("per-sample", "per-call") or not grads:
            return None
        peaks = row_peaks(grads)
        if peaks is None:
            return None
        numbers = peaks.tolist()
        self._came_in = len(numbers), numbers.count(0.0)
        lowest, highest = _exponents(numbers)
        together = loss_scale == "per-call" or not share_rows([*grads, *leaves])
        if wide and self._moderate and lowest >= -_MIDDLE and highest <= _MIDDLE:
            return _nothing(0 if together else len(numbers))
        to = self.exponent + 1 + higher
        if together:
            own = _exponent(max(filter(math.isfinite, numbers), default=0.0))
            return HostShift(torch.tensor(to - own, dtype=torch.int32, device="cpu"), to - own, to - own)
        exponents = torch.frexp(peaks).exponent if math.isfinite(sum(numbers)) else exponent_of(peaks)
        return HostShift(to - exponents, to - highest, to - lowest)

    def finish(
        self,
        loss_scale: LossScale,
        grads: Sequence[Tensor],
        shift: Shift | None,
        past: Sequence[Tensor | None] = (),
        entered: Sequence[Tensor] | None = None,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Undo the scale, put 0 for what is not finite, count, and scale lower from now on after an overflow.

        Args:
            loss_scale: how the gradients were scaled.
            grads: at the inputs, scaled.
            shift: by what.
            past: gradients at the inputs that were never scaled, to be added.
            entered: the outputs and the gradients that entered there, if the network may overflow: samples that were
                spoilt when they came in cannot tell of an overflow. None if it cannot.

        Returns:
            The gradients in float32 (or float64), contiguous, and which samples lost entries: bool (N,), or None if
            the gradients are empty.
        """
        bounds = bounds_of(grads)
        grads = unscaled(grads, loss_scale)
        peaks = row_peaks(grads)
        if peaks is None:
            return list(grads), None
        numbers = peaks.tolist()
        if shift is not None:
            grads = self._scaled_back(grads, cast("HostShift", shift), peaks, numbers, bounds)
        if any(g is not None for g in past):
            grads = added(grads, past)
            numbers = _numbers(grads)
        whole = math.isfinite(sum(numbers))
        spoilt = [] if whole else [not math.isfinite(number) for number in numbers]
        if not whole:
            grads = [g.nan_to_num(0.0, 0.0, 0.0) for g in grads]
        self._nonfinite += sum(spoilt)
        self._zero += (zero := numbers.count(0.0))
        self._vanished += max(zero - self._came_in[1], 0) if len(numbers) == self._came_in[0] else 0
        self._zeros += sum(g.numel() - int(torch.count_nonzero(g)) for g in grads)
        if entered is not None:
            self.lower_after(0 if whole else _told(spoilt, entered))
        which = (
            torch.zeros(len(numbers), dtype=torch.bool, device="cpu") if whole else torch.tensor(spoilt, device="cpu")
        )
        return [g.contiguous() for g in grads], which


@lru_cache(maxsize=64)
def _nothing(samples: int) -> HostShift:
    """A shift by nothing, of each of so many samples, or of all together if there are 0."""
    return HostShift(torch.zeros((samples,) if samples else (), dtype=torch.int32, device="cpu"), 0, 0)


def _told(spoilt: Sequence[bool], entered: Sequence[Tensor]) -> int:
    """How many of the spoilt samples came in whole."""
    numbers = _numbers([t.detach().float() for t in entered])
    if len(numbers) != len(spoilt):
        return sum(spoilt)
    return sum(lost and math.isfinite(number) for lost, number in zip(spoilt, numbers, strict=True))


def _exponents(numbers: Sequence[float]) -> tuple[int, int]:
    """The lowest and the highest exponent; that of 0, infinity and NaN is 0."""
    lowest, highest = min(filter(None, numbers), default=0.0), max(numbers)
    if not math.isfinite(lowest + highest):
        finite = [number for number in numbers if math.isfinite(number)]
        lowest, highest = min(filter(None, finite), default=0.0), max(finite, default=0.0)
    found = _exponent(lowest), _exponent(highest)
    return min(*found, 0), max(*found, 0)


def _exponent(value: float) -> int:
    """The e with 2^(e-1) <= value < 2^e; 0 for 0."""
    return math.frexp(value)[1]


def _numbers(tensors: Sequence[Tensor]) -> list[float]:
    peaks = row_peaks(tensors)
    return [] if peaks is None else peaks.tolist()
