"""SafePGD does only the work that is needed: steps, passes, batch sizes, operators, waits."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from digits import Digits, trained_net
from fastadv_adapters.attack import LossName, Norm
from fastadv_adapters.attack.balls import Ball, ball_around
from fastadv_adapters.attack.pool import Best, Pool
from fastadv_adapters.attack.safe_pgd import SafePGD
from fastadv_adapters.attack.steps import ENOUGH, WIDER, radii, rows_for, step_sizes
from fastadv_adapters.attack.targets import Targets
from fastadv_adapters.model import FastAttackModel
from tests.attack.test_balls import NORMS
from tests.attack.test_safe_pgd import broken, predict, seed, task
from tests.support.engines import use_engine
from tests.support.tools import attackable_net, batch

pytestmark = pytest.mark.usefixtures("untouched")


# Steps


@pytest.mark.parametrize(("norm", "first"), [("linf", 2.0), ("l2", 2.0), ("l1", 1.0)])
def test_steps_fall_in_a_straight_line_unless_alpha_is_given(norm: Norm, first: float) -> None:
    found = step_sizes(norm, eps=0.5, steps=4, alpha=None)
    assert found == pytest.approx([first * 0.5, first * 0.375, first * 0.25, first * 0.125])
    assert step_sizes(norm, eps=0.5, steps=3, alpha=0.2) == (0.2, 0.2, 0.2)
    assert step_sizes(norm, eps=0.5, steps=0, alpha=None) == ()


def test_an_attack_tells_its_alpha_as_given_and_its_step_sizes() -> None:
    falling, constant = (SafePGD(nn.Linear(2, 2), eps=0.3, steps=3, alpha=alpha) for alpha in (None, 0.1))
    assert falling.alpha is None
    assert falling.step_sizes == pytest.approx((0.6, 0.4, 0.2))
    assert "alpha=None" in repr(falling)
    assert constant.alpha == 0.1
    assert constant.step_sizes == (0.1, 0.1, 0.1)


def test_each_step_has_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, y = task(4)
    attack = SafePGD(net, eps=0.1, steps=5, random_start=False)
    taken: list[float] = []
    step = Ball.step_

    def noted(self: Ball, iterate: Tensor, gradient: Tensor, alpha: float) -> Tensor:
        taken.append(alpha)
        return step(self, iterate, gradient, alpha)

    monkeypatch.setattr(Ball, "step_", noted)
    attack(x, y)
    assert taken == list(attack.step_sizes)


# Strength and passes, on trained networks


@pytest.fixture(scope="module")
def undefended(data: Digits) -> nn.Module:
    return trained_net(data, width=12, epochs=5)


@pytest.mark.long
def test_early_stop_on_the_undefended_digits_network_needs_an_eighth_of_the_passes(
    undefended: nn.Module, data: Digits
) -> None:
    x, y = data.test_images[:200], data.test_labels[:200]
    fast = FastAttackModel(undefended, dtype=torch.float32)
    found, passes = [], []
    for early_stop in (False, True):
        fast.reset_gradient_stats()
        attack = SafePGD(fast, eps=0.2, steps=50, early_stop=early_stop, generator=seed())
        found.append(broken(undefended, attack(x, y), y))
        passes.append(fast.gradient_stats.samples)
    assert torch.equal(found[0], found[1])
    assert passes[0] >= 50 * len(x)
    assert passes[0] >= 8 * passes[1]


MIDDLING = {"linf": 0.11, "l2": 0.5, "l1": 1.2}


@pytest.mark.long
@pytest.mark.parametrize("network", ["undefended", "robust"])
def test_falling_steps_are_stronger_than_constant_ones(
    network: str, undefended: nn.Module, robust: nn.Module, data: Digits
) -> None:
    """Over all norms and numbers of steps; in one of them a few images of a hundred are chance."""
    net = robust if network == "robust" else undefended
    x, y, fast = data.test_images[:200], data.test_labels[:200], FastAttackModel(net, dtype=torch.float32)
    falling, constant = list[int](), list[int]()
    for norm in NORMS:
        eps = MIDDLING[norm]
        for steps in (3, 10):
            for alpha, found in ((None, falling), (2.5 * eps / steps, constant)):
                attack = SafePGD(fast, eps=eps, norm=norm, steps=steps, alpha=alpha, early_stop=True, generator=seed())
                found.append(int(broken(net, attack(x, y), y).sum()))
    assert all(20 <= count <= 180 for count in falling + constant)
    assert all(ours >= theirs - 7 for ours, theirs in zip(falling, constant, strict=True))
    assert sum(falling) > sum(constant)


HALF = {"linf": 0.008, "l2": 0.08, "l1": 0.35}  # breaks about half of the samples of mixed()


def mixed(n: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, images, and its own predictions for them, of all classes."""
    net, (x, _) = attackable_net(), batch(n)
    return net, x, predict(net, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_early_stop_breaks_the_same_samples_in_every_precision(norm: Norm, dtype: torch.dtype) -> None:
    net, x, y = mixed(16)
    fast = FastAttackModel(net, dtype=dtype)
    for value in range(3):
        found = [
            broken(net, SafePGD(fast, eps=HALF[norm], norm=norm, early_stop=stop, generator=seed(value))(x, y), y)
            for stop in (False, True)
        ]
        assert torch.equal(found[0], found[1])
        assert 3 <= int(found[0].sum()) <= 13


def test_early_stop_changes_nothing_for_those_who_are_left() -> None:
    net, x, y = mixed(24)
    runs = [SafePGD(net, eps=HALF["linf"], steps=8, early_stop=stop, generator=seed())(x, y) for stop in (False, True)]
    left = ~broken(net, runs[0], y)
    assert 4 <= int(left.sum()) <= 18
    # The same iterates; a rounding difference may turn the sign of a gradient that is nearly zero.
    assert ((runs[1] - runs[0]).abs()[left] < 1e-5).double().mean() > 0.98


# Batch sizes


def test_a_batch_that_shrinks_has_few_sizes_and_they_hold_what_is_left() -> None:
    for most in (1, 2, 7, 8, 9, 24, 37, 200, 512):
        sizes = [rows_for(samples, most) for samples in range(1, most + 1)]
        assert all(samples <= size <= most for samples, size in enumerate(sizes, 1))
        assert all(size < 2 * samples for samples, size in enumerate(sizes, 1) if samples >= 8)
        assert 2 ** (len(set(sizes)) - 1) <= most
        assert sizes[-1] == most
    assert {rows_for(n, 200) for n in range(1, 201)} == {8, 16, 32, 64, 128, 200}


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch sizes of all calls of fast models, but of exact looks, for which the twin is run."""
    seen: list[int] = []
    forward = FastAttackModel.forward

    def noted(self: FastAttackModel, x: Tensor) -> Any:
        if self._decisions == "fast" and not self._full_precision:
            seen.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(FastAttackModel, "forward", noted)
    return seen


@pytest.mark.parametrize("engine", ["compile", "cudagraph"])
def test_engines_see_few_batch_sizes_and_break_the_same_samples(
    engine: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x, y = mixed(40)
    plainly = FastAttackModel(net, dtype=torch.float32, engine="eager")
    use_engine(monkeypatch, engine)
    quickly = FastAttackModel(net, dtype=torch.float32)
    found, seen = [], []
    for fast in (plainly, quickly):
        sizes.clear()
        attack = SafePGD(fast, eps=HALF["linf"], steps=8, restarts=2, early_stop=True, generator=seed())
        found.append(attack(x, y))
        seen.append(set(sizes))
    assert quickly.engine == engine
    assert torch.equal(*(broken(net, z, y) for z in found))
    assert ((found[1] - found[0]).abs() < 1e-5).double().mean() > 0.98  # the same steps, up to rounding
    assert seen[1] <= {8, 16, 32, 40}
    assert len(seen[1]) >= 2
    assert not seen[0] <= {8, 16, 32, 40}  # nothing is added where a size costs nothing
    assert plainly.gradient_stats.samples < quickly.gradient_stats.samples <= 2 * plainly.gradient_stats.samples
    assert quickly.gradient_stats.zero == quickly.gradient_stats.nonfinite == 0


def test_the_padding_repeats_a_sample_that_is_not_broken() -> None:
    x = torch.rand(3, 2)
    ball = ball_around("linf", x, eps=0.1)
    targets, broken_ones = Targets.of(torch.tensor([5, 6, 7]), classes=True), torch.tensor([True, True, False])
    pool = Pool(torch.arange(3), targets, ball, x, Best.none(x), broken_ones)
    rows = pool.rows(8)
    assert rows.spread(torch.arange(3)).tolist() == [0, 1, 2, 2, 2, 2, 2, 2]
    assert rows.targets.tree.tolist() == [5, 6, 7, 7, 7, 7, 7, 7]
    assert rows.kept(torch.arange(8)).tolist() == [0, 1, 2]
    part = pool.take(torch.tensor([0, 1]))
    assert part.rows(3).spread(torch.arange(2)).tolist() == [0, 1, 0]
    assert pool.rows(3).spread(x) is x


# Operators


WAIT = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "repeat_interleave")
FREE = ("view", "detach", "unsqueeze", "squeeze", "expand", "slice", "alias", "promote_types")


class Operators(TorchDispatchMode):
    """Counts operators by name, and those that wait for a device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: Counter[str] = Counter()
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indexed = args[1] if name in ("index", "index_put", "index_put_") else ()
        masked = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indexed)
        self.names[name] += name not in FREE
        moved = name == "_to_copy" and (kwargs or {}).get("device", args[0].device) != args[0].device
        self.waits += masked or name in WAIT or moved
        return func(*args, **(kwargs or {}))


