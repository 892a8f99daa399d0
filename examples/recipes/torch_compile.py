"""Training with torch.compile.

The training step runs the compiled model, and the attack a `FastAttackModel` of it: the fast model takes the compiled
wrapper off and works on the module inside, whose weights both share. So the attack is not slowed down by a compilation
of its own. (The compiled plain model is a slow thing to attack: it computes the gradients of all weights as well. The
fast network itself can be compiled with `engine="compile"`.)
"""

from typing import cast

import torch
import torchattacks
from torch import nn
from torch.nn import functional as F

from common import ALPHA, EPS, STEPS, DigitsNet, batches, few_digits, verdict
from fastadv_adapters import FastAttackModel


def main(*, epochs: int = 4, images: int = 1408, width: int = 16, backend: str = "inductor") -> tuple[float, float]:
    """Train and judge; returns clean and robust accuracy. The backend "inductor" needs a C++ compiler on a CPU."""
    torch.manual_seed(0)
    data, model = few_digits(images), DigitsNet(width=width)
    compiled = cast("nn.Module", torch.compile(model, backend=backend))
    attack = torchattacks.PGD(FastAttackModel(compiled), eps=EPS, alpha=ALPHA, steps=STEPS)  # <- fast (not `compiled`)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for x, y in batches(data, epochs=epochs):
        adversarial = attack(x, y)
        compiled.train()
        optimizer.zero_grad()
        F.cross_entropy(compiled(adversarial), y).backward()
        optimizer.step()
    return verdict(model, data, name="torch.compile")


if __name__ == "__main__":
    main()
