"""The samples that ``SafePGD`` attacks, and the best candidate of each."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .norms import Ball
from .rounding import has_float64


@dataclass
class Best:
    """The best candidates so far: adversarial beats not adversarial, then a higher loss wins."""

    x: Tensor
    adversarial: Tensor
    loss: Tensor

    @classmethod
    def none(cls, x: Tensor) -> "Best":
        """Candidates that anything beats."""
        wide = torch.float64 if has_float64(x.device) else torch.float32
        loss = torch.full((len(x),), -torch.inf, dtype=wide, device=x.device)
        return cls(x, torch.zeros(len(x), dtype=torch.bool, device=x.device), loss)

    def offer(self, x: Tensor, adversarial: Tensor, loss: Tensor) -> None:
        """Take what is better, sample by sample; a loss that is NaN is the lowest."""
        loss = torch.where(loss.isnan(), -torch.inf, loss.detach().to(self.loss.dtype))
        better = (adversarial & ~self.adversarial) | ((adversarial == self.adversarial) & (loss > self.loss))
        self.x = torch.where(better.view(-1, *(1,) * (x.ndim - 1)), x, self.x)
        self.loss = torch.where(better, loss, self.loss)
        self.adversarial = self.adversarial | adversarial

    def take(self, index: Tensor) -> "Best":
        """Those at ``index``."""
        return Best(*(getattr(self, f.name).index_select(0, index) for f in fields(self)))

    def put(self, index: Tensor, part: "Best") -> None:
        """Write those at ``index``."""
        for f in fields(self):
            getattr(self, f.name).index_copy_(0, index, getattr(part, f.name))


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

    def take(self, index: Tensor) -> "Pool":
        """The samples at ``index``, in this pool's order."""
        tensors = (t.index_select(0, index) for t in (self.index, self.labels, self.x, self.broken))
        places, labels, x, broken = tensors
        return Pool(places, labels, self.ball.take(index), x, self.best.take(index), broken)
