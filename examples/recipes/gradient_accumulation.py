"""Gradient accumulation.

Several small batches are attacked for each step of the optimizer. Three lines change. The fast model is made with
`auto_update=False`, the attack gets the fast model, and `fast.update()` is called once per step of the optimizer. So
all small batches of a step are attacked with the weights and batch norm statistics from before the step. By default the
fast model would look for changes before every forward pass, and follow the statistics after each small batch. That is
as right, and a little slower.
"""

import torch
import torchattacks
from torch.nn import functional as F

from common import ALPHA, EPS, STEPS, DigitsNet, batches, few_digits, verdict
from fastadv_adapters import FastAttackModel

PARTS = 4
"""Small batches per step of the optimizer."""


def main(*, epochs: int = 4, images: int = 1408, width: int = 16) -> tuple[float, float]:
    """Train and judge; returns clean and robust accuracy."""
    torch.manual_seed(0)
    data, model = few_digits(images), DigitsNet(width=width)
    fast = FastAttackModel(model, auto_update=False)  # <- fast
    attack = torchattacks.PGD(fast, eps=EPS, alpha=ALPHA, steps=STEPS)  # <- fast (`model` stood here)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for x, y in batches(data, epochs=epochs):
        optimizer.zero_grad()
        for x_part, y_part in zip(x.chunk(PARTS), y.chunk(PARTS), strict=True):
            adversarial = attack(x_part, y_part)
            model.train()
            (F.cross_entropy(model(adversarial), y_part, reduction="sum") / len(x)).backward()
        optimizer.step()
        fast.update()  # <- fast
    return verdict(model, data, name="gradient accumulation")


if __name__ == "__main__":
    main()
