"""What modules compute from weights alone is kept between updates, followed in place, and right whatever code does."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.profiler import ProfilerActivity, profile

from fastadv_adapters import FastAttackModel
from fastadv_adapters.folding import kept as kept_results
from fastadv_adapters.folding.memo import Memo
from fastadv_adapters.folding.remembering import Remembering
from tests.support.agreement import train_a_step
from tests.support.computed import MODELS, ScaledStdConv2d, StdLinear
from tests.support.engines import use_engine
from tests.support.tools import batch, cosine, input_gradient, settle

OF_WEIGHTS = {"aten::batch_norm", "aten::_weight_norm", "aten::linalg_vector_norm", "aten::std", "aten::index"}
OF_WEIGHTS |= {"aten::flip", "aten::dot", "aten::vdot", "aten::mv", "aten::linalg_householder_product"}


def model_of(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = settle(MODELS[kind]()).eval().to(dtype)
    model(batch()[0].to(dtype))  # the older kinds set their weight when they are called
    return model


def fast_of(model: nn.Module, **options: Any) -> FastAttackModel:
    return FastAttackModel(
        model,
        **{"dtype": torch.float64, "decisions": "fast", "logits_dtype": torch.float64, "engine": "eager", **options},
    )


def network_of(fast: FastAttackModel) -> nn.Module:
    return fast._networks.folded.network


def memo_of(fast: FastAttackModel) -> Memo:
    return next(refresh for refresh in fast._networks.folded.refreshes if isinstance(refresh, Memo))


def kept(fast: FastAttackModel) -> list[Tensor]:
    """What is kept and more than a view."""
    return [t for one in memo_of(fast)._kept.values() if one is not None and not one.is_view for t in one.writes]


def equal(fast: FastAttackModel, model: nn.Module) -> None:
    """Values and gradients as those of the model in eval mode, in a first pass and in a later one."""
    training = model.training
    x, y = batch()
    x = x.double()
    for _ in range(2):
        found = input_gradient(fast, x, y)
        with torch.no_grad():
            values = fast(x)
            expected = model.eval()(x)
        torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found, input_gradient(model, x, y), rtol=1e-9, atol=1e-12)
    model.train(training)


def operators(fast: FastAttackModel) -> set[str]:
    x, y = batch()
    network = network_of(fast)
    with profile(activities=[ProfilerActivity.CPU]) as record:
        input_gradient(network, x.to(next(network.parameters()).dtype), y)
    return {event.key for event in record.key_averages()}


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_values_and_gradients_are_right_and_followed_in_place(kind: str) -> None:
    model = model_of(kind, torch.float64)
    fast, (x, _) = fast_of(model), batch()
    equal(fast, model)
    assert not OF_WEIGHTS & operators(fast)
    addresses, before = [t.data_ptr() for t in kept(fast)], [t.clone() for t in kept(fast)]
    assert addresses
    for _ in range(2):
        train_a_step(model, x.double())
        fast.update()
        assert not all(now.equal(old) for now, old in zip(kept(fast), before, strict=True)), "already by the update"
        equal(fast, model)
    assert [t.data_ptr() for t in kept(fast)] == addresses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(kind: str, dtype: torch.dtype) -> None:
    model, (x, y) = model_of(kind), batch()
    fast = fast_of(model, dtype=dtype)
    for _ in range(2):
        assert cosine(input_gradient(fast, x, y), input_gradient(model, x, y)).min() > 0.98
    assert fast._networks.precision.dtype == dtype
    assert not any("half precision" in note or "folded" in note for note in fast._networks.notes)


@pytest.mark.parametrize("kind", ["ScaledStdConv2d", "positions", "old spectral norm of products"])
def test_recordings_read_what_updates_compute(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_engine(monkeypatch, "cudagraph")
    model = model_of(kind, torch.float64)
    fast, (x, _) = fast_of(model, engine="auto"), batch()
    for _ in range(3):
        equal(fast, model)
        train_a_step(model, x.double())
    assert fast.engine == ("eager" if "old" in kind else "cudagraph"), "a recording calls no hooks"


def test_a_replaced_parameter_is_followed() -> None:
    model = model_of("ScaledStdConv2d", torch.float64)
    fast = fast_of(model)
    equal(fast, model)
    layer: Any = model[0]  # type: ignore[index]
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))
    layer.gain = nn.Parameter(torch.rand_like(layer.gain))
    equal(fast, model)


def test_without_automatic_updates_all_is_of_the_last_one() -> None:
    model = model_of("ScaledStdConv2d", torch.float64)
    fast, (x, y) = fast_of(model, auto_update=False), batch()
    before = input_gradient(fast, x.double(), y)
    train_a_step(model, x.double())
    assert input_gradient(fast, x.double(), y).equal(before)
    fast.update()
    equal(fast, model)


def test_in_half_precision_weights_are_cast_and_laid_out_once() -> None:
    model = nn.Sequential(ScaledStdConv2d(3, 64, 3), ScaledStdConv2d(64, 128, 3), nn.Flatten(1), StdLinear(2048, 10))
    fast = fast_of(model.eval(), dtype=torch.bfloat16)
    x, y = batch()
    for _ in range(2):
        assert cosine(input_gradient(fast, x, y), input_gradient(model, x, y)).min() > 0.99
    cast = [t for t in kept(fast) if t.dtype == torch.bfloat16]
    assert [t.ndim for t in cast] == [4, 4], "the last layer hands out full precision"
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in cast)


def test_a_weight_under_autocast_is_computed_again_as_it_was() -> None:
    model: Any = settle(nn.Sequential(nn.Flatten(), parametrizations.spectral_norm(nn.Linear(192, 10)))).eval()
    fast, (x, y) = fast_of(model, dtype=torch.float32), batch()
    input_gradient(fast, x, y)
    train_a_step(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast.update()
    assert cosine(input_gradient(fast, x, y), input_gradient(model.eval(), x, y)).min() > 0.9999


def test_autocast_of_ones_own_leaves_float64_as_it_is() -> None:
    class Lowered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return F.linear(x, self.weight.tanh())

    model, (x, y) = Lowered().double(), inputs()
    assert torch.equal(input_gradient(fast_of(model), x, y), input_gradient(model, x, y))


def test_modules_without_such_code_run_as_they_are() -> None:
    fast = fast_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10)).eval())
    assert not any(isinstance(part, Remembering) for part in network_of(fast).modules())
    assert not any(isinstance(refresh, Memo) for refresh in fast._networks.folded.refreshes)


def test_a_module_that_computes_nothing_is_left_alone_after_two_passes() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight)

    fast = fast_of(Plain().double())
    for _ in range(3):
        fast(inputs()[0].requires_grad_())
    network: Any = network_of(fast)
    assert network.use_of_memo.passes_without == 2


# --- code that does more than compute ---------------------------------------------------------------------------------

BATCH = 5


class Layer(nn.Module):
    """A linear layer, a buffer, and a forward to be written."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.register_buffer("seen", torch.ones(4, 6))
        self.drop = nn.Dropout(0.5)
        self.factor, self.mode = 2.0, "square"
        self.settings = {"factor": 2.0}


