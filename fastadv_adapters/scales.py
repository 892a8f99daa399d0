"""What batch norms are in eval mode: one scale and one shift per channel."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


def channels_of(norm: _BatchNorm) -> int:
    """How many channels a batch norm with running statistics has: ``num_features`` may be as it was before pruning."""
    return len(norm.running_var)  # type: ignore[arg-type]


class Scales:
    """The scales and shifts of several batch norms, computed together: each is small, and a network has many.

    Args:
        norms: with running statistics; at least one.
        at_least: the dtype to compute in, unless a norm is in a wider one.

    Attributes:
        channels: how many each norm has.
        now: the scales of all channels, those of one norm after those of the other, and the shifts: (2, all channels),
            always in the same memory. Not yet filled before the first :meth:`follow`.
    """

    def __init__(self, norms: Sequence[_BatchNorm], *, at_least: torch.dtype) -> None:
        self._norms, self._at_least = norms, at_least
        self.channels = list(map(channels_of, norms))
        self._zeros = torch.zeros_like(self._wide(torch.cat([norm.running_var for norm in norms])))  # type: ignore[misc]
        self._ones = torch.ones_like(self._zeros)
        self._eps = None if any(isinstance(norm.eps, Tensor) for norm in norms) else self._all_eps()
        self.now = torch.empty_like(self._compute())  # computed for its dtype

    def follow(self) -> None:
        """Compute all anew, into the same memory."""
        self.now.copy_(self._compute())

    def _compute(self) -> Tensor:
        means: list[Tensor] = [norm.running_mean for norm in self._norms]  # type: ignore[misc]
        variances: list[Tensor] = [norm.running_var for norm in self._norms]  # type: ignore[misc]
        mean, var = self._wide(torch.cat(means)), self._wide(torch.cat(variances))
        weight = self._cat_or([norm.weight for norm in self._norms], self._ones)
        bias = self._cat_or([norm.bias for norm in self._norms], self._zeros)
        eps = self._all_eps() if self._eps is None else self._eps  # a tensor may have changed
        scale = torch.rsqrt(var + eps) * weight
        return torch.stack((scale, bias - mean * scale))

    def _all_eps(self) -> Tensor:
        parts = zip(self._zeros.split(self.channels), self._norms, strict=True)
        return torch.cat([zeros + norm.eps for zeros, norm in parts])

    def _cat_or(self, tensors: list[Tensor | None], where_none: Tensor) -> Tensor:
        others = where_none.split(self.channels)
        return torch.cat([b if a is None else a for a, b in zip(tensors, others, strict=True)])

    def _wide(self, tensor: Tensor) -> Tensor:
        return tensor.to(torch.promote_types(tensor.dtype, self._at_least))
