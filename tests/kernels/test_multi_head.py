"""PyTorch's multi-head attention that is nearly sure, in half precision: gradients against float64."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel
from fastadv_adapters.modules import HALF
from tests.support.tools import cosine, input_gradient

halves = pytest.mark.parametrize("dtype", HALF, ids=str)
WIDTH, SLOTS = 64, 32
MASKS = ["none", "bool", "float"]


def eighths(*shape: int) -> Tensor:
    """What half precision holds as it is, and its projections below too: all that is rounded comes after these."""
    return torch.randint(-8, 9, shape) / 8


class Memory(nn.Module):
    """Looks its input up in a memory. What reaches the input has gone through the softmax."""

    def __init__(self, mask: str, **asked: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 1, batch_first=True)
        self.slots, self.last = nn.Parameter(eighths(SLOTS, WIDTH)), nn.Linear(WIDTH, 10)
        self.mask, self.asked = mask, asked
        self.weights: Tensor | None = None
        with torch.no_grad():
            self.attention.in_proj_weight.copy_(8 * torch.eye(WIDTH).repeat(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        memory, hidden = self.slots.expand(len(x), -1, -1), torch.arange(SLOTS)[None] % 3 == 0
        added = torch.zeros(1, SLOTS, dtype=x.dtype).masked_fill(hidden, -torch.inf)
        mask = {"none": None, "bool": hidden, "float": added}[self.mask]
        found, weights = self.attention(x[:, None], memory, memory, attn_mask=mask, **self.asked)
        self.weights = weights if weights is None else weights.detach()
        logits: Tensor = self.last(found[:, 0])
        return logits


def look_up(model: Memory, dtype: torch.dtype) -> tuple[Any, Memory]:
    """Check the gradients of a fast model against float64; returns its network, and the model in float64."""
    model = model.eval()
    x, y, double = eighths(40, WIDTH) / 2, torch.arange(40) % 10, copy.deepcopy(model).double()
    exact = input_gradient(double, x.double(), y)
    fast = FastAttackModel(model, dtype=dtype, engine="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        near = cosine(input_gradient(fast, x, y).double(), exact)
    assert fast._networks.dtype == dtype
    assert (near > 0.999).double().mean() > 0.9
    return fast._networks.folded.network, double


@halves
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("average", [True, False])
def test_scores_and_weights_that_are_asked_for_are_not_rounded_to_16_bits(
    mask: str, average: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    network, double = look_up(Memory(mask, average_attn_weights=average), dtype)
    assert network.weights.dtype == torch.float32
    torch.testing.assert_close(network.weights.double(), double.weights, rtol=1e-5, atol=1e-6)


@halves
@pytest.mark.parametrize("mask", MASKS)
def test_without_weights_gradients_are_as_near(mask: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    look_up(Memory(mask, need_weights=False), dtype)
