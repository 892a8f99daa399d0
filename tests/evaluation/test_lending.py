"""The plain model is lent to attacks: in eval mode, in its own precision, and it is as before afterwards."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv_adapters
from fastadv_adapters import compare, evaluate
from tests.evaluation.runs import EPS, FLOAT32, data, net, verdicts
from tests.support.tools import attackable_net, fingerprint
from tests.support.torchvision import hide_if_broken

GIVEN = data()


class StoppedError(Exception):
    """Raised by an attack."""


def closed_over(model: nn.Module, told: list[bool], *, stops: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    def attack(x: Tensor, y: Tensor) -> Tensor:
        told.append(model.training)
        x = x.requires_grad_()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        if stops:
            raise StoppedError
        assert x.grad is not None
        return (x + EPS * x.grad.sign()).clamp(0, 1).detach()

    return attack


def normed() -> nn.Module:
    """In training mode, with a batch norm that would take up what it sees."""
    model = attackable_net().train()
    assert any(isinstance(part, nn.BatchNorm2d) for part in model.modules())
    return model


def counted(model: nn.Module, attack: Any) -> float:
    """By the metric."""
    hide_if_broken()
    metric = fastadv_adapters.RobustAccuracy(model, eps=EPS, attack=attack)
    metric.update(*GIVEN)
    return float(metric.compute())


def reported(model: nn.Module, attack: Any) -> float:
    return evaluate(model, GIVEN, attack, eps=EPS, progress=False, options=FLOAT32).robust_accuracy


@pytest.mark.parametrize("run", [reported, counted])
def test_an_attack_that_closes_over_the_model_attacks_it_in_eval_mode(run: Callable[..., float]) -> None:
    model, told, x = normed(), list[bool](), GIVEN[0]
    with torch.no_grad():
        model.eval()(x)
        model.train()
    before = fingerprint(model)
    found = run(model, closed_over(model, told))
    assert not any(told)
    assert fingerprint(model) == before
    assert found == run(model.eval(), closed_over(model, told))


@pytest.mark.parametrize("run", [reported, counted])
def test_after_an_error_it_is_as_before_too(run: Callable[..., float]) -> None:
    model = normed()
    before = fingerprint(model)
    with pytest.raises(StoppedError):
        run(model, closed_over(model, [], stops=True))
    assert model.training
    assert fingerprint(model) == before


def test_autocast_around_it_changes_no_verdict() -> None:
    attacks: Any = [closed_over(net(), []), "safe-pgd-3"]
    layer = next(net().children())
    dtypes, first = set[torch.dtype](), id(layer)

    def seen(part: nn.Module, given: Any, found: Tensor) -> None:
        if id(part) == first:  # and no copy of it
            dtypes.add(found.dtype)

    handle = layer.register_forward_hook(seen)
    try:
        wanted = evaluate(net(), GIVEN, attacks, eps=EPS, progress=False, options=FLOAT32)
        with torch.autocast("cpu", torch.bfloat16):
            found = evaluate(net(), GIVEN, attacks, eps=EPS, progress=False, options=FLOAT32)
            assert torch.is_autocast_enabled("cpu")
            counted(net(), closed_over(net(), []))
            compared = compare(net(), GIVEN[0][:8], eps=EPS, options=FLOAT32, repeats=1, progress=False)
    finally:
        handle.remove()
    assert verdicts(found) == verdicts(wanted)
    assert dtypes == {torch.float32}
    assert compared.rows[0].robust_accuracy is not None