class Draws(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.tanh(self.weight) + torch.rand_like(self.weight))


@torch.library.custom_op("fastadv_tests::jitter", mutates_args=())
def jitter(weight: Tensor) -> Tensor:
    return weight + float(numpy.random.rand())  # noqa: NPY002 - what operators do


class DrawsFromNumPy(Layer):
    """By an operator that is written in Python."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, jitter(self.weight))


class WritesIntoABuffer(Layer):
    def forward(self, x: Tensor) -> Tensor:
        self.seen.mul_(1.5)
        return F.linear(x, torch.tanh(self.weight) * self.seen)


class WritesByAnOperator(Layer):
    def forward(self, x: Tensor) -> Tensor:
        seen = self.seen
        seen *= 1.5
        return F.linear(x, torch.tanh(self.weight) * seen)


class WritesIntoWhatItComputed(Layer):
    def forward(self, x: Tensor) -> Tensor:
        scale = torch.tanh(self.weight)[:, 0].expand(len(x), 4)
        out = F.linear(x, self.weight)
        scale = torch.cat((scale, scale))[: x.shape[0]]
        scale += out
        return scale


class AddsToWhatItComputed(Layer):
    def forward(self, x: Tensor) -> Tensor:
        scale = torch.tanh(self.weight)
        scale += x.mean()
        return F.linear(x, scale)


class SetsAnAttribute(Layer):
    def forward(self, x: Tensor) -> Tensor:
        self.factor = self.factor * 1.5
        return F.linear(x, torch.tanh(self.weight) * self.factor)


class ReadsADictionary(Layer):
    def forward(self, x: Tensor) -> Tensor:
        self.settings["factor"] *= 1.5
        return F.linear(x, torch.tanh(self.weight) * self.settings["factor"])


class MakesTwoAlike(Layer):
    def forward(self, x: Tensor) -> Tensor:
        sums, counts = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        sums.add_(x.detach().mean())
        return F.linear(x, self.weight + sums) + counts.sum()


class ChoosesARow(Layer):
    row: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("row", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        row: Tensor = self.weight[self.row].exp()
        return F.linear(x * row, self.weight)


class TakesTheFirstRows(ChoosesARow):
    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = self.weight[: self.row + 1].square()
        return F.linear(x, self.weight) * rows.sum()


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class HasAFunction(Layer):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Twice.apply(x)  # type: ignore[no-untyped-call]
        return F.linear(out, torch.tanh(self.weight))


class CutsTheGradient(Layer):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            middle = x.mean(1, keepdim=True)
        return F.linear(x - middle, torch.tanh(self.weight))


class LooksAtTheGradientMode(Layer):
    def forward(self, x: Tensor) -> Tensor:
        factor = 3.0 if torch.is_grad_enabled() else 5.0
        return F.linear(x, torch.tanh(self.weight) * factor) * (factor - 2)


class LooksAtTheType(Layer):
    def forward(self, x: Any) -> Tensor:
        weight = torch.tanh(self.weight)
        return F.linear(x, weight) if isinstance(x, Tensor) else F.linear(x[0], 0 * weight)


class HandsItOut(Layer):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, self.weight), torch.tanh(self.weight)


class HandsOutAView(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.weight)[None].expand(x.shape[0], 4, 6)


class MakesATensor(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.tanh(self.weight) * torch.linspace(0, 1, 6, dtype=torch.float64))


class Counted(Layer):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Counted.calls += 1
        return F.linear(x, torch.tanh(self.weight))


class Ending(nn.Module):
    """Adds up in place whatever a layer has given, and tells what it got apart."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        out = out if isinstance(out, Tensor) else F.linear(x, out[1].sinh_()) + out[0]
        out = out if out.ndim == 2 else (out.clone() * x[:, None]).sum(-1)
        return out * out.abs().sqrt()


