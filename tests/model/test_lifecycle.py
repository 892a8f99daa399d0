"""From copying to garbage: what a fast model does as an object among others."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import foolbox
import pytest
import torch
import torchattacks
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel, SafePGD
from fastadv_adapters.foolbox import FastPyTorchModel
from fastadv_adapters.networks import freshness
from fastadv_adapters.torchattacks import accelerate
from tests.support.copies import COPIES
from tests.support.tools import (
    attackable_net,
    batch,
    cosine,
    fingerprint,
    head_of,
    input_gradient,
    reference,
    small_net,
)

FLOAT32: Any = {"dtype": torch.float32}


copied = pytest.mark.parametrize("again", COPIES.values(), ids=COPIES.keys())


# --- copies -----------------------------------------------------------------------------------------------------------


@copied
def test_a_copy_answers_alike_and_follows_its_own_model(again: Callable[[Any], Any]) -> None:
    net, (x, y) = small_net().train(), batch()
    fast = FastAttackModel(net, **FLOAT32, fuse_bn=False, logits_dtype=torch.float64, loss_scale=256.0)
    expected = input_gradient(fast, x, y)
    other = again(fast)
    assert torch.equal(input_gradient(other, x, y), expected)
    assert other.summary().replace(", 0 so far", "") == fast.summary().replace(", 0 so far", "")
    assert other.gradient_stats.passes == 1
    assert all(part.training for part in other.wrapped.modules())
    with torch.no_grad():
        head_of(other.wrapped).weight.mul_(torch.linspace(0, 2, 10)[:, None])
    assert (cosine(input_gradient(other, x, y), expected) < 0.999).any()
    assert torch.equal(input_gradient(fast, x, y), expected)


@copied
def test_views_that_are_copied_together_share_one_copy(again: Callable[[Any], Any]) -> None:
    fast = FastAttackModel(attackable_net(), **FLOAT32)
    attack = SafePGD(fast, eps=0.05, steps=2, generator=None, random_start=False)
    (x, y) = batch()
    one, exact, other = again([fast, fast.view(decisions="exact", full_precision=True), attack])
    assert one._networks is exact._networks is other.model._networks is other.exact._networks
    assert one._networks is not fast._networks
    assert (exact._decisions, exact._full_precision) == ("exact", True)
    assert torch.equal(other(x, y), attack(x, y))


class Trainer(nn.Module):
    """Holds a network and the fast model of it, in an order that copying has to untangle."""

    def __init__(self) -> None:
        super().__init__()
        net = small_net()
        self.fast = FastAttackModel(net, **FLOAT32)
        self.net = net


@copied
def test_a_copy_of_both_keeps_them_together(again: Callable[[Any], Any]) -> None:
    trainer = again(Trainer())
    assert trainer.fast.wrapped is trainer.net
    x, y = batch()
    before = input_gradient(trainer.fast, x, y)
    with torch.no_grad():
        trainer.net[0].weight.mul_(2)
    assert not torch.equal(input_gradient(trainer.fast, x, y), before)


@copied
def test_a_model_that_has_diverged_can_still_be_copied(again: Callable[[Any], Any]) -> None:
    fast, (x, y) = FastAttackModel(small_net(), **FLOAT32), batch()
    with torch.no_grad():
        head_of(fast.wrapped).bias[3] = float("nan")  # type: ignore[arg-type]
    other = again(fast)
    assert input_gradient(other, x, y).count_nonzero() == 0
    assert other.gradient_stats.nonfinite == len(x)


@copied
def test_foolbox_models_and_accelerated_attacks_can_be_copied(again: Callable[[Any], Any]) -> None:
    net, (x, y) = attackable_net(), batch()
    fmodel = FastPyTorchModel(net, (0, 1), **FLOAT32, preprocessing={"mean": [0.1] * 3, "std": [0.9] * 3, "axis": -3})
    linf = foolbox.attacks.LinfPGD(steps=2, random_start=False)
    for model in (fmodel, fmodel.transform_bounds((-1, 1)), fmodel.in_full_precision()):
        other = again(model)
        assert type(other) is FastPyTorchModel
        assert other.bounds == model.bounds
        assert other.fast.wrapped is not net
        images = x * (model.bounds[1] - model.bounds[0]) + model.bounds[0]
        assert torch.equal(linf(other, images, y, epsilons=0.1)[0], linf(model, images, y, epsilons=0.1)[0])
    attack = accelerate(torchattacks.PGD(net, random_start=False), **FLOAT32)
    assert torch.equal(again(attack)(x, y), attack(x, y))


# --- as a part of something else --------------------------------------------------------------------------------------


class TrainingModule(nn.Module):
    """A network, its fast model and an attack in one module, as training frameworks want it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()
        self.fast = FastAttackModel(self.net, **FLOAT32)
        self.attack = SafePGD(self.fast, eps=0.03, steps=1, random_start=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.net(self.attack(x, y)), y)


