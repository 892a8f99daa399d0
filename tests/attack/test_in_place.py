"""Functions of the user's that write into what they are given change nothing but that."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel, SafePGD
from fastadv_adapters.attack.losses import resolve_loss
from tests.support.tools import attackable_net, batch

pytestmark = pytest.mark.usefixtures("untouched")
SETTINGS: list[dict[str, Any]] = [{}, {"early_stop": True}, {"steps": 0}, {"steps": 0, "targeted": True}]


def margin(z: Tensor, y: Tensor) -> Tensor:
    others = z.scatter(1, y[:, None], -1e9)
    return others.amax(1) - z.gather(1, y[:, None]).squeeze(1)


def writing(z: Tensor, y: Tensor) -> Tensor:
    """The same margin, with the label's logit taken out in place, and the labels spoilt as well."""
    rows, labels = torch.arange(len(z)), y.clone()
    y.zero_()
    own = z[rows, labels]
    z[rows, labels] = -1e9
    return z.amax(1) - own


@pytest.fixture
def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """A model, images, and the labels that it gives them."""
    net, (x, _) = attackable_net(), batch(6)
    return net, x, net(x).argmax(1)


def found(net: nn.Module, x: Tensor, y: Any, loss: Any, **settings: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return SafePGD(net, **{"eps": 0.01, "steps": 4, "loss": loss, "generator": generator, **settings})(x, y)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
def test_a_loss_may_write_into_its_logits_and_labels(
    settings: dict[str, Any], fast: bool, problem: tuple[nn.Module, Tensor, Tensor]
) -> None:
    net, x, y = problem
    model = FastAttackModel(net, dtype=torch.float32) if fast else net
    expected = found(model, x, y, margin, **settings)
    assert torch.equal(found(model, x, y, writing, **settings), expected)
    assert torch.equal(y, net(x).argmax(1))


class Pair(nn.Module):
    """Logits and features."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.net(x)
        return {"logits": z, "features": z.tanh()}


def apart(outputs: dict[str, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(outputs["logits"], targets[0], reduction="none").sum(1) + outputs["features"].sum(1)


def apart_in_place(outputs: dict[str, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
    own, (clean, weights) = outputs.pop("logits"), targets
    values = own.sub_(clean).square_().sum(1) + outputs["features"].mul_(weights).sum(1)
    clean.fill_(0)
    return values


def test_a_loss_may_write_into_trees_of_outputs_and_targets(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, _ = problem
    targets = net(x).detach(), torch.ones(6, 10)
    expected = found(Pair(net), x, targets, apart, classes=False)
    assert torch.equal(found(Pair(net), x, targets, apart_in_place, classes=False), expected)
    assert torch.equal(targets[0], net(x))


def test_losses_of_ones_own_leave_the_logits_alone(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = problem
    logits, loss = net(x).detach(), resolve_loss(writing)
    kept = logits.clone(), y.clone()
    values, direction = loss.ascent(logits, y)
    assert torch.equal(loss(logits, y), values)
    assert bool((direction.abs().amax(1) == 1).all())
    assert torch.equal(logits, kept[0])
    assert torch.equal(y, kept[1])


def shifted(x: Tensor) -> Tensor:
    return x * 0.5 + 0.25


def shifted_in_place(x: Tensor) -> Tensor:
    return x.mul_(0.5).add_(0.25)


def test_what_stands_before_the_model_may_write_into_its_input(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, _ = problem
    y, results = net(shifted(x)).argmax(1), []
    for before in (shifted, shifted_in_place):
        attack = SafePGD(net, eps=0.05, steps=3, random_start=False)
        attack.before = before
        results.append(attack(x, y))
    assert torch.equal(*results)
