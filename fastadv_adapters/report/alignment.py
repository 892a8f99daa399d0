"""Sizes that do not suit tensor cores: channel and feature counts that are no multiples of 8.

In 16 bits tensor cores work on blocks of 8 entries (16 bytes). Libraries pad other sizes or take slower kernels:
NVIDIA's guides on convolutional layers (https://docs.nvidia.com/deeplearning/performance/dl-performance-convolutional/)
and on matrix products (https://docs.nvidia.com/deeplearning/performance/dl-performance-matrix-multiplication/).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..modules import HALF, named_modules_of

BLOCK = 8
_IMAGE_CHANNELS = 4  # at most so many are an image's, not a choice of the model's


class Misfit(NamedTuple):
    """A layer with a size that is no multiple of 8.

    Attributes:
        name: of the layer, as in ``named_modules()``.
        inputs: channels or features that come in, per group.
        outputs: those that leave, per group.
        unit: what they are: "channels", "channels per group" or "features".
        work: multiplications per position of the output, or per row.
        usual: "first" for a layer on images, "last" for a last layer whose outputs alone do not fit, else "".
    """

    name: str
    inputs: int
    outputs: int
    unit: str
    work: int
    usual: str

    @property
    def padded(self) -> tuple[int, int]:
        """Inputs and outputs rounded up to multiples of 8."""
        return _round_up(self.inputs), _round_up(self.outputs)

    @property
    def better(self) -> tuple[int, int]:
        """The same but for an image's channels, which are as they are."""
        return self.inputs if _is_image(self) else self.padded[0], self.padded[1]

    @property
    def factor(self) -> float:
        """How much work the padded layer is, relative to this one; at least what the misfit costs on tensor cores."""
        return self.padded[0] * self.padded[1] / (self.inputs * self.outputs)


def misfits(module: nn.Module, device_type: str, dtype: torch.dtype) -> list[Misfit]:
    """Layers that do not suit tensor cores; none but on CUDA in half precision.

    The most work first, but the usual first and last layers at the end. How many positions a layer's output has is not
    known without an input, so work is counted per position.

    Depthwise convolutions are left out: they are no matrix products, and no size makes tensor cores run them.

    Args:
        module: any module; it is not run.
        device_type: "cuda", "cpu", ...
        dtype: what matrix products and convolutions run in.
    """
    if device_type != "cuda" or dtype not in HALF:
        return []
    layers = list(_layers(module))
    found = [
        layer._replace(usual=_usual(layer, is_last=layer is layers[-1]))
        for layer in layers
        if layer.padded != (layer.inputs, layer.outputs)
    ]
    return sorted(found, key=lambda layer: (layer.usual, -layer.work))


def _layers(module: nn.Module) -> Iterator[Misfit]:
    """Every matrix product that a layer stands for, whether it fits or not."""
    for name, part in named_modules_of(module):
        if isinstance(part, nn.Linear):
            yield Misfit(
                name, part.in_features, part.out_features, "features", part.in_features * part.out_features, ""
            )
        elif isinstance(part, nn.MultiheadAttention):
            size, head = part.embed_dim, part.head_dim
            yield Misfit(name, size, head, "features (whole, and per head)", 3 * size * size, "")
        elif isinstance(part, _ConvNd) and not _is_depthwise(part):
            inputs, outputs = part.in_channels // part.groups, part.out_channels // part.groups
            unit = "channels" if part.groups == 1 else "channels per group"
            work = inputs * part.out_channels * torch.Size(part.kernel_size).numel()
            yield Misfit(name, inputs, outputs, unit, work, "")


def _is_depthwise(part: _ConvNd) -> bool:
    return part.groups > 1 and part.groups == part.in_channels


def _is_image(layer: Misfit) -> bool:
    return layer.unit == "channels" and layer.inputs <= _IMAGE_CHANNELS


def _usual(layer: Misfit, *, is_last: bool) -> str:
    if _is_image(layer) and layer.outputs % BLOCK == 0:
        return "first"
    return "last" if is_last and layer.inputs % BLOCK == 0 else ""


def _round_up(number: int) -> int:
    return -(-number // BLOCK) * BLOCK
