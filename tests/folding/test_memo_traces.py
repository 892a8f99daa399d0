"""Code that writes without a trace, starts graphs of its own, or has shapes that its weights decide."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel
from tests.folding.test_memo import HandsItOut, Layer, equal, fast_of, inputs, kept
from tests.support.tools import cosine, input_gradient


class Odd(nn.Module):
    """A layer with a mask."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3))
        self.register_buffer("mask", torch.tensor([1.0, 0, 1, 0, 1, 1, 0, 1]))


class Chosen(Odd):
    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x.mean((2, 3)), self.weight)
        return x + x[:, self.mask.nonzero()[:, 0]].sum(1, keepdim=True)


class ByNumpy(Odd):
    def forward(self, x: Tensor) -> Tensor:
        scale = torch.zeros_like(self.mask)
        scale.numpy()[:] += 2
        return F.linear(x.mean((2, 3)), self.weight) * scale


class ByDataOfAView(Odd):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * 2
        weight.view(-1).data.mul_(3)
        return F.linear(x.mean((2, 3)), weight)


class OwnGraph(Odd):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            scale = self.mask.detach().clone().requires_grad_()
            (scale**2).sum().backward()
        assert scale.grad is not None
        return F.linear(x.mean((2, 3)), self.weight) * scale.grad


@pytest.mark.parametrize("kind", [Chosen, ByNumpy, ByDataOfAView, OwnGraph])
def test_is_right_before_and_after_an_update(kind: type[Odd]) -> None:
    model = nn.Sequential(kind(), nn.Linear(8, 10)).double().eval()
    fast = fast_of(model)
    equal(fast, model)
    mask = model.get_buffer("0.mask")
    with torch.no_grad():
        mask.zero_()
        mask[2] = 1  # one is left, whose index would broadcast
    fast.update()
    equal(fast, model)


class Adapts(nn.Module):
    """Normalises by running statistics that each pass moves, which no version counts."""

    mean: Tensor
    var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        scale = self.var.add(1e-5).rsqrt()  # kept as long as nobody writes
        F.batch_norm(x.detach(), self.mean, self.var, training=True, momentum=0.5)
        return (x - self.mean.view(-1, 1, 1)).mean((2, 3)) * scale


class Observes(Odd):
    """Rounds its weight by a range that each pass moves, as training with quantisation in mind does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("on", torch.ones(1, dtype=torch.long))
        for name, value in (("least", -1.0), ("most", 1.0), ("scale", 1.0)):
            self.register_buffer(name, torch.tensor([value]))
        self.register_buffer("zero", torch.zeros(1, dtype=torch.int))

    def forward(self, x: Tensor) -> Tensor:
        statistics = [self.get_buffer(name) for name in ("least", "most", "scale", "zero")]
        on = self.get_buffer("on")
        observe: Any = torch.fused_moving_avg_obs_fake_quant
        weight: Tensor = observe(self.weight, on, on, *statistics, 0.3, 0, 15, 0, False, False)
        return F.linear(x.mean((2, 3)), weight) * self.get_buffer("scale").mul(2)


@pytest.mark.parametrize("kind", [Adapts, Observes])
def test_running_statistics_are_read_anew(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(), nn.Linear(8, 10)).eval()
    same, x = copy.deepcopy(model), torch.rand(4, 3, 6, 6)
    fast = FastAttackModel(model, dtype=torch.float32, decisions="fast")
    for _ in range(4):
        leaf = x.clone().requires_grad_()
        torch.testing.assert_close(fast(leaf), same(x))


class Transformed(Layer):
    """A gradient inside, of a layer whose weight is computed."""

    def energy(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight - self.weight.mean(1, keepdim=True)).tanh().sum()

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class ByGrad(Transformed):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x + torch.func.grad(self.energy)(x), self.weight)


class ByVjp(Transformed):
    def forward(self, x: Tensor) -> Tensor:
        found: Any = torch.func.vjp(self.energy, x)
        total, pull = found
        return F.linear(x + pull(torch.ones_like(total))[0], self.weight)


class ByJacobian(Transformed):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x + torch.vmap(torch.func.jacrev(self.energy))(x), self.weight)


@pytest.mark.parametrize("kind", [ByGrad, ByVjp, ByJacobian])
def test_what_is_computed_in_a_transform_is_not_kept(kind: type[Transformed]) -> None:
    torch.manual_seed(0)
    model, (x, y) = kind().double().eval(), inputs()
    fast = fast_of(model)
    for _ in range(2):
        for _ in range(2):
            torch.testing.assert_close(input_gradient(fast, x, y), input_gradient(model, x, y))
        with torch.no_grad():
            model.weight.mul_(0.9)
    assert not fast._networks.notes


class CountsInABuffer(Layer):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return F.linear(x, torch.tanh(self.weight))


def test_a_buffer_that_each_pass_computes_from_the_last_one_is_kept_once() -> None:
    model, (x, y) = CountsInABuffer().double().eval(), inputs()
    fast, wanted = fast_of(model), input_gradient(copy.deepcopy(model), x, y)
    for _ in range(20):
        torch.testing.assert_close(input_gradient(fast, x, y), wanted)
    assert len(kept(fast)) == 2, "the weight, and what the buffer of the last update became"


class Complex(nn.Module):
    """A weight of a Fourier layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(6, 6, dtype=torch.complex64)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.fft.ifft(F.linear(torch.fft.fft(x), self.weight)).real)
        return logits


