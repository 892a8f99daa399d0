"""Layers, weights and values that are used in more than one place: where a fold would leak into the other use."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.registry import CLASSES, Headed, classifier, register


@register()
def shared_module() -> nn.Module:
    """One convolution registered twice."""
    conv = nn.Conv2d(6, 6, 3, padding=1)
    return classifier(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), conv, nn.ReLU(), conv, nn.Tanh(), channels=6)


@register()
def shared_block() -> nn.Module:
    """One pair of convolution and norm registered twice."""
    block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
    return classifier(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), block, block, channels=6)


@register()
def norm_used_twice() -> nn.Module:
    """One norm behind two convolutions."""
    norm = nn.BatchNorm2d(6)
    return classifier(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.Conv2d(6, 6, 3), norm, nn.ReLU(), channels=6)


@register()
class ConvUsedTwice(Headed):
    """One convolution in front of two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.conv = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(6)
        self.norm2 = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        y = F.relu(self.norm1(self.conv(self.stem(x))))
        return self.classify(F.relu(self.norm2(self.conv(y))))


@register()
class RecurrentBlock(Headed):
    """A pair of convolution and norm that is called in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        x = self.stem(x)
        for _ in range(3):
            x = x + torch.tanh(self.norm(self.conv(x)))
        return self.classify(x)


@register()
class OutputReadTwice(Headed):
    """What the convolution gives is read beside its norm too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        y = self.conv(x)
        return self.classify(F.relu(self.norm(y)) + torch.sigmoid(y))


@register()
class InPlaceBetween(Headed):
    """What the convolution gives is changed in place before its norm reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        y = self.conv(x)
        y.mul_(2).clamp_(min=-0.5)
        return self.classify(F.relu(self.norm(y)))


@register()
class PlainList(Headed):
    """Calls registered layers through a plain list, where swapping the registered ones has no effect."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.order = [self.conv, self.norm, nn.ReLU()]

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        for layer in self.order:
            x = layer(x)
        return self.classify(x)


@register()
class HalfInList(Headed):
    """Calls the convolution by its name, the norm through a plain dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.norms = {"first": self.norm}

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        return self.classify(F.relu(self.norms["first"](self.conv(x))))


@register((4, 7))
class TiedWeights(nn.Module):
    """An encoder whose weight, transposed, decodes too."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(7, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors (N, 7) to logits."""
        code = torch.tanh(self.norm(self.encoder(x)))
        logits: Tensor = self.head(F.linear(code, self.encoder.weight.t()))
        return logits


@register()
class TiedConvolutions(Headed):
    """Two convolutions with one weight, each with its own norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=2, dilation=2)
        self.conv2.weight = self.conv1.weight
        self.norm1 = nn.BatchNorm2d(6)
        self.norm2 = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        y = F.relu(self.norm1(self.conv1(self.stem(x))))
        return self.classify(F.relu(self.norm2(self.conv2(y))))


@register(folds=False)
class StatisticsReadElsewhere(Headed):
    """The norm's module is called, and its statistics and weight are read by hand too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        y = F.relu(self.norm(self.conv(x)))
        mean, variance = self.norm.running_mean, self.norm.running_var
        return self.classify(F.batch_norm(y, mean, variance, self.norm.weight, self.norm.bias, False, 0.1, 1e-3))


@register(folds=False, warns=True)
class SlicedSequential(Headed):
    """Reads what the convolution gives by running a part of a sequence of layers, made anew in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        y = self.body[:1](x)
        return self.classify(self.body[1:](y) + torch.sigmoid(y))


@register(folds=False)
class ForwardCalledDirectly(Headed):
    """Calls `layer.forward`, past hooks and tracers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        return self.classify(F.relu(self.norm.forward(self.conv.forward(x))))
