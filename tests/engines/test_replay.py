"""Recordings, replayed, give what the eager network gives; what they would not repeat runs eager and says so."""

import gc
import threading
import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.shared.networks import VisionTransformer, WideResNet
from fastadv_adapters import FastAttackModel, SafePGD, watch_gradients
from fastadv_adapters.engines.replay import ReplayEngine
from fastadv_adapters.modules.notices import FastAttackWarning
from tests.support.engines import CpuRecorder, use_engine
from tests.support.tools import batch, input_gradient, settle, small_net

FLOAT32: Any = {"dtype": torch.float32}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "residual": small_net,
    "wide": lambda: settle(WideResNet(depth=10, width=1)),
    "transformer": lambda: VisionTransformer(image=8, patch=4, width=16, depth=1, heads=2, classes=10),
}


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    use_engine(monkeypatch, "cudagraph")


def engine_of(fast: FastAttackModel) -> ReplayEngine:
    engine = fast._networks.fast
    assert isinstance(engine, ReplayEngine)
    return engine


def recorder_of(fast: FastAttackModel) -> CpuRecorder:
    recorder = engine_of(fast).recorder
    assert isinstance(recorder, CpuRecorder)
    return recorder


def eager(net: nn.Module, **options: Any) -> FastAttackModel:
    return FastAttackModel(net, engine="eager", **FLOAT32, **options)


def change(net: nn.Module) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.1)


# --- every engine -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_replayed_equals_eager(name: str, dtype: torch.dtype, replayed: None) -> None:
    net = MODELS[name]().eval()
    fast, plain = FastAttackModel(net, dtype=dtype), FastAttackModel(net, dtype=dtype, engine="eager")
    for samples in (6, 3, 6):
        x, y = batch(samples, seed=samples)
        assert torch.equal(input_gradient(fast, x, y), input_gradient(plain, x, y))
        assert torch.equal(fast(x).argmax(1), plain(x).argmax(1))
        assert torch.equal(fast.view(decisions="exact")(x), plain.view(decisions="exact")(x))
    assert fast.engine == "cudagraph"
    assert recorder_of(fast).captured == 4  # forward and backward of two shapes
    assert fast.gradient_stats == plain.gradient_stats


@pytest.mark.parametrize("name", ["compile", "cudagraph"])
def test_second_passes_through_one_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_engine(monkeypatch, name)
    net, (x, y) = small_net(), batch()
    fast, leaf = FastAttackModel(net, **FLOAT32), x.clone().requires_grad_()
    values = nn.functional.cross_entropy(fast(leaf), y, reduction="none")
    first = torch.autograd.grad(values[0], leaf, retain_graph=True)[0]
    again = torch.autograd.grad(values[0], leaf, retain_graph=True)[0]
    rest = torch.autograd.grad(values[1:].sum(), leaf)[0]
    assert torch.equal(first, again)
    expected = input_gradient(eager(net), x, y, lambda logits, y: nn.functional.cross_entropy(logits, y) * len(y))
    torch.testing.assert_close(first + rest, expected, rtol=1e-4, atol=1e-7)
    assert fast.engine == name


# --- recordings -------------------------------------------------------------------------------------------------------


def test_backward_through_an_overwritten_forward_is_recomputed(replayed: None) -> None:
    net, (x, y), (other, labels) = small_net(), batch(seed=1), batch(seed=2)
    fast, plain = FastAttackModel(net, **FLOAT32), eager(net)
    input_gradient(fast, x, y)
    before = recorder_of(fast).replayed
    leaf, leaf_of_other = x.clone().requires_grad_(), other.clone().requires_grad_()
    loss = nn.functional.cross_entropy(fast(leaf), y)
    loss_of_other = nn.functional.cross_entropy(fast(leaf_of_other), labels)
    (found,) = torch.autograd.grad(loss, leaf)
    (found_of_other,) = torch.autograd.grad(loss_of_other, leaf_of_other)
    assert torch.equal(found, input_gradient(plain, x, y))
    assert torch.equal(found_of_other, input_gradient(plain, other, labels))
    assert recorder_of(fast).replayed - before == 6  # two of each, and both forward passes once more
    assert fast.gradient_stats.samples == 18


def test_a_forward_of_another_shape_overwrites_too(replayed: None) -> None:
    net, (x, y), (other, labels) = small_net(), batch(6), batch(2)
    fast = FastAttackModel(net, **FLOAT32)
    input_gradient(fast, other, labels)
    leaf = x.clone().requires_grad_()
    loss = nn.functional.cross_entropy(fast(leaf), y)
    input_gradient(fast, other, labels)
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], input_gradient(eager(net), x, y))


