"""Convolution, bias and ReLU as one operator of cuDNN's, and with an addition before the ReLU too.

The model's own code calls one after the other. So a convolution whose trace ends in a ReLU hands out a tensor that is
not computed yet. A ReLU computes it in one operator; an addition is put off likewise; all else first has it computed as
ever. So nothing depends on the trace but time. What would be another value later (somebody has written into what goes
in meanwhile) or have no gradient (it is computed inside a Function) counts as a fold that was not right: the layer is
unfolded, and the pass made again.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # private by name, but what PyTorch's own transforms and exporters use

from ..kernels import SWITCHES, input_gradient
from ..modules import Precision, become, is_out_of_memory, is_transformed, kind_of
from .rectified import RELUS

_SUMS = (torch.add, Tensor.add)
_SUMS_IN_PLACE = (Tensor.add_,)
_RELUS_IN_PLACE = (torch.relu_, Tensor.relu_)

_NOTHING = torch.empty(0, device="meta")
"""Stands for what is not computed yet: code that asks nobody meets an error, and not another value."""


class _Rectify(torch.autograd.Function):
    """``relu(convolution + added)``, of a layer with a frozen weight and bias."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None, layer: Any) -> Tensor:
        geometry = layer.stride, layer.padding, layer.dilation, layer.groups
        if added is None:
            output: Tensor = torch.cudnn_convolution_relu(input, weight, bias, *geometry)
        else:
            output = torch.cudnn_convolution_add_relu(input, weight, added, 1.0, bias, *geometry)
        ctx.save_for_backward(weight, output)
        ctx.layer, ctx.shape, ctx.strides = layer, input.shape, input.stride()
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, output = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
        found = input_gradient(grad, weight, ctx.layer, ctx.shape, ctx.strides)
        return found, None, None, grad if ctx.needs_input_grad[3] else None, None


class _Later(Tensor):
    """What a convolution gives, or its sum with something, computed when somebody asks.

    Attributes:
        layer, arguments: the convolution, and its input, weight and bias.
        added: what is added.
        versions: of all that goes in.
        value: what was computed; None if nobody has asked.
    """

    layer: Any
    arguments: tuple[Tensor, Tensor, Tensor]
    added: Tensor | None
    versions: list[int]
    value: Tensor | None

    @staticmethod
    def of(layer: Any, arguments: tuple[Tensor, Tensor, Tensor]) -> "_Later":
        later = Tensor._make_subclass(_Later, _NOTHING)
        versions = [t._version for t in arguments]
        vars(later).update(layer=layer, arguments=arguments, added=None, versions=versions, value=None)
        return later

    def plus(self, added: Tensor, *, in_place: bool) -> "_Later":
        """The sum with this."""
        later = self if in_place else Tensor._make_subclass(_Later, _NOTHING)
        vars(later).update({**vars(self), "added": added, "versions": [*self.versions, added._version]})
        return later

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Put a sum off, compute it with the ReLU, or compute it and call ``func`` as ever."""
        kwargs = kwargs or {}
        if func in RELUS and len(args) == 1 and args[0].value is None:
            output = args[0].rectified()
            if func in _RELUS_IN_PLACE or kwargs.get("inplace"):
                vars(args[0])["value"] = output
            return output
        if func in _SUMS + _SUMS_IN_PLACE and len(args) == 2 and not kwargs:
            mine, other = args if isinstance(args[0], _Later) or func in _SUMS_IN_PLACE else args[::-1]
            other = _settled(other)
            if isinstance(mine, _Later) and mine.takes(other):
                return mine.plus(other, in_place=func in _SUMS_IN_PLACE)
        args, kwargs = pytree.tree_map(_settled, (args, kwargs))
        return func(*args, **kwargs)

    def takes(self, other: Any) -> bool:
        """Whether cuDNN's operator may add this."""
        if self.value is not None or self.added is not None or type(other) is not Tensor:
            return False
        return other.dtype == self.arguments[1].dtype and other.shape == self._shape()

    def _shape(self) -> torch.Size:
        (input, weight, _), layer = self.arguments, self.layer
        geometry = zip(layer.kernel_size, layer.stride, layer.padding, layer.dilation, input.shape[2:], strict=True)
        sizes = ((size + 2 * pad - far * (kernel - 1) - 1) // by + 1 for kernel, by, pad, far, size in geometry)
        return torch.Size((len(input), len(weight), *sizes))

    def settled(self) -> Tensor:
        """What it is, computed by PyTorch's own operators."""
        if self.value is None:
            self._check()
            output: Tensor = self.layer.at_once(*self.arguments)
            vars(self)["value"] = output if self.added is None else output + self.added
        return self.value  # type: ignore[return-value]

    def rectified(self) -> Tensor:
        """A ReLU of it, in one operator."""
        if not self.layer.refused:
            self._check()
            try:
                output: Tensor = _Rectify.apply(*self.arguments, self.added, self.layer)  # type: ignore[no-untyped-call]
                return output
            except RuntimeError as error:  # no such operator in this PyTorch or on this device
                if is_out_of_memory(error):
                    raise
                vars(self.layer)["refused"] = True
        return self.settled().relu()

    def _check(self) -> None:
        """Count this pass as one that is to be made again, if this is another value than it was, or another graph."""
        now = [t._version for t in (*self.arguments, self.added) if t is not None]
        if now != self.versions or not torch.is_grad_enabled():
            self.layer.balance.more += 1


def _settled(value: Any) -> Any:
    return value.settled() if isinstance(value, _Later) else value


class _Fused:
    """Mixin for a convolution that a batch norm was folded into.

    Attributes:
        refused: whether cuDNN's operator has raised an error.
    """

    refused: bool

    def at_once(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve now."""
        output: Tensor = super()._conv_forward(input, weight, bias)  # type: ignore[misc]
        return output

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input = _settled(input)
        if self.refused or bias is None or not _may_wait(input, weight):
            return self.at_once(input, weight, bias)
        return _Later.of(self, (input.to(weight.dtype), weight, bias))


def _may_wait(input: Tensor, weight: Tensor) -> bool:
    """Whether a graph is being made, and nothing but a graph."""
    if torch.compiler.is_compiling() or is_transformed() or not torch.is_grad_enabled():
        return False
    return type(input) is Tensor and input.requires_grad and input.ndim == 4 and not weight.requires_grad


def fuse(part: nn.Module, precision: Precision) -> None:
    """Have a folded convolution that ends in a ReLU wait for it, if that is switched on."""
    if not SWITCHES.on(precision.device).fused or kind_of(part) is not nn.Conv2d:
        return
    if part.padding_mode == "zeros" and not isinstance(part.padding, str):
        become(part, _Fused)
        vars(part)["refused"] = False
