"""Means with an expanded gradient: the same numbers as PyTorch's own, bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel
from fastadv_adapters.folding import build as folding
from fastadv_adapters.kernels import pooling, routing
from tests.kernels.test_shapes import step

WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "kept": lambda x: x.mean((2, 3), keepdim=True),
    "named": lambda x: x.mean(dim=[-1, -2], keepdim=True),
    "dropped": lambda x: x.mean((2, 3))[:, :, None, None],
    "function": lambda x: torch.mean(x, (-2, -1), True),
    "pooled": lambda x: F.adaptive_avg_pool2d(x, 1),
}


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x * gate


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool, self.squeeze = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.squeeze(self.pool(x)).sigmoid()
        return x * gate


@pytest.fixture
def uses(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    found = list[Tensor]()
    apply: Any = pooling._Mean.apply

    def noted(image: Tensor) -> Any:
        found.append(image)
        return apply(image)

    monkeypatch.setattr(pooling._Mean, "apply", noted)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("make", [Gate, Pooled])
def test_the_same_bit_for_bit(
    make: Callable[[], nn.Module], dtype: torch.dtype, uses: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), make(), nn.SiLU(), nn.Conv2d(8, 8, 3), make(), nn.Flatten()).eval()
    x = torch.randn(2, 3, 9, 8)
    options: Any = {"dtype": dtype, "engine": "eager", "channels_last": True}
    found = step(FastAttackModel(net, **options), x)
    assert uses
    uses.clear()
    monkeypatch.setattr(folding, "route", lambda *args: None)
    wanted = step(FastAttackModel(net, **options), x)
    assert not uses
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


@pytest.mark.parametrize("make", [Gate, Pooled])
def test_the_means_of_small_images_are_pytorchs(
    make: Callable[[], nn.Module], uses: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), make(), nn.Flatten()).eval(), torch.randn(2, 3, 9, 8)
    fast = FastAttackModel(net, dtype=torch.float32, engine="eager", channels_last=True)
    step(fast, x)
    uses.clear()
    entries = 2 * 8 * 7 * 6
    for least in (entries, entries + 1):
        monkeypatch.setattr(routing, "LEAST", least)
        step(fast, x)
        assert len(uses) == 1


@pytest.mark.parametrize("name", WAYS)
def test_every_way_to_write_it(name: str, uses: list[Tensor]) -> None:
    x = torch.randn(2, 8, 5, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    with routing._Mode(routing._MEANS):
        found = WAYS[name](x)
    assert len(uses) == 1
    wanted = WAYS[name](x)
    assert torch.equal(found, wanted)
    grad = torch.randn_like(wanted)
    (ours,), (theirs,) = torch.autograd.grad(found, x, grad), torch.autograd.grad(wanted, x, grad)
    assert torch.equal(ours, theirs)
    assert ours.stride()[2:] == (0, 0)


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "everything": lambda x: x.mean(),
    "one dimension": lambda x: x.mean(1),
    "channels": lambda x: x.mean((1, 2)),
    "another dtype": lambda x: x.mean((2, 3), dtype=torch.float64),
    "contiguous": lambda x: x.contiguous().mean((2, 3)),
    "no gradient": lambda x: x.detach().mean((2, 3)),
    "three dimensions": lambda x: x[0].mean((1, 2)),
    "more places": lambda x: F.adaptive_avg_pool2d(x, (2, 1)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_means_are_pytorchs(name: str, uses: list[Tensor]) -> None:
    x = torch.randn(2, 8, 5, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    with routing._Mode(routing._MEANS):
        found = OTHERS[name](x)
    assert torch.equal(found, OTHERS[name](x))
    assert not uses


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_an_expanded_gradient_goes_through_every_convolution(large: bool) -> None:
    width = 96 if large else 8
    x = torch.randn(4, width, 12, 12)
    for layer in (
        nn.Conv2d(width, width, 3, padding=1),
        nn.Conv2d(width, width, 3, stride=2, padding=1),
        nn.Conv2d(width, width, 1),
        nn.Conv2d(width, width, 3, stride=2, padding=1, groups=width),
        nn.Conv2d(width, width, 3, dilation=2, groups=width),
    ):
        net = nn.Sequential(nn.SiLU(), layer, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
        for found, wanted in zip(step(FastAttackModel(net, dtype=torch.float32), x), step(net, x), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
