"""Single operators: first layers with more channels than images have, fused activations, and the package's boundary."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.clock import Work, device_ms, recorded, searching
from benchmarks.gpu.items import Items
from fastadv_adapters.boundary import Crossing, state_on


@dataclass(frozen=True)
class Shape:
    """A convolution in half precision: images, channels in and out, window, stride, rows and columns."""

    images: int
    inputs: int
    outputs: int
    window: int
    stride: int
    size: int

    @property
    def padding(self) -> int:
        """Rows and columns added on each side; none where windows do not overlap."""
        return 0 if self.stride == self.window else self.window // 2

    def reduced(self) -> "Shape":
        """For a rehearsal."""
        return Shape(2, min(self.inputs, 8), min(self.outputs, 8), self.window, self.stride, min(self.size, 32))


FIRST = {
    "7x7, stride 2, 224": Shape(256, 3, 64, 7, 2, 224),
    "3x3, 32, 64 outputs": Shape(128, 3, 64, 3, 1, 32),
    "3x3, 32, 16 outputs": Shape(512, 3, 16, 3, 1, 32),
    "patches of 16": Shape(256, 3, 384, 16, 16, 224),
}
"""First layers, which are tried with 3, 4 and 8 channels in: tensor cores work on blocks of 8."""

INNER = (
    *(Shape(256, 64, 64, 3, 1, 56), Shape(256, 64, 256, 1, 1, 56), Shape(256, 256, 64, 1, 1, 56)),
    *(Shape(256, 512, 512, 3, 1, 7), Shape(128, 64, 64, 3, 1, 32), Shape(128, 256, 256, 3, 1, 8)),
    *(Shape(512, 160, 160, 3, 1, 32), Shape(512, 320, 320, 3, 1, 16), Shape(512, 640, 640, 3, 1, 8)),
    Shape(256, 3, 64, 7, 2, 224),
)
"""Layers of a ResNet-50, a ResNet-18 and a WRN-28-10, and a first one."""


def operators(items: Items) -> None:
    """All of them, while cuDNN looks for its fastest algorithms."""
    for label, shape in FIRST.items():
        for channels in (3, 4, 8):
            wide = Shape(shape.images, channels, *(shape.outputs, shape.window, shape.stride, shape.size))
            items.add(f"{label}, {channels} channels", _searched(items, wide, _first), need=8.0)
    for shape in INNER if items.cuda else ():  # the fused operators are cuDNN's
        items.add(f"fused, {shape}", _searched(items, shape, _fused), need=8.0)
    items.add("boundary", lambda: _boundary(items))


def _searched(
    items: Items, shape: Shape, find: Callable[[Items, Shape], dict[str, Any]]
) -> Callable[[], dict[str, Any]]:
    def work() -> dict[str, Any]:
        with searching():
            return find(items, shape.reduced() if items.tiny else shape)

    return work


def half(items: Items) -> torch.dtype:
    """What operators run in: float16, on a processor bfloat16."""
    return torch.float16 if items.cuda else torch.bfloat16


def _tensors(items: Items, shape: Shape) -> tuple[Tensor, Tensor]:
    """Images and weights, channels-last."""
    options: dict[str, Any] = {"device": items.device, "dtype": half(items)}
    x = torch.randn(shape.images, shape.inputs, shape.size, shape.size, **options)
    w = torch.randn(shape.outputs, shape.inputs, shape.window, shape.window, **options)
    w /= (shape.inputs * shape.window**2) ** 0.5
    return x.contiguous(memory_format=torch.channels_last), w.contiguous(memory_format=torch.channels_last)


def _first(items: Items, shape: Shape) -> dict[str, float]:
    """Forward pass, and gradient at the images."""
    x, w = _tensors(items, shape)
    pair = [shape.stride] * 2, [shape.padding] * 2, [1, 1]
    grad = torch.randn_like(F.conv2d(x, w, None, shape.stride, shape.padding))

    def backward() -> object:
        wanted = (True, False, False)
        return torch.ops.aten.convolution_backward(grad, x, w, None, *pair, False, [0, 0], 1, wanted)

    forward = device_ms(lambda: F.conv2d(x, w, None, shape.stride, shape.padding), items.device)
    return {"forward ms": forward, "backward ms": device_ms(backward, items.device)}


def _fused(items: Items, shape: Shape) -> dict[str, float]:
    """Bias, addition and ReLU behind a convolution, apart and in one operator of cuDNN's."""
    x, w = _tensors(items, shape)
    b = torch.randn(shape.outputs, device=items.device, dtype=x.dtype)
    settings = [shape.stride] * 2, [shape.padding] * 2, [1, 1], 1

    def conv() -> Tensor:
        return F.conv2d(x, w, b, shape.stride, shape.padding)

    z = torch.randn_like(conv())

    def fused() -> Tensor:
        out: Tensor = torch.cudnn_convolution_add_relu(x, w, z, 1.0, b, *settings)
        return out

    return {
        "bias, ReLU, ms": device_ms(lambda: conv().relu_(), items.device),
        "bias, ReLU, fused, ms": device_ms(lambda: torch.cudnn_convolution_relu(x, w, b, *settings), items.device),
        "bias, addition, ReLU, ms": device_ms(lambda: (conv() + z).relu(), items.device),
        "bias, addition, ReLU, fused, ms": device_ms(fused, items.device),
        "off by": (fused().float() - (conv() + z).relu().float()).abs().max().item(),
    }


def _boundary(items: Items) -> dict[str, float]:
    """What scaling and filtering of gradients add to a network that is next to none, in a recording."""
    device, dtype = items.device, half(items)
    crossing = Crossing(torch.float32, "per-sample", True, state_on(device))
    weight = torch.randn(10, 3072, device=device, dtype=dtype)
    x, grad = torch.rand(128, 3, 32, 32, device=device), torch.randn(128, 10, device=device)

    def forward() -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            return leaf, F.linear(leaf.to(dtype).flatten(1), weight)

    def through() -> None:
        leaf, out = forward()
        crossing.leave([out])
        crossing.pull([out], [leaf], [grad], keep=False)

    def bare() -> None:
        leaf, out = forward()
        torch.autograd.grad([out], [leaf], [grad.to(dtype)])

    ways: dict[str, Work] = {"with boundary, ms": through, "without, ms": bare}
    return {name: device_ms(recorded(way, device), device) for name, way in ways.items()}
