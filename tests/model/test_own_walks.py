"""Models whose classes have methods of their own in the place of those that walk over parts, parameters and buffers."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel, SafePGD, evaluate
from fastadv_adapters.modules import (
    buffers_of,
    children_of,
    modules_of,
    named_buffers_of,
    named_modules_of,
    named_parameters_of,
    submodule_of,
)
from tests.support.agreement import agrees
from tests.support.tools import batch, settle


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(8 * 36, 10)
        self.factor: Tensor
        self.register_buffer("factor", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x)) * self.factor
        return logits


class Groups(Net):
    def parameters(self, recurse: bool = True) -> Any:
        return [{"params": list(self.body.parameters())}, {"params": list(self.head.parameters()), "lr": 1.0}]


class AskedForARate(Net):
    def parameters(self, lr: float) -> Any:  # type: ignore[override]
        return [{"params": list(super().parameters()), "lr": lr}]


class NoneToTrain(Net):
    def parameters(self, recurse: bool = True) -> Any:
        return iter(())

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return iter(())


class OtherNames(Net):
    def named_parameters(self, memo: Any = None) -> Iterator[Any]:  # type: ignore[override]
        yield from ((name.replace(".", "_"), p) for name, p in super().named_parameters())

    def named_buffers(self) -> Any:  # type: ignore[override]
        return {}

    def buffers(self) -> Any:  # type: ignore[override]
        return []


class Refuses(Net):
    def parameters(self, recurse: bool = True) -> Any:
        raise NotImplementedError("call get_parameters()")

    def get_submodule(self, target: str) -> nn.Module:
        raise NotImplementedError("call part()")

    def state_dict(self) -> Any:  # type: ignore[override]
        raise NotImplementedError("call save()")


class SomeParts(Net):
    def modules(self) -> Any:  # type: ignore[override]
        return [self.head]

    def named_modules(self) -> Any:  # type: ignore[override]
        return [("first", self.body)]


class Listed(Net):
    def __init__(self) -> None:
        super().__init__()
        vars(self)["parameters"] = [8, 10]


KINDS: list[type[Net]] = [Net, Groups, AskedForARate, NoneToTrain, OtherNames, Refuses, SomeParts, Listed]


def settled(kind: type[Net]) -> Net:
    torch.manual_seed(0)
    net = kind()
    settle(net.body)
    return net.eval()


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_folded_attacked_and_followed(kind: type[Net], inside: bool) -> None:
    net, (x, y) = settled(kind), batch(4)
    model: nn.Module = nn.Sequential(net) if inside else net
    fast = FastAttackModel(model, dtype=torch.float32)
    agrees(fast, model, x)
    assert "1 folded" in fast.summary()
    with torch.no_grad():
        net.head.weight.mul_(-1)
        net.factor.mul_(2)
    agrees(fast, model, x)
    assert (SafePGD(model, eps=0.1, steps=2)(x, y) - x).abs().max() > 0.05
    assert len(evaluate(model, (x, y), "quick", eps=0.01, progress=False).samples) == 4


def test_walks_give_what_pytorchs_give() -> None:
    shared = nn.Linear(3, 3)
    shared.bias = None  # type: ignore[assignment]
    net = nn.Sequential(shared, nn.Sequential(nn.BatchNorm1d(3), shared), nn.ModuleDict({"a": shared, "b": nn.ReLU()}))
    net.register_module("none", None)
    assert list(named_modules_of(net)) == list(net.named_modules())
    assert list(modules_of(net)) == list(net.modules())
    assert list(children_of(net)) == list(net.children())
    for ours, theirs in (
        (named_parameters_of(net), net.named_parameters()),
        (named_buffers_of(net), net.named_buffers()),
    ):
        assert [(name, id(t)) for name, t in ours] == [(name, id(t)) for name, t in theirs]
    assert len(list(buffers_of(net))) == 3
    assert submodule_of(net, "") is net
    assert submodule_of(net, "2.a") is shared
    with pytest.raises(KeyError, match="c"):
        submodule_of(net, "2.c.d")
