"""Gradient accumulation.

Several small batches are attacked for each step of the optimizer. One line makes the attack fast, as in PGD training.
With `auto_update=False` a second one says when the fast model looks at the weights: once per step of the optimizer,
instead of before every forward pass. The weights stand still between two steps, but the running statistics of batch
norm move with each small batch, and by default the fast model would follow them: as right, and a little slower. So all
small batches of a step are attacked with the statistics of its beginning.
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