def test_a_training_module_saves_trains_and_moves_as_if_the_fast_model_were_not_there() -> None:
    module, (x, y) = TrainingModule(), batch()
    own = {f"net.{name}" for name in module.net.state_dict()}
    assert set(module.state_dict()) == own
    assert module.load_state_dict(module.state_dict(), strict=True).missing_keys == []
    trainable = [p for p in module.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in module.net.parameters()}
    assert list(module.fast.buffers()) == []
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    for _ in range(2):
        module.train()
        assert (module.net.training, module.fast.training) == (True, False)
        optimizer.zero_grad()
        module(x, y).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        module.eval()
        expected = input_gradient(reference(module.net), x.double(), y)
        assert (cosine(input_gradient(module.fast, x, y), expected) > 0.9999).all()
    module.requires_grad_(True).zero_grad()
    module.apply(lambda part: None)
    module.double()
    assert input_gradient(module.fast, x.double(), y).dtype == torch.float64
    assert module.fast.view(decisions="fast")(x.double()).shape == (6, 10)


@pytest.mark.parametrize("value", [nn.Linear(64, 10), nn.Parameter(torch.zeros(10)), 2.0])
def test_what_the_wrapped_model_has_is_not_set_on_the_fast_one(value: Any) -> None:
    net = small_net()
    net.head = nn.Identity()
    fast = FastAttackModel(net, **FLOAT32)
    with pytest.raises(AttributeError, match="expected head to be set on the wrapped model"):
        fast.head = value
    fast.name = "what it does not have"
    assert fast.name == "what it does not have"
    assert isinstance(net.head, nn.Identity)


def test_functional_call_with_weights_of_the_wrapped_model_is_refused() -> None:
    net = nn.Linear(4, 3)
    weights = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    with pytest.raises(AttributeError, match="expected weight to be set on the wrapped model"):
        torch.func.functional_call(FastAttackModel(net, **FLOAT32), weights, torch.rand(2, 4))


def test_two_fast_models_of_one_model_do_not_disturb_each_other() -> None:
    net, (x, y) = small_net(), batch()
    first, second = FastAttackModel(net, **FLOAT32), FastAttackModel(net, dtype=torch.bfloat16, auto_update=False)
    old = input_gradient(second, x, y)
    before = fingerprint(net)
    with torch.no_grad():
        net[0].weight.mul_(2)  # type: ignore[operator]
    assert not torch.equal(input_gradient(first, x, y), input_gradient(FastAttackModel(small_net(), **FLOAT32), x, y))
    assert torch.equal(input_gradient(second, x, y), old)
    del first
    gc.collect()
    assert fingerprint(net) != before
    assert (cosine(input_gradient(second.update(), x, y), input_gradient(reference(net), x.double(), y)) > 0.9).all()


# --- garbage ----------------------------------------------------------------------------------------------------------


def parts_of(fast: FastAttackModel) -> list[weakref.ref[Any]]:
    """References to all that a fast model has of its own."""
    networks = fast._networks
    modules = [*networks.folded.network.modules(), *networks.twin.engine.network.modules()]
    tensors = [t for m in modules for t in (*m.parameters(False), *m.buffers(False))]
    return [weakref.ref(part) for part in (fast, networks, networks._freshness, *modules, *tensors)]


@contextmanager
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def refuses(fast: FastAttackModel, x: Tensor) -> bool:
    try:
        fast(x)
    except RuntimeError:
        return True
    return False


@pytest.mark.parametrize("use", ["nothing", "attack", "update", "error", "structure"])
def test_a_dropped_fast_model_is_freed_at_once_with_all_it_has(use: str) -> None:
    net, (x, y) = small_net(), batch()
    with without_collector():
        watched = len(freshness._watching)
        fast = FastAttackModel(net, **FLOAT32)
        attack = SafePGD(fast, eps=0.1, steps=2)
        if use == "attack":
            attack(x, y)
        elif use == "update":
            input_gradient(fast.update(), x, y)
        elif use == "error":
            assert refuses(fast, x[:, :2])
        elif use == "structure":
            vars(net)["flag"] = True
            input_gradient(fast, x, y)
        parts = parts_of(fast)
        assert len(freshness._watching) == watched + 1
        eager = fast._networks.fast.name == "eager"  # recordings and compiled code hold cycles of their own
        del fast, attack
        if not eager:
            gc.collect()
        assert [part() for part in parts if part() is not None] == []
        assert len(freshness._watching) == watched
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(net.parameters(), lr=0.1).step()


def test_a_result_keeps_the_networks_only_until_its_graph_is_gone() -> None:
    net, (x, y) = small_net(), batch()
    fast = FastAttackModel(net, **FLOAT32)
    logits = fast(x.requires_grad_())
    parts = parts_of(fast)
    del fast
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y), x)
    assert (cosine(gradient, input_gradient(reference(net), x.detach().double(), y)) > 0.9999).all()
    del logits
    gc.collect()
    assert [part() for part in parts if part() is not None] == []


def test_nothing_keeps_the_wrapped_model_but_its_fast_model() -> None:
    net = small_net()
    fast, (x, y) = FastAttackModel(net, **FLOAT32), batch()
    input_gradient(fast, x, y)
    gone = weakref.ref(net)
    del net
    assert gone() is fast.wrapped
    del fast
    gc.collect()
    assert gone() is None


def test_a_fast_model_that_is_built_anew_frees_the_old_networks() -> None:
    net, (x, y) = small_net(), batch()
    fast = FastAttackModel(net, **FLOAT32)
    input_gradient(fast, x, y)
    old = parts_of(fast)[3:]  # past the fast model, its networks' holder and the watch, which stay
    vars(net)["flag"] = True
    input_gradient(fast, x, y)
    gc.collect()
    assert [part() for part in old if part() is not None] == []
