"""Passes without gradient: a folded network answers, the twin judges near ties, and verdicts are the plain model's."""

import copy
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel
from fastadv_adapters.networks import judging
from fastadv_adapters.networks.fast import Fast
from fastadv_adapters.networks.judging import Trust
from fastadv_adapters.networks.steadiness import watching_steadiness
from tests.support.tools import attackable_net, batch, head_of, input_gradient, small_net


class Counted:
    """How many samples the twin of a fast model has been asked about."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.fast = FastAttackModel(model, engine="eager", **options)
        self.asked: list[int] = []
        twin = self.fast._networks.twin.engine
        enter = twin.enter

        def counted(tensor: Tensor) -> Tensor:
            self.asked.append(len(tensor))
            return enter(tensor)

        twin.enter = counted  # type: ignore[method-assign]

    def __call__(self, x: Tensor) -> Tensor:
        self.asked.clear()
        with torch.no_grad():
            logits: Tensor = self.fast(x)
        return logits


def plain(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(x)
    return logits


@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_a_folded_network_answers_with_the_same_verdicts(dtype: Any) -> None:
    net, (x, _) = attackable_net(), batch(64)
    counted = Counted(net, dtype=dtype)
    first, second = counted(x), counted(x)
    assert counted.asked == [], "after a look at the first pass"
    exact = plain(net, x)
    assert torch.equal(first, second), "a look changes nothing"
    assert not torch.equal(second, exact), "the twin's would be equal"
    assert torch.equal(second.argmax(1), exact.argmax(1))
    assert 0 < judging.most_off_by(second, exact) < judging.OFF
    with torch.no_grad():
        assert torch.equal(counted.fast.view(decisions="exact")(x), exact)


def between_two_classes(net: nn.Module, x: Tensor) -> Tensor:
    """Samples on the border of a class, as a bisection in float64 finds them."""
    wide = copy.deepcopy(net).double()
    start, goal = x[:32].double(), x[32:].double()
    other = wide(goal).argmax(1)
    low, high = torch.zeros(32, dtype=torch.float64), torch.ones(32, dtype=torch.float64)
    for _ in range(60):
        middle = (low + high) / 2
        reached = wide(start + middle.view(-1, 1, 1, 1) * (goal - start)).argmax(1) == other
        high, low = torch.where(reached, middle, high), torch.where(reached, low, middle)
    return (start + high.view(-1, 1, 1, 1) * (goal - start)).float()


def test_the_twin_judges_near_ties_and_nothing_else() -> None:
    net, (x, _) = attackable_net(), batch(64)
    x = torch.cat([between_two_classes(net, x).detach(), x])
    counted = Counted(net)
    counted(x)
    found, exact = counted(x), plain(net, x)
    top = exact.topk(2, 1).values
    near = (top[:, 0] - top[:, 1]) < 1e-6 * exact.abs().amax(1)
    assert near.sum() > 3
    assert torch.equal(found.argmax(1), exact.argmax(1))
    ((asked,),) = (counted.asked,)
    assert near.sum() <= asked < 64


def test_equal_logits_are_judged_as_the_model_does() -> None:
    net, (x, _) = small_net().eval(), batch(16)
    with torch.no_grad():
        head_of(net).weight[1:] = head_of(net).weight[0]
        head_of(net).bias.fill_(0.5)
    counted = Counted(net)
    for _ in range(2):
        assert torch.equal(counted(x).argmax(1), plain(net, x).argmax(1))
    assert counted.asked == [16]


@pytest.mark.parametrize("auto_update", [True, False])
def test_updates_are_followed_in_place(auto_update: bool) -> None:
    net, (x, _) = attackable_net(), batch(16)
    counted = Counted(net, dtype=torch.float32, auto_update=auto_update)
    counted(x)
    weights = [p.data_ptr() for p in counted.fast._networks.folded.network.parameters()]
    with torch.no_grad():
        head_of(net).weight.mul_(-1)
        net[1].running_mean.add_(0.5)  # type: ignore[operator]
    counted.fast.update()
    found, exact = counted(x), plain(net, x)
    assert counted.asked == []
    assert judging.most_off_by(found, exact) < judging.OFF
    assert [p.data_ptr() for p in counted.fast._networks.folded.network.parameters()] == weights
    assert list(counted.fast._networks._networks) == [torch.float32], "no second copy of the weights"


@pytest.mark.parametrize("auto_update", [True, False])
def test_a_network_that_nobody_has_used_since_the_last_update_follows_when_it_is_used(
    auto_update: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, (x, y) = attackable_net(), batch(16)
    counted = Counted(net, dtype=torch.bfloat16, auto_update=auto_update)
    counted(x)
    followed: list[torch.dtype] = []
    follow = Fast.follow

    def noted(self: Fast, *, later: bool = False) -> None:
        was = [t._version for t in self.folded.network.parameters()]
        follow(self, later=later)
        if was != [t._version for t in self.folded.network.parameters()]:
            followed.append(self.precision.dtype)

    monkeypatch.setattr(Fast, "follow", noted)
    for _ in range(3):
        with torch.no_grad():
            head_of(net).weight.mul_(-1)
            net[1].running_mean.add_(0.5)  # type: ignore[operator]
        counted.fast.update()
        input_gradient(counted.fast, x, y)
    lazily = 1 if auto_update else 3  # what is not live has to take its values when it is told to
    assert followed.count(torch.bfloat16) == 3
    assert followed.count(torch.float32) == lazily
    found, exact = counted(x), plain(net, x)
    assert judging.most_off_by(found, exact) < judging.OFF
    assert counted.asked == []


def test_what_is_off_by_more_than_rounding_or_is_no_logits_is_left_to_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, _) = attackable_net(), batch(16)
    counted = Counted(net)
    monkeypatch.setattr(judging, "OFF", 0.0)
    for _ in range(2):
        assert torch.equal(counted(x), plain(net, x))
    monkeypatch.undo()
    for other in (nn.Sequential(net, nn.Unflatten(1, (5, 2))), net[:5]):
        counted = Counted(other)
        for _ in range(2):
            assert torch.equal(counted(x), plain(other, x))
            assert counted.asked == [16]


def test_a_batch_that_is_twice_as_large_is_looked_at_again() -> None:
    trust = Trust()
    assert trust.is_due(1, 0)
    trust.looked(1, 0)
    assert [trust.is_due(samples, 0) for samples in (1, 2)] == [False, True]
    trust.looked(6, 0)
    assert [trust.is_due(samples, 0) for samples in (2, 11, 12)] == [False, False, True]


def test_a_bound_widens_with_what_is_seen() -> None:
    trust = judging.Trust()
    assert trust.near == judging.NEAR
    trust.add(3e-6)
    trust.add(2e-6)
    assert trust.near == pytest.approx(8 * 3e-6)
    logits = torch.tensor([[2.0, 1.0], [1.0, 1.0 + 2e-5], [-4.0, -4.0 + 1e-3], [float("nan"), 1.0]])
    assert judging.are_near(logits, trust.near).tolist() == [False, True, False, True]


class Centred(nn.Sequential):
    """Samples see each other."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = nn.Sequential.forward(self, x)  # type: ignore[no-untyped-call]
        return logits - logits.mean(0)


