"""Audits of models whose output is a map: pixels may lose their gradient while the sample keeps one."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel, FastAttackWarning
from fastadv_adapters.boundary import DeviceState
from fastadv_adapters.networks import audit, audited
from fastadv_adapters.networks.schedule import PASSES
from tests.support.tools import cosine

SAMPLES, SIZE = 8, 6


class PerPixel(nn.Module):
    """Classifies each pixel, sure of a share of them."""

    factors: Tensor

    def __init__(self, share: float, factor: float = 60.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(1, 8, 1), nn.SiLU(), nn.Conv2d(8, 3, 1))
        sure = torch.arange(SIZE * SIZE) < share * SIZE * SIZE
        self.register_buffer("factors", torch.where(sure, factor, 1.0).view(SIZE, SIZE))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return F.normalize(logits - logits.mean(1, keepdim=True)) * self.factors


def pixel_gradient(model: nn.Module, truth: nn.Module) -> Tensor:
    x = torch.rand(SAMPLES, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    labels = truth(x).argmax(1)
    leaf = x.requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(leaf), labels), leaf)[0]


def entry_cosines(found: Tensor, exact: Tensor) -> Tensor:
    return cosine(found.sign().double(), exact.sign().double())


def test_pixels_that_lose_their_gradient_in_float16_are_seen() -> None:
    net = PerPixel(share=0.5).eval()
    exact = pixel_gradient(net, net)
    assert (exact != 0).all()
    fast = FastAttackModel(net, dtype=torch.float16)
    with pytest.warns(FastAttackWarning, match=r"\(limit 5%\) of the entries of gradients are zero, and not in full"):
        first = pixel_gradient(fast, net)
    for found in (first, pixel_gradient(fast, net)):
        assert (found != 0).all()
        assert (entry_cosines(found, exact) > 0.99).all()


@pytest.mark.parametrize(("share", "factor"), [(0.0, 60.0), (0.5, 8.0), (0.04, 60.0)])
def test_maps_of_which_nearly_all_pixels_keep_their_gradient_stay_in_float16(share: float, factor: float) -> None:
    net = PerPixel(share, factor).eval()
    fast = FastAttackModel(net, dtype=torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastAttackWarning)
        pixel_gradient(fast, net)
    assert fast.dtype == torch.float16


@pytest.mark.usefixtures("as_on_a_device")
def test_a_glance_that_waits_for_nothing_sees_lost_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audited, "_is_never_to_wait", lambda device: True)
    monkeypatch.setattr(audit, "state_on", DeviceState)
    net = PerPixel(share=0.5, factor=1.0).eval()
    fast = FastAttackModel(net, dtype=torch.float16)
    pixel_gradient(fast, net)
    (kind,) = fast._networks.kinds.values()
    net.factors[:3] = 60.0
    kind.schedule.passes = PASSES
    pixel_gradient(fast, net)
    glimpse: Any = kind.glimpse
    assert glimpse is not None
    assert glimpse.is_doubtful()
