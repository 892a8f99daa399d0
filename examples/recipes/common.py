"""What the recipes share: digits, the budget of the attacks, and the verdict of the plain model."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))  # `digits` lies beside this folder

from digits import Digits, DigitsNet, accuracy, grey_digits
from fastadv_adapters import SafePGD

__all__ = ["ALPHA", "EPS", "STEPS", "Digits", "DigitsNet", "batches", "few_digits", "needs", "verdict"]

EPS, ALPHA, STEPS = 0.15, 0.06, 4
"""Of the attacks in training, in L-infinity: largest perturbation, size of a step, steps."""


def few_digits(images: int = 1408, *, device: str = "cpu") -> Digits:
    """The digits, (N, 1, 8, 8) in [0, 1]: the first `images` of 1437 to train on, and as many of 360 to test."""
    return Digits(*(tensor[:images].to(device) for tensor in grey_digits()))


def batches(data: Digits, *, epochs: int, size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels to train on, in a new order each epoch."""
    for _ in range(epochs):
        for index in torch.randperm(len(data.train_images)).split(size):
            yield data.train_images[index], data.train_labels[index]


def verdict(model: nn.Module, data: Digits, *, name: str) -> tuple[float, float]:
    """Print and return clean and robust accuracy, 0 to 1.

    The plain model is attacked, in float32, and judged: no fast model has a say in it.
    """
    model.eval()
    x, y = data.test_images, data.test_labels
    attack = SafePGD(model, eps=EPS, steps=10, generator=torch.Generator().manual_seed(0))
    clean, robust = accuracy(model, x, y), accuracy(model, attack(x, y), y)
    print(f"{name}: {clean:.1%} of the digits right, {robust:.1%} under SafePGD (attacked and judged: the plain model)")
    return clean, robust


@contextmanager
def needs(install: str) -> Iterator[None]:
    """Around an import: if it fails, one line says how to install the library, instead of a traceback."""
    try:
        yield
    except Exception as error:  # a library that does not fit the others raises what it likes
        raise SystemExit(f"expected a library that can be imported, got {error!r}: {install}") from None
