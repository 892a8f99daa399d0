"""What a second audit found: tensors that nobody followed, first passes that were lost, cycles, hidden outputs."""

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel, FastAttackWarning, watch_gradients
from fastadv_adapters.boundary.scaling import FLOOR, PATIENCE, START, State
from fastadv_adapters.kernels import prepacked
from fastadv_adapters.networks import pair as networks
from fastadv_adapters.networks import selfcheck, trial
from fastadv_adapters.torchattacks import accelerate
from tests.model.test_findings import steep
from tests.support.engines import use_engine
from tests.support.tools import attackable_net, batch, cosine, fingerprint, input_gradient, reference, small_net

FLOAT32: Any = {"dtype": torch.float32}


# --- batch norms whose tensors other code reads -----------------------------------------------------------------------


class ReadsNorm(nn.Module):
    """Reads a batch norm's tensors beside calling it, or instead of that."""

    def __init__(self, *, functional: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.functional = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), functional
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        norm, x = self.norm, self.conv(x)
        if self.functional:
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        else:
            x = norm(x) * norm.weight.view(-1, 1, 1)
        out: Tensor = self.head(torch.tanh(x).mean((2, 3)))
        return out


@pytest.mark.parametrize("auto_update", [True, False])
@pytest.mark.parametrize("functional", [True, False])
def test_tensors_of_a_batch_norm_that_other_code_reads_are_followed(functional: bool, auto_update: bool) -> None:
    net, (x, y) = ReadsNorm(functional=functional).eval(), batch()
    fast = FastAttackModel(net, **FLOAT32, auto_update=auto_update)
    before = input_gradient(fast, x, y)
    net.norm.weight = nn.Parameter(torch.linspace(-2, 2, 8))
    with torch.no_grad():
        net.norm.bias.add_(1.0)
    if not auto_update:
        torch.testing.assert_close(input_gradient(fast, x, y), before)
    fast.update()
    assert (cosine(input_gradient(fast, x, y), input_gradient(reference(net), x.double(), y)) > 0.9999).all()


# --- overflow in the first pass ---------------------------------------------------------------------------------------


def weighted(logits: Tensor, y: Tensor) -> Tensor:
    return (logits * torch.linspace(-1, 1, 10)).sum()


def test_the_first_pass_of_a_steep_network_is_not_lost_nor_the_first_after_an_update() -> None:
    net, (x, _) = steep(), batch(6)
    fast, truth = FastAttackModel(net, dtype=torch.float16), input_gradient(reference(net), x.double(), x, weighted)
    for _ in range(3):
        assert (cosine(input_gradient(fast, x, x, weighted), truth) > 0.98).all()
        fast.update()
    assert fast.gradient_stats.nonfinite == 0
    assert FLOOR <= int(fast._networks.state.exponent) < START


def test_a_single_step_in_float16_is_as_strong_on_a_network_with_large_logits() -> None:
    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = attackable_net()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x) * 4.0 * 4.0
            return out

    net, (x, _) = Steep().eval(), batch(40)
    with torch.no_grad():
        y = net(x).argmax(1)
    robust = []
    for dtype in (torch.float32, torch.float16):
        attack = accelerate(torchattacks.FGSM(net, eps=0.1), dtype=dtype)
        robust.append(int((net(attack(x, y)).argmax(1) == y).sum()))
    assert robust[0] < 20, "the test needs an attack that works"
    assert abs(robust[1] - robust[0]) <= 1


def test_the_scale_climbs_back_after_long_calm_and_no_higher_than_it_began() -> None:
    state = State(torch.device("cpu"))
    state.start_at_most(2)
    state.lower_after(torch.tensor([True, False]))
    assert int(state.exponent) == 0
    found = []
    for _ in range(3):
        for _ in range(PATIENCE):
            state.lower_after(torch.tensor([False, False]))
        state.follow()
        state.follow()
        found.append(int(state.exponent))
    assert found == [2, 2, 2]


