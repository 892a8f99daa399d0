"""Code that writes without a trace, starts graphs of its own, or has shapes that its weights decide."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.folding.test_memo import equal, fast_of


class Odd(nn.Module):
    """A layer with a mask."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3))
        self.register_buffer("mask", torch.tensor([1.0, 0, 1, 0, 1, 1, 0, 1]))


class Chosen(Odd):
    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x.mean((2, 3)), self.weight)
        return x + x[:, self.mask.nonzero()[:, 0]].sum(1, keepdim=True)


class ByNumpy(Odd):
    def forward(self, x: Tensor) -> Tensor:
        scale = torch.zeros_like(self.mask)
        scale.numpy()[:] += 2
        return F.linear(x.mean((2, 3)), self.weight) * scale


class ByDataOfAView(Odd):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * 2
        weight.view(-1).data.mul_(3)
        return F.linear(x.mean((2, 3)), weight)


class OwnGraph(Odd):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            scale = self.mask.detach().clone().requires_grad_()
            (scale**2).sum().backward()
        assert scale.grad is not None
        return F.linear(x.mean((2, 3)), self.weight) * scale.grad


@pytest.mark.parametrize("kind", [Chosen, ByNumpy, ByDataOfAView, OwnGraph])
def test_is_right_before_and_after_an_update(kind: type[Odd]) -> None:
    model = nn.Sequential(kind(), nn.Linear(8, 10)).double().eval()
    fast = fast_of(model)
    equal(fast, model)
    mask = model.get_buffer("0.mask")
    with torch.no_grad():
        mask.zero_()
        mask[2] = 1  # one is left, whose index would broadcast
    fast.update()
    equal(fast, model)
