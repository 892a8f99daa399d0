"""A small network trained on the digits of scikit-learn, for ``fastadv demo``: nothing is downloaded."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..modules import need

EPS = 0.15
"""How far the attack of the demo may move a pixel, where 0 is white and 1 is black."""

_HELD_OUT = 128


def trained(seed: int, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, and images (N, 1, 8, 8) in [0, 1] with labels that it has not seen; takes a few seconds."""
    pixels, targets = need("sklearn.datasets", extra="demo").load_digits(return_X_y=True)
    torch.manual_seed(seed)
    x = torch.as_tensor(pixels).float().div(16).view(-1, 1, 8, 8).to(device)
    y = torch.as_tensor(targets).long().to(device)
    order = torch.randperm(len(x)).to(device)
    test, rest = order[:_HELD_OUT], order[_HELD_OUT:]
    model = _network().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(5):
        for index in rest[torch.randperm(len(rest)).to(device)].split(64):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    return model.eval(), x[test], y[test]


def _network(width: int = 64) -> nn.Module:
    def block(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [*block(1, width), *block(width, width), *block(width, 2 * width, 2), *block(2 * width, 2 * width)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))
