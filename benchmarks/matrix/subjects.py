"""The two networks under attack, the images, and what starting points and targets are taken from."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torchattacks
from torch import Tensor, nn

from benchmarks.matrix.cases import Norm
from digits import Digits, DigitsNet, grey_digits, predict, train
from fastadv_adapters import FastAttackModel

WIDTH = 8
CLASSES = 10


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, and what budgets it is attacked with.

    Attributes:
        epochs: of training.
        train_eps: L-infinity budget of adversarial training; 0 for normal training.
        budgets: by norm, such that strong attacks break some images and not all.
    """

    epochs: int
    train_eps: float
    budgets: dict[Norm, float]


RECIPES = {
    "confident": Recipe(40, 0.0, {"linf": 0.1, "l2": 0.8, "l1": 8.0, "l0": 0.0}),
    "adversarial": Recipe(20, 0.2, {"linf": 0.25, "l2": 1.5, "l1": 15.0, "l0": 0.0}),
}
"""The networks by name: one trained until it is very sure, one trained adversarially."""


@dataclass(frozen=True)
class Subject:
    """A trained network in eval mode, and images of three channels that it classifies correctly."""

    name: str
    net: nn.Module
    images: Tensor
    labels: Tensor
    data: Digits

    @property
    def budgets(self) -> dict[Norm, float]:
        """Budgets by norm."""
        return RECIPES[self.name].budgets

    def starting_points(self, model: Callable[[Tensor], Tensor], classes: Tensor) -> Tensor:
        """For each class asked for, a training image that `model` gives this class."""
        found = model(self.data.train_images).argmax(dim=1)
        first = {c: self.data.train_images[found == c][0] for c in classes.unique().tolist()}
        return torch.stack([first[c] for c in classes.tolist()])


class Binarised(nn.Module):
    """A network that sees black and white alone: what BinarizationRefinementAttack is made for."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, 8, 8) to logits (N, 10)."""
        logits: Tensor = self.net((x >= 0.5).to(x.dtype))
        return logits


def colour_digits() -> Digits:
    """The 8x8 digits with the grey value in each of three channels."""
    data = grey_digits()
    train_images, test_images = (i.expand(-1, 3, -1, -1).contiguous() for i in (data.train_images, data.test_images))
    return data._replace(train_images=train_images, test_images=test_images)


def recipe_of(name: str) -> str:
    """All that a network and the attacks on it are made from, as text."""
    return f"width {WIDTH}, {RECIPES[name]}"


def weights_of(name: str, cache: Path) -> Path:
    """Where the weights are kept: another recipe has another file."""
    return cache / f"{name}-{hashlib.sha256(recipe_of(name).encode()).hexdigest()[:12]}.pt"


def subject(name: str, cache: Path) -> Subject:
    """The network, trained at the first call and read from `cache` at later ones, and its images."""
    data, net = colour_digits(), DigitsNet(channels=3, width=WIDTH)
    weights = weights_of(name, cache)
    if weights.exists():
        net.load_state_dict(torch.load(weights, weights_only=True))
    else:
        net = _trained(RECIPES[name], data)
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), weights)
    net.eval()
    right = predict(net, data.test_images) == data.test_labels
    return Subject(name, net, data.test_images[right], data.test_labels[right], data)


def _trained(recipe: Recipe, data: Digits) -> DigitsNet:
    torch.manual_seed(0)
    net = DigitsNet(channels=3, width=WIDTH)
    attack = None
    if recipe.train_eps:
        fast = FastAttackModel(net, dtype=torch.float32)
        attack = torchattacks.PGD(fast, eps=recipe.train_eps, alpha=recipe.train_eps / 2, steps=4)
    train(net, data.train_images, data.train_labels, attack=attack, epochs=recipe.epochs, show_progress=False)
    return net
