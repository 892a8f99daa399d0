"""Models with a memory: recurrent layers, and models that keep state from call to call."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from fastadv_adapters import FastAttackModel
from fastadv_adapters.networks.freshness import Change
from tests.support.agreement import agrees, train_a_step, weighed
from tests.support.tools import cosine, fingerprint, input_gradient

FLOAT32: Any = {"dtype": torch.float32}


class Recurrent(nn.Module):
    """Sequences (N, T, 3), the last of all steps to logits."""

    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.rnn = kind(3, 8, num_layers=2, batch_first=True, dropout=0.5, bidirectional=True, **options)
        self.head = nn.Linear(2 * options.get("proj_size", 8), 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(x)[0][:, -1])
        return out


class Padded(nn.Module):
    """Sequences of different lengths, given as the second input, with a state to begin with."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 8, batch_first=True), nn.Linear(8, 5)
        self.start = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        start = self.start.expand(-1, len(x), -1).contiguous()
        _, (last, _) = self.rnn(packed, (start, torch.zeros_like(start)))
        out: Tensor = self.head(last[0])
        return out


RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "RNN": lambda: Recurrent(nn.RNN),
    "GRU": lambda: Recurrent(nn.GRU),
    "LSTM": lambda: Recurrent(nn.LSTM),
    "LSTM with projections": lambda: Recurrent(nn.LSTM, proj_size=4),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("make", RECURRENT.values(), ids=RECURRENT.keys())
def test_recurrent_layers_are_followed_into_their_own_weights(make: Callable[[], nn.Module]) -> None:
    net, x = make().eval(), torch.rand(4, 6, 3)
    fast = FastAttackModel(net, **FLOAT32)
    agrees(fast, net, x)
    train_a_step(net, x)
    agrees(fast, net, x)
    for parameter in net.parameters():
        parameter.data = parameter.data * 1.5
    agrees(fast, net, x)
    frozen = FastAttackModel(net, **FLOAT32, auto_update=False)
    before = frozen(x.requires_grad_()).detach()
    train_a_step(net, x.detach())
    assert torch.equal(frozen(x), before), "its weights are its own"
    # PyTorch takes another kernel for weights that want a gradient, as the twin's do.
    torch.testing.assert_close(frozen.view(full_precision=True)(x).detach(), before, rtol=1e-5, atol=1e-6)
    agrees(frozen.update(), net, x)


# Without AVX512 oneDNN has no LSTM in bfloat16: the model runs in float32 there, and says so.
@pytest.mark.filterwarnings("ignore:.*in torch.bfloat16 it raised RuntimeError. could not create a primitive")
@pytest.mark.parametrize(("kind", "dtype"), [(nn.LSTM, torch.bfloat16), (nn.GRU, torch.float16)])
def test_recurrent_layers_in_half_precision(kind: type[nn.RNNBase], dtype: torch.dtype) -> None:
    net, x = Recurrent(kind).eval(), torch.rand(2, 3, 3)
    found = input_gradient(FastAttackModel(net, dtype=dtype), x, x, weighed)
    assert (cosine(found, input_gradient(net, x, x, weighed)) > 0.98).all()


def test_sequences_of_different_lengths() -> None:
    net, lengths = Padded().eval(), torch.tensor([4, 2, 3])
    agrees(FastAttackModel(net, **FLOAT32), net, torch.rand(3, 4, 3)[:, :2], lengths.clamp(max=2))
    fast, x = FastAttackModel(net, **FLOAT32), torch.rand(3, 4, 3, requires_grad=True)
    (found,) = torch.autograd.grad(weighed(fast(x, lengths)), x)
    assert found[1, 2:].count_nonzero() == 0, "what is padding has no gradient"
    torch.testing.assert_close(found, torch.autograd.grad(weighed(net(x, lengths)), x)[0])


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers_of_both_networks_run_as_cudnn_wants_for_a_backward_pass(kind: type[nn.RNNBase]) -> None:
    """In training mode, or cuDNN refuses; without dropout, so that it is the eval-mode function all the same."""
    net, x = Recurrent(kind).eval(), torch.rand(4, 6, 3)
    fast = FastAttackModel(net, **FLOAT32)
    for network in (fast._networks.folded.network, fast._networks.twin.engine.network):
        layers = [part for part in network.modules() if isinstance(part, nn.RNNBase)]
        assert [(part.training, part.dropout) for part in layers] == [(True, 0.0)]
        assert all(isinstance(part, nn.RNNBase) or not part.training for part in network.modules())
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x))
    layer = net.rnn
    assert isinstance(layer, nn.RNNBase)
    assert (layer.training, layer.dropout) == (False, 0.5)


