"""Samples that one pass loses to infinity or NaN come back in full precision, on a processor."""

import warnings
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel, watch_gradients
from fastadv_adapters.boundary import Pulled
from fastadv_adapters.networks import mending
from tests.support.tools import batch, cosine, input_gradient


class Standardised(nn.Module):
    """Features divided by their spread: images without contrast have gradients so large that float16 overflows."""

    def __init__(self, end: str = "alone") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.Conv2d(8, 8, 3, bias=False)
        self.last, self.end = nn.Linear(288, 10), end

    def forward(self, x: Tensor, bank: Tensor | None = None) -> Tensor:
        h = self.second(self.first(x).relu()).flatten(1)
        h = h / (h.std(1, keepdim=True) + 1e-6)
        logits: Tensor = self.last(h)
        if self.end == "of sixteen":
            logits = logits.view(16, -1)
        if self.end == "centred":
            logits = logits - 4 * logits.mean(0)
        if self.end == "sums":
            logits = logits.sum(0, keepdim=True).expand(len(x), -1)
        return logits if bank is None else logits @ bank.T @ bank


def faint_from(sample: int) -> tuple[Tensor, Tensor]:
    """Images without contrast from this one on."""
    x, y = batch(16)
    return x * (1e-4 + (torch.arange(16) < sample)).view(-1, 1, 1, 1), y


def gradients(model: nn.Module, x: Tensor, y: Tensor, *others: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf, *others), y), leaf)
    return gradient


@pytest.mark.filterwarnings("ignore::fastadv_adapters.FastAttackWarning")
@pytest.mark.parametrize("end", ["alone", "centred", "sums", "of sixteen", "bank"])
@pytest.mark.parametrize("warmed_up", [False, True])
def test_a_pass_that_overflows_is_mended_at_once(end: str, *, warmed_up: bool) -> None:
    """In the samples that lost entries alone, but in all if these see each other."""
    model, (x, y) = Standardised(end).eval(), faint_from(12)
    others = [torch.randn(16, 10)] if end == "bank" else []
    fast = FastAttackModel(model, dtype=torch.float16, engine="eager")
    if warmed_up:
        gradients(fast, *batch(16), *others)
        fast.reset_gradient_stats()
    with watch_gradients() as watch:
        found = gradients(fast, x, y, *others)
    if warmed_up or end == "alone":  # else the self-check or the audit has seen it first
        assert fast.gradient_stats.nonfinite > 0, "else this tests nothing"
        assert fast._networks.dtype == torch.float16
    assert watch.spoilt is not None
    assert not watch.spoilt.any()
    wanted = gradients(model, x, y, *others)
    assert (cosine(found, wanted) > 0.98).all()
    lengths = found.flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    assert ((lengths - 1).abs() < 0.2).all()


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
    run = mending.Mender._run

    def counted(self: mending.Mender, problem: Any) -> Any:
        tried.append(problem)
        return run(self, problem)

    monkeypatch.setattr(mending.Mender, "_run", counted)
    model, (x, y) = Hopeless().eval(), batch(16)
    fast = FastAttackModel(model, dtype=torch.bfloat16, engine="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(20):
            found = input_gradient(fast, x, y)
    assert found.isfinite().all()
    assert fast.gradient_stats.nonfinite > 0
    assert len(tried) == 1


def test_what_comes_in_broken_hides_no_other_sample() -> None:
    model, (x, _) = Standardised().eval(), faint_from(12)
    fast = FastAttackModel(model, dtype=torch.float16, engine="eager")
    leaf = x.clone().requires_grad_()
    logits = fast(leaf)
    wrong = torch.ones_like(logits).index_fill(0, torch.arange(4), torch.nan)
    (found,) = torch.autograd.grad(logits, leaf, wrong)
    assert (found[:4] == 0).all()
    (wanted,) = torch.autograd.grad(model(other := x.clone().requires_grad_()), other, wrong.nan_to_num(0.0))
    assert (cosine(found[4:], wanted[4:]) > 0.98).all()


def test_beside_a_gradient_of_no_dimension_all_samples_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    better = Pulled([torch.tensor(1.0), torch.ones(4, 2)], torch.zeros(4, dtype=torch.bool))
    monkeypatch.setattr(mending.Mender, "_run", lambda self, problem: better)
    tensors, nobody = [torch.tensor(2.0), torch.ones(4, 2)], cast(Any, None)
    mender = mending.Mender(nobody, nobody, tensors, [True, True], [torch.ones(4, 3)], [torch.ones(4, 3)])
    lost = torch.tensor([True, False, False, False])
    assert mender(Pulled([torch.tensor(0.0), torch.zeros(4, 2)], lost), lost) is better