class WritesPastTheVersions(Layer):
    def forward(self, x: Tensor) -> Tensor:
        self.seen.data.mul_(1.5)
        return F.linear(x, torch.tanh(self.weight) * self.seen.exp())


class ReplacesItsBuffer(Layer):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen * 1.5
        return F.linear(x, torch.tanh(self.weight) * self.seen)


class FillsWhatIsEmpty(Layer):
    def forward(self, x: Tensor) -> Tensor:
        weight = torch.empty_like(self.weight)
        weight[:2], weight[2:] = self.weight[:2].tanh(), self.weight[2:].sin() * len(x)
        return F.linear(x, weight)


class WritesByOut(Layer):
    def forward(self, x: Tensor) -> Tensor:
        torch.mul(self.seen, 1.5, out=self.seen)
        return F.linear(x, torch.tanh(self.weight) * self.seen)


class LooksAtGradients(Layer):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(F.linear(z, self.weight.tanh()).sum(), z)
        return F.linear(x, self.weight.tanh()) + slope.sum(1, keepdim=True)


class TellsOneFromTrue(Layer):
    def forward(self, x: Tensor) -> Tensor:
        weights = [self.weight.mul(True), self.weight.mul(1), self.weight.mul(1.0), self.weight.mul(-0.0)]
        signs = [float(1 / w[0, 0].detach()) for w in (weights[3], self.weight.mul(0.0))]
        assert signs[0] == -signs[1]
        return F.linear(x, sum(weights, self.weight))


class BySizes(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.tanh() ** len(x)) + self.weight.sum(1)[:4].expand(len(x), 4)


class TurnsAList(Layer):
    """Takes the columns in several orders: one list, turned from one to the next."""

    def forward(self, x: Tensor) -> Tensor:
        order, weights = list(range(6)), list[Tensor]()
        for _ in range(3):
            weights.append(self.weight[:, order] * (1 + len(weights)))
            order.append(order.pop(0))
        return F.linear(x, sum(weights, self.weight))


class TakesFromAList(Layer):
    """What an operator returns is a list."""

    def forward(self, x: Tensor) -> Tensor:
        parts, out = torch.ops.aten.split.Tensor(self.weight.tanh(), 2), x[:, :2]
        while parts:
            out = out * 0.5 + F.linear(x, parts.pop()).sin()
        return torch.cat((out, out), 1)


