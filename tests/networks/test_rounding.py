"""The self-check compares no directions of rounding: a gradient that cancels has none."""

import warnings

import pytest
import torch
from torch import nn

from fastadv_adapters import FastAttackModel, FastAttackWarning
from fastadv_adapters.networks.nearness import difference, farthest, usual_sizes


class Constant(nn.Module):
    """The mean over positions of normalised values is constant: the gradient at the input is 0 but for rounding."""

    def __init__(self, dimensions: int, gain: float) -> None:
        super().__init__()
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
        torch.manual_seed(0)
        self.body = nn.Sequential(convolution(3, 4, 3, padding=1), nn.GroupNorm(4, 4), convolution(4, 6, 1), norm(6))
        self.last = nn.Linear(6, 5)
        self.gain = gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.last(self.body(x).flatten(2).mean(2) * self.gain)
        return logits


@pytest.mark.parametrize("gain", [1.0, 1e4])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_a_gradient_that_cancels_unfolds_nothing(dimensions: int, gain: float) -> None:
    model = Constant(dimensions, gain).eval()
    x = torch.rand(4, 3, *(4,) * dimensions, requires_grad=True)
    fast = FastAttackModel(model, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastAttackWarning)
        fast(x).logsumexp(1).sum().backward()
    assert fast._networks.folded.report == {"body.3": "folded into body.2"}


def test_what_rounding_moves_is_not_compared_and_the_rest_is() -> None:
    logits, gradients = torch.ones(2, 3), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    turned, moved = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    reference = [logits], [gradients]
    assert difference(([logits], [turned]), reference) is not None
    assert difference(([logits], [turned]), reference, [([logits], [moved])]) is None
    assert difference(([logits], [turned.flip(0)]), reference, [([logits], [moved])]) is not None
    assert difference(([logits], [turned]), reference, ["RuntimeError: refused"]) is not None
    still = [gradients[:1].expand(2, 2)]
    for others in ([([logits], [moved]), ([logits], still)], [([logits], still), ([logits], [moved])]):
        assert difference(([logits], [turned]), reference, others) is None, "one of the changes is enough"


def test_a_class_that_is_left_out_hides_no_difference_of_the_others() -> None:
    exact, gradients = torch.tensor([[1.0, 2.0, -torch.inf]] * 2), [torch.ones(2, 2)]
    off = exact + torch.tensor([[0.0, 1.0, 0.0]])
    assert difference(([exact], gradients), ([exact], gradients)) is None
    assert difference(([off], gradients), ([exact], gradients)) is not None
    assert difference(([exact * torch.nan], gradients), ([exact], gradients)) is not None
    assert farthest([exact], [exact]) == 0
    assert farthest([off], [exact]) == 0.5


def test_outputs_near_zero_are_compared_with_what_is_usual() -> None:
    """An attack leads samples to where two logits of opposite sign are both near zero."""
    clean, there = torch.tensor([[4.0, -4.0], [2.0, -2.0]]), torch.tensor([[1e-3, -1e-3], [-2e-3, 2e-3]])
    off = there + 0.03
    assert usual_sizes([clean, torch.arange(2)]) == [3.0, 0.0, 3.0, 0.0]
    assert farthest([off], [there]) > 1
    assert farthest([off], [there], usual_sizes([clean])[:1]) == pytest.approx(0.01)


def test_one_sample_near_zero_among_others_is_no_difference() -> None:
    exact = torch.tensor([[1e-4], [1e-4], [10.0]])
    assert farthest([exact + 0.02], [exact]) < 0.01
    assert farthest([exact + 2], [exact]) > 0.1


def test_a_number_for_the_whole_call_is_not_compared() -> None:
    loss, logits = torch.tensor(1e-6), torch.ones(2, 3)
    assert farthest([loss * 2, logits], [loss, logits]) == 0