def test_where_no_scale_helps_it_stays_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "lost", lambda gradient, full: True)
    fast, (x, y) = FastAttackModel(small_net(), dtype=torch.float16), batch()
    input_gradient(fast, x, y)
    assert int(fast._networks.state.exponent) == START


# --- models that write into their own parameters ----------------------------------------------------------------------


class Shrinks(nn.Module):
    """Writes into its own parameter in every forward pass, seen by PyTorch or not."""

    def __init__(self, *, hidden: bool) -> None:
        super().__init__()
        self.layer, self.hidden = nn.Linear(4, 3), hidden

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            (self.layer.weight.data if self.hidden else self.layer.weight).mul_(0.5)
        out: Tensor = self.layer(x)
        return out


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_model_that_writes_into_its_parameters_is_not_changed(hidden: bool, gradient: bool) -> None:
    net, x = Shrinks(hidden=hidden), torch.rand(3, 4)
    before, plain = fingerprint(net), copy.deepcopy(net)
    fast = FastAttackModel(net, **FLOAT32, decisions="exact")
    found = [fast(x.clone().requires_grad_(gradient)).detach() for _ in range(3)]
    assert fingerprint(net) == before
    for output in found:
        torch.testing.assert_close(output, plain(x).detach())
    assert "writes into its own parameters" in fast.summary()


# --- the fast model as a part of another module -----------------------------------------------------------------------


def test_a_parent_finds_nothing_to_train_and_moves_all_its_parameters() -> None:
    fast = FastAttackModel(small_net(), **FLOAT32)
    parent = nn.Sequential(nn.Linear(2, 2), fast)
    parent.requires_grad_(True)
    assert [name for name, p in parent.named_parameters() if p.requires_grad] == ["0.weight", "0.bias"]
    parent.to("meta")
    assert {p.device.type for p in parent.parameters()} == {"meta"}
    assert {p.device.type for p in fast.parameters()} == {"cpu"}


# --- outputs ----------------------------------------------------------------------------------------------------------


class Slots:
    """Holds a tensor where no ``__dict__`` shows it."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


HIDING: dict[str, Callable[[Tensor], object]] = {
    "slots": Slots,
    "a list in an object": lambda t: SimpleNamespace(inner=[t]),
    "a dict in an object": lambda t: SimpleNamespace(inner={"t": SimpleNamespace(t=t)}),
}


@pytest.mark.parametrize("name", HIDING)
def test_tensors_that_hide_deep_in_an_output_are_refused(name: str) -> None:
    class Hides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, x: Tensor) -> tuple[Tensor, object]:
            logits: Tensor = self.net(x)
            return logits, HIDING[name](logits)

    with pytest.raises(TypeError, match="expected an output of tensors"):
        FastAttackModel(Hides(), **FLOAT32)(batch()[0].requires_grad_())


def test_a_package_of_the_users_may_be_called_quantized() -> None:
    kind = type("Layer", (nn.Linear,), {"__module__": "mynet.quantized.layers"})
    fast, x = FastAttackModel(nn.Sequential(kind(4, 3)), **FLOAT32), torch.rand(2, 4)
    torch.testing.assert_close(fast(x), fast.wrapped(x).detach())


# --- storage that stays, memory that goes -----------------------------------------------------------------------------


class Centred(nn.Module):
    """Keeps a plain tensor as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.mean = small_net(), torch.full((1, 3, 1, 1), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x - self.mean)
        return out


def test_plain_tensors_are_followed_into_the_same_storage() -> None:
    net, (x, y) = Centred().eval(), batch()
    fast = FastAttackModel(net, **FLOAT32)
    input_gradient(fast, x, y)
    own = fast._networks.folded.network.mean
    net.mean = torch.full((1, 3, 1, 1), 0.25)
    assert (cosine(input_gradient(fast, x, y), input_gradient(reference_of(net), x.double(), y)) > 0.9999).all()
    assert fast._networks.folded.network.mean is own
    net.mean = torch.rand(1, 3, 8, 8)
    assert (cosine(input_gradient(fast, x, y), input_gradient(reference_of(net), x.double(), y)) > 0.9999).all()


