"""A look at gradients for which nobody waits: a later pass reads what it found, once that is there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from .audit import Compared, Problem, compare, lost_entries
from .finding import LOST, LOW, NEAR
from .nearness import OLD, cosines, off_by


@dataclass(frozen=True)
class Glimpse:
    """What a look has found, on its way from the device.

    Attributes:
        found: how many samples have a gradient in full precision alone, which share of entries is lost, the median
            cosine and the lowest, by how much outputs are off, and how many are not finite; (6,) on the host.
        arrived: happens when it is there; None if it is.
    """

    found: Tensor
    arrived: "torch.cuda.Event | None"

    def is_there(self) -> bool:
        """Whether it can be read."""
        return self.arrived is None or self.arrived.query()

    def is_doubtful(self) -> bool:
        """Whether an audit has to look closer."""
        zero, lost, cosine, low, off, spoilt = self.found.tolist()
        return bool(zero or lost > LOST or cosine < NEAR or low < LOW or off > OLD or spoilt)


def take_glimpse(problem: Problem, found: Sequence[Tensor], values: Callable[[], Sequence[Tensor]]) -> Glimpse:
    """Compare gradients and outputs with exact ones of the same samples.

    Args:
        problem: the samples.
        found: the gradients of the fast network, one for each input that wants one.
        values: its outputs; asked once those in full precision are known.
    """
    zero, lost, cosine, low = zip(*(_numbers_of(one) for one in compare(problem, found)), strict=True)
    worst = [reduce(torch.add, zero), reduce(torch.maximum, lost)]
    worst += [reduce(torch.fmin, cosine), reduce(torch.fmin, low)]  # which passes over NaN
    pairs = [(v, e) for v, e in zip(values(), problem.values, strict=True) if e.is_floating_point() and e.numel()]
    off = [off_by(v, e) for v, e in pairs]
    spoilt = [(~v.isfinite()).sum() for v, _ in pairs]
    numbers = [*worst, torch.stack(off).amax(), torch.stack(spoilt).sum()]
    return _sent(torch.stack([n.double() for n in numbers]))


def _numbers_of(one: Compared) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How many gradients full precision alone has, the share of lost entries, the median cosine and the lowest."""
    fast, exact = one.fast, one.exact
    here = exact.abs().amax(1) > 0
    zero = here & (fast.abs().amax(1) == 0)
    near = cosines(fast, exact).where(here & ~zero, torch.nan)
    numbers_of_it = (~near.isnan()).sum()
    place = (numbers_of_it // 16).clamp(min=1).minimum((numbers_of_it - 1).clamp(min=0))
    low = near.sort().values.gather(0, place.view(1))[0]  # NaN comes last
    return zero.sum(), lost_entries(fast, exact), near.nanmedian(), low


def _sent(numbers: Tensor) -> Glimpse:
    if numbers.device.type != "cuda":
        return Glimpse(numbers, None)
    found = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
    found.copy_(numbers, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return Glimpse(found, arrived)
