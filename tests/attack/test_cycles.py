"""Samples whose iterates come again rest: the same results bit for bit, fewer passes, and only where that is sound."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from digits import Digits
from fastadv_adapters.attack import LossName, Norm, SafePGD, ball_around, resolve_loss
from fastadv_adapters.attack.cycles import WINDOW, Past, can_cycle
from fastadv_adapters.attack.looking import Settings
from fastadv_adapters.attack.pool import Best, Pool
from fastadv_adapters.attack.resting import Resting
from fastadv_adapters.attack.targets import Targets
from fastadv_adapters.model import FastAttackModel
from fastadv_adapters.networks import Kind, Networks, Schedule
from tests.attack.test_balls import NORMS
from tests.attack.test_rescue import Spoilt, marked_task
from tests.attack.test_safe_pgd import broken, each_cross_entropy, seed
from tests.attack.test_work import HALF, mixed
from tests.support.engines import use_engine

pytestmark = pytest.mark.usefixtures("untouched")
CPU = torch.device("cpu")


class EarlyStopAlone(SafePGD):
    """Samples never rest."""

    def _settings(self, *, classes: bool) -> Settings:
        return replace(super()._settings(classes=classes), stops_cycles=False)


def both(
    net: nn.Module, dtype: torch.dtype, x: Tensor, y: Tensor, *, loss_scale: Any = "per-sample", **settings: Any
) -> tuple[Tensor, int, int]:
    """What is found, which has to be the same with and without rest; and how many gradients that takes, with first."""
    found, passes = [], []
    for attack in (SafePGD, EarlyStopAlone):
        fast = FastAttackModel(net, dtype=dtype, loss_scale=loss_scale)
        found.append(attack(fast, early_stop=True, generator=seed(), **settings)(x, y))
        passes.append(fast.gradient_stats.samples)
    # Kernels give three samples or fewer other last digits than many; these may decide between two candidates that are
    # the same but for the last digit of a pixel.
    assert (found[0] - found[1]).abs().max() <= 2**-22
    assert torch.equal(broken(net, found[0], y), broken(net, found[1], y))
    assert (found[0] == found[1]).double().mean() > 0.999
    return found[0], passes[0], passes[1]


# The same, with fewer passes


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "loss"), [(torch.float32, "ce"), (torch.bfloat16, "margin")], ids=str)
def test_200_steps_on_the_robust_digits_network_need_a_fifth_of_the_passes(
    dtype: torch.dtype, loss: LossName, robust: nn.Module, data: Digits
) -> None:
    count = 80 if dtype == torch.float32 else 30  # bfloat16 is slow on most processors
    x, y = data.test_images[:count], data.test_labels[:count]
    found, with_rest, without = both(robust, dtype, x, y, eps=0.15, alpha=0.15 / 4, steps=200, loss=loss)
    assert count / 8 < int(broken(robust, found, y).sum()) < count * 3 / 4
    assert 5 * with_rest <= without


@pytest.mark.long
def test_in_float16_too(robust: nn.Module, data: Digits) -> None:
    x, y = data.test_images[:12], data.test_labels[:12]
    _, with_rest, without = both(robust, torch.float16, x, y, eps=0.15, alpha=0.15 / 4, steps=60, loss="ce")
    assert 3 * with_rest <= 2 * without


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_results_are_the_same_bit_for_bit(norm: Norm, targeted: bool, dtype: torch.dtype) -> None:
    net, x, y = mixed(16)
    settings = {"eps": HALF[norm], "alpha": HALF[norm] / 4, "steps": 40, "norm": norm, "loss": "dlr"}
    targets = (y + 1) % 10 if targeted else y
    _, with_rest, without = both(net, dtype, x, targets, targeted=targeted, **settings)
    assert with_rest < without if norm == "linf" else with_rest <= without


@pytest.mark.filterwarnings("ignore:SafePGD. steps of alpha:fastadv_adapters.FastAttackWarning")
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.float64], ids=str)
def test_the_iterates_are_compared_and_not_their_copies_in_half_precision(x_dtype: torch.dtype) -> None:
    net, x, y = mixed(16)
    model = net.double() if x_dtype == torch.float64 else net.to(x_dtype)
    eps = HALF["linf"]
    found, with_rest, without = both(
        model, torch.float32, x.to(x_dtype), y, eps=eps, alpha=eps / 4, steps=40, loss="ce"
    )
    assert found.dtype == x_dtype
    assert with_rest < without
    # Steps that the copy does not show: it stays while the iterate goes on.
    both(model, torch.float32, x.to(x_dtype), y, eps=eps, alpha=eps / 1000, steps=40, loss="ce")


def test_a_new_start_begins_with_everybody() -> None:
    net, x, y = mixed(16)
    eps = HALF["linf"] / 2
    settings = {"eps": eps, "alpha": eps / 2, "steps": 30, "loss": "ce"}
    once = both(net, torch.float32, x, y, **settings)
    thrice = both(net, torch.float32, x, y, restarts=3, **settings)
    assert not torch.equal(once[0], thrice[0])
    assert 2 * once[1] < thrice[1] < thrice[2]


@pytest.mark.parametrize("always", [False, True])
def test_broken_samples_are_rescued_if_they_rest(always: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Schedule, "is_losing", lambda *_, **__: False)  # else float32 serves them soon
    monkeypatch.setattr(Kind, "loses_more", lambda *_: False)  # as on CUDA, where they are not run again at once
    net, x, y, rows = marked_task()
    spoilt = Spoilt(net, torch.nan, always=always)
    found, with_rest, without = both(spoilt, torch.float16, x, y, eps=0.03, alpha=0.01, steps=20, loss="ce")
    assert with_rest < without
    moved = (found != x).flatten(1).any(1)
    assert bool(moved[rows].any())


@pytest.mark.long
@pytest.mark.parametrize("engine", ["compile", "cudagraph"])
def test_engines_with_few_batch_sizes_break_the_same_samples(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, y = mixed(40)
    use_engine(monkeypatch, engine)
    eps = HALF["linf"]
    assert FastAttackModel(net, dtype=torch.float32).engine == engine
    _, with_rest, without = both(net, torch.float32, x, y, eps=eps, alpha=eps / 2, steps=40, loss="ce")
    assert with_rest < without


# Where it would not be sound


class Wrapped(nn.Module):
    """A network with something in front that changes no value."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.first(x))  # type: ignore[no-any-return]

    def first(self, x: Tensor) -> Tensor:
        return x


