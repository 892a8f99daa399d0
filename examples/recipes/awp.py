"""Adversarial weight perturbation (AWP).

Wu et al. 2020, https://arxiv.org/abs/2004.05884, around PGD training. Before each step the weights are moved to where
the loss on the adversarial images is higher, the gradient is taken there, and the weights are put back. One line
changes: the attack gets a `FastAttackModel`. It sees the weights that are there when it is called, so attack before
they are moved, as here, or after, as you like. Here the weights are moved in place, which the fast model notices by
itself; if your code writes through `.data`, call `fast.update()` after it. (The authors perturb a copy of the model;
here it is the model itself, which comes to the same.)
"""

import torch
import torchattacks
from torch import Tensor, nn
from torch.nn import functional as F

from common import ALPHA, EPS, STEPS, DigitsNet, batches, few_digits, verdict
from fastadv_adapters import FastAttackModel

GAMMA = 5e-3
"""How far each weight tensor is moved, relative to its norm."""


def move(model: nn.Module, loss: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
    """Raise a loss by one step along its gradient; returns what was added to each weight tensor."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    added = []
    with torch.no_grad():
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            added.append((weight, GAMMA * weight.norm() / (gradient.norm() + 1e-12) * gradient))
            weight.add_(added[-1][1])
    return added


def main(*, epochs: int = 4, images: int = 1408, width: int = 16) -> tuple[float, float]:
    """Train and judge; returns clean and robust accuracy."""
    torch.manual_seed(0)
    data, model = few_digits(images), DigitsNet(width=width)
    attack = torchattacks.PGD(FastAttackModel(model), eps=EPS, alpha=ALPHA, steps=STEPS)  # <- fast (`model` stood here)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for x, y in batches(data, epochs=epochs):
        adversarial = attack(x, y)
        model.train()
        added = move(model, F.cross_entropy(model(adversarial), y))
        optimizer.zero_grad()
        F.cross_entropy(model(adversarial), y).backward()
        with torch.no_grad():
            for weight, step in added:
                weight.sub_(step)
        optimizer.step()
    return verdict(model, data, name="AWP")


if __name__ == "__main__":
    main()
