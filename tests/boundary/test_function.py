"""The boundary: exact scaling, filtering, counting, and every way of calling a backward pass."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel, FastAttackWarning, GradientStats, watch_gradients
from fastadv_adapters.boundary import DeviceState, HostState
from fastadv_adapters.boundary.powers import exponent_of, times_power_of_two
from fastadv_adapters.boundary.scaling import FLOOR, START
from fastadv_adapters.networks import half
from tests.support.tools import batch, cosine, head_of, input_gradient, reference, settle, small_net

FLOAT32: Any = {"dtype": torch.float32}
pytestmark = pytest.mark.usefixtures("untouched")


@pytest.fixture(autouse=True, params=[HostState, DeviceState])
def state(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What holds for one way to keep exponents and counts holds for the other."""
    monkeypatch.setattr("fastadv_adapters.networks.pair.state_on", request.param)
    return request.param


class Injected(torch.autograd.Function):
    """Identity whose backward pass writes a value into some samples."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: list[int], value: float) -> Tensor:
        ctx.rows, ctx.value = rows, value
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad = grads[0].clone()
        for row in ctx.rows:
            grad[row, 0, 0, 0] = ctx.value
        return grad, None, None


class Faulty(nn.Module):
    """A network with a fault in its backward pass."""

    def __init__(self, rows: list[int], value: float) -> None:
        super().__init__()
        self.net, self.rows, self.value = small_net(), rows, value

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(Injected.apply(x, self.rows, self.value))  # type: ignore[no-untyped-call]
        return out


def smooth_net(activation: nn.Module) -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), activation, nn.Flatten(), nn.Linear(4 * 64, 5), activation
    )
    return settle(net)


def test_powers_of_two_are_exact_over_the_whole_range() -> None:
    values = torch.tensor([1.0, 1.5, 2.0**-149, 2.0**-130, 1.9 * 2.0**127])
    assert exponent_of(values).tolist() == [1, 1, -148, -129, 128]
    up = times_power_of_two(torch.full((250,), 2.0**-149), torch.arange(250, dtype=torch.int32))
    assert torch.equal(up.double(), torch.ldexp(torch.ones(250).double(), torch.arange(250) - 149))
    down = times_power_of_two(torch.full((200,), 2.0**100), -torch.arange(200, dtype=torch.int32))
    assert torch.equal(down.double(), torch.ldexp(torch.ones(200).double(), 100 - torch.arange(200)))
    wide = times_power_of_two(torch.tensor([1e-320], dtype=torch.float64), torch.tensor([1000], dtype=torch.int32))
    assert wide.item() == 1e-320 * 2.0**500 * 2.0**500


@pytest.mark.parametrize("exponent", [-30, -6, 0, 9, 30])
def test_scaling_changes_nothing_but_underflow(exponent: int) -> None:
    net, (x, y) = small_net(), batch()
    weights = 10.0 ** torch.linspace(exponent, -exponent, len(x)).double()
    losses = lambda logits, y: (F.cross_entropy(logits, y, reduction="none") * weights).sum()  # noqa: E731
    expected = input_gradient(reference(net), x.double(), y, losses)
    found = input_gradient(FastAttackModel(net, **FLOAT32, logits_dtype=torch.float64), x, y, losses)
    norms = expected.flatten(1).norm(dim=1)
    inside = (norms > 1e-29) & (norms < 1e36)
    assert inside.any()
    assert (cosine(found, expected) > 0.9999).all()
    assert torch.allclose(found.double()[inside], expected[inside], rtol=1e-3, atol=1e-4 * float(norms[inside].min()))


def test_a_gradient_at_an_input_in_float16_has_a_floor_of_its_own() -> None:
    net, (x, y) = small_net(), batch()

    def tiny(logits: Tensor, y: Tensor) -> Tensor:
        return (F.cross_entropy(logits, y, reduction="none") * 1e-30).sum()

    found = input_gradient(FastAttackModel(net, **FLOAT32), x.half(), y, tiny)
    peaks = found.float().flatten(1).abs().amax(1)
    assert ((peaks >= 2.0**-10) & (peaks < 2.0**-8)).all()
    assert (cosine(found, input_gradient(reference(net), x.double(), y)) > 0.98).all()


def test_a_gradient_below_float32_comes_back_at_the_floor_with_its_direction() -> None:
    net, (x, y) = small_net(), batch()
    tiny = lambda logits, y: (F.cross_entropy(logits, y, reduction="none") * 1e-60).sum()  # noqa: E731
    fast = FastAttackModel(net, **FLOAT32, logits_dtype=torch.float64)
    found, expected = input_gradient(fast, x, y, tiny), input_gradient(reference(net), x.double(), y, tiny)
    peaks = found.flatten(1).abs().amax(1)
    assert ((peaks >= 2.0**-100) & (peaks < 2.0**-99)).all()
    assert (cosine(found, expected) > 0.9999).all()


@pytest.mark.parametrize("loss_scale", ["per-sample", "per-call", 256.0, None])
def test_every_loss_scale_gives_the_same_gradient_in_float32(loss_scale: Any) -> None:
    net, (x, y) = small_net(), batch()
    found = input_gradient(FastAttackModel(net, **FLOAT32, loss_scale=loss_scale), x, y)
    expected = input_gradient(reference(net), x.double(), y)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor", [1e-12, 1.0, 1e6])
def test_half_precision_loses_no_sample(dtype: torch.dtype, factor: float) -> None:
    net, (x, y) = small_net(), batch(4)
    scaled = lambda logits, y: F.cross_entropy(logits, y) * factor  # noqa: E731
    fast = FastAttackModel(net, dtype=dtype)
    found = input_gradient(fast, x, y, scaled)
    assert (cosine(found, input_gradient(reference(net), x.double(), y)) > 0.98).all()
    assert fast.gradient_stats == GradientStats(passes=1, samples=4, nonfinite=0, zero=0, nonfinite_logits=0)


def test_without_loss_scale_half_precision_underflows() -> None:
    net, (x, y) = small_net(), batch(4)
    tiny = lambda logits, y: F.cross_entropy(logits, y) * 1e-9  # noqa: E731
    fast = FastAttackModel(net, dtype=torch.float16, loss_scale=None)
    with pytest.warns(FastAttackWarning, match="4 of 4 samples have no gradient"):  # and the audit puts in better ones
        assert input_gradient(fast, x, y, tiny).count_nonzero() > 0
    assert fast.gradient_stats.zero >= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_broken_samples_are_zeroed_and_counted_and_leave_the_others_alone(dtype: torch.dtype, value: float) -> None:
    x, y = batch(5)
    fast, whole = FastAttackModel(Faulty([1, 3], value), dtype=dtype), FastAttackModel(Faulty([], 0.0), dtype=dtype)
    with watch_gradients() as watch:
        found = input_gradient(fast, x, y)
    expected = input_gradient(whole, x, y)
    assert torch.equal(found[[0, 2, 4]], expected[[0, 2, 4]])
    assert found.isfinite().all()
    broken_entries = found != expected
    assert broken_entries.flatten(1).sum(1).tolist() == [0, 1, 0, 1, 0]
    assert watch.spoilt is not None
    assert watch.spoilt.tolist() == [False, True, False, True, False]
    assert fast.gradient_stats[:3] == (1, 5, 2)


def test_watches_are_off_outside_their_block() -> None:
    fast, (x, y) = FastAttackModel(Faulty([0], float("nan")), **FLOAT32), batch(3)
    with watch_gradients() as watch:
        assert watch.spoilt is None
    input_gradient(fast, x, y)
    assert watch.spoilt is None


class Steep(nn.Module):
    """A network whose gradients grow beyond float16 on the way back."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.net, self.gain = small_net(), gain

    def forward(self, x: Tensor) -> Tensor:
        scale = self.gain**0.5
        out: Tensor = self.net(x) * scale * scale
        return out


