"""What batch norms are in eval mode: one scale and one shift per channel."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .precision import HALF


class Scales:
    """The scales and shifts of several batch norms, computed together: each is small, and a network has many.

    Args:
        norms: with running statistics; at least one.

    Attributes:
        channels: how many each norm has.
        now: the scales of all channels, those of one norm after those of the other, and the shifts: (2, all channels),
            in float32 at least. From the first :meth:`follow` on.
    """

    def __init__(self, norms: Sequence[_BatchNorm]) -> None:
        self._norms = norms
        statistics: list[Tensor] = [norm.running_var for norm in norms]  # type: ignore[misc]
        self.channels = list(map(len, statistics))
        self._eps = torch.cat([torch.full_like(_wide(t), norm.eps) for t, norm in zip(statistics, norms, strict=True)])
        self._ones, self._zeros = torch.ones_like(self._eps), torch.zeros_like(self._eps)
        self.now = torch.empty_like(self._compute())

    def follow(self) -> None:
        """Compute all anew, into the same memory."""
        self.now.copy_(self._compute())

    def _compute(self) -> Tensor:
        means: list[Tensor] = [norm.running_mean for norm in self._norms]  # type: ignore[misc]
        variances: list[Tensor] = [norm.running_var for norm in self._norms]  # type: ignore[misc]
        mean, var = _wide(torch.cat(means)), _wide(torch.cat(variances))
        weight = self._all([norm.weight for norm in self._norms], self._ones)
        bias = self._all([norm.bias for norm in self._norms], self._zeros)
        scale = torch.rsqrt(var + self._eps) * weight
        return torch.stack((scale, bias - mean * scale))

    def _all(self, tensors: list[Tensor | None], where_none: Tensor) -> Tensor:
        others = where_none.split(self.channels)
        return torch.cat([b if a is None else a for a, b in zip(tensors, others, strict=True)])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALF else tensor
