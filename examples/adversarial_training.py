"""Adversarial training (Madry et al. 2018, https://arxiv.org/abs/1706.06083): wrap the model once, before the loop."""

import torch
import torchattacks
from torch.nn import functional as F

from digits import DigitsNet, accuracy, grey_digits, trained_net
from fastadv_adapters import FastAttackModel, SafePGD


def main() -> None:
    """Train a network on what PGD makes of the digits, and compare it with one that was trained on the digits."""
    data = grey_digits()
    torch.manual_seed(0)
    model = DigitsNet(width=16)
    fast = FastAttackModel(model)  # follows `model`: after each optimizer step its next forward brings it up to date
    attack = torchattacks.PGD(fast, eps=0.15, alpha=0.08, steps=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)

    for _ in range(5):
        for batch in torch.randperm(len(data.train_images)).split(64):
            x, y = data.train_images[batch], data.train_labels[batch]
            adversarial = attack(x, y)  # in eval mode and without parameter gradients, whichever mode `model` is in
            model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(adversarial), y).backward()
            optimizer.step()
    model.eval()

    x, y = data.test_images, data.test_labels
    for name, net in {"normally": trained_net(data), "adversarially": model}.items():
        adversarial = SafePGD(FastAttackModel(net), eps=0.15, steps=10)(x, y)
        clean, robust = accuracy(net, x, y), accuracy(net, adversarial, y)
        print(f"trained {name}: {clean:.1%} of the digits right, {robust:.1%} under SafePGD")


if __name__ == "__main__":
    main()
