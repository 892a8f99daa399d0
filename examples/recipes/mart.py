"""MART.

Wang et al. 2020, https://openreview.net/forum?id=rklOg6EFwS. The attack maximises the cross entropy; the training loss
weighs each sample by how wrong the clean output is. Two lines change: `SafePGD` on a `FastAttackModel` takes the place
of the inner loop. `classes=False` leaves the choice among the candidates to the loss alone: with labels `SafePGD` would
prefer a misclassified candidate to one of higher loss, which an attack wants, and an inner maximiser does not.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from common import ALPHA, EPS, STEPS, DigitsNet, batches, few_digits, verdict
from fastadv_adapters import FastAttackModel, SafePGD

BETA = 5.0


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """One value per sample, (N,)."""
    return F.cross_entropy(logits, labels, reduction="none")


def mart_loss(logits: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
    """The training loss, from clean and adversarial logits (N, C)."""
    clean, attacked = logits.softmax(1), adversarial.softmax(1)
    own = F.one_hot(labels, logits.shape[1]).bool()
    runner_up = attacked.masked_fill(own, 0).amax(1)
    boosted = F.cross_entropy(adversarial, labels) - (1.0001 - runner_up).log().mean()
    distance = F.kl_div(attacked.clamp_min(1e-12).log(), clean, reduction="none").sum(1)
    return boosted + BETA * (distance * (1.0001 - clean[own])).mean()


def main(*, epochs: int = 4, images: int = 1408, width: int = 16) -> tuple[float, float]:
    """Train and judge; returns clean and robust accuracy."""
    torch.manual_seed(0)
    data, model = few_digits(images), DigitsNet(width=width)
    fast = FastAttackModel(model)  # <- fast
    attack = SafePGD(fast, eps=EPS, alpha=ALPHA, steps=STEPS, loss=cross_entropy, classes=False)  # <- fast
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for x, y in batches(data, epochs=epochs):
        adversarial = attack(x, y)
        model.train()
        optimizer.zero_grad()
        mart_loss(model(x), model(adversarial), y).backward()
        optimizer.step()
    return verdict(model, data, name="MART")


if __name__ == "__main__":
    main()
