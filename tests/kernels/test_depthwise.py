"""Depthwise convolutions with strides and dilation: against float64, in every geometry."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel
from fastadv_adapters.kernels import by_function, depthwise, shapes
from tests.kernels.test_shapes import step
from tests.support.tools import settle

CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@pytest.fixture(autouse=True)
def _as_onednn_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed does not depend on the processor; on some oneDNN has no bfloat16."""
    monkeypatch.setattr(depthwise, "is_onednn", lambda *args: True)


def gradient(layer: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(layer(leaf), leaf, grad)[0]


def taken(layer: Any, x: Tensor) -> bool:
    """Whether a layer of ours is run in this way."""
    shapes.keep_shape_only(layer, type(layer))
    return isinstance(layer.prepacked.find(layer, x, layer.weight), depthwise.Spread)


@settings(max_examples=100)
@given(
    dimensions=st.integers(1, 3),
    kernel=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    stride=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    dilation=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    padding=st.lists(st.integers(0, 4), min_size=3, max_size=3),
    more=st.lists(st.integers(0, 6), min_size=3, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_gradients_in_every_geometry(
    dimensions: int,
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    padding: list[int],
    more: list[int],
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)  # else an example depends on those before it
    spans = [by * (entries - 1) for entries, by in zip(kernel, dilation, strict=True)]
    padding = [min(pad, span) for pad, span in zip(padding, spans, strict=True)]
    size = [max(span + 1 - 2 * pad, 1) + extra for span, pad, extra in zip(spans, padding, more, strict=True)][
        :dimensions
    ]
    geometry = [tuple(values[:dimensions]) for values in (kernel, stride, padding, dilation)]
    layer = CONVOLUTIONS[dimensions](3, 3, *geometry, groups=3).to(dtype).requires_grad_(False)
    x = torch.randn(2, 3, *size, dtype=dtype)
    grad = torch.randn_like(layer(x))
    usual = gradient(layer, x, grad)
    convolve: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dimensions]
    leaf = x.double().requires_grad_()
    output = convolve(leaf, layer.weight.double(), None, *geometry[1:], 3)
    (exact,) = torch.autograd.grad(output, leaf, grad.double())
    slow = max(*geometry[1], *geometry[3]) > 1
    assert taken(layer, x) == (slow and (dtype == torch.bfloat16 or max(geometry[3]) > 1 or dimensions == 3))
    found = gradient(layer, x, grad)
    assert found.shape == x.shape
    assert found.dtype == dtype
    error, least = (found - exact).norm(), 1e-3 * torch.finfo(dtype).eps * exact.norm()
    assert error <= 1.5 * (usual - exact).norm() + torch.finfo(dtype).eps * exact.norm() + least


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_network_follows_its_weights(dtype: torch.dtype) -> None:
    conv = nn.Conv2d(8, 8, 3, stride=2, padding=2, dilation=2, groups=8, bias=False)
    net, x = settle(nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(8), nn.Flatten())).eval(), torch.randn(3, 8, 9, 6)
    fast = FastAttackModel(net, dtype=dtype, engine="eager")
    close: Any = {"rtol": 5e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    turned: list[Tensor | None] = []
    for _ in range(3):
        for _ in range(2):
            torch.testing.assert_close(step(fast, x), step(net, x), **close)
        (kept,) = fast._networks.folded.network[1].prepacked._kept[2].values()  # type: ignore[index]
        turned.append(kept.turned)
        with torch.no_grad():
            conv.weight.mul_(-1.5)
        fast.update()
    assert len(set(map(id, turned))) == 3
    assert not fast._networks.notes


def test_second_derivatives_go_through() -> None:
    layer: Any = nn.Conv2d(3, 3, 3, stride=2, dilation=2, groups=3).requires_grad_(False)
    usual = nn.Conv2d(3, 3, 3, stride=2, dilation=2, groups=3).requires_grad_(False)
    usual.load_state_dict(layer.state_dict())
    assert taken(layer, torch.randn(2, 3, 8, 7))
    found = []
    for part in (layer, usual):
        x = torch.linspace(-1, 1, 2 * 3 * 8 * 7).view(2, 3, 8, 7).requires_grad_()
        (first,) = torch.autograd.grad(part(x).pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.pow(2).sum(), x)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [
        (nn.Conv2d(4, 4, 3, groups=4), torch.bfloat16),  # PyTorch's own is fast
        (nn.Conv2d(4, 8, 3, stride=2, groups=4), torch.bfloat16),
        (nn.Conv2d(4, 4, 3, stride=2, groups=2), torch.bfloat16),
        (nn.Conv2d(1, 1, 3, stride=2), torch.bfloat16),
        (nn.Conv2d(4, 4, 3, stride=2, padding=3, groups=4), torch.bfloat16),  # a convolution cannot take away
        (nn.Conv2d(4, 4, 3, stride=2, groups=4), torch.float16),  # a processor's is slow both ways
        (nn.Conv2d(4, 4, 3, stride=2, groups=4), torch.float64),
        (nn.Conv2d(4, 4, 3, stride=2, groups=4), torch.float32),
    ],
    ids=str,
)
def test_other_layers_are_left_alone(layer: nn.Conv2d, dtype: torch.dtype) -> None:
    layer.to(dtype).requires_grad_(False)
    assert not taken(layer, torch.randn(2, layer.in_channels, 8, 8, dtype=dtype))


class Blurs(nn.Module):
    """As filters before a stride do: no layer, but a function."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", torch.outer(torch.tensor([1.0, 2, 1]), torch.tensor([0.5, 1, 0.5])))

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        return F.conv2d(x, self.filter.expand(channels, 1, 3, 3), stride=2, groups=channels)  # type: ignore[operator]


class PadsItself(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, [0], self.dilation, self.groups)


class Row(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.conv1d(x.flatten(2), self.weight, padding=2, dilation=2, groups=8)


BY_FUNCTION: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "filter": (Blurs, 1),
    "padded by itself": (lambda: PadsItself(8, 8, 3, stride=2, groups=8), 1),
    "in one dimension": (Row, 1),
    "layer that reflects": (lambda: nn.Conv2d(8, 8, 3, 2, 1, groups=8, padding_mode="reflect"), 1),
    "layer with padding by name": (lambda: nn.Conv2d(8, 8, (1, 3), 1, "same", dilation=2, groups=8), 1),
    "layer without padding by name": (lambda: nn.Conv2d(8, 8, 3, 2, "valid", groups=8), 1),
    "layer with an even kernel": (lambda: nn.Conv2d(8, 8, (1, 2), 1, "same", dilation=2, groups=8), 0),
    "of stride 1": (lambda: PadsItself(8, 8, 3, groups=8), 0),
    "in two groups": (lambda: PadsItself(8, 8, 3, stride=2, groups=2), 0),
}


@pytest.mark.parametrize("name", BY_FUNCTION)
def test_functions_have_that_gradient_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, times = BY_FUNCTION[name]
    used: list[Any] = []
    monkeypatch.setattr(depthwise.Spread, "gradient", count(depthwise.Spread.gradient, used))
    x = torch.randn(3, 3, 9, 6)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), make(), nn.Flatten(), nn.LazyLinear(5))
    net(x)
    fast = FastAttackModel(settle(net).eval(), dtype=torch.bfloat16, engine="eager")
    step(fast, x)
    for _ in range(2):
        used.clear()
        torch.testing.assert_close(step(fast, x), step(net, x), rtol=5e-2, atol=5e-2)
        assert len(used) == times
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(-1.5)
    assert not fast._networks.notes


def count(function: Callable[..., Tensor], used: list[Any]) -> Callable[..., Tensor]:
    def counted(*args: Any) -> Tensor:
        used.append(args)
        return function(*args)

    return counted


def test_calls_of_other_kinds_are_pytorchs_own() -> None:
    x = torch.randn(2, 4, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4, 1, 3, 3, dtype=torch.bfloat16)
    convolve = by_function.DEPTHWISE[F.conv2d]
    assert "Convolve" in str(convolve(x, weight, None, (2,), [0, 1], 1, 4).grad_fn)
    for kind in ({"stride": 1}, {"padding": 3}, {"padding": "valid", "dilation": 1, "stride": 1}, {"groups": 1}):
        given: Any = {"stride": 2, "groups": 4, **kind}
        w = weight if given["groups"] == 4 else torch.randn(4, 4, 3, 3, dtype=torch.bfloat16)
        torch.testing.assert_close(convolve(x, w, **given), F.conv2d(x, w, **given))
        assert "Convolve" not in str(convolve(x, w, **given).grad_fn)
    assert "Convolve" not in str(convolve(x, weight.clone().requires_grad_(), stride=2, groups=4).grad_fn)
    wrong: Any
    for wrong in ({"weight": weight.float()}, {"groups": 3}, {"groups": None}, {"stride": (2, 2, 2)}, {"weight": None}):
        with pytest.raises((RuntimeError, TypeError)) as usual:
            F.conv2d(**{"input": x, "weight": weight, "stride": 2, "groups": 4, **wrong})
        with pytest.raises(usual.type):
            convolve(**{"input": x, "weight": weight, "stride": 2, "groups": 4, **wrong})


def test_second_derivatives_go_through_functions() -> None:
    x = torch.linspace(-1, 1, 2 * 3 * 8 * 7).view(2, 3, 8, 7).requires_grad_()
    weight, found = torch.randn(3, 1, 3, 3), []
    for convolve in (by_function.DEPTHWISE[F.conv2d], F.conv2d):
        (first,) = torch.autograd.grad(convolve(x, weight, None, 2, 0, 2, 3).pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.pow(2).sum(), x)[0])
    torch.testing.assert_close(*found)
