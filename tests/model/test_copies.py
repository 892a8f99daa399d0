"""Copies of a model: exact, with tensors of their own, and refused where a class has another idea of a copy."""

import copy
import types
from array import array
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel
from fastadv_adapters.modules.copying import clone, copy_module
from tests.support.tools import fingerprint, small_net


class Own(nn.Module):
    """Two of PyTorch's layers, and a way of its own to be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.bn(self.fc(x))
        return out


class Shares(Own):
    def __deepcopy__(self, memo: dict[int, Any]) -> "Shares":
        made = type(self)()
        made.fc, made.bn = self.fc, self.bn
        return made


class Ignores(Own):
    def __deepcopy__(self, memo: dict[int, Any]) -> "Ignores":
        made = type(self)()
        made.load_state_dict(self.state_dict())
        return made


class Drops(Own):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(4, 4)

    def __getstate__(self) -> dict[str, Any]:
        modules = {name: part for name, part in self._modules.items() if name != "teacher"}
        return {**vars(self), "_modules": modules}


class Honours(Own):
    def __deepcopy__(self, memo: dict[int, Any]) -> "Honours":
        made = memo[id(self)] = type(self)()
        made.fc, made.bn = copy.deepcopy((self.fc, self.bn), memo)
        return made


@pytest.mark.parametrize("kind", [Shares, Ignores, Drops])
def test_a_class_whose_copies_have_other_layers_is_refused_and_left_as_it_was(kind: type[Own]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), kind())
    before = fingerprint(model)
    with pytest.raises(ValueError, match="expected a model that can be copied, but copying Sequential raised"):
        FastAttackModel(model)
    assert fingerprint(model) == before


def test_a_class_whose_copies_honour_the_memo_is_copied() -> None:
    model = Honours().eval()
    x = torch.rand(3, 4)
    torch.testing.assert_close(FastAttackModel(model, dtype=torch.float32)(x), model(x))


def test_what_is_held_in_two_places_is_so_in_the_copy() -> None:
    model = small_net()
    first, last = nn.Linear(4, 4), nn.Linear(4, 4)
    last.weight = first.weight
    numbers = [1, 2]
    first.numbers, last.numbers = numbers, numbers  # type: ignore[assignment]
    model.extra, model.alone = nn.ModuleList([first, last]), first
    model.held = {"weight": first.weight, "all": first._parameters}  # type: ignore[assignment]
    copied: Any = copy_module(model, clone)
    ours, theirs = copied.extra[0], copied.extra[1]
    assert copied.alone is ours is not first
    assert ours.weight is theirs.weight is copied.held["weight"] is not first.weight
    assert copied.held["all"] is ours._parameters is not first._parameters
    assert ours.numbers is theirs.numbers is not numbers
    assert torch.equal(ours.weight, first.weight)


def test_layers_with_more_than_constants_are_copied_with_it() -> None:
    layer = nn.BatchNorm1d(4)
    part = nn.Linear(2, 2)
    model = nn.Sequential(layer, part)
    layer.start = layer.state_dict()  # type: ignore[assignment]
    layer.seen = {part: None}  # type: ignore[assignment]
    layer.order = OrderedDict(first=1)  # type: ignore[assignment]
    copied: Any = copy_module(model, clone)
    assert copied[0].start._metadata == layer.start._metadata  # type: ignore[union-attr]
    assert list(copied[0].seen) == [copied[1]]
    assert copied[0].order == layer.order
    assert copied[0].order is not layer.order


def test_a_traced_model_with_a_part_that_holds_a_parameter_alone_is_copied() -> None:
    class Scaled(Own):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Module()
            self.part.scale = nn.Parameter(torch.full((4,), 2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = super().forward(x) * self.part.scale  # type: ignore[operator]
            return out

    model, x = torch.fx.symbolic_trace(Scaled().eval()), torch.rand(3, 4)
    torch.testing.assert_close(FastAttackModel(model, dtype=torch.float32)(x), model(x))


TRAINED, BINARY = object(), object()


class Marked(Own):
    """Compares a marker by identity, alone and in containers, and holds what no deep copy takes."""

    def __init__(self) -> None:
        super().__init__()
        self.kind, self.kinds = TRAINED, {"first": [BINARY], TRAINED: BINARY}
        self.functions: Any = F
        self.sizes, self.bytes = types.MappingProxyType({"scale": 2.0}), memoryview(b"23")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        same = self.kind is TRAINED and self.kinds["first"][0] is self.kinds[TRAINED] is BINARY  # type: ignore[index]
        out: torch.Tensor = self.functions.gelu(super().forward(x)) * self.sizes["scale"] * self.bytes[1]
        return out if same else -out


def test_markers_modules_of_code_and_views_of_constants_are_shared() -> None:
    model, x = Marked().eval(), torch.rand(3, 4)
    fast = FastAttackModel(model, dtype=torch.float32)
    torch.testing.assert_close(fast(x.requires_grad_()), model(x))


def test_views_of_weights_are_not_shared() -> None:
    model: Any = Own()
    model.parts = types.MappingProxyType({"fc": model.fc})
    with pytest.raises(ValueError, match="cannot pickle 'mappingproxy'"):
        copy_module(model, clone)


def test_nan_in_an_array_is_no_change() -> None:
    model, x = Own().eval(), torch.rand(3, 4)
    model.numbers = array("d", [float("nan")])  # type: ignore[assignment]
    fast = FastAttackModel(model, dtype=torch.float32)
    fast(x)
    before = fast._networks.updates
    fast(x)
    assert fast._networks.updates == before
    model.numbers[0] = 1.0  # type: ignore[operator]
    fast(x)
    assert fast._networks.updates == before + 1