class Draws(nn.Sequential):
    """Random numbers decide."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = nn.Sequential.forward(self, x + 0.1 * torch.rand_like(x))  # type: ignore[no-untyped-call]
        return logits


class DrawsForNothing(nn.Sequential):
    """Random numbers that decide nothing are followed by others that do."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = nn.Sequential.forward(self, x)  # type: ignore[no-untyped-call]
        return logits + 1e-7 * torch.rand(1)


@pytest.mark.parametrize("kind", [Centred, Draws, DrawsForNothing])
def test_models_whose_samples_are_no_function_of_themselves_are_left_to_the_twin(kind: type[nn.Sequential]) -> None:
    net, (x, _) = kind(*attackable_net()).eval(), batch(16)
    counted = Counted(net)
    states = []
    for answer in (counted, lambda x: plain(net, x)):
        torch.manual_seed(0)
        found = [answer(x) for _ in range(3)][-1]
        states.append((found, torch.rand(4)))
    assert all(map(torch.equal, *states)), "random numbers afterwards included"


def test_networks_without_batch_norm_have_no_other_network() -> None:
    net, (x, _) = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), batch(4)
    counted = Counted(net, dtype=torch.bfloat16)
    assert torch.equal(counted(x), plain(net, x))
    assert list(counted.fast._networks._networks) == [torch.bfloat16]


class Hard(nn.Sequential):
    """The signs of features decide, so that a border is a jump."""

    def forward(self, x: Tensor) -> Tensor:
        *body, head = self
        for part in body:
            x = part(x)
        logits: Tensor = head(torch.where(x > 0.1, 1.0, -1.0))
        return logits


