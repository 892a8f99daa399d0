"""Depthwise convolutions that a module's own code calls, ``F.conv2d`` say, with the gradient of ``depthwise``.

Filters that blur before a stride, or layers that pad by themselves, call the function.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..modules import is_transformed, kind_of
from . import depthwise
from .calls import DTYPES, runs_in
from .shapes import Convolve

_Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class _Call:
    """What a call says of its convolution, as a layer does."""

    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def may_call(part: nn.Module) -> bool:
    """Whether code of this module may call such a function; layers in ``shapes`` have that gradient already."""
    if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return part.groups > 1 and max(part.stride + part.dilation) > 1 and "prepacked" not in vars(part)
    return not kind_of(part).__module__.startswith("torch.")


def _with_gradient(convolution: Callable[..., Tensor], dimensions: int) -> Callable[..., Tensor]:
    def convolve(
        input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1
    ) -> Tensor:
        if groups != 1 and _are_plain(input, weight, bias) and weight.ndim == dimensions + 2:
            geometry = _geometry(weight.shape[2:], stride, padding, dilation)
            if all(geometry) and depthwise.suits(weight.shape, *geometry, groups):
                call = _Call(bias, *geometry, groups)
                lowered = weight.to(runs_in(input))
                if depthwise.fits(call, input, lowered):
                    spread = depthwise.lay_out(call, lowered)
                    return Convolve.apply(input, lowered, call, spread)  # type: ignore[no-any-return, no-untyped-call]
        return convolution(input, weight, bias, stride, padding, dilation, groups)

    return convolve


def _geometry(kernel: Sequence[int], stride: Any, padding: Any, dilation: Any) -> _Geometry:
    """Stride, padding and dilation as numbers for each dimension; none where something else is given."""
    strides, dilations = _along(stride, len(kernel)), _along(dilation, len(kernel))
    if padding == "valid":
        padding = 0
    elif padding == "same" and {1} == set(strides) and dilations and all(entries % 2 for entries in kernel):
        padding = [by * (entries // 2) for by, entries in zip(dilations, kernel, strict=True)]
    return strides, _along(padding, len(kernel)), dilations


def _along(by: Any, dimensions: int) -> tuple[int, ...]:
    """One number for each dimension; none if it is nothing of the kind."""
    values = (by,) if isinstance(by, int) else tuple(by) if isinstance(by, (tuple, list)) else ()
    return values * dimensions if len(values) == 1 else values if len(values) == dimensions else ()


def _are_plain(input: Any, weight: Any, bias: Any) -> bool:
    """Whether these are tensors of PyTorch's own class that it takes together, and only the input has a gradient."""
    tensors = [input, weight, *([] if bias is None else [bias])]
    if any(type(t) not in (Tensor, nn.Parameter) or t.dtype not in DTYPES for t in tensors) or is_transformed():
        return False
    alike = torch.is_autocast_enabled("cpu") or len({t.dtype for t in tensors}) == 1
    return alike and [t.requires_grad for t in tensors] == [True] + [False] * (len(tensors) - 1)


DEPTHWISE: dict[Callable[..., Any], Callable[..., Any]] = {
    F.conv1d: _with_gradient(torch.conv1d, 1),
    F.conv2d: _with_gradient(torch.conv2d, 2),
    F.conv3d: _with_gradient(torch.conv3d, 3),
}
"""What is run in the place of what."""
