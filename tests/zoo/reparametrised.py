"""Weights that are computed from other tensors; copying several of these the plain way raises."""

import warnings

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from tests.zoo.registry import classifier, register


def _pair(conv: nn.Module) -> nn.Module:
    return classifier(conv, nn.BatchNorm2d(6), nn.ReLU(), channels=6)


@register()
def weight_norm_by_hook() -> nn.Module:
    """The old form: a forward pre-hook that sets the weight."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, but in many people's models
        conv = weight_norm(nn.Conv2d(3, 6, 3))
    return _pair(conv)


@register()
def weight_norm_by_parametrization() -> nn.Module:
    """The new form: a property of a class made for the layer."""
    return _pair(parametrizations.weight_norm(nn.Conv2d(3, 6, 3)))


@register()
def spectral_norm_by_hook() -> nn.Module:
    """The old form."""
    return _pair(spectral_norm(nn.Conv2d(3, 6, 3)))


@register()
def spectral_norm_by_parametrization() -> nn.Module:
    """The new form."""
    return _pair(parametrizations.spectral_norm(nn.Conv2d(3, 6, 3, bias=False)))


@register()
def pruned() -> nn.Module:
    """A mask multiplied in by a forward pre-hook."""
    conv = nn.Conv2d(3, 6, 3)
    prune.l1_unstructured(conv, "weight", 0.5)
    return _pair(conv)


class Symmetric(nn.Module):
    """A parametrization of the user's own."""

    def forward(self, weight: Tensor) -> Tensor:
        """Half the sum of a kernel and its mirror image."""
        return (weight + weight.flip(-1)) / 2


@register(folds=False)  # the weight of the norm is recomputed at every reading
def own_parametrization() -> nn.Module:
    """On a convolution, and on the weight of a norm."""
    conv, norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
    parametrize.register_parametrization(conv, "weight", Symmetric())
    parametrize.register_parametrization(norm, "weight", Symmetric())
    return classifier(conv, norm, nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), channels=6)


@register((4, 7))
def normed_linear() -> nn.Module:
    """Old and new weight norm on linear layers, one of them the head."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        head = weight_norm(nn.Linear(6, 5))
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(7, 6)), nn.BatchNorm1d(6), nn.Tanh(), head)


@register((4, 7))
class ComputedWeight(nn.Module):
    """Computes the weight of a functional layer from two parameters, in front of a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.randn(6, 2))
        self.right = nn.Parameter(torch.randn(2, 7))
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors (N, 7) to logits."""
        logits: Tensor = self.head(torch.relu(self.norm(x @ (self.left @ self.right).t())))
        return logits
