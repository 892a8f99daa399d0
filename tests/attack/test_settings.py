"""The settings of ``SafePGD`` as attributes: kept by copies, and read when it is called."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import SafePGD
from fastadv_adapters.attack.losses import LOSSES
from tests.support.tools import attackable_net, batch

pytestmark = pytest.mark.usefixtures("untouched")


def each(logits: Tensor, labels: Tensor) -> Tensor:
    """A callable that can be pickled."""
    return F.cross_entropy(logits, labels, reduction="none")


def saved_and_loaded(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": saved_and_loaded,
    "deepcopy": copy.deepcopy,
}


@pytest.fixture
def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """A model, images, and the labels that it gives them."""
    net, (x, _) = attackable_net(), batch(4)
    return net, x, net(x).argmax(1)


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("loss", [*LOSSES, each], ids=lambda loss: getattr(loss, "__name__", loss))
def test_an_attack_can_be_pickled_saved_and_copied(
    loss: Any, targeted: bool, way: str, problem: tuple[nn.Module, Tensor, Tensor]
) -> None:
    net, x, y = problem
    attack = SafePGD(net, eps=0.1, steps=2, loss=loss, targeted=targeted, random_start=False)
    other = COPIES[way](attack)
    assert repr(other) == repr(attack)
    assert torch.equal(other(x, y), attack(x, y))
