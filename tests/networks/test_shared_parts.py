"""Logits that share a large part: a cross entropy sees their differences alone, which half precision rounds away."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel, FastAttackWarning
from fastadv_adapters.networks.nearness import off_for_loss, usual_sizes
from tests.support.tools import cosine, input_gradient


class SharedPart(nn.Module):
    """A large part that all logits share, which cross entropies do not see, is taken out by products behind it."""

    def __init__(self, size: float = 1000.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.size = size
        self.first, self.last = nn.Linear(48, 32), nn.Linear(32, 10, bias=False)
        self.shared = nn.Linear(32, 1, bias=False)
        self.scaled = nn.Linear(10, 10, bias=False)
        self.scaled.weight = nn.Parameter(torch.eye(10))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.first(x.flatten(1)))
        logits: Tensor = self.scaled(self.last(hidden) + self.size * self.shared(hidden))
        return logits


def images() -> tuple[Tensor, Tensor]:
    return torch.rand(16, 3, 4, 4, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 10


@pytest.mark.parametrize("size", [100.0, 120.0])
def test_differences_that_are_off_are_no_better_than_outputs_that_are(size: float) -> None:
    model, (x, y) = SharedPart(size).eval(), images()
    fast = FastAttackModel(model, dtype=torch.bfloat16)
    with pytest.warns(FastAttackWarning, match=r"outputs, or their differences, are off by .*; run the attack again"):
        found = input_gradient(fast, x, y)
    assert fast.dtype == torch.float32
    assert (cosine(found, input_gradient(model, x, y)) > 0.9999).all()


@pytest.mark.parametrize("size", [0.0, 1.0])
def test_what_is_shared_and_small_hides_nothing(size: float) -> None:
    fast, (x, y) = FastAttackModel(SharedPart(size).eval(), dtype=torch.bfloat16), images()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        input_gradient(fast, x, y)
    assert fast.dtype == torch.bfloat16


def test_only_a_loss_that_compares_logits_asks_for_differences_and_a_border_is_no_shared_part() -> None:
    logits = torch.tensor([[101.0, 100.0, 99.0], [99.0, 100.0, 101.0]])
    off = logits + torch.tensor([0.5, 0.0, -0.5])
    balanced, summed = torch.tensor([[1.0, -0.5, -0.5]] * 2), torch.ones(2, 3)
    usual = usual_sizes([logits])
    assert off_for_loss([off], [logits], [balanced], usual) == pytest.approx(0.5)
    assert off_for_loss([off], [logits], [summed], usual) < 0.01
    assert off_for_loss([off], [logits], [None], usual) < 0.01
    border = torch.tensor([[5.0, 5.001], [4.0, 3.999]])
    usual = usual_sizes([torch.tensor([[9.0, 1.0], [-3.0, 5.0]])])
    assert off_for_loss([border + torch.tensor([0.01, 0.0])], [border], [balanced[:, :2]], usual) < 0.01
    left_out = torch.cat([logits, torch.full((2, 1), -torch.inf)], 1)
    found = torch.cat([off, torch.full((2, 1), -torch.inf)], 1)
    grads = torch.cat([balanced, torch.zeros(2, 1)], 1)
    assert off_for_loss([found], [left_out], [grads], usual_sizes([left_out])) == pytest.approx(0.5)


def test_boxes_in_pixels_hide_no_logits_that_are_far_off() -> None:
    """The loss of the logits alone, of all entries, and of one logit each, which may be small beside the others."""
    torch.manual_seed(0)
    boxes, logits = 640 * torch.rand(8, 4), torch.randn(8, 10)
    exact, found = torch.cat([boxes, logits], 1), torch.cat([boxes, logits + 0.2], 1)
    of_logits = torch.cat([torch.zeros(8, 4), torch.randn(8, 10)], 1)
    single = torch.zeros(8, 14).scatter(1, torch.arange(4, 12)[:, None], 1.0)
    assert off_for_loss([found], [exact], [of_logits]) > 0.07
    assert off_for_loss([found], [exact], [torch.ones(8, 14)]) < 0.01
    assert off_for_loss([found], [exact], [single]) < 0.01