def operators_of(work: Callable[[], object]) -> Operators:
    operators = Operators()
    with operators:
        work()
    return operators


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.usefixtures("as_on_a_device")
def test_waits_for_the_device_do_not_depend_on_the_steps(norm: Norm, dtype: torch.dtype, random_start: bool) -> None:
    net, x, y = task(6)
    fast = FastAttackModel(net, dtype=dtype)
    waits = []
    for steps in (1, 1, 6):  # the first call checks the model
        attack = SafePGD(fast, eps=0.02, norm=norm, steps=steps, random_start=random_start, loss="margin")
        waits.append(operators_of(partial(attack, x, y)).waits)
    assert waits[1] == waits[2] > 0


MOST = {"linf": 30, "l2": 46, "l1": 88}  # of the cross entropy
MORE = {"auto": 5, "ce": 0, "margin": 3}


@pytest.mark.parametrize("loss", ["auto", "ce", "margin"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_step_has_few_operators_beside_the_network(norm: Norm, loss: LossName) -> None:
    net, x, y = task(6)
    fast = FastAttackModel(net, dtype=torch.float32)
    view = fast.view(decisions="fast", logits_dtype=torch.float64)
    leaf, ones = x.clone().requires_grad_(), torch.ones(6, 10, dtype=torch.float64)

    def network() -> None:
        torch.autograd.grad(view(leaf), leaf, ones)

    counts = []
    for work in (network, network, *(attack_of(fast, norm, loss, steps, x, y) for steps in (1, 6))):
        counts.append(sum(operators_of(work).names.values()))
    of_network, of_steps = counts[1], (counts[3] - counts[2]) / 5
    assert 0 < of_steps - of_network <= MOST[norm] + MORE[loss]


def attack_of(
    fast: FastAttackModel, norm: Norm, loss: LossName, steps: int, x: Tensor, y: Tensor
) -> Callable[[], Tensor]:
    return partial(SafePGD(fast, eps=0.05, norm=norm, loss=loss, steps=steps, random_start=False), x, y)


def test_candidates_are_kept_in_place() -> None:
    first, second, third = torch.rand(3, 3, 4)
    best = Best.none(first.clone())
    addresses = [t.data_ptr() for t in (best.x, best.adversarial, best.loss)]
    best.offer(second, torch.tensor([True, False, False]), torch.tensor([0.0, 1.0, torch.nan]))
    assert torch.equal(best.x, torch.stack([second[0], second[1], first[2]]))
    best.offer(third, torch.tensor([False, False, True]), torch.tensor([9.0, 0.5, -9.0]))
    assert torch.equal(best.x, torch.stack([second[0], second[1], third[2]]))
    assert best.adversarial.tolist() == [True, False, True]
    assert [t.data_ptr() for t in (best.x, best.adversarial, best.loss)] == addresses


# The larger ball of the first steps in L1


def test_the_ball_shrinks_to_eps_in_l1_alone_and_by_default_alone() -> None:
    found = radii("l1", steps=10, alpha=None)
    assert found[0] == 1 + WIDER
    assert list(found) == sorted(found, reverse=True)
    assert found[5:] == (1.0,) * 5
    assert set(radii("l1", steps=10, alpha=0.1)) == set(radii("l2", steps=10, alpha=None)) == {1.0}
    assert radii("l1", steps=ENOUGH - 1, alpha=None) == (1.0,) * (ENOUGH - 1)
    assert radii("l1", steps=0, alpha=None) == ()


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("restarts", [1, 2])
def test_what_was_seen_outside_of_eps_is_no_candidate(early_stop: bool, restarts: int) -> None:
    """The farther out, the more adversarial; so a candidate from outside would win, and be cut back."""
    net, x, y = task(6)
    looked: list[Tensor] = []
    fast = FastAttackModel(net, dtype=torch.float32)
    fast.register_forward_pre_hook(lambda model, args: looked.append(args[0].detach().clone()))
    eps = 0.05
    attack = SafePGD(fast, eps=eps, norm="l1", steps=8, restarts=restarts, early_stop=early_stop, generator=seed())
    found = attack(x, y)
    wide = [
        x_t for x_t in looked if x_t.shape == x.shape and bool(((x_t - x).abs().flatten(1).sum(1) > 1.01 * eps).any())
    ]
    assert wide, "the test needs iterates outside"
    assert ((found - x).abs().flatten(1).sum(1) <= eps * (1 + 1e-6)).all()
    inside = [
        x_t for x_t in looked if x_t.shape == x.shape and bool(((x_t - x).abs().flatten(1).sum(1) <= 1.01 * eps).all())
    ]
    for row in range(len(x)):
        assert min(float((found[row] - x_t[row]).abs().max()) for x_t in inside) < 1e-5