class Draws(Wrapped):
    def first(self, x: Tensor) -> Tensor:
        return x + 0 * torch.rand(1)


class DrawsFromNumpy(Wrapped):
    def first(self, x: Tensor) -> Tensor:
        return x + 0 * float(np.random.rand())  # noqa: NPY002 - what models do


class HoldsGenerator(Wrapped):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.source = torch.Generator()


class HoldsNumpyGenerator(Wrapped):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.source = np.random.default_rng(0)


class Centred(Wrapped):
    """Samples see each other, by so little that the signs of gradients do not change."""

    def first(self, x: Tensor) -> Tensor:
        return x - 1e-6 * x.mean(0, keepdim=True)


def passes_of(net: nn.Module, x: Tensor, y: Tensor, **settings: Any) -> tuple[int, int]:
    eps = HALF["linf"] / 2
    return both(net, torch.float32, x, y, **{"eps": eps, "alpha": eps / 2, "steps": 30, "loss": "ce", **settings})[1:]


def test_the_network_of_these_tests_has_cycles() -> None:
    net, x, y = mixed(16)
    with_rest, without = passes_of(Wrapped(net), x, y)
    assert 2 * with_rest < without
    assert 2 * passes_of(net, x, y, loss_scale=None)[0] < without


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": None},
        {"loss": "auto"},
        {"loss": each_cross_entropy},
        {"loss_scale": "per-call"},
    ],
    ids=["falling", "auto", "callable", "per-call"],
)
def test_no_sample_rests_with(settings: dict[str, Any]) -> None:
    net, x, y = mixed(16)
    with_rest, without = passes_of(net, x, y, **settings)
    assert with_rest == without > 30


