"""What the reference implementation of AutoAttack looks at in a model before it attacks, and while it does.

It takes a model whose forwards differ for a randomised defence, one that computes gradients in a forward for a dynamic
one, warns of outputs that are probabilities, of too few classes for its losses, and of samples without gradient
(github.com/fra31/auto-attack, autoattack/checks.py). A fast model must look like the plain network that it stands for.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel
from tests.support.tools import attackable_net, batch, head_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRADIENT_FUNCTIONS = ("grad", "backward", "_make_grads")
"""Names of functions that a forward pass of a model that defends itself at test time would call."""

Make = Callable[[], nn.Module]


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    asked: torch.dtype = request.param
    return asked


@pytest.fixture(params=["auto", "exact"])
def fast(request: pytest.FixtureRequest, dtype: torch.dtype, untouched: None) -> FastAttackModel:
    """A fast model that has never been run; the wrapped one must be the same at the end."""
    return FastAttackModel(attackable_net(), dtype=dtype, decisions=request.param)


# --- randomised? ------------------------------------------------------------------------------------------------------


def spread(model: nn.Module, x: Tensor, *, with_gradient: bool = False) -> float:
    """How far the logits of five forwards are apart, as directions: the largest distance of any two of them."""
    with torch.set_grad_enabled(with_gradient):
        runs = torch.stack([model(x.clone().requires_grad_(with_gradient)).detach().flatten(1) for _ in range(5)])
    directions = F.normalize(runs.double(), dim=2)
    return float((directions[:, None] - directions[None]).norm(dim=3).max())


@pytest.mark.parametrize("with_gradient", [False, True])
def test_repeated_forwards_agree(fast: FastAttackModel, with_gradient: bool) -> None:
    x, y = batch(8)
    assert spread(fast, x, with_gradient=with_gradient) <= 1e-4
    rights = {int((fast(x).argmax(1) == y).sum()) for _ in range(3)}
    assert len(rights) == 1


def test_forwards_agree_before_and_after_gradients(fast: FastAttackModel) -> None:
    x, _ = batch(8)
    with torch.no_grad():
        before = fast(x)
    torch.autograd.grad(fast(x.requires_grad_()).sum(), x)
    with torch.no_grad():
        assert torch.equal(fast(x), before)


class Noisy(nn.Module):
    """A randomised defence."""

    def __init__(self) -> None:
        super().__init__()
        self.net = attackable_net()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x + 0.1 * torch.rand_like(x))
        return out


def test_a_randomised_model_is_still_seen_to_be_one(dtype: torch.dtype) -> None:
    x, _ = batch(8)
    assert spread(FastAttackModel(Noisy(), dtype=dtype), x) > 1e-4


# --- dynamic? ---------------------------------------------------------------------------------------------------------


@contextmanager
def traced(install: Callable[[Any], None], before: Any, trace: Any) -> Iterator[None]:
    install(trace)
    try:
        yield
    finally:
        install(before)


def gradient_calls(model: nn.Module, x: Tensor) -> Counter[str]:
    """Which functions named like those that compute gradients one forward calls, in Python or in C."""
    calls: Counter[str] = Counter()

    def note(frame: Any, event: str, argument: Any) -> None:
        name = {"call": frame.f_code.co_name, "c_call": getattr(argument, "__name__", "")}.get(event, "")
        if name in GRADIENT_FUNCTIONS or name == "run_backward":
            calls[name] += 1

    # The reference traces, which sees Python's functions; a profiler sees those written in C as well.
    with traced(sys.setprofile, sys.getprofile(), note):
        model(x)
    with traced(sys.settrace, sys.gettrace(), note):
        model(x)
    return calls


def test_a_forward_without_gradient_calls_nothing_that_computes_gradients(fast: FastAttackModel) -> None:
    assert gradient_calls(fast, batch(4)[0]) == {}, "the very first forward"
    with torch.no_grad():
        assert gradient_calls(fast, batch(4)[0]) == {}


def weights_changed(net: nn.Sequential) -> None:
    with torch.no_grad():
        head_of(net).weight.mul_(1.5)


def layer_replaced(net: nn.Sequential) -> None:
    net[-1] = nn.Linear(16, 7)


@pytest.mark.parametrize("change", [weights_changed, layer_replaced], ids=lambda change: change.__name__)
def test_nor_does_one_that_follows_a_change_or_a_gradient(
    change: Callable[[nn.Sequential], None], dtype: torch.dtype
) -> None:
    net, (x, _) = attackable_net(), batch(4)
    fast = FastAttackModel(net, dtype=dtype)
    leaf = x.clone().requires_grad_()
    torch.autograd.grad(fast(leaf).sum(), leaf)
    assert gradient_calls(fast, x) == {}
    change(net)
    assert gradient_calls(fast, x) == {}


def test_fast_decisions_look_at_gradients_once_at_the_first_forward(dtype: torch.dtype) -> None:
    fast, (x, _) = FastAttackModel(attackable_net(), dtype=dtype, decisions="fast"), batch(4)
    assert spread(fast, x) <= 1e-4  # which the reference looks at first
    assert gradient_calls(fast, x) == {}


class Dynamic(nn.Module):
    """A defence that moves its input along a gradient of its own."""

    def __init__(self, *, by_method: bool) -> None:
        super().__init__()
        self.net, self.by_method = attackable_net(), by_method

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            moved = x.detach().clone().requires_grad_()
            entropy = self.net(moved).logsumexp(1).sum()
            if self.by_method:
                entropy.backward(inputs=[moved])
            step = moved.grad if self.by_method else torch.autograd.grad(entropy, moved)[0]
        out: Tensor = self.net(x + 0.01 * step)  # type: ignore[operator]
        return out


@pytest.mark.parametrize("by_method", [False, True])
def test_a_dynamic_model_is_still_seen_to_be_one(by_method: bool) -> None:
    fast = FastAttackModel(Dynamic(by_method=by_method), dtype=torch.float32)
    assert gradient_calls(fast, batch(4)[0]).keys() & set(GRADIENT_FUNCTIONS)


# --- logits? ----------------------------------------------------------------------------------------------------------


def are_probabilities(output: Tensor) -> bool:
    return bool((output >= -1e-5).all() and (output <= 1 + 1e-5).all() and ((output.sum(1) - 1).abs() < 1e-5).all())


@pytest.mark.parametrize("with_gradient", [False, True])
def test_outputs_are_logits_of_all_classes(fast: FastAttackModel, with_gradient: bool) -> None:
    x, _ = batch(8)
    logits = fast(x.requires_grad_(with_gradient)).detach()
    assert (logits.shape, logits.dtype) == ((8, 10), torch.float32)
    assert not are_probabilities(logits)
    assert logits.isfinite().all()
    top = logits.topk(2, dim=1).values
    assert (top[:, 0] > top[:, 1]).all(), "rounding must not make two classes equal"
    # The difference-of-logits-ratio losses want more than two classes, the targeted one more than three.
    assert logits.shape[1] > 3
    assert set(logits.argmax(1).tolist()) <= set(range(10))


def test_a_model_that_ends_in_a_softmax_is_still_seen_to_do_so(dtype: torch.dtype) -> None:
    fast = FastAttackModel(nn.Sequential(*attackable_net(), nn.Softmax(dim=1)), dtype=dtype)
    with torch.no_grad():
        assert are_probabilities(fast(batch(8)[0]))


# --- zero gradients? --------------------------------------------------------------------------------------------------


def difference_of_logits_ratio(logits: Tensor, y: Tensor) -> Tensor:
    """The DLR loss of Croce and Hein 2020, https://arxiv.org/abs/2003.01690, summed."""
    ranked = logits.sort(dim=1, descending=True).values
    own = logits.gather(1, y[:, None])[:, 0]
    other = torch.where(logits.argmax(1) == y, ranked[:, 1], ranked[:, 0])
    return -((own - other) / (ranked[:, 0] - ranked[:, 2] + 1e-12)).sum()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": lambda logits, y: F.cross_entropy(logits, y, reduction="none").sum(),
    "mean ce": F.cross_entropy,
    "tiny ce": lambda logits, y: F.cross_entropy(logits, y) * 1e-12,
    "dlr": difference_of_logits_ratio,
}


