"""The settings of ``SafePGD`` as attributes: kept by copies, and read when it is called."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import SafePGD
from fastadv_adapters.attack.losses import LOSSES, Loss, asked_of, resolve_loss
from tests.support.copies import COPIES
from tests.support.tools import attackable_net, batch

pytestmark = pytest.mark.usefixtures("untouched")


def each(logits: Tensor, labels: Tensor) -> Tensor:
    """A callable that can be pickled."""
    return F.cross_entropy(logits, labels, reduction="none")


@pytest.fixture
def problem() -> tuple[nn.Sequential, Tensor, Tensor]:
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


def run(attack: SafePGD, x: Tensor, y: Any, **settings: Any) -> Tensor:
    """What an attack finds after these settings, from one random state."""
    for name, value in settings.items():
        setattr(attack, name, value)
    attack.generator = torch.Generator().manual_seed(0)
    return attack(x, y)


LATER: list[dict[str, Any]] = [
    {"targeted": True},
    {"loss": "ce"},
    {"loss": "dlr", "targeted": True},
    {"targeted": True, "loss": "margin"},
    {"loss": each},
    {"loss": each, "classes": False},
    {"early_stop": True},
    {"norm": "l2", "eps": 1.0},
    {"alpha": 0.05, "steps": 3, "restarts": 2},
    {"bounds": (-1, 2)},
    {"random_start": False},
]


@pytest.mark.parametrize("settings", LATER, ids=[", ".join(settings) for settings in LATER])
def test_a_setting_that_is_set_later_counts_as_one_that_was_given(
    settings: dict[str, Any], problem: tuple[nn.Module, Tensor, Tensor]
) -> None:
    net, x, y = problem
    given = SafePGD(net, **{"eps": 0.1, "steps": 2, **settings})
    expected = run(given, x, y)
    for way in (lambda a: a, *COPIES.values()):
        later = way(SafePGD(net, eps=0.1, steps=2))
        assert torch.equal(run(later, x, y, **settings), expected)
        assert repr(later) == repr(given)
        assert way(later).loss == given.loss


def test_another_model_that_is_set_later_is_attacked(problem: tuple[nn.Sequential, Tensor, Tensor]) -> None:
    net, x, y = problem
    other = nn.Sequential(net[0], nn.Tanh(), nn.Flatten(), nn.Linear(8 * 64, 10))
    attack = SafePGD(net, eps=0.1, steps=2)
    before = run(attack, x, y)
    assert torch.equal(run(attack, x, y, model=other), run(SafePGD(other, eps=0.1, steps=2), x, y))
    assert attack.model.wrapped is other
    assert not torch.equal(run(attack, x, y), before)


def test_a_loss_is_read_as_an_object_and_may_be_set_as_one(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = problem
    attack, other = SafePGD(net, eps=0.1, steps=2), SafePGD(net, eps=0.1, steps=2, loss="ce", targeted=True)
    attack.loss = other.loss
    assert attack.loss == resolve_loss("ce")
    attack.targeted = True
    assert torch.equal(run(attack, x, y), run(other, x, y))
    own = Loss("own", each)
    attack.loss = own
    assert attack.loss is own
    for asked in (*LOSSES, each, own):
        for targeted in (False, True):
            assert asked_of(resolve_loss(asked, targeted)) is asked


@pytest.mark.parametrize(
    ("name", "value", "kind", "text"),
    [
        ("loss", "mse", ValueError, "expected loss to be one of"),
        ("loss", 3, TypeError, "expected loss to be one of"),
        ("eps", -1, ValueError, "expected eps to be finite"),
        ("alpha", "big", TypeError, "expected alpha to be a number"),
        ("steps", 1.5, TypeError, "expected steps to be an int"),
        ("restarts", 0, ValueError, "expected restarts to be at least 1"),
        ("norm", "l3", ValueError, "expected norm to be one of"),
        ("bounds", (1, 0), ValueError, "expected bounds"),
        ("generator", 0, TypeError, "expected generator"),
        ("classes", 1, TypeError, "expected classes"),
        ("targeted", "False", ValueError, "expected targeted to be True or False, got 'False'"),
        ("early_stop", 0, ValueError, "expected early_stop to be True or False, got 0"),
        ("random_start", None, ValueError, "expected random_start to be True or False, got None"),
    ],
)
def test_a_wrong_setting_is_an_error_when_it_is_set(name: str, value: Any, kind: type[Exception], text: str) -> None:
    attack = SafePGD(nn.Linear(2, 2), eps=0.1)
    before = repr(attack)
    with pytest.raises(kind, match=text):
        setattr(attack, name, value)
    assert repr(attack) == before
    with pytest.raises(kind, match=text):
        SafePGD(nn.Linear(2, 2), **{"eps": 0.1, name: value})


def test_a_loss_for_targets_that_are_neither_or_both_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected targeted to be True or False, got 'False'"):
        resolve_loss("ce", "False")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"early_stop": True}, "for early_stop=True"),
        ({"targeted": True}, "for targeted=True"),
        ({"loss": "ce"}, "for loss='ce'"),
    ],
)
def test_a_setting_without_the_classes_that_it_needs_is_an_error_at_the_next_call(
    settings: dict[str, Any], text: str, problem: tuple[nn.Module, Tensor, Tensor]
) -> None:
    net, x, y = problem
    attack = SafePGD(net, eps=0.1, steps=1, loss=each, classes=False)
    attack(x, y)
    with pytest.raises(ValueError, match=f"expected y to hold class labels {text}"):
        run(attack, x, y, **settings)
    attack.classes = None
    assert run(attack, x, y).shape == x.shape
