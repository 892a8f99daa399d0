"""The balls of the three norms: budgets hold to the last bit, starts are uniform, steps and projections are right."""

import math
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from fastadv_adapters.attack import Norm
from fastadv_adapters.attack import balls as norms
from fastadv_adapters.attack.balls import Ball, ball_around
from fastadv_adapters.attack.rounding import toward

NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")
ORDER = {"linf": math.inf, "l2": 2, "l1": 1}
NARROW = (torch.float32, torch.float16, torch.bfloat16)  # distances between these are exact in float64
DTYPES = (*NARROW, torch.float64)

settings = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)
budgets = st.sampled_from((0.0, 8 / 255, 0.3, 1.0)) | st.floats(1e-9, 50.0)
ranges = st.sampled_from(((0.0, 1.0), (-1.0, 1.0), (-2.1, 0.3), (0.0, 255.0), (-math.inf, math.inf)))


def samples(shape: tuple[int, ...], bounds: tuple[float, float], dtype: torch.dtype, seed: int) -> Tensor:
    """Values all over the range, a third of them at one of its ends."""
    lower, upper = (torch.tensor(max(-3.0, min(3.0, b)) if math.isinf(b) else b, dtype=dtype) for b in bounds)
    generator = torch.Generator().manual_seed(seed)
    share = (torch.rand(shape, generator=generator) * 1.5 - 0.25).clamp(0, 1)
    return (lower + share.to(dtype) * (upper - lower)).clamp(lower, upper)


def length(norm: Norm, delta: Tensor) -> Tensor:
    flat: Tensor = torch.linalg.vector_norm(delta.double().flatten(1), ORDER[norm], 1)
    return flat


def assert_inside(norm: Norm, x: Tensor, origin: Tensor, eps: float, bounds: tuple[float, float]) -> None:
    assert x.dtype == origin.dtype
    assert x.shape == origin.shape
    lower, upper = (torch.tensor(b, dtype=x.dtype) for b in bounds)
    assert bool(((x >= lower) & (x <= upper)).all())
    allowed = eps if norm == "linf" else eps * (1 + 1e-6)
    assert (length(norm, x.double() - origin.double()) <= allowed).all()


def walk(ball: Ball, seed: int, alpha: float, *, steps: int = 3) -> Tensor:
    """A random start and some steps along gradients of very different size."""
    generator = torch.Generator().manual_seed(seed)
    x = ball.random_start(generator)
    for exponent in (-100, 0, 60)[:steps]:
        gradient = torch.randn(x.shape, generator=generator).clamp(-1, 1) * 2.0**exponent
        ball.step_(x, gradient * (torch.rand(x.shape, generator=generator) > 0.3), alpha)
    return x


@settings
@given(st.integers(0, 4), shapes, st.sampled_from(DTYPES), st.sampled_from(NORMS), budgets, ranges, st.integers(0, 99))
@example(n=1, shape=(1,), dtype=torch.float64, norm="l2", eps=2.0, bounds=(-2.1, 0.3), seed=0)  # sums past a bound
def test_no_walk_leaves_the_budget_or_the_bounds(
    n: int, shape: tuple[int, ...], dtype: torch.dtype, norm: Norm, eps: float, bounds: tuple[float, float], seed: int
) -> None:
    origin = samples((n, *shape), bounds, dtype, seed)
    before = origin.clone()
    ball = ball_around(norm, origin, eps=eps, bounds=bounds)
    for alpha in (0.0, eps / 3, 2 * eps, 1e30):
        assert_inside(norm, ball.finish(walk(ball, seed, alpha)), origin, eps, bounds)
    assert torch.equal(origin, before)