def without_gradient(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> int:
    """How many samples have a gradient of zero, looked at as the reference does: through a view."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(model(x), y), x)
    return int((gradient.view(len(x), -1).abs().sum(1) == 0).sum())


@pytest.mark.parametrize("name", LOSSES)
def test_no_sample_is_without_gradient(fast: FastAttackModel, name: str) -> None:
    x, _ = batch(8)
    y = fast(x).argmax(1)
    assert without_gradient(fast, LOSSES[name], x, y) == 0
    assert without_gradient(fast, LOSSES[name], x.to(memory_format=torch.channels_last), y) == 0
    assert fast.gradient_stats[2:] == (0, 0, 0)


class Confident(nn.Module):
    """Saturates the cross entropy in float32 and not in float64: exp underflows at -104 and at -745."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.net = attackable_net()
        with torch.no_grad():
            top = self.net(x).topk(2, dim=1).values
        self.factor = 600 / float((top[:, 0] - top[:, 1]).max())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x) * self.factor
        return out


def test_no_sample_of_a_confident_model_is_without_gradient_in_float64_logits(dtype: torch.dtype) -> None:
    x, _ = batch(8)
    net = Confident(x).eval()
    y = net(x).argmax(1)
    assert without_gradient(net, F.cross_entropy, x, y) > 0, "the test needs a model that saturates in float32"
    fast = FastAttackModel(net, dtype=dtype, logits_dtype=torch.float64)
    assert [without_gradient(fast, F.cross_entropy, x, y) for _ in range(3)] == [0, 0, 0]