def reference_of(net: Centred) -> nn.Module:
    found = copy.deepcopy(net).double()
    found.mean = found.mean.double()
    return found


def test_weights_that_are_laid_out_ahead_hold_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepacked, "LEAST", 0)
    monkeypatch.setattr(prepacked, "_is_onednn", lambda *args: True)
    held, layer = prepacked.Prepacked(), nn.Conv2d(4, 6, 3).requires_grad_(False)
    x = torch.rand(2, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    packed = held.find(layer, x, layer.weight)
    assert packed is not None
    assert layer not in vars(packed).values()


# --- engines ----------------------------------------------------------------------------------------------------------


def test_more_models_than_the_compiler_allows_for_one_code(monkeypatch: pytest.MonkeyPatch) -> None:
    use_engine(monkeypatch, "compile")
    torch._dynamo.reset()
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(64, outputs)) for outputs in range(2, 8)]
    fasts = [FastAttackModel(net, **FLOAT32) for net in nets]
    limits = ("accumulated_recompile_limit", "accumulated_cache_size_limit")  # the latter up to PyTorch 2.6
    limit = next(name for name in limits if hasattr(torch._dynamo.config, name))
    with torch._dynamo.config.patch({limit: 2}):
        for fast in fasts:
            fast(torch.rand(2, 1, 8, 8).requires_grad_()).sum().backward()
    assert [fast.engine for fast in fasts] == ["compile"] * len(fasts)


def test_what_the_compiler_gave_up_elsewhere_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    use_engine(monkeypatch, "compile")
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    fast = FastAttackModel(net, **FLOAT32)
    codes = [nn.Sequential.forward.__code__, torch._dynamo.external_utils.wrap_inline(len).__code__]
    torch._dynamo.utils.counters.clear()
    for code in codes:
        torch._dynamo.eval_frame.skip_code(code)
    try:
        fast(torch.rand(2, 1, 8, 8).requires_grad_()).sum().backward()
    finally:
        for code in codes:
            torch._C._dynamo.eval_frame.reset_code(code)
    assert fast.engine == "compile", fast.summary()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_one_compilation_per_shape_whatever_the_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    use_engine(monkeypatch, "compile")
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    fast = FastAttackModel(net, **FLOAT32)
    plain = torch.rand(2, 1, 8, 8)
    torch._dynamo.utils.counters.clear()
    for x in (plain, plain.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), torch.rand(4, 1, 8, 8)[::2]):
        leaf = x.detach().requires_grad_()
        fast(leaf).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


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


# --- what a second pair of fresh eyes found ---------------------------------------------------------------------------


class LogsWhatItFolds(nn.Module):
    """Reads the layer's output where a trace does not look; folded, the logarithm is of negative numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
        with torch.no_grad():
            self.conv.weight.abs_()
            self.norm.weight.fill_(-1.0)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(x)
        out: Tensor = self.norm(hidden)
        if isinstance(hidden, Tensor):
            out = out + (hidden + 1e-3).log()
        return out.mean((2, 3))


def test_nan_is_not_near_enough_for_the_self_check() -> None:
    net, (x, y) = LogsWhatItFolds().eval(), batch()
    y = y % 4
    fast = FastAttackModel(net, **FLOAT32)
    with pytest.warns(FastAttackWarning, match="folded into 0 layers only"):
        found = input_gradient(fast, x, y)
    assert (cosine(found, input_gradient(reference(net), x.double(), y)) > 0.9999).all()


class ShrinksSix(Shrinks):
    """Takes batches of six alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(6, 4))


