"""The gradient at the input of a convolution of few channels, the first of a network, by a fast forward convolution.

oneDNN computes 16 channels at once. Images have 1 or 3, so most of what its backward pass computes there is left over;
with a stride its kernel is slower still. Here the gradients at a block of places are taken for channels: at stride s,
those of b x b places, b a multiple of s, are one convolution with stride b / s of the gradient at the output, for each
of them is a sum over the same few outputs. Then they are put side by side (Shi et al. 2016,
https://arxiv.org/abs/1609.05158). Blocks are as large as 16 channels hold (48 with a stride), or as the stride. The
sums are the same, and only attacks want them: training has no use for a gradient at the images.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import calls
from .calls import DTYPES, is_onednn, runs_in

_AT_ONCE = 16
"""Channels that oneDNN computes together; with more than a quarter of it no block of four places has room."""

_WITH_STRIDE = 48
"""With a stride, blocks of up to so many channels pay: places next to each other are read by the same outputs."""


@dataclass(frozen=True)
class _Along:
    """Blocks along one dimension.

    Attributes:
        kernel, stride, padding: of the layer.
        block: places in a block.
    """

    kernel: int
    stride: int
    padding: int
    block: int

    @property
    def before(self) -> int:
        """How many outputs before the one with a block's own number its first place is read by."""
        return (self.kernel - 1 - self.padding) // self.stride

    @property
    def outputs(self) -> int:
        """By how many outputs a block is read."""
        return self.before + (self.block - 1 + self.padding) // self.stride + 1

    def places(self) -> Tensor:
        """Which entry of the kernel leads from which output to which place, (block, outputs, kernel) of 0 and 1."""
        place = torch.arange(self.block, device="cpu").view(-1, 1, 1)
        output = torch.arange(self.outputs, device="cpu").view(1, -1, 1) - self.before
        return (place + self.padding - self.stride * output) == torch.arange(self.kernel, device="cpu")

    def missing(self, size: int, outputs: int) -> int:
        """How many outputs the last block of an input of this size lacks, with as many zeros behind them as before."""
        blocks = math.ceil(size / self.block)
        last = self.block // self.stride * (blocks - 1) + self.outputs - self.before
        return max(last - outputs - self.before, 0)


@dataclass
class Blocks:
    """One layer's way back, for all shapes of input.

    Attributes:
        bias, stride, padding: of the layer.
        forward: its weight.
        rows, columns: the blocks.
        backward: the weight of the convolution that gives the gradient; made by the first backward pass.
    """

    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    forward: Tensor
    rows: _Along
    columns: _Along
    backward: Tensor | None = None
    exact = True

    def convolve(self, input: Tensor) -> Tensor:
        """The layer's output."""
        return F.conv2d(input.to(self.forward.dtype), self.forward, self.bias, self.stride, self.padding)

    def gradient(self, grad: Tensor, shape: torch.Size, weight: Tensor) -> Tensor:
        """The gradient at an input of this shape from that at the output."""
        if self.backward is None:
            self.backward = self._turned(weight)
        along = self.rows, self.columns
        down, right = (a.missing(*sizes) for a, *sizes in zip(along, shape[2:], grad.shape[2:], strict=True))
        if down or right:
            grad = F.pad(grad, (0, right, 0, down))
        steps = self.rows.block // self.rows.stride
        blocks = F.conv2d(grad, self.backward, None, steps, (self.rows.before, self.columns.before))
        return F.pixel_shuffle(blocks, self.rows.block)[:, :, : shape[2], : shape[3]]

    def _turned(self, weight: Tensor) -> Tensor:
        rows, columns = (a.places().to(weight) for a in (self.rows, self.columns))
        turned = torch.einsum("ati,buj,ocij->cabotu", rows, columns, weight)  # each sum has one term
        return turned.flatten(0, 2).contiguous(memory_format=torch.channels_last)


def may_fit(layer: nn.Module) -> bool:
    """Whether a layer is of this kind, for some input."""
    if not isinstance(layer, nn.Conv2d) or isinstance(layer.padding, str):
        return False
    if layer.groups > 1 or 4 * layer.in_channels > _AT_ONCE or layer.stride[0] != layer.stride[1]:
        return False
    if max(layer.dilation) > 1 or max(*layer.kernel_size, *layer.stride) == 1:
        return False
    return all(int(pad) < kernel for kernel, pad in zip(layer.kernel_size, layer.padding, strict=True))


def fits(layer: nn.Module, input: Tensor, weight: Tensor) -> bool:
    """Whether a layer that may fit does so, channels-last on a processor, with a frozen weight in its input's dtype."""
    small = max(*layer.kernel_size, *layer.stride) < 4  # type: ignore[misc]
    if small and not calls.HAS_AVX512 and weight.shape[1] > 1:
        return False  # with vectors of 8 numbers PyTorch's own is faster
    if small and calls.HAS_AMX and weight.dtype == torch.bfloat16:
        return False  # and so it is with tiles
    if input.device.type != "cpu" or input.ndim != 4 or not input.requires_grad:
        return False
    if weight.requires_grad or type(weight) is not nn.Parameter:
        return False
    if weight.dtype not in DTYPES or weight.dtype != runs_in(input):
        return False
    return input.is_contiguous(memory_format=torch.channels_last) and is_onednn(layer, input, weight)


def lay_out(layer: nn.Conv2d, weight: Tensor) -> Blocks:
    """What is kept of a layer that :func:`fits`."""
    stride = layer.stride[0]
    room = _AT_ONCE if stride == 1 else _WITH_STRIDE
    block = stride * max(math.isqrt(room // weight.shape[1]) // stride, 1)
    geometry = zip(layer.kernel_size, map(int, layer.padding), strict=True)
    rows, columns = (_Along(kernel, stride, padding, block) for kernel, padding in geometry)
    return Blocks(layer.bias, layer.stride, layer.padding, weight, rows, columns)  # type: ignore[arg-type]
