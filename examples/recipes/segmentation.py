"""An attack on segmentation.

`SafePGD` takes labels (N, H, W) as targets of a loss of one's own, which gives one value per sample. It then looks for
the highest loss, as there is no single decision to change. Two lines change. In half precision the gradient of *some*
pixels may become zero though that of the whole sample does not. So compare `fast.zero_entries` with that of a view in
full precision, as is done at the end.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import EPS, Digits, batches, few_digits
from digits import ResidualBlock
from fastadv_adapters import FastAttackModel, SafePGD

PAPER = 10
"""The class of pixels without ink; the others are those of the digit."""


def pixel_labels(x: Tensor, y: Tensor) -> Tensor:
    """The digit where there is ink, paper elsewhere: (N, H, W)."""
    return torch.where(x[:, 0] > 0.4, y[:, None, None], PAPER)


def pixel_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the pixels, one value per sample (N,)."""
    return F.cross_entropy(logits, labels, reduction="none").mean((1, 2))


@torch.no_grad()
def pixels_right(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Share of the pixels that are classified as labelled, 0 to 1."""
    return (cast("Tensor", model(x)).argmax(1) == labels).float().mean().item()


def trained(data: Digits, *, epochs: int, width: int) -> nn.Module:
    """A small network that sees the whole image at every pixel, trained normally."""
    blocks = [ResidualBlock(width, width) for _ in range(4)]
    stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    model = nn.Sequential(stem, *blocks, nn.Conv2d(width, 11, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for x, y in batches(data, epochs=epochs):
        optimizer.zero_grad()
        F.cross_entropy(model(x), pixel_labels(x, y)).backward()
        optimizer.step()
    return model.eval()


def main(*, epochs: int = 4, images: int = 1408, width: int = 16) -> tuple[float, float]:
    """Train, attack and judge; returns the shares of pixels that are right, clean and attacked."""
    torch.manual_seed(0)
    data = few_digits(images)
    model = trained(data, epochs=epochs, width=width)
    x, labels = data.test_images, pixel_labels(data.test_images, data.test_labels)
    fast = FastAttackModel(model)  # <- fast
    results = {}
    for name, target in {"the plain model": model, "the fast model": fast}.items():
        adversarial = SafePGD(target, eps=EPS, steps=10, loss=pixel_cross_entropy)(x, labels)  # <- fast
        results[name] = pixels_right(model, adversarial, labels)
        print(f"attack on {name}: {results[name]:.1%} of the pixels right, as the plain model sees them")
    clean = pixels_right(model, x, labels)
    print(f"clean: {clean:.1%} of the pixels right")

    seen, zero = x.clone().requires_grad_(), []
    for view in (fast, fast.view(full_precision=True)):
        fast.reset_gradient_stats()
        torch.autograd.grad(pixel_cross_entropy(view(seen), labels).sum(), seen)
        zero.append(fast.zero_entries)
    print(f"entries of the gradient that are exactly 0: {zero[0]:.2%}, in full precision {zero[1]:.2%}")
    return clean, results["the fast model"]


if __name__ == "__main__":
    main()