def test_overflow_lowers_the_scale_until_it_is_gone_and_update_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half, "lost", lambda gradient, full: False)  # so that it begins too high
    net = small_net()
    head = head_of(net)
    with torch.no_grad():
        head.weight.mul_(5e4 / head.weight.abs().max())
    fast, (x, _) = FastAttackModel(net, dtype=torch.float16), batch(3)
    total = lambda logits, y: (logits * torch.linspace(-1, 1, 10)).sum()  # noqa: E731
    nonfinite = []
    for _ in range(12):
        fast.reset_gradient_stats()
        found = input_gradient(fast, x, x, total)
        nonfinite.append(fast.gradient_stats.nonfinite)
    assert nonfinite[0] > 0, "the test needs a network that overflows at the start"
    assert nonfinite[-1] == 0
    assert FLOOR <= int(fast._networks.state.exponent) < START
    assert (cosine(found, input_gradient(reference(net), x.double(), x, total)) > 0.98).all()
    before = int(fast._networks.state.exponent)
    fast.update()
    assert int(fast._networks.state.exponent) == before


def test_nan_that_no_scale_cures_leaves_the_scale_where_it_was() -> None:
    fast, (x, y) = FastAttackModel(Faulty([0], float("nan")), dtype=torch.float16), batch(2)
    exponents = []
    for _ in range(12):
        input_gradient(fast, x, y)
        exponents.append(int(fast._networks.state.exponent))
    assert min(exponents) == FLOOR
    assert exponents[-3:] == [START] * 3


def test_retain_graph_and_several_passes() -> None:
    net, (x, y) = small_net(), batch()
    x.requires_grad_()
    logits = FastAttackModel(net, **FLOAT32)(x)
    loss = F.cross_entropy(logits, y)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x, retain_graph=True)
    (other,) = torch.autograd.grad(logits.sum(), x)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x)


