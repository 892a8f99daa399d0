"""TRADES.

Zhang et al. 2019, https://arxiv.org/abs/1901.08573. The inner attack maximises the divergence from the clean output,
whatever the label. The training loss is the cross entropy on clean images plus BETA times that divergence. Three lines
change: `SafePGD` on a `FastAttackModel` takes the place of the inner loop, with the clean probabilities as its targets
and the divergence from them as its loss.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from common import ALPHA, EPS, STEPS, DigitsNet, batches, few_digits, verdict
from fastadv_adapters import FastAttackModel, SafePGD

BETA = 6.0


def divergence(logits: Tensor, clean: Tensor) -> Tensor:
    """Kullback-Leibler divergence from clean probabilities (N, C), one value per sample (N,)."""
    return F.kl_div(logits.log_softmax(1), clean, reduction="none").sum(1)


def main(*, epochs: int = 4, images: int = 1408, width: int = 16) -> tuple[float, float]:
    """Train and judge; returns clean and robust accuracy."""
    torch.manual_seed(0)
    data, model = few_digits(images), DigitsNet(width=width)
    fast = FastAttackModel(model)  # <- fast
    # As in the authors' code the attack begins beside x, not at a random point of the ball: so random_start=False.
    attack = SafePGD(fast, eps=EPS, alpha=ALPHA, steps=STEPS, random_start=False, loss=divergence)  # <- fast
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for x, y in batches(data, epochs=epochs):
        with torch.no_grad():
            clean = fast(x).softmax(1)  # without gradient a fast model answers in full precision, in eval mode
        adversarial = attack(x, clean)  # <- fast (the inner loop stood here)
        model.train()
        optimizer.zero_grad()
        logits = model(x)
        distance = divergence(model(adversarial), logits.softmax(1)).mean()
        (F.cross_entropy(logits, y) + BETA * distance).backward()
        optimizer.step()
    return verdict(model, data, name="TRADES")


if __name__ == "__main__":
    main()