KINDS = [
    WritesIntoABuffer, WritesByAnOperator, WritesIntoWhatItComputed, AddsToWhatItComputed, SetsAnAttribute,
    ReadsADictionary, HasAFunction, CutsTheGradient, LooksAtTheGradientMode, LooksAtTheType, HandsItOut, HandsOutAView,
    MakesATensor, Counted, WritesPastTheVersions, ReplacesItsBuffer, FillsWhatIsEmpty, WritesByOut, LooksAtGradients,
    TellsOneFromTrue, BySizes, MakesTwoAlike, ChoosesARow, TakesTheFirstRows,
    TurnsAList, TakesFromAList,
]  # fmt: skip


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(BATCH, 6, dtype=torch.float64, generator=generator), torch.arange(BATCH) % 4


@pytest.mark.filterwarnings("ignore:FastAttackModel")
@pytest.mark.parametrize("kind", KINDS)
def test_it_runs_as_ever(kind: type[Layer]) -> None:
    """Pass for pass as a copy of the model, with an update between."""
    torch.manual_seed(0)
    model, (x, y) = Ending(kind()).double().eval(), inputs()
    fast = fast_of(model, auto_update=False)
    input_gradient(fast, x, y)  # the self-check runs the code more often
    for _ in range(2):
        with torch.no_grad():
            model.layer.weight.mul_(0.9)  # type: ignore[operator]
        fast.update()
        plain = copy.deepcopy(model)
        found, wanted = ([input_gradient(m, x[:n], y[:n]) for n in (5, 3, 5, 5)] for m in (fast, plain))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", [ChoosesARow, TakesTheFirstRows])
def test_a_part_that_another_tensor_chooses_is_chosen_anew(kind: type[ChoosesARow]) -> None:
    model, (x, y) = Ending(kind()).double().eval(), inputs()
    fast = fast_of(model)
    for row in (0, 1):
        model.layer.row.fill_(row)  # type: ignore[operator]
        for _ in range(2):
            torch.testing.assert_close(input_gradient(fast, x, y), input_gradient(model, x, y))


def test_what_kernels_lay_out_is_not_kept_once_more() -> None:
    """An update would compute it for nobody."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(64, 128, 3, padding=1), nn.Linear(128, 1024)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).mean((2, 3)))  # type: ignore[no-any-return]

    fast = fast_of(Block().eval(), dtype=torch.float32)
    input_gradient(fast, torch.rand(16, 64, 16, 16), torch.arange(16))
    assert not kept(fast)


@pytest.mark.filterwarnings("ignore:FastAttackModel")
@pytest.mark.parametrize("kind", [Draws, DrawsFromNumPy])
def test_draws_are_made_in_every_pass(kind: type[Layer]) -> None:
    model, (x, _) = kind().double().eval(), inputs()
    fast = fast_of(model)
    found = []
    for run in (fast, model):
        run(x.requires_grad_())
        torch.manual_seed(1)
        numpy.random.seed(1)  # noqa: NPY002
        found.append([run(x.requires_grad_()).detach() for _ in range(3)])
    torch.testing.assert_close(*found)
    assert not found[0][0].equal(found[0][1])


def test_a_look_at_the_generators_opens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module around another one looks at its operators, too: it is not to see how ours are looked at."""
    model, opened = Ending(StdLinear(6, 4)).double().eval(), list[Tensor]()
    monkeypatch.setattr(Memo, "_give_up", lambda self, tensor: opened.append(tensor))
    fast = fast_of(model)
    input_gradient(fast, *inputs())
    assert kept(fast)
    assert not opened


