"""What networks follow without `auto_update`, how many kinds of calls are known, what other threads ask."""

import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel, FastAttackWarning
from fastadv_adapters.networks import kinds
from tests.support.tools import attackable_net, batch, cosine, input_gradient


class Spoken(nn.Module):
    """Is told what to do by a text."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = attackable_net()

    def forward(self, x: Tensor, text: str) -> Tensor:
        logits: Tensor = self.inner(x) * len(text)
        return logits


class Extra(nn.Module):
    """Has an output without entries beside the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = attackable_net()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x), x.flatten(1)[:, :0]


def to_nan(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)


def to_float64(model: nn.Module) -> None:
    model.double()


def without_head(model: nn.Module) -> None:
    assert isinstance(model, nn.Sequential)
    del model[-1]


@pytest.mark.parametrize("change", [to_nan, to_float64, without_head])
def test_without_auto_update_the_first_check_is_of_the_weights_that_run(change: Any) -> None:
    """The wrapped model is elsewhere by then."""
    x, y = batch(6)
    expected = input_gradient(FastAttackModel(attackable_net(), dtype=torch.float32), x, y)
    model = attackable_net()
    fast = FastAttackModel(model, auto_update=False, dtype=torch.float32)
    change(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(input_gradient(fast, x, y), expected)
    assert len(fast._networks.kinds) == 1


def test_the_oldest_kind_of_call_is_forgotten_and_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "MOST_KINDS", 3)
    fast, (x, _) = FastAttackModel(Spoken().eval(), dtype=torch.float32), batch(4)
    for number in (1, 2, 3, 4, 5, 1):
        leaf = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(fast(leaf, "a" * number).sum(), leaf)
        expected = torch.autograd.grad(fast.wrapped(leaf, "a" * number).sum(), leaf)[0]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        fast(x, "a" * number)
        assert len(fast._networks.kinds) <= 3
        assert len(fast._networks.judges._trust) <= 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_output_without_entries_is_audited_like_others(dtype: torch.dtype) -> None:
    fast, (x, _) = FastAttackModel(Extra().eval(), dtype=dtype), batch(8)
    leaf = x.clone().requires_grad_()
    logits, nothing = fast(leaf)
    assert nothing.shape == (8, 0)
    (found,) = torch.autograd.grad(logits.sum(), leaf)
    assert found.abs().amax() > 0
    (kind,) = fast._networks.kinds.values()
    assert kind.schedule.passes == 0, "there was an audit"
    assert kind.dtype == dtype


def test_who_asks_while_networks_are_being_built_waits() -> None:
    fast = FastAttackModel(attackable_net(), dtype=torch.float32)
    networks = fast._networks
    found: list[str] = []
    with networks._lock:
        networks._networks = {}  # as in the middle of a new build
        asking = threading.Thread(target=lambda: found.append(fast.engine))
        asking.start()
        asking.join(0.5)
        assert asking.is_alive()
        networks._copy_fast()
    asking.join(10)
    assert found == ["eager"]


def test_a_note_that_comes_again_is_kept_once() -> None:
    fast = FastAttackModel(attackable_net(), dtype=torch.float32)
    for _ in range(2):
        with pytest.warns(FastAttackWarning, match="old-weights"):
            fast._networks._update_late()
    assert fast.summary().count("changed where PyTorch records nothing") == 1


class Refused(nn.Module):
    """Batch norm over another axis than the layer before has its channels in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.norm(self.first(x)).relu())
        return logits


def test_what_the_plain_model_refuses_is_refused() -> None:
    model, x = Refused().eval(), torch.rand(5, 7, 4)
    fast = FastAttackModel(model, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="running_mean should contain 7 elements"):
        fast(x.requires_grad_())


class Writer(nn.Module):
    """Writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = attackable_net()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x.sub_(0.5).mul_(2))
        return logits


def test_a_model_that_writes_into_its_input_is_checked_and_audited() -> None:
    model, (x, y) = Writer().eval(), batch(8)
    before = x.clone()
    fast = FastAttackModel(model, dtype=torch.bfloat16)
    found = input_gradient(fast, x, y)
    assert torch.equal(x, before)
    (kind,) = fast._networks.kinds.values()
    assert kind.schedule.passes == 0, "there was an audit"
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf * 1), y), leaf)
    assert (cosine(found, wanted) > 0.9).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_may_write_into_an_input_that_needs_no_other_layout(dtype: torch.dtype) -> None:
    model, x = Writer().eval(), torch.rand(8, 6)
    model.inner = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    fast, y = FastAttackModel(model, dtype=dtype), torch.randint(3, (8,))
    before, leaf = x.clone(), x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf * 1), y), leaf)
    given = x.detach().requires_grad_()  # the same memory
    (found,) = torch.autograd.grad(nn.functional.cross_entropy(fast(given), y), given)
    assert (cosine(found, wanted) > 0.99).all()
    assert torch.equal(x, before)
    assert fast.dtype == dtype, fast.summary()


class DropsATensor(nn.Module):
    """Deletes what it needs in its first pass alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.first, self.began = nn.Linear(4, 3), torch.ones(4), False

    def forward(self, x: Tensor) -> Tensor:
        if not self.began:
            self.began, x = True, x + self.first
            del self.first
        out: Tensor = self.layer(x)
        return out


def test_a_tensor_that_a_pass_has_deleted_is_there_again_after_an_update() -> None:
    net, x = DropsATensor(), torch.rand(2, 4)
    fast = FastAttackModel(net, dtype=torch.float32)
    for _ in range(2):
        torch.testing.assert_close(fast(x.clone().requires_grad_()), net.layer(x + 1))
        with torch.no_grad():
            net.layer.weight.mul_(2)


def test_networks_that_another_thread_makes_anew_meanwhile_raise_no_key_error() -> None:
    class Raced(dict[Any, Any]):
        def __contains__(self, key: object) -> bool:
            networks._networks = {}  # as the other thread's
            return super().__contains__(key)

    fast, x = FastAttackModel(nn.Sequential(nn.Linear(4, 3)), dtype=torch.float32), torch.rand(2, 4)
    networks = fast._networks
    networks._networks = Raced(networks._networks)
    assert networks.network_in(torch.float32).engine.name == "eager"
    assert fast(x.requires_grad_()).requires_grad
