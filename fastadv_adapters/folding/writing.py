"""Weights written into the fast network: multiplied, cast and laid out in the least time, rounded once.

(What is cast from float64 to 16 bits is rounded twice: PyTorch casts by way of float32.)
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..modules import HALF

_AT_ONCE = 2**18
"""Entries that each thread of a processor casts at a time: as many as its own cache holds."""


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
        self._casts = out.device.type == "cpu" and out.dtype in HALF and out.dtype != weight.dtype
        self._casts_first = self._casts and not alike  # PyTorch casts and lays out at once, entry by entry
        # What is kept between two operators is to stay in the cache.
        in_parts = self._casts_first or (self._casts and scale is not None)
        count = math.ceil(weight.numel() / _at_once()) if in_parts else 1
        parts = [(weight, out, scale)]
        if count > 1:
            scales = [None] * count if scale is None else scale.chunk(count)
            parts = list(zip(weight.chunk(count), out.chunk(count), scales, strict=False))
        room = room if self._casts else None
        self._parts = [(part, into, by, _part_of(room, part, by)) for part, into, by in parts]

    def is_between(self, weight: Tensor, out: Tensor) -> bool:
        """Whether the plan is for these tensors, as they lie in memory now."""
        return self._weight.is_set_to(weight) and self._out.is_set_to(out)

    def __call__(self) -> None:
        """Write."""
        for weight, out, scale, room in self._parts:
            if scale is not None and not self._casts:
                torch.mul(weight, scale, out=out)
                continue
            product = weight if scale is None else torch.mul(weight, scale, out=room)
            out.copy_(product.to(out.dtype) if self._casts_first else product)


def room_for(weights: Iterable[Tensor]) -> Tensor:
    """Memory for the products that are cast into these weights: what is allocated anew may not be in the cache."""
    largest = max((t.numel() for t in weights if t.device.type == "cpu" and t.dtype in HALF), default=0)
    return torch.empty(min(largest, 2 * _at_once()), device="cpu", dtype=torch.float32)


def _at_once() -> int:
    return _AT_ONCE * torch.get_num_threads()


def _part_of(room: Tensor | None, weight: Tensor, scale: Tensor | None) -> Tensor | None:
    """A tensor for the product, in memory that is there already; None if it does not fit in, or is not needed."""
    if room is None or scale is None or weight.numel() > len(room):
        return None
    if not weight.is_contiguous() or torch.result_type(weight, scale) != room.dtype:
        return None
    return room[: weight.numel()].view(weight.shape)


def _layout(tensor: Tensor) -> list[int]:
    """The strides that say how it lies in memory; along a dimension of size one they say nothing."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def parameter_like(own: Tensor, like: Tensor | None) -> nn.Parameter:
    """A parameter with the attributes that code has given to the one before."""
    made = nn.Parameter(own, requires_grad=False)
    vars(made).update({} if like is None else vars(like))
    return made