def test_a_retained_graph_is_recomputed_where_pytorch_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C._autograd, "_get_current_graph_task_keep_graph", raising=False)
    x, y = batch()
    x.requires_grad_()
    loss = F.cross_entropy(FastAttackModel(small_net(), **FLOAT32, engine="eager")(x), y)  # compiled code asks it too
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(first, torch.autograd.grad(loss, x)[0])


def test_backward_accumulates_into_the_input_alone() -> None:
    net, (x, y) = small_net(), batch()
    x.requires_grad_()
    fast = FastAttackModel(net, **FLOAT32)
    F.cross_entropy(fast(x), y).backward()
    assert x.grad is not None
    assert x.grad.is_contiguous()
    assert all(p.grad is None for p in net.parameters())
    once = x.grad.clone()
    F.cross_entropy(fast(x), y).backward()
    torch.testing.assert_close(x.grad, 2 * once)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.Softplus()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_order_equals_float64(activation: nn.Module, dtype: torch.dtype) -> None:
    net, (x, y) = smooth_net(activation), batch(3)
    y = y % 5

    def curvature(model: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.pow(2).sum(), x)
        return second

    found, expected = curvature(FastAttackModel(net, dtype=dtype), x), curvature(reference(net), x.double())
    assert (cosine(found, expected) > (0.9999 if dtype == torch.float32 else 0.99)).all()


def test_gradcheck_in_float64() -> None:
    net = settle(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.GELU(), nn.Linear(5, 3))).double()
    fast = FastAttackModel(net, dtype=torch.float64, logits_dtype=torch.float64)
    x = torch.rand(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fast, x, eps=1e-6, atol=1e-5)
    assert torch.autograd.gradgradcheck(fast, x, eps=1e-6, atol=1e-5)


def test_batched_gradients() -> None:
    net, (x, _) = small_net(), batch()
    x.requires_grad_()
    directions = torch.eye(10)[:, None].expand(10, len(x), 10)
    (found,) = torch.autograd.grad(FastAttackModel(net, **FLOAT32)(x), x, directions, is_grads_batched=True)
    (expected,) = torch.autograd.grad(copy.deepcopy(net).eval()(x), x, directions, is_grads_batched=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own, on first use of jvp
def test_function_transforms_and_forward_mode_run_the_twin() -> None:
    net, (x, y) = small_net(), batch()
    fast, plain = FastAttackModel(net, dtype=torch.bfloat16), copy.deepcopy(net).eval()

    def loss(model: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: F.cross_entropy(model(x), y)

    torch.testing.assert_close(torch.func.grad(loss(fast))(x), torch.func.grad(loss(plain))(x))
    torch.testing.assert_close(torch.func.vmap(fast)(x[:, None]), plain(x)[:, None], rtol=1e-4, atol=1e-5)
    tangent = torch.ones_like(x)
    torch.testing.assert_close(torch.func.jvp(fast, (x,), (tangent,)), torch.func.jvp(plain, (x,), (tangent,)))


class TwoByTwo(nn.Module):
    """Two inputs, two outputs in a dict, one of them not differentiable."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, a: Tensor, *, b: Tensor, scale: float = 1.0) -> dict[str, Any]:
        logits = self.left(a) * scale + self.right(b).tanh()
        return {"logits": logits, "pair": (logits.exp(), logits.argmax(1)), "name": "two by two"}


def test_several_inputs_and_outputs() -> None:
    net = TwoByTwo()
    fast = FastAttackModel(net, **FLOAT32)
    a, b = torch.rand(3, 4, requires_grad=True), torch.rand(3, 5, requires_grad=True)
    ours, theirs = fast(a, b=b, scale=2.0), net(a, b=b, scale=2.0)
    assert ours["name"] == "two by two"
    assert torch.equal(ours["pair"][1], theirs["pair"][1])
    picks: list[Any] = [lambda o: o["logits"].sum(), lambda o: o["pair"][0].sum()]
    for pick in (*picks, lambda o: (o["logits"] * o["pair"][0]).sum()):
        found = torch.autograd.grad(pick(ours), (a, b), retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(pick(theirs), (a, b), retain_graph=True))


class Pooled(nn.Module):
    """One output for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x).tanh().mean(0)
        return out


def test_outputs_without_a_batch_dimension_are_scaled_as_one() -> None:
    net, x = Pooled(), torch.rand(5, 4, requires_grad=True)
    (found,) = torch.autograd.grad(FastAttackModel(net, dtype=torch.bfloat16)(x).sum(), x)
    (expected,) = torch.autograd.grad(net(x).sum(), x)
    assert (cosine(found, expected) > 0.99).all()


def test_an_update_between_forward_and_backward_is_an_error() -> None:
    fast, (x, y) = FastAttackModel(small_net(), **FLOAT32), batch()
    x.requires_grad_()
    loss = F.cross_entropy(fast(x), y)
    fast.update()
    with pytest.raises(RuntimeError, match=r"was updated in between.*Run the forward pass again"):
        loss.backward()


def test_exact_decisions_have_the_twins_values_and_the_fast_gradients() -> None:
    net, (x, y) = small_net(), batch(3)
    fast = FastAttackModel(net, dtype=torch.float16)
    exact = fast.view(decisions="exact")
    x.requires_grad_()
    plain = copy.deepcopy(net).eval()
    assert torch.equal(exact(x), plain(x))
    assert not torch.equal(fast(x), plain(x))
    with torch.no_grad():
        assert torch.equal(exact(x), plain(x))
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-6)
        assert not torch.equal(fast.view(decisions="fast")(x), plain(x))
    found = input_gradient(exact, x, y)
    assert (cosine(found, input_gradient(reference(net), x.double(), y)) > 0.98).all()
    full = input_gradient(fast.view(full_precision=True), x, y)
    torch.testing.assert_close(full, input_gradient(plain, x, y))


