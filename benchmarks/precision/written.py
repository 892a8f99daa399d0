"""Models as people write them: something behind the logits, a second input, a loss of their own, a large mean."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from digits import DigitsNet


class Ends(nn.Module):
    """A network with something behind its logits."""

    def __init__(self, net: nn.Module, factor: float, last: nn.Module) -> None:
        super().__init__()
        self.net, self.factor, self.last = net, factor, last

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.net(x) * self.factor)
        return found


class OwnLoss(nn.Module):
    """Given labels it returns its own loss too, as image classifiers of Hugging Face do."""

    def __init__(self, net: nn.Module, factor: float) -> None:
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x) * self.factor
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Pair(nn.Module):
    """Two towers in the manner of CLIP: the logits are cosines of an image with the features of each class."""

    def __init__(self, net: DigitsNet, scale: float = 60.0) -> None:
        super().__init__()
        self.net = net
        self.logit_scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        image = F.normalize(self.net(x), dim=1)
        return self.logit_scale * image @ F.normalize(text, dim=1).T


class Auxiliary(nn.Module):
    """Returns logits at a temperature, and a number for the whole batch."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.net(x) / 0.5
        return logits, logits.pow(2).mean() * 1e-3


def _without_head(net: nn.Module) -> nn.Module:
    net = copy.deepcopy(net)
    net.head = nn.Identity()
    return net


class Offset(nn.Module):
    """Adds a large number to the features, and takes what it brings off the logits."""

    def __init__(self, net: nn.Module, number: float) -> None:
        super().__init__()
        self.net, self.head, self.number = _without_head(net), net.get_submodule("head"), number

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.net(x) + self.number)
        return logits - self.number * self.head.get_parameter("weight").sum(1)


class Prototypes(nn.Module):
    """The nearest class mean: squared distances written out, so that large numbers cancel.

    Args:
        net: its features are used.
        x: images (N, 1, H, W) that the means are taken of.
        y: their labels (N,).
        number: is added to all features, which changes no distance.
    """

    means: Tensor

    def __init__(self, net: nn.Module, x: Tensor, y: Tensor, number: float) -> None:
        super().__init__()
        self.net, self.number = _without_head(net), number
        with torch.no_grad():
            features = self.net(x) + number
        self.register_buffer("means", torch.stack([features[y == label].mean(0) for label in range(10)]))

    def forward(self, x: Tensor) -> Tensor:
        features = self.net(x) + self.number
        ours, theirs = features.pow(2).sum(1, keepdim=True), self.means.pow(2).sum(1)
        logits: Tensor = 2 * features @ self.means.T - ours - theirs
        return logits


class PreActivation(nn.Module):
    """Blocks with batch norm in front, on a stream whose mean is large."""

    def __init__(self, bias: float, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        nn.init.constant_(self.stem.bias, bias)  # type: ignore[arg-type]
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(4))
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, convolution in zip(self.norms, self.convolutions, strict=False):
            x = x + convolution(F.relu(norm(x)))
        logits: Tensor = self.head(F.relu(self.norms[-1](x)).mean((2, 3)))
        return logits


class Segmenter(nn.Module):
    """A class for each pixel: the digit where there is ink, none elsewhere."""

    def __init__(self, width: int = 16, factor: float = 1.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (1, width, width, width):
            layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.body, self.head, self.factor = nn.Sequential(*layers), nn.Conv2d(width, 11, 1), factor

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits * self.factor


def pixels(x: Tensor, y: Tensor) -> Tensor:
    """The label of each pixel."""
    return torch.where(x[:, 0] > 0.3, y[:, None, None], 10)
