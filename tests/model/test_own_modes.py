"""A model whose own ``train()`` does more than set flags is attacked as it is in eval mode."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel, compare


class Smoothed(nn.Module):
    """Noise in training mode only, by an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.sigma = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)), 0.5

    def train(self, mode: bool = True) -> "Smoothed":
        super().train(mode)
        self.sigma = 0.5 if mode else 0.0
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + self.sigma * torch.randn_like(x))  # type: ignore[no-any-return]


class SwitchesByEval(Smoothed):
    def train(self, mode: bool = True) -> "SwitchesByEval":
        nn.Module.train(self, mode)
        return self if mode else self.eval()

    def eval(self) -> "SwitchesByEval":
        self.sigma = 0.0
        for part in self.modules():
            part.training = False
        return self


class OtherGraph(Smoothed):
    """As torchvision's feature extractors, one of two networks in the place of another."""

    def __init__(self) -> None:
        super().__init__()
        self.now = "loud"

    def train(self, mode: bool = True) -> "OtherGraph":
        nn.Module.train(self, mode)
        self.now = "loud" if mode else "silent"
        return self

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.now)(x)  # type: ignore[no-any-return]

    def loud(self, x: Tensor) -> Tensor:
        return self.net(F.dropout(x, 0.5, True))  # type: ignore[no-any-return]

    def silent(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


class Merges(Smoothed):
    """As adapters of low rank that are merged in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.sigma, self.merged = 0.0, False
        self.down, self.up = nn.Parameter(torch.randn(2, 288)), nn.Parameter(torch.randn(5, 2))

    def train(self, mode: bool = True) -> "Merges":
        nn.Module.train(self, mode)
        if self.merged == mode:
            self.net[3].weight.data += (self.up @ self.down).detach() * (-1 if mode else 1)  # type: ignore[operator]
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        features = self.net[:3](x)
        output: Tensor = self.net[3](features)
        return output if self.merged else output + F.linear(features, self.up @ self.down)


KINDS = [Smoothed, SwitchesByEval, OtherGraph, Merges]


def gradient(network: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    output = network(leaf)
    return output.detach(), torch.autograd.grad(output.square().sum(), leaf)[0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_attacked_in_eval_mode(kind: type[Smoothed], training: bool) -> None:
    torch.manual_seed(0)
    model, x = kind().train(training), torch.rand(4, 3, 8, 8)
    before = {k: v for k, v in vars(model).items() if not isinstance(v, dict)}
    weights = copy.deepcopy(model.state_dict())
    fast = FastAttackModel(model, dtype=torch.float32)
    output, wanted = gradient(copy.deepcopy(model).eval(), x)
    for network in (fast, fast.view(full_precision=True), fast.view(decisions="exact")):
        found, ours = gradient(network, x)
        torch.testing.assert_close((found, ours), (output, wanted), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), output, rtol=1e-3, atol=1e-4)
    assert {k: v for k, v in vars(model).items() if not isinstance(v, dict)} == before
    assert all(model.state_dict()[name].equal(value) for name, value in weights.items())


@pytest.mark.parametrize("kind", [Smoothed, SwitchesByEval, OtherGraph])
def test_a_change_of_mode_changes_nothing(kind: type[Smoothed]) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.rand(4, 3, 8, 8)
    fast = FastAttackModel(model, dtype=torch.float32)
    first = gradient(fast, x)
    for mode in (False, True):
        model.train(mode)
        torch.testing.assert_close(gradient(fast, x), first)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_compared_in_eval_mode(kind: type[Smoothed]) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.rand(8, 3, 8, 8)
    before = {k: v for k, v in vars(model).items() if not isinstance(v, dict)}
    result = compare(model, x, eps=0.03, repeats=1, progress=False)
    assert not any("random" in note for note in result.notes)
    assert {k: v for k, v in vars(model).items() if not isinstance(v, dict)} == before
