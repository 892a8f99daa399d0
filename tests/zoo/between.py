"""Subclasses, hooks and functions of the user's own at or between convolution and norm."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.registry import Headed, classifier, register


class BatchNormAct(nn.BatchNorm2d):
    """A norm that adds an activation, written with the functional form."""

    def forward(self, input: Tensor) -> Tensor:
        """Features to features."""
        training = self.training or not self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum
        mean, variance = self.running_mean, self.running_var
        return F.relu(F.batch_norm(input, mean, variance, self.weight, self.bias, training, momentum, self.eps))


class ShiftedBatchNorm(nn.BatchNorm2d):
    """A norm that calls its parent and goes on."""

    def forward(self, input: Tensor) -> Tensor:
        """Features to features."""
        return F.silu(super().forward(input) + 0.5)


class RenamedBatchNorm(nn.BatchNorm2d):
    """A subclass that changes nothing."""


class StandardisedConv(nn.Conv2d):
    """Standardises its weight in every forward (https://arxiv.org/abs/1903.10520): a folded weight would be undone."""

    def forward(self, input: Tensor) -> Tensor:
        """Features to features."""
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        deviation = self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(input, (self.weight - mean) / (deviation + 1e-5), self.bias, self.stride, self.padding)


class ScaledConv(nn.Conv2d):
    """Changes the hook that `nn.Conv2d` itself leaves open, not `forward`."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = super()._conv_forward(input, torch.tanh(weight), bias)
        return out


class SquaredLinear(nn.Linear):
    """A linear layer that is not linear in its weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Features to features."""
        return F.linear(input, self.weight.square(), self.bias)


@register()
def norm_with_activation() -> nn.Module:
    """Behind a convolution, and behind another norm."""
    return classifier(
        nn.Conv2d(3, 6, 3),
        BatchNormAct(6),
        nn.Conv2d(6, 6, 3, bias=False),
        BatchNormAct(6),
        BatchNormAct(6),
        channels=6,
    )


@register()
def norm_calling_parent() -> nn.Module:
    """Subclasses that go through `super().forward`, or add nothing."""
    return classifier(nn.Conv2d(3, 6, 3), ShiftedBatchNorm(6), nn.Conv2d(6, 6, 3), RenamedBatchNorm(6), channels=6)


@register()
def standardised_weights() -> nn.Module:
    """Convolutions whose weight is not what multiplies."""
    return classifier(
        StandardisedConv(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), ScaledConv(6, 6, 3), nn.BatchNorm2d(6), channels=6
    )


@register((4, 7))
def squared_linear() -> nn.Module:
    """A linear layer of the user's own in front of a norm."""
    return nn.Sequential(SquaredLinear(7, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5))


class _Reverse(torch.autograd.Function):
    """Identity whose gradient is reversed (https://arxiv.org/abs/1409.7495) and halved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -0.5 * gradient


class _Sign(torch.autograd.Function):
    """The sign, with a straight-through estimator (https://arxiv.org/abs/1308.3432) as gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        passed: Tensor = gradient * (x.abs() <= 1)
        return passed


def reverse_gradient(x: Tensor) -> Tensor:
    """`x`; the gradient that comes back is multiplied by -0.5."""
    out: Tensor = _Reverse.apply(x)  # type: ignore[no-untyped-call]
    return out


def straight_through_sign(x: Tensor) -> Tensor:
    """The sign of `x`; the gradient passes where |x| <= 1."""
    out: Tensor = _Sign.apply(x)  # type: ignore[no-untyped-call]
    return out


class SignLayer(nn.Module):
    """`straight_through_sign` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Features to -1, 0 or 1."""
        return straight_through_sign(x)


@register()
def straight_through_estimator() -> nn.Module:
    """A binarised activation between two folded pairs."""
    return classifier(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), SignLayer(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), channels=6
    )


@register()
class ReversedGradient(Headed):
    """Gradient reversal between convolution and norm, and on one of two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3)
        self.norm1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        y = F.relu(self.norm1(reverse_gradient(self.conv1(x))))
        return self.classify(reverse_gradient(y) + self.norm2(self.conv2(y)))


def double_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A forward hook that changes what the layer gives."""
    return 2 * torch.tanh(output)


def shift_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A forward pre-hook that changes what the layer gets."""
    return tuple(torch.sin(x) for x in inputs)


@register()
def hooked_convolution() -> nn.Module:
    """A hook between convolution and norm."""
    conv = nn.Conv2d(3, 6, 3)
    conv.register_forward_hook(double_output)
    return classifier(conv, nn.BatchNorm2d(6), nn.ReLU(), channels=6)


@register()
def hooked_between() -> nn.Module:
    """A layer that would do nothing, but for its hook, between convolution and norm."""
    between = nn.Identity()
    between.register_forward_hook(double_output)
    return classifier(nn.Conv2d(3, 6, 3), between, nn.BatchNorm2d(6), nn.ReLU(), channels=6)


@register(folds=False)  # a hook may read or write whatever the norm holds
def hooked_norm() -> nn.Module:
    """Hooks of the norm itself, before it and behind it."""
    norm, last = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
    norm.register_forward_pre_hook(shift_input)
    last.register_forward_hook(double_output)
    return classifier(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.Conv2d(6, 6, 3), last, channels=6)


@register((4, 3, 8, 8))
class Reshaped(Headed):
    """Layers between convolution and norm that move channels about."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 3)
        self.shuffle = nn.PixelShuffle(2)
        self.norm1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3)
        self.norm2 = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        y = F.relu(self.norm1(self.shuffle(self.conv1(x))))
        return self.classify(F.relu(self.norm2(self.conv2(y)[:, 1:7])))
