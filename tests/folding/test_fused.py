"""Convolution, bias, addition and ReLU in one operator: cuDNN's, in whose place one of the same meaning stands here."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel, FastAttackWarning
from fastadv_adapters.folding.fused import _Rectify
from fastadv_adapters.kernels import switched
from tests.support.tools import batch, cosine, reference, settle, small_net

Calls = Counter[str]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """Everything is switched on for a processor; counts the calls of both operators."""
    counted = Calls()

    def relu(x: Tensor, w: Tensor, b: Tensor, *geometry: Any) -> Tensor:
        counted["relu"] += 1
        return F.conv2d(x, w, b, *geometry).relu()

    def add_relu(x: Tensor, w: Tensor, z: Tensor, alpha: float, b: Tensor, *geometry: Any) -> Tensor:
        counted["add_relu"] += 1
        assert z.dtype == w.dtype == b.dtype == x.dtype
        convolved = F.conv2d(x, w, b, *geometry)
        assert convolved.shape == z.shape  # nothing is broadcast
        return (convolved + alpha * z).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    with switched(fused=True, device="cpu"):
        yield counted


def conv_norm(**options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 3, 3, **{"padding": 1, **options}), nn.BatchNorm2d(3))


class Net(nn.Module):
    """A layer or two, put together by ``how``."""

    def __init__(self, how: Callable[["Net", Tensor], Tensor], **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.one, self.two = conv_norm(**options), conv_norm(**options)
        self.whole = nn.Sequential(conv_norm(), nn.ReLU())
        settle(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x).sin()


def step(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and input gradient."""
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    return output.detach(), torch.autograd.grad(output.sin().sum(), leaf)[0]


def same(fast: FastAttackModel, model: nn.Module, x: Tensor) -> None:
    for found, wanted in zip(step(fast, x), step(reference(model), x.double()), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)


def in_place(net: Net, x: Tensor) -> Tensor:
    out: Tensor = net.one(x)
    out += x
    return F.relu(out, inplace=True)


RELU, SUM, NONE = {"relu": 1}, {"add_relu": 1}, dict[str, int]()
PATTERNS: dict[str, tuple[Callable[[Net, Tensor], Tensor], dict[str, int], dict[str, Any]]] = {
    "sequence": (lambda net, x: net.whole(x), RELU, {}),
    "function": (lambda net, x: F.relu(net.one(x)), RELU, {}),
    "method": (lambda net, x: net.one(x).relu(), RELU, {}),
    "geometry": (lambda net, x: net.one(x).relu(), RELU, {"stride": 2, "dilation": 2, "groups": 3, "padding": 3}),
    "sum": (lambda net, x: F.relu(net.one(x) + x), SUM, {}),
    "sum, the other way round": (lambda net, x: torch.relu(torch.add(x, net.one(x))), SUM, {}),
    "sum in place": (in_place, SUM, {}),
    "sum in place, by methods": (lambda net, x: net.one(x).add_(x).relu_(), SUM, {}),
    "sum of two": (lambda net, x: F.relu(net.one(x) + net.two(x)), SUM, {}),
    "one after the other": (lambda net, x: F.relu(net.two(F.relu(net.one(x))) + x), {"relu": 1, "add_relu": 1}, {}),
    "sum, broadcast": (lambda net, x: F.relu(net.one(x) + x[:, :1]), NONE, {}),
    "sum with a number": (lambda net, x: F.relu(net.one(x) + 1), NONE, {}),
    "sum of three": (lambda net, x: F.relu(net.one(x) + x + x), NONE, {}),
    "another activation": (lambda net, x: F.silu(net.one(x)), NONE, {}),
    "another reader": (lambda net, x: (y := net.one(x)).relu() + y, NONE, {}),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_it_is_used_where_the_trace_shows_it_and_is_the_same(name: str, calls: Calls) -> None:
    how, expected, options = PATTERNS[name]
    model, (x, _) = Net(how, **options).eval(), batch()
    fast = FastAttackModel(model, dtype=torch.float32, engine="eager")
    step(fast, x)
    calls.clear()
    same(fast, model, x)
    assert calls == expected
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    same(fast, model, x)


def test_in_half_precision_behind_a_first_layer_on_more_channels(calls: Calls) -> None:
    model, (x, _) = small_net().eval(), batch()
    with switched(first_channels=4):
        fast = FastAttackModel(model, dtype=torch.bfloat16, engine="eager")
        step(fast, x)
        calls.clear()
        found = step(fast, x)
    assert calls == {"relu": 3, "add_relu": 2}
    assert cosine(found[1], step(model, x)[1]).min() > 0.98


def test_its_gradients_are_differentiable(calls: Calls) -> None:
    layer = nn.Conv2d(2, 2, 3, padding=1).double().requires_grad_(False)
    x, z = (torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def run(x: Tensor, z: Tensor) -> Any:
        return _Rectify.apply(x, layer.weight, layer.bias, z, layer)  # type: ignore[no-untyped-call]

    assert gradcheck(run, (x, z))
    assert gradgradcheck(run, (x, z))
    assert set(calls) == {"add_relu"}


def test_where_cudnn_refuses_pytorch_convolves(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        calls["refused"] += 1
        raise RuntimeError("no engine for this")

    monkeypatch.setattr(torch, "cudnn_convolution_relu", refuse)
    model, (x, _) = Net(lambda net, x: F.relu(net.one(x))).eval(), batch()
    fast = FastAttackModel(model, dtype=torch.float32, engine="eager")
    for _ in range(3):
        same(fast, model, x)
    calls.clear()
    same(fast, model, x)
    assert not calls  # asked no more


class _Negated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return -1 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -1 * grad


def read_again(y: Tensor, x: Tensor) -> Tensor:
    return F.relu(y) + y


def in_place_by_name(y: Tensor, x: Tensor) -> Tensor:
    y.add_(x)
    y.relu_()
    return y * 1


def written_between(y: Tensor, x: Tensor) -> Tensor:
    z = x * 1
    out = y + z
    z.mul_(2)
    return F.relu(out)


def in_a_function(y: Tensor, x: Tensor) -> Tensor:
    return _Negated.apply(y)  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize("otherwise", [read_again, in_place_by_name, written_between, in_a_function])
def test_a_later_call_that_does_something_else_is_right_too(otherwise: Any, calls: Calls) -> None:
    branch: list[str] = []  # of which nothing but the code knows

    def how(net: Net, x: Tensor) -> Tensor:
        y = net.one(x)
        return otherwise(y, x) if branch else F.relu(y)

    model, (x, _) = Net(how).eval(), batch()
    fast = FastAttackModel(model, dtype=torch.float32, engine="eager")
    step(fast, x)
    calls.clear()
    same(fast, model, x)
    assert calls == RELU
    branch.append("the other one")
    if otherwise in (read_again, in_place_by_name):
        same(fast, model, x)
        return
    with pytest.warns(FastAttackWarning, match="not folded into one.0"):
        step(fast, x)
    same(fast, model, x)