def test_recurrent_layers_know_their_own_weights_before_the_first_run() -> None:
    network = FastAttackModel(Recurrent(nn.LSTM), **FLOAT32)._networks.folded.network
    layer = network.rnn
    assert isinstance(layer, nn.RNNBase)
    assert all(ours is theirs for ours, theirs in zip(layer._flat_weights, layer.parameters(), strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_recurrent_layers_have_gradients_in_eval_mode_on_cuda(kind: type[nn.RNNBase], dtype: torch.dtype) -> None:
    net, x = Recurrent(kind).eval(), torch.rand(4, 6, 3)
    expected = input_gradient(net, x, x, weighed)
    fast, x = FastAttackModel(net.cuda(), dtype=dtype), x.cuda()
    for view in (fast, fast.view(decisions="exact"), fast.view(full_precision=True)):
        assert (cosine(input_gradient(view, x, x, weighed_on_cuda).cpu(), expected) > 0.98).all()


def weighed_on_cuda(outputs: Tensor, _: Tensor | None = None) -> Tensor:
    return weighed(outputs.cpu())


class TimeFirst(nn.Module):
    """Sequences (T, N, 3) to outputs (T, N, 5), with no batch in front: each step reaches back, or forth."""

    def __init__(self, *, backwards: bool) -> None:
        super().__init__()
        self.rnn, self.head, self.backwards = nn.GRU(3, 8), nn.Linear(8, 5), backwards

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(x.flip(0))[0].flip(0) if self.backwards else self.rnn(x)[0])
        return out


@pytest.mark.parametrize("backwards", [False, True])
def test_steps_in_front_see_each_other_in_one_direction_only(backwards: bool) -> None:
    net, x = TimeFirst(backwards=backwards).eval(), torch.rand(6, 4, 3)
    loss = lambda out, _: (out * 10.0 ** torch.arange(6)[:, None, None]).sum()  # noqa: E731
    fast = FastAttackModel(net, **FLOAT32)
    with pytest.warns(UserWarning, match="one loss scale serves the whole call .*#samples-coupled"):
        found = input_gradient(fast, x, x, loss)
    torch.testing.assert_close(found, input_gradient(net, x, x, loss), rtol=1e-3, atol=1e-3)


# --- models that remember ---------------------------------------------------------------------------------------------


class Remembers(nn.Module):
    """Carries its hidden state from call to call: one that is made, one that is written into, one in a buffer."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(3, 6), nn.Linear(6, 5)
        self.state: Tensor | None = None
        self.trail = torch.zeros(6)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        state = self.cell(x, self.state)
        self.state = state.detach()
        self.trail.mul_(0.5).add_(self.state.mean(0))
        self.mean += self.trail
        out: Tensor = self.head(state + self.trail + self.mean)
        return out


@pytest.mark.parametrize("auto_update", [True, False])
def test_a_model_that_remembers_goes_on_in_its_copies_and_starts_again_at_an_update(auto_update: bool) -> None:
    torch.manual_seed(1)
    net = Remembers().eval()
    torch.manual_seed(1)
    plain = Remembers().eval()
    fast, x = FastAttackModel(net, **FLOAT32, auto_update=auto_update), torch.rand(4, 3, requires_grad=True)
    before = fingerprint(net)
    for _ in range(3):
        torch.testing.assert_close(fast(x).detach(), plain(x).detach())
    with torch.no_grad():
        once = fast(x).clone()
        assert not torch.equal(once, fast(x)), "the twin remembers by itself"
    assert fingerprint(net) == before, "and what either remembers is not the wrapped model's"
    torch.manual_seed(1)
    torch.testing.assert_close(fast.update()(x).detach(), Remembers()(x).detach())
    with torch.no_grad():
        torch.testing.assert_close(fast(x), once)
    assert fingerprint(net) == before


def test_running_the_wrapped_model_hands_its_memory_on() -> None:
    net, x = Remembers().eval(), torch.rand(4, 3)
    fast = FastAttackModel(net, **FLOAT32)
    fast(x.clone().requires_grad_())
    net(x)
    assert fast._networks._freshness.change() is Change.STRUCTURE
    state, trail = net.state, net.trail.clone()
    assert state is not None
    found = fast(x.clone().requires_grad_()).detach()
    cell = net.cell(x, state)
    trail = trail * 0.5 + cell.mean(0)
    torch.testing.assert_close(found, net.head(cell + trail + net.mean + trail))


class Rescales(nn.Module):
    """Writes into its own parameter in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight.data.clamp_(-0.1, 0.1)
        out: Tensor = self.layer(x)
        return out


def test_a_model_that_writes_into_its_parameters_writes_into_copies_without_auto_update() -> None:
    net, x = Rescales(), torch.rand(2, 4)
    before = fingerprint(net)
    fast = FastAttackModel(net, **FLOAT32, auto_update=False)
    with torch.no_grad():
        found = fast(x)
    assert fingerprint(net) == before
    torch.testing.assert_close(found, net(x))


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
