"""Mixed-precision training with GradScaler.

The training step stays as it is: autocast, a scaled loss, `scaler.step()`. One line changes: the attack gets a
`FastAttackModel`, which chooses its own precision and scales its own gradients, sample by sample. So the attack needs
no autocast and no scaler; inside an autocast region it does the same. A step that the scaler skips changes no weights,
and the fast model then has nothing to follow.
"""

import torch
import torchattacks
from torch.nn import functional as F

from common import ALPHA, EPS, STEPS, DigitsNet, batches, few_digits, verdict
from fastadv_adapters import FastAttackModel


def main(*, epochs: int = 4, images: int = 1408, width: int = 16) -> tuple[float, float]:
    """Train and judge; returns clean and robust accuracy."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = torch.float16 if device == "cuda" else torch.bfloat16  # float16 is slow on a CPU
    torch.manual_seed(0)
    data, model = few_digits(images, device=device), DigitsNet(width=width).to(device)
    attack = torchattacks.PGD(FastAttackModel(model), eps=EPS, alpha=ALPHA, steps=STEPS)  # <- fast (`model` stood here)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    scaler = torch.amp.GradScaler(device)
    for x, y in batches(data, epochs=epochs):
        adversarial = attack(x, y)
        model.train()
        optimizer.zero_grad()
        with torch.autocast(device, dtype=half):
            loss = F.cross_entropy(model(adversarial), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return verdict(model, data, name="mixed precision")


if __name__ == "__main__":
    main()
