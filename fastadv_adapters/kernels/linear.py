"""Linear layers on a processor whose weights are laid out once per update, as oneDNN's kernels want them.

As ``prepacked`` does for convolutions: PyTorch's operators reorder the weight anew in every forward and every backward
pass. In float32 PyTorch runs another library's products (MKL). Measured on AMD, they take up to twice as long as
oneDNN's with AVX512; without it they are the faster ones, and are run. On Intel (AMX tells) both take as long.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import become, is_transformed
from . import calls
from .calls import DTYPES, runs_in
from .prepacked import Algorithm, Prepacked

LEAST = 2**17
"""Weights with fewer entries are reordered in less time than a Function takes to be called."""

PRODUCTS = 2**22
"""In float32: with fewer multiplications in a call, MKL is faster."""


@dataclass
class LaidOutProduct:
    """The weight of one layer as its passes want it.

    Attributes:
        bias, dtype: of the layer.
        forward: the weight for the forward pass.
        backward: that for the backward pass, once there has been one.
    """

    bias: Tensor | None
    dtype: torch.dtype
    forward: Tensor
    backward: Tensor | None = None

    def multiply(self, input: Tensor) -> Tensor:
        """The layer's output."""
        return _multiply(input.to(self.dtype), self.forward, self.bias)

    def gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        """The gradient at the input from that at the output; not itself differentiable."""
        if self.backward is None:
            self.backward = _reorder(weight.t().contiguous(), grad.shape)
        return _multiply(grad, self.backward, None)


def _reorder(weight: Tensor, shape: torch.Size) -> Tensor:
    laid_out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, math.prod(shape[:-1]))
    return laid_out


def _multiply(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = input.reshape(-1, input.shape[-1])
    output: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    # No view: what a Function hands out as a view cannot be written into, as by a ReLU in place.
    whole: Tensor = torch.ops.aten._unsafe_view(output, (*input.shape[:-1], output.shape[-1]))
    return whole


class _Kept(Prepacked):
    """What is kept of one linear layer's weight."""

    may = True

    def _way(self, layer: Any, input: Tensor, weight: Tensor) -> Algorithm | None:
        return "laid out" if _fits(layer, input, weight) else None

    def _make(self, way: Algorithm, layer: Any, shape: torch.Size, weight: Tensor) -> LaidOutProduct:
        return LaidOutProduct(layer.bias, weight.dtype, _reorder(weight.detach(), shape))


def _fits(layer: nn.Linear, input: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is faster here, on a frozen weight that is in the right dtype."""
    if weight.numel() < LEAST or weight.dtype not in DTYPES or weight.requires_grad:
        return False
    bias: Tensor | None = layer.bias
    if bias is not None and bias.requires_grad:
        return False
    if type(weight) is not nn.Parameter or type(input) not in (Tensor, nn.Parameter) or input.device.type != "cpu":
        return False
    if weight.dtype != runs_in(input) or not input.is_floating_point() or not torch._C._get_mkldnn_enabled():
        return False
    if input.numel() == 0 or input.shape[-1] != weight.shape[1] or not weight.is_contiguous() or is_transformed():
        return False
    large = math.prod(input.shape[:-1]) * weight.numel() >= PRODUCTS
    return weight.dtype == torch.bfloat16 or (calls.HAS_AVX512 and not calls.HAS_AMX and large)


class _Multiply(torch.autograd.Function):
    """A linear layer with a frozen weight."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, laid_out: LaidOutProduct) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.laid_out = laid_out
        return laid_out.multiply(input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        if grad.requires_grad:
            return grad @ weight, None, None
        laid_out: LaidOutProduct = ctx.laid_out
        return laid_out.gradient(grad, weight), None, None


class _Linear:
    """Mixin for a linear layer."""

    laid_out: _Kept
    weight: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Multiply, by a weight that is laid out, if that is faster."""
        laid_out, weight = None, self.weight
        if not torch.compiler.is_compiling():
            with torch._C.DisableTorchFunction():  # a mode would look at each attribute that is read here
                laid_out = self.laid_out.find(self, input, weight)
        if laid_out is None:
            output: Tensor = super().forward(input)  # type: ignore[misc]
        elif torch.is_grad_enabled() and input.requires_grad:
            output = _Multiply.apply(input, weight, laid_out)  # type: ignore[no-untyped-call]
        else:
            output = laid_out.multiply(input)
        return output


def lay_linear_out(part: nn.Module) -> None:
    """Have a linear layer of exactly PyTorch's class keep its weight laid out; it decides at each call."""
    if type(part) is nn.Linear:
        become(part, _Linear)
        vars(part)["laid_out"] = _Kept()