def test_a_recording_that_fails_overwrites_too(replayed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, y), (other, labels) = small_net(), batch(6), batch(2)
    fast, plain = FastAttackModel(net, **FLOAT32), eager(net)
    input_gradient(fast, x, y)
    leaf, capture = x.clone().requires_grad_(), recorder_of(fast).capture
    loss = nn.functional.cross_entropy(fast(leaf), y)

    def without_room(work: Callable[[], object]) -> Callable[[], object]:
        capture(work)
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(recorder_of(fast), "capture", without_room)
    assert torch.equal(input_gradient(fast, other, labels), input_gradient(plain, other, labels))
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], input_gradient(plain, x, y))
    assert fast.engine == "cudagraph"


def test_what_is_handed_out_stays_as_it_is(replayed: None) -> None:
    net, (x, _) = small_net(), batch()
    x[0] = torch.inf
    fast, plain = FastAttackModel(net, **FLOAT32, decisions="fast"), eager(net, decisions="fast")
    outcomes = []
    for model in (fast, plain):
        leaf = x.clone().requires_grad_()
        with watch_gradients() as watch:
            output = model(leaf)
            (gradient,) = torch.autograd.grad(output.square().sum(), leaf)
        outcomes.append((output, gradient, watch.spoilt))
        for samples in (6, 2):
            input_gradient(model, *batch(samples, seed=2))
    torch.testing.assert_close(*outcomes, rtol=0, atol=0, equal_nan=True)
    assert fast.gradient_stats == plain.gradient_stats  # recording counts nothing
    assert fast.gradient_stats.nonfinite == fast.gradient_stats.nonfinite_logits == 1


def test_an_update_between_replays_needs_no_new_recording(replayed: None) -> None:
    net, (x, y) = small_net(), batch()
    fast = FastAttackModel(net, **FLOAT32)
    input_gradient(fast, x, y)
    captured = recorder_of(fast).captured
    for _ in range(3):
        change(net)
        fast.update()
        assert torch.equal(input_gradient(fast, x, y), input_gradient(eager(net), x, y))
    assert recorder_of(fast).captured == captured


def test_a_backward_after_an_update_is_an_error(replayed: None) -> None:
    net, (x, _) = small_net(), batch()
    fast, leaf = FastAttackModel(net, **FLOAT32), x.clone().requires_grad_()
    output = fast(leaf)
    change(net)
    fast.update()
    with pytest.raises(RuntimeError, match="updated in between"):
        output.sum().backward()


def test_only_so_many_shapes_are_recorded(replayed: None) -> None:
    net = small_net()
    fast, plain = FastAttackModel(net, **FLOAT32), eager(net)
    input_gradient(fast, *batch(1))
    engine_of(fast).most = 3
    for samples in range(1, 7):
        x, y = batch(samples)
        assert torch.equal(input_gradient(fast, x, y), input_gradient(plain, x, y))
    assert recorder_of(fast).captured == 6
    assert fast.engine == "cudagraph"


class WithTensor(nn.Module):
    """Reads a tensor that is a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.factor = small_net(), torch.tensor(2.0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x) * self.factor
        return out


def test_recordings_are_made_anew_when_a_tensor_moves(replayed: None) -> None:
    net, (x, y) = WithTensor(), batch()
    fast = FastAttackModel(net, **FLOAT32)
    input_gradient(fast, x, y)
    net.factor = torch.tensor(3.0)
    assert torch.equal(input_gradient(fast, x, y), input_gradient(eager(net), x, y))
    net.factor = torch.linspace(1, 4, 10)
    assert torch.equal(input_gradient(fast, x, y), input_gradient(eager(net), x, y))


class Tabled(nn.Module):
    """Keeps a table that it computes from its weights, until somebody clears it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.scale = nn.Linear(192, 32), nn.Linear(32, 10), nn.Parameter(torch.randn(32))
        self.tables: dict[int, Tensor] = {}

    def forward(self, x: Tensor, *, features: bool = False) -> Tensor:
        if len(x) not in self.tables:
            self.tables[len(x)] = 3 * torch.tanh(self.scale)
        hidden = F.relu(self.first(x.flatten(1)) + self.tables[len(x)])
        logits: Tensor = self.last(hidden)
        return hidden if features else logits


