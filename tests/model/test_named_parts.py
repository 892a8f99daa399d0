"""Classes whose methods name a part of the model as a global, in a closure or as a default: refused if a pass does."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel
from tests.support.tools import input_gradient, settle

FLOAT32: Any = {"dtype": torch.float32}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return settle(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10)))  # type: ignore[return-value]


NET = network()


def run(x: Tensor) -> Tensor:
    return NET(x)  # type: ignore[no-any-return]


def decorated(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


class Norm(nn.Module):
    """As people write it in a notebook; with a network of its own that it should use."""

    def __init__(self, net: nn.Module = NET) -> None:
        super().__init__()
        self.model = net

    def normalise(self, x: Tensor) -> Tensor:
        return (x - 0.5) / 0.25

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.normalise(x))  # type: ignore[no-any-return]

    def training_step(self, x: Tensor) -> Tensor:
        return NET(x).sum()  # type: ignore[no-any-return]


class ByGlobal(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return NET(self.normalise(x))  # type: ignore[no-any-return]


class ByLambda(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([(lambda row: NET(row[None]))(row)[0] for row in x])


class ByMethod(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.offset

    @property
    def offset(self) -> Tensor:
        return self._offset_of("weight")

    @staticmethod
    def _offset_of(name: str) -> Tensor:
        return NET[4].get_parameter(name).mean()


class ByBase(ByMethod):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class ByFunction(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return run(self.normalise(x))


class ByDecoration(Norm):
    @decorated
    def forward(self, x: Tensor) -> Tensor:
        return NET(x)  # type: ignore[no-any-return]


class ByDefault(Norm):
    def forward(self, x: Tensor, net: nn.Module = NET) -> Tensor:
        return net(x)  # type: ignore[no-any-return]


class BySuper(Norm):
    def normalise(self, x: Tensor) -> Tensor:
        return NET[1].running_mean.mean() + x  # type: ignore[operator]


def by_closure() -> nn.Module:
    net = network()

    class Enclosing(Norm):
        def forward(self, x: Tensor) -> Tensor:
            return net(self.normalise(x))  # type: ignore[no-any-return]

    return Enclosing(net)


def by_bound_method() -> nn.Module:
    net = network()
    forward: Any = net.forward

    class Enclosing(Norm):
        def forward(self, x: Tensor) -> Tensor:
            return forward(x)  # type: ignore[no-any-return]

    return Enclosing(net)


NAMING: list[Callable[[], nn.Module]] = [
    ByGlobal,
    ByLambda,
    ByMethod,
    ByBase,
    ByFunction,
    ByDecoration,
    ByDefault,
    BySuper,
    by_closure,
]
NAMING += [by_bound_method]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("make", NAMING)
def test_a_forward_that_names_a_part_is_refused(make: Callable[[], nn.Module], inside: bool) -> None:
    model = nn.Sequential(nn.Identity(), make()) if inside else make()
    with pytest.raises(ValueError, match=r"through self alone, got .* is a part of the model: a global"):
        FastAttackModel(model.eval(), **FLOAT32)


def agrees(model: nn.Module) -> None:
    x = torch.rand(4, 3, 4, 4)
    fast = FastAttackModel(model.eval(), **FLOAT32)
    found, wanted = (input_gradient(m, x, x, lambda out, _: out.sin().sum()) for m in (fast, model))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


class AsksOthers(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.model[2].forward(x))  # type: ignore[index, no-any-return]

    def backward(self) -> Any:
        return NET


MODELS: dict[str, nn.Module] = {}


class Listed(nn.Linear):
    """All layers of this class are in a list on it."""

    layers: ClassVar[list[nn.Module]] = []

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.layers.append(self)


class TwoLayers(nn.Module):
    """Two layers that are reached in ways that subclasses say, besides by their attributes."""

    parts: ClassVar[Any] = ()
    head: ClassVar[Any] = None
    current: ClassVar[Any] = None

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Listed(48, 8), Listed(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.flatten(1)))  # type: ignore[no-any-return]


class ByListOfClass(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * len([layer for layer in Listed.layers if layer.training])


class ByOwnClass(TwoLayers):
    def __init__(self) -> None:
        super().__init__()
        type(self).parts = (self.first, self.last)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts[1](self.parts[0](x.flatten(1)))  # type: ignore[no-any-return]


class ByNamedClass(TwoLayers):
    def __init__(self) -> None:
        super().__init__()
        ByNamedClass.head = self.last

    def forward(self, x: Tensor) -> Tensor:
        return ByNamedClass.head(self.first(x.flatten(1)))  # type: ignore[no-any-return]


class ByRegister(TwoLayers):
    def __init__(self) -> None:
        super().__init__()
        MODELS["net"] = self.last

    def forward(self, x: Tensor) -> Tensor:
        return MODELS["net"](self.first(x.flatten(1)))  # type: ignore[no-any-return]


class SetsWhatRuns(TwoLayers):
    """Tells layers which model is running; and names a class that has a list of them, which it does not read."""

    def forward(self, x: Tensor) -> Tensor:
        SetsWhatRuns.current = self
        out: Tensor = super().forward(x)
        return out * (1 + isinstance(SetsWhatRuns.current.last, Listed))


@pytest.mark.parametrize("make", [ByListOfClass, ByOwnClass, ByNamedClass, ByRegister])
def test_a_forward_that_reaches_a_part_through_a_class_or_a_container_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"through self alone, got .* is a part of the model: .* attribute of a class"):
        FastAttackModel(make().eval(), **FLOAT32)
    assert isinstance(FastAttackModel(TwoLayers().eval(), **FLOAT32), nn.Module)


def test_classes_that_are_named_and_not_read_are_not_refused() -> None:
    model, x = SetsWhatRuns().eval(), torch.rand(4, 3, 4, 4)
    model(x)
    agrees(model)


def test_methods_that_no_pass_runs_may_name_what_they_like() -> None:
    agrees(Norm())
    agrees(AsksOthers())
    agrees(nn.Sequential(Norm(network()), nn.Identity()))


@pytest.mark.parametrize("make", [ByGlobal, ByFunction, ByDefault])
def test_what_is_no_part_of_the_model_may_be_named(make: Any) -> None:
    NET.eval()
    agrees(make(network()))