def test_nonfinite_logits_are_counted() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    nn.init.constant_(net[0].weight, 3e38)  # type: ignore[arg-type]
    fast = FastAttackModel(net, **FLOAT32)
    fast(torch.tensor([[0.0, 0.0], [5.0, 5.0]]).requires_grad_())
    assert fast.gradient_stats.nonfinite_logits == 1
    fast.reset_gradient_stats()
    assert fast.gradient_stats == (0, 0, 0, 0, 0)
    with torch.no_grad():
        fast(torch.tensor([[0.0, 0.0], [5.0, 5.0]]))
    assert fast.gradient_stats == (0, 0, 0, 0, 1), "without gradient too"


def test_what_runs_on_the_twin_is_not_counted() -> None:
    fast, (x, y) = FastAttackModel(small_net(), **FLOAT32), batch(3)
    leaf = x.clone().requires_grad_()
    torch.autograd.grad(F.cross_entropy(fast(leaf), y), leaf, create_graph=True)
    torch.autograd.grad(fast(leaf), leaf, torch.eye(10)[:, None].expand(10, 3, 10), is_grads_batched=True)
    torch.func.grad(lambda x: F.cross_entropy(fast(x), y))(x)
    assert fast.gradient_stats[:4] == (0, 0, 0, 0)


def test_a_backward_pass_after_the_block_is_watched_if_its_forward_pass_was_inside() -> None:
    fast, (x, y) = FastAttackModel(Faulty([0], float("nan")), **FLOAT32), batch(3)
    with watch_gradients() as watch:
        loss = F.cross_entropy(fast(x.requires_grad_()), y)
    assert watch.spoilt is None
    loss.backward()
    assert vars(watch)["spoilt"].tolist() == [True, False, False]


def test_one_watch_takes_one_batch_size() -> None:
    fast = FastAttackModel(small_net(), **FLOAT32)
    with watch_gradients():
        input_gradient(fast, *batch(4))
        with pytest.raises(ValueError, match=r"expected passes of 4 samples inside .*, got one of 3"):
            input_gradient(fast, *batch(3))


class Steepness(nn.Module):
    """Divides its logits by how fast they grow along the diagonal, which forward-mode differentiation tells."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.way = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)), way

    def forward(self, x: Tensor) -> Tensor:
        ones = torch.ones_like(x)
        if self.way == "jvp":
            found: Any = torch.func.jvp(self.layers, (x,), (ones,))
            logits, slopes = found
        elif self.way == "dual":
            with forward_ad.dual_level():
                logits, slopes = forward_ad.unpack_dual(self.layers(forward_ad.make_dual(x, ones)))
        else:
            logits = self.layers(x)
            total = lambda z: self.layers(z).sum(0)  # noqa: E731
            options: Any = {"strategy": "forward-mode", "vectorize": True}
            slopes = torch.autograd.functional.jacobian(total, x, **options).sum(2).T
        divided: Tensor = logits / (1 + slopes.square())
        return divided


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by PyTorch's own code for jvp, at first
@pytest.mark.parametrize("decisions", ["exact", "fast"])
@pytest.mark.parametrize("way", ["jvp", "dual", "jacobian"])
def test_forward_mode_inside_the_model_is_what_it_is(way: str, decisions: Any) -> None:
    model, x, y = Steepness(way).eval(), torch.rand(3, 6), torch.arange(3)
    fast = FastAttackModel(model, decisions=decisions, **FLOAT32)
    torch.testing.assert_close(fast(x.clone().requires_grad_()), model(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(input_gradient(fast, x, y), input_gradient(model, x, y), rtol=1e-4, atol=1e-6)
