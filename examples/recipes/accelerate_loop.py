"""A training loop with Hugging Face Accelerate.

It trains in mixed precision. Accelerate patches the model's `forward` with autocast, and may wrap the model. One line
changes: the attack gets a `FastAttackModel` of the prepared model. Make it after `prepare()`, since that may move the
model to another device or into a wrapper.
"""

import torch
import torchattacks
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from common import ALPHA, EPS, STEPS, DigitsNet, few_digits, needs, verdict
from fastadv_adapters import FastAttackModel

with needs("pip install --constraint constraints.txt accelerate"):
    from accelerate import Accelerator


def main(*, epochs: int = 4, images: int = 1408, width: int = 16) -> tuple[float, float]:
    """Train and judge; returns clean and robust accuracy."""
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    data, model = few_digits(images), DigitsNet(width=width)
    loader = DataLoader(TensorDataset(data.train_images, data.train_labels), batch_size=64, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    attack = torchattacks.PGD(FastAttackModel(model), eps=EPS, alpha=ALPHA, steps=STEPS)  # <- fast (`model` stood here)
    for _ in range(epochs):
        for x, y in loader:
            adversarial = attack(x, y)
            model.train()
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(adversarial), y))
            optimizer.step()
    return verdict(accelerator.unwrap_model(model, keep_fp32_wrapper=False), data, name="Accelerate")


if __name__ == "__main__":
    main()
