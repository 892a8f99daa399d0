"""The budget of an attack that is brought along: read off it, reported, and not hidden by another one."""

import math
from functools import partial
from typing import Any

import foolbox
import pytest
import torch
import torchattacks
from torch import Tensor, nn

from digits import grey_digits
from fastadv_adapters import compare
from fastadv_adapters.comparison import Own, doubt_own, own_budget
from fastadv_adapters.comparison.attacking import attacker_for
from fastadv_adapters.comparison.budgets import Budget
from fastadv_adapters.foolbox import SafeLinfPGD
from fastadv_adapters.torchattacks import SafePGD

DATA = grey_digits(test_size=8)
X, Y = DATA.test_images, DATA.test_labels
EPS = 8 / 255


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def brighter(model: nn.Module, x: Tensor, y: Tensor, eps: float = 0.2) -> Tensor:
    """No longer within the bounds, which is nobody's business here."""
    return x + eps


def unsaid(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Says nothing of its budget."""
    return x + 0.2


class Object:
    """An attack with a budget in its attributes."""

    def __init__(self, eps: Any, norm: Any) -> None:
        self.eps, self.norm = eps, norm

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return x


MODEL = linear()
FGSM = partial(torchattacks.FGSM, MODEL)


class Steps(torchattacks.attack.Attack):  # type: ignore[misc]
    """An attack of the user's own in torchattacks' manner, in whichever norm."""

    def __init__(self, **settings: Any) -> None:
        super().__init__("Steps", MODEL)
        self.__dict__.update(eps=1.0, **settings)


class DerivedL2(torchattacks.PGD):  # type: ignore[misc]
    """Another one; what its name means is unknown."""


def normalised(attack: Any) -> Any:
    attack.set_normalization_used([0.3], [0.25])
    return attack


@pytest.mark.parametrize(
    ("attack", "own"),
    [
        (torchattacks.PGD(MODEL, eps=0.1), Own(0.1, "linf")),
        (torchattacks.PGDL2(MODEL, eps=2), Own(2.0, "l2")),
        (torchattacks.APGD(MODEL, norm="L2", eps=0.5), Own(0.5, "l2")),
        (torchattacks.PIFGSM(MODEL, max_epsilon=0.1), Own(0.1, "linf")),
        (SafePGD(MODEL, eps=0.1, norm="l1"), Own(0.1, "l1")),
        (torchattacks.CW(MODEL), Own(None, "l2")),
        (torchattacks.DeepFool(MODEL), Own(None, "l2")),
        (torchattacks.EADL1(MODEL), Own(None, "l1")),
        (torchattacks.EADEN(MODEL), Own()),  # minimises a mix
        (Object(None, "L1"), Own(None, "l1")),
        (torchattacks.MultiAttack([FGSM(eps=0.1), FGSM(eps=0.1)]), Own(0.1, "linf")),
        (torchattacks.MultiAttack([FGSM(eps=0.1), FGSM(eps=0.2)]), Own()),
        (foolbox.attacks.L2PGD(), Own(None, "l2")),
        (foolbox.attacks.L0FMNAttack(), Own()),
        (foolbox.attacks.BinarizationRefinementAttack(), Own()),  # raises if it is asked for its distance
        (Object(0.1, float("inf")), Own(0.1, "linf")),
        (Object("much", "l2"), Own(None, "l2")),
        (normalised(torchattacks.PGDL2(MODEL, eps=2)), Own()),
        (normalised(SafePGD(MODEL, eps=0.1)), Own()),
        (normalised(torchattacks.MultiAttack([FGSM(eps=0.1), FGSM(eps=0.1)])), Own()),
        (torchattacks.MultiAttack([normalised(FGSM(eps=0.1)), normalised(FGSM(eps=0.1))]), Own()),
        (Steps(), Own(1.0)),
        (Steps(norm="L2"), Own(1.0, "l2")),
        (DerivedL2(MODEL, eps=0.1), Own(0.1)),
        (Object(0.1, True), Own(0.1)),
        (Object(True, "l2"), Own(None, "l2")),
        (brighter, Own()),  # its default value may be anything's
        (partial(brighter, eps=0.3), Own(0.3)),
        (partial(brighter, eps=True), Own()),
        (partial(brighter, y=Y), Own()),
        (unsaid, Own()),
        (print, Own()),
        (None, Own()),
    ],
)
def test_the_budget_of_an_attack_is_read_off_it(attack: Any, own: Own) -> None:
    assert own_budget(attack) == own


def test_notes_name_the_attack_its_budget_and_the_one_that_was_asked_for() -> None:
    assert doubt_own("PGD", Own(), [EPS], "linf") == []
    assert doubt_own("PGD", Own(0.031372549, "linf"), [EPS], "linf") == [], "the same but for digits"
    (weaker,) = doubt_own("PGD", Own(0.01), [0.02], "linf")
    assert weaker == (
        "the attack PGD has eps 0.01 of its own, and the evaluation eps 0.02: it is weaker than that budget allows. "
        "Make it with the same eps"
    )
    (larger,) = doubt_own("PGD", Own(0.04), [0.02], "linf")
    assert "eps 0.04 of its own, and the evaluation eps 0.02: what it finds beyond that does not count" in larger
    weaker, larger = doubt_own("PGD", Own(0.02), [0.005, 0.01, 0.02, 0.04], "linf")
    assert "evaluation eps 0.04: it is weaker" in weaker
    assert "evaluation eps 0.005, 0.01: what it finds" in larger
    assert larger.endswith("in a call for each")
    (norm,) = doubt_own("PGDL2", Own(1.0, "l2"), [0.02], "linf")
    assert norm.startswith("the attack PGDL2 measures in l2, and the evaluation in linf")


@pytest.mark.parametrize(
    ("attack", "settings", "eps", "norm"),
    [
        (None, {}, EPS, "linf"),
        (None, {"eps": 0.1, "norm": "l2"}, 0.1, "l2"),
        (torchattacks.FGSM(MODEL, eps=0.1), {}, 0.1, "linf"),
        (torchattacks.FGSM(MODEL, eps=0.1), {"eps": 0.1 + 1e-9}, 0.1, "linf"),
        (torchattacks.PGDL2(MODEL, eps=2, steps=1), {}, 2, "l2"),
        (foolbox.attacks.L2FastGradientAttack(), {}, EPS, "l2"),
        (foolbox.attacks.L2FastGradientAttack(), {"eps": 0.3}, 0.3, "l2"),
        (partial(brighter, eps=0.2), {}, 0.2, "linf"),
        (brighter, {}, None, "linf"),
        (brighter, {"eps": 0.3}, 0.3, "linf"),
        (normalised(torchattacks.FGSM(MODEL, eps=0.1)), {"eps": 0.1 / 0.25}, 0.1 / 0.25, "linf"),
        (Steps(forward=lambda x, y: x), {"norm": "l2"}, 1, "l2"),
        (unsaid, {}, None, "linf"),
        (unsaid, {"eps": 0.2, "norm": "linf"}, 0.2, "linf"),
    ],
)
def test_the_budget_that_compare_reports_is_that_of_the_attack(
    attack: Any, settings: dict[str, Any], eps: float | None, norm: str
) -> None:
    found = compare(MODEL, X, Y, attack=attack, repeats=1, progress=False, **settings)
    assert found.setting["norm"] == norm
    assert found.setting["eps"] == (None if eps is None else pytest.approx(eps))
    said = "with a budget of its own" if eps is None else f"eps {eps:.4g} in {norm}"
    assert said in found._repr_html_()
    assert found.notes == []


@pytest.mark.parametrize(
    ("attack", "settings", "text"),
    [
        (
            torchattacks.FGSM(MODEL, eps=0.1),
            {"eps": EPS},
            "eps to be that of the attack, 0.1, got 0.0313725: leave eps",
        ),
        (partial(brighter, eps=0.3), {"eps": 0.2}, "eps to be that of the attack, 0.3, got 0.2"),
        (torchattacks.PGDL2(MODEL), {"norm": "linf"}, "norm to be that of the attack, 'l2', got 'linf'"),
        (foolbox.attacks.L2PGD(), {"norm": "l1"}, "norm to be that of the attack, 'l2', got 'l1'"),
    ],
)
def test_another_budget_than_that_of_the_attack_is_an_error(attack: Any, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"expected {text}"):
        compare(MODEL, X, Y, attack=attack, **settings)


def test_attacks_that_were_put_into_a_multiattack_later_are_looked_at_too() -> None:
    model, other = linear(), linear()
    multi = torchattacks.MultiAttack([torchattacks.FGSM(model), torchattacks.FGSM(model)])
    multi.attacks.append(torchattacks.PGD(other, eps=EPS / 2, steps=1))
    assert own_budget(multi) == Own(), "of several budgets"
    budget = Budget(EPS, "linf", (0, 1))
    copied: Any = attacker_for(multi, model, budget).on_plain(model)
    assert [part.model for part in copied.attacks] == [model, model, other]
    multi.attacks[2].set_mode_targeted_by_label(quiet=True)
    with pytest.raises(ValueError, match="takes labels for the true classes"):
        attacker_for(multi, model, budget)


def test_images_outside_of_the_budget_that_is_reported_are_noted() -> None:
    """Of an attack that does not say what its budget is, the call may say something wrong."""
    (note,) = compare(MODEL, X, Y, attack=unsaid, eps=0.1, repeats=1, progress=False).notes
    assert note.startswith("images of the attack are up to 0.2 (limit 0.1) away in linf, which is outside of eps:")
    (note,) = compare(MODEL, X, Y, attack=unsaid, eps=0.1, bounds=(0, math.inf), repeats=1, progress=False).notes
    assert note.startswith("images of the attack are up to 0.2 (limit 0.1) away in linf, which is outside of eps:")
    half, x = linear().bfloat16(), X.bfloat16()
    assert compare(half, x, Y, attack=partial(brighter, eps=0.2), repeats=1, progress=False).notes == [], "it rounds"


@pytest.mark.parametrize(
    ("kind", "made"),
    [
        (torchattacks.PGD, r"class PGD: make the attack first, PGD\(model, eps=...\)"),
        (foolbox.attacks.DDNAttack, r"class DDNAttack: make the attack first, DDNAttack\(\)"),
        (SafeLinfPGD, r"class SafeLinfPGD: make the attack first, SafeLinfPGD\(\)"),
    ],
)
def test_a_class_in_the_place_of_an_attack_is_an_error(kind: Any, made: str) -> None:
    with pytest.raises(TypeError, match=f"expected an attack object in attack, got the {made}"):
        compare(MODEL, X, Y, attack=kind)
