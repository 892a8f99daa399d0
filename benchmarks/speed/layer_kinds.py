"""The layers that are measured one by one: of each kind some as networks have them, at sizes of a small network."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Layer:
    """A layer, and the shape of its input without the batch.

    Attributes:
        make: makes the layer.
        shape: of one sample.
        batch: samples.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int = 8


class Attention(nn.Module):
    """Attention alone: queries, keys and values (N, T, 3, heads, d) to (N, heads, T, d)."""

    def forward(self, qkv: Tensor) -> Tensor:
        """Attend."""
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(query, key, value)


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, channels: int, narrow: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, narrow, 1), nn.Conv2d(narrow, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply each channel by its gate."""
        gate: Tensor = self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x * gate


def _conv(channels: int, kernel: int, dimensions: int = 2, outputs: int = 0, **options: Any) -> Callable[[], nn.Module]:
    kind: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    return partial(kind, channels, outputs or channels, kernel, **options)


def _depthwise(channels: int, kernel: int, dimensions: int = 2, **options: Any) -> Callable[[], nn.Module]:
    return _conv(channels, kernel, dimensions, groups=channels, **options)


LAYERS: dict[str, Layer] = {
    "conv 3x3": Layer(_conv(64, 3, padding=1), (64, 24, 24)),
    "conv 3x3, stride 2": Layer(_conv(64, 3, padding=1, stride=2), (64, 24, 24)),
    "conv 3x3, stride 3": Layer(_conv(64, 3, padding=1, stride=3), (64, 24, 24)),
    "conv 3x3, dilation 2": Layer(_conv(64, 3, padding=2, dilation=2), (64, 24, 24)),
    "conv 1x1": Layer(_conv(64, 1, outputs=256), (64, 24, 24)),
    "conv 1x1, stride 2": Layer(_conv(64, 1, stride=2, outputs=128), (64, 24, 24)),
    "conv 3x3, of 3 channels": Layer(_conv(3, 3, padding=1, outputs=64), (3, 32, 32), 32),
    "conv 5x5, of 1 channel": Layer(_conv(1, 5, padding=2, outputs=32), (1, 28, 28), 32),
    "conv 4x4, stride 4, of 3 channels": Layer(_conv(3, 4, stride=4, outputs=96), (3, 96, 96)),
    "conv 16x16, stride 16, of 3 channels": Layer(_conv(3, 16, stride=16, outputs=192), (3, 96, 96)),
    "conv 3x3, stride 2, of 3 channels": Layer(_conv(3, 3, padding=1, stride=2, outputs=32), (3, 96, 96)),
    "conv 7x7, stride 2, of 3 channels": Layer(_conv(3, 7, padding=3, stride=2, outputs=64), (3, 96, 96)),
    "conv 3x3, 32 groups of 4": Layer(_conv(128, 3, padding=1, groups=32), (128, 24, 24)),
    "conv 3x3, 32 groups of 4, stride 2": Layer(_conv(128, 3, padding=1, groups=32, stride=2), (128, 24, 24)),
    "conv 3x3, 4 groups of 32, stride 2": Layer(_conv(128, 3, padding=1, groups=4, stride=2), (128, 24, 24)),
    "conv 3x3, 2 outputs per channel": Layer(_conv(64, 3, padding=1, groups=64, outputs=128), (64, 24, 24)),
    "conv 3x3, 2 outputs per channel, stride 2": Layer(
        _conv(64, 3, padding=1, groups=64, outputs=128, stride=2), (64, 24, 24)
    ),
    "depthwise 3x3": Layer(_depthwise(96, 3, padding=1), (96, 24, 24)),
    "depthwise 7x7": Layer(_depthwise(96, 7, padding=3), (96, 24, 24)),
    "depthwise 3x3, stride 2": Layer(_depthwise(96, 3, padding=1, stride=2), (96, 24, 24)),
    "depthwise 5x5, stride 2": Layer(_depthwise(96, 5, padding=2, stride=2), (96, 24, 24)),
    "depthwise 3x3, stride 3": Layer(_depthwise(96, 3, padding=1, stride=3), (96, 24, 24)),
    "depthwise 3x3, dilation 2": Layer(_depthwise(96, 3, padding=2, dilation=2), (96, 24, 24)),
    "conv1d 5": Layer(_conv(64, 5, 1, padding=2), (64, 512)),
    "conv1d 5, stride 2": Layer(_conv(64, 5, 1, padding=2, stride=2), (64, 512)),
    "depthwise conv1d 5": Layer(_depthwise(64, 5, 1, padding=2), (64, 512)),
    "depthwise conv1d 5, stride 2": Layer(_depthwise(64, 5, 1, padding=2, stride=2), (64, 512)),
    "conv3d 3x3x3": Layer(_conv(32, 3, 3, padding=1), (32, 8, 12, 12), 4),
    "conv3d 3x3x3, stride 2": Layer(_conv(32, 3, 3, padding=1, stride=2), (32, 8, 12, 12), 4),
    "depthwise conv3d 3x3x3": Layer(_depthwise(32, 3, 3, padding=1), (32, 8, 12, 12), 4),
    "depthwise conv3d 3x3x3, stride 2": Layer(_depthwise(32, 3, 3, padding=1, stride=2), (32, 8, 12, 12), 4),
    "transposed 2x2, stride 2": Layer(partial(nn.ConvTranspose2d, 64, 32, 2, 2), (64, 12, 12)),
    "transposed 4x4, stride 2": Layer(partial(nn.ConvTranspose2d, 64, 32, 4, 2, 1), (64, 12, 12)),
    "transposed 3x3": Layer(partial(nn.ConvTranspose2d, 64, 64, 3, 1, 1), (64, 12, 12)),
    "transposed depthwise 4x4, stride 2": Layer(partial(nn.ConvTranspose2d, 64, 64, 4, 2, 1, groups=64), (64, 12, 12)),
    "transposed 1d 4, stride 2": Layer(partial(nn.ConvTranspose1d, 64, 64, 4, 2, 1), (64, 256)),
    "transposed 3d 2x2x2, stride 2": Layer(partial(nn.ConvTranspose3d, 32, 32, 2, 2), (32, 4, 8, 8), 4),
    "max pool 2x2": Layer(partial(nn.MaxPool2d, 2), (64, 24, 24)),
    "max pool 3x3, stride 2": Layer(partial(nn.MaxPool2d, 3, 2, 1), (64, 24, 24)),
    "max pool 1d": Layer(partial(nn.MaxPool1d, 2), (64, 512)),
    "max pool 3d": Layer(partial(nn.MaxPool3d, 2), (32, 8, 12, 12)),
    "average pool 2x2": Layer(partial(nn.AvgPool2d, 2), (64, 24, 24)),
    "average pool 3x3, stride 2": Layer(partial(nn.AvgPool2d, 3, 2, 1), (64, 24, 24)),
    "adaptive average pool to 1": Layer(partial(nn.AdaptiveAvgPool2d, 1), (64, 24, 24)),
    "adaptive average pool to 7": Layer(partial(nn.AdaptiveAvgPool2d, 7), (64, 24, 24)),
    "adaptive max pool to 1": Layer(partial(nn.AdaptiveMaxPool2d, 1), (64, 24, 24)),
    "squeeze and excite": Layer(partial(Gate, 96, 8), (96, 24, 24)),
    "nearest, times 2": Layer(partial(nn.Upsample, scale_factor=2), (64, 12, 12)),
    "bilinear, times 2": Layer(partial(nn.Upsample, scale_factor=2, mode="bilinear"), (64, 12, 12)),
    "bicubic, times 2": Layer(partial(nn.Upsample, scale_factor=2, mode="bicubic"), (64, 12, 12)),
    "attention, 37 tokens": Layer(Attention, (37, 3, 3, 64)),
    "attention, 64 tokens, heads of 16": Layer(Attention, (64, 3, 4, 16)),
    "attention, 197 tokens": Layer(Attention, (197, 3, 3, 64)),
    "attention, 577 tokens": Layer(Attention, (577, 3, 3, 64), 2),
    "attention, 1024 tokens": Layer(Attention, (1024, 3, 3, 64), 2),
    "layer norm": Layer(partial(nn.LayerNorm, 384), (197, 384)),
    "group norm": Layer(partial(nn.GroupNorm, 8, 64), (64, 24, 24)),
    "batch norm": Layer(partial(nn.BatchNorm2d, 64), (64, 24, 24)),
    "GELU": Layer(nn.GELU, (197, 384)),
    "SiLU": Layer(nn.SiLU, (64, 24, 24)),
    "hard swish": Layer(nn.Hardswish, (64, 24, 24)),
    "ELU": Layer(nn.ELU, (64, 24, 24)),
    "PReLU": Layer(nn.PReLU, (64, 24, 24)),
    "softplus": Layer(nn.Softplus, (64, 24, 24)),
    "softmax": Layer(partial(nn.Softmax, -1), (3, 197, 197)),
    "linear 384 to 1536": Layer(partial(nn.Linear, 384, 1536), (197, 384)),
    "linear 1280 to 1000": Layer(partial(nn.Linear, 1280, 1000), (1280,), 16),
    "linear 64 to 192": Layer(partial(nn.Linear, 64, 192), (64, 64)),
}
"""By name."""