@settings
@given(shapes, st.sampled_from(NARROW), st.sampled_from(NORMS), budgets, ranges, st.integers(0, 99))
@example(shape=(1,), dtype=torch.float32, norm="l2", eps=2.0, bounds=(-2.1, 0.3), seed=1)
def test_the_budget_holds_where_there_is_no_float64(
    shape: tuple[int, ...], dtype: torch.dtype, norm: Norm, eps: float, bounds: tuple[float, float], seed: int
) -> None:
    origin = samples((3, *shape), bounds, dtype, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "has_float64", lambda device: False)
        ball = ball_around(norm, origin, eps=eps, bounds=bounds)
        x = ball.finish(walk(ball, seed, eps / 2))
    assert_inside(norm, x, origin, eps, bounds)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_linf_uses_the_budget_to_the_last_representable_value(dtype: torch.dtype) -> None:
    eps = 8 / 255
    origin = samples((4, 50), (-1.0, 1.0), dtype, 0)
    ball = ball_around("linf", origin, eps=eps, bounds=(-1, 1))
    x = ball.finish(ball.step_(ball.start(), torch.ones(4, 50), 1.0))
    one_more = torch.nextafter(x, torch.full_like(x, torch.inf))
    assert bool((((one_more.double() - origin.double()) > eps) | (one_more > 1)).all())
    if dtype == torch.float32:  # where rounding to nearest goes over the budget for some
        assert bool((((origin.double() + eps).float().double() - origin.double()) > eps).any())


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_rounding_toward_the_origin_is_at_most_one_value_off(dtype: torch.dtype) -> None:
    origin = samples((1, 400), (-1.0, 1.0), dtype, 1)
    delta = torch.randn(1, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 0.1
    delta[0, :50] = -origin[0, :50].double()  # to zero exactly, from either side
    found = toward(origin, delta)
    assert bool(((found.double() - origin.double()).abs() <= delta.abs()).all())
    outward = torch.nextafter(found, found + delta.sign().to(dtype))
    assert bool(
        (((outward.double() - origin.double()).abs() > delta.abs()) | (found == origin + delta.to(dtype))).all()
    )
    narrow = toward(origin, delta.float())
    assert bool(narrow.isfinite().all())
    assert bool(((narrow.double() - origin.double()).abs() <= delta.float().double().abs()).all())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("exponent", [-100, 0, 100])
def test_only_the_direction_of_a_gradient_matters(norm: Norm, exponent: int) -> None:
    origin = samples((5, 3, 4, 4), (0.0, 1.0), torch.float32, 0)
    gradient = torch.randn(origin.shape, generator=torch.Generator().manual_seed(1))
    ball = ball_around(norm, origin, eps=0.5)
    x = ball.step_(ball.start(), gradient * 2.0**exponent, 0.2)
    torch.testing.assert_close(x, ball.step_(ball.start(), gradient, 0.2))
    assert (length(norm, x - origin) > 0.09).all()


@pytest.mark.parametrize("norm", NORMS)
def test_a_zero_gradient_moves_nothing(norm: Norm) -> None:
    origin = samples((3, 7), (0.0, 1.0), torch.float32, 0)
    gradient = torch.zeros(3, 7)
    gradient[1] = 1.0
    ball = ball_around(norm, origin, eps=0.5)
    x = ball.step_(ball.start(), gradient, 0.2)
    assert torch.equal(x[[0, 2]], origin[[0, 2]])
    assert not torch.equal(x[1], origin[1])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_small_steps_add_up_in_half_precision(norm: Norm, dtype: torch.dtype) -> None:
    origin = torch.full((2, 6), 0.75, dtype=dtype)
    gradient = torch.zeros(2, 6, dtype=dtype)
    gradient[:, 0] = 1e-4
    ball, x = ball_around(norm, origin, eps=0.1), torch.full((2, 6), 0.75)
    for _ in range(200):
        x = ball.step_(x, gradient, 1e-3)  # less than half the distance between two bfloat16 values here
    assert (ball.finish(x)[:, 0] > 0.84).all()
    assert x.dtype == torch.float32


def test_l2_projection_scales_what_is_outside_and_leaves_what_is_inside() -> None:
    origin = torch.full((2, 4), 0.5)
    delta = torch.tensor([[0.3, 0.0, 0.4, 0.0], [0.03, 0.0, 0.04, 0.0]])
    x = ball_around("l2", origin, eps=0.25).project_(origin + delta)
    torch.testing.assert_close(x - origin, delta * torch.tensor([[0.5], [1.0]]))


def l1_projection_by_bisection(delta: Tensor, low: Tensor, high: Tensor, eps: float) -> Tensor:
    """An independent slow path: the cut at which the clamped perturbations add up to eps."""
    lower, upper = torch.zeros(len(delta), 1, dtype=torch.float64), delta.abs().amax(1, keepdim=True)
    for _ in range(200):
        cut = (lower + upper) / 2
        size = (delta.sign() * (delta.abs() - cut).clamp_min(0)).clamp(low, high)
        over = size.abs().sum(1, keepdim=True) > eps
        lower, upper = torch.where(over, cut, lower), torch.where(over, upper, cut)
    return (delta.sign() * (delta.abs() - upper).clamp_min(0)).clamp(low, high)


@settings
@given(st.integers(1, 12), st.floats(0.01, 5.0), st.floats(0.01, 3.0), st.integers(0, 999))
def test_l1_projection_is_the_nearest_point_of_ball_and_bounds(d: int, eps: float, size: float, seed: int) -> None:
    origin = samples((4, d), (0.0, 1.0), torch.float64, seed)
    delta = torch.randn(4, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * size
    expected = l1_projection_by_bisection(delta, -origin, 1 - origin, eps)
    x = ball_around("l1", origin, eps=eps).project_(origin + delta)
    torch.testing.assert_close(x, origin + expected, atol=1e-9, rtol=0)


def test_an_l1_step_spends_alpha_on_the_largest_gradients_and_passes_over_full_coordinates() -> None:
    origin = torch.tensor([[0.5, 1.0, 0.9, 0.5, 0.0]])
    gradient = torch.tensor(
        [[-3.0, 9.0, 5.0, 1.0, -8.0]]
    )  # the second and the last stand at the bound they would cross
    ball = ball_around("l1", origin, eps=1.0)
    x = ball.step_(ball.start(), gradient, 0.4)
    torch.testing.assert_close(x - origin, torch.tensor([[-0.25, 0.0, 0.1, 0.05, 0.0]]))


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_random_starts_are_uniform_in_the_ball(norm: Norm) -> None:
    origin = torch.full((4000, 3), 0.5, dtype=torch.float64)
    x = ball_around(norm, origin, eps=0.1).random_start(torch.Generator().manual_seed(0))
    share = (length(norm, x - origin) / 0.1) ** 3  # the volume within: uniform
    assert abs(share.mean().item() - 0.5) < 0.02
    assert abs(share.var().item() - 1 / 12) < 0.01
    assert float((x - origin).mean(0).abs().max()) < 0.002
    assert 0.45 < (x > origin).double().mean().item() < 0.55


def test_random_starts_of_linf_are_uniform_between_the_limits() -> None:
    origin = torch.zeros(2000, 3, dtype=torch.float64)  # half of the ball is out of bounds
    x = ball_around("linf", origin, eps=0.1).random_start(torch.Generator().manual_seed(0))
    assert abs(x.mean().item() - 0.05) < 0.002
    assert float(x.max()) > 0.0995


@pytest.mark.parametrize("norm", NORMS)
def test_a_generator_repeats_and_a_subset_is_what_it_was(norm: Norm) -> None:
    origin = samples((6, 2, 5), (0.0, 1.0), torch.float32, 3)
    ball = ball_around(norm, origin, eps=0.2)
    first = walk(ball, 5, 0.05)
    assert torch.equal(first, walk(ball, 5, 0.05))
    assert not torch.equal(first, walk(ball, 6, 0.05))
    index = torch.tensor([4, 1])
    part, gradient = ball.take(index), torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(0))
    whole = ball.finish(ball.step_(first.clone(), gradient, 0.1))
    assert torch.equal(part.finish(part.step_(first[index], gradient[index], 0.1)), whole[index])


@pytest.mark.parametrize("norm", NORMS)
def test_memory_layouts_and_layouts_of_gradients_do_not_matter(norm: Norm) -> None:
    origin = samples((3, 3, 4, 5), (0.0, 1.0), torch.float32, 0)
    gradient = torch.randn(origin.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        ball = ball_around(norm, origin.contiguous(memory_format=layout), eps=0.7)
        results.append(ball.finish(ball.step_(ball.start(), gradient, 0.5)))
    torch.testing.assert_close(results[0], results[1], atol=1e-7, rtol=0)


@pytest.mark.parametrize("norm", ["l0", "Linf", 2, ["l2"], None])
def test_an_unknown_norm_is_a_clear_error(norm: Any) -> None:
    with pytest.raises(ValueError, match=r"expected norm to be one of 'linf', 'l2', 'l1', got .*Choose"):
        ball_around(norm, torch.zeros(1, 2), eps=0.1)
