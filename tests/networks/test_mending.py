"""Samples that one pass loses to infinity or NaN come back in full precision, on a processor."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel, watch_gradients
from fastadv_adapters.networks import audited, mending
from tests.support.tools import batch, cosine, input_gradient


class Standardised(nn.Module):
    """Features divided by their spread: images without contrast have gradients so large that float16 overflows."""

    def __init__(self, *, together: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = (
            nn.Conv2d(3, 8, 3, 1, 1, bias=False),
            nn.Conv2d(8, 8, 3, bias=False),
            nn.Linear(288, 10),
        )
        self.together = together

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.first(x).relu()).flatten(1)
        h = h / (h.std(1, keepdim=True) + 1e-6)
        h = h - h.mean(0) if self.together else h
        logits: Tensor = self.last(h)
        return logits


def faint_from(sample: int) -> tuple[Tensor, Tensor]:
    """Images without contrast from this one on."""
    x, y = batch(16)
    return x * (1e-4 + (torch.arange(16) < sample)).view(-1, 1, 1, 1), y


@pytest.mark.filterwarnings("ignore:.*one loss scale serves the whole call")
@pytest.mark.parametrize("together", [False, True])
def test_a_pass_that_overflows_is_mended_at_once(together: bool) -> None:
    model, (x, y) = Standardised(together=together).eval(), faint_from(12)
    fast = FastAttackModel(model, dtype=torch.float16, engine="eager")
    with watch_gradients() as watch:
        found = input_gradient(fast, x, y)
    assert fast.gradient_stats.nonfinite > 0, "else this tests nothing"
    assert watch.broken is not None
    assert not watch.broken.any()
    assert fast._networks.dtype == torch.float16
    wanted = input_gradient(model, x, y)
    assert (cosine(found, wanted) > 0.98).all()
    lengths = found.flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    assert ((lengths - 1).abs() < 0.05).all()


class Hopeless(nn.Module):
    """A gradient that is NaN for some samples in every precision."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))

    def forward(self, x: Tensor) -> Tensor:
        nothing = (x - x).flatten(1).square().sum(1, keepdim=True).sqrt()
        logits: Tensor = self.net(x) + torch.where(x[:, 0, 0, :1] > 0.5, nothing, 0.0)
        return logits


def test_what_full_precision_loses_too_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[object] = []

    def counted(*given: Any) -> Any:
        tried.append(given)
        return mending.mend(*given)

    monkeypatch.setattr(audited, "mend", counted)
    model, (x, y) = Hopeless().eval(), batch(16)
    fast = FastAttackModel(model, dtype=torch.bfloat16, engine="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(20):
            found = input_gradient(fast, x, y)
    assert found.isfinite().all()
    assert fast.gradient_stats.nonfinite > 0
    assert len(tried) <= 1