FIRST_CALLS: dict[str, Callable[[FastAttackModel], object]] = {
    "full precision": lambda fast: fast.view(full_precision=True)(torch.rand(6, 4).requires_grad_()),
    "a transform": lambda fast: torch.func.grad(lambda x: fast(x).sum())(torch.rand(6, 4)),
    "a batch of six": lambda fast: fast(torch.rand(6, 4)),
}


@pytest.mark.parametrize("name", FIRST_CALLS)
def test_whatever_comes_first_a_writing_model_is_not_changed(name: str) -> None:
    net = (ShrinksSix if name == "a batch of six" else Shrinks)(hidden=True)
    before = fingerprint(net)
    FIRST_CALLS[name](FastAttackModel(net, **FLOAT32))
    assert fingerprint(net) == before


class SixAtATime(nn.Module):
    """A network that takes batches of six alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x.view(6, 3, 8, 8))
        return out


def test_a_model_of_one_batch_size_is_scaled_per_sample_too() -> None:
    net, (x, y) = SixAtATime().eval(), batch(6)
    fast = FastAttackModel(net, dtype=torch.float16)
    weights = torch.tensor([1.0, 1e-12, 1.0, 1e-12, 1.0, 1.0])
    found = input_gradient(fast, x, y, lambda z, y: (F.cross_entropy(z, y, reduction="none") * weights).sum())
    assert all(row.count_nonzero() for row in found)
    assert "per-sample" in fast.summary()


def test_options_for_an_attack_on_a_fast_model_are_refused() -> None:
    attack = torchattacks.FGSM(FastAttackModel(small_net(), **FLOAT32))
    assert accelerate(attack) is attack
    with pytest.raises(ValueError, match="a model that is fast already, got dtype"):
        accelerate(attack, dtype=torch.float32)


def test_a_view_of_a_view_in_full_precision_stays_in_full_precision() -> None:
    net, (x, y) = small_net(), batch()
    view = FastAttackModel(net, dtype=torch.bfloat16).view(full_precision=True).view(logits_dtype=torch.float64)
    assert (cosine(input_gradient(view, x, y), input_gradient(reference(net), x.double(), y)) > 0.99999).all()
    assert "this view in full precision" in view.summary()
    assert "this view" not in view.view(full_precision=False).summary()


def test_second_order_after_a_step_is_an_error_and_not_of_the_new_weights() -> None:
    net, (x, y) = small_net(), batch()
    fast, x = FastAttackModel(net, **FLOAT32), x.requires_grad_()
    loss = F.cross_entropy(fast(x), y)
    with torch.no_grad():
        next(net.parameters()).mul_(1.5)
    with pytest.raises(RuntimeError, match="the weights of its forward pass"):
        torch.autograd.grad(loss, x, create_graph=True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(fast(x), y), x, create_graph=True)
    assert gradient.requires_grad


def test_containers_in_tuples_are_followed() -> None:
    class Configured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.factors = small_net(), ([1.0],)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x) * self.factors[0][0]
            return out

    net, (x, _) = Configured().eval(), batch()
    fast = FastAttackModel(net, **FLOAT32)
    before = fast(x)
    net.factors[0][0] = 5.0
    torch.testing.assert_close(fast(x), 5 * before)


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


def test_threads_at_a_first_call_make_one_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    made, check = list[int](), selfcheck.check

    def counted(*args: Any) -> Any:
        made.append(1)
        return check(*args)

    monkeypatch.setattr(networks, "check", counted)
    fast, (x, y) = FastAttackModel(small_net(), **FLOAT32), batch()
    threads = [threading.Thread(target=input_gradient, args=(fast, x, y)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_one_watch_takes_one_batch_size() -> None:
    fast = FastAttackModel(small_net(), **FLOAT32)
    with watch_gradients():
        input_gradient(fast, *batch(4))
        with pytest.raises(ValueError, match=r"expected passes of 4 samples inside .*, got one of 3"):
            input_gradient(fast, *batch(3))
