"""Weights written into the fast network: multiplied, cast and laid out in the least time, rounded once."""

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
        scale: likewise read by every call; broadcast, with one entry or as many along the first dimension.
    """

    def __init__(self, weight: Tensor, out: Tensor, scale: Tensor | None = None) -> None:
        self._weight, self._out = weight.detach(), out.detach()
        alike = _layout(weight) == _layout(out)
        casts = out.device.type == "cpu" and out.dtype in HALF and out.dtype != weight.dtype
        self._casts_first = casts and not alike  # PyTorch does both at once entry by entry
        in_parts = self._casts_first or (casts and scale is not None)
        count = math.ceil(weight.numel() / _AT_ONCE) if in_parts else 1
        if count <= 1:
            self._parts = [(self._weight, self._out, scale)]
            return
        scales = [None] * count if scale is None else scale.expand(len(weight), *scale.shape[1:]).chunk(count)
        self._parts = list(zip(self._weight.chunk(count), self._out.chunk(count), scales, strict=False))

    def is_between(self, weight: Tensor, out: Tensor) -> bool:
        """Whether the plan is for these tensors, or for views of them, at the places where they are now."""
        return self._weight.data_ptr() == weight.data_ptr() and self._out.data_ptr() == out.data_ptr()

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
