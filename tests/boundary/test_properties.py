"""Properties of the boundary over random small networks, losses and faults: scaling is exact, filtering is local."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from hypothesis import assume, event, given, reject
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel, watch_gradients
from fastadv_adapters.boundary.powers import exponent_of, times_power_of_two
from fastadv_adapters.boundary.scaling import LossScale
from fastadv_adapters.modules.notices import FastAttackWarning
from fastadv_adapters.networks.nearness import SHARED
from tests.support.property_tools import (
    FLOAT64,
    TIGHT,
    assert_rows_close,
    in_dtype,
    moves_by,
    peaks,
    rounded_by,
    run,
    untouched,
)
from tests.support.strategies import Draw, Recipe, recipes
from tests.support.tools import cosine

samples = st.integers(1, 4)

# --- the boundary -----------------------------------------------------------------------------------------------------


@given(
    value=st.floats(allow_nan=False, allow_infinity=False, width=32),
    exponent=st.integers(-252, 254),
    wide=st.booleans(),
)
def test_powers_of_two_are_exact(value: float, exponent: int, wide: bool) -> None:
    dtype = torch.float64 if wide else torch.float32
    wanted = math.ldexp(value, exponent)
    assume(value == 0 or torch.finfo(dtype).tiny <= abs(wanted) <= torch.finfo(dtype).max)
    given = torch.tensor([value, 1.0], dtype=dtype)
    found = times_power_of_two(given, torch.tensor([exponent, 0], dtype=torch.int32))
    assert found.tolist() == [wanted, 1.0]
    own = int(exponent_of(given)[0])
    assert 2.0 ** (own - 1) <= abs(value) < 2.0**own if value else own == 0


Loss = Callable[[Tensor], Tensor]


@st.composite
def losses(draw: Draw, samples: int) -> tuple[str, list[float]]:
    """How the batch is reduced, and a factor for each sample."""
    reduction = draw(st.sampled_from(["sum", "mean", "weights"]))
    exponent = st.sampled_from([-30, 30]) | st.integers(-30, 30)
    exponents = draw(st.lists(exponent, min_size=samples, max_size=samples))
    return reduction, [10.0**e if reduction == "weights" else 1.0 for e in exponents]


def loss_of(kind: tuple[str, list[float]], plain_logits: Tensor) -> Loss:
    """A cross entropy, at a temperature at which it does not saturate: else rounding alone would decide."""
    reduction, weights = kind
    temperature = max(float(plain_logits.abs().max()) / 4, 1e-30)
    labels = torch.arange(len(plain_logits)) % plain_logits.shape[1]

    def loss(logits: Tensor) -> Tensor:
        each = F.cross_entropy(logits.double() / temperature, labels, reduction="none")
        total = (each * torch.tensor(weights, dtype=torch.float64)).sum()
        return total / len(each) if reduction == "mean" else total

    return loss


def gradient_of(model: nn.Module, loss: Loss, x: Tensor, way: str = "grad") -> Tensor:
    """The input gradient, by any of the ways in which attacks ask for it."""
    x = x.detach().clone().requires_grad_()
    value = loss(model(x))
    if way == "backward":
        value.backward()
        assert x.grad is not None
        return x.grad
    if way == "twice":
        torch.autograd.grad(-3 * value, x, retain_graph=True)
    return torch.autograd.grad(value, x)[0]


def scaled(recipe: Recipe, gain: float) -> nn.Module:
    """The network with its logits times a gain."""
    net = recipe.build()
    with torch.no_grad():
        for parameter in net.last.parameters():
            parameter.mul_(gain)
    return net


def at_floor(wanted: Tensor, loss_scale: LossScale) -> Tensor:
    """Which samples' gradients are too small for the boundary to hand back their length: (N, 1)."""
    rows = peaks(wanted)
    if loss_scale not in ("per-sample", "per-call"):
        return torch.zeros_like(rows, dtype=torch.bool)
    return (rows if loss_scale == "per-sample" else rows.amax().expand_as(rows)) < 2.0**-99


@given(data=st.data(), recipe=recipes(), samples=samples, way=st.sampled_from(["grad", "backward", "twice"]))
def test_the_boundary_equals_plain_backpropagation_in_float64(
    data: Any, recipe: Recipe, samples: int, way: str
) -> None:
    loss_scale = data.draw(st.sampled_from(["per-sample", "per-call", 1e-3, 2.0**16, None]), label="loss_scale")
    exponents = st.tuples(st.integers(-8, 8), st.integers(-3, 3))
    gain, size = (10.0**e for e in data.draw(exponents, label="exponents of logits and inputs"))
    net, x = scaled(recipe, gain).double(), recipe.inputs(samples) * size
    loss = loss_of(data.draw(losses(samples), label="loss"), net(x).detach())
    wanted = gradient_of(net, loss, x)
    assume(bool((peaks(wanted) > 1e-200).all()))
    assume(bool((moves_by(net, lambda moved: gradient_of(moved, loss, x), wanted, digits=2.0**-48) < TIGHT / 4).all()))
    fast = FastAttackModel(net, loss_scale=loss_scale, **FLOAT64)
    with untouched(net):
        found = gradient_of(fast, loss, x, way)
    assert found.is_contiguous()
    small = at_floor(wanted, loss_scale)
    event(f"a sample at the floor: {bool(small.any())}")
    assert_rows_close(found.flatten(1) / peaks(found), wanted.flatten(1) / peaks(wanted))
    assert ((peaks(found) / peaks(wanted) - 1).abs() < TIGHT)[~small].all()
    if loss_scale == "per-sample":
        assert ((peaks(found) >= 2.0**-100) & (peaks(found) < 2.0**-98))[small].all()
    assert fast.gradient_stats[:4] == (1 + (way == "twice"), samples * (1 + (way == "twice")), 0, 0)


