"""Minimum-norm attacks in float16 with exact decisions break whatever they break on the plain model."""

import copy
from typing import Any

import foolbox as fb
import pytest
import torch
import torchattacks
from torch import Tensor, nn

from digits import DigitsNet, grey_digits, predict, train
from fastadv_adapters.foolbox import FastPyTorchModel
from fastadv_adapters.torchattacks import accelerate

IMAGES = 25
ON_THE_BORDER = 1e-4  # torchattacks' DeepFool ends where two logits are equal but for rounding
ATTACKS: dict[str, Any] = {
    "DDN": fb.attacks.DDNAttack(steps=20),
    "L0FMN": fb.attacks.L0FMNAttack(steps=20),
    "L1FMN": fb.attacks.L1FMNAttack(steps=20),
    "L2FMN": fb.attacks.L2FMNAttack(steps=20),
    "LInfFMN": fb.attacks.LInfFMNAttack(steps=20),
    "L2DeepFool": fb.attacks.L2DeepFoolAttack(steps=15, candidates=3),
    "LinfDeepFool": fb.attacks.LinfDeepFoolAttack(steps=15, candidates=3),
}
pytestmark = [pytest.mark.usefixtures("untouched"), pytest.mark.long]


@pytest.fixture(scope="module")
def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """A network trained until it is sure, and images that it classifies correctly."""
    torch.manual_seed(0)
    data, net = grey_digits(), DigitsNet(width=8)
    train(net, data.train_images, data.train_labels, epochs=8, show_progress=False)
    right = predict(net, data.test_images) == data.test_labels
    return net, data.test_images[right][:IMAGES], data.test_labels[right][:IMAGES]


@torch.no_grad()
def lead(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """How far the logit of the true class is ahead of the largest other one."""
    own = nn.functional.one_hot(y, 10).bool()
    logits = net(x)
    ahead: Tensor = logits.where(own, -torch.inf).amax(1) - logits.where(~own, -torch.inf).amax(1)
    return ahead


@pytest.mark.parametrize("name", ATTACKS)
def test_foolbox_breaks_in_float16_what_it_breaks_on_the_plain_model(
    name: str, problem: tuple[nn.Module, Tensor, Tensor]
) -> None:
    net, x, y = problem
    plain_model = fb.PyTorchModel(copy.deepcopy(net), (0, 1))  # foolbox fills its gradients
    models = [plain_model, FastPyTorchModel(net, (0, 1), dtype=torch.float16, decisions="exact")]
    plain, fast = (lead(net, ATTACKS[name](model, x, y, epsilons=None)[1], y) < 0 for model in models)
    assert plain.float().mean() > 0.7, "the test needs an attack that breaks most images"
    assert (fast | ~plain).all()


def test_torchattacks_breaks_in_float16_what_it_breaks_on_the_plain_model(
    problem: tuple[nn.Module, Tensor, Tensor],
) -> None:
    net, x, y = problem[0], problem[1][:8], problem[2][:8]
    attacks = [torchattacks.DeepFool(copy.deepcopy(net), steps=15), torchattacks.DeepFool(net, steps=15)]
    accelerate(attacks[1], dtype=torch.float16)
    plain, fast = (lead(net, attack(x, y), y) < ON_THE_BORDER for attack in attacks)
    assert plain.float().mean() > 0.7, "the test needs an attack that breaks most images"
    assert (fast | ~plain).all()
