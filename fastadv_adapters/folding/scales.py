"""What batch norms are in eval mode: one scale and one shift per channel."""

from collections.abc import Sequence
from typing import Any

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
            always in the same memory.
    """

    def __init__(self, norms: Sequence[_BatchNorm], *, at_least: torch.dtype) -> None:
        self._norms, self._at_least = norms, at_least
        self.channels = list(map(channels_of, norms))
        self._zeros = torch.zeros_like(self._wide(torch.cat([norm.running_var for norm in norms])))  # type: ignore[misc]
        self._ones = torch.ones_like(self._zeros)
        self._eps = None if any(isinstance(norm.eps, Tensor) for norm in norms) else self._all_eps()
        self.now = self._compute().detach()

    def follow(self) -> None:
        """Compute all anew, into the same memory."""
        self.now.copy_(self._compute())

    def _compute(self) -> Tensor:
        mean, var = (self._wide(self._all(name)) for name in ("running_mean", "running_var"))
        weight, bias = self._all("weight", self._ones), self._all("bias", self._zeros)
        eps = self._all_eps() if self._eps is None else self._eps  # a tensor may have changed
        scale = torch.rsqrt(var + eps) * weight
        return torch.stack((scale, bias - mean * scale))

    def _all_eps(self) -> Tensor:
        parts = zip(self._zeros.split(self.channels), self._norms, strict=True)
        return torch.cat([zeros + norm.eps for zeros, norm in parts])

    def _all(self, name: str, where_none: Tensor | None = None) -> Tensor:
        """One tensor of all norms, one after the other."""
        tensors = [_read(norm, name) for norm in self._norms]
        if where_none is not None and any(tensor is None for tensor in tensors):
            others = where_none.split(self.channels)
            tensors = [b if a is None else a for a, b in zip(tensors, others, strict=True)]
        return torch.cat(tensors)

    def _wide(self, tensor: Tensor) -> Tensor:
        return tensor.to(torch.promote_types(tensor.dtype, self._at_least))


def _read(norm: _BatchNorm, name: str) -> Any:
    """A tensor of a norm; not by way of ``nn.Module.__getattr__``, which is slow."""
    held = norm._buffers if name in norm._buffers else norm._parameters
    return held[name] if name in held else getattr(norm, name)
