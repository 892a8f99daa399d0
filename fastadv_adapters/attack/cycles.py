"""Iterates that come again: with steps of one size they soon go round in a cycle, and no candidate is new.

Sign steps of a constant size repeat with period 2, as a rule (arXiv:2503.19347).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .rounding import bits_of

WINDOW = 16
"""So many steps an iterate is kept to find longer cycles than those of one or two steps."""

_ANCHOR, _AFTER = 2, 3  # places among the kept iterates; 0 and 1 are the last two, in turn


@dataclass
class Past:
    """Iterates that later ones are compared with, bit by bit: the last two, an older one and the one after that.

    The older one, the anchor, is replaced every :data:`WINDOW` steps, which finds cycles of fewer steps than that
    without keeping all of them.

    Attributes:
        kept: (4, N, ...), in the dtype of the iterates; NaN until there is one.
        hits: (3, N), whether the newest iterate equals the one before it, that before this, and the anchor.
        age: steps since the first iterate.
    """

    kept: Tensor
    hits: Tensor
    age: int = 0

    @classmethod
    def beginning(cls, x: Tensor) -> "Past":
        """Of the first iterates."""
        past = cls.fresh(x)
        past.kept[0], past.kept[_ANCHOR] = x, x
        return past

    def take(self, index: Tensor) -> "Past":
        """That of the samples at ``index``."""
        return Past(self.kept.index_select(1, index), self.hits.index_select(1, index), self.age)

    @classmethod
    def fresh(cls, x: Tensor) -> "Past":
        """Of samples that begin, maybe among others: nothing is kept."""
        kept = x.new_full((4, *x.shape), torch.nan)
        return cls(kept, torch.zeros(3, len(x), dtype=torch.bool, device=x.device))

    def join(self, other: "Past") -> "Past":
        """That of these samples and then of others, which take over the age of these."""
        return Past(torch.cat([self.kept, other.kept], 1), torch.cat([self.hits, other.hits], 1), self.age)

    def forget(self, index: Tensor) -> None:
        """Keep nothing of the samples at ``index``: they begin anew."""
        self.kept.index_fill_(1, index, torch.nan)
        self.hits.index_fill_(1, index, False)

    def returned(self, x: Tensor) -> Tensor:
        """Take in the next iterates; returns which samples are in a cycle, bool (N,).

        An iterate that was there before is not enough: the one after it has to come again too. So a gradient has been
        asked for twice at the same place, in other company, and the step was the same.
        """
        self.age += 1
        newer, older = (self.age - 1) % 2, self.age % 2
        same = (bits_of(self.kept) == bits_of(x)).flatten(2).all(2).unbind()
        cycling = (self.hits & torch.stack([same[newer], same[older], same[_AFTER]])).any(0)
        self.hits = torch.stack([same[newer], same[older], same[_ANCHOR]])
        self.kept[older] = x
        if self.age % WINDOW == 0:
            self.kept[_ANCHOR] = x
            self.hits[2] = False
        elif self.age % WINDOW == 1:
            self.kept[_AFTER] = x
        return cycling


def can_cycle(step_sizes: Sequence[float], device: torch.device) -> bool:
    """Whether an iterate that comes again can mean that all after it do: steps are alike, and kernels deterministic.

    On processors they are; elsewhere only if ``torch.use_deterministic_algorithms(True)`` asks for that.
    """
    exact = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    return len(set(step_sizes)) == 1 and (exact or device.type == "cpu")
