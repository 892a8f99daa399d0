"""The watch itself: it sees what a call changes, and passes over what a test changes between calls."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fastadv_adapters import FastAttackModel
from fastadv_adapters.networks.pair import Networks
from tests.support.tools import batch, small_net
from tests.support.watch import Watch


def _in_place(model: nn.Module) -> None:
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)


def _past_the_counter(model: nn.Module) -> None:
    next(model.parameters()).data.mul_(1.5)


def _through_numpy(model: nn.Module) -> None:
    next(model.parameters()).detach().numpy()[0] *= 1.5


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a weight": _in_place,
    "a weight through data": _past_the_counter,
    "a weight through numpy": _through_numpy,
    "a plain tensor": lambda model: model.scale.data.mul_(2),  # type: ignore[operator]
    "a mode": lambda model: model.train(not model.training),
    "a hook": lambda model: model.register_forward_hook(lambda module, args, output: None),
    "an attribute": lambda model: setattr(model, "seen", True),
    "a flag": lambda model: model.requires_grad_(False),
    "a gradient": lambda model: setattr(next(model.parameters()), "grad", torch.ones(8, 3, 3, 3)),
    "a buffer": lambda model: model[1].running_mean.zero_(),  # type: ignore[index]
    "a buffer through data": lambda model: model[1].running_mean.data.zero_(),  # type: ignore[index]
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_call_that_changes_the_model_is_seen(what: str, watched: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    net = small_net()
    vars(net)["scale"] = torch.ones(2)
    fast = FastAttackModel(net)
    refresh = Networks.refresh

    def refresh_and_spoil(self: Networks, *, unasked: bool = False) -> None:
        refresh(self, unasked=unasked)
        CHANGES[what](self.source)

    monkeypatch.setattr(Networks, "refresh", refresh_and_spoil)
    fast.update()
    assert watched.changed == ["FastAttackModel.update changed a Sequential"]
    watched.changed.clear()


# What would happen if these were those of any other module, or handed on what they are called with.
REACHING: dict[str, tuple[Callable[..., Any], Callable[[FastAttackModel], object]]] = {
    "train": (lambda fast, mode=True: fast.wrapped.train(mode), lambda fast: fast.eval()),
    "_apply": (lambda fast, fn, recurse=True: fast.wrapped._apply(fn), lambda fast: fast.double()),
    "requires_grad_": (lambda fast, flag: fast.wrapped.requires_grad_(flag), lambda fast: fast.requires_grad_(False)),
    "zero_grad": (lambda fast, *to_none: fast.wrapped.zero_grad(*to_none), lambda fast: fast.zero_grad(False)),
    "__reduce__": (lambda fast: (type, (fast.wrapped.eval(),)), copy.copy),
}


@pytest.mark.parametrize("name", REACHING)
def test_a_method_that_reaches_the_model_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = small_net()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    reach, call = REACHING[name]
    fast, watch = FastAttackModel(net), Watch()
    monkeypatch.setattr(FastAttackModel, name, reach)
    with pytest.MonkeyPatch.context() as patch:
        watch.begin(patch)
        call(fast)
    assert len(watch.changed) == 1
    assert watch.changed[0].endswith("changed a Sequential")


@pytest.mark.parametrize("name", REACHING)
def test_a_method_that_leaves_the_model_alone_is_looked_at(name: str, watched: Watch) -> None:
    fast, looks = FastAttackModel(small_net()), watched.looks
    REACHING[name][1](fast)
    assert (watched.looks - looks, watched.changed) == (1, [])


def test_what_a_test_changes_between_calls_is_its_own_affair(watched: Watch) -> None:
    net, (x, _) = small_net(), batch()
    fast = FastAttackModel(net)
    _in_place(net)
    fast(x.requires_grad_()).sum().backward()
    assert not watched.changed
    assert watched.looks == 3  # making, forward, backward


def test_calls_of_a_kind_are_looked_at_less_often_in_the_end(watched: Watch) -> None:
    fast, (x, _), made = FastAttackModel(small_net()), batch(), watched.looks
    with torch.no_grad():
        for _ in range(100):
            fast(x)
    assert watched.looks - made == 12 + 100 // 17
    _in_place(fast.wrapped)
    fast.update()
    assert watched.looks - made == 13 + 100 // 17, "another kind"
    assert not watched.changed
