"""Weights that are computed from others, by ``torch.nn.utils.parametrize``."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from fastadv_adapters import FastAttackModel
from tests.support.tools import batch, cosine, input_gradient


@pytest.mark.parametrize("first", ["fast", "plain"])
def test_cached_parametrizations_are_of_each_network_alone(first: str) -> None:
    """As around a training step, the attack included."""
    torch.manual_seed(0)
    net: Any = nn.Sequential(
        nn.Flatten(), parametrizations.orthogonal(nn.Linear(192, 32)), nn.ReLU(), nn.Linear(32, 10)
    )
    fast, (x, y) = FastAttackModel(net.eval(), dtype=torch.bfloat16), batch()
    wanted = input_gradient(net, x, y)
    with parametrize.cached():
        if first == "plain":
            F.cross_entropy(net(x), y).backward()
        found = input_gradient(fast, x, y)
        if first == "fast":
            F.cross_entropy(net(x), y).backward()
        assert net[1].weight.requires_grad
    assert net[1].parametrizations.weight.original.grad.abs().sum() > 0
    assert cosine(found, wanted).min() > 0.98
