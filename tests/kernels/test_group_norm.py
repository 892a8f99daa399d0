"""Group norm by way of float32: nearer to float64 than PyTorch's own in 16 bits, and in its dtype."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel
from fastadv_adapters.kernels.group_norm import _InFloat32, widen_group_norm


@pytest.mark.parametrize("affine", [True, False])
def test_nearer_to_float64_than_pytorchs(affine: bool) -> None:
    x, grad = 3 + torch.randn(3, 12, 7, 5).bfloat16(), torch.randn(3, 12, 7, 5).bfloat16()
    layer: Any = nn.GroupNorm(4, 12, affine=affine).requires_grad_(False)
    if affine:
        layer.weight.normal_()
        layer.bias.normal_()

    def step(part: Any, dtype: torch.dtype) -> list[Tensor]:
        leaf = x.to(dtype).requires_grad_()
        output = part(leaf)
        return [output.detach(), *torch.autograd.grad(output, leaf, grad.to(dtype))]

    usual = step(layer, torch.bfloat16)
    exact = step(layer.double(), torch.float64)
    widen_group_norm(layer.float(), torch.device("cpu"))
    for ours, near, wanted in zip(step(layer, torch.bfloat16), usual, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - wanted).norm() <= 1.01 * (near - wanted).norm()


def test_a_network_takes_it() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten()).eval()
    fast = FastAttackModel(net, dtype=torch.bfloat16, engine="eager")
    assert isinstance(fast._networks.folded.network[1], _InFloat32)  # type: ignore[index]
    x = torch.randn(2, 3, 8, 8)
    leaf, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    (found,), (wanted,) = (torch.autograd.grad(f(z).sin().sum(), z) for f, z in ((fast, leaf), (net, plain)))
    assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), 0) > 0.999


def test_other_devices_dtypes_and_classes_are_left_alone() -> None:
    class Own(nn.GroupNorm):
        pass

    meta, own, layer = nn.GroupNorm(2, 4), Own(2, 4), nn.GroupNorm(2, 4)
    widen_group_norm(meta, torch.device("meta"))
    for part in (own, layer):
        widen_group_norm(part, torch.device("cpu"))
    assert type(meta) is nn.GroupNorm
    assert type(own) is Own
    x = torch.randn(2, 4, 3)
    assert torch.equal(layer(x), meta(x))
