"""The networks that are attacked: trained on handwritten digits until they are confident."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.shared.correctness import Subject, confident_digits
from benchmarks.shared.networks import resnet18
from digits import Digits, rgb_digits, train


@dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark; see the options of the command."""

    images: int
    steps: int
    epochs: int
    resnet_images: int
    resnet_epochs: int
    resnet_width: int
    seed: int


class Multiplied(nn.Module):
    """A network whose logits are multiplied by a number, as further training would make them grow."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model = model
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits * self.factor


def train_subjects(settings: Settings, device: torch.device) -> Iterator[Subject]:
    """The networks, trained without attacks, so that they are confident."""
    small = confident_digits(device, images=settings.images, epochs=settings.epochs, seed=settings.seed)
    big = resnet18(width=settings.resnet_width).to(device)
    yield small
    if settings.resnet_images:
        data = Digits(*(part.to(device) for part in rgb_digits()))
        epochs, seed = settings.resnet_epochs, settings.seed
        train(big, data.train_images, data.train_labels, epochs=epochs, seed=seed, show_progress=False)
        yield Subject("ResNet-18", big.eval(), data, 0.05, settings.resnet_images)
