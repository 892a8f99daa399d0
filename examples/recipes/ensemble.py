"""An ensemble of several networks.

The attack is on the ensemble as a whole. So one line wraps the whole: one `FastAttackModel` of the module that
averages, not one of each network. The mean of probabilities is returned as logarithms, which every loss on logits
takes; in half precision the networks alone run, and everything after their last matrix product is in float32.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn

from common import EPS, DigitsNet, few_digits, verdict
from digits import accuracy, train
from fastadv_adapters import FastAttackModel, SafePGD


class Ensemble(nn.Module):
    """Logarithms of the mean of the members' probabilities, (N, C)."""

    def __init__(self, *members: nn.Module) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        found = torch.stack([cast("Tensor", member(x)).log_softmax(1) for member in self.members])
        return found.logsumexp(0) - math.log(len(self.members))


def main(*, epochs: int = 3, images: int = 1408, width: int = 16) -> tuple[float, float]:
    """Train three networks normally, attack them together and judge; returns clean and robust accuracy."""
    torch.manual_seed(0)
    data, members = few_digits(images), [DigitsNet(width=width) for _ in range(3)]
    for seed, member in enumerate(members):
        train(member, data.train_images, data.train_labels, epochs=epochs, seed=seed, show_progress=False)
    model = Ensemble(*members).eval()
    fast = FastAttackModel(model)  # <- fast
    attack = SafePGD(fast, eps=EPS, steps=10)  # <- fast (`model` stood here)
    adversarial = attack(data.test_images, data.test_labels)
    robust = accuracy(model, adversarial, data.test_labels)
    print(f"attack on the fast ensemble: {robust:.1%} of the digits right, as the plain one sees them")
    return verdict(model, data, name="ensemble")


if __name__ == "__main__":
    main()