def test_recordings_are_made_anew_when_a_table_in_a_container_is_thrown_away(replayed: None) -> None:
    net, (x, y) = Tabled().eval(), batch()
    fast = FastAttackModel(net, **FLOAT32)

    def gradient(model: nn.Module, *, features: bool) -> Tensor:
        net.tables.clear()
        return input_gradient(partial(model, features=features), x, y)

    for alone in (True, False):  # the table is there before there is a recording, which reads it
        recorder_of(fast).recording = alone
        for features in (False, True):
            gradient(fast, features=features)
    assert recorder_of(fast).captured == 4
    with torch.no_grad():
        net.scale.mul_(-1)
    for features in (False, True):
        torch.testing.assert_close(gradient(fast, features=features), gradient(net, features=features))


class CountsOnDevice(nn.Module):
    """Counts its calls in a buffer or a parameter."""

    calls: Tensor

    def __init__(self, *, parameter: bool) -> None:
        super().__init__()
        self.net = small_net()
        if parameter:
            self.calls = nn.Parameter(torch.zeros(()), requires_grad=False)
        else:
            self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        out: Tensor = self.net(x) * self.calls
        return out


class MovesStatistics(nn.Module):
    """Normalises by running statistics that each pass moves, which no version counts."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.statistics = small_net(), nn.BatchNorm2d(3, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.statistics.running_mean, self.statistics.running_var
        F.batch_norm(x.detach(), mean, var, training=True, momentum=0.5)
        out: Tensor = self.net(F.batch_norm(x, mean, var))
        return out


@pytest.mark.parametrize(
    "make",
    [partial(CountsOnDevice, parameter=False), partial(CountsOnDevice, parameter=True), MovesStatistics],
    ids=["buffer", "parameter", "statistics"],
)
def test_recording_leaves_tensors_as_they_were(make: Callable[[], nn.Module], replayed: None) -> None:
    net = make().eval()
    fast, plain = FastAttackModel(net, **FLOAT32), eager(net)
    for samples in (6, 6, 3):
        x, y = batch(samples)
        assert torch.equal(input_gradient(fast, x, y), input_gradient(plain, x, y))
    assert fast.engine == "cudagraph"


class Scaled(nn.Module):
    """Takes a number and a flag, and gives two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor, factor: float = 1.0, *, flip: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        y = self.net(x) * factor
        return y, -y if flip else y.exp(), y.argmax(1)


def test_numbers_and_flags_are_part_of_a_recording(replayed: None) -> None:
    net, (x, _) = Scaled(), batch()
    fast, plain = FastAttackModel(net, **FLOAT32), eager(net)
    for factor, flip in ((1.0, False), (2.0, False), (2.0, True), (1.0, False)):
        outcomes = []
        for model in (fast, plain):
            leaf = x.clone().requires_grad_()
            _, second, decisions = model(leaf, factor, flip=flip)  # one of two outputs has a gradient
            outcomes.append((second, decisions, torch.autograd.grad(second.sum(), leaf)[0]))
        assert all(torch.equal(*pair) for pair in zip(*outcomes, strict=True))
    assert recorder_of(fast).captured == 12, "once for all outputs, and once for the one that is asked for"


class WithEntropy(nn.Module):
    """Also returns the entropy of its classes, which is finite where a probability is zero; its derivative is not."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.net(x)
        return logits, torch.special.entr((1e4 * logits).softmax(1)).sum(1)


def test_nothing_comes_in_at_outputs_that_nobody_asked_for(replayed: None) -> None:
    net, (x, y) = WithEntropy().eval(), batch()
    fast, plain = FastAttackModel(net, **FLOAT32), eager(net)
    for _ in range(3):
        found, expected = (input_gradient(lambda x, m=model: m(x)[0], x, y) for model in (fast, plain))  # type: ignore[misc]
        assert torch.equal(found, expected)
    assert found.flatten(1).any(1).all()
    assert recorder_of(fast).captured == 4, "once for both outputs, and once for the one that is asked for"
    assert fast.engine == "cudagraph"


def test_inference_mode_and_fast_values(replayed: None) -> None:
    net, (x, y) = small_net(), batch()
    fast = FastAttackModel(net, **FLOAT32, decisions="fast")
    with torch.inference_mode():
        first = fast(x.clone())
    input_gradient(fast, x, y)
    captured = recorder_of(fast).captured
    assert torch.equal(fast(x), first)  # of the recording that has a backward pass
    assert recorder_of(fast).captured == captured == 3


def test_nothing_is_recorded_while_the_caller_records(replayed: None) -> None:
    net, (x, y) = small_net(), batch()
    fast = FastAttackModel(net, **FLOAT32)
    input_gradient(fast, x, y)
    recorder_of(fast).recording, replayed_before = True, recorder_of(fast).replayed
    assert torch.equal(input_gradient(fast, x, y), input_gradient(eager(net), x, y))
    assert recorder_of(fast).replayed == replayed_before


def test_threads_share_the_memory_in_turn(replayed: None) -> None:
    net = small_net()
    fast = FastAttackModel(net, **FLOAT32)
    attack = SafePGD(fast, eps=0.1, steps=5, random_start=False)
    work = [batch(4, seed=seed) for seed in range(4)]
    alone = [attack(x, y) for x, y in work]
    found: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: attack(*work[i])})) for i in range(len(work))
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], alone[i]) for i in range(len(work)))


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls = small_net(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.net(x) * (-1) ** self.calls
        return out


class Drawing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x) + torch.rand(())
        return out


class Seeding(nn.Module):
    """Draws from a generator of its own, which no recording knows."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x) + torch.rand((), generator=torch.Generator().manual_seed(5))
        return out


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out if bool(out.mean() > 1e6) else -out


