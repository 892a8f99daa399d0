"""What code keeps in classes, globals and closures serves all models of a class: a trace leaves nothing there."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel

_TABLE: Tensor | None = None
_TABLES: dict[Any, Any] = {}
_LOSSES: list[Tensor] = []


def _table(h: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, 8).to(h)


class Net(nn.Module):
    """Multiplies by a table that the first call makes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second((h := self.first(x)) * self.scale(h))  # type: ignore[no-any-return]

    def scale(self, h: Tensor) -> Tensor:
        raise NotImplementedError


class OfClass(Net):
    """An attribute of the class, and another that says that it is there."""

    table: ClassVar[Tensor | None] = None
    is_there: ClassVar[bool] = False

    def scale(self, h: Tensor) -> Tensor:
        if not OfClass.is_there:
            OfClass.table, OfClass.is_there = _table(h), True
        assert self.table is not None
        return self.table


class InDictionary(Net):
    """A dictionary of the class, with a pair in it."""

    tables: ClassVar[dict[str, tuple[Tensor, int]]] = {}

    def scale(self, h: Tensor) -> Tensor:
        if "own" not in self.tables:
            self.tables["own"] = _table(h), 8
        return self.tables["own"][0]


class InGlobal(Net):
    """A global."""

    def scale(self, h: Tensor) -> Tensor:
        global _TABLE
        if _TABLE is None:
            _TABLE = _table(h)
        return _TABLE


def _kept(h: Tensor, tables: dict[Any, Any] = _TABLES) -> Tensor:
    if 8 not in tables:
        tables[8] = _table(h)
    return tables[8]  # type: ignore[no-any-return]


class ByFunction(Net):
    """A dictionary that is the default of a function."""

    def scale(self, h: Tensor) -> Tensor:
        return _kept(h)


class Holder:
    """An object that keeps what it has made."""

    def __init__(self) -> None:
        self.table: Tensor | None = None

    def __call__(self, h: Tensor) -> Tensor:
        if self.table is None:
            self.table = _table(h)
        return self.table


_HOLDER = Holder()


class InObject(Net):
    """An object that is a global."""

    def scale(self, h: Tensor) -> Tensor:
        return _HOLDER(h)


def _enclosed() -> Callable[[Tensor], Tensor]:
    table: Tensor | None = None

    def scale(h: Tensor) -> Tensor:
        nonlocal table
        table = _table(h) if table is None else table
        return table

    return scale


class InClosure(Net):
    """A variable of a function around."""

    of_all = staticmethod(_enclosed())

    def scale(self, h: Tensor) -> Tensor:
        return self.of_all(h)


@pytest.mark.parametrize("kind", [OfClass, InDictionary, InGlobal, ByFunction, InObject, InClosure])
def test_a_table_made_at_the_first_call_serves_the_model_and_its_fast_model(kind: type[Net]) -> None:
    net, x = kind().eval(), torch.rand(4, 6, requires_grad=True)
    fast = FastAttackModel(net, dtype=torch.float32)
    with torch.no_grad():
        expected = net.second(net.first(x) * torch.linspace(0.5, 1.5, 8))
    torch.testing.assert_close(fast(x), expected)
    torch.testing.assert_close(net(x), expected)


class Auxiliary(Net):
    """Puts a loss into a list that is a global."""

    def scale(self, h: Tensor) -> Tensor:
        _LOSSES.append(h.square().mean())
        return torch.ones(8)


def test_a_list_keeps_what_was_in_it_and_gets_nothing_of_a_trace() -> None:
    _LOSSES[:] = [torch.zeros(())]
    FastAttackModel(Auxiliary().eval(), dtype=torch.float32)
    assert len(_LOSSES) == 1


class MadeUp:
    """Has whatever is asked for, as wrappers of libraries in C do."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        return MadeUp()


_MADE_UP = MadeUp()


class ReadsMadeUp(Net):
    def scale(self, h: Tensor) -> Tensor:
        return _table(h) if callable(type(_MADE_UP)) else h


def test_an_object_that_makes_its_attributes_up_is_passed_over() -> None:
    net, x = ReadsMadeUp().eval(), torch.rand(4, 6, requires_grad=True)
    torch.testing.assert_close(FastAttackModel(net, dtype=torch.float32)(x), net(x))