def test_complex_weights_stay_complex_in_half_precision() -> None:
    torch.manual_seed(0)
    model, (x, y) = Complex().eval(), inputs()
    fast = fast_of(model, dtype=torch.bfloat16)
    assert cosine(input_gradient(fast, x.float(), y), input_gradient(model, x.float(), y)).min() > 0.99
    assert fast._networks.precision.dtype == torch.bfloat16
    assert not fast._networks.notes


class SetsAGain(nn.Module):
    """Writes into a buffer of a layer past its version, in a module with too many parts to be looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest = Gained(), nn.ModuleList(nn.Linear(4, 4) for _ in range(16))

    def forward(self, x: Tensor) -> Tensor:
        self.first.seen.data.fill_(1 + x.detach().mean())
        logits: Tensor = self.rest[0](self.first(x))
        return logits


class Gained(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.tanh(self.weight) * self.seen)


def test_a_write_without_a_trace_that_no_mode_sees() -> None:
    torch.manual_seed(0)
    model, (x, y) = SetsAGain().double().eval(), inputs()
    fast = fast_of(model)
    for factor in (1, -2, 3, 3):
        found, wanted = (input_gradient(of, factor * x, y) for of in (fast, copy.deepcopy(model)))
        torch.testing.assert_close(found, wanted)
    assert "past PyTorch's records into its buffers" in fast.summary()


class HandsOut(nn.Module):
    """Hands out what a layer computes of its weights, in a module with too many parts to be looked at."""

    def __init__(self, take: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.rest, self.take = HandsItOut(), nn.ModuleList(nn.Linear(4, 4) for _ in range(16)), take

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, table = self.first(x)
        return self.rest[0](x), self.take(table)


TAKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda table: table,
    "detached": Tensor.detach,
    "a detached part": lambda table: table.detach()[1:].T,
    "its data": lambda table: table.data,
    "as other numbers": lambda table: table.detach().view(torch.int64),
    "by its storage": lambda table: torch.empty(0, dtype=table.dtype).set_(table.detach()),  # type: ignore[call-overload]
}


@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("take", TAKEN)
def test_what_a_caller_has_got_stays_as_it_is_at_an_update(take: str, with_gradient: bool) -> None:
    torch.manual_seed(0)
    model, (x, _) = HandsOut(TAKEN[take]).double().eval(), inputs()
    fast = FastAttackModel(model, dtype=torch.float64, logits_dtype=torch.float64, decisions="fast")
    for _ in range(2):
        for _ in range(2):  # what is kept is handed out from the second pass on
            found, wanted = (m(x.clone().requires_grad_(with_gradient))[1].detach() for m in (fast, model))
            torch.testing.assert_close(found, wanted)
        before = found.clone()
        with torch.no_grad():
            model.first.weight.mul_(0.9)
        fast.update()
        assert torch.equal(found, before)
