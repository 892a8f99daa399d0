"""What a model returns to attacks of the libraries: anything but logits is told where it comes from, and what to do."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import foolbox
import pytest
import torch
import torchattacks
from torch import Tensor, nn

import fastadv_adapters.foolbox
import fastadv_adapters.torchattacks
from fastadv_adapters import FastAttackModel, FastAttackOptions
from fastadv_adapters.foolbox import FastPyTorchModel, SafeLinfPGD
from tests.support.tools import batch, small_net

FLOAT32: FastAttackOptions = {"dtype": torch.float32}


class Giving(nn.Module):
    """A network whose logits are put into something."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.form = small_net(), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.net(x))


@dataclass
class Output:
    """What some libraries return."""

    logits: Tensor


FORMS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "pair": (lambda logits: (logits, logits), r"tuple: wrap Giving in a module .* logits alone, model\(x\)\[0\] say"),
    "dict": (lambda logits: {"loss": logits, "logits": logits}, r"dict: wrap .*, model\(x\)\['logits'\] say"),
    "data class": (lambda logits: Output(logits), r"Output: wrap .*, model\(x\)\.logits say"),
    "other keys": (lambda logits: OrderedDict(out=logits), r"OrderedDict: wrap .*, model\(x\)\['out'\] say"),
}


def on_pgd(net: nn.Module, x: Tensor, y: Tensor) -> Any:
    return torchattacks.PGD(FastAttackModel(net, **FLOAT32), steps=1)(x, y)


def on_cw(net: nn.Module, x: Tensor, y: Tensor) -> Any:
    return fastadv_adapters.torchattacks.accelerate(torchattacks.CW(net, steps=1), **FLOAT32)(x, y)


def on_foolbox(net: nn.Module, x: Tensor, y: Tensor) -> Any:
    return foolbox.attacks.L2CarliniWagnerAttack(steps=1)(FastPyTorchModel(net, (0, 1), **FLOAT32), x, y, epsilons=None)


def on_safe(net: nn.Module, x: Tensor, y: Tensor) -> Any:
    return SafeLinfPGD(steps=1)(FastPyTorchModel(net, (0, 1), **FLOAT32), x, y, epsilons=0.1)


def on_accelerated(net: nn.Module, x: Tensor, y: Tensor) -> Any:
    attack = fastadv_adapters.foolbox.accelerate(foolbox.attacks.LinfPGD(steps=1), **FLOAT32)
    return attack(foolbox.PyTorchModel(net.eval(), (0, 1), device="cpu"), x, y, epsilons=0.1)


ATTACKS = {
    "torchattacks": (on_pgd, on_cw),
    "foolbox": (on_foolbox, on_safe, on_accelerated),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("library", "attack"), [(name, one) for name, some in ATTACKS.items() for one in some])
def test_no_logits_are_one_clear_error(library: str, attack: Callable[..., Any], form: str) -> None:
    give, text = FORMS[form]
    with pytest.raises(ValueError, match=rf"^expected .* logits \(N, C\), which is what {library} takes, got {text}$"):
        attack(Giving(give), *batch(4))


@pytest.mark.parametrize("attack", [on_pgd, on_cw, on_foolbox, on_safe, on_accelerated])
def test_an_image_without_a_batch_is_one_clear_error(attack: Callable[..., Any]) -> None:
    """A convolution takes it for one image, and the model gives one row for all."""
    net = nn.Sequential(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), Meaned())
    x, y = batch(4)
    with pytest.raises(ValueError, match=r"images of shape \(N, 3, H, W\), got \(3, 8, 8\): add .* x\.unsqueeze\(0\)"):
        attack(net, x[0], y[:3])


class Meaned(nn.Module):
    """Leaves places out, however many dimensions there are before them."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((-1, -2))


class OfUser(torchattacks.PGD):  # type: ignore[misc]
    """Takes the first of what a model returns, by torchattacks' own method."""

    def get_logits(self, inputs: Tensor, labels: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        logits: Tensor = super().get_logits(inputs, labels, *args, **kwargs)[0]
        return logits


def test_an_attack_of_the_users_may_take_anything() -> None:
    x, y = batch(4)
    fast = FastAttackModel(Giving(lambda logits: (logits, logits)), **FLOAT32)
    assert OfUser(fast, steps=1)(x, y).shape == x.shape
    assert isinstance(fast(x), tuple)
