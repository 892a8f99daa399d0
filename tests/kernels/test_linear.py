"""Linear layers with weights laid out ahead: the same numbers as PyTorch's own, and laid out once per update."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel
from fastadv_adapters.kernels import calls, linear
from tests.kernels.test_shapes import step


@pytest.fixture(autouse=True)
def reorders(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Weights of any size are laid out; collects what was."""
    found, reorder = list[Tensor](), linear._reorder

    def noted(weight: Tensor, shape: torch.Size) -> Tensor:
        found.append(weight)
        return reorder(weight, shape)

    monkeypatch.setattr(linear, "_reorder", noted)
    monkeypatch.setattr(linear, "LEAST", 0)
    monkeypatch.setattr(calls, "HAS_AVX512", True)
    monkeypatch.setattr(calls, "HAS_AMX", False)
    monkeypatch.setattr(linear, "PRODUCTS", 0)
    return found


def ours(layer: Any) -> Any:
    linear.lay_linear_out(layer.requires_grad_(False))
    return layer


@settings(max_examples=60)
@given(
    leading=st.lists(st.integers(1, 5), max_size=3),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(["dense", "expanded", "strided"]),
)
def test_as_near_to_float64_as_pytorchs(
    leading: list[int], inputs: int, outputs: int, bias: bool, dtype: torch.dtype, layout: str
) -> None:
    torch.manual_seed(0)  # else an example depends on those before it
    layer = nn.Linear(inputs, outputs, bias=bias).to(dtype)
    x = torch.randn(*leading, 2 * inputs if layout == "strided" else inputs, dtype=dtype)
    x = x[..., ::2] if layout == "strided" else x[:1].expand_as(x) if layout == "expanded" and leading else x
    grad = torch.randn(*leading, outputs, dtype=dtype)
    own, found = list[list[Tensor]](), list[Tensor]()
    for part, kind in ((layer, dtype), (layer, torch.float64)):
        double: Any = nn.Linear(inputs, outputs, bias=bias).to(kind)
        double.load_state_dict(part.state_dict())
        leaf = x.to(kind).requires_grad_()
        output = double(leaf)
        own.append([output, *torch.autograd.grad(output, leaf, grad.to(kind))])
    leaf = x.detach().requires_grad_()
    output = ours(layer)(leaf)
    if dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert type(output.grad_fn).__name__ == "_MultiplyBackward"
    found = [output, *torch.autograd.grad(output, leaf, grad)]
    for near, exact, this in zip(*own, found, strict=True):
        assert this.shape == exact.shape
        assert this.dtype == dtype
        bound = 1.5 * (near - exact).norm() + torch.finfo(dtype).eps * exact.norm() + 4e-7
        assert (this - exact).norm() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_laid_out_once_per_update(dtype: torch.dtype, reorders: list[Tensor]) -> None:
    first = nn.Linear(12, 20)
    net = nn.Sequential(first, nn.GELU(), nn.Linear(20, 8), nn.GELU(), nn.Linear(8, 5)).eval()
    x = torch.randn(3, 12)
    fast = FastAttackModel(net, dtype=dtype, engine="eager")
    close: Any = {"rtol": 5e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {}
    for _ in range(3):
        torch.testing.assert_close(step(fast, x), step(net, x), **close)
        assert reorders
        reorders.clear()
        for _ in range(2):
            torch.testing.assert_close(step(fast, x), step(net, x), **close)
        assert not reorders
        with torch.no_grad():
            first.weight.mul_(-1.5)
        fast.update()
    assert not fast._networks.notes


def test_second_derivatives_go_through() -> None:
    layer, usual = nn.Linear(6, 4), nn.Linear(6, 4)
    usual.load_state_dict(layer.state_dict())
    found = []
    for part in (ours(layer), usual):
        x = torch.linspace(-1, 1, 18).view(3, 6).requires_grad_()
        (first,) = torch.autograd.grad(part(x).pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.pow(2).sum(), x)[0])
    torch.testing.assert_close(*found)


def test_what_does_not_fit_is_pytorchs(reorders: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = ours(nn.Linear(6, 4)), torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)  # its weight is cast at each call
    torch.func.grad(lambda x: layer(x).sum())(x)
    layer(x[:0])
    ours(nn.Linear(6, 4).double())(x.double())
    layer.requires_grad_(True)(x)
    layer.requires_grad_(False)
    with pytest.raises(RuntimeError):
        layer(x[:, :5])
    monkeypatch.setattr(linear, "PRODUCTS", 3 * 24 + 1)
    layer(x)
    monkeypatch.setattr(linear, "LEAST", 25)
    ours(nn.Linear(6, 4).bfloat16())(x.bfloat16())

    class Own(nn.Linear):
        pass

    assert type(ours(Own(6, 4))) is Own
    assert not reorders


def test_where_the_operators_are_missing_pytorchs_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any) -> Tensor:
        raise AttributeError

    layer, x = ours(nn.Linear(6, 4)), torch.randn(3, 6)
    wanted = nn.functional.linear(x, layer.weight, layer.bias)
    monkeypatch.setattr(linear, "_reorder", missing)
    assert torch.equal(layer(x), wanted)
    assert layer.laid_out._refused


def test_without_gradient() -> None:
    layer, x = ours(nn.Linear(6, 4)), torch.randn(3, 6)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize(("name", "has"), [("HAS_AVX512", False), ("HAS_AMX", True)])
def test_without_avx512_and_with_amx_products_in_float32_are_pytorchs(
    name: str, has: bool, reorders: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, name, has)
    ours(nn.Linear(12, 20))(torch.randn(3, 12))
    assert not reorders
