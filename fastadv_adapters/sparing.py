"""Layers that keep less for the backward pass than PyTorch's own, and compute the same bit for bit.

A frozen convolution needs its weight and the *shape* of its input for the gradient at that input; PyTorch keeps the
input itself, whatever is frozen. Behind a ReLU that costs nothing, for the ReLU keeps the same memory. Behind SiLU,
GELU, Hardswish, a scale and shift or a sum nobody else needs it. And ReLU6 keeps its input (in place a copy of it),
though its output, which the next layer keeps, tells as much.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .copying import become

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def keep_less(part: nn.Module, kind: type[nn.Module]) -> None:
    """Have a layer of a fast network, with frozen weights, keep less where its exact class ``kind`` is one that can."""
    if kind in _CONVOLUTIONS and part.padding_mode == "zeros" and not isinstance(part.padding, str):
        become(part, _KeepsShape)
    elif kind is nn.ReLU6:
        become(part, _KeepsOutput)


class _Convolve(torch.autograd.Function):
    """A convolution with frozen weights."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, layer: "_KeepsShape") -> Tensor:
        output = layer.convolve(input, weight)
        ctx.save_for_backward(weight.to(output.dtype))
        ctx.layer, ctx.shape, ctx.strides = layer, input.shape, input.stride()
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        layer: _KeepsShape = ctx.layer
        # Never read. The strides are those of the input: an expanded scalar would have cost a change of layout.
        like_input = grad.new_empty_strided(ctx.shape, ctx.strides)
        geometry = layer.stride, layer.padding, layer.dilation, False, (0,) * len(layer.stride), layer.groups
        wanted = True, False, False  # the gradient at the input, not those at weight and bias
        gradient = torch.ops.aten.convolution_backward(grad, like_input, weight, None, *geometry, wanted)[0]
        return gradient, None, None


class _KeepsShape:
    """Mixin for a convolution."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    bias: Tensor | None

    def convolve(self, input: Tensor, weight: Tensor) -> Tensor:
        """What PyTorch's own layer computes."""
        output: Tensor = super()._conv_forward(input, weight, self.bias)  # type: ignore[misc]
        return output

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if _as_ever() or _is_kept(input):
            return self.convolve(input, weight)
        output: Tensor = _Convolve.apply(input, weight, self)  # type: ignore[no-untyped-call]
        return output


class _Clip(torch.autograd.Function):
    """ReLU6 from its output: clipped is what is 0 or 6 there, numbers that every dtype holds exactly."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        output = F.relu6(input)
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        gradient: Tensor = torch.ops.aten.hardtanh_backward(grad, *ctx.saved_tensors, 0.0, 6.0)
        return gradient


class _KeepsOutput:
    """Mixin for ReLU6."""

    inplace: bool
    min_val: float
    max_val: float

    def forward(self, input: Tensor) -> Tensor:
        if _as_ever() or self.inplace or (self.min_val, self.max_val) != (0, 6):
            return super().forward(input)  # type: ignore[misc,no-any-return]
        output: Tensor = _Clip.apply(input)  # type: ignore[no-untyped-call]
        return output


def _as_ever() -> bool:
    """Whether PyTorch's own operator does as well: nothing is kept, or a compiler decides what is."""
    return torch.compiler.is_compiling() or not torch.is_grad_enabled()


def _is_kept(input: Tensor) -> bool:
    """Whether the input is there until the backward pass anyway: it came from outside, or its operator keeps it."""
    return input.grad_fn is None or hasattr(type(input.grad_fn), "_saved_result")
