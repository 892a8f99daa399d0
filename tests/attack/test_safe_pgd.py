"""SafePGD: known optima, budgets, losses that do not saturate, early stop, repeatability, and what it leaves alone."""

import math
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters.attack import LossName, Norm
from fastadv_adapters.attack.losses import resolve_loss
from fastadv_adapters.attack.safe_pgd import SafePGD, plain
from fastadv_adapters.model import FastAttackModel
from tests.attack.test_balls import DTYPES, NORMS, assert_inside, budgets, samples
from tests.support.tools import batch, input_gradient, settle

pytestmark = pytest.mark.usefixtures("untouched")
EPS = {"linf": 0.07, "l2": 0.7, "l1": 3.5}  # breaks about half of the samples of task()


class Scaled(nn.Module):
    """The same model, surer of itself."""

    def __init__(self, net: nn.Module, factor: float) -> None:
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.factor  # type: ignore[no-any-return]


def seed(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def task(n: int = 24) -> tuple[nn.Module, Tensor, Tensor]:
    """A network that small changes of an image confuse, images, and its own predictions for them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = (nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(128, 10))
        net = settle(nn.Sequential(*layers)).eval()
    x, _ = batch(n)
    return net, x, predict(net, x)


def predict(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x).argmax(1)  # type: ignore[no-any-return]


def broken(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return predict(net, x) != y


def margin(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        z = net(x).double()
    return resolve_loss("margin")(z, y)


def each_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


# Known truth


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("where", ["inside", "at the bounds"])
@pytest.mark.parametrize("norm", NORMS)
def test_it_reaches_the_optimum_of_a_linear_model(norm: Norm, where: str, loss: LossName, targeted: bool) -> None:
    net, d, eps = nn.Linear(12, 2), 12, {"linf": 0.1, "l2": 0.3, "l1": 0.25}[norm]
    x = samples((6, d), (0.0, 1.0), torch.float32, 0) if where == "at the bounds" else torch.full((6, d), 0.5)
    y = torch.tensor([0, 1] * 3)
    # With a fixed step the optimum is missed by a share of the step where bounds are active, but for L-infinity.
    steps, alpha, off = (30, eps, 1e-4) if norm == "linf" or where == "inside" else (100, eps / 20, 2e-2)
    attack = SafePGD(net, eps=eps, norm=norm, steps=steps, alpha=alpha, loss=loss, targeted=targeted, generator=seed())
    uphill = (net.weight[1] - net.weight[0]).detach() * torch.where(y == targeted, 1.0, -1.0)[:, None]
    gain = ((attack(x, y) - x) * uphill).sum(1)
    room = torch.where(uphill > 0, 1 - x, x)
    if norm == "linf":
        best = (uphill.abs() * room.clamp(max=eps)).sum(1)
    elif norm == "l1":  # fill the steepest coordinates first
        order = uphill.abs().argsort(1, descending=True)
        room = room.gather(1, order)
        best = (uphill.abs().gather(1, order) * torch.minimum((eps - room.cumsum(1) + room).clamp(min=0), room)).sum(1)
    else:
        best = torch.stack([l2_optimum(u.abs(), r, eps) for u, r in zip(uphill, room, strict=True)])
    torch.testing.assert_close(gain, best, rtol=off, atol=1e-5)


def l2_optimum(slope: Tensor, room: Tensor, eps: float) -> Tensor:
    """The most that a step of length eps gains where no coordinate moves further than its room: by bisection."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if (slope * middle).minimum(room).norm() > eps else (middle, high)
    return (slope * (slope * low).minimum(room)).sum()


@pytest.mark.filterwarnings("ignore:SafePGD. eps")  # as wide as the bounds, or next to nothing
@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.integers(1, 4),
    st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
    st.sampled_from(DTYPES),
    st.sampled_from(NORMS),
    budgets,
    st.sampled_from(((0.0, 1.0), (-1.0, 2.0))),
    st.booleans(),
)
def test_it_never_leaves_the_budget_or_the_bounds(
    n: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    norm: Norm,
    eps: float,
    bounds: tuple[float, float],
    early_stop: bool,
) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 3)).to(dtype)
    x, y = samples((n, *shape), bounds, dtype, n), torch.arange(n) % 3
    before, labels = x.clone(), y.clone()
    attack = SafePGD(net, eps=eps, norm=norm, bounds=bounds, steps=3, early_stop=early_stop, generator=seed(n))
    found = attack(x, y)
    assert_inside(norm, found, x, eps, bounds)
    assert not found.requires_grad
    assert torch.equal(x, before)
    assert torch.equal(y, labels)