def test_no_sample_rests_without_early_stop() -> None:
    net, x, y = mixed(16)
    eps = HALF["linf"] / 2
    attack = SafePGD(net.eval(), eps=eps, alpha=eps / 2, steps=30, loss="ce", generator=seed())
    attack(x, y)
    assert attack.model.gradient_stats.samples == 30 * len(x)


@pytest.mark.parametrize("kind", [Draws, DrawsFromNumpy, HoldsGenerator, HoldsNumpyGenerator])
def test_no_sample_of_a_model_that_draws_rests(kind: type[Wrapped]) -> None:
    net, x, y = mixed(16)
    with_rest, without = passes_of(kind(net), x, y)
    assert with_rest == without > 30


def test_no_sample_of_a_plain_model_that_draws_rests() -> None:
    net, x, y = mixed(16)
    eps = HALF["linf"] / 2
    passes = []
    for model in (net, Draws(net)):
        attack = SafePGD(model.eval(), eps=eps, alpha=eps / 2, steps=30, loss="ce", early_stop=True, generator=seed())
        attack(x, y)
        passes.append(attack.model.gradient_stats.samples)
    assert 2 * passes[0] < passes[1]


def test_no_sample_rests_where_samples_see_each_other() -> None:
    net, x, y = mixed(16)
    with pytest.warns(UserWarning, match="#samples-coupled"):
        with_rest, without = passes_of(Centred(net), x, y)
    assert with_rest == without > 30


def test_kernels_must_be_deterministic() -> None:
    steps, cuda = (0.1, 0.1), torch.device("cuda")
    assert can_cycle(steps, CPU)
    assert not can_cycle((0.2, 0.1), CPU)
    assert not can_cycle((), CPU)
    assert not can_cycle(steps, cuda)
    with deterministic(warn_only=False):
        assert can_cycle(steps, cuda)
    with deterministic(warn_only=True):
        assert not can_cycle(steps, cuda)


@contextmanager
def deterministic(*, warn_only: bool) -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("targeted", "name"), [(t, n) for t in (False, True) for n in ("ce", "margin", "dlr", "auto")])
def test_losses_by_name_but_auto_repeat(targeted: bool, name: LossName) -> None:
    assert resolve_loss(name, targeted).repeats is (name != "auto")
    assert not resolve_loss(partial(F.cross_entropy, reduction="none"), targeted).repeats


def test_a_scale_that_moves_wakes_those_who_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, y = mixed(16)
    calm, without = passes_of(net, x, y)
    marks, asked, at = Networks.marks, [0], 7

    def moving(self: Networks) -> tuple[Any, ...]:
        asked[0] += 1
        return *marks(self), asked[0] >= at

    monkeypatch.setattr(Networks, "marks", moving)
    assert calm < passes_of(net, x, y)[0] < without
    asked[0], at = 0, 10**6
    assert passes_of(net, x, y)[0] == calm
    monkeypatch.setattr(Networks, "marks", lambda self: object())
    assert passes_of(net, x, y)[0] == without


def with_two_at_rest() -> tuple[FastAttackModel, Resting, Pool]:
    """Of five samples the second and the fourth rest: their iterates stay, those of the others move."""
    net, x, y = mixed(5)
    fast = FastAttackModel(net, dtype=torch.float32)
    fast(x.clone().requires_grad_()).sum().backward()
    ball, targets, none = ball_around("linf", x, eps=0.1), Targets.of(y, classes=True), torch.zeros(5, dtype=torch.bool)
    best = Best.none(x.clone())
    best.loss.copy_(torch.arange(5.0))
    pool = Pool(torch.arange(5), targets, ball, x.clone(), best, none)
    resting = Resting(fast, ball, targets, allowed=True)
    for _ in range(3):
        assert pool.index.tolist() == [0, 1, 2, 3, 4]
        move(pool)
        pool = resting.rest(pool)
    assert pool.index.tolist() == [0, 2, 4]
    return fast, resting, pool


