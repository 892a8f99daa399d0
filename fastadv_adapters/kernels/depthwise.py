"""The gradient at the input of a depthwise convolution with a stride or dilation, by a fast forward convolution.

oneDNN's backward pass of such layers falls back to a slow kernel: in bfloat16 it takes 3 to 70 times as long as here,
in float32 with a dilation or in three dimensions about twice.

With stride 1, the gradient at the input of a depthwise convolution is a depthwise convolution of the gradient at its
output with the kernel turned round. A stride leaves out outputs, which is the same as a gradient of zero there
(Dumoulin and Visin 2016, https://arxiv.org/abs/1603.07285, section 4.6).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .calls import DTYPES, is_onednn, runs_in

_CONVOLVE: dict[int, Callable[..., Tensor]] = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}


@dataclass
class Spread:
    """One layer's way back, for all shapes of input.

    Attributes:
        bias, stride, padding, dilation: of the layer.
        forward: its weight.
        turned: the same, turned round; made by the first backward pass.
    """

    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    forward: Tensor
    turned: Tensor | None = None
    exact = True

    def convolve(self, input: Tensor) -> Tensor:
        """The layer's output."""
        weight, channels = self.forward, len(self.forward)
        input = input.to(weight.dtype)
        return _CONVOLVE[input.ndim](input, weight, self.bias, self.stride, self.padding, self.dilation, channels)

    def gradient(self, grad: Tensor, shape: torch.Size, weight: Tensor) -> Tensor:
        """The gradient at an input of this shape from that at the output."""
        if self.turned is None:
            self.turned = _dense(weight.flip(tuple(range(2, weight.ndim))))
        geometry = list(zip(weight.shape[2:], self.padding, self.dilation, strict=True))
        steps = zip(shape[2:], geometry, strict=True)
        sizes = [size + 2 * pad - by * (entries - 1) for size, (entries, pad, by) in steps]  # of outputs at stride 1
        if any(by > 1 for by in self.stride):
            whole = (*grad.shape[:2], *sizes)
            spread = torch.empty(whole, dtype=grad.dtype, device=grad.device, memory_format=_format(grad.ndim)).zero_()
            places = [slice(None), slice(None), *(slice(None, None, by) for by in self.stride)]
            spread[tuple(places)].copy_(grad)
        else:
            spread = grad
        padding = [by * (entries - 1) - pad for entries, pad, by in geometry]
        ones = (1,) * len(geometry)
        return _CONVOLVE[grad.ndim](spread, self.turned, None, ones, padding, self.dilation, len(weight))


def may_fit(layer: nn.Module) -> bool:
    """Whether a layer is of this kind, for some input."""
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or isinstance(layer.padding, str):
        return False
    shape = layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size
    return suits(shape, layer.stride, layer.padding, layer.dilation, layer.groups)


def suits(
    shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> bool:
    """Whether a convolution is of this kind whose weight has this shape."""
    if not 1 < groups == shape[0] or shape[1] > 1 or max(*stride, *dilation) == 1:
        return False
    return all(int(pad) <= by * (entries - 1) for entries, pad, by in zip(shape[2:], padding, dilation, strict=True))


def fits(layer: Any, input: Tensor, weight: Tensor) -> bool:
    """Whether a layer that may fit does so, on a processor, with a frozen weight in the dtype that it runs in."""
    if input.device.type != "cpu" or input.ndim != weight.ndim or weight.requires_grad or weight.dtype not in DTYPES:
        return False
    if weight.dtype == torch.float32 and max(layer.dilation) == 1 and weight.ndim < 5:
        return False  # PyTorch's own is faster
    return weight.dtype == runs_in(input) and is_onednn(layer, input, weight)


def lay_out(layer: Any, weight: Tensor) -> Spread:
    """What is kept of a layer that :func:`fits`."""
    return Spread(layer.bias, layer.stride, layer.padding, layer.dilation, weight)


def _dense(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=_format(weight.ndim))


def _format(ndim: int) -> torch.memory_format:
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(ndim, torch.contiguous_format)
