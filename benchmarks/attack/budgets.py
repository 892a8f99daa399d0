"""Budgets at which an attack is put to the test: robust accuracy is neither near 1 nor near 0."""

from typing import Literal

import torch
from torch import Tensor, nn

from digits import accuracy
from fastadv_adapters import FastAttackModel, SafePGD

Norm = Literal["linf", "l2", "l1"]
NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")

WANTED = (0.8, 0.45, 0.12)
"""The robust accuracies that are aimed at."""

LARGEST: dict[Norm, float] = {"linf": 0.5, "l2": 5.0, "l1": 30.0}


def budgets(net: nn.Module, x: Tensor, y: Tensor, norm: Norm) -> tuple[float, ...]:
    """One budget for each robust accuracy in WANTED, with two digits, found by halving with ten steps of SafePGD."""
    fast = FastAttackModel(net, dtype=torch.float32)
    return tuple(_budget(net, fast, x, y, norm, wanted) for wanted in WANTED)


def _budget(net: nn.Module, fast: FastAttackModel, x: Tensor, y: Tensor, norm: Norm, wanted: float) -> float:
    low, high = 0.0, LARGEST[norm]
    for _ in range(8):
        eps = (low + high) / 2
        generator = torch.Generator().manual_seed(0)
        attack = SafePGD(fast, eps=eps, norm=norm, steps=10, early_stop=True, generator=generator)
        low, high = (eps, high) if accuracy(net, attack(x, y), y) > wanted else (low, eps)
    return float(f"{high:.2g}")
