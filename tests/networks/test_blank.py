"""A model that is wrapped before it is trained: folds are right once its batch norms have seen batches, too."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel


class ByADefault(nn.Module):
    """A trace takes the argument that is left out for a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        h = self.conv(x)
        y = self.bn(h) + (h if skip is None else skip)
        return self.head(y.relu().mean((2, 3)))  # type: ignore[no-any-return]


class Tapped(nn.Module):
    """The sequence is traced alone, for the whole does not trace."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8 * 36 + 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 3:
            raise ValueError("expected 3 channels")
        taps = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.Conv2d):
                taps.append(x.mean((2, 3)))
        return self.head(torch.cat([x.flatten(1), *taps], 1))  # type: ignore[no-any-return]


class BehindAZero(ByADefault):
    """At the end of a residual branch, where the weight begins at 0."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.bn.weight)


@pytest.mark.filterwarnings("ignore:FastAttackModel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [ByADefault, Tapped, BehindAZero])
def test_folds_are_right_after_training(kind: type[Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.rand(8, 3, 8, 8)
    fast = FastAttackModel(model, dtype=dtype, decisions="fast")

    def gradient(network: nn.Module) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        output = network(leaf)
        return output.detach(), torch.autograd.grad(output.square().sum(), leaf)[0]

    gradient(fast)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        model(3 * x + 1).square().mean().backward()
        optimizer.step()
    (output, wanted), (found, ours) = gradient(copy.deepcopy(model).eval()), gradient(fast)
    near = 1e-4 if dtype == torch.float32 else 0.03 * float(output.abs().max())
    torch.testing.assert_close(found, output, rtol=1e-4, atol=near)
    assert torch.cosine_similarity(ours.flatten(1), wanted.flatten(1)).min() > 0.98
    assert "folded" in fast.summary()
