"""First layers: the gradient at the image, against float64, in every geometry."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel
from fastadv_adapters.kernels import calls, few_channels, shapes
from fastadv_adapters.kernels.calls import is_onednn
from tests.kernels.test_shapes import step
from tests.support.tools import settle


@pytest.fixture(autouse=True)
def _as_onednn_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed does not depend on the processor; on some oneDNN has no bfloat16."""
    monkeypatch.setattr(few_channels, "is_onednn", lambda *args: True)
    monkeypatch.setattr(calls, "HAS_AVX512", True)
    monkeypatch.setattr(calls, "HAS_AMX", False)


def gradient(layer: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(layer(leaf), leaf, grad)[0]


def taken(layer: Any, x: Tensor) -> bool:
    """Whether a layer of ours is run in this way."""
    shapes.keep_shape_only(layer, type(layer))
    leaf = x.clone(memory_format=torch.channels_last).requires_grad_()
    return isinstance(layer.prepacked.find(layer, leaf, layer.weight), few_channels.Blocks)


@settings(max_examples=120)
@given(
    channels=st.integers(1, 4),
    kernel=st.lists(st.integers(1, 7), min_size=2, max_size=2),
    stride=st.integers(1, 5),
    padding=st.lists(st.integers(0, 6), min_size=2, max_size=2),
    more=st.lists(st.integers(0, 9), min_size=2, max_size=2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_gradients_in_every_geometry(
    channels: int, kernel: list[int], stride: int, padding: list[int], more: list[int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)  # else an example depends on those before it
    padding = [min(pad, entries - 1) for pad, entries in zip(padding, kernel, strict=True)]
    size = [max(k - 2 * pad, 1) + extra for k, pad, extra in zip(kernel, padding, more, strict=True)]
    layer: Any = nn.Conv2d(channels, 5, (kernel[0], kernel[1]), stride, (padding[0], padding[1]))
    layer.to(dtype).requires_grad_(False)
    layer.to(memory_format=torch.channels_last)
    x = torch.randn(2, channels, *size).to(dtype).contiguous(memory_format=torch.channels_last)
    grad, output = torch.randn_like(layer(x)), layer(x)
    usual = gradient(layer, x, grad)
    leaf = x.double().requires_grad_()
    wide = F.conv2d(leaf, layer.weight.double(), None, stride, tuple(padding))
    (exact,) = torch.autograd.grad(wide, leaf, grad.double())
    assert taken(layer, x) == (max(*kernel, stride) > 1)
    found = gradient(layer, x, grad)
    assert torch.equal(layer(x.clone().requires_grad_()), output)
    assert found.shape == x.shape
    assert found.dtype == dtype
    error, least = (found - exact).norm(), 1e-3 * torch.finfo(dtype).eps * exact.norm()
    assert error <= 1.5 * (usual - exact).norm() + torch.finfo(dtype).eps * exact.norm() + least


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_network_follows_its_weights(dtype: torch.dtype) -> None:
    conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
    net, x = settle(nn.Sequential(conv, nn.BatchNorm2d(8), nn.Flatten())).eval(), torch.randn(3, 3, 9, 6)
    fast = FastAttackModel(net, dtype=dtype, engine="eager")
    close: Any = {"rtol": 5e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    turned: list[Tensor | None] = []
    for _ in range(3):
        for _ in range(2):
            torch.testing.assert_close(step(fast, x), step(net, x), **close)
        (kept,) = fast._networks.folded.network[0].prepacked._kept[2].values()  # type: ignore[index]
        assert isinstance(kept, few_channels.Blocks)
        turned.append(kept.backward)
        with torch.no_grad():
            conv.weight.mul_(-1.5)
        fast.update()
    assert len(set(map(id, turned))) == 3
    assert not fast._networks.notes


def test_second_derivatives_go_through() -> None:
    layer: Any = nn.Conv2d(3, 4, 3, stride=2).requires_grad_(False)
    usual = nn.Conv2d(3, 4, 3, stride=2).requires_grad_(False)
    usual.load_state_dict(layer.state_dict())
    assert taken(layer, torch.randn(2, 3, 8, 7))
    found = []
    for part in (layer, usual):
        x = torch.linspace(-1, 1, 2 * 3 * 8 * 7).view(2, 3, 8, 7).contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        (first,) = torch.autograd.grad(part(x).pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.pow(2).sum(), x)[0])
    torch.testing.assert_close(*found)


def test_no_gradient_is_wanted_without_one() -> None:
    layer: Any = nn.Conv2d(3, 4, 3).requires_grad_(False)
    shapes.keep_shape_only(layer, nn.Conv2d)
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    assert layer.prepacked.find(layer, x, layer.weight) is None


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [
        (nn.Conv2d(5, 8, 3), torch.bfloat16),  # no block of four places has room
        (nn.Conv2d(3, 8, 1), torch.bfloat16),  # a product, and as many multiplications in either way
        (nn.Conv2d(3, 8, 3, dilation=2), torch.bfloat16),
        (nn.Conv2d(3, 8, 3, stride=(1, 2)), torch.bfloat16),
        (nn.Conv2d(3, 8, 3, padding=3), torch.bfloat16),  # outputs that no place is read by
        (nn.Conv2d(3, 6, 3, groups=3), torch.float32),
        (nn.Conv2d(3, 8, 3, padding_mode="circular", padding=1), torch.float32),
        (nn.Conv2d(3, 8, 3), torch.float16),  # a processor's is slow both ways
        (nn.Conv2d(3, 8, 3), torch.float64),
    ],
    ids=str,
)
def test_other_layers_are_left_alone(layer: nn.Conv2d, dtype: torch.dtype) -> None:
    layer.to(dtype).requires_grad_(False)
    shapes.keep_shape_only(layer, nn.Conv2d)
    x = torch.randn(2, layer.in_channels, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)
    prepacked = getattr(layer, "prepacked", None)
    found = None if prepacked is None else prepacked.find(layer, x.requires_grad_(), layer.weight)
    assert not isinstance(found, few_channels.Blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_onednn_does_not_run_is_left_alone(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    layer, x = nn.Conv2d(3, 8, 5).to(dtype).requires_grad_(False), torch.rand(2, 3, 8, 8, dtype=dtype)
    assert taken(layer, x) == is_onednn(layer, x, layer.weight)
    monkeypatch.setattr(few_channels, "is_onednn", lambda *args: False)
    assert not taken(layer, x)


@pytest.mark.parametrize(
    ("channels", "kernel", "pays"), [(3, 3, False), (3, 5, True), (1, 3, True)], ids=["3x3 of 3", "5x5", "3x3 of 1"]
)
def test_without_avx512_small_kernels_are_left_alone(
    channels: int, kernel: int, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "HAS_AVX512", False)
    assert taken(nn.Conv2d(channels, 8, kernel).requires_grad_(False), torch.rand(2, channels, 8, 8)) == pays


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (2, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_amx_small_kernels_are_left_alone_in_bfloat16(
    kernel: int, stride: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "HAS_AMX", True)
    layer = nn.Conv2d(1, 8, kernel, stride).to(dtype).requires_grad_(False)
    small = kernel < 4 and stride < 4
    assert taken(layer, torch.rand(2, 1, 8, 8, dtype=dtype)) == (dtype == torch.float32 or not small)
