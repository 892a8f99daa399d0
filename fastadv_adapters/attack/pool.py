"""The samples that ``SafePGD`` attacks, and the best candidate of each."""

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from ..modules import widest_on
from .balls import Ball
from .cycles import Past
from .targets import Targets


@dataclass
class Best:
    """The best candidates so far: adversarial beats not adversarial, then a higher loss wins."""

    x: Tensor
    adversarial: Tensor
    loss: Tensor

    @classmethod
    def none(cls, x: Tensor) -> "Best":
        """Candidates that anything beats; offers are written into ``x``."""
        wide = widest_on(x.device)
        loss = torch.full((len(x),), -torch.inf, dtype=wide, device=x.device)
        return cls(x, torch.zeros(len(x), dtype=torch.bool, device=x.device), loss)

    def offer(self, x: Tensor, adversarial: Tensor, loss: Tensor) -> None:
        """Take what is better, sample by sample and in place; a loss that is NaN is the lowest."""
        loss = loss.to(self.loss.dtype).nan_to_num(-torch.inf, torch.inf, -torch.inf)
        better = torch.where(adversarial == self.adversarial, loss > self.loss, adversarial)
        torch.where(better.view(-1, *(1,) * (x.ndim - 1)), x, self.x, out=self.x)
        torch.where(better, loss, self.loss, out=self.loss)
        self.adversarial.logical_or_(adversarial)

    def take(self, index: Tensor) -> "Best":
        """Those at ``index``."""
        return Best(*(getattr(self, f.name).index_select(0, index) for f in fields(self)))

    def join(self, other: "Best") -> "Best":
        """These and then others."""
        return Best(*(torch.cat([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)))

    def put(self, index: Tensor, part: "Best") -> None:
        """Write those at ``index``."""
        for f in fields(self):
            getattr(self, f.name).index_copy_(0, index, getattr(part, f.name))


@dataclass(frozen=True)
class Rows:
    """The batch that a network sees: the samples of a pool in order, then copies of one of them up to its size.

    Attributes:
        count: how many samples there are.
        index: which sample stands in each row; None if there are no copies.
        targets: of each row.
    """

    count: int
    index: Tensor | None
    targets: Targets

    @property
    def size(self) -> int:
        """How many rows there are."""
        return self.count if self.index is None else len(self.index)

    def spread(self, values: Tensor) -> Tensor:
        """Values per sample as values per row."""
        return values if self.index is None else values.index_select(0, self.index)

    def kept(self, values: Tensor) -> Tensor:
        """Values per row as values per sample."""
        return values if self.index is None else values[: self.count]


@dataclass
class Pool:
    """The samples under attack. Dropping some compacts every tensor.

    Attributes:
        index: their places in the caller's batch.
        x: the iterates.
        best: the best candidates, as the attacked network judges them.
        spoilt: whether gradient or logits were not finite in any step.
        past: earlier iterates, if it matters whether one comes again.
    """

    index: Tensor
    targets: Targets
    ball: Ball
    x: Tensor
    best: Best
    spoilt: Tensor
    past: Past | None = None
    _rows: Rows | None = field(default=None, init=False)

    def take(self, index: Tensor) -> "Pool":
        """The samples at ``index``, in this pool's order."""
        places, x, spoilt = (t.index_select(0, index) for t in (self.index, self.x, self.spoilt))
        best, past = self.best.take(index), self.past and self.past.take(index)
        return Pool(places, self.targets.take(index), self.ball.take(index), x, best, spoilt, past)

    def join(self, other: "Pool") -> "Pool":
        """These samples and then others."""
        index, x, spoilt = (torch.cat([getattr(self, n), getattr(other, n)]) for n in ("index", "x", "spoilt"))
        past = self.past and other.past and self.past.join(other.past)
        best, targets, ball = self.best.join(other.best), self.targets.join(other.targets), self.ball.join(other.ball)
        return Pool(index, targets, ball, x, best, spoilt, past)

    def forget_rows(self) -> None:
        """Make the batch anew when it is next asked for: targets have changed."""
        self._rows = None

    def rows(self, size: int) -> Rows:
        """The batch of ``size`` rows.

        What is repeated is the first sample that was not spoilt when this was first asked: a copy of a spoilt one would
        count as one more when the scale of half precision is chosen.
        """
        count = len(self.index)
        if size == count:
            return Rows(count, None, self.targets)
        if self._rows is None or self._rows.size != size:
            index = padded_rows(count, size, self.spoilt.to(torch.uint8).argmin())
            self._rows = Rows(count, index, self.targets.take(index))
        return self._rows


def padded_rows(count: int, size: int, repeated: Tensor) -> Tensor:
    """0 to ``count - 1``, then the index ``repeated`` until there are ``size``, int64 on its device."""
    return torch.cat([torch.arange(count, device=repeated.device), repeated.expand(size - count)])