def test_a_model_that_jumps_is_left_to_the_twin() -> None:
    net, (x, _) = Hard(*attackable_net()).eval(), batch(64)
    low, high, other = x[:32], x[32:], plain(net, x[32:]).argmax(1)
    for _ in range(40):  # until there is no number between
        middle = (low + high) / 2
        reached = (plain(net, middle).argmax(1) == other).view(-1, 1, 1, 1)
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    counted = Counted(net)
    counted(x)
    for near in (low, high):
        assert torch.equal(counted(near).argmax(1), plain(net, near).argmax(1))


class Does(nn.Module):
    """One operator."""

    def __init__(self, operator: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.forward = operator


JUMPS: list[Callable[[Tensor], Any]] = [
    torch.round,
    F.hardshrink,
    lambda x: (x > 0) * x,
    lambda x: x.topk(2)[0],
    lambda x: x.int() + x,
    lambda x: x * float(x.mean()),
    lambda x: torch.div(x, 0.3, rounding_mode="floor"),
    lambda x: F.threshold(x, 0.1, 0.0),
    lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, 0, 255),
    lambda x: torch.arange(3.0)[x.max(1)[1]],
    lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), [2, 2]),
    lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1), mode="nearest", align_corners=False),
]
SMOOTH: list[Callable[[Tensor], Any]] = [
    F.relu,
    F.hardswish,
    lambda x: F.max_pool2d(x, 2),
    lambda x: F.adaptive_max_pool2d(x, 2),
    lambda x: x.max(1)[0],
    lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1), align_corners=False),
    lambda x: F.threshold(x, 0.0, 0.0),
    lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    lambda x: x[:, torch.tensor([0, 2])],
]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_operators_that_jump_are_told_from_those_that_do_not(mode: Callable[[], AbstractContextManager[None]]) -> None:
    for operators, smooth in ((JUMPS, False), (SMOOTH, True)):
        for operator in operators:
            part, x = Does(operator), torch.rand(2, 3, 4, 4)
            with mode(), watching_steadiness(part, x.device) as seen:
                part(x)
            assert seen.steady == smooth, seen


class Counts(nn.Sequential):
    """After four passes it answers otherwise, and so would each network after four of its own."""

    seen = 0

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = nn.Sequential.forward(self, x)  # type: ignore[no-untyped-call]
        self.seen += 1
        return logits if self.seen < 5 else logits.flip(1)


def test_a_model_that_keeps_a_state_is_left_to_the_twin() -> None:
    net, (x, _) = Counts(*attackable_net()).eval(), batch(16)
    counted = Counted(net)
    for _ in range(6):
        found, exact = counted(x), plain(net, x)
        assert torch.equal(found, exact)


def test_a_pass_that_raised_was_no_look() -> None:
    net, (x, _) = Centred(*attackable_net()).eval(), batch(16)
    counted = Counted(net)
    with pytest.raises(RuntimeError, match="refused"):
        counted(torch.rand(4, 1, 8, 8))
    assert torch.equal(counted(x), plain(net, x))


def test_classes_that_are_left_out_make_no_sample_near() -> None:
    logits = torch.tensor([[2.0, 1.0, -torch.inf], [2.0, 2.0 - 1e-6, -torch.inf], [torch.inf, 1.0, 0.0]])
    assert judging.are_near(logits, 1e-5).tolist() == [False, True, True]
    assert judging.most_off_by(logits + 1e-3, logits) == pytest.approx(1e-3, rel=1e-2)


def test_a_network_that_one_thread_asks_for_while_another_updates_is_made_afterwards() -> None:
    net, (x, _) = attackable_net(), batch(8)
    fast = FastAttackModel(net, engine="eager", dtype=torch.bfloat16, auto_update=False)
    networks = fast._networks
    (only,) = networks._networks.values()
    follow, network_in, found = only.follow, networks.network_in, []
    asks, goes_on = threading.Event(), threading.Event()
    asking = threading.Thread(target=lambda: found.append(plain(fast, x)))

    def network_later(dtype: torch.dtype) -> Any:
        asks.set()
        goes_on.wait(2)
        return network_in(dtype)

    def follow_slowly(*, later: bool = False) -> None:
        follow(later=later)
        goes_on.set()
        asking.join(0.3)

    networks.network_in, only.follow = network_later, follow_slowly  # type: ignore[method-assign]
    with torch.no_grad():
        head_of(net).weight.mul_(-1)
    asking.start()
    assert asks.wait(10)
    fast.update()
    asking.join()
    assert len(found) == 1
    assert torch.equal(plain(fast, x).argmax(1), plain(net, x).argmax(1))
    assert list(fast._networks._networks) == [torch.bfloat16, torch.float32]