# Strength


@pytest.mark.parametrize("norm", NORMS)
def test_it_breaks_what_the_budget_allows_and_not_everything(norm: Norm) -> None:
    net, x, y = task()
    found = broken(net, SafePGD(net, eps=EPS[norm], norm=norm, generator=seed())(x, y), y)
    assert 6 <= int(found.sum()) <= 20


@pytest.mark.parametrize("factor", [16.0, 1000.0, 1e7])  # the last overflows float16
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("loss", ["ce", "dlr", each_cross_entropy])
def test_larger_logits_do_not_make_it_weaker(factor: float, dtype: torch.dtype, loss: Any) -> None:
    net, x, y = task(12)
    sure = Scaled(net, factor)
    if factor > 100:  # the usual loss in float32 is blind here
        assert bool((input_gradient(sure, x, y) == 0).flatten(1).all(1).any())
    counts = []
    for model in (net, sure):
        attack = SafePGD(FastAttackModel(model, dtype=dtype), eps=0.1, steps=5, loss=loss, generator=seed())
        counts.append(int(broken(net, attack(x, y), y).sum()))
    assert counts[0] >= 6
    assert counts[1] >= counts[0] - 1  # not the same steps: how the others share the softmax depends on the factor


@pytest.mark.parametrize("loss", ["ce", "dlr", "margin", lambda z, y: z.gather(1, y[:, None]).squeeze(1)])
def test_targets_are_reached(loss: Any) -> None:
    net, x, _ = task(12)
    second = net(x).topk(2).indices[:, 1]
    for early_stop in (False, True):
        attack = SafePGD(net, eps=0.15, steps=10, targeted=True, loss=loss, early_stop=early_stop, generator=seed())
        found = predict(net, attack(x, second))
        assert int((found == second).sum()) >= 10


def test_more_restarts_are_never_weaker() -> None:
    net, x, y = task()
    one, three = (
        margin(net, SafePGD(net, eps=0.07, steps=3, restarts=r, loss="margin", generator=seed())(x, y), y)
        for r in (1, 3)
    )
    # The first of the starts is the same only if seeds are drawn in order.
    assert bool((three >= one - 1e-6).all())
    assert bool((three > one + 1e-6).any())


def test_the_best_candidate_is_returned_and_not_the_last() -> None:
    net, x, y = task()
    far = SafePGD(net, eps=0.3, steps=7, alpha=0.5, norm="l2", loss="margin", generator=seed())  # jumps about
    found = margin(net, far(x, y), y)
    assert bool((found >= margin(net, x, y) - 1e-6).all())


@pytest.mark.filterwarnings("ignore:SafePGD. eps")
def test_what_is_misclassified_already_counts_as_adversarial() -> None:
    net, x, y = task()
    y[:5] = (y[:5] + 1) % 10
    for early_stop in (False, True):
        found = SafePGD(net, eps=1e-6, early_stop=early_stop, generator=seed())(x, y)
        assert torch.equal(broken(net, found, y), broken(net, x, y))
    assert torch.equal(found[:5], x[:5])  # stopped where they stood


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("restarts", [1, 2])
def test_early_stop_breaks_the_same_samples_with_fewer_passes(norm: Norm, restarts: int) -> None:
    net, x, y = task()
    results, passes = [], []
    for early_stop in (False, True):
        fast = plain(net)
        attack = SafePGD(
            fast, eps=EPS[norm], norm=norm, steps=8, restarts=restarts, early_stop=early_stop, generator=seed()
        )
        results.append(broken(net, attack(x, y), y))
        passes.append(fast.gradient_stats.samples)
    assert torch.equal(results[0], results[1])
    assert passes[0] == 8 * restarts * len(x)
    assert passes[1] < 0.8 * passes[0]


def test_early_stop_ends_when_nobody_is_left() -> None:
    net, x, y = task(8)
    fast = plain(net)
    attack = SafePGD(fast, eps=0.3, steps=20, restarts=5, early_stop=True, generator=seed())
    assert bool(broken(net, attack(x, y), y).all())
    assert fast.gradient_stats.passes < 20