def test_running_out_of_memory_is_no_reason_to_keep_less(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = model_of("StdConv2d", torch.float64), batch()
    fast = fast_of(model)
    for _ in range(2):
        input_gradient(fast, x.double(), y)
    many = len(kept(fast))

    def exhausted(self: object) -> bool:
        raise torch.OutOfMemoryError("out of memory")

    train_a_step(model, x.double())
    with monkeypatch.context() as patch:
        patch.setattr(kept_results.Kept, "compute", exhausted)
        with pytest.raises(torch.OutOfMemoryError):
            fast.update()
    input_gradient(fast, x.double(), y)
    assert len(kept(fast)) == many
    equal(fast, model)


# --- threads ----------------------------------------------------------------------------------------------------------


class WritesIntoItsClone(nn.Conv2d):
    """A central-difference convolution; something may happen before it writes."""

    between: Callable[[], None] = staticmethod(lambda: None)

    def clone_of(self, weight: Tensor) -> Tensor:
        return weight.clone()

    def forward(self, input: Tensor) -> Tensor:
        weight = self.clone_of(self.weight)
        type(self).between()
        weight[:, :, 1, 1] -= self.weight.sum((2, 3))
        return F.conv2d(input, weight, self.bias, padding=1)


class Cloning(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.clone()


class ClonesInside(WritesIntoItsClone):
    """By a module inside, whose call has returned when this one writes."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.cloning = Cloning()
        self.cloning.register_buffer("unused", torch.ones(1))

    def clone_of(self, weight: Tensor) -> Tensor:
        return self.cloning(weight)  # type: ignore[no-any-return]


def convolutions(kind: type[nn.Conv2d], depth: int) -> nn.Module:
    layers = [layer for _ in range(depth) for layer in (kind(8, 8, 3), nn.ReLU())]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 36, 5)).double().eval()


@pytest.mark.parametrize("kind", [WritesIntoItsClone, ClonesInside])
def test_what_a_call_makes_is_not_got_by_another_thread_before_it_returns(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = convolutions(kind, 1), torch.randn(2, 8, 6, 6).double()
    network, found = network_of(fast := fast_of(model)), list[Tensor]()
    memo_of(fast)._kept.clear()

    def call() -> None:
        with torch.no_grad():
            found.append(network(x))

    def call_in_another_thread() -> None:
        monkeypatch.setattr(WritesIntoItsClone, "between", staticmethod(lambda: None))
        other = threading.Thread(target=call)
        other.start()
        other.join()

    monkeypatch.setattr(WritesIntoItsClone, "between", staticmethod(call_in_another_thread))
    call()
    call()
    for output in found:
        torch.testing.assert_close(output, model(x))
    assert len(found) == 3
    assert kept(fast), "the sum is kept"


@pytest.mark.parametrize("seed", range(8))
def test_threads_that_start_together(seed: int) -> None:
    torch.manual_seed(seed)
    model, x, y = convolutions(WritesIntoItsClone, 6), torch.randn(2, 8, 6, 6).double(), torch.arange(2)
    fast, found, begin = fast_of(model), list[Tensor](), threading.Barrier(4)

    def attack() -> None:
        begin.wait()
        found.extend(input_gradient(fast, x, y) for _ in range(3))

    threads = [threading.Thread(target=attack) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12, "no thread has raised"
    wanted = input_gradient(model, x, y)
    for gradient in found:
        torch.testing.assert_close(gradient, wanted)
    assert len(kept(fast)) == 6
    assert not memo_of(fast)._stages


def test_a_call_that_raises_keeps_nothing_and_later_ones_keep() -> None:
    model, x = convolutions(WritesIntoItsClone, 1), torch.randn(2, 8, 6, 6).double()
    network = network_of(fast := fast_of(model))
    memo_of(fast)._kept.clear()
    with pytest.raises(RuntimeError, match="expected input"), torch.no_grad():
        network(x[:, :7])
    assert not kept(fast)
    assert not memo_of(fast)._stages
    with torch.no_grad():
        torch.testing.assert_close(network(x), model(x))
    assert len(kept(fast)) == 1


_LEVELS = [4.0]


@torch.library.custom_op("fastadv_tests::rounded", mutates_args=())
def _rounded(weight: Tensor) -> Tensor:
    return (weight * _LEVELS[0]).round() / _LEVELS[0]


def _halved(weight: Tensor) -> Tensor:
    if torch.overrides.has_torch_function_unary(weight):
        return torch.overrides.handle_torch_function(_halved, (weight,), weight)
    return weight / _LEVELS[0]


class ByAnOperatorOfItsOwn(Layer):
    """The weight by a custom operator, which reads a global."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.ops.fastadv_tests.rounded(self.weight.detach()))


class ByAFunctionForModes(Layer):
    """The weight by a function that a mode sees as one, which reads a global."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _halved(self.weight.detach()))


@pytest.mark.parametrize("kind", [ByAnOperatorOfItsOwn, ByAFunctionForModes])
def test_what_is_not_of_pytorch_may_read_what_changes(kind: type[Layer]) -> None:
    model, (x, y) = Ending(kind()).double().eval(), inputs()
    fast = fast_of(model)
    for _LEVELS[0] in (4.0, 4.0, 2.0):
        torch.testing.assert_close(input_gradient(fast, x, y), input_gradient(model, x, y))
