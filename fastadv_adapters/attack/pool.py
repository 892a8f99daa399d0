"""The samples that ``SafePGD`` attacks, and the best candidate of each."""

from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
from torch import Tensor

from .balls import Ball
from .rounding import has_float64


@dataclass
class Best:
    """The best candidates so far: adversarial beats not adversarial, then a higher loss wins."""

    x: Tensor
    adversarial: Tensor
    loss: Tensor

    @classmethod
    def none(cls, x: Tensor) -> "Best":
        """Candidates that anything beats; offers are written into ``x``."""
        wide = torch.float64 if has_float64(x.device) else torch.float32
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

    def put(self, index: Tensor, part: "Best") -> None:
        """Write those at ``index``."""
        for f in fields(self):
            getattr(self, f.name).index_copy_(0, index, getattr(part, f.name))


class Padding(NamedTuple):
    """Which samples of a pool stand in the rows of a batch: all of them in order, then one of them again and again."""

    rows: Tensor
    labels: Tensor


@dataclass
class Pool:
    """The samples under attack. Dropping some compacts every tensor.

    Attributes:
        index: their places in the caller's batch.
        x: the iterates.
        best: the best candidates, as the attacked network judges them.
        broken: whether gradient or logits were not finite in any step.
    """

    index: Tensor
    labels: Tensor
    ball: Ball
    x: Tensor
    best: Best
    broken: Tensor
    _padding: Padding | None = field(default=None, init=False)

    def take(self, index: Tensor) -> "Pool":
        """The samples at ``index``, in this pool's order."""
        tensors = (t.index_select(0, index) for t in (self.index, self.labels, self.x, self.broken))
        places, labels, x, broken = tensors
        return Pool(places, labels, self.ball.take(index), x, self.best.take(index), broken)

    def padded(self, size: int) -> Padding:
        """The rows of a batch of ``size``.

        What is repeated is the first sample that was not broken when this was first asked: a copy of a broken one would
        count as one more when the scale of half precision is chosen.
        """
        if self._padding is None or len(self._padding.rows) != size:
            repeated = self.broken.to(torch.uint8).argmin()
            rows = padded_rows(len(self.index), size, repeated)
            self._padding = Padding(rows, self.labels.index_select(0, rows))
        return self._padding


def padded_rows(count: int, size: int, repeated: Tensor) -> Tensor:
    """0 to ``count - 1``, then the index ``repeated`` until there are ``size``, int64 on its device."""
    return torch.cat([torch.arange(count, device=repeated.device), repeated.expand(size - count)])
