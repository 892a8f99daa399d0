"""The default loss: a direction that neither the scale nor the number of the logits changes, and that always exists."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadv_adapters.attack.directions import SHARPNESS, auto_ascent, sharpness
from fastadv_adapters.attack.losses import resolve_loss
from fastadv_adapters.attack.safe_pgd import SafePGD
from fastadv_adapters.foolbox import FastPyTorchModel, SafeL1PGD, SafeL2PGD, SafeLinfPGD
from fastadv_adapters.model import FastAttackModel
from tests.attack.test_balls import NORMS
from tests.attack.test_safe_pgd import EPS, Scaled, broken, seed, task

LABELS = torch.tensor([1, 2, 0])


def some_logits(classes: int = 10, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, classes, dtype=dtype, generator=seed())


def direction(logits: Tensor, progress: float = 0.5, *, targeted: bool = False) -> Tensor:
    return resolve_loss("auto", targeted).ascent(logits, LABELS, progress)[1]


def test_the_direction_is_the_one_worked_out_by_hand() -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0, 2.0]], dtype=torch.float64)  # the third largest is 3 below the largest
    for progress, factor in ((0.0, 3.0), (0.5, math.sqrt(27)), (1.0, 9.0)):
        values, found = auto_ascent(logits, torch.tensor([1]), progress)
        weights = [math.exp(factor * z / 3) for z in (1.0, 3.0, 2.0)]
        share = [w / sum(weights) for w in weights]
        expected = torch.tensor([[share[0], -1.0, share[1], share[2]]], dtype=torch.float64)
        torch.testing.assert_close(found, expected)
        assert values.tolist() == [-2.0]


def test_the_factor_rises_by_equal_ratios() -> None:
    factors = [float(sharpness(step / 4)) for step in range(5)]
    assert (factors[0], factors[-1]) == pytest.approx(SHARPNESS)
    assert {round(b / a, 9) for a, b in itertools.pairwise(factors)} == {round(3**0.25, 9)}


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("classes", [3, 4, 10, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("power", [-60, -7, 5, 60])
def test_a_power_of_two_changes_no_bit_of_the_direction(
    power: int, dtype: torch.dtype, classes: int, targeted: bool
) -> None:
    logits = some_logits(classes, dtype)
    expected = direction(logits, targeted=targeted)
    assert torch.equal(direction(logits * 2.0**power, targeted=targeted), expected)
    assert len(expected.unique()) > 4


@pytest.mark.parametrize("shift", [1.0, -1000.0])
def test_neither_does_a_summand(shift: float) -> None:
    torch.testing.assert_close(direction(some_logits() + shift), direction(some_logits()))


@pytest.mark.parametrize("targeted", [False, True])
def test_values_are_the_margin(targeted: bool) -> None:
    loss, margin, logits = resolve_loss("auto", targeted), resolve_loss("margin", targeted), some_logits()
    assert torch.equal(loss(logits, LABELS), margin(logits, LABELS))
    assert torch.equal(loss.ascent(logits, LABELS)[0], margin(logits, LABELS))


def test_two_classes_have_one_direction() -> None:
    logits = torch.tensor([[3.0, 3.0], [1.0, -4.0], [-1e30, 1e30]], dtype=torch.float64)
    found = resolve_loss("auto").ascent(logits, torch.tensor([1, 0, 1]))[1]
    assert found.tolist() == [[1, -1], [-1, 1], [1, -1]]


def test_ties_share() -> None:
    logits = torch.tensor([[2.0, 2, 2, 1], [7, 5, 5, 5], [0, 0, 0, 0]], dtype=torch.float64)
    found = resolve_loss("auto").ascent(logits, torch.tensor([0, 0, 3]))[1]
    expected = [[-1, 0.5, 0.5, 0], [-1, 1 / 3, 1 / 3, 1 / 3], [1 / 3, 1 / 3, 1 / 3, -1]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    "row",
    [
        [INF, 1.0, 0.0, -1.0],
        [INF, INF, INF, 0.0],
        [0.0, -INF, -INF, -INF],
        [-INF, -INF, -INF, -INF],
        [NAN, 1.0, 2.0, 3.0],
        [NAN, NAN, NAN, NAN],
        [1e308, -1e308, 1e308, 0.0],
        [5e-324, 0.0, 0.0, 0.0],
    ],
)
@pytest.mark.parametrize("label", [0, 3])
@pytest.mark.parametrize("targeted", [False, True])
def test_the_direction_is_finite_for_all_logits(row: list[float], label: int, targeted: bool) -> None:
    logits = torch.tensor([row], dtype=torch.float64)
    found = resolve_loss("auto", targeted).ascent(logits, torch.tensor([label]))[1]
    assert bool(found.isfinite().all())
    assert found[0, label] == (1 if targeted else -1)
    assert found.sum().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_an_attack_takes_the_same_steps_on_logits_of_every_scale(norm: str) -> None:
    net, x, y = task(16)
    found = [
        SafePGD(Scaled(net, factor), eps=EPS[norm], norm=norm, steps=6, generator=seed())(x, y)  # type: ignore[arg-type]
        for factor in (1.0, 2.0**-10, 2.0**10)
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert 2 <= int(broken(net, found[0], y).sum()) <= 14
    ce = [
        SafePGD(Scaled(net, factor), eps=EPS[norm], norm=norm, steps=6, loss="ce", generator=seed())(x, y)  # type: ignore[arg-type]
        for factor in (1.0, 2.0**-10)
    ]
    assert not torch.equal(ce[0], ce[1])


@pytest.mark.parametrize("kind", [SafeLinfPGD, SafeL2PGD, SafeL1PGD])
def test_so_do_the_attacks_of_foolbox(kind: Any) -> None:
    net, x, y = task(8)
    eps = EPS[{SafeLinfPGD: "linf", SafeL2PGD: "l2"}.get(kind, "l1")]
    found = []
    for factor in (1.0, 2.0**-10):
        fast = FastAttackModel(Scaled(net, factor), dtype=torch.float32)
        attack = kind(steps=6, random_start=False)
        found.append(attack(FastPyTorchModel(fast, bounds=(0, 1)), x, y, epsilons=eps)[1])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], x)


def test_the_steps_of_an_attack_go_from_the_first_factor_to_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, y = task(4)
    attack = SafePGD(net, eps=0.1, steps=5, restarts=2, generator=seed())
    seen: list[float] = []

    def noted(logits: Tensor, labels: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        seen.append(progress)
        return auto_ascent(logits, labels, progress)

    object.__setattr__(attack.loss, "closed", noted)
    attack(x, y)
    assert seen == [0, 0.25, 0.5, 0.75, 1] * 2
    SafePGD(net, eps=0.1, steps=1)(x, y)  # a single step is the first
