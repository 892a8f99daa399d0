"""The metric counts as ``evaluate`` does."""

import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastadv_adapters
from fastadv_adapters import FastAttackModel, SafePGD
from tests.evaluation.runs import EPS, FLOAT32, data, net
from tests.support.torchvision import hide_if_broken


@pytest.fixture(scope="module")
def metric_of() -> Callable[..., "fastadv_adapters.RobustAccuracy"]:
    hide_if_broken()
    return fastadv_adapters.RobustAccuracy


def test_it_counts_what_stands_over_batches(metric_of: Callable[..., "fastadv_adapters.RobustAccuracy"]) -> None:
    x, y = data(24)
    fast = FastAttackModel(net(), **FLOAT32)
    attack = SafePGD(fast, eps=EPS, steps=20, random_start=False, early_stop=True)
    metric = metric_of(fast, eps=EPS, attack=attack)
    for first in (0, 10):
        metric.update(x[first : first + 10], y[first : first + 10])
    metric(x[20:], y[20:])
    standing = (net()(attack(x, y)).argmax(1) == y) & (net()(x).argmax(1) == y)
    assert metric.compute() == pytest.approx(standing.float().mean().item())
    assert 0 < metric.compute() < 1
    metric.reset()
    assert metric.total == 0


def test_the_model_is_no_part_of_it_and_its_sums_add_up(
    metric_of: Callable[..., "fastadv_adapters.RobustAccuracy"],
) -> None:
    model: nn.Module = net()
    metric = metric_of(model, eps=EPS, steps=2)
    assert list(metric.parameters()) == []
    assert metric._reductions["standing"] is metric._reductions["total"] is not None
    metric.update(*data(8))
    again: fastadv_adapters.RobustAccuracy = pickle.loads(pickle.dumps(metric))
    assert torch.equal(torch.as_tensor(again.total), torch.tensor(8))


def plain(x: Tensor, y: Tensor) -> Tensor:
    return x


def test_an_attack_of_ones_own_takes_the_place_of_safe_pgd(
    metric_of: Callable[..., "fastadv_adapters.RobustAccuracy"],
) -> None:
    metric = metric_of(net(), eps=EPS, attack=plain)
    metric.update(*data(24))
    metric.update(torch.rand(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64))
    assert metric.compute() == pytest.approx(1 - 3 / 24)
