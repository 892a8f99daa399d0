"""Means over the places of an image whose gradient is an expanded view.

PyTorch writes that gradient out, contiguous. Where the image is channels-last and read by others too (squeeze and
excite: the image times a gate), the sum of both gradients then goes through two layouts, which takes many times as
long as the sum with a view that repeats one value per channel. Values are the same bit for bit.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..modules import is_transformed


class _Mean(torch.autograd.Function):
    """The mean over rows and columns, (N, C, H, W) -> (N, C, 1, 1)."""

    @staticmethod
    def forward(ctx: Any, image: Tensor) -> Tensor:
        ctx.shape = image.shape
        return image.mean((2, 3), keepdim=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        shape: torch.Size = ctx.shape
        return (grad / (shape[2] * shape[3])).expand(shape)


def mean(input: Any, *args: Any, **kwargs: Any) -> Any:
    """``torch.mean``, of which that over rows and columns of a channels-last image has an expanded gradient."""
    dim, keepdim = _arguments(*args, **kwargs)
    if _is_over_places(dim) and _fits(input):
        found: Tensor = _Mean.apply(input)  # type: ignore[no-untyped-call]
        return found if keepdim else found.flatten(1)
    return torch.mean(input, *args, **kwargs)


def adaptive_average(input: Any, output_size: Any) -> Any:
    """``adaptive_avg_pool2d``, of which that to one place has an expanded gradient."""
    if output_size in (1, (1, 1), [1, 1]) and _fits(input):
        return _Mean.apply(input)  # type: ignore[no-untyped-call]
    return F.adaptive_avg_pool2d(input, output_size)


def _arguments(dim: Any = None, keepdim: Any = False, **others: Any) -> tuple[Any, Any]:
    return (None, False) if others else (dim, keepdim)


def _is_over_places(dim: Any) -> bool:
    if not isinstance(dim, (tuple, list)) or len(dim) != 2 or not all(isinstance(d, int) for d in dim):
        return False
    return {d % 4 for d in dim} == {2, 3}


def _fits(input: Any) -> bool:
    if type(input) is not Tensor or input.ndim != 4 or not input.requires_grad or not input.is_floating_point():
        return False
    return not is_transformed() and not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last)
