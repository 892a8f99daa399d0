"""SafePGD when something breaks: NaN in the backward pass, logits that overflow, a fast network that is wrong."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from fastadv_adapters.attack import Norm
from fastadv_adapters.attack.safe_pgd import SafePGD
from fastadv_adapters.model import FastAttackModel
from fastadv_adapters.networks import Kind
from tests.attack.test_balls import NORMS, assert_inside
from tests.attack.test_safe_pgd import EPS, broken, margin, seed, task

pytestmark = pytest.mark.usefixtures("untouched")


class Spoil(torch.autograd.Function):
    """The identity, whose gradient is spoilt for some samples: in half precision, or always."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, rows: Tensor, value: float, always: bool) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.value, ctx.always = value, always  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors  # type: ignore[attr-defined]
        if ctx.always or grad.dtype == torch.float16:  # type: ignore[attr-defined]
            grad = torch.where(rows.view(-1, *(1,) * (grad.ndim - 1)), ctx.value, grad)  # type: ignore[attr-defined]
        return grad, None, None, None


class Spoilt(nn.Module):
    """A network that spoils the gradient of images whose first pixel is bright."""

    def __init__(self, net: nn.Module, value: float, *, always: bool = False) -> None:
        super().__init__()
        self.first, self.rest = net[0], net[1:]  # type: ignore[index]
        self.value, self.always = value, always

    def forward(self, x: Tensor) -> Any:
        return self.rest(Spoil.apply(self.first(x), x[:, 0, 0, 0] > 0.5, self.value, self.always))  # type: ignore[no-untyped-call]


def marked_task(n: int = 12) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """As ``task``, and which images are marked for a spoilt gradient; a budget of 0.2 cannot change the mark.

    The self-check sees the first four, which are not.
    """
    net, x, _ = task(n)
    rows = (torch.arange(n) % 3 == 1) & (torch.arange(n) >= 4)
    x[:, 0, 0, 0] = torch.where(rows, 0.75, 0.25)
    with torch.no_grad():
        return net, x, net(x).argmax(1), rows


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("norm", NORMS)
def test_spoilt_samples_are_attacked_again_in_full_precision(
    norm: Norm, value: float, early_stop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Kind, "loses_more", lambda *_: False)  # as on CUDA, where they are not run again at once
    net, x, y, rows = marked_task()
    settings: dict[str, Any] = {"eps": EPS[norm] * 1.3, "norm": norm, "early_stop": early_stop, "steps": 5}
    fast = FastAttackModel(Spoilt(net, value), dtype=torch.float16)
    found = SafePGD(fast, **settings, generator=seed())(x, y)
    assert fast.gradient_stats.nonfinite > 0
    if not early_stop:
        assert fast.gradient_stats.samples >= 5 * (len(x) + int(rows.sum())), "each was attacked once more"
    assert_inside(norm, found, x, settings["eps"], (0, 1))
    expected = SafePGD(net, **settings, generator=seed())(x, y)
    assert int(broken(net, expected, y)[rows].sum()) >= 2
    assert torch.equal(broken(net, found, y)[rows], broken(net, expected, y)[rows])
    # The same starts and gradients; a rounding difference may turn the sign of one that is nearly zero.
    assert ((found - expected).abs()[rows] < 1e-3).double().mean() > 0.98


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_gradients_that_nothing_cures_give_the_best_candidate_and_leave_others_alone(
    norm: Norm, early_stop: bool
) -> None:
    net, x, y, rows = marked_task()
    runs = [
        SafePGD(model, eps=EPS[norm], norm=norm, steps=4, loss="margin", early_stop=early_stop, generator=seed())(x, y)
        for model in (Spoilt(net, math.nan, always=True), net)
    ]
    assert_inside(norm, runs[0], x, EPS[norm], (0, 1))
    assert torch.equal(runs[0][~rows], runs[1][~rows])
    assert not torch.equal(runs[0][rows], runs[1][rows])
    assert bool((margin(net, runs[0], y) >= margin(net, x, y) - 1e-6).all())


class Liar(nn.Module):
    """A network whose decisions are wrong in half precision."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        z = self.net(x)
        return z - 100 * (z == z.amax(1, keepdim=True)) if z.dtype == torch.float16 else z


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_only_exact_decisions_count(norm: Norm, early_stop: bool) -> None:
    net, x, y = task(12)
    settings: dict[str, Any] = {"eps": EPS[norm] * 1.3, "norm": norm, "early_stop": early_stop, "steps": 6}
    found = SafePGD(FastAttackModel(Liar(net), dtype=torch.float16), **settings, generator=seed())(x, y)
    expected = SafePGD(net, **settings, generator=seed())(x, y)
    assert int(broken(net, expected, y).sum()) >= 2
    assert torch.equal(broken(net, found, y), broken(net, expected, y))


def test_an_overflow_in_a_function_before_the_model_leaves_finite_images() -> None:
    net, x, y = task(4)
    for norm in NORMS:
        attack = SafePGD(net, eps=0.1, steps=2, norm=norm)
        attack.before = lambda t: t * 1e30 * 1e-30
        assert bool(attack(x, y).isfinite().all())
        attack.before = lambda t: (t * 1e38) * 1e3 * 1e-38
        assert bool(attack(x, y).isfinite().all())


def test_a_model_that_gives_nan_gives_the_inputs_back() -> None:
    net, x, y = task(4)

    class Nan(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z * math.nan

    for early_stop in (False, True):
        assert torch.equal(SafePGD(nn.Sequential(net, Nan()), eps=0.1, steps=2, early_stop=early_stop)(x, y), x)


class SpoilOnce(torch.autograd.Function):
    """The identity, whose gradient is NaN for images whose first pixel is bright, in one backward pass."""

    armed = False

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x[:, 0, 0, 0] > 0.5)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors  # type: ignore[attr-defined]
        armed, SpoilOnce.armed = SpoilOnce.armed, False
        return torch.where(rows[:, None, None, None], math.nan, grad) if armed else grad


class SpoiltOnce(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return self.net(SpoilOnce.apply(x))  # type: ignore[no-untyped-call]


@pytest.mark.filterwarnings("ignore:SafePGD. eps")  # next to nothing, on purpose
@pytest.mark.parametrize("dropped", [0, 3, 8])
def test_what_is_spoilt_in_the_step_in_which_others_are_dropped_is_attacked_again(
    dropped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x, y, rows = marked_task()
    wrong = rows.logical_not().nonzero()[:dropped, 0]
    y[wrong] = (y[wrong] + 1) % 10  # from the start
    fast = FastAttackModel(SpoiltOnce(net), dtype=torch.float32, engine="eager")
    attack = SafePGD(fast, eps=1e-6, steps=4, early_stop=True, random_start=False)
    attack(x, y)  # checks the model
    fast.reset_gradient_stats()
    monkeypatch.setattr(SpoilOnce, "armed", True)
    attack(x, y)
    left = len(x) - dropped
    first = len(x) if 3 * left >= 2 * len(x) else left
    assert fast.gradient_stats.samples == first + 3 * left + 4 * int(rows.sum())