def move(pool: Pool) -> None:
    pool.x += torch.where(pool.index % 2 == 0, 0.01, 0.0).view(-1, 1, 1, 1)


@pytest.mark.parametrize("how", ["scale", "weights", "draws", "end"])
def test_those_who_rest_come_back_in_order(how: str) -> None:
    fast, resting, pool = with_two_at_rest()
    pool.x.copy_(pool.index.view(-1, 1, 1, 1) / 10)
    if how == "end":
        pool = resting.join(pool)
    else:
        if how == "weights":
            fast.update()
        elif how == "draws":
            torch.rand(1)
        else:
            fast._networks.kinds[next(iter(fast._networks.kinds))].dtype = torch.float16
        for _ in range(3 if how == "draws" else 1):  # whether something was drawn is asked if a sample could rest
            pool = resting.rest(pool)
    assert pool.index.tolist() == pool.best.loss.tolist() == [0, 1, 2, 3, 4]
    assert pool.x[[0, 2, 4], 0, 0, 0].tolist() == pytest.approx([0, 0.2, 0.4])
    assert torch.equal(pool.x[[1, 3]], pool.ball.start()[[1, 3]])
    assert pool.past is None or pool.past.age == 0
    assert torch.equal(pool.targets.tree, resting._targets.tree)


def test_the_scale_of_half_precision_and_an_update_are_among_the_marks() -> None:
    net, x, _ = mixed(4)
    fast = FastAttackModel(net, dtype=torch.float16)
    networks = fast._networks
    assert not networks.known_apart()  # nothing is known yet
    fast(x.requires_grad_()).sum().backward()
    assert networks.known_apart()
    before = networks.marks()
    assert networks.marks() == before
    networks.state.start_at_most(-2)
    lower = networks.marks()
    assert lower != before
    fast.update()
    assert networks.marks() != lower


# The comparison itself


@pytest.mark.parametrize("period", [1, 2, 3, 5, 8, WINDOW - 1])
@pytest.mark.parametrize("entry", [0, 7, 33])
def test_a_cycle_is_found_once_it_has_gone_round(entry: int, period: int) -> None:
    x = torch.rand(entry + period, 2, 3)
    iterates = [x[min(t, entry + (t - entry) % period) if t >= entry else t] for t in range(200)]
    past, found = Past.beginning(iterates[0]), 0
    for t, now in enumerate(iterates[1:], 1):
        if bool(past.returned(now).all()):
            found = t
            break
    assert entry + period + 1 <= found <= entry + 2 * WINDOW + period + 1
    if period <= 2:
        assert found == entry + period + 1


def test_rows_are_found_one_by_one_and_taken_along() -> None:
    still, moving = torch.rand(1, 3), torch.rand(20, 1, 3)
    past = Past.beginning(torch.cat([moving[0], still]))
    assert past.returned(torch.cat([moving[1], still])).tolist() == [False, False]  # once is not enough
    past = past.take(torch.tensor([1, 0]))
    assert past.returned(torch.cat([still, moving[2]])).tolist() == [True, False]
    past = past.take(torch.tensor([1]))
    assert not any(bool(past.returned(now)) for now in moving[3:])


def test_one_bit_is_a_difference() -> None:
    x = torch.rand(1, 1000)
    nearly = x.clone()
    nearly[0, 500] = nearly[0, 500].nextafter(torch.tensor(2.0))
    for first, second in ((x, nearly), (torch.zeros_like(x), -torch.zeros_like(x))):
        past = Past.beginning(first)
        past.returned(first)
        assert not bool(past.returned(second))
        past = Past.beginning(first)
        past.returned(first)
        assert bool(past.returned(first))
