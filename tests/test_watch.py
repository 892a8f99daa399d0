"""The watch itself: it sees what a call changes, and passes over what a test changes between calls."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fastadv_adapters import FastAttackModel
from fastadv_adapters.networks import Networks
from tests.tools import batch, small_net
from tests.watch import Watch


def _in_place(model: nn.Module) -> None:
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a weight": _in_place,
    "a mode": lambda model: model.train(not model.training),
    "a hook": lambda model: model.register_forward_hook(lambda module, args, output: None),
    "an attribute": lambda model: setattr(model, "seen", True),
    "a flag": lambda model: model.requires_grad_(False),
    "a gradient": lambda model: setattr(next(model.parameters()), "grad", torch.ones(8, 3, 3, 3)),
    "a buffer": lambda model: model[1].running_mean.zero_(),  # type: ignore[index]
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_call_that_changes_the_model_is_seen(what: str, watched: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = FastAttackModel(small_net())
    refresh = Networks.refresh

    def refresh_and_spoil(self: Networks, *, unasked: bool = False) -> None:
        refresh(self, unasked=unasked)
        CHANGES[what](self.source)

    monkeypatch.setattr(Networks, "refresh", refresh_and_spoil)
    fast.update()
    assert watched.changed == ["FastAttackModel.update changed a Sequential"]
    watched.changed.clear()


def test_what_a_test_changes_between_calls_is_its_own_affair(watched: Watch) -> None:
    net, (x, _) = small_net(), batch()
    fast = FastAttackModel(net)
    _in_place(net)
    fast(x.requires_grad_()).sum().backward()
    assert not watched.changed
    assert watched.looks == 3  # making, forward, backward
