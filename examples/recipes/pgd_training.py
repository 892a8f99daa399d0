"""PGD training.

Madry et al. 2018, https://arxiv.org/abs/1706.06083. Each batch is attacked with torchattacks' PGD, and the network
takes a step on the result. One line changes: the attack gets a `FastAttackModel`, made once before the loop. It follows
every step of the optimizer by itself.
"""

import torch
import torchattacks
from torch.nn import functional as F

from common import ALPHA, EPS, STEPS, DigitsNet, batches, few_digits, verdict
from fastadv_adapters import FastAttackModel


def main(*, epochs: int = 4, images: int = 1408, width: int = 16) -> tuple[float, float]:
    """Train and judge; returns clean and robust accuracy."""
    torch.manual_seed(0)
    data, model = few_digits(images), DigitsNet(width=width)
    attack = torchattacks.PGD(FastAttackModel(model), eps=EPS, alpha=ALPHA, steps=STEPS)  # <- fast (`model` stood here)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for x, y in batches(data, epochs=epochs):
        adversarial = attack(x, y)  # in eval mode, whichever mode `model` is in
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(adversarial), y).backward()
        optimizer.step()
    return verdict(model, data, name="PGD training")


if __name__ == "__main__":
    main()
