"""Weights written into the fast network: multiplied, cast and laid out in the least time, rounded once.

(What is cast from float64 to 16 bits is rounded twice: PyTorch casts by way of float32.)
"""

import math
from collections.abc import Iterable

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
        room: memory for what is kept in between, as :func:`room_for` makes it; several may share it.
    """

    def __init__(
        self,
        weight: Tensor,
        out: Tensor,
        scale: Tensor | None = None,
        *,
        split: tuple[int, int] | None = None,
        room: Tensor | None = None,
    ) -> None:
        self._weight, self._out = weight.detach(), out.detach()
        weight, out = (t.unflatten(0, split) if split else t for t in (self._weight, self._out))
        alike = _layout(weight) == _layout(out)
        casts = out.device.type == "cpu" and out.dtype in HALF and out.dtype != weight.dtype
        self._casts_first = casts and not alike  # PyTorch casts and lays out at once, entry by entry
        in_parts = self._casts_first or (casts and scale is not None)  # what is kept in between stays in the cache
        count = math.ceil(weight.numel() / _AT_ONCE) if in_parts else 1
        parts = [(weight, out, scale)]
        if count > 1:
            scales = [None] * count if scale is None else scale.chunk(count)
            parts = list(zip(weight.chunk(count), out.chunk(count), scales, strict=False))
        room = room if in_parts else None
        self._parts = [(*part, None if part[2] is None else _room(room, part[0], part[2])) for part in parts]

    def is_between(self, weight: Tensor, out: Tensor) -> bool:
        """Whether the plan is for these tensors, as they lie in memory now."""
        return self._weight.is_set_to(weight) and self._out.is_set_to(out)

    def __call__(self) -> None:
        """Write."""
        for weight, out, scale, room in self._parts:
            if scale is None:
                product = weight
            elif room is None and not self._casts_first:
                torch.mul(weight, scale, out=out)
                continue
            else:
                product = torch.mul(weight, scale, out=room)
            out.copy_(product.to(out.dtype) if self._casts_first else product)


def room_for(weights: Iterable[Tensor]) -> Tensor:
    """Memory for the products that are cast into these weights: what is allocated anew may not be in the cache."""
    largest = max((t.numel() for t in weights if t.device.type == "cpu" and t.dtype in HALF), default=0)
    return torch.empty(min(largest, 2 * _AT_ONCE), device="cpu", dtype=torch.float32)


def _room(room: Tensor | None, weight: Tensor, scale: Tensor) -> Tensor | None:
    """A tensor like the product, in memory that is there already; None if it does not fit in."""
    fits = room is not None and weight.numel() <= len(room) and weight.is_contiguous()
    if not fits or torch.result_type(weight, scale) != torch.float32:
        return None
    return room[: weight.numel()].view(weight.shape)  # type: ignore[index]


def _layout(tensor: Tensor) -> list[int]:
    """The strides that say how it lies in memory; along a dimension of size one they say nothing."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
