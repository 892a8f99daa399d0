"""The networks under attack: digits networks trained in four ways, and their logits times a factor."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.attack.budgets import Norm, budgets
from digits import Digits, DigitsNet, grey_digits, train
from fastadv_adapters import FastAttackModel, SafePGD

WIDTH = 12
SMOOTHING = 0.3
"""Label smoothing: the share of the label that is spread over all classes."""
TEST_SIZE = 397
NETWORKS = ("normal", "robust", "smoothed", "hundred")
"""Trained normally, adversarially, with label smoothing, and normally with a hundred classes."""


@dataclass(frozen=True)
class Subject:
    """A trained network in eval mode, and the images that it is attacked on."""

    name: str
    net: nn.Module
    images: Tensor
    labels: Tensor

    def budgets(self, norm: Norm) -> tuple[float, ...]:
        """Budgets of a norm at which some images fall and some do not."""
        return budgets(self.net, self.images, self.labels, norm)


class Scaled(nn.Module):
    """A network whose logits are multiplied by a factor: the same decisions."""

    def __init__(self, net: nn.Module, factor: float) -> None:
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) to logits (N, C)."""
        logits: Tensor = self.net(x)
        return logits * self.factor


def subject(name: str, folder: Path, *, images: int) -> Subject:
    """A network by name, trained once per folder, and the first of the test images."""
    data = pairs(grey_digits(test_size=TEST_SIZE)) if name == "hundred" else grey_digits(test_size=TEST_SIZE)
    torch.manual_seed(0)
    net = DigitsNet(width=WIDTH)
    if name == "hundred":
        net.head = nn.Linear(4 * WIDTH, 100)
    path = folder / f"{name}.pt"
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
    else:
        _train(name, net, data)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), path)
    return Subject(name, net.eval(), data.test_images[:images], data.test_labels[:images])


def pairs(data: Digits, *, train_size: int = 8000) -> Digits:
    """Two digits side by side, (N, 1, 8, 16), of a hundred classes; as many test images as before."""
    generator = torch.Generator().manual_seed(0)

    def pair(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
        left, right = torch.randint(len(images), (2, count), generator=generator)
        return torch.cat([images[left], images[right]], 3), 10 * labels[left] + labels[right]

    seen = pair(data.train_images, data.train_labels, train_size)
    unseen = pair(data.test_images, data.test_labels, len(data.test_images))
    return Digits(*seen, *unseen)


def _train(name: str, net: nn.Module, data: Digits) -> None:
    torch.manual_seed(0)
    if name == "smoothed":
        _train_smoothed(net, data)
        return
    attack = None
    if name == "robust":
        fast = FastAttackModel(net, dtype=torch.float32)
        attack = SafePGD(fast, eps=0.15, steps=3, loss="ce", generator=torch.Generator().manual_seed(0))
    epochs = {"normal": 10, "robust": 10, "hundred": 6}[name]
    train(net, data.train_images, data.train_labels, attack=attack, epochs=epochs, title=name)


def _train_smoothed(net: nn.Module, data: Digits, *, epochs: int = 10) -> None:
    batches = [b for _ in range(epochs) for b in torch.randperm(len(data.train_images)).split(64)]
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=len(batches))
    net.train()
    for batch in batches:
        optimizer.zero_grad()
        logits = net(data.train_images[batch])
        F.cross_entropy(logits, data.train_labels[batch], label_smoothing=SMOOTHING).backward()
        optimizer.step()
        schedule.step()
