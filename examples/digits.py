"""Handwritten digits, a small residual network for them, and one training loop: what the other examples share."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

try:
    from rich.progress import track
    from sklearn.datasets import load_digits
except ModuleNotFoundError as error:
    raise SystemExit(f"expected {error.name} to be installed, got none: pip install -e '.[demo]'") from None

Attack = Callable[[Tensor, Tensor], Tensor]
"""Anything called as `attack(images, labels)` that gives back adversarial images."""


class Digits(NamedTuple):
    """A fixed split of the digits: images of float32 in [0, 1], labels of int64 in 0..9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def grey_digits(*, test_size: int = 360, seed: int = 0) -> Digits:
    """The 1797 digits that come with scikit-learn (nothing is downloaded), as (N, 1, 8, 8).

    Args:
        test_size: how many images are held out, 1 to 1796.
        seed: of the shuffle before the split; the same seed gives the same split everywhere.
    """
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().div(16).view(-1, 1, 8, 8)  # 17 grey levels, 0 to 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    test, train = order[:test_size], order[test_size:]
    targets = torch.from_numpy(labels).long()
    return Digits(images[train], targets[train], images[test], targets[test])


def rgb_digits(*, test_size: int = 360, seed: int = 0) -> Digits:
    """The same digits as (N, 3, 32, 32): enlarged bilinearly, the grey value in each of three channels."""
    grey = grey_digits(test_size=test_size, seed=seed)
    return grey._replace(train_images=_enlarge(grey.train_images), test_images=_enlarge(grey.test_images))


def _enlarge(images: Tensor) -> Tensor:
    big = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    return big.expand(-1, 3, -1, -1).clamp(0, 1).contiguous()


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each followed by batch norm, beside a shortcut (He et al. 2016, https://arxiv.org/abs/1512.03385).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """A residual network with batch norm, of a stem and six blocks at three resolutions.

    Args:
        channels: of the images: 1 for `grey_digits`, 3 for `rgb_digits`.
        width: channels of the first stage; the second and third have two and four times as many.
    """

    def __init__(self, *, channels: int = 1, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.Sequential(
            ResidualBlock(width, width),
            ResidualBlock(width, width),
            ResidualBlock(width, 2 * width, stride=2),
            ResidualBlock(2 * width, 2 * width),
            ResidualBlock(2 * width, 4 * width, stride=2),
            ResidualBlock(4 * width, 4 * width),
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, channels, H, W) in [0, 1] to logits (N, 10)."""
        features: Tensor = self.blocks(self.stem(x)).mean(dim=(2, 3))
        logits: Tensor = self.head(features)
        return logits


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    attack: Attack | None = None,
    epochs: int = 20,
    batch_size: int = 64,
    learning_rate: float = 1e-2,
    seed: int = 0,
    title: str = "training",
    show_progress: bool = True,
) -> int:
    """Train with AdamW on a one-cycle schedule, and leave the model in eval mode.

    With the defaults `DigitsNet` becomes very confident: half of the test images have a loss below 1e-4. That is what
    makes gradients vanish in half precision.

    Args:
        model: the model to train, in place.
        images: (N, channels, H, W) in [0, 1].
        labels: (N,) of int64.
        attack: for adversarial training, what is done to each batch before the step.
        epochs: passes over the images.
        batch_size: images per step.
        learning_rate: the highest of the schedule.
        seed: of the order of the images. The attack draws from torch's global generator.
        title: what the progress bar says.
        show_progress: whether there is a progress bar.

    Returns:
        The number of optimizer steps.
    """
    steps = epochs * math.ceil(len(images) / batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    batches = _batches(len(images), batch_size=batch_size, epochs=epochs, seed=seed)
    for index in track(batches, title, total=steps, disable=not show_progress):
        x, y = images[index], labels[index]
        if attack is not None:
            x = attack(x, y)
        model.train()
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    return steps


def trained_net(data: Digits, *, width: int = 16, epochs: int = 6, seed: int = 0) -> DigitsNet:
    """A `DigitsNet` for these digits, trained normally for a few seconds: what the short examples attack."""
    torch.manual_seed(seed)
    model = DigitsNet(channels=data.train_images.shape[1], width=width)
    train(model, data.train_images, data.train_labels, epochs=epochs, seed=seed, show_progress=False)
    return model


def _batches(count: int, *, batch_size: int, epochs: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator).split(batch_size)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """The class (N,) that the model gives each image."""
    return torch.as_tensor(model(images)).argmax(dim=1)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images, 0 to 1, that the model classifies as labelled."""
    return (predict(model, images) == labels).float().mean().item()
