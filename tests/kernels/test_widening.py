"""Operators that autocast runs in float32 on CUDA run in it on a processor too, inside the modules that name them."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel
from fastadv_adapters.modules import HALF
from tests.support.tools import cosine, input_gradient

halves = pytest.mark.parametrize("dtype", HALF, ids=str)


class Memory(nn.Module):
    """Looks features up in a memory, by a softmax that is nearly sure."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features, self.keys, self.values, self.last = (
            nn.Linear(a, b) for a, b in ((64, 64), (64, 32), (32, 64), (64, 10))
        )

    def forward(self, x: Tensor) -> Tensor:
        found = F.softmax(40 * F.normalize(self.keys(self.features(x.flatten(1)).relu()), dim=1), dim=1)
        logits: Tensor = self.last(self.values(found).relu())
        return logits


@halves
def test_a_softmax_between_layers_keeps_its_gradient(dtype: torch.dtype) -> None:
    model, x, y = Memory().eval(), torch.rand(40, 1, 8, 8), torch.arange(40) % 10
    fast = FastAttackModel(model, dtype=dtype, engine="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = input_gradient(fast, x, y)
    assert fast._networks.dtype == dtype
    near = cosine(found, input_gradient(model, x, y))
    assert (near > 0.99).float().mean() > 0.9


class Calls(nn.Module):
    """A layer, and then an operator in whatever way it is written."""

    def __init__(self, operator: Any) -> None:
        super().__init__()
        self.layer, self.last, self.operator = nn.Linear(4, 4), nn.Linear(4, 3), operator
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.operator(self.layer(x))
        self.seen.append(h.dtype)
        logits: Tensor = self.last(h)
        return logits


class Softmax(Calls):
    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x).softmax(1)
        self.seen.append(h.dtype)
        logits: Tensor = self.last(h)
        return logits


def checked(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As libraries decorate a forward to look at shapes, or to warn of an old name."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Tensor:
        return function(*args, **kwargs)

    return run


class Decorated(Calls):
    @checked
    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x).softmax(1)
        self.seen.append(h.dtype)
        logits: Tensor = self.last(h)
        return logits


class UnderAutocast(Calls):
    @torch.autocast("cpu", cache_enabled=False)  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        h = torch.softmax(self.layer(x), 1)
        self.seen.append(h.dtype)
        logits: Tensor = self.last(h)
        return logits


class Static(Calls):
    def forward(self, x: Tensor) -> Tensor:
        self.operator = self.weigh
        return super().forward(x)

    @staticmethod
    @checked
    def weigh(h: Tensor) -> Tensor:
        return h.softmax(1)


class OfClass(Static):
    @classmethod
    def weigh(cls, h: Tensor) -> Tensor:
        return h.softmax(1)


class Property(Static):
    @property
    def weigh(self) -> Any:
        return lambda h: h.softmax(1)


class Cached(Static):
    @functools.cached_property
    def weigh(self) -> Any:
        return lambda h: h.softmax(1)


@halves
@pytest.mark.parametrize("kind", [Decorated, UnderAutocast, Static, OfClass, Property, Cached])
def test_operators_are_found_in_whatever_kind_of_method(kind: Any, dtype: torch.dtype) -> None:
    fast = FastAttackModel(kind(None).eval(), dtype=dtype, engine="eager")
    input_gradient(fast, torch.rand(3, 4), torch.tensor([0, 1, 2]))
    network: Any = fast._networks.folded.network
    assert network.seen[-1] == torch.float32


class Own(Calls):
    """Its own attribute has the name of an operator."""

    def __init__(self) -> None:
        super().__init__(None)
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.norm(self.layer(x))
        self.seen.append(h.dtype)
        logits: Tensor = self.last(h)
        return logits


@halves
@pytest.mark.parametrize("wide", [nn.Softmax(1), nn.Softplus(), None], ids=["module", "softplus", "method"])
def test_what_is_widened_stays_so_until_the_next_product(wide: nn.Module | None, dtype: torch.dtype) -> None:
    model = Calls(wide) if wide else Softmax(None)
    fast = FastAttackModel(model.eval(), dtype=dtype, engine="eager")
    input_gradient(fast, torch.rand(3, 4), torch.tensor([0, 1, 2]))
    network: Any = fast._networks.folded.network
    assert network.seen[-1] == torch.float32
    assert network.layer.weight.dtype == dtype


class Lengths(nn.Module):
    """Divides features by their length, whose square float16 does not hold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = 300 * self.first(x)
        logits: Tensor = self.last(h / h.pow(2).sum(1, keepdim=True).sqrt())
        return logits


def test_passes_without_gradient_are_widened_too() -> None:
    fast, x = (
        FastAttackModel(Lengths().eval(), dtype=torch.float16, engine="eager", decisions="fast"),
        torch.rand(9, 64),
    )
    with_gradient = fast(x.clone().requires_grad_()).detach()
    with torch.no_grad():
        assert torch.equal(fast(x), with_gradient)


class Written(Calls):
    """Has an operator write into a tensor that it gives."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        with torch.no_grad():
            torch.exp(h, out=(written := torch.zeros_like(h)))
        self.seen.append(written.dtype)
        logits: Tensor = self.last(h + written)
        return logits


@halves
def test_what_is_written_into_a_given_tensor_stays_there(dtype: torch.dtype) -> None:
    model, x = Written(None).eval(), torch.rand(3, 4)
    fast = FastAttackModel(model, dtype=dtype, engine="eager")
    assert torch.allclose(fast(x.clone().requires_grad_()), model(x), atol=0.05)
    assert fast._networks.dtype == dtype


@halves
def test_all_else_stays_in_half_precision(dtype: torch.dtype) -> None:
    fast = FastAttackModel(Own().eval(), dtype=dtype, engine="eager")
    input_gradient(fast, torch.rand(3, 4), torch.tensor([0, 1, 2]))
    network: Any = fast._networks.folded.network
    assert network.seen[-1] == dtype
    assert type(network).__name__ != "RoutedOwn"
