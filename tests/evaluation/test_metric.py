"""The metric counts as ``evaluate`` does."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv_adapters
from fastadv_adapters import FastAttackModel, SafePGD
from tests.evaluation.runs import EPS, FLOAT32, data, net
from tests.support.tools import attackable_net
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


def test_two_in_one_collection_are_both_counted(metric_of: Callable[..., "fastadv_adapters.RobustAccuracy"]) -> None:
    """A collection updates only one of several metrics whose states are equal, as these are after a first batch."""
    torchmetrics = pytest.importorskip("torchmetrics")
    x, y = data(24)
    both = torchmetrics.MetricCollection({"none": metric_of(net(), eps=0, steps=1), "far": metric_of(net(), eps=0.3)})
    wrong = net()(x).argmax(1) != y
    both.update(x[wrong], y[wrong])
    both.update(x[~wrong], y[~wrong])
    found = both.compute()
    assert found["none"] == pytest.approx(21 / 24)
    assert found["far"] < found["none"]


def test_copies_of_it_follow_the_model(metric_of: Callable[..., "fastadv_adapters.RobustAccuracy"]) -> None:
    model, (x, y) = attackable_net(), data(8)
    metric = metric_of(model, eps=0, steps=1)
    other = metric.clone()
    whole = copy.deepcopy(nn.ModuleDict({"metric": metric, "model": model}))
    with torch.no_grad():
        model(x)
        for parameter in model.parameters():
            parameter.data.mul_(0)  # PyTorch records nothing
    other.update(x, y)
    assert other.compute() == pytest.approx((y == 0).float().mean().item())
    own: Any = whole["metric"]
    own.update(x, y)
    assert own.compute() == pytest.approx(7 / 8), "the model was copied with the metric"


def nowhere(x: Tensor, y: Tensor) -> Tensor:
    return x * torch.nan


def test_what_is_no_image_breaks_nothing(metric_of: Callable[..., "fastadv_adapters.RobustAccuracy"]) -> None:
    metric = metric_of(net(), eps=EPS, attack=nowhere)
    metric.update(*data(8))
    assert metric.compute() == pytest.approx(7 / 8)