class Trainer:
    """As that of Lightning, to which its modules refer."""

    __module__ = "lightning.pytorch.trainer.trainer"
    epoch = 2


class Scheduled(nn.Module):
    """Asks its trainer how far it is; recorded, it would get the first answer for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.owner = small_net(), Trainer()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x) * self.owner.epoch
        return out


def hooked() -> nn.Module:
    net = small_net()
    net[2].register_forward_hook(lambda module, args, output: output * 2)
    return net


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Counting, "sets attributes"),
        (Drawing, "draws random numbers"),
        (Seeding, "not in capture mode"),
        (Branching, "waits for the device"),
        (hooked, "2 has hooks"),
        (Scheduled, "asks the trainer"),
    ],
    ids=["counts", "draws", "seeds", "branches", "hooks", "trainer"],
)
def test_what_a_recording_would_not_repeat_runs_eager(
    make: Callable[[], nn.Module], reason: str, replayed: None
) -> None:
    net, (x, y) = make(), batch()
    fast = FastAttackModel(net, **FLOAT32, channels_last=False)
    plain = FastAttackModel(net, **FLOAT32, channels_last=False, engine="eager")
    for _ in range(3):
        torch.manual_seed(1)
        found = input_gradient(fast, x, y)
        torch.manual_seed(1)
        assert torch.equal(found, input_gradient(plain, x, y))
    assert fast.engine == "eager"
    assert "engine is eager, since" in fast.summary()
    assert reason in fast.summary()


def test_an_input_that_the_model_refuses_leaves_the_engine(replayed: None) -> None:
    net, (x, y) = small_net(), batch()
    fast = FastAttackModel(net, **FLOAT32)
    with pytest.raises(RuntimeError, match="refused an input of shape"):
        input_gradient(fast, torch.rand(2, 5, 8, 8), y[:2])
    assert torch.equal(input_gradient(fast, x, y), input_gradient(eager(net), x, y))
    assert fast.engine == "cudagraph"


def test_cuda_graphs_on_a_cpu_run_eager_and_say_so_once() -> None:
    with pytest.warns(FastAttackWarning, match="CUDA graphs need a model on a CUDA device") as caught:
        input_gradient(FastAttackModel(small_net(), engine="cudagraph"), *batch())
    assert len(caught) == 1


def test_unknown_engine_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected engine to be one of 'auto', 'eager', 'compile', 'cudagraph'"):
        FastAttackModel(small_net(), engine="inductor")  # type: ignore[arg-type]


def test_state_in_an_object_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.state = nn.Linear(4, 3), SimpleNamespace(calls=0)

        def forward(self, x: Tensor) -> Tensor:
            self.state.calls += 1
            out: Tensor = self.net(x) * self.state.calls
            return out

    use_engine(monkeypatch, "cudagraph")
    fast, x = FastAttackModel(Counts(), **FLOAT32), torch.rand(3, 4).requires_grad_()
    first, second = (fast(x).detach() for _ in range(2))
    assert fast.engine == "eager"
    assert not torch.allclose(first, second)


def test_a_recording_keeps_no_batch_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    use_engine(monkeypatch, "cudagraph")
    fast, (x, y) = FastAttackModel(small_net(), **FLOAT32), batch()
    made = (x.requires_grad_() * 1).clone()
    kept = weakref.ref(made)
    torch.autograd.grad(F.cross_entropy(fast(made), y), made)
    assert fast.engine == "cudagraph"
    del made
    gc.collect()
    assert kept() is None
