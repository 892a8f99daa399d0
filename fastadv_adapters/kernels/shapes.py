"""Convolutions that keep only the shape of their input for the backward pass, and compute the same bit for bit.

A frozen convolution needs its weight and the *shape* of its input for the gradient at that input; PyTorch keeps the
input itself, whatever is frozen. Behind a ReLU that costs nothing, for the ReLU keeps the same memory. Behind SiLU,
GELU, ReLU6, a pooling layer, a scale and shift or a sum nobody else needs it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..modules import become, is_transformed
from .prepacked import Prepacked, Weights

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

SMALL = 2**18
"""Inputs with fewer entries are kept: their memory costs less than the time of a Function in Python, twice a pass."""


def keep_shape_only(part: nn.Module, kind: type[nn.Module]) -> None:
    """Have a layer with frozen weights keep only the shape of its input, if its exact class ``kind`` is a convolution.

    It decides at each call: where the operator before keeps its output anyway, PyTorch's own convolution is run, unless
    weights laid out ahead make another one faster.
    """
    if kind in _CONVOLUTIONS and part.padding_mode == "zeros" and not isinstance(part.padding, str):
        become(part, _ShapeOnly)
        vars(part)["prepacked"] = Prepacked()


class Convolve(torch.autograd.Function):
    """A convolution with frozen weights."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, layer: Any, packed: Weights | None) -> Tensor:
        """The layer's output, of the weights laid out if there are some."""
        output = layer.convolve(input, weight) if packed is None else packed.convolve(input)
        ctx.save_for_backward(weight.to(output.dtype))
        ctx.layer, ctx.packed, ctx.shape, ctx.strides = layer, packed, input.shape, input.stride()
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient at the input."""
        (weight,) = ctx.saved_tensors
        if ctx.packed is not None and ctx.packed.exact and not grad.requires_grad:
            return ctx.packed.gradient(grad, ctx.shape, weight), None, None, None
        return input_gradient(grad, weight, ctx.layer, ctx.shape, ctx.strides), None, None, None


def input_gradient(grad: Tensor, weight: Tensor, layer: Any, shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
    """The gradient at the input of a convolution, whose shape and strides are these; itself differentiable."""
    # Never read. The strides are those of the input: an expanded scalar would have cost a change of layout.
    like_input = grad.new_empty_strided(shape, strides)
    geometry = layer.stride, layer.padding, layer.dilation, False, (0,) * len(layer.stride), layer.groups
    wanted = True, False, False  # the gradient at the input, not those at weight and bias
    gradient: Tensor = torch.ops.aten.convolution_backward(grad, like_input, weight, None, *geometry, wanted)[0]
    return gradient


class _ShapeOnly:
    """Mixin for a convolution."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    bias: Tensor | None
    prepacked: Prepacked

    def convolve(self, input: Tensor, weight: Tensor) -> Tensor:
        """What PyTorch's own layer computes."""
        output: Tensor = super()._conv_forward(input, weight, self.bias)  # type: ignore[misc]
        return output

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        is_own, packed = True, None
        # A compiler decides by itself what is kept, and how weights are laid out.
        if not torch.compiler.is_compiling():
            with torch._C.DisableTorchFunction():  # a mode would look at each attribute that is read here
                is_own, packed = self._choose(input, weight, bias)
        if is_own:
            output: Tensor = super()._conv_forward(input, weight, bias)  # type: ignore[misc]
            return output
        return Convolve.apply(input, weight, self, packed)  # type: ignore[no-any-return, no-untyped-call]

    def _choose(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[bool, Weights | None]:
        """Whether PyTorch's own convolution is run; and if not, on which weights."""
        # Code that calls this by itself, or that has put something computed from the input in their place.
        if bias is not self.bias or weight.requires_grad or (bias is not None and bias.requires_grad):
            return True, None
        # A lone image has no batch axis; a transform refuses Functions; of a tensor's subclass they hand out a view.
        if input.ndim != weight.ndim or type(input) not in (Tensor, nn.Parameter) or is_transformed():
            return True, None
        packed = self.prepacked.find(self, input, weight)
        return packed is None and (input.numel() < SMALL or _is_kept(input)), packed


def _is_kept(input: Tensor) -> bool:
    """Whether the input is there until the backward pass anyway: it came from outside, or its operator keeps it."""
    return input.grad_fn is None or hasattr(type(input.grad_fn), "_saved_result")
