"""Weights written into the fast network: multiplied, cast and laid out in the least time, rounded once.

(What is cast from float64 to 16 bits is rounded twice: PyTorch casts by way of float32.)
"""

import math

import torch
from torch import Tensor

from .precision import HALF

_AT_ONCE = 2**18
"""Entries that a processor casts at a time: as many as its cache holds."""


class Writing:
    """``weight``, or ``weight * scale``, into ``out``: planned once, for views cost more time than the operators.

    Args:
        weight: what is read by every call, as it is then.
        out: what is written, of the same shape, in its own dtype and layout.
        scale: read likewise; has the length of ``weight`` after ``split``, and broadcasts to its other dimensions.
        split: what the first dimension of both weights is split into before they are scaled.
    """

    def __init__(
        self, weight: Tensor, out: Tensor, scale: Tensor | None = None, *, split: tuple[int, int] | None = None
    ) -> None:
        self._weight, self._out = weight.detach(), out.detach()
        weight, out = (t.unflatten(0, split) if split else t for t in (self._weight, self._out))
        alike = _layout(weight) == _layout(out)
        casts = out.device.type == "cpu" and out.dtype in HALF and out.dtype != weight.dtype
        self._casts_first = casts and not alike  # PyTorch casts and lays out at once, entry by entry
        in_parts = self._casts_first or (casts and scale is not None)  # what is kept in between stays in the cache
        count = math.ceil(weight.numel() / _AT_ONCE) if in_parts else 1
        if count <= 1:
            self._parts = [(weight, out, scale)]
            return
        scales = [None] * count if scale is None else scale.chunk(count)
        self._parts = list(zip(weight.chunk(count), out.chunk(count), scales, strict=False))

    def is_between(self, weight: Tensor, out: Tensor) -> bool:
        """Whether the plan is for these tensors, as they lie in memory now."""
        return self._weight.is_set_to(weight) and self._out.is_set_to(out)

    def __call__(self) -> None:
        """Write."""
        for weight, out, scale in self._parts:
            if self._casts_first:
                out.copy_((weight if scale is None else weight * scale).to(out.dtype))
            elif scale is None:
                out.copy_(weight)
            else:
                torch.mul(weight, scale, out=out)


def _layout(tensor: Tensor) -> list[int]:
    """The strides that say how it lies in memory; along a dimension of size one they say nothing."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
