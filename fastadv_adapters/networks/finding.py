"""What an audit found, and whether that is good enough."""

from dataclasses import dataclass

from ..modules import past
from .nearness import FAR

SAMPLES, MOST = 6, 32  # a fifth of the batch between these: less than 2 % of an attack of 50 steps
NEAR = 0.99  # the median cosine of networks on which attacks are equally strong
GAINS = 0.95  # a step along the fast gradient gains that much of what one along the exact gradient gains, at the least
LOW, LEAST = 0.95, 0.8  # the same for the worst samples but one in sixteen, lest a few bad ones be overlooked
LOST = 0.05  # of the entries of gradients, which are zero in half precision alone: pixels that no step moves
SLIGHT = 0.8  # a gain that is no less is looked for again, if samples are few


@dataclass(frozen=True)
class Finding:
    """What an audit found.

    Attributes:
        samples: how many were looked at.
        zero: how many have a gradient in full precision alone.
        cosine: the median of the cosine between fast and exact gradients; NaN if there was nothing to compare.
        low: the lowest of these cosines but for one sample in sixteen, and for one at least.
        gain: what a step along the fast gradients gains of what one along the exact ones does, the median; NaN if none
            was tried.
        least: likewise, of these gains.
        overflown: how many have outputs that are finite in full precision alone.
        lone: whether there are samples whose gradients point elsewhere, so few that they say nothing of the others.
        lost: the share of entries that are zero in half precision alone, though not negligible beside the largest.
        off: by how much outputs are off, or their differences if the loss sees these alone, as a share of a sample's
            largest one; 0 if that is no more than rounding.
    """

    samples: int
    zero: int
    cosine: float
    low: float = float("nan")
    gain: float = float("nan")
    least: float = float("nan")
    lone: bool = False
    overflown: int = 0
    lost: float = 0.0
    off: float = 0.0

    @property
    def good(self) -> bool:
        """Whether attacks are as strong by these gradients as by exact ones."""
        if self._is_lost:
            return False
        if not (self.cosine < NEAR or self.low < LOW):
            return True
        return self.gain >= GAINS and not self.least < LEAST

    @property
    def is_slight(self) -> bool:
        """Whether so few samples gain so nearly what they should that it may be chance."""
        return self.samples < SAMPLES and not self._is_lost and min(self.gain, self.least) >= SLIGHT

    @property
    def left_range(self) -> bool:
        """Whether gradients or outputs left the range of half precision, and did not only lack digits."""
        return self.zero > 0 or self.overflown > 0 or self.lost > LOST

    @property
    def _is_lost(self) -> bool:
        return self.left_range or self.off > 0

    def __str__(self) -> str:
        parts = [f"outputs of {self.overflown} samples overflow"] if self.overflown else []
        off = past(self.off, FAR, ".0%") if self.off > FAR else f"{self.off:.0%}"
        parts += [f"outputs, or their differences, are off by {off} of the largest"] if self.off else []
        parts += [f"{self.zero} of {self.samples} samples have no gradient"] if self.zero else []
        lost = past(self.lost, LOST, ".0%")
        parts += [f"{lost} of the entries of gradients are zero, and not in full precision"] if self.lost > LOST else []
        if self.cosine == self.cosine:
            few = f", of the worst samples {_told(self.low, LOW, '.2f')}" if self.low < LOW <= self.cosine else ""
            told = _told(self.cosine, NEAR, ".2f")
            parts.append(f"the median cosine between its gradients and exact ones is {told}{few}")
        if self.gain == self.gain:
            few = f", of the worst samples {_told(self.least, LEAST, '.0%')}" if self.least < LEAST <= self.gain else ""
            parts.append(f"a step along them gains {_told(self.gain, GAINS, '.0%')} of what it should{few}")
        return ", ".join(parts)


def _told(number: float, least: float, form: str) -> str:
    return past(number, least, form) if number < least else f"{number:{form}}"
