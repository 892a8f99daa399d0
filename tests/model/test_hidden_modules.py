"""Modules that a model hides in a list or a dictionary, from its state dict and its optimizer, are followed too."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel, FastAttackWarning


class Hides(nn.Module):
    def __init__(self, how: Any) -> None:
        super().__init__()
        backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()).eval()
        self.hidden, self.find = how(backbone)
        self.head = nn.Linear(288, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.find(self.hidden)(x))  # type: ignore[no-any-return]


def first(held: Any) -> Any:
    return held[0]


def named(held: Any) -> Any:
    return held["net"]


HOW = {
    "list": lambda net: ([net], first),
    "tuple": lambda net: ((net,), first),
    "dictionary": lambda net: ({"net": net}, named),
}


def check(fast: FastAttackModel, model: nn.Module, x: Tensor) -> None:
    def gradient(network: nn.Module) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        output = network(leaf)
        return output.detach(), torch.autograd.grad(output.square().sum(), leaf)[0]

    wanted = gradient(copy.deepcopy(model).eval())
    for network in (fast, fast.view(full_precision=True)):
        torch.testing.assert_close(gradient(network), wanted, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), wanted[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_its_weights_and_its_mode_are_followed(how: Any) -> None:
    torch.manual_seed(0)
    model, x = Hides(how), torch.rand(4, 3, 8, 8)
    hidden = model.find(model.hidden)
    fast = FastAttackModel(model, dtype=torch.float32)
    check(fast, model, x)
    optimizer = torch.optim.SGD(hidden.parameters(), lr=0.1)
    hidden(x).sum().backward()
    optimizer.step()
    check(fast, model, x)
    hidden.load_state_dict({k: v * 2 for k, v in hidden.state_dict().items()})
    check(fast, model, x)
    hidden[0].weight = nn.Parameter(torch.randn(8, 3, 3, 3))
    check(fast, model, x)
    hidden[1].weight.data = torch.rand(8)
    check(fast, model, x)
    hidden[1].eps = 0.5
    check(fast, model, x)
    hidden.train()
    with pytest.warns(FastAttackWarning, match="reaches other samples"):
        fast(x.clone().requires_grad_())
    hidden.eval()
    check(fast, model, x)


def test_a_part_in_a_list_is_a_part() -> None:
    model: Any = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    model.layers = [model[1]]
    fast, x = FastAttackModel(model, dtype=torch.float32), torch.rand(2, 3, 2, 2)
    check(fast, model, x)
    before = fast._networks.twin
    with torch.no_grad():
        model[1].weight.mul_(2)
    check(fast, model, x)
    assert fast._networks.twin is before, "values alone make no new networks"


class KeepsATable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.cache = nn.Parameter(torch.zeros(5)), dict[str, Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        if "w" not in self.cache:
            self.cache["w"] = 4 * self.w.tanh().detach()
        return x + self.cache["w"]


class HidesATable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.inner = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), [KeepsATable().eval()]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[0](self.net(x))  # type: ignore[no-any-return]


def test_a_table_that_it_keeps_is_taken_back() -> None:
    torch.manual_seed(0)
    model, x = HidesATable().eval(), torch.rand(4, 3, 8, 8)
    fast = FastAttackModel(model, dtype=torch.float32)
    for value in (0.0, 3.0, -3.0):
        with torch.no_grad():
            model.inner[0].w.fill_(value)
        model.inner[0].cache.clear()
        check(fast, model, x)


def test_a_fused_step_of_it_is_noticed() -> None:
    torch.manual_seed(0)
    model, x = HidesATable().eval(), torch.rand(4, 3, 8, 8)
    model.inner = [nn.Linear(5, 5)]  # type: ignore[list-item]
    fast = FastAttackModel(model, dtype=torch.float32)
    check(fast, model, x)
    model(x).square().sum().backward()
    torch.optim.SGD(model.inner[0].parameters(), lr=0.1, fused=True).step()
    check(fast, model, x)