# A gradient that moves further when each weight does so in its last digit, or what the way back needs, is rounding in
# that dtype.
MOVES = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.1}
# A network that takes more than that away from a gradient on the way back leaves the range of the dtype, scale or not.
CARRIES = {torch.float32: 1e-30, torch.bfloat16: 1e-30, torch.float16: 1e-6}
NEAR = {torch.float32: 0.99999, torch.bfloat16: 0.9, torch.float16: 0.98}


@given(data=st.data(), recipe=recipes(smooth=True), samples=samples, dtype=st.sampled_from(list(NEAR)))
def test_no_sample_loses_its_gradient_in_lower_precision(
    data: Any, recipe: Recipe, samples: int, dtype: torch.dtype
) -> None:
    net, x = recipe.build(), recipe.inputs(samples).float()
    plain = copy.deepcopy(net).double()
    loss = loss_of(data.draw(losses(samples), label="loss"), plain(x.double()).detach())
    wanted = gradient_of(plain, loss, x.double())
    assume(bool((peaks(wanted) > 1e-200).all()))

    def gradient(net: nn.Module) -> Tensor:
        return gradient_of(net, loss, x.double())

    assume(bool((moves_by(plain, gradient, wanted, digits=torch.finfo(dtype).eps) < MOVES[dtype]).all()))
    assume(bool((rounded_by(plain, gradient, wanted, dtype) < MOVES[dtype]).all()))
    logits = plain(x.double()).detach().requires_grad_()
    # Half precision rounds away the differences of logits that share most of their size; the audit says so.
    differences = logits - logits.mean(1, keepdim=True)
    assume(dtype == torch.float32 or bool((peaks(differences) > SHARED * peaks(logits)).all()))
    assume(bool((peaks(wanted) > CARRIES[dtype] * peaks(torch.autograd.grad(loss(logits), logits)[0])).all()))
    fast = FastAttackModel(net, dtype=dtype, logits_dtype=torch.float64, engine="eager")
    with untouched(net):
        found = gradient_of(fast, loss, x)
    assert (cosine(found, wanted) > NEAR[dtype]).all()
    assert fast.gradient_stats == (1, samples, 0, 0, 0)


# --- the filter -------------------------------------------------------------------------------------------------------


class Spoil(torch.autograd.Function):
    """Identity whose backward pass writes a value into some samples."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: list[int], value: float, place: int) -> Tensor:
        ctx.rows, ctx.value, ctx.place = rows, value, place
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        grad.view(len(grad), -1)[ctx.rows, ctx.place % grad[0].numel()] = ctx.value
        return grad, None, None, None


class Fault(nn.Module):
    """A place where a test spoils gradients. What is spoilt is no part of the model's state, as in real faults."""

    rows: ClassVar[list[int]] = []
    value: ClassVar[float] = 0.0
    place: ClassVar[int] = 0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Spoil.apply(x, Fault.rows, Fault.value, Fault.place)  # type: ignore[no-untyped-call]
        return out

    @classmethod
    @contextmanager
    def in_rows(cls, rows: set[int], value: float, place: int) -> Iterator[None]:
        """Spoil one entry of these samples in all passes inside the block."""
        cls.rows, cls.value, cls.place = sorted(rows), value, place
        try:
            yield
        finally:
            cls.rows = []


@given(
    data=st.data(),
    recipe=recipes(),
    samples=st.integers(2, 5),
    value=st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    loss_scale=st.sampled_from(["per-sample", "per-call", 2.0**6, None]),
)
def test_the_filter_touches_only_the_samples_that_are_broken(
    data: Any, recipe: Recipe, samples: int, value: float, dtype: torch.dtype, loss_scale: LossScale
) -> None:
    rows = data.draw(st.sets(st.integers(0, samples - 1), min_size=1, max_size=samples - 1), label="rows")
    place = data.draw(st.integers(0, 100), label="place")
    net, x = in_dtype(recipe, samples, dtype)
    net.stages.insert(data.draw(st.integers(0, len(recipe.stages)), label="stage"), Fault())
    fast = FastAttackModel(net, dtype=dtype, loss_scale=loss_scale, engine="eager")
    with untouched(net):
        try:
            whole = run(fast, x)[1]
        except FastAttackWarning:  # of the audit: gradients that cancel to nothing in half precision
            reject()
        with Fault.in_rows(rows, value, place), watch_gradients() as watch:
            found = run(fast, x)[1]
    with Fault.in_rows(rows, value, place):
        entries = ~run(net, x)[1].isfinite()
    others = [row for row in range(samples) if row not in rows]
    assert watch.spoilt is not None
    spoilt = watch.spoilt.tolist()
    event(f"spoilt samples: {sum(spoilt)}")
    assert torch.equal(found[others], whole[others])
    assert not any(spoilt[row] for row in others)
    assert found.isfinite().all()
    assert fast.gradient_stats.nonfinite == sum(spoilt)
    if dtype == torch.float64:  # in others rounding may choose another maximum, and so other ways back
        assert spoilt == entries.flatten(1).any(1).tolist()
        assert (found[entries] == 0).all()
