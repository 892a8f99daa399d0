"""Layers that compute from their weights alone, as libraries write them, and models of each kind of them."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm


class ScaledStdConv2d(nn.Conv2d):
    """As timm writes it, for NFNets: standardisation by the batch norm operator."""

    def __init__(self, *args: Any, gamma: float = 1.0, eps: float = 1e-6, gain: float = 1.0, **more: Any) -> None:
        super().__init__(*args, **more)
        self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), gain))
        self.scale = gamma * self.weight[0].numel() ** -0.5
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1),
            None,
            None,
            weight=(self.gain * self.scale).view(-1),
            training=True,
            momentum=0.0,
            eps=self.eps,
        ).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class StdConv2d(nn.Conv2d):
    """As timm writes it, for BiT."""

    eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0, eps=self.eps
        ).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


SMALLEST = 1e-5


def standardised(weight: Tensor) -> Tensor:
    weight = weight - weight.mean(dim=(1, 2, 3), keepdim=True)
    return weight / (weight.flatten(1).std(dim=1).view(-1, 1, 1, 1) + SMALLEST)


class ByHand(nn.Module):
    """No subclass of a convolution; in a function of the module's, and a property."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(outputs, inputs, 3, 3))

    @property
    def weight(self) -> Tensor:
        return standardised(self.kernel)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding="same")


class StdLinear(nn.Linear):
    """A linear layer whose weight has rows of length one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight, dim=1), self.bias)


class CentralDifference(nn.Module):
    """Reads the weight of its child twice: once by calling it, once by its own code."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        middle = self.conv.weight.sum(2).sum(2)[:, :, None, None]
        return out - 0.7 * F.conv2d(x, middle)


class Reparametrised(nn.Module):
    """Two kernels and an identity as one kernel, with a ReLU in place behind it."""

    identity: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.three = nn.Parameter(0.2 * torch.randn(channels, channels, 3, 3))
        self.one = nn.Parameter(0.2 * torch.randn(channels, channels, 1, 1))
        self.register_buffer("identity", F.pad(torch.eye(channels)[:, :, None, None], (1, 1, 1, 1)))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(F.conv2d(x, self.three + F.pad(self.one, (1, 1, 1, 1)) + self.identity, padding=1))
        return out


class WindowAttention(nn.Module):
    """Attention with a table of relative positions and an optional mask, as Swin has it."""

    index: Tensor

    def __init__(self, width: int, size: int, heads: int) -> None:
        super().__init__()
        self.size, self.heads, self.scale = size, heads, (width // heads) ** -0.5
        self.table = nn.Parameter(torch.randn((2 * size - 1) ** 2, heads))
        places = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
        apart = (places[:, :, None] - places[:, None]) + size - 1
        self.register_buffer("index", apart[0] * (2 * size - 1) + apart[1], persistent=False)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.drop = nn.Dropout(0.1)

    def positions(self) -> Tensor:
        area = self.size * self.size
        return self.table[self.index.view(-1)].view(area, area, -1).permute(2, 0, 1).contiguous().unsqueeze(0)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        samples, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(samples, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attention = q * self.scale @ k.transpose(-2, -1)
        attention = attention + self.positions()
        if mask is not None:
            attention = attention + mask.unsqueeze(1)
        attention = self.drop(attention.softmax(dim=-1))
        out: Tensor = self.proj((attention @ v).transpose(1, 2).reshape(samples, tokens, width))
        return out


class ContinuousPositions(nn.Module):
    """A bias that a small network computes from coordinates, as Swin v2 has it, and a bounded temperature."""

    places: Tensor

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.register_buffer("places", torch.rand(tokens, tokens, 2))
        self.mlp = nn.Sequential(nn.Linear(2, 8), nn.ReLU(inplace=True), nn.Linear(8, 1, bias=False))
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.clamp(self.temperature, max=4.6).exp()
        bias = 16 * torch.sigmoid(self.mlp(self.places)).squeeze(-1)
        return torch.softmax(x @ x.transpose(-2, -1) / scale + bias, -1) @ x


class Windows(nn.Module):
    """Two attentions on 4x4 patches, one of them with a mask by keyword."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 10)
        self.first, self.second = WindowAttention(8, 4, 2), WindowAttention(8, 4, 2)
        self.third = ContinuousPositions(16)
        self.register_buffer("mask", torch.where(torch.rand(1, 16, 16) > 0.5, -2.0, 0.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.first(x)
        x = x + self.second(x, mask=self.mask)
        logits: Tensor = self.head(self.third(x).mean(1))
        return logits


class LowRank(nn.Module):
    """The product of two thin matrices as a weight."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(0.1 * torch.randn(outputs, 2)), nn.Parameter(torch.randn(2, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.left @ self.right).t()


class Symmetric(nn.Module):
    """A parametrization of the user's own, with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.tensor(0.3))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.share * weight.flip(-1)


def _old(norm: Callable[..., Any]) -> Callable[[nn.Module], nn.Module]:
    def make(layer: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated, but in many people's models
            normed: nn.Module = norm(layer)
        return normed

    return make


def _pruned(layer: nn.Module) -> nn.Module:
    prune.l1_unstructured(layer, "weight", 0.3)
    prune.random_unstructured(layer, "weight", 0.2)
    return layer


def _own(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Symmetric())
    parametrize.register_parametrization(layer, "bias", Symmetric())
    return layer


NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "two at once": lambda layer: parametrizations.spectral_norm(_own(layer)),
    "own": _own,
    "old weight norm": _old(weight_norm),
    "old spectral norm": _old(spectral_norm),
    "pruned": _pruned,
}
"""What has the weight of a layer computed."""


def _images(*layers: nn.Module, channels: int) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 10))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ScaledStdConv2d": lambda: _images(
        ScaledStdConv2d(3, 8, 3), nn.SiLU(), ScaledStdConv2d(8, 8, 3, 2, 1, groups=4), channels=8
    ),
    "StdConv2d": lambda: _images(StdConv2d(3, 8, 3, bias=False), nn.GroupNorm(2, 8), nn.ReLU(), channels=8),
    "by hand": lambda: _images(ByHand(3, 8), nn.BatchNorm2d(8), nn.ReLU(), channels=8),
    "central difference": lambda: _images(CentralDifference(3, 8), nn.BatchNorm2d(8), channels=8),
    "one kernel of three": lambda: _images(nn.Conv2d(3, 8, 3), Reparametrised(8), channels=8),
    "linear": lambda: nn.Sequential(nn.Flatten(), LowRank(192, 8), nn.BatchNorm1d(8), nn.Tanh(), StdLinear(8, 10)),
    "positions": Windows,
    **{
        f"{name} of {kind}": (lambda norm=norm, make=make: make(norm))  # type: ignore[misc]
        for name, norm in NORMS.items()
        for kind, make in {
            "convolutions": lambda norm: _images(
                norm(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8), nn.ReLU(), norm(nn.Conv2d(8, 8, 3)), channels=8
            ),
            "products": lambda norm: nn.Sequential(
                nn.Flatten(), norm(nn.Linear(192, 8)), nn.BatchNorm1d(8), nn.Tanh(), norm(nn.Linear(8, 10))
            ),
        }.items()
    },
}
"""For (N, 3, 8, 8) with ten classes."""
